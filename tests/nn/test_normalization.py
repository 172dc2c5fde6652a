"""``conv_batch_norm`` is ``norm(conv(x))``: at the rank where it may, as it stands everywhere else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tdlrt_jax import kernel_paths
from tdlrt_jax.models import VGG16, AlexNet, ResNet18
from tdlrt_jax.nn import (
    TuckerConv,
    TuckerLinear,
    conv_batch_norm,
    normalization,
    summarize,
    tdlrt,
    tdlrt_step,
    to_plain,
    value_and_grad,
)


class Counted:
    """Counts the calls of the way at the rank."""

    def __init__(self, monkeypatch):
        self.calls = 0
        inner = normalization.tucker_conv_batch_norm

        def counted(*args, **kwargs):
            self.calls += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(normalization, "tucker_conv_batch_norm", counted)


class Block(nnx.Module):
    """A convolution and a normalization; ``together`` says how they are applied."""

    def __init__(self, together, *, conv=TuckerConv, norm=nnx.BatchNorm, options=None, norm_options=None):
        rngs = nnx.Rngs(0)
        self.conv = conv(4, 6, (3, 3), rank=0.5, rngs=rngs, **(options or {}))
        self.norm = norm(6, rngs=rngs, **(norm_options or {}))
        self.together = together

    def __call__(self, x, **call):
        return conv_batch_norm(self.conv, self.norm, x, **call) if self.together else self.norm(self.conv(x), **call)


def loss(model, x):
    y = model(x)
    return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


def images(dtype=jnp.float32):
    return 2 + jax.random.normal(jax.random.key(1), (3, 6, 5, 4), dtype)


@pytest.mark.parametrize(
    ("options", "norm_options"),
    [
        ({}, {}),
        ({"use_bias": False, "strides": 2, "padding": "VALID"}, {"momentum": 0.5, "epsilon": 0.1}),
        ({"plan": "factored"}, {"use_scale": False}),
        ({"plan": "merge_in"}, {"use_bias": False, "use_fast_variance": False}),
        ({"plan": "dense"}, {"axis": 3}),
    ],
)
def test_outputs_gradients_and_running_averages_are_those_of_the_two_layers(monkeypatch, options, norm_options):
    counted = Counted(monkeypatch)
    ours, plain = (Block(t, options=options, norm_options=norm_options) for t in (True, False))
    found, expected = value_and_grad(loss)(ours, images()), value_and_grad(loss)(plain, images())
    assert counted.calls == 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        nnx.to_pure_dict(found[1]),
        nnx.to_pure_dict(expected[1]),
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    for name in ("mean", "var"):
        moved, wanted = getattr(ours.norm, name)[...], getattr(plain.norm, name)[...]
        np.testing.assert_allclose(moved, wanted, rtol=1e-4)
        assert not np.allclose(moved, {"mean": 0, "var": 1}[name], atol=1e-3)  # it has moved
    np.testing.assert_allclose(ours(images()), plain(images()), atol=2e-5)


def test_a_bias_before_the_normalization_has_no_gradient_and_moves_the_mean():
    ours, plain = Block(True), Block(False)
    for block in (ours, plain):
        block.conv.bias[...] = jnp.arange(6.0)
    _, grads = value_and_grad(loss)(ours, images())
    assert not np.any(grads["conv"]["bias"].get_value())
    plain(images())
    np.testing.assert_allclose(ours.norm.mean[...], plain.norm.mean[...], rtol=1e-4)


class Other(TuckerConv):
    """A layer that computes something else."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs) + inputs.mean()


class OtherNorm(nnx.BatchNorm):
    """Likewise."""

    def __call__(self, x, **options):
        return super().__call__(x, **options) + 1


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({"conv": Other}, {}),
        ({"norm": OtherNorm}, {}),
        ({"norm_options": {"use_running_average": True}}, {}),
        ({}, {"use_running_average": True}),
        ({}, {"mask": jnp.ones((3, 6, 5, 1), bool).at[0].set(False)}),
        ({"norm_options": {"axis": 1}}, {}),  # features on another axis: there are six rows, too
        ({"options": {"mask": jnp.ones((3, 3, 4, 6))}}, {}),
        (
            {
                "options": {
                    "conv_general_dilated": lambda *args, **kwargs: jax.lax.conv_general_dilated(*args, **kwargs)
                }
            },
            {},
        ),
        ({"conv": lambda *args, rank, **options: nnx.Conv(*args, **options)}, {}),
    ],
)
def test_all_else_is_left_to_the_layers(monkeypatch, settings, call):
    counted = Counted(monkeypatch)
    ours, plain = Block(True, **settings), Block(False, **settings)
    np.testing.assert_array_equal(ours(images(), **call), plain(images(), **call))
    np.testing.assert_array_equal(ours.norm.mean[...], plain.norm.mean[...])
    assert counted.calls == 0


