"""The plain form of every kind of Tucker layer against the layer itself; whole models in all kinds of containers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import tdlrt_jax
from tdlrt_jax.conv import choose_plan, conv_general_dilated
from tdlrt_jax.models import LeNet5
from tdlrt_jax.nn import TuckerConv, TuckerLinear, tdlrt
from tdlrt_jax.nn.plain import check_inference, check_parameters, to_plain
from tdlrt_jax.nn.transposed import TuckerConvTranspose
from tests import references as ref

TUCKER = (TuckerConv, TuckerLinear, TuckerConvTranspose)
PLANS = ("factored", "merge_in", "merge_out", "dense")


def padded(shape, rank, seed=0):
    """An initializer of a kernel of these ranks (``None``: whole) in arrays with one column more where one fits."""

    def initialize(key, shape_, dtype):
        assert shape_ == shape
        core, factors = ref.tucker_random(shape, [n if r is None else r for n, r in zip(shape, rank)], seed=seed)
        core = jnp.asarray(core, jnp.float32)
        for mode, r in enumerate(rank):
            if r is None:  # the identity in the place of the factor
                core = jnp.moveaxis(jnp.tensordot(jnp.asarray(factors[mode], jnp.float32), core, (1, mode)), 0, mode)
        bases = tuple(None if r is None else jnp.asarray(f, jnp.float32) for f, r in zip(factors, rank))
        kernel = tdlrt_jax.TuckerTensor(core, bases)
        return tdlrt_jax.resize(kernel, [min(n, c + 1) for n, c in zip(shape, core.shape)])

    return initialize


def filled_bias(key, shape, dtype):
    return jnp.linspace(-1, 1, *shape, dtype=dtype)


def layer_of(window, rank, *, channels=(4, 6), kind=TuckerConv, **options):
    n_in, n_out = channels
    shape = (*window, n_in // options.get("feature_group_count", 1), n_out)
    if options.get("transpose_kernel"):
        shape = (*window, n_out, n_in)
    size = () if kind is TuckerLinear else (window,)
    initializers = {"kernel_init": padded(shape, rank), "bias_init": filled_bias}
    return kind(n_in, n_out, *size, **initializers, **options, rngs=nnx.Rngs(0))


def assert_equal(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(expected) > 0.1
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def stages(plain):
    return list(plain.layers) if isinstance(plain, nnx.Sequential) else [plain]


conv1, conv2, conv3 = (3,), (3, 2), (2, 1, 2)
transposed = functools.partial(layer_of, kind=TuckerConvTranspose)
VARIANTS = {
    "1-D": (lambda: layer_of(conv1, (2, 2, 3)), (7,)),
    "1-D causal dilated": (lambda: layer_of(conv1, (2, 2, 3), padding="CAUSAL", kernel_dilation=2), (7,)),
    "2-D": (lambda: layer_of(conv2, (2, 2, 2, 3)), (6, 5)),
    "2-D strided": (lambda: layer_of(conv2, (2, 2, 2, 3), strides=(2, 1), padding="VALID"), (6, 5)),
    "2-D no strides": (lambda: layer_of(conv2, (2, 2, 2, 3), strides=None, padding="same"), (6, 5)),
    "2-D dilated": (lambda: layer_of(conv2, (2, 2, 2, 3), kernel_dilation=(1, 2)), (6, 5)),
    "2-D input dilated": (
        lambda: layer_of(conv2, (2, 2, 2, 3), padding=((1, 2), (0, 1)), input_dilation=(2, 1)),
        (4, 5),
    ),
    "2-D asymmetric": (lambda: layer_of(conv2, (2, 2, 2, 3), padding=((0, 2), 1), use_bias=False), (6, 5)),
    "2-D circular": (lambda: layer_of(conv2, (2, 2, 2, 3), padding="CIRCULAR", strides=2), (6, 5)),
    "2-D reflect": (lambda: layer_of(conv2, (2, 2, 2, 3), padding="REFLECT"), (6, 5)),
    "2-D grouped": (lambda: layer_of(conv2, (2, 2, 2, 3), channels=(8, 6), feature_group_count=2), (6, 5)),
    "2-D grouped strided": (
        lambda: layer_of(conv2, (3, 2, 2, 4), channels=(8, 12), feature_group_count=4, strides=2, padding=1),
        (6, 5),
    ),
    "depthwise": (lambda: layer_of(conv2, (2, 2, 1, 3), channels=(4, 8), feature_group_count=4), (6, 5)),
    "whole spatial modes": (lambda: layer_of(conv2, (None, None, 2, 3)), (6, 5)),
    "whole in": (lambda: layer_of(conv2, (2, 2, None, 3)), (6, 5)),
    "whole out, grouped": (lambda: layer_of(conv2, (2, 2, 2, None), channels=(8, 6), feature_group_count=2), (6, 5)),
    "pointwise strided, padded": (lambda: layer_of((1, 1), (1, 1, 2, 2), strides=2, padding=1), (6, 5)),
    "pointwise grouped": (
        lambda: layer_of((1, 1), (1, 1, 2, 2), channels=(8, 6), strides=2, feature_group_count=2),
        (6, 5),
    ),
    "masked": (lambda: layer_of(conv2, (2, 2, 2, 3), mask=jnp.arange(144.0).reshape(3, 2, 4, 6) % 2), (6, 5)),
    "3-D": (lambda: layer_of(conv3, (2, 1, 2, 2, 2), strides=(1, 2, 1)), (4, 5, 3)),
    "no batch": (lambda: layer_of(conv2, (2, 2, 2, 3)), None),
    "linear": (lambda: layer_of((), (2, 2), kind=TuckerLinear), ()),
    "linear, whole in": (lambda: layer_of((), (None, 3), kind=TuckerLinear, use_bias=False), ()),
    "transposed": (lambda: transposed(conv2, (2, 2, 2, 3), strides=2), (4, 5)),
    "transposed valid": (lambda: transposed(conv2, (2, 2, 2, 3), strides=(3, 1), padding="VALID"), (4, 5)),
    "transposed dilated": (lambda: transposed(conv2, (2, 2, 2, 3), padding=((1, 2), 0), kernel_dilation=2), (4, 5)),
    "transposed circular": (lambda: transposed(conv2, (2, 2, 2, 3), strides=2, padding="CIRCULAR"), (4, 5)),
    "transposed flipped": (lambda: transposed(conv2, (2, 2, 3, 2), strides=2, transpose_kernel=True), (4, 5)),
    "transposed flipped circular": (
        lambda: transposed(conv2, (2, None, 3, 2), strides=2, padding="CIRCULAR", transpose_kernel=True),
        (4, 5),
    ),
    "transposed masked": (
        lambda: transposed(conv1, (2, 2, 3), mask=jnp.arange(72.0).reshape(3, 4, 6) % 2),
        (5,),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_in_every_form(name):
    make, image = VARIANTS[name]
    layer = make()
    shape = (6, 5, layer.in_features) if image is None else (2, *image, layer.in_features)
    x = jax.random.normal(jax.random.key(1), shape)
    expected = layer(x)
    for plan in (*PLANS, None):
        plain = to_plain(layer, x, plan=plan)
        made = stages(plain)
        assert all(type(stage) in (nnx.Conv, nnx.ConvTranspose, nnx.Linear) for stage in made)
        assert [stage.bias is not None for stage in made] == [False] * (len(made) - 1) + [layer.bias is not None]
        assert_equal(plain(x), expected)
        streamed = {"factored": 3, "merge_in": 2, "merge_out": 2}.get(plan, 1)
        if "whole" not in name and name not in ("masked", "transposed masked") and plan is not None:
            assert len(made) == streamed


def test_arrays_are_cut_to_the_ranks_in_use():
    layer = layer_of(conv2, (2, 2, 2, 3), channels=(8, 6), feature_group_count=2)
    assert layer.kernel.get_value().core.shape == (3, 2, 3, 4)
    made = stages(to_plain(layer, plan="factored"))
    assert [stage.kernel.get_value().shape for stage in made] == [(1, 1, 4, 2 * 2), (3, 2, 2, 2 * 3), (1, 1, 3, 6)]


def test_columns_in_use_need_not_lead_and_a_zero_kernel_stays_zero():
    layer = layer_of((), (2, 2), kind=TuckerLinear)
    core, (basis, other) = layer.kernel.get_value()
    layer.kernel.set_value(tdlrt_jax.TuckerTensor(core[::-1], (basis[:, ::-1], other)))
    x = jax.random.normal(jax.random.key(0), (3, 4))
    assert_equal(to_plain(layer, plan="factored")(x), layer(x))
    layer.kernel.set_value(jax.tree.map(jnp.zeros_like, layer.kernel.get_value()))
    np.testing.assert_array_equal(to_plain(layer, plan="factored")(x), jnp.broadcast_to(layer.bias.get_value(), (3, 6)))


@pytest.mark.parametrize("dtype, param_dtype", [(None, jnp.bfloat16), (jnp.bfloat16, jnp.float32), (None, jnp.float32)])
def test_dtypes_stay(dtype, param_dtype):
    layer = layer_of(conv2, (2, 2, 2, 3), dtype=dtype, param_dtype=param_dtype)
    x = jnp.linspace(-1, 1, 240, dtype=param_dtype).reshape(2, 6, 5, 4)
    for plan in ("factored", "dense"):
        plain = to_plain(layer, plan=plan)
        assert all(stage.kernel.get_value().dtype == param_dtype for stage in stages(plain))
        assert_equal(plain(x), layer(x), tolerance=1e-5 if dtype is None and param_dtype == jnp.float32 else 2e-2)


def test_the_cheapest_form_is_that_of_the_forward_pass():
    def chosen(rank, x, **options):
        layer = TuckerConv(64, 64, (3, 3), rank=rank, rngs=nnx.Rngs(0), **options)
        return len(stages(to_plain(layer, jax.ShapeDtypeStruct(x, jnp.float32), device="cpu")))

    assert chosen(8, (1, 16, 16, 64)) == 3
    assert chosen(60, (1, 16, 16, 64)) == 1
    assert chosen((3, 3, None, 8), (1, 16, 16, 64)) == 2
    # Merging costs nothing once trained; within a training step one image does not pay for it.
    assert choose_plan((3, 3, 64, 64), (3, 3, 60, 60), (1, 16, 16, 64), device="cpu") == "factored"


class Everything(nnx.Module):
    """Layers in all containers; one of them twice."""

    def __init__(self, rngs):
        conv = functools.partial(TuckerConv, kernel_size=(3, 3), rank=2, bias_init=filled_bias, rngs=rngs)
        linear = functools.partial(TuckerLinear, rank=2, bias_init=filled_bias, rngs=rngs)
        self.first = conv(3, 4)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.blocks = nnx.List([conv(4, 4), nnx.Sequential(conv(4, 4), nnx.relu)])
        self.shared = nnx.data((self.blocks[0], {"again": conv(4, 4)}))
        self.heads = nnx.Dict(a=linear(4, 3), b=linear(4, 3))
        self.pair = nnx.data([linear(3, 3)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.first(x))
        for layer in (*self.blocks, self.shared[0], self.shared[1]["again"]):
            x = jnp.tanh(layer(x))
        x = self.dropout(x.mean((1, 2)))
        return self.pair[0](self.heads["a"](x) + self.heads["b"](x))


def values(model):
    """Everything in a model's Variables, random keys aside."""
    state = nnx.as_pure(nnx.state(model, nnx.Not(nnx.RngKey)))
    return jax.tree.map(np.asarray, state)


