"""Convolution by Tucker kernels: every plan, every option, against dense convolutions and Theorem 1's formula."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from tdlrt_jax import frame as frames
from tdlrt_jax import tucker
from tdlrt_jax.conv import PLANS, choose_plan, conv_general_dilated, count_work, tucker_conv, tucker_linear
from tdlrt_jax.frame import Frame, lift
from tdlrt_jax.tucker import TuckerTensor, multi_mode_product, to_dense, unfold


def random_kernel(rng, shape, rank, dtype=np.float64):
    """A kernel with orthonormal factors and a random core; ``None`` for a whole mode."""
    size = [n if r is None else r for n, r in zip(shape, rank)]
    bases = [None if r is None else np.linalg.qr(rng.normal(size=(n, r)))[0] for n, r in zip(shape, rank)]
    core = rng.normal(size=size) / np.sqrt(np.prod(size[:-1]))
    return TuckerTensor(jnp.asarray(core, dtype), tuple(None if u is None else jnp.asarray(u, dtype) for u in bases))


def reference_conv(x, weight, *, strides=1, padding="SAME", dilation=1, groups=1, input_dilation=1):
    """``lax.conv_general_dilated`` on one batch axis, and the matrix product where there is no image."""
    spatial = weight.ndim - 2
    if spatial == 0:
        return x @ weight
    lead = x.shape[: x.ndim - 1 - spatial]
    x = x.reshape(-1, *x.shape[x.ndim - 1 - spatial :])
    many = lambda value: (value,) * spatial if isinstance(value, int) else tuple(value)  # noqa: E731
    extent = [(k - 1) * d + 1 for k, d in zip(weight.shape, many(dilation))]
    if padding in ("CIRCULAR", "REFLECT"):
        pads = [(0, 0), *(((k - 1) // 2, k // 2) for k in extent), (0, 0)]
        x, padding = jnp.pad(x, pads, mode={"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]), "VALID"
    elif padding == "CAUSAL":
        padding = [(extent[0] - 1, 0)]
    elif not isinstance(padding, str):
        padding = [many_of if isinstance(many_of, tuple) else (many_of, many_of) for many_of in many(padding)]
    axes = "XYZ"[:spatial]
    y = lax.conv_general_dilated(
        x,
        weight,
        many(strides),
        padding,
        lhs_dilation=many(input_dilation),
        rhs_dilation=many(dilation),
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=groups,
    )
    return y.reshape(*lead, *y.shape[1:])


def objective(apply, x, kernel):
    """A scalar whose cotangent depends on the layer's output."""
    y = apply(x, kernel)
    weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return jnp.sum(weights * jnp.sin(y)), y


def chart_gradients(apply, x, frame):
    """``(value, y, dx, dC, (dK_i))`` of a layer at a frame."""

    def loss(x, point):
        return objective(apply, x, frames.with_point(frame, point))

    (value, y), (dx, point) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, frames.chart_point(frame))
    return value, y, dx, point.core, point.factors


def formula_gradients(apply_dense, x, frame):
    """The same by the formula of Theorem 1, from the gradient in the dense kernel."""
    (value, y), (dx, gradient) = jax.value_and_grad(lambda x, w: objective(apply_dense, x, w), (0, 1), has_aux=True)(
        x, multi_mode_product(frame.core, frame.U)
    )
    dK = [
        None
        if u is None
        else unfold(multi_mode_product(gradient, frame.U, transpose=True, skip=i), i) @ unfold(frame.Q[i], i).T
        for i, u in enumerate(frame.U)
    ]
    return value, y, dx, multi_mode_product(gradient, frame.U, transpose=True), tuple(dK)


def assert_close(actual, expected, tolerance, label=""):
    actual, expected = jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for (path, a), e in zip(actual, expected):
        scale = max(1.0, float(jnp.max(jnp.abs(e), initial=0)))
        name = f"{label} {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=0, atol=tolerance * scale, err_msg=name)


