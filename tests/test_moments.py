"""Where moments are in an optimizer's state, and that all of a network's are carried, each by the maps of its own kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import TuckerTensor, hosvd, lift, tdlrt, tdlrt_step, tucker_linear
from tdlrt_jax.integrators import unchanged
from tdlrt_jax.moments import NetworkMoments, find_moments
from tdlrt_jax.paths import flatten_kernels
from tdlrt_jax.status import SKIPPED
from tdlrt_jax.transport import core_moment, transport, transport_squares
from tests.helpers import random_kernel


def test_moments_are_found_by_path_and_kind(rng):
    params = {
        "a": random_kernel(rng, (3, 4), (2, 2)),
        "b": {"a": random_kernel(rng, (5, 4), (2, 2))},
        "bias": jnp.ones(2),
    }
    kernels = [
        ((jax.tree_util.DictKey("a"),), params["a"]),
        ((jax.tree_util.DictKey("b"), jax.tree_util.DictKey("a")), params["b"]["a"]),
    ]
    state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
    found = find_moments(state, kernels, check_values=True)
    assert [(moment.kernel, moment.kind) for moment in found] == [
        (0, "linear"),
        (1, "linear"),
        (0, "squared"),
        (1, "squared"),
    ]


@pytest.fixture
def network(x64, rng):
    """Parameters, an Adam state with moments of all of them, and the frames of before and after a step of the cores."""
    params = {
        "a": random_kernel(rng, (5, 4), (2, 2)),
        "b": random_kernel(rng, (5, 4), (2, 2)),  # of equal shapes: carried together
        "c": random_kernel(rng, (3, 4, 6), (None, 2, 3)),
        "bias": jnp.ones(2),
    }
    tree = flatten_kernels(params)
    state = optax.adam(1e-3).init(params)
    moments = jax.tree.map(lambda leaf: jnp.array(rng.random(leaf.shape)), (state[0].mu, state[0].nu))
    state = (state[0]._replace(mu=moments[0], nu=moments[1]), *state[1:])
    after = [kernel._replace(core=kernel.core + 0.3 * rng.normal(size=kernel.core.shape)) for kernel in tree.kernels]
    return NetworkMoments(tree, None), state, [lift(kernel) for kernel in tree.kernels], [lift(k) for k in after]


def assert_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, expected)


def test_every_moment_is_carried_by_the_map_of_its_kernel_and_kind(network):
    moments, state, frames, new_frames = network
    carried = moments.carried_over(state, frames, new_frames)
    assert jax.tree.structure(carried) == jax.tree.structure(state)
    for field, move in (("mu", transport), ("nu", transport_squares)):
        for name, frame, new in zip(moments.tree.names, frames, new_frames):
            moment = getattr(state[0], field)[name]
            same = tuple(None if u is None else jnp.eye(u.shape[1]) for u in frame.U)
            expected = move(moment.core, moment.factors, unchanged(frame), same, new)
            assert_equal(getattr(carried[0], field)[name], expected)
        np.testing.assert_array_equal(getattr(carried[0], field)["bias"], getattr(state[0], field)["bias"])


def test_moments_of_one_kind_alone(network):
    moments, state, frames, new_frames = network
    everything = moments.carried_over(state, frames, new_frames)
    linear = moments.carried_over(state, frames, new_frames, ("linear",))
    assert_equal(linear[0].mu, everything[0].mu)
    assert_equal(linear[0].nu, state[0].nu)
    assert not np.allclose(everything[0].nu["a"].core, state[0].nu["a"].core)


def test_factors_of_other_states_by_kind(network):
    moments, state, *_ = network
    other = jax.tree.map(lambda leaf: leaf + 1, state)
    found = moments.with_factors(state, {"squared": other})
    for name in moments.tree.names:
        assert_equal(found[0].nu[name], TuckerTensor(state[0].nu[name].core, other[0].nu[name].factors))
    assert_equal(found[0].mu, state[0].mu)
    assert int(found[0].count) == int(state[0].count)


def test_before_a_step_of_the_cores(network):
    moments, state, *_ = network
    found = moments.of_cores(state)
    for field, kind in (("mu", "linear"), ("nu", "squared")):
        for name, kernel in zip(moments.tree.names, moments.tree.kernels):
            assert_equal(getattr(found[0], field)[name], core_moment(getattr(state[0], field)[name], kernel, kind))


def test_numbers_that_are_one_a_kernel_stay(network):
    """As the learning rate of a partition, or a norm."""
    moments, state, frames, new_frames = network
    ones = moments.tree.replace([jax.tree.map(lambda leaf: jnp.ones(()), kernel) for kernel in moments.tree.kernels])
    assert_equal(moments.carried_over({"rate": ones}, frames, new_frames), {"rate": ones})
    with pytest.raises(ValueError, match="not known to be an average"):
        moments.carried_over({"rate": state[0].mu}, frames, new_frames)
    named = NetworkMoments(moments.tree, {"rate": "linear"}).carried_over({"rate": state[0].mu}, frames, new_frames)
    assert_equal(named["rate"], moments.carried_over(state, frames, new_frames)[0].mu)


def trained(tx, steps=4, **options):
    """The losses of a small regression."""
    rng = np.random.default_rng(0)
    params = {"w": hosvd(jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), rank=4), "b": jnp.zeros(6)}
    x, y = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32), jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    step = tdlrt_step(lambda p: jnp.mean((tucker_linear(x, p["w"]) + p["b"] - y) ** 2), tx, donate=False, **options)
    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, info = step(params, state)
        assert int(info.status) & SKIPPED == 0
        losses.append(float(info.loss))
    return losses, state


@pytest.mark.parametrize(
    "options", [{}, {"integrator": "parallel", "adapt_every": 2}, {"keep_momentum": True}, {"integrator": "fixed_rank"}]
)
@pytest.mark.parametrize("inner", [optax.adam, optax.sgd])
def test_moments_of_16_bits_stay_so(inner, options):
    wide = inner(0.02) if inner is optax.adam else inner(0.05, momentum=0.9)
    narrow = {optax.adam: lambda: inner(0.02, mu_dtype=jnp.bfloat16)}.get(
        inner, lambda: inner(0.05, momentum=0.9, accumulator_dtype=jnp.bfloat16)
    )()
    losses, state = trained(tdlrt(narrow, tolerance=0.05, **options))
    moments = state.inner[0].mu if inner is optax.adam else state.inner[0].trace
    assert {leaf.dtype.name for leaf in jax.tree.leaves(moments)} == {"bfloat16"}
    np.testing.assert_allclose(losses, trained(tdlrt(wide, tolerance=0.05, **options))[0], rtol=0.02)


def test_adan_is_known():
    """Its ``v`` is an average of differences of gradients, which squares of elsewhere are called."""
    losses, state = trained(tdlrt(optax.adan(0.02), tolerance=0.02), steps=8)
    inner = state.inner[0]
    assert losses[-1] < losses[0]
    assert float(jnp.min(inner.v["w"].core)) < 0 and float(jnp.min(inner.n["w"].core)) >= 0


@pytest.mark.parametrize("inner", [optax.flatten(optax.adam(0.1)), optax.chain(optax.flatten(optax.trace(0.9)))])
def test_moments_that_are_of_no_parameter_are_refused(inner):
    with pytest.raises(
        ValueError, match=r"is an array of shape \(\d+,\), which no parameter's path ends.*optax.flatten"
    ):
        trained(tdlrt(inner, tolerance=0.1))