def test_an_axis_counts_all_batch_dimensions(monkeypatch):
    """With two of them, axis 3 is the images' width, and only axis 4 the channels."""
    counted, x = Counted(monkeypatch), jnp.stack([images()[:, :, :1].repeat(6, 2), images()[:, :, 1:2].repeat(6, 2)])
    for axis, calls in ((3, 0), (4, 1)):
        ours, plain = (Block(together, norm_options={"axis": axis}) for together in (True, False))
        np.testing.assert_allclose(ours(x), plain(x), atol=2e-5)
        assert counted.calls == calls


def test_the_call_decides_over_the_layer(monkeypatch):
    counted = Counted(monkeypatch)
    block = Block(True, norm_options={"use_running_average": True})
    block(images(), use_running_average=False)
    assert counted.calls == 1
    with pytest.raises(ValueError, match="use_running_average"):  # flax's own error
        Block(True, norm_options={"use_running_average": None})(images())


def test_functions_may_stand_for_either():
    np.testing.assert_array_equal(conv_batch_norm(lambda x: 2 * x, lambda y: y + 1, images()), 2 * images() + 1)
    with pytest.raises(ValueError, match=r"conv=3: expected a function, conv\(x\) -> array"):
        conv_batch_norm(3, lambda y: y, images())
    with pytest.raises(ValueError, match=r"norm=None: expected a function, norm\(array\) -> array"):
        conv_batch_norm(lambda x: x, None, images())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("norm_dtype", [None, jnp.bfloat16])
def test_dtypes_are_those_of_the_two_layers(monkeypatch, dtype, norm_dtype):
    counted = Counted(monkeypatch)
    settings = {"options": {"dtype": dtype}, "norm_options": {"dtype": norm_dtype}}
    ours, plain = (Block(t, **settings)(images()) for t in (True, False))
    assert counted.calls == 1
    assert ours.dtype == plain.dtype
    np.testing.assert_allclose(ours.astype(jnp.float32), plain.astype(jnp.float32), atol=0.08)


@pytest.mark.parametrize("build", [VGG16, AlexNet, ResNet18])
def test_the_models_normalize_at_the_rank(monkeypatch, build):
    """Every convolution of theirs, and the summary and the plain layers see the same network."""
    counted = Counted(monkeypatch)

    def new():
        conv = partial(TuckerConv, rank=0.25)
        return build(width=0.125, conv=conv, rngs=nnx.Rngs(0))

    model = nnx.jit(new)()
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    jax.eval_shape(lambda x: nnx.clone(model)(x), x)
    convolutions = sum(
        len(kernel.factors) == 4 for kernel in kernel_paths(nnx.as_pure(nnx.state(model, nnx.Param))).values()
    )
    assert counted.calls == convolutions > 4
    assert len(summarize(model, jax.ShapeDtypeStruct(x.shape, x.dtype)).layers) >= convolutions
    assert counted.calls == convolutions  # the summary walks through the layers' own calls
    model.eval()
    plain = to_plain(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    np.testing.assert_allclose(jax.jit(plain)(x), jax.jit(model)(x), atol=1e-3)


def test_training_is_that_of_the_two_layers():
    """``bug`` with its second gradient out of the first pass, momentum and running averages, for twenty steps."""

    class Network(nnx.Module):
        def __init__(self, together):
            self.block = Block(together)
            self.head = TuckerLinear(6, 3, rank=2, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.head(nnx.relu(self.block(x)).mean((1, 2)))

    x, y = images(), jnp.arange(9.0).reshape(3, 3) / 9
    ends = []
    for together in (True, False):
        model = Network(together)
        optimizer = nnx.Optimizer(model, tdlrt(optax.sgd(0.05, momentum=0.9), tolerance=0.01), wrt=nnx.Param)
        step = tdlrt_step(lambda model, x, y: jnp.mean((model(x) - y) ** 2))
        losses = [float(step(model, optimizer, x, y).loss) for _ in range(20)]
        assert losses[-1] < 0.5 * losses[0]
        ends.append((losses, model.block.norm.mean[...], model.block.norm.var[...]))
    for ours, plain in zip(*ends):
        np.testing.assert_allclose(ours, plain, rtol=2e-3, atol=1e-5)