# name: (shape of x, shape of the kernel, rank with None for whole modes, options)
CASES = {
    "same": ((2, 6, 5, 4), (3, 3, 4, 6), (2, 3, 3, 4), {}),
    "valid-stride": ((2, 7, 8, 4), (3, 2, 4, 5), (2, 2, 2, 3), {"padding": "VALID", "strides": (2, 3)}),
    "same-stride": ((2, 7, 8, 4), (3, 2, 4, 5), (2, 2, 2, 3), {"strides": 2}),
    "same-lower": ((1, 6, 6, 3), (2, 4, 3, 4), (2, 3, 2, 3), {"padding": "SAME_LOWER"}),
    "asymmetric": ((2, 6, 5, 4), (3, 3, 4, 6), (2, 2, 3, 4), {"padding": ((0, 2), (3, 1)), "strides": (1, 2)}),
    "integer-padding": ((2, 6, 5, 4), (3, 3, 4, 6), (2, 2, 3, 4), {"padding": 2}),
    "integers-padding": ((2, 6, 5, 4), (3, 3, 4, 6), (2, 2, 3, 4), {"padding": (0, 1)}),
    "circular": ((2, 6, 5, 4), (3, 4, 4, 6), (2, 3, 3, 4), {"padding": "CIRCULAR"}),
    "reflect-stride": ((2, 6, 5, 4), (3, 4, 4, 6), (2, 3, 3, 4), {"padding": "REFLECT", "strides": 2}),
    "causal": ((2, 9, 4), (3, 4, 6), (2, 3, 4), {"padding": "CAUSAL", "dilation": 2}),
    "dilation": ((2, 8, 9, 4), (3, 2, 4, 6), (2, 2, 3, 4), {"dilation": (2, 3)}),
    "transposed": (
        (2, 4, 5, 4),
        (3, 3, 4, 6),
        (2, 3, 3, 4),
        {"input_dilation": 2, "padding": ((2, 1), (1, 2)), "strides": (1, 1)},
    ),
    "groups": ((2, 6, 5, 6), (3, 3, 3, 8), (2, 3, 2, 3), {"groups": 2, "strides": (2, 1), "padding": ((1, 0), (2, 1))}),
    "groups-of-many": ((1, 5, 5, 12), (3, 3, 4, 9), (2, 2, 2, 4), {"groups": 3, "padding": "CIRCULAR"}),
    "groups-whole-in": ((1, 5, 5, 6), (3, 3, 3, 8), (2, 2, None, 3), {"groups": 2}),
    "groups-whole-out": ((1, 5, 5, 6), (3, 3, 3, 8), (2, 2, 2, None), {"groups": 2}),
    "depthwise": ((2, 6, 5, 4), (3, 3, 1, 8), (2, 3, 1, 5), {"groups": 4}),
    "one-d": ((2, 9, 4), (3, 4, 6), (2, 3, 4), {"strides": 2}),
    "three-d": ((1, 4, 5, 4, 3), (2, 3, 2, 3, 4), (2, 2, 2, 2, 3), {"strides": (1, 2, 1)}),
    "linear": ((7, 5), (5, 6), (3, 3), {}),
    "linear-whole-in": ((7, 5), (5, 6), (None, 4), {}),
    "pointwise": ((2, 6, 5, 4), (1, 1, 4, 6), (1, 1, 3, 3), {"strides": (2, 1)}),
    "pointwise-padded": ((2, 6, 5, 4), (1, 1, 4, 6), (None, 1, 3, 3), {"strides": 2, "padding": 1}),
    "pointwise-groups": ((2, 4, 4, 6), (1, 1, 3, 4), (1, None, 2, 2), {"groups": 2}),
    "wide-window": ((3, 2, 2, 4), (3, 3, 4, 6), (2, 3, 3, 4), {}),
    "wide-window-stride": ((3, 4, 3, 4), (3, 5, 4, 6), (2, 3, 3, 4), {"strides": 2, "dilation": (2, 1)}),
    "wide-window-groups": ((3, 2, 2, 6), (3, 3, 3, 8), (2, 3, 2, 3), {"groups": 2}),
    "rank-one": ((2, 6, 5, 4), (3, 3, 4, 6), (1, 1, 1, 1), {}),
    "full-rank": ((2, 6, 5, 4), (3, 3, 4, 6), (3, 3, 4, 6), {}),
    "whole-first": ((2, 6, 5, 4), (3, 3, 4, 6), (None, 2, 3, 4), {}),
    "whole-second": ((2, 6, 5, 4), (3, 3, 4, 6), (2, None, 3, 4), {}),
    "whole-in": ((2, 6, 5, 4), (3, 3, 4, 6), (2, 2, None, 4), {}),
    "whole-out": ((2, 6, 5, 4), (3, 3, 4, 6), (2, 2, 3, None), {}),
    "tucker-2": ((2, 6, 5, 4), (3, 3, 4, 6), (None, None, 3, 4), {}),
    "all-whole": ((2, 6, 5, 4), (3, 3, 4, 6), (None, None, None, None), {}),
    "unbatched": ((6, 5, 4), (3, 3, 4, 6), (2, 2, 3, 4), {}),
    "two-batch-axes": ((2, 3, 5, 4, 4), (3, 3, 4, 6), (2, 2, 3, 4), {}),
}
TOLERANCE = 1e-12