def test_layers_in_all_containers_are_replaced_and_the_original_is_not():
    model = Everything(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    model(x)  # moves the statistics
    model.eval()
    before, structure = values(model), nnx.graphdef(model)
    expected = model(x)
    plain = to_plain(model, x, plan="factored")
    assert type(plain) is Everything
    assert not any(isinstance(module, TUCKER) for _, module in nnx.iter_modules(plain))
    assert plain.blocks[0] is plain.shared[0], "a shared layer stays shared"
    assert isinstance(plain.blocks[1].layers[0], nnx.Sequential)
    assert_equal(plain(x), expected)
    np.testing.assert_array_equal(plain.norm.mean.get_value(), model.norm.mean.get_value())
    jax.tree.map(np.testing.assert_array_equal, before, values(model))
    assert nnx.graphdef(model) == structure
    assert sum(isinstance(module, TUCKER) for _, module in nnx.iter_modules(model)) == 7
    # A model of flax's own: splitting, jitting and merging work on it.
    graphdef, state = nnx.split(plain)
    assert_equal(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x), expected)
    assert not any(
        isinstance(leaf, tdlrt_jax.TuckerTensor) for leaf in jax.tree.leaves(state, is_leaf=tdlrt_jax.tucker.is_tucker)
    )


def test_lenet5_predicts_the_same():
    conv, linear = functools.partial(TuckerConv, rank=6), functools.partial(TuckerLinear, rank=8)
    model = LeNet5(conv=conv, linear=linear, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 28, 28, 1))
    for plan in ("factored", None):
        assert_equal(to_plain(model, x, plan=plan)(x), model(x))


