"""Algorithm 1 and its parallel variant against independent NumPy versions, on random tensors, step after step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import TuckerTensor, active_rank, resize, tdlrt, to_dense, value_and_grad
from tests import references

LEARNING_RATE = 0.07


def problem(shape, seed=0):
    """A loss that couples all entries, its gradient in NumPy, and a target of low rank."""
    rng = np.random.default_rng(seed)
    target = references.to_dense(*references.tucker_random(shape, (2,) * len(shape), seed=seed))
    weights = rng.uniform(0.5, 1.5, size=shape)

    def loss(kernel):
        return jnp.sum(jnp.asarray(weights) * jnp.log(jnp.cosh(to_dense(kernel) - target)))

    return loss, lambda dense: weights * np.tanh(dense - target)


def trajectory(kernel, loss, tx, steps):
    gradient = value_and_grad(loss)

    def body(carry, _):
        kernel, state = carry
        _, grads = gradient(kernel)
        updates, state = tx.update(grads, state, kernel, value_and_grad_fn=gradient)
        kernel = optax.apply_updates(kernel, updates)
        return (kernel, state), (to_dense(kernel), active_rank(kernel), state.truncation_error["kernel"])

    run = jax.jit(lambda kernel, state: jax.lax.scan(body, (kernel, state), None, length=steps)[1])
    return run(kernel, tx.init(kernel))


CASES = [
    ((4, 5, 6, 3), (2, 2, 3, 2), ()),
    ((3, 3, 6, 7), (3, 3, 2, 4), (0, 1)),
    ((5, 6, 7), (1, 1, 1), ()),
    ((6, 8), (3, 3), ()),
    ((4, 3, 5, 2, 3), (2, 2, 2, 2, 2), ()),
]


@pytest.mark.parametrize(("shape", "rank", "whole"), CASES)
@pytest.mark.parametrize("tau", [1e-2, 0.2])
@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_adaptive_integrators_follow_the_reference(x64, shape, rank, whole, tau, integrator):
    steps = 12
    core, factors = references.tucker_random(shape, rank, seed=1, whole=whole)
    loss, grad = problem(shape)
    kernel = TuckerTensor(jnp.array(core), tuple(None if u is None else jnp.array(u) for u in factors))
    tx = tdlrt(optax.sgd(LEARNING_RATE), tolerance=tau, integrator=integrator)
    dense, ranks, _ = trajectory(resize(kernel, shape), loss, tx, steps)
    spare = 1 if integrator == "parallel" else 0
    step = references.algorithm1_step if integrator == "bug" else references.parallel_step
    for k in range(steps):
        core, factors = step(core, factors, grad, LEARNING_RATE, tau, spare=spare)
        np.testing.assert_allclose(dense[k], references.to_dense(core, factors), atol=1e-10)
        assert tuple(ranks[k].tolist()) == core.shape


@pytest.mark.parametrize(("integrator", "spare"), [("bug", 0), ("parallel", 1)])
def test_ranks_fall_and_rise_to_the_targets(x64, integrator, spare):
    """The optimum has rank (2, 2, 2): found from underestimated and from overestimated ranks; spare directions stay."""
    loss, _ = problem((5, 6, 7))
    tx = tdlrt(optax.sgd(0.5), tolerance=1e-3, integrator=integrator)
    for rank in (1, 5):
        core, factors = references.tucker_random((5, 6, 7), (rank,) * 3, seed=1)
        kernel = resize(TuckerTensor(jnp.array(core), tuple(map(jnp.array, factors))), (5, 6, 7))
        _, ranks, _ = trajectory(kernel, loss, tx, 60)
        assert ranks[-1].tolist() == [2 + spare] * 3


@pytest.mark.parametrize(("shape", "rank", "whole"), CASES)
def test_fixed_rank_follows_the_reference(x64, shape, rank, whole):
    core, factors = references.tucker_random(shape, rank, seed=1, whole=whole)
    loss, grad = problem(shape)
    kernel = TuckerTensor(jnp.array(core), tuple(None if u is None else jnp.array(u) for u in factors))
    tx = tdlrt(optax.sgd(LEARNING_RATE), tolerance=0.0, integrator="fixed_rank")
    dense, ranks, _ = trajectory(kernel, loss, tx, 12)
    padded, _, _ = trajectory(resize(kernel, shape), loss, tx, 12)
    for k in range(12):
        core, factors = references.algorithm1_step(core, factors, grad, LEARNING_RATE, 0.0, adaptive=False)
        np.testing.assert_allclose(dense[k], references.to_dense(core, factors), atol=1e-10)
        np.testing.assert_allclose(padded[k], dense[k], atol=1e-10)
        assert tuple(ranks[k].tolist()) == core.shape


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_each_criterion_and_spare_follow_the_reference(x64, integrator):
    shape, rank = (5, 6, 7), (2, 2, 2)
    core, factors = references.tucker_random(shape, rank, seed=3)
    loss, grad = problem(shape, seed=4)
    kernel = resize(TuckerTensor(jnp.array(core), tuple(map(jnp.array, factors))), shape)
    tx = tdlrt(optax.sgd(LEARNING_RATE), tolerance=0.1, integrator=integrator, criterion="each", spare=2)
    dense, ranks, _ = trajectory(kernel, loss, tx, 10)
    step = references.algorithm1_step if integrator == "bug" else references.parallel_step
    for k in range(10):
        core, factors = step(core, factors, grad, LEARNING_RATE, 0.1, spare=2, criterion="each")
        np.testing.assert_allclose(dense[k], references.to_dense(core, factors), atol=1e-10)
        assert tuple(ranks[k].tolist()) == core.shape