def plans_of(case):
    return ("dense",) if case == "depthwise" else PLANS


@pytest.mark.parametrize("case", CASES)
def test_every_plan_gives_the_chart_and_theorem_1(case, x64, rng):
    x_shape, shape, rank, options = CASES[case]
    x, frame = jnp.asarray(rng.normal(size=x_shape)), lift(random_kernel(rng, shape, rank))
    dense = lambda x, w: reference_conv(x, to_dense(w), **options)  # noqa: E731

    @jax.jit
    def evaluate(x, frame):
        by_plan = {
            plan: chart_gradients(lambda x, w, plan=plan: tucker_conv(x, w, plan=plan, **options), x, frame)
            for plan in plans_of(case)
        }
        return by_plan, chart_gradients(dense, x, frame), formula_gradients(dense, x, frame)

    by_plan, chart, formula = evaluate(x, frame)
    assert_close(chart, formula, TOLERANCE, "chart")
    for plan, result in by_plan.items():
        assert_close(result, formula, TOLERANCE, plan)


@pytest.mark.parametrize(
    "case", ["same", "asymmetric", "groups", "groups-whole-out", "tucker-2", "linear", "pointwise"]
)
def test_plain_and_core_only_kernels_differentiate_as_dense(case, x64, rng):
    x_shape, shape, rank, options = CASES[case]
    x, kernel = jnp.asarray(rng.normal(size=x_shape)), random_kernel(rng, shape, rank)
    core_only = Frame(kernel.core, None, kernel.factors, None)
    variants = {"dense reference": lambda x, w: reference_conv(x, to_dense(w), **options)}
    variants |= {plan: lambda x, w, plan=plan: tucker_conv(x, w, plan=plan, **options) for plan in PLANS}

    @jax.jit
    def evaluate(x, kernel, core_only):
        def plain(apply):
            return jax.value_and_grad(lambda x, w: objective(apply, x, w), (0, 1), has_aux=True)(x, kernel)

        return {name: (plain(f), chart_gradients(f, x, core_only)) for name, f in variants.items()}

    results = evaluate(x, kernel, core_only)
    for plan in PLANS:
        assert_close(results[plan], results["dense reference"], TOLERANCE, plan)
    assert jax.tree.leaves(results["factored"][1][-1]) == [], "a core-only frame has no K to differentiate"


@pytest.mark.parametrize("plan", PLANS)
def test_hessian_vector_product_of_a_tucker_tensor(plan, x64, rng):
    x_shape, shape, rank, options = CASES["same-stride"]
    x, kernel = jnp.asarray(rng.normal(size=x_shape)), random_kernel(rng, shape, rank)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), kernel)

    def product(apply):
        gradient = jax.grad(lambda w: objective(apply, x, w)[0])
        forward_over_reverse = jax.jvp(gradient, (kernel,), (direction,))[1]
        inner = lambda w: sum(map(jnp.vdot, jax.tree.leaves(gradient(w)), jax.tree.leaves(direction)))  # noqa: E731
        return forward_over_reverse, jax.grad(inner)(kernel)

    forward, reverse = jax.jit(lambda: product(lambda x, w: tucker_conv(x, w, plan=plan, **options)))()
    expected, _ = jax.jit(lambda: product(lambda x, w: reference_conv(x, to_dense(w), **options)))()
    assert_close(forward, expected, 1e-11)
    assert_close(reverse, expected, 1e-11)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("groups", [1, 2])
