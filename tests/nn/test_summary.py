"""The walk through a model: which layers it finds and what each is given, without touching the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tdlrt_jax.models import LeNet5
from tdlrt_jax.nn import TuckerConv, TuckerLinear
from tdlrt_jax.nn.summary import record_inputs, summarize
from tdlrt_jax.nn.transposed import TuckerConvTranspose


class Net(nnx.Module):
    """Dense and Tucker layers of all kinds in training mode; one called twice, one under ``jit``, one never."""

    def __init__(self, rngs):
        self.unused = nnx.Linear(3, 3, rngs=rngs)
        self.up = nnx.ConvTranspose(3, 4, (2, 2), strides=2, rngs=rngs)
        self.conv = TuckerConv(4, 4, (3, 3), rank=2, rngs=rngs)
        self.dense = nnx.List([nnx.Conv(4, 6, (3, 3), strides=2, feature_group_count=2, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Sequential(TuckerLinear(6, 5, rank=2, rngs=rngs), nnx.relu)
        self.general = nnx.LinearGeneral((1, 5), (2, 3), axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        assert isinstance(self.conv, TuckerConv)
        x = self.conv(self.conv(self.up(x)))
        x = nnx.jit(lambda layer, x: layer(x))(self.dense[0], x)
        x = self.dropout(self.norm(x)).mean((1, 2))
        return self.general(self.head(x)[:, None]), "not an array"


X = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)


def test_every_layer_and_every_call():
    model = Net(nnx.Rngs(0))
    for _ in range(2):  # the second walk records again: nothing compiled in the first is taken for it
        summary = summarize(model, X, device="cpu")
        layers = {layer.path: layer for layer in summary.layers}
        assert list(layers) == ["up", "conv", "dense/0", "head/layers/0", "general", "unused"], "in the order of calls"
    kinds = {path: layer.kind for path, layer in layers.items()}
    assert kinds["up"] == "transposed convolution" and kinds["conv"] == kinds["dense/0"] == "convolution"
    assert kinds["head/layers/0"] == kinds["general"] == kinds["unused"] == "linear"
    assert layers["conv"].inputs == ((2, 8, 8, 4), (2, 8, 8, 4))
    assert layers["dense/0"].inputs == ((2, 8, 8, 4),) and layers["unused"].inputs == ()
    pixels = 2 * 8 * 8
    assert layers["conv"].dense_multiply_adds == 2 * pixels * 9 * 4 * 4
    assert layers["up"].multiply_adds == pixels * 4 * 3 * 4, "the zeros of the dilated input count"
    assert layers["dense/0"].multiply_adds == pixels // 4 * 9 * 2 * 6
    assert layers["head/layers/0"].dense_multiply_adds == 2 * 30
    assert layers["general"].multiply_adds == 2 * 5 * 6
    assert layers["unused"].multiply_adds == 0
    assert layers["conv"].rank == (3, 3, 2, 2) and layers["conv"].plan is not None and layers["up"].plan is None
    assert summary.multiply_adds.dense == sum(layer.dense_multiply_adds for layer in summary.layers)
    biases = 4 + 4 + 6 + 5 + 6 + 3
    assert summary.weights.dense == summary.kernels.dense + biases + 12
    assert summary.kernels.dense == 48 + 144 + 108 + 30 + 30 + 9
    assert summary.convolutions.dense == 48 + 144 + 108


def values(model):
    return jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model, nnx.Not(nnx.RngKey))))


def test_the_model_stays_as_it_is():
    model = Net(nnx.Rngs(0))
    before, structure, types = values(model), nnx.graphdef(model), [type(m) for _, m in nnx.iter_modules(model)]
    summarize(model, X)
    jax.tree.map(np.testing.assert_array_equal, before, values(model))
    assert nnx.graphdef(model) == structure and [type(m) for _, m in nnx.iter_modules(model)] == types
    assert not hasattr(model.conv, "_recorder")


def test_without_an_example_and_from_parameters_alone():
    model = Net(nnx.Rngs(0))
    bare = summarize(model)
    assert bare.multiply_adds is None and all(layer.multiply_adds is None for layer in bare.layers)
    full = summarize(model, X)
    params = nnx.state(model, nnx.Param)
    for given in (params, nnx.as_pure(params), nnx.state(model)):
        summary = summarize(given)
        assert summary.weights == bare.weights == full.weights and summary.kernels == bare.kernels
        assert {layer.path for layer in summary.layers} == {layer.path for layer in full.layers}
    with pytest.raises(ValueError, match="example is given with a State"):
        summarize(params, X)


def test_a_single_layer_several_arguments_and_shared_kernels():
    layer = TuckerLinear(6, 5, rank=2, rngs=nnx.Rngs(0))
    (found,) = summarize(layer, jnp.ones((3, 6))).layers
    assert found.path == "model" and found.inputs == ((3, 6),)

    class Two(nnx.Module):
        def __init__(self):
            self.first, self.second = (TuckerLinear(6, 6, rank=2, rngs=nnx.Rngs(0)) for _ in range(2))
            self.second.kernel = self.first.kernel
            self.third = self.first

        def __call__(self, x, y):
            return self.first(x) + self.second(y) + self.third(y)

    summary = summarize(Two(), (jnp.ones((3, 6)), jnp.ones((1, 6))))
    first, second = summary.layers
    assert first.inputs == ((3, 6), (1, 6)) and second.inputs == ((1, 6),), "a shared layer is one layer"
    assert first.parameters == 4 + 24 and second.parameters == 0, "a shared kernel is stored once"
    assert summary.weights == (28 + 12, 36 + 12)


def test_a_plan_of_the_layers_own_and_the_ranks_in_use_count():
    layer = TuckerConv(16, 16, (3, 3), rank=8, plan="merge_out", rngs=nnx.Rngs(0))
    kernel = layer.kernel.get_value()
    cut = kernel._replace(core=kernel.core.at[..., 4:].set(0))
    cut = cut._replace(factors=(*cut.factors[:3], cut.factors[3].at[:, 4:].set(0)))
    layer.kernel.set_value(cut)
    (found,) = summarize(layer, jnp.ones((1, 8, 8, 16))).layers
    assert found.plan == "merge_out" and found.rank == (3, 3, 8, 4) and found.capacity == (3, 3, 8, 8)
    assert found.multiply_adds == 64 * 16 * 8 + 64 * 9 * 8 * 16


@pytest.mark.parametrize("options", [{}, {"padding": "VALID"}, {"transpose_kernel": True, "padding": "CIRCULAR"}])
def test_transposed_layers_are_counted_as_they_are_computed(options):
    make = functools.partial(TuckerConvTranspose, 4, 6, (3, 2), strides=(2, 1), rngs=nnx.Rngs(0), **options)
    layer = make(rank=(None, None, 6, 4) if options.get("transpose_kernel") else (None, None, 4, 6))
    dense = nnx.ConvTranspose(4, 6, (3, 2), strides=(2, 1), rngs=nnx.Rngs(0), **options)
    x = jnp.ones((2, 5, 4, 4))
    (found,), (expected,) = summarize(layer, x).layers, summarize(dense, x).layers
    assert found.shape == expected.shape == (3, 2, 4, 6) and found.rank == (3, 2, 4, 6)
    pixels = np.prod(jax.lax.conv_transpose(x, jnp.ones((3, 2, 4, 6)), (2, 1), "VALID").shape[:-1])
    if "padding" not in options:
        pixels = 2 * 10 * 4
    assert found.dense_multiply_adds == expected.multiply_adds == pixels * 6 * 4 * 6


def test_lenet5_is_the_papers():
    conv, linear = functools.partial(TuckerConv, rank=10), functools.partial(TuckerLinear, rank=20)
    model = LeNet5(conv=conv, linear=linear, rngs=nnx.Rngs(0))
    summary = summarize(model, jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32))
    assert summary.kernels.dense == 430_500
    assert summary.multiply_adds.dense == 576 * 25 * 20 + 64 * 25 * 20 * 50 + 400_000 + 5_000
    assert [layer.path for layer in summary.layers] == ["conv1", "conv2", "hidden", "classifier"]


def test_inputs_are_recorded_by_path():
    calls = record_inputs(Net(nnx.Rngs(0)), X)
    assert calls[("head", "layers", 0)] == [(2, 6)] and ("unused",) not in calls
