"""Steps with solved sub-steps: their bookkeeping is the optimizer's, their sub-steps those of NumPy and of tight tolerances."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.dynamics.problems import graded_kernel, smooth, smooth_loss
from tdlrt_jax import resize, tdlrt, to_dense, value_and_grad
from tdlrt_jax.dynamics import flow_step, full_flow, integrate
from tests import references
from tests.helpers import dense64, orthonormality, regression

SHAPE, RANK, H, TAU = (5, 6, 7), 2, 0.1, 0.02


def loss_and_kernel(smallest=0.1):
    problem = smooth(SHAPE, RANK + 1)
    return (lambda kernel: smooth_loss(kernel, problem)), graded_kernel(SHAPE, RANK, smallest)


@pytest.mark.parametrize("integrator", ["bug", "parallel", "fixed_rank"])
def test_euler_steps_are_those_of_the_optimizer(x64, integrator):
    loss, kernel = loss_and_kernel()
    kernel = resize(kernel, SHAPE)
    tx, gradient = tdlrt(optax.sgd(H), tolerance=TAU, integrator=integrator), value_and_grad(loss)
    state = tx.init(kernel)
    updates, state = jax.jit(lambda g, s, p: tx.update(g, s, p, value_and_grad_fn=gradient))(
        gradient(kernel)[1], state, kernel
    )
    new, info = flow_step(loss, integrator=integrator, inner="euler")(kernel, H, TAU)
    # The optimizer keeps its tolerance in float32.
    np.testing.assert_allclose(to_dense(new), to_dense(optax.apply_updates(kernel, updates)), atol=1e-12)
    assert info.rank["kernel"].tolist() == state.rank["kernel"].tolist()


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_euler_steps_of_a_network_are_those_of_the_optimizer(x64, integrator):
    params, loss = regression(jnp.float64)
    tx, gradient = tdlrt(optax.sgd(H), tolerance=TAU, integrator=integrator), value_and_grad(loss)
    updates, _ = jax.jit(lambda g, s, p: tx.update(g, s, p, value_and_grad_fn=gradient))(
        gradient(params)[1], tx.init(params), params
    )
    expected = optax.apply_updates(params, updates)
    new, _ = flow_step(loss, integrator=integrator, inner="euler")(params, H, TAU)
    np.testing.assert_allclose(new["first"]["bias"], expected["first"]["bias"], atol=1e-13)
    for name in ("first", "second"):
        np.testing.assert_allclose(to_dense(new[name]["kernel"]), to_dense(expected[name]["kernel"]), atol=1e-12)


def solved(velocity, start, end, steps=200):
    """The classical Runge-Kutta method in NumPy."""
    h, y = end / steps, start
    for _ in range(steps):
        a = velocity(y)
        b = velocity(y + h / 2 * a)
        c = velocity(y + h / 2 * b)
        d = velocity(y + h * c)
        y = y + h / 6 * (a + 2 * b + 2 * c + d)
    return y


@pytest.mark.parametrize("integrator", ["bug", "parallel", "fixed_rank"])
def test_exact_steps_follow_the_reference(x64, integrator):
    """Every sub-step of section 3 in NumPy, from the reference's frames, by another solver."""
    problem = smooth(SHAPE, RANK + 1)
    weights, target = np.asarray(problem.weights), np.asarray(problem.target)
    kernel = graded_kernel(SHAPE, RANK, 0.1)
    core, factors = np.asarray(kernel.core), [np.asarray(u) for u in kernel.factors]

    def grad(dense):
        return weights * np.tanh(dense - target)

    def core_flow(start, bases):
        return solved(lambda c: -references.core_gradient(grad(references.to_dense(c, bases)), bases), start, H)

    Q, K = references.frame(core, factors)
    moved, blocks = [], []
    for mode, (q, k) in enumerate(zip(Q, K)):
        chart = references.fold(q.T, mode, core.shape)

        def k_velocity(k, mode=mode, chart=chart):
            dense = references.mode_products(chart, [k if j == mode else u for j, u in enumerate(factors)])
            return -references.k_gradient(grad(dense), factors, Q, mode)

        moved.append(solved(k_velocity, k, H))
        blocks.append(moved[-1] - k)
    if integrator == "parallel":
        expected = references.to_dense(core_flow(core, factors), factors)
        for mode, (q, u, step) in enumerate(zip(Q, factors, blocks)):
            outside = (step - u @ (u.T @ step)) @ q.T
            expected = expected + references.mode_products(
                references.fold(outside, mode, core.shape), factors, skip=mode
            )
    else:
        new = [
            references.augmented_basis(k, u) if integrator == "bug" else np.linalg.qr(k)[0]
            for k, u in zip(moved, factors)
        ]
        start = references.mode_products(core, [v.T @ u for v, u in zip(new, factors)])
        expected = references.to_dense(core_flow(start, new), new)
    start = resize(kernel, SHAPE) if integrator != "fixed_rank" else kernel
    found, info = flow_step(lambda kernel: smooth_loss(kernel, problem), integrator=integrator)(start, H, 0.0)
    assert bool(info.solved)
    np.testing.assert_allclose(dense64(found), expected, atol=1e-9)
    assert orthonormality(found) < 1e-12


def test_at_full_rank_an_exact_step_is_the_full_flow(x64):
    kernel = graded_kernel((4, 4, 4), 4, 0.05)
    problem = smooth((4, 4, 4), 3)

    def loss(kernel):
        return smooth_loss(kernel, problem)

    found, _ = flow_step(loss)(kernel, 0.5, 0.0)
    expected = integrate(full_flow(loss), kernel, 0.5, solver="dopri8", rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(to_dense(found), expected.params[-1], atol=1e-9)


def test_capacity_does_not_matter(x64):
    loss, kernel = loss_and_kernel()
    step = flow_step(loss)
    small, large = (step(resize(kernel, capacity), H, 0.05) for capacity in ((4, 4, 4), SHAPE))
    np.testing.assert_allclose(to_dense(small[0]), to_dense(large[0]), atol=1e-10)


def test_sub_steps_are_not_stiff(x64):
    """The solver's steps for K and core flows do not depend on the smallest singular value."""
    counts = []
    for smallest in (1e-1, 1e-12):
        loss, kernel = loss_and_kernel(smallest)
        counts.append(int(flow_step(loss)(kernel, H, 0.0)[1].inner_steps))
    assert counts[1] <= counts[0] + 1


def test_float32_steps_solve_to_their_precision():
    with jax.enable_x64(True):
        wide = (resize(graded_kernel(SHAPE, RANK, 0.1), SHAPE), smooth(SHAPE, RANK + 1))
        expected, _ = flow_step(smooth_loss)(wide[0], H, TAU, wide[1])
    kernel, problem = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32)), wide)
    new, info = flow_step(smooth_loss)(kernel, H, TAU, problem)
    assert bool(info.solved) and new.core.dtype == jnp.float32
    np.testing.assert_allclose(dense64(new), dense64(expected), atol=2e-5)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="integrator='leapfrog'"):
        flow_step(lambda kernel: 0.0, integrator="leapfrog")
    with pytest.raises(ValueError, match="inner='heun'"):
        flow_step(lambda kernel: 0.0, inner="heun")
