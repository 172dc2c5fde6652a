"""Gradients of convolutions by Tucker kernels: every plan, every option, against dense convolutions and Theorem 1's formula."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdlrt_jax import frame as frames
from tdlrt_jax import tucker
from tdlrt_jax.conv import PLANS, tucker_conv, tucker_linear
from tdlrt_jax.frame import Frame, lift
from tdlrt_jax.tucker import TuckerTensor, to_dense
from tests.conv.cases import (
    CASES,
    KERNEL,
    STRUCTURES,
    TOLERANCE,
    applied,
    assert_close,
    chart_gradients,
    compiled,
    densely,
    formula_gradients,
    objective,
    random_kernel,
    reference_conv,
)


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
