"""Convolution by Tucker kernels: every plan, every option, against dense convolutions and Theorem 1's formula."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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

    def many(value):
        return (value,) * spatial if isinstance(value, int) else tuple(value)

    extent = [(k - 1) * d + 1 for k, d in zip(weight.shape, many(dilation))]
    if padding in ("CIRCULAR", "REFLECT"):
        pads = [(0, 0), *(((k - 1) // 2, k // 2) for k in extent), (0, 0)]
        x, padding = jnp.pad(x, pads, mode={"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]), "VALID"
    elif padding == "CAUSAL":
        padding = [(extent[0] - 1, 0)]
    elif not isinstance(padding, str):
        padding = [pad if isinstance(pad, tuple) else (pad, pad) for pad in many(padding)]
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


def compiled(function):
    """``jax.jit`` without LLVM's optimizations: what takes time here is compilation."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=quick if jax.default_backend() == "cpu" else None)


def objective(apply, x, kernel):
    """A scalar whose cotangent depends on the layer's output."""
    y = apply(x, kernel)
    wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    weights = jnp.cos(jnp.arange(y.size, dtype=wide.dtype)).reshape(y.shape)
    return jnp.sum(weights * jnp.sin(wide)), y


def applied(plan, options):
    return lambda x, kernel: tucker_conv(x, kernel, plan=plan, **options)


def densely(options):
    return lambda x, kernel: reference_conv(x, to_dense(kernel), **options)


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


X, KERNEL, RANK = (2, 6, 5, 4), (3, 3, 4, 6), (2, 2, 3, 4)
GROUPS_X, GROUPS_KERNEL = (1, 5, 5, 6), (3, 3, 3, 8)
# name: (shape of x, shape of the kernel, rank with None for whole modes, options); every plan runs each of these ...
STRUCTURES = {
    "same": (X, KERNEL, (2, 3, 3, 4), {}),
    "rank-one": (X, KERNEL, (1, 1, 1, 1), {}),
    "full-rank": (X, KERNEL, KERNEL, {}),
    "whole-spatial": (X, KERNEL, (None, 2, 3, 4), {}),
    "whole-in": (X, KERNEL, (2, None, None, 4), {}),
    "whole-out": (X, KERNEL, (2, 2, 3, None), {}),
    "tucker-2": (X, KERNEL, (None, None, 3, 4), {}),
    "all-whole": (X, KERNEL, (None, None, None, None), {}),
    "groups": (
        (2, 6, 5, 6),
        GROUPS_KERNEL,
        (2, 3, 2, 3),
        {"groups": 2, "strides": (2, 1), "padding": ((1, 0), (2, 1))},
    ),
    "groups-of-many": ((1, 5, 5, 12), (3, 3, 4, 9), (2, 2, 2, 4), {"groups": 3, "padding": "CIRCULAR"}),
    "groups-whole-in": (GROUPS_X, GROUPS_KERNEL, (2, 2, None, 3), {"groups": 2}),
    "groups-whole-out": (GROUPS_X, GROUPS_KERNEL, (2, 2, 2, None), {"groups": 2}),
    "linear": ((7, 5), (5, 6), (3, 3), {}),
    "linear-whole-in": ((7, 5), (5, 6), (None, 4), {}),
    "pointwise": (X, (1, 1, 4, 6), (1, 1, 3, 3), {"strides": (2, 1)}),
    "pointwise-padded": (X, (1, 1, 4, 6), (None, 1, 3, 3), {"strides": 2, "padding": 1}),
    "pointwise-groups": ((2, 4, 4, 6), (1, 1, 3, 4), (1, None, 2, 2), {"groups": 2}),
    "wide-window-groups": ((3, 2, 2, 6), GROUPS_KERNEL, (2, 3, 2, 3), {"groups": 2}),
}
# ... and these, which differ in nothing but the convolution in the middle, run by the longest plan.
OPTIONS = {
    "valid-stride": ((2, 7, 8, 4), (3, 2, 4, 5), (2, 2, 2, 3), {"padding": "VALID", "strides": (2, 3)}),
    "same-stride": ((2, 7, 8, 4), (3, 2, 4, 5), (2, 2, 2, 3), {"strides": 2}),
    "same-lower": ((1, 6, 6, 3), (2, 4, 3, 4), (2, 3, 2, 3), {"padding": "SAME_LOWER"}),
    "asymmetric": (X, KERNEL, RANK, {"padding": ((0, 2), (3, 1)), "strides": (1, 2)}),
    "integer-padding": (X, KERNEL, RANK, {"padding": 2}),
    "circular": (X, (3, 4, 4, 6), (2, 3, 3, 4), {"padding": "CIRCULAR"}),
    "reflect-stride": (X, (3, 4, 4, 6), (2, 3, 3, 4), {"padding": "REFLECT", "strides": 2}),
    "causal": ((2, 9, 4), (3, 4, 6), (2, 3, 4), {"padding": "CAUSAL", "dilation": 2}),
    "dilation": ((2, 8, 9, 4), (3, 2, 4, 6), (2, 2, 3, 4), {"dilation": (2, 3)}),
    "transposed": ((2, 4, 5, 4), KERNEL, RANK, {"input_dilation": 2, "padding": ((2, 1), (1, 2)), "strides": (1, 2)}),
    "one-d": ((2, 9, 4), (3, 4, 6), (2, 3, 4), {"strides": 2}),
    "three-d": ((1, 4, 5, 4, 3), (2, 3, 2, 3, 4), (2, 2, 2, 2, 3), {"strides": (1, 2, 1)}),
    "wide-window": ((3, 2, 2, 4), KERNEL, RANK, {}),
    "wide-window-stride": ((3, 4, 3, 4), (3, 5, 4, 6), (2, 3, 3, 4), {"strides": 2, "dilation": (2, 1)}),
    "unbatched": ((6, 5, 4), KERNEL, RANK, {}),
    "two-batch-axes": ((2, 3, 5, 4, 4), KERNEL, RANK, {}),
    "depthwise": ((2, 6, 5, 4), (3, 3, 1, 8), (2, 3, 1, 5), {"groups": 4}),
}
CASES = STRUCTURES | OPTIONS
TOLERANCE = 1e-12


