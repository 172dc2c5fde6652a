"""Functions of the parameters that an inner transformation calls: at kernels, not at its coordinates of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import TuckerTensor, hosvd, lift, tdlrt, to_dense, tucker_linear, value_and_grad
from tdlrt_jax.frame import around, core_frame
from tdlrt_jax.integrators import INTEGRATORS
from tests.helpers import random_kernel


@pytest.mark.parametrize("rank", [(2, 3, 4), (2, None, 3)])
def test_a_kernel_anywhere_in_the_chart(x64, rng, rank):
    """The Tucker tensor is the chart's own array, and its derivatives are the chart's, but for steps within the bases' ranges."""
    frame = lift(random_kernel(rng, (4, 3, 6), rank))
    shapes = jax.tree.map(jnp.shape, TuckerTensor(frame.core, frame.K))
    point = TuckerTensor(*jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), (frame.core, frame.K)))

    def outside(u, k, start):
        return None if u is None else start + (jnp.eye(len(u)) - u @ u.T) @ (k - start)

    def oracle(point):
        K = tuple(map(outside, frame.U, point.factors, frame.K))
        return frame._replace(core=point.core, K=K, origin=frame.K).chart_to_dense()

    np.testing.assert_allclose(to_dense(around(frame, point)), oracle(point), atol=1e-12)
    weights = jnp.asarray(rng.normal(size=(4, 3, 6)))
    ours, expected = (
        jax.grad(lambda point, dense=dense: jnp.sum(weights * dense(point) ** 2))(point)
        for dense in (lambda point: to_dense(around(frame, point)), oracle)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), ours, expected)
    assert jax.tree.map(jnp.shape, ours) == shapes


def test_in_the_galerkin_chart_the_core_is_all_there_is(x64, rng):
    kernel = random_kernel(rng, (4, 3, 6), (2, None, 3))
    core = jnp.asarray(rng.normal(size=kernel.core.shape))
    found = around(core_frame(kernel), TuckerTensor(core, jax.tree.map(jnp.zeros_like, kernel.factors)))
    np.testing.assert_array_equal(to_dense(found), to_dense(kernel._replace(core=core)))


def problem(rng):
    kernel, x, y = (jnp.asarray(rng.normal(size=shape)) for shape in ((4, 4), (16, 4), (16, 4)))
    params = {"layer": {"kernel": hosvd(kernel), "bias": jnp.zeros(4)}}

    def loss(params):
        kernel = params["layer"]["kernel"]
        product = x @ kernel if isinstance(kernel, jax.Array) else tucker_linear(x, kernel)
        return jnp.mean((jnp.tanh(product + params["layer"]["bias"]) - y) ** 2)

    return params, {"layer": {"kernel": kernel, "bias": jnp.zeros(4)}}, loss


@pytest.mark.parametrize("kind", [*INTEGRATORS, "cores_only"])
def test_a_line_search_at_full_rank_is_that_of_dense_training(x64, rng, kind):
    """Steps of 8 are too long: the search has something to do, at kernels that are where dense training has them."""
    params, dense, loss = problem(rng)
    search = optax.chain(optax.sgd(8.0), optax.scale_by_backtracking_linesearch(20, store_grad=False))
    tx = tdlrt(search, tolerance=0.0, integrator="parallel" if kind == "cores_only" else kind)
    state, expected_state = tx.init(params), search.init(dense)
    gradients, rates = value_and_grad(loss), []
    for _ in range(5):
        value, grads = gradients(params)
        more = {"cores_only": True} if kind == "cores_only" else {"value_and_grad_fn": gradients}
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss, **more)
        params = optax.apply_updates(params, updates)
        value, grads = jax.value_and_grad(loss)(dense)
        updates, expected_state = search.update(grads, expected_state, dense, value=value, grad=grads, value_fn=loss)
        dense = optax.apply_updates(dense, updates)
        rates.append(float(expected_state[-1].learning_rate))
        assert float(state.inner[-1].learning_rate) == pytest.approx(rates[-1], rel=1e-9)
        assert int(state.status) == 0
    assert min(rates) < 1, "or nothing was searched"
    np.testing.assert_allclose(to_dense(params["layer"]["kernel"]), dense["layer"]["kernel"], atol=1e-11)
    np.testing.assert_allclose(params["layer"]["bias"], dense["layer"]["bias"], atol=1e-11)


def test_functions_that_want_gradients_elsewhere_are_refused(rng):
    params, _, loss = problem(rng)
    tx = tdlrt(optax.sgd(0.1), tolerance=0.1, integrator="parallel")
    _, grads = value_and_grad(loss)(params)
    with pytest.raises(ValueError, match=r"grad_fn=.* is a function, .*expected value_fn\(params\) -> value alone"):
        tx.update(grads, tx.init(params), params, grad_fn=lambda params, _: grads)