def test_results_do_not_depend_on_the_capacity(plan, groups, x64, rng):
    shape, rank, capacity = (3, 3, 4, 6), (2, 2, 3, 3), (3, 2, 4, 5)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 4 * groups)))
    small = random_kernel(rng, shape, rank)
    grow = [(0, c - r) for r, c in zip(rank, capacity)]
    large = TuckerTensor(jnp.pad(small.core, grow), tuple(jnp.pad(u, [(0, 0), g]) for u, g in zip(small.factors, grow)))
    apply = lambda x, w: tucker_conv(x, w, plan=plan, groups=groups)  # noqa: E731

    def intrinsic(kernel):
        """Value, output and gradients in terms that do not depend on the choice of Q_i."""
        frame = lift(kernel)
        value, y, dx, dC, dK = chart_gradients(apply, x, frame)
        return value, y, dx, dC, [tucker.mode_product(q, k, i) for i, (q, k) in enumerate(zip(frame.Q, dK))], dK

    *of_small, _ = jax.jit(intrinsic)(small)
    value, y, dx, dC, tangents, dK = jax.jit(intrinsic)(large)
    active = tuple(slice(r) for r in rank)
    tangents = [t[active[:i] + (slice(None),) + active[i + 1 :]] for i, t in enumerate(tangents)]
    assert_close([value, y, dx, dC[active], tangents], of_small, TOLERANCE)
    for k, r in zip(dK, rank):
        assert not np.any(k[:, r:]), "padding gets no gradient"


def test_value_and_grad_of_the_package_uses_the_one_pass_rule(x64, rng):
    x_shape, shape, rank, options = CASES["same-stride"]
    x, kernel = jnp.asarray(rng.normal(size=x_shape)), random_kernel(rng, shape, rank)
    loss = lambda params, x: objective(lambda x, w: tucker_conv(x, w, **options), x, params["w"])[0]  # noqa: E731
    value, grads = frames.value_and_grad(loss)({"w": kernel}, x)
    dense = lambda x, w: reference_conv(x, w, **options)  # noqa: E731
    expected = formula_gradients(dense, x, lift(kernel))
    assert jax.tree.structure(grads["w"]) == jax.tree.structure(kernel)
    assert_close((value, grads["w"].core, grads["w"].factors), (expected[0], *expected[3:]), TOLERANCE)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda w: loss({"w": w}, x), (lift(kernel),), (lift(kernel),))


@pytest.mark.parametrize("plan", PLANS)
def test_without_jit(plan, x64, rng):
    x_shape, shape, rank, options = CASES["groups"]
    x, frame = jnp.asarray(rng.normal(size=x_shape)), lift(random_kernel(rng, shape, rank))
    expected = formula_gradients(lambda x, w: reference_conv(x, w, **options), x, frame)
    assert_close(
        chart_gradients(lambda x, w: tucker_conv(x, w, plan=plan, **options), x, frame), expected, TOLERANCE, plan
    )


@pytest.mark.parametrize("case", ["same-stride", "groups", "linear", "wide-window"])
def test_vmap_over_kernels(case, x64, rng):
    x_shape, shape, rank, options = CASES[case]
    kernels = [random_kernel(rng, shape, rank) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kernels)
    xs = jnp.asarray(rng.normal(size=(3, *x_shape)))

    @jax.jit
    def evaluate(xs, stacked, kernels):
        results = []
        for plan in PLANS:
            apply = lambda x, w, plan=plan: tucker_conv(x, w, plan=plan, **options)  # noqa: E731
            mapped = jax.vmap(lambda x, w, apply=apply: chart_gradients(apply, x, lift(w)))(xs, stacked)
            shared = jax.vmap(lambda w, apply=apply: chart_gradients(apply, xs[0], lift(w)))(stacked)
            one_by_one = [chart_gradients(apply, x, lift(w)) for x, w in zip(xs, kernels)]
            shared_one_by_one = [chart_gradients(apply, xs[0], lift(w)) for w in kernels]
            stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
            results.append(
                ((mapped, shared), (jax.tree.map(stack, *one_by_one), jax.tree.map(stack, *shared_one_by_one)))
            )
        return results

    for plan, (mapped, one_by_one) in zip(PLANS, evaluate(xs, stacked, kernels)):
        assert_close(mapped, one_by_one, TOLERANCE, plan)


def convolutions(function, *args):
    return len(re.findall(r"= \S+ convolution\(", jax.jit(function).lower(*args).compile().as_text()))


