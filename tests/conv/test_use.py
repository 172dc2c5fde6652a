"""Convolutions by Tucker kernels in use: number types, in the place of JAX's and flax's, images of no size, mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tdlrt_jax.conv import PLANS, choose_plan, conv_general_dilated, count_work, tucker_conv, tucker_linear
from tdlrt_jax.frame import Frame, lift
from tdlrt_jax.tucker import TuckerTensor, to_dense
from tests.conv.cases import (
    CASES,
    TOLERANCE,
    applied,
    assert_close,
    chart_gradients,
    compiled,
    densely,
    objective,
    random_kernel,
    reference_conv,
)


def test_mixed_precision(rng):
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 6)), jnp.bfloat16)
    frame = compiled(lift)(random_kernel(rng, (3, 3, 6, 8), (2, 3, 4, 5), np.float32))
    wide = {"preferred_element_type": jnp.float32}

    @compiled
    def evaluate(x, frame):
        expected = chart_gradients(densely({}), x.astype(jnp.float32), frame)
        by_plan = {plan: chart_gradients(applied(plan, {}), x, frame) for plan in ("dense", "factored")}
        by_plan["wide"] = chart_gradients(applied("factored", wide), x, frame)
        return by_plan, expected

    by_plan, expected = evaluate(x, frame)
    for name, (_, y, dx, dC, dK) in by_plan.items():
        assert y.dtype == (jnp.float32 if name == "wide" else jnp.bfloat16)
        assert dx.dtype == jnp.bfloat16
        assert {dC.dtype, *(k.dtype for k in dK)} == {jnp.dtype(jnp.float32)}
        for actual, exact in zip(jax.tree.leaves((y, dx, dC, dK)), jax.tree.leaves(expected[1:])):
            error = jnp.linalg.norm((actual.astype(jnp.float32) - exact).ravel()) / jnp.linalg.norm(exact.ravel())
            assert error < 0.02, name


def test_integers_are_taken_to_the_kernels_dtype(rng):
    kernel = random_kernel(rng, (3, 3, 2, 4), (2, 2, 2, 2), np.float32)
    x = jnp.asarray(rng.integers(0, 255, size=(2, 5, 5, 2)), jnp.uint8)
    expected = tucker_conv(x.astype(jnp.float32), to_dense(kernel))
    for weight in (kernel, to_dense(kernel)):
        np.testing.assert_allclose(tucker_conv(x, weight), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "window", "options"),
    [
        ((7, 6), (3, 4), {}),
        ((7, 6), (3, 4), {"padding": "VALID", "strides": (2, 1)}),
        ((7, 6), (3, 4), {"padding": "CIRCULAR", "dilation": (1, 2)}),
        ((7, 6), (4, 3), {"padding": "REFLECT", "strides": 2}),
        ((7,), (3,), {"padding": "CAUSAL", "dilation": 2}),
        ((7, 6), (3, 3), {"padding": 1, "groups": 2}),
        ((7, 6), (3, 3), {"padding": (1, (0, 2)), "input_dilation": (2, 1)}),
    ],
)
def test_agrees_with_flax(size, window, options, rng):
    nnx = pytest.importorskip("flax.nnx")
    names = {"dilation": "kernel_dilation", "groups": "feature_group_count"}
    layer = nnx.Conv(
        4,
        6,
        window,
        use_bias=False,
        rngs=nnx.Rngs(0),
        **{names.get(k, k): v for k, v in options.items()},
    )
    x, weight = jnp.asarray(rng.normal(size=(2, 3, *size, 4))), layer.kernel[...]
    kernel = TuckerTensor(weight, (None,) * weight.ndim)
    ours = compiled(lambda: (tucker_conv(x, weight, **options), tucker_conv(x, kernel, **options)))()
    assert_close(ours, (layer(x), layer(x)), 1e-6)


@pytest.mark.parametrize("case", ["one-d", "wide-window", "wide-window-stride", "wide-window-groups"])
def test_drop_in_convolution(case, x64, rng):
    x_shape, shape, _, options = CASES[case]
    x, weight = jnp.asarray(rng.normal(size=x_shape)), jnp.asarray(rng.normal(size=shape))
    axes = "XYZ"[: len(shape) - 2]

    def many(value):
        return (value,) * len(axes) if isinstance(value, int) else value

    def gradients(conv):
        def apply(x, w):
            return conv(
                x,
                w,
                many(options.get("strides", 1)),
                options.get("padding", "SAME"),
                rhs_dilation=many(options.get("dilation", 1)),
                dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
                feature_group_count=options.get("groups", 1),
                precision="highest",
            )

        return jax.value_and_grad(lambda x, w: objective(apply, x, w), (0, 1), has_aux=True)(x, weight)

    actual, expected = compiled(lambda: (gradients(conv_general_dilated), gradients(lax.conv_general_dilated)))()
    assert_close(actual, expected, TOLERANCE)


def test_drop_in_convolution_passes_other_layouts_on(rng):
    x, weight = jnp.asarray(rng.normal(size=(2, 3, 2, 2))), jnp.asarray(rng.normal(size=(4, 3, 3, 3)))
    expected = lax.conv_general_dilated(x, weight, (1, 1), "SAME")
    np.testing.assert_allclose(conv_general_dilated(x, weight, (1, 1), "SAME"), expected)


def test_linear(x64, rng):
    kernel = random_kernel(rng, (5, 6), (3, 3))
    for shape in ((5,), (4, 5), (2, 3, 5)):
        x = jnp.asarray(rng.normal(size=shape))
        for weight in (kernel, lift(kernel), to_dense(kernel)):
            assert_close(tucker_linear(x, weight), x @ to_dense(kernel), TOLERANCE)
    with pytest.raises(ValueError, match="two modes"):
        tucker_linear(jnp.ones((2, 5, 4)), random_kernel(rng, (3, 4, 6), (2, 2, 2)))


@pytest.mark.parametrize("x_shape", [(0, 6, 5, 4), (2, 1, 1, 4)])
def test_degenerate_images(x_shape, rng):
    x, kernel = jnp.asarray(rng.normal(size=x_shape), "f"), random_kernel(rng, (3, 3, 4, 6), (2, 2, 3, 3), np.float32)
    for plan in PLANS:
        assert_close(tucker_conv(x, kernel, plan=plan), reference_conv(x, to_dense(kernel)), 1e-5)
    empty = tucker_conv(jnp.ones((2, 2, 2, 4)), kernel, padding="VALID")
    assert empty.shape == (2, 0, 0, 6)


def test_a_window_that_lies_outside_of_the_image(rng):
    """Dilated to 5x5 on 2x3 pixels: no output, whatever the plan, and gradients of zeros."""
    kernel = random_kernel(rng, (3, 3, 4, 6), (2, 2, 3, 3), np.float32)
    x = jnp.ones((2, 2, 3, 4))
    for plan in PLANS:
        y, transpose = jax.vjp(lambda x, plan=plan: tucker_conv(x, kernel, padding="VALID", dilation=2, plan=plan), x)
        assert y.shape == (2, 0, 0, 6)
        np.testing.assert_array_equal(transpose(y)[0], jnp.zeros_like(x))
    assert tucker_conv(x, kernel, padding=((0, 3), (0, 0)), dilation=2).shape == (2, 1, 0, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 6, 6, 5)}, r"x must have .* = 4 \* 1 channels .* got the shape \(2, 6, 6, 5\)"),
        ({"x": (6, 4)}, r"x must be \(batch..., 2 spatial dimensions, channels\)"),
        ({"x": (2, 6, 6, 16), "groups": 4}, r"groups must divide the kernel's 6 .* got groups=4"),
        ({"x": (2, 6, 6, 8), "groups": 0}, "groups must be a positive integer, got 0"),
        ({"plan": "fast"}, "plan must be one of dense, merge_in, merge_out, factored or None, got 'fast'"),
        ({"padding": "FULL"}, r"padding must be one of .* got 'FULL'"),
        ({"padding": (1, 2, 3)}, r"padding must be a name, an integer, or 2 integers or .* got \(1, 2, 3\)"),
        ({"padding": ((1, 2, 3), 1)}, "padding must be a name"),
        ({"padding": 1.5}, r"padding must be a name, .* got 1\.5"),
        ({"padding": "CAUSAL"}, "padding='CAUSAL' needs one spatial dimension, the kernel has 2"),
        ({"input_dilation": 2}, r"padding='SAME' is not defined with input_dilation=\(2, 2\)"),
        ({"strides": (1, 1, 1)}, r"strides must be a positive integer or 2 of them, got \(1, 1, 1\)"),
        ({"dilation": 0}, "dilation must be a positive integer or 2 of them, got 0"),
    ],
)
def test_mistakes_raise(change, message, rng):
    kernel = random_kernel(rng, (3, 3, 4, 6), (2, 2, 3, 4), np.float32)
    x = jnp.ones(change.get("x", (2, 6, 6, 4)))
    change = {name: value for name, value in change.items() if name != "x"}
    for weight in (kernel, Frame(kernel.core, None, kernel.factors, None), to_dense(kernel)):
        with pytest.raises(ValueError, match=message):
            tucker_conv(x, weight, **change)


def test_mistaken_kernels_raise(rng):
    kernel = random_kernel(rng, (3, 3, 1, 8), (2, 2, 1, 4), np.float32)
    with pytest.raises(ValueError, match="plan must be 'dense' or None for a depthwise kernel"):
        tucker_conv(jnp.ones((2, 6, 6, 4)), kernel, groups=4, plan="factored")
    kernel = random_kernel(rng, (3, 3, 4, 6), (2, 2, 3, 4), np.float32)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), kernel)
    with pytest.raises(ValueError, match=r"map over stacked kernels with jax\.vmap"):
        tucker_conv(jnp.ones((2, 6, 6, 4)), stacked)
    with pytest.raises(ValueError, match="kernel must be a TuckerTensor, a Frame or an array"):
        tucker_conv(jnp.ones((2, 6, 6, 4)), jnp.ones(4))
    with pytest.raises(ValueError, match="rank as long"):
        choose_plan((3, 3, 4, 6), (2, 2), (2, 6, 6, 4))
    with pytest.raises(ValueError, match="x_shape must be"):
        count_work("dense", (3, 3, 4, 6), (2, 2, 2, 2), (2, 6, 6, 5))
    with pytest.raises(ValueError, match="plan must be one of"):
        count_work("other", (3, 3, 4, 6), (2, 2, 2, 2), (2, 6, 6, 4))
