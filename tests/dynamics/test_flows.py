"""The vector fields against finite differences and against one another, and their integration against known solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.dynamics.problems import graded_kernel, quadratic, quadratic_loss, smooth, smooth_loss
from experiments.dynamics.theorem1 import gauge_defects
from tdlrt_jax import resize, to_dense
from tdlrt_jax.dynamics import Flow, factor_flow, full_flow, integrate, kc_flow, project, projected_flow
from tests.helpers import random_kernel, regression

SHAPE, RANK = (4, 5, 6), 2


@pytest.fixture
def problem(x64):
    return smooth(SHAPE, RANK + 1)


def loss_of(problem):
    return lambda kernel: smooth_loss(kernel, problem)


def central_difference(flow, state, size=1e-6):
    """The velocity of the dense kernel as a state moves along the flow's velocity."""
    velocity = flow.velocity(state)

    def at(h):
        return flow.dense(jax.tree.map(lambda y, v: y + h * v, state, velocity))

    return jax.tree.map(lambda a, b: (a - b) / (2 * size), at(size), at(-size))


def dense_gradient(loss, dense, size=1e-6):
    """By central differences, entry by entry."""

    def at(flat):
        return loss(flat.reshape(dense.shape))

    basis = size * jnp.eye(dense.size)
    flat = dense.ravel()
    return jax.lax.map(lambda e: (at(flat + e) - at(flat - e)) / (2 * size), basis).reshape(dense.shape)


def test_all_flows_are_the_projected_flow_at_an_instant(problem):
    kernel = graded_kernel(SHAPE, RANK, 0.1)
    gradient = dense_gradient(loss_of(problem), to_dense(kernel))
    flow = full_flow(loss_of(problem))
    np.testing.assert_allclose(flow.velocity(flow.initial(kernel)), -gradient, atol=1e-8)
    expected = -project(kernel, gradient)
    for flow in (factor_flow(loss_of(problem)), kc_flow(loss_of(problem)), projected_flow(loss_of(problem), kernel)):
        np.testing.assert_allclose(central_difference(flow, flow.initial(kernel)), expected, atol=1e-7)


@pytest.mark.parametrize("make", [full_flow, factor_flow, kc_flow])
def test_leaves_that_are_not_kernels_follow_the_gradient(x64, make):
    params, loss = regression(jnp.float64, rank=(2, None, 3), capacity=(2, 3, 3))
    params["second"]["kernel"] = resize(params["second"]["kernel"], (2, 2))
    flow = make(loss)
    velocity = flow.velocity(flow.initial(params))
    expected = jax.grad(lambda bias: loss({**params, "first": {**params["first"], "bias": bias}}))(
        params["first"]["bias"]
    )
    np.testing.assert_allclose(velocity["first"]["bias"], -expected, atol=1e-12)
    moved = central_difference(flow, flow.initial(params))
    dense = {name: to_dense(params[name]["kernel"]) for name in ("first", "second")}

    def with_kernels(dense):
        bias = {"bias": params["first"]["bias"]}
        return loss({"first": {"kernel": dense["first"], **bias}, "second": {"kernel": dense["second"]}})

    for name, gradient in jax.grad(with_kernels)(dense).items():
        wanted = gradient if make is full_flow else project(params[name]["kernel"], gradient)
        np.testing.assert_allclose(moved[name]["kernel"], -wanted, atol=1e-7)


@pytest.mark.parametrize("solver", ["tsit5", "dopri8", "kvaerno5"])
def test_full_flow_follows_the_known_solution(x64, solver):
    problem = quadratic(SHAPE, eps=0.3)
    kernel = graded_kernel(SHAPE, RANK, 0.1)
    flow = full_flow(lambda kernel: quadratic_loss(kernel, problem))
    found = integrate(flow, kernel, [0.0, 0.4, 1.0], solver=solver, rtol=1e-8)
    assert found.statistics.succeeded and found.statistics.accepted > 3
    for time, dense in zip(found.times, found.params):
        np.testing.assert_allclose(dense, problem.solution(to_dense(kernel), float(time)), atol=2e-7)