def test_functions_of_the_users_stay_and_those_of_this_package_go():
    calls = []

    def mine(*arguments, **options):
        calls.append(1)
        return lax.conv_general_dilated(*arguments, **options)

    layer = layer_of(conv2, (2, 2, 2, 3), conv_general_dilated=mine)
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, 4))
    plain = to_plain(layer, plan="factored")
    assert type(plain) is nnx.Conv and plain.conv_general_dilated is mine, "it is given the dense kernel, as ever"
    assert_equal(plain(x), layer(x))
    assert len(calls) == 2
    ours = nnx.Sequential(
        nnx.Conv(4, 6, (3, 2), conv_general_dilated=conv_general_dilated, rngs=nnx.Rngs(0)),
        layer_of(conv2, (2, 2, 2, 3), channels=(6, 6), conv_general_dilated=conv_general_dilated),
    )
    plain = to_plain(ours, x, plan="factored")
    assert_equal(plain(x), ours(x))
    functions = [m.conv_general_dilated for _, m in nnx.iter_modules(plain) if isinstance(m, nnx.Conv)]
    assert len(functions) == 4 and set(functions) == {lax.conv_general_dilated}


def test_a_layer_that_is_never_called_is_stored_small():
    class Unused(nnx.Module):
        def __init__(self):
            self.used, self.unused = (TuckerLinear(64, 64, rank=4, rngs=nnx.Rngs(0)) for _ in range(2))

        def __call__(self, x):
            return self.used(x)

    plain = to_plain(Unused(), jnp.ones((1, 64)))
    assert len(stages(plain.unused)) == 2


