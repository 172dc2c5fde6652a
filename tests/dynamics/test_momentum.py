"""The heavy-ball flow against its principle, its energy and dense momentum; the transport of moments against the flow."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.dynamics import momentum
from experiments.dynamics.problems import graded_kernel, smooth, smooth_loss
from tdlrt_jax import TuckerTensor, resize, to_dense
from tdlrt_jax.dynamics import (
    Rolling,
    dense_velocity,
    factor_heavy_ball_flow,
    full_heavy_ball_flow,
    integrate,
    project,
    tangent_coordinates,
)
from tests.helpers import random_kernel, regression

SHAPE, RANK, FRICTION = (4, 5, 6), 2, 0.7


@pytest.fixture
def loss(x64):
    problem = smooth(SHAPE, RANK + 1, norm=2.0)
    return lambda kernel: smooth_loss(kernel, problem)


def rolling(rng, kernel):
    """A kernel and a random velocity in its tangent space, in the gauge of the factors."""
    return Rolling(kernel, tangent_coordinates(kernel, jnp.asarray(rng.normal(size=[len(u) for u in kernel.factors]))))


def test_the_force_that_holds_the_ball_is_normal(loss, rng):
    """``P(W) (W'' + γ W' + ∇L) = 0`` and ``(I - P(W)) W'' != 0``, with ``W''`` by differentiation of ``W'`` along the flow."""
    flow = factor_heavy_ball_flow(loss, friction=FRICTION)
    state = rolling(rng, random_kernel(rng, SHAPE, (2, 3, 2)))
    speed, acceleration = jax.jvp(dense_velocity, (state,), (flow.velocity(state),))
    pushed = acceleration + FRICTION * speed + jax.grad(loss)(to_dense(state.params))
    np.testing.assert_allclose(project(state.params, pushed), 0, atol=1e-12)
    assert np.linalg.norm(pushed) > 1
    # W' is in the tangent space, and the gauge is kept.
    np.testing.assert_allclose(project(state.params, speed), speed, atol=1e-12)
    for u, du, ddu in zip(state.params.factors, state.velocity.factors, flow.velocity(state).velocity.factors):
        np.testing.assert_allclose(u.T @ ddu + du.T @ du, 0, atol=1e-12)


@pytest.mark.parametrize("friction", [0.0, FRICTION])
def test_energy_falls_by_friction_alone(loss, friction):
    flow = factor_heavy_ball_flow(loss, friction=friction)
    times = np.linspace(0, 3, 301)
    found = integrate(flow, graded_kernel(SHAPE, RANK, 0.3), times, solver="dopri8", rtol=1e-11, atol=1e-13)
    speeds = jax.vmap(dense_velocity)(found.states)
    kinetic = 0.5 * jnp.sum(speeds**2, axis=(1, 2, 3))
    energy = kinetic + jax.vmap(loss)(found.params)
    lost = friction * np.concatenate([[0], np.cumsum(kinetic[1:] + kinetic[:-1]) * (times[1] - times[0])])
    np.testing.assert_allclose(energy + lost, energy[0], atol=1e-9 if friction == 0 else 1e-4)
    assert float(kinetic.max()) > 0.1


def test_full_ranks_are_not_held(loss, rng):
    """With all ranks full the tangent space is everything: both flows are one."""
    kernel = random_kernel(rng, SHAPE, SHAPE)
    times = [0.5, 1.0]
    full, held = (
        integrate(make(loss, friction=FRICTION), kernel, times, rtol=1e-10, atol=1e-12)
        for make in (full_heavy_ball_flow, factor_heavy_ball_flow)
    )
    np.testing.assert_allclose(held.params, full.params, atol=1e-8)


def test_other_leaves_roll_freely(x64):
    params, loss = regression(jnp.float64, rank=(2, None, 3), capacity=(2, 3, 3))
    params["second"]["kernel"] = resize(params["second"]["kernel"], (2, 2))
    params["first"]["bias"] = jnp.arange(6.0)
    flow = factor_heavy_ball_flow(loss, friction=FRICTION)
    state = flow.initial(params)
    state = state._replace(velocity=jax.tree.map(jnp.ones_like, state.velocity))
    pulled = flow.velocity(state)
    gradient = jax.grad(lambda bias: loss({**params, "first": {**params["first"], "bias": bias}}))(
        params["first"]["bias"]
    )
    np.testing.assert_allclose(pulled.velocity["first"]["bias"], -FRICTION - gradient, atol=1e-12)
    assert isinstance(pulled.velocity["second"]["kernel"], TuckerTensor)
    assert pulled.velocity["first"]["kernel"].factors[1] is None
    np.testing.assert_array_equal(pulled.params["first"]["bias"], 1.0)


def test_wrong_arguments_are_named(loss, rng):
    with pytest.raises(ValueError, match="friction=-1"):
        full_heavy_ball_flow(loss, friction=-1.0)
    padded = resize(random_kernel(rng, SHAPE, (2, 2, 2)), (3, 3, 3))
    with pytest.raises(ValueError, match=r"rank \(2, 2, 2\)"):
        factor_heavy_ball_flow(loss, friction=1.0).initial(padded)


def test_the_optimizer_follows_the_flow_if_its_moments_are_carried(x64):
    """First order in the step for all integrators."""
    found = momentum.approach(smallest=(0.1,), steps=(20, 40, 80), shape=SHAPE, rank=RANK, moments=("carried",))
    for series in found["series"]:
        heavy = series["limit"] == "heavy ball"
        assert series["error"][-1] < (0.05 if heavy else 0.15), series
        assert series["order"] == pytest.approx(1, abs=0.2 if heavy else 0.4), series


def test_with_moments_in_stale_coordinates_it_goes_elsewhere(x64):
    """However short the steps are."""
    stale = ("core only", "kept")
    found = momentum.approach(
        smallest=(0.1,), steps=(20, 40, 80), shape=SHAPE, rank=RANK, integrators=("parallel",), moments=stale
    )
    for series in found["series"]:
        assert min(series["error"]) > 0.3, series
        assert series["order"] < 0.3, series


def test_carried_moments_reach_the_optimum_as_dense_ones_do(x64):
    found = momentum.descent(steps=240, shape=SHAPE, rank=RANK, integrators=("bug",), moments=("carried", "core only"))
    dense, moments = found["dense"][-1], found["series"]["bug"]
    assert moments["carried"][-1] < 2 * dense < 1e-4
    assert moments["core only"][-1] > 20 * moments["carried"][-1]


def test_published_results_are_drawn_from_json(tmp_path):
    published = Path(momentum.__file__).parents[1] / "results" / "dynamics" / "momentum.json"
    (tmp_path / "momentum.json").write_text(published.read_text())
    assert momentum.main(["--output", str(tmp_path), "--draw"]) == 0
    assert (tmp_path / "momentum.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<svg" in (tmp_path / "momentum.svg").read_text()