def test_flows_on_the_manifold_keep_a_tangent_flow(x64):
    """With the gradient in the tangent space the projected flow is the full one."""
    problem = quadratic(SHAPE)
    kernel = graded_kernel(SHAPE, RANK, 0.1)

    def loss(kernel):
        return quadratic_loss(kernel, problem)

    for flow in (factor_flow(loss), kc_flow(loss), projected_flow(loss, kernel)):
        found = integrate(flow, kernel, 0.7, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.params[-1], problem.solution(to_dense(kernel), 0.7), atol=1e-8)


def test_theorem_1_holds_in_moving_frames_but_not_with_a_qr_decomposition_at_every_instant(problem):
    kernel = graded_kernel(SHAPE, RANK, 0.1)
    flow = factor_flow(loss_of(problem))
    gradient = jax.grad(loss_of(problem))(to_dense(kernel))
    plain, corrected = gauge_defects(kernel, flow.velocity(kernel), gradient)
    assert min(plain) > 1e-3
    assert max(corrected) < 1e-12


def test_explicit_and_implicit_solvers_agree_where_singular_values_are_small(problem):
    kernel = graded_kernel(SHAPE, RANK, 1e-5)
    flow = factor_flow(loss_of(problem))
    explicit, implicit = (integrate(flow, kernel, 1.0, solver=s, rtol=1e-6, atol=1e-8) for s in ("tsit5", "kvaerno5"))
    np.testing.assert_allclose(explicit.params, implicit.params, atol=1e-4)
    assert explicit.statistics.succeeded and implicit.statistics.succeeded


@pytest.mark.parametrize("stiffness", [0.1, 20])
@pytest.mark.parametrize("solver", ["tsit5", "dopri8"])
def test_evaluations_are_counted(x64, solver, stiffness):
    """A callback counts them; van der Pol's stiff oscillator has rejected steps."""
    calls = []

    def velocity(state):
        jax.debug.callback(lambda: calls.append(1))
        x, y = state
        return jnp.stack([y, stiffness * (1 - x**2) * y - x])

    flow = Flow(lambda state: state, velocity, lambda state: state)
    found = integrate(flow, jnp.array([2.0, 0.0]), 20.0, solver=solver, rtol=1e-6)
    jax.effects_barrier()
    assert found.statistics.rejected > 0 or stiffness < 1
    assert 0 <= len(calls) - found.statistics.evaluations <= 3


def test_a_step_that_is_not_finite_is_tried_again(x64):
    """The first trial step of this start overflows; taken as an infinite error, all later ones would be rejected as well."""
    problem = smooth((5, 6, 7), 4)
    flow, kernel = factor_flow(loss_of(problem)), graded_kernel((5, 6, 7), 3, 1e-6)
    found = integrate(flow, kernel, 1.0, rtol=1e-6, atol=1e-8, max_steps=1000)
    assert found.statistics.succeeded and found.statistics.rejected > 0


def test_an_integration_that_fails_says_so(problem):
    found = integrate(factor_flow(loss_of(problem)), graded_kernel(SHAPE, RANK, 1e-3), 1.0, max_steps=3)
    assert not found.statistics.succeeded


def test_flows_of_a_fixed_rank_refuse_padding(problem, rng):
    padded = {"w": resize(random_kernel(rng, SHAPE, (2, 2, 2), dtype=jnp.float64), (3, 3, 3))}
    for start in (lambda: projected_flow(loss_of(problem), padded), lambda: kc_flow(loss_of(problem)).initial(padded)):
        with pytest.raises(ValueError, match=r"kernel 'w'.*rank \(2, 2, 2\)"):
            start()


def test_wrong_arguments_are_named(problem):
    flow, kernel = full_flow(loss_of(problem)), graded_kernel(SHAPE, RANK, 0.1)
    with pytest.raises(ValueError, match="solver='heun'"):
        integrate(flow, kernel, 1.0, solver="heun")
    with pytest.raises(ValueError, match="ascending"):
        integrate(flow, kernel, [1.0, 0.5])