def plans_of(case):
    if case == "depthwise":
        return ("dense",)
    return PLANS if case in STRUCTURES else ("factored",)


@pytest.mark.parametrize("case", CASES)
def test_every_plan_gives_theorem_1(case, x64, rng):
    x_shape, shape, rank, options = CASES[case]
    x, kernel = jnp.asarray(rng.normal(size=x_shape)), random_kernel(rng, shape, rank)

    @compiled
    def evaluate(x, kernel):
        frame = lift(kernel)
        by_plan = {plan: chart_gradients(applied(plan, options), x, frame) for plan in plans_of(case)}
        if case in ("same", "groups"):  # autodiff through the chart itself
            by_plan["chart"] = chart_gradients(densely(options), x, frame)
        return by_plan, formula_gradients(densely(options), x, frame)

    by_plan, formula = evaluate(x, kernel)
    for plan, result in by_plan.items():
        assert_close(result, formula, TOLERANCE, plan)


@pytest.mark.parametrize("case", ["same", "groups", "groups-whole-out", "linear", "pointwise"])
def test_plain_and_core_only_kernels_differentiate_as_dense(case, x64, rng):
    x_shape, shape, rank, options = CASES[case]
    x, kernel = jnp.asarray(rng.normal(size=x_shape)), random_kernel(rng, shape, rank)
    core_only = Frame(kernel.core, None, kernel.factors, None)

    @compiled
    def evaluate(x, kernel, core_only):
        def gradients(apply):
            plain = jax.value_and_grad(lambda x, w: objective(apply, x, w), (0, 1), has_aux=True)(x, kernel)
            return plain, chart_gradients(apply, x, core_only)

        return {plan: gradients(applied(plan, options)) for plan in PLANS}, gradients(densely(options))

    by_plan, expected = evaluate(x, kernel, core_only)
    for plan, result in by_plan.items():
        assert_close(result, expected, TOLERANCE, plan)
        assert jax.tree.leaves(result[1][-1]) == [], "a core-only frame has no K to differentiate"