def test_what_cannot_be_deployed_is_named():
    model = Everything(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'dropout' \(Dropout\).*at random"):
        check_inference(model)
    model.dropout.deterministic = True
    with pytest.raises(ValueError, match=r"'norm' \(BatchNorm\).*use_running_average is False.*model.eval\(\)"):
        check_inference(model)
    model.eval()
    check_inference(model)
    with pytest.raises(ValueError, match=r"example is needed.*plan='dense'"):
        to_plain(model)
    with pytest.raises(ValueError, match=r"plan must be one of .*'cheap'"):
        to_plain(model, plan="cheap")
    with pytest.raises(ValueError, match=r"nnx.Module .*got a dict"):
        to_plain({"kernel": jnp.ones(3)}, plan="dense")

    class Mine(TuckerLinear):
        def __call__(self, inputs):
            return -super().__call__(inputs)

    model.pair[0] = Mine(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'pair/0' is a Mine, which has a __call__ of its own"):
        to_plain(model, plan="dense")


def test_a_model_in_the_midst_of_training_is_refused():
    model = Everything(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tdlrt(optax.sgd(0.1), tolerance=0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"got a \w*Optimizer: pass the model that it trains"):
        check_parameters(optimizer)

    class Trainer(nnx.Module):
        def __init__(self):
            self.model, self.optimizer = model, optimizer

    with pytest.raises(ValueError, match=r"'optimizer.*belongs to training"):
        to_plain(Trainer(), plan="dense")
    kernel = model.first.kernel.get_value()
    model.first.kernel.set_value(tdlrt_jax.lift(kernel))
    with pytest.raises(ValueError, match=r"'first/kernel' is a Frame.*lifted"):
        to_plain(model, plan="dense")
    model.first.kernel.set_value(kernel._replace(core=kernel.core.at[0, 0, 0, 0].set(jnp.nan)))
    with pytest.raises(ValueError, match="'first/kernel' has entries that are not finite"):
        to_plain(model, plan="dense")
    model.first.kernel.set_value(kernel)
    model.norm.var.set_value(jnp.full(4, jnp.inf))
    with pytest.raises(ValueError, match="'norm/var' has entries that are not finite"):
        to_plain(model, plan="dense")


@pytest.mark.parametrize("dilation", [2, (1, 2)])
def test_flax_has_no_names_for_paddings_of_dilated_inputs(dilation):
    layer = TuckerConv(2, 3, (2, 2), padding="valid", input_dilation=dilation, rank=1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 2))
    for plain in (to_plain(layer, x), to_plain(layer, plan="factored"), tdlrt_jax.densify(layer)):
        np.testing.assert_allclose(plain(x), layer(x), atol=1e-5)
