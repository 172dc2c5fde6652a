"""What the part of a step that moves the bases is multiplied by."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import resize, tdlrt, tdlrt_step, to_dense
from tests.helpers import dense64, orthonormality, regression

KERNELS = (("first", "kernel"), ("second", "kernel"))


def problem(capacity=None):
    params, loss = regression(jnp.float64)
    if capacity is not None:  # room for all new directions
        params = resize(params, {"first/kernel": (4, 3, 6), "second/kernel": (5, 5)})
    return params, loss


def stepped(params, loss, integrator, rate, lr=0.05):
    """The dense kernels after one step from which nothing is cut."""
    tx = tdlrt(optax.sgd(lr), tolerance=0.0, integrator=integrator, basis_rate=rate)
    step = tdlrt_step(lambda params, _: loss(params), tx, donate=False)
    after, _, info = step(params, tx.init(params), jnp.zeros(()))
    assert int(info.status) & 0b11 == 0
    return [dense64(after[a][b]) for a, b in KERNELS]


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_a_step_is_the_cores_step_and_so_many_times_the_rest(x64, integrator):
    """``W(rate) = W_cores + rate (W(1) - W_cores)``, with ``W_cores`` the kernels after a step of the cores alone."""
    params, loss = problem(capacity="full")
    tx = tdlrt(optax.sgd(0.05), tolerance=0.0, integrator=integrator)
    cores = tdlrt_step(lambda params, _: loss(params), tx, donate=False, cores_only=True)
    still, _, _ = cores(params, tx.init(params), jnp.zeros(()))
    once = stepped(params, loss, integrator, 1.0)
    for rate in (0.25, 3, 10.0):
        for (a, b), one, found in zip(KERNELS, once, stepped(params, loss, integrator, rate)):
            base = dense64(still[a][b])
            assert np.abs(one - base).max() > 1e-4  # there is a rest
            np.testing.assert_allclose(found, base + rate * (one - base), atol=1e-9)


@pytest.mark.parametrize("integrator", ["bug", "parallel", "fixed_rank"])
def test_rare_steps_at_their_rate_follow_the_training_of_all_steps(x64, integrator):
    """A splitting of the gradient flow: with the step size the distance to it goes to 0, and without the rate it does not."""
    every, horizon = 4, 1.6

    def end(lr, every, rate):
        params, loss = problem()
        options = {"integrator": integrator, "tolerance": 1e-9, "basis_rate": rate, "max_rank": 3, "spare": 0}
        tx = tdlrt(optax.sgd(lr), **options)
        state = tx.init(params)
        whole, cores = (
            tdlrt_step(lambda params, _: loss(params), tx, donate=False, cores_only=alone) for alone in (False, True)
        )
        for count in range(round(horizon / lr)):
            params, state, _ = (whole if count % every == 0 else cores)(params, state, jnp.zeros(()))
        for a, b in KERNELS:
            assert orthonormality(params[a][b]) < 1e-10
        return np.concatenate([np.asarray(to_dense(params[a][b])).ravel() for a, b in KERNELS])

    flow = end(0.0025, 1, 1.0)
    coarse, fine = (np.linalg.norm(end(lr, every, every) - flow) for lr in (0.04, 0.01))
    left_behind = np.linalg.norm(end(0.01, every, 1.0) - flow)
    assert fine < 0.5 * coarse
    assert fine < 0.25 * left_behind


def test_of_one_it_adds_nothing_to_a_program():
    params, loss = regression(jnp.float32)

    def text(**options):
        tx = tdlrt(optax.sgd(0.1), tolerance=0.1, **options)
        step = tdlrt_step(lambda params, _: loss(params), tx, donate=False)
        return jax.jit(step).lower(params, tx.init(params), jnp.zeros(())).as_text()

    assert text() == text(basis_rate=1.0) and len(text(basis_rate=2.0)) > len(text())
