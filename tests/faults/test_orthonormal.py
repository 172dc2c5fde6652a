"""Factors that are not orthonormal are never silent: given or produced, a step from them or to them is left out and says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tdlrt_jax.integrators.bug
import tdlrt_jax.integrators.fixed_rank
from tdlrt_jax import canonicalize, describe_status, tdlrt, tdlrt_step, value_and_grad
from tdlrt_jax.inspection import ORTHONORMAL, deviation
from tdlrt_jax.status import NONFINITE, NOT_ORTHONORMAL, OK, SKIPPED
from tests.faults.problem import INTEGRATORS, batch, loss_fn, parameters, same, without_report
from tests.helpers import dense64, orthonormality, random_kernel


@functools.cache
def program(integrator, adapt_every=1):
    tx = tdlrt(optax.sgd(0.2, momentum=0.5), tolerance=0.02, integrator=integrator, adapt_every=adapt_every)
    return tx, tdlrt_step(loss_fn, tx, donate=False)


def scaled(kernel):
    first, *rest = kernel.factors
    return kernel._replace(factors=(first * 1.01, *rest))


def decayed(kernel):
    return jax.tree.map(lambda leaf: leaf * 0.99, kernel)


def rounded(kernel):
    """To eight bits."""
    return kernel._replace(factors=tuple(jnp.round(u * 32) / 32 for u in kernel.factors))


def with_a_gap(kernel):
    """The first column is no longer in use, the others are."""
    *rest, last = kernel.factors
    return kernel._replace(factors=(*rest, last.at[:, 0].set(0)))


def empty(kernel):
    first, *rest = kernel.factors
    return kernel._replace(factors=(first * 0, *rest))


def dependent(kernel):
    *rest, last = kernel.factors
    return kernel._replace(factors=(*rest, last.at[:, 1].set(last[:, 0])))


BROKEN = {f.__name__: f for f in (scaled, decayed, rounded, with_a_gap, empty, dependent)}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("setting", [*INTEGRATORS, "every_second"])
def test_factors_that_something_changed_are_reported(setting, how):
    tx, step = program("bug", 2) if setting == "every_second" else program(setting)
    params = parameters()
    params, state, info = step(params, tx.init(params), batch())
    assert int(info.status) & SKIPPED == OK
    for _ in range(2):  # with adapt_every: where the bases stay, and where they move
        broken = params | {"kernel": BROKEN[how](params["kernel"])}
        after, after_state, info = step(broken, state, batch())
        assert int(info.status) == NOT_ORTHONORMAL and int(info.skipped) == 1
        (advice,) = describe_status(info.status)
        assert "not orthonormal" in advice and "tdlrt_jax.canonicalize(kernel)" in advice and "init" in advice
        assert same(after, broken) and same(without_report(after_state), without_report(state))
        with pytest.raises(ValueError, match=r"kernel 'kernel': factor \d .*canonicalize"):
            tx.init(broken)
        params, state, info = step(params, state, batch())

    repaired = broken | {"kernel": canonicalize(broken["kernel"])}  # as the advice says
    np.testing.assert_allclose(dense64(repaired["kernel"]), dense64(broken["kernel"]), atol=2e-6)
    after, _, info = step(repaired, tx.init(repaired), batch())
    assert int(info.status) & SKIPPED == OK and orthonormality(after["kernel"]) < 2e-6


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_what_is_accepted_is_orthonormal_to_rounding_two_steps_later(integrator):
    """A deviation E, here as large as is accepted, is ``3/4 E^2`` after one correction."""
    tx, step = program(integrator)
    params = parameters()
    given = jax.tree.map(lambda u: u * (1 + 0.45 * ORTHONORMAL), params["kernel"].factors)
    params = params | {"kernel": params["kernel"]._replace(factors=given)}
    assert 0.8 * ORTHONORMAL < orthonormality(params["kernel"]) < ORTHONORMAL
    state = tx.init(params)
    for bound in (3e-6, 1e-6):
        params, state, info = step(params, state, batch())
        assert int(info.status) & SKIPPED == OK and orthonormality(params["kernel"]) < bound


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_factors_that_a_step_itself_would_spoil_are_not_taken(integrator, monkeypatch):
    """Rotations that a factorization gave wrongly, by a hundredth; the input is in order."""
    if integrator == "fixed_rank":
        module, name = tdlrt_jax.integrators.fixed_rank, "principal_rotation"
        original = module.principal_rotation

        def wrong(*args, **kwargs):
            vectors, rows, energies = original(*args, **kwargs)
            return vectors * 1.01, rows, energies
    else:
        module, name = tdlrt_jax.integrators.bug, "truncate"
        original = module.truncate

        def wrong(*args, **kwargs):
            cut = original(*args, **kwargs)
            return cut._replace(rotations=tuple(p * 1.01 for p in cut.rotations))

    monkeypatch.setattr(module, name, wrong)
    params = parameters()
    tx = tdlrt(optax.sgd(0.1), tolerance=0.02, integrator=integrator)
    after, state, info = tdlrt_step(loss_fn, tx, donate=False)(params, tx.init(params), batch())
    assert int(info.status) == NOT_ORTHONORMAL and same(after, params) and int(state.step) == 0


def test_what_comes_after_tdlrt_in_a_chain_is_found_out():
    """Half of an update of factors leaves them between two bases."""
    params, this = parameters(), batch()
    tx = optax.chain(tdlrt(optax.sgd(0.5), tolerance=0.02, integrator="parallel"), optax.scale(0.5))

    @jax.jit
    def step(params, state):
        _, grads = value_and_grad(loss_fn)(params, this)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert int(state[0].status) == NOT_ORTHONORMAL and int(state[0].skipped) >= 1


def test_numbers_that_are_not_finite_come_first():
    """Where there is no number, nothing is said of angles."""
    tx, step = program("bug")
    params = parameters()
    state = tx.init(params)
    broken = params | {"kernel": scaled(params["kernel"])}
    _, _, info = step(broken, state, batch(first=np.nan))
    assert int(info.status) == NONFINITE
    first, *rest = params["kernel"].factors
    missing = params["kernel"]._replace(factors=(first.at[0, 0].set(jnp.nan), *rest))
    _, _, info = step(params | {"kernel": missing}, state, batch())
    assert int(info.status) == NONFINITE


def test_the_deviation(rng):
    u = np.asarray(random_kernel(rng, (7, 5), (3, 3), dtype=jnp.float32).factors[0])
    padded = np.pad(u, ((0, 0), (0, 2)))
    assert deviation(jnp.asarray(padded)) < 1e-6
    assert abs(deviation(jnp.asarray(padded * 1.1)) - 0.21) < 1e-5
    assert abs(deviation(jnp.asarray(padded[:, ::-1])) - 1) < 1e-5, "columns in use that do not come first"
    assert deviation(jnp.zeros((7, 3))) == 1
    assert np.isnan(deviation(jnp.asarray(padded).at[0, 0].set(jnp.nan)))