def test_second_derivatives_of_a_tucker_tensor(x64, rng):
    x_shape, shape, rank, options = CASES["same-stride"]
    x, kernel = jnp.asarray(rng.normal(size=x_shape)), random_kernel(rng, shape, rank)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), kernel)

    @compiled
    def evaluate(x, kernel, direction):
        def gradient(apply):
            return jax.grad(lambda w: objective(apply, x, w)[0])

        def hessian_vector(apply):
            return jax.jvp(gradient(apply), (kernel,), (direction,))[1]

        def slope(w):
            g = gradient(applied("factored", options))(w)
            return sum(map(jnp.vdot, jax.tree.leaves(g), jax.tree.leaves(direction)))

        products = {plan: hessian_vector(applied(plan, options)) for plan in PLANS}
        return products | {"reverse over reverse": jax.grad(slope)(kernel)}, hessian_vector(densely(options))

    products, expected = evaluate(x, kernel, direction)
    for name, product in products.items():
        assert_close(product, expected, 1e-11, name)


@pytest.mark.parametrize(("groups", "plans"), [(1, ("merge_in", "factored")), (2, ("factored",))])
def test_results_do_not_depend_on_the_capacity(groups, plans, x64, rng):
    rank, capacity = (2, 2, 3, 3), (3, 2, 4, 5)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 4 * groups)))
    small = random_kernel(rng, KERNEL, rank)
    grow = [(0, c - r) for r, c in zip(rank, capacity)]
    large = TuckerTensor(jnp.pad(small.core, grow), tuple(jnp.pad(u, [(0, 0), g]) for u, g in zip(small.factors, grow)))

    @compiled
    def intrinsic(kernel):
        """Value, output and gradients in terms that do not depend on the choice of Q_i, and the dK_i."""
        frame = lift(kernel)
        results = {}
        for plan in plans:
            value, y, dx, dC, dK = chart_gradients(applied(plan, {"groups": groups}), x, frame)
            tangents = [tucker.mode_product(q, k, i) for i, (q, k) in enumerate(zip(frame.Q, dK))]
            results[plan] = value, y, dx, dC, tangents, dK
        return results

    of_small, of_large = intrinsic(small), intrinsic(large)
    active = tuple(slice(r) for r in rank)
    for plan in plans:
        value, y, dx, dC, tangents, dK = of_large[plan]
        tangents = [t[(*active[:i], slice(None), *active[i + 1 :])] for i, t in enumerate(tangents)]
        assert_close([value, y, dx, dC[active], tangents], of_small[plan][:-1], TOLERANCE, plan)
        for k, r in zip(dK, rank):
            assert not np.any(k[:, r:]), "padding gets no gradient"


def test_value_and_grad_of_the_package_uses_the_one_pass_rule(x64, rng):
    x, kernel = jnp.asarray(rng.normal(size=(7, 5))), random_kernel(rng, (5, 6), (3, 3))

    def loss(params, x):
        return objective(tucker_linear, x, params["w"])[0]

    value, grads = compiled(frames.value_and_grad(loss))({"w": kernel}, x)
    expected = compiled(lambda x, w: formula_gradients(jnp.matmul, x, lift(w)))(x, kernel)
    assert jax.tree.structure(grads["w"]) == jax.tree.structure(kernel)
    assert_close((value, grads["w"].core, grads["w"].factors), (expected[0], *expected[3:]), TOLERANCE)