def test_no_more_convolutions_than_an_ordinary_factorized_layer(rng):
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 6)), jnp.float32)
    kernel = random_kernel(rng, (3, 3, 6, 8), (2, 3, 4, 5), np.float32)
    frame = lift(kernel)

    def all_gradients(x, kernel, plan):
        return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(tucker_conv(x, w, plan=plan))), (0, 1))(x, kernel)

    for plan in PLANS:
        ordinary = convolutions(lambda x, w, plan=plan: all_gradients(x, w, plan), x, kernel)
        assert ordinary == 3
        assert convolutions(lambda x, w, plan=plan: all_gradients(x, w, plan)[1], x, frame) == ordinary


def test_nothing_is_computed_for_an_input_without_gradient(rng):
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
    kernel = random_kernel(rng, (3, 3, 3, 8), (2, 3, None, 5), np.float32)

    def kernel_gradients(x, frame):
        return jax.grad(lambda point: jnp.sum(jnp.sin(tucker_conv(x, frames.with_point(frame, point)))))(
            frames.chart_point(frame)
        )

    assert convolutions(kernel_gradients, x, lift(kernel)) == 2


@pytest.mark.parametrize("plan", PLANS)
def test_mixed_precision(plan, rng):
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 6)), jnp.bfloat16)
    frame = lift(random_kernel(rng, (3, 3, 6, 8), (2, 3, 4, 5), np.float32))
    apply = lambda x, w: tucker_conv(x, w, plan=plan)  # noqa: E731
    value, y, dx, dC, dK = jax.jit(lambda x, w: chart_gradients(apply, x, w))(x, frame)
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {dC.dtype, *(k.dtype for k in dK)} == {jnp.dtype(jnp.float32)}
    expected = chart_gradients(lambda x, w: reference_conv(x, to_dense(w)), x.astype(jnp.float32), frame)
    for actual, exact in zip(jax.tree.leaves((y, dx, dC, dK)), jax.tree.leaves(expected[1:])):
        error = jnp.linalg.norm((actual.astype(jnp.float32) - exact).ravel()) / jnp.linalg.norm(exact.ravel())
        assert error < 0.02

    wide = lambda x, w: tucker_conv(x, w, plan=plan, preferred_element_type=jnp.float32)  # noqa: E731
    _, y, dx, dC, dK = jax.jit(lambda x, w: chart_gradients(wide, x, w))(x, frame)
    assert (y.dtype, dx.dtype, dC.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)


def test_integers_are_taken_to_the_kernels_dtype(rng):
    kernel = random_kernel(rng, (3, 3, 2, 4), (2, 2, 2, 2), np.float32)
    x = jnp.asarray(rng.integers(0, 255, size=(2, 5, 5, 2)), jnp.uint8)
    for weight in (kernel, lift(kernel), to_dense(kernel)):
        np.testing.assert_allclose(
            tucker_conv(x, weight), tucker_conv(x.astype(jnp.float32), to_dense(kernel)), rtol=1e-4, atol=1e-3
        )


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
def test_agrees_with_flax(size, window, options, x64, rng):
    nnx = pytest.importorskip("flax.nnx")
    names = {"dilation": "kernel_dilation", "groups": "feature_group_count"}
    layer = nnx.Conv(
        4,
        6,
        window,
        use_bias=False,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
        **{names.get(k, k): v for k, v in options.items()},
    )
    for batch in ((), (2,), (2, 3)):
        x = jnp.asarray(rng.normal(size=(*batch, *size, 4)))
        weight = layer.kernel[...]
        assert_close(tucker_conv(x, weight, **options), layer(x), TOLERANCE)
        kernel = TuckerTensor(weight, (None,) * weight.ndim)
        assert_close(tucker_conv(x, kernel, **options), layer(x), TOLERANCE)


@pytest.mark.parametrize("case", ["same", "wide-window", "wide-window-stride", "wide-window-groups", "groups", "one-d"])
def test_drop_in_convolution(case, x64, rng):
    x_shape, shape, _, options = CASES[case]
    x, weight = jnp.asarray(rng.normal(size=x_shape)), jnp.asarray(rng.normal(size=shape))
    axes = "XYZ"[: len(shape) - 2]
    many = lambda value: (value,) * len(axes) if isinstance(value, int) else value  # noqa: E731

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

    assert_close(gradients(conv_general_dilated), gradients(lax.conv_general_dilated), TOLERANCE)


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
def test_degenerate_images(x_shape, x64, rng):
    x, kernel = jnp.asarray(rng.normal(size=x_shape)), random_kernel(rng, (3, 3, 4, 6), (2, 2, 3, 3))
    for weight in (kernel, lift(kernel)):
        for plan in PLANS:
            y = tucker_conv(x, weight, plan=plan)
            assert_close(y, reference_conv(x, to_dense(kernel)), TOLERANCE)
    empty = tucker_conv(jnp.ones((2, 2, 2, 4)), kernel, padding="VALID")
    assert empty.shape == (2, 0, 0, 6)


