"""Kernels that nothing updates keep their ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tdlrt_jax
from tdlrt_jax import hosvd, tdlrt, to_dense, tucker_linear
from tdlrt_jax.status import OK, SKIPPED


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
@pytest.mark.parametrize("how", ["set_to_zero", "stop_gradient"])
def test_a_kernel_that_is_frozen_inside_is_not_truncated(integrator, how):
    rng = np.random.default_rng(0)
    spectrum = np.diag(0.8 ** np.arange(12))
    frozen = hosvd(jnp.asarray(np.linalg.qr(rng.normal(size=(12, 12)))[0] @ spectrum, jnp.float32))
    head = rng.normal(size=(12, 6)) * 0.3 ** np.arange(6)
    params = {"body": frozen, "head": hosvd(jnp.asarray(head, jnp.float32))}
    x, y = jnp.asarray(rng.normal(size=(9, 12)), jnp.float32), jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)
    before = to_dense(params["body"])

    def loss_fn(params):
        body = jax.lax.stop_gradient(params["body"]) if how == "stop_gradient" else params["body"]
        return jnp.mean((tucker_linear(jnp.tanh(tucker_linear(x, body)), params["head"]) - y) ** 2)

    inner = optax.sgd(0.05)
    if how == "set_to_zero":
        inner = optax.partition(
            {"trained": inner, "frozen": optax.set_to_zero()}, {"body": "frozen", "head": "trained"}
        )
    tx = tdlrt(inner, tolerance=0.3, integrator=integrator)
    step, state = tdlrt_jax.tdlrt_step(loss_fn, tx, donate=False), tx.init(params)
    for _ in range(5):
        params, state, info = step(params, state)
        assert int(info.status) & SKIPPED == OK
    np.testing.assert_allclose(to_dense(params["body"]), before, atol=1e-5)
    assert info.rank["body"].tolist() == [12, 12] and max(info.rank["head"].tolist()) < 6


def test_a_frozen_kernel_with_a_tolerance_of_its_own_stays_under_a_budget():
    rng = np.random.default_rng(0)
    spectrum = np.diag(0.8 ** np.arange(12))
    params = {
        "body": hosvd(jnp.asarray(np.linalg.qr(rng.normal(size=(12, 12)))[0] @ spectrum, jnp.float32)),
        "head": hosvd(jnp.asarray(rng.normal(size=(12, 6)) / 3, jnp.float32)),
    }
    x, y = jnp.asarray(rng.normal(size=(9, 12)), jnp.float32), jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)

    def loss_fn(params):
        return jnp.mean((tucker_linear(jnp.tanh(tucker_linear(x, params["body"])), params["head"]) - y) ** 2)

    inner = optax.partition(
        {"trained": optax.sgd(0.05), "frozen": optax.set_to_zero()}, {"body": "frozen", "head": "trained"}
    )
    tx = tdlrt(inner, tolerance=tdlrt_jax.Budget(0.1, 100), rules={"body": {"tolerance": 0.3}})
    before, state = to_dense(params["body"]), tx.init(params)
    step = tdlrt_jax.tdlrt_step(loss_fn, tx, donate=False)
    for _ in range(3):
        params, state, info = step(params, state)
    np.testing.assert_allclose(to_dense(params["body"]), before, atol=1e-5)
    assert info.rank["body"].tolist() == [12, 12]


def test_a_budget_by_the_loss_does_not_take_what_no_gradient_reaches_for_worthless():
    """It counts as the others do; taken for worthless, it would be left with one direction."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: hosvd(jnp.asarray(rng.normal(size=shape) * 0.8 ** np.arange(shape[1]), jnp.float32))  # noqa: E731
    params = {"body": draw(12, 12), "middle": draw(12, 12), "head": draw(12, 6)}
    x, y = jnp.asarray(rng.normal(size=(9, 12)), jnp.float32), jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)

    def loss_fn(params):
        hidden = jnp.tanh(tucker_linear(x, jax.lax.stop_gradient(params["body"])))
        return jnp.mean((tucker_linear(jnp.tanh(tucker_linear(hidden, params["middle"])), params["head"]) - y) ** 2)

    tx = tdlrt(optax.sgd(0.05), tolerance=tdlrt_jax.Budget(0.3, 4, every=1, importance="loss"))
    state, step = tx.init(params), tdlrt_jax.tdlrt_step(loss_fn, tx, donate=False)
    for _ in range(6):
        params, state, info = step(params, state)
    assert 3 <= int(info.rank["body"][0]) < 12 and int(info.rank["middle"][0]) < 12