def test_without_jit(x64, rng):
    x, frame = jnp.asarray(rng.normal(size=(7, 5))), lift(random_kernel(rng, (5, 6), (3, 3)))
    expected = formula_gradients(jnp.matmul, x, frame)
    for plan in ("dense", "factored"):
        assert_close(chart_gradients(applied(plan, {}), x, frame), expected, TOLERANCE, plan)


@pytest.mark.parametrize(("case", "plan"), [("same-stride", "factored"), ("groups", "factored"), ("linear", "dense")])
def test_vmap_over_kernels(case, plan, x64, rng):
    x_shape, shape, rank, options = CASES[case]
    kernels = [random_kernel(rng, shape, rank) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kernels)
    xs = jnp.asarray(rng.normal(size=(3, *x_shape)))

    def gradients(x, kernel):
        return chart_gradients(applied(plan, options), x, lift(kernel))

    @compiled
    def mapped(xs, stacked):
        return jax.vmap(gradients)(xs, stacked), jax.vmap(gradients, in_axes=(None, 0))(xs[0], stacked)

    each, shared = mapped(xs, stacked)
    one = compiled(gradients)
    for i, kernel in enumerate(kernels):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], each), one(xs[i], kernel), TOLERANCE)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], shared), one(xs[0], kernel), TOLERANCE)


def test_inside_scan_and_checkpoint(rng):
    frame = compiled(lift)(random_kernel(rng, (3, 4, 4), (2, 2, 3), np.float32))
    x = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)

    def layers(x, frame, wrap):
        layer = wrap(lambda x: jnp.tanh(tucker_conv(x, frame, plan="factored")))
        if wrap is jax.checkpoint:
            return jax.lax.scan(lambda x, _: (layer(x), None), x, length=3)[0]
        return layer(layer(layer(x)))

    by_scan, unrolled = compiled(
        lambda x, frame: [
            chart_gradients(lambda x, w, wrap=wrap: layers(x, w, wrap), x, frame)
            for wrap in (jax.checkpoint, lambda f: f)
        ]
    )(x, frame)
    assert_close(by_scan, unrolled, 1e-5)


def test_symbolic_batch(rng):
    kernel = random_kernel(rng, (3, 3, 4, 6), (2, 2, 2, 3), np.float32)
    (batch,) = jax.export.symbolic_shape("b")
    symbolic = jax.ShapeDtypeStruct((batch, 5, 5, 4), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: tucker_conv(x, kernel, strides=2)))(symbolic)
    x = jnp.asarray(rng.normal(size=(3, 5, 5, 4)), jnp.float32)
    assert_close(exported.call(x), reference_conv(x, to_dense(kernel), strides=2), 1e-5)


def convolutions(function, *args):
    return len(re.findall(r"= \S+ convolution\(", compiled(function).lower(*args).compile().as_text()))


def test_no_more_convolutions_than_an_ordinary_factorized_layer(rng):
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 6)), jnp.float32)
    kernel = random_kernel(rng, (3, 3, 6, 8), (2, 3, 4, 5), np.float32)
    frame = compiled(lift)(kernel)

    def all_gradients(x, kernel, plan):
        return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(tucker_conv(x, w, plan=plan))), (0, 1))(x, kernel)

    ordinary = convolutions(lambda x, w: all_gradients(x, w, "factored"), x, kernel)
    assert ordinary == 3
    for plan in PLANS:
        assert convolutions(lambda x, w, plan=plan: all_gradients(x, w, plan)[1], x, frame) == ordinary


def test_nothing_is_computed_for_an_input_without_gradient(rng):
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
    kernel = random_kernel(rng, (3, 3, 3, 8), (2, 3, None, 5), np.float32)

    def kernel_gradients(x, frame):
        return jax.grad(lambda point: jnp.sum(jnp.sin(tucker_conv(x, frames.with_point(frame, point)))))(
            frames.chart_point(frame)
        )

    assert convolutions(kernel_gradients, x, compiled(lift)(kernel)) == 2


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