# Counted work and the choice of a plan.


def test_counted_work_is_what_the_compiler_counts(rng):
    """Spatial modes whole, so that no kernel has to be formed, and no padding, whose zeros the compiler leaves out."""
    x_shape, shape, rank, options = (4, 9, 8, 6), (3, 2, 6, 8), (None, None, 4, 5), {"padding": "VALID"}
    kernel = random_kernel(rng, shape, rank, np.float32)
    x = jnp.ones(x_shape, jnp.float32)
    forward = jax.jit(lambda x, w: tucker_conv(x, w, plan="factored", **options))
    work = count_work("factored", shape, rank, x_shape, **options)
    assert work.forward == 4 * (9 * 8 * 6 * 4 + 7 * 7 * 6 * 4 * 5 + 7 * 7 * 5 * 8)
    assert work.kernel == 0
    assert forward.lower(x, kernel).cost_analysis()["flops"] == pytest.approx(2 * work.forward, rel=1e-2)

    cotangent = jnp.ones((4, 7, 7, 8), jnp.float32)
    both = jax.jit(lambda x, w, dy: jax.vjp(lambda x, w: tucker_conv(x, w, plan="factored", **options), x, w)[1](dy))
    counted = both.lower(x, lift(kernel), cotangent).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(2 * (work.forward + work.backward) - 2 * 4 * 49 * 5 * 8, rel=5e-2)  # Y is not read


def test_counted_work_of_the_other_plans():
    pixels, arguments = 4 * 6 * 6, ((3, 3, 8, 12), (2, 2, 5, 6), (4, 6, 6, 16))
    forward = {plan: count_work(plan, *arguments, groups=2).forward for plan in PLANS}
    assert forward == {
        "dense": pixels * 9 * 8 * 12,
        "merge_in": 2 * pixels * 9 * 8 * 6 + pixels * 6 * 12,
        "merge_out": pixels * 16 * 5 + pixels * 9 * 5 * 12,
        "factored": pixels * 16 * 5 + 2 * pixels * 9 * 5 * 6 + pixels * 6 * 12,
    }
    # The kernel rebuilt, W: (2, 2, 5, 6) -> 12 -> 8 -> 3 -> 3, in the order in which it grows least.
    growth = [2 * 2 * 8 * 6 * 5, 2 * 2 * 8 * 12 * 6, 3 * 2 * 8 * 12 * 2, 3 * 3 * 8 * 12 * 2]
    assert count_work("dense", *arguments, groups=2).kernel > 2 * min(sum(growth), 5000)
    strided = count_work("factored", (1, 1, 8, 12), (None, None, 5, 6), (4, 6, 6, 8), strides=2)
    assert strided.forward == 4 * 3 * 3 * (8 * 5 + 5 * 6 + 6 * 12)  # a pointwise kernel reads only what it keeps


@given(
    channels=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    fraction=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    image=st.integers(1, 16),
    batch=st.integers(1, 64),
    groups=st.sampled_from([1, 1, 2, 4]),
    device=st.sampled_from(["cpu", "gpu"]),
)
def test_the_chosen_plan_never_counts_more_than_the_kernel_rebuilt(channels, fraction, image, batch, groups, device):
    n_in, n_out = channels[0], channels[1] * groups
    rank = tuple(max(1, round(f * n)) for f, n in zip(fraction, (n_in, n_out)))
    arguments = ((3, 3, n_in, n_out), (3, None, *rank), (batch, image, image, n_in * groups))
    chosen = choose_plan(*arguments, groups=groups, device=device)
    total = {plan: count_work(plan, *arguments, groups=groups).total for plan in PLANS}
    assert total[chosen] <= total["dense"]
    if groups > 1 and n_in == 1:
        assert chosen == "dense"


