"""The paper's formulation, written plainly, is Algorithm 1: the same step as the library's single pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tdlrt_jax
from benchmarks.paper_step import one_pass_per_factor, paper_step


@pytest.fixture
def problem(x64):
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "first": tdlrt_jax.hosvd(jax.random.normal(keys[0], (3, 3, 4, 6)), rank=(2, 3, 3, 4)),
        "second": tdlrt_jax.hosvd(jax.random.normal(keys[1], (3, 3, 6, 5)), rank=(None, None, 4, 3)),
        "linear": tdlrt_jax.hosvd(jax.random.normal(keys[2], (5, 7)), rank=3),
        "scale": jnp.ones(7),
    }
    x, y = jax.random.normal(keys[3], (8, 5, 5, 4)), jax.random.normal(keys[4], (8, 7))

    def loss_fn(params, state, x, y):
        z = jnp.tanh(tdlrt_jax.tucker_conv(x, params["first"]))
        z = jnp.tanh(tdlrt_jax.tucker_conv(z, params["second"], strides=2)).mean(axis=(1, 2))
        z = params["scale"] * tdlrt_jax.tucker_linear(z, params["linear"])
        return jnp.mean((z - y) ** 2), {"calls": state["calls"] + 1}

    return loss_fn, params, {"calls": jnp.zeros(())}, (x, y)


def test_the_gradients_of_all_factors_are_those_of_the_single_pass(problem):
    loss_fn, params, state, batch = problem
    (value, new_state), grads = one_pass_per_factor(loss_fn, params, state, *batch)
    (expected_value, _), expected = tdlrt_jax.value_and_grad(loss_fn, has_aux=True)(params, state, *batch)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-12)
    assert float(new_state["calls"]) == 1
    np.testing.assert_allclose(grads["scale"], expected["scale"], atol=1e-12)
    for name in ("first", "second", "linear"):
        for dk, reference in zip(grads[name].factors, expected[name].factors):
            assert (dk is None) == (reference is None)
            if dk is not None:
                np.testing.assert_allclose(dk, reference, atol=1e-12)


def test_its_steps_are_those_of_bug(problem):
    loss_fn, params, state, batch = problem
    tx = tdlrt_jax.tdlrt(optax.sgd(0.05, momentum=0.9), tolerance=0.05)
    ours = tdlrt_jax.tdlrt_step(loss_fn, tx, has_state=True, donate=False)
    papers = jax.jit(paper_step(loss_fn, tx))
    a, b = (params, tx.init(params), state), (params, tx.init(params), state)
    for _ in range(3):
        *a, info = ours(*a, *batch)
        *b, loss = papers(*b, *batch)
        assert float(loss) == pytest.approx(float(info.loss), rel=1e-9)
    for name in ("first", "second", "linear"):
        difference = tdlrt_jax.to_dense(a[0][name]) - tdlrt_jax.to_dense(b[0][name])
        assert float(jnp.linalg.norm(difference)) < 1e-9
    np.testing.assert_allclose(a[0]["scale"], b[0]["scale"], atol=1e-10)