def test_choice_at_both_ends(rng):
    full, small = (3, 3, 64, 64), (2, 2, 8, 8)
    assert choose_plan((3, 3, 64, 64), full, (32, 8, 8, 64)) == "dense"
    assert choose_plan((3, 3, 64, 64), small, (32, 8, 8, 64)) == "factored"
    assert choose_plan((3, 3, 3, 64), (3, 3, 3, 8), (32, 32, 32, 3)) == "merge_in"
    assert choose_plan((3, 3, 64, 10), (3, 3, 8, 10), (32, 8, 8, 64)) == "merge_out"
    # Groups: with all modes streamed it pays only if g^2 r_in r_out < n_in n_out.
    assert choose_plan((3, 3, 16, 64), (3, 3, 12, 32), (32, 8, 8, 64), groups=4) in ("dense", "merge_out")
    assert choose_plan((3, 3, 32, 64), (3, 3, 4, 4), (32, 16, 16, 64), groups=2) == "factored"


def test_tucker_conv_takes_the_plan_that_choose_plan_names(rng):
    for rank in ((2, 2, 4, 4), (3, 3, 32, 32)):
        kernel = random_kernel(rng, (3, 3, 32, 32), rank, np.float32)
        x = jnp.ones((8, 8, 8, 32))
        plan = choose_plan((3, 3, 32, 32), rank, x.shape)
        by_itself, named = (jax.make_jaxpr(lambda x, p=p: tucker_conv(x, kernel, plan=p))(x) for p in (None, plan))
        assert str(by_itself) == str(named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 6, 6, 5)}, r"x must have .* = 4 \* 1 channels .* got the shape \(2, 6, 6, 5\)"),
        ({"x": (6, 4)}, r"x must be \(batch..., 2 spatial dimensions, channels\)"),
        ({"x": (2, 6, 6, 16), "groups": 4}, "groups must divide the kernel's 6 output channels, got groups=4"),
        ({"x": (2, 6, 6, 8), "groups": 0}, "groups must be a positive integer, got 0"),
        ({"plan": "fast"}, "plan must be one of dense, merge_in, merge_out, factored or None, got 'fast'"),
        ({"padding": "FULL"}, "padding must be one of .* got 'FULL'"),
        ({"padding": (1, 2, 3)}, r"padding must be a name, an integer, or 2 integers or .* got \(1, 2, 3\)"),
        ({"padding": ((1, 2, 3), 1)}, "padding must be a name"),
        ({"padding": 1.5}, "padding must be a name, .* got 1.5"),
        ({"padding": "CAUSAL"}, "padding='CAUSAL' needs one spatial dimension, the kernel has 2"),
        ({"input_dilation": 2}, r"padding='SAME' is not defined with input_dilation=\(2, 2\)"),
        ({"strides": (1, 1, 1)}, r"strides must be a positive integer or 2 of them, got \(1, 1, 1\)"),
        ({"dilation": 0}, "dilation must be a positive integer or 2 of them, got 0"),
    ],
)
def test_mistakes_raise(change, message, rng):
    kernel = random_kernel(rng, (3, 3, 4, 6), (2, 2, 3, 4), np.float32)
    x = jnp.ones(change.pop("x", (2, 6, 6, 4)))
    for weight in (kernel, lift(kernel), to_dense(kernel)):
        with pytest.raises(ValueError, match=message):
            tucker_conv(x, weight, **change)


def test_mistaken_kernels_raise(rng):
    with pytest.raises(ValueError, match="plan must be 'dense' or None for a depthwise kernel"):
        tucker_conv(jnp.ones((2, 6, 6, 4)), random_kernel(rng, (3, 3, 1, 8), (2, 2, 1, 4)), groups=4, plan="factored")
    kernel = random_kernel(rng, (3, 3, 4, 6), (2, 2, 3, 4), np.float32)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), kernel)
    with pytest.raises(ValueError, match="map over stacked kernels with jax.vmap"):
        tucker_conv(jnp.ones((2, 6, 6, 4)), stacked)
    with pytest.raises(ValueError, match="kernel must be a TuckerTensor, a Frame or an array"):
        tucker_conv(jnp.ones((2, 6, 6, 4)), jnp.ones(4))
    with pytest.raises(ValueError, match="rank as long"):
        choose_plan((3, 3, 4, 6), (2, 2), (2, 6, 6, 4))
    with pytest.raises(ValueError, match="x_shape must be"):
        count_work("dense", (3, 3, 4, 6), (2, 2, 2, 2), (2, 6, 6, 5))
    with pytest.raises(ValueError, match="plan must be one of"):
        count_work("other", (3, 3, 4, 6), (2, 2, 2, 2), (2, 6, 6, 4))
