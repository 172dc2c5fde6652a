"""Small singular values: the errors of the integrators do not depend on them, those of factor gradient descent do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import TuckerTensor, resize, tdlrt, to_dense, value_and_grad
from tests import references

SHAPE, RANK, STEPS, STEP_SIZE = (8, 9, 10), (3, 3, 3), 40, 0.05
SMALLEST = (1.0, 1e-4, 1e-8, 1e-12)


def start(smallest):
    values = np.geomspace(1.0, smallest, 3)
    core, factors = references.tucker_random(SHAPE, RANK, values, seed=2)
    return TuckerTensor(jnp.array(core), tuple(map(jnp.array, factors)))


def target():
    return jnp.array(references.to_dense(*references.tucker_random(SHAPE, RANK, seed=5))) / 5


def loss(kernel):
    return 0.5 * jnp.sum((to_dense(kernel) - target()) ** 2)


def distances_to_dense(update, init):
    """Relative distance to dense gradient descent from the same start after all steps, for every start."""

    @jax.jit
    def run(kernel, state):
        dense = to_dense(kernel)
        (kernel, _), _ = jax.lax.scan(lambda carry, _: (update(*carry), None), (kernel, state), None, length=STEPS)
        exact = target() + (1 - STEP_SIZE) ** STEPS * (dense - target())
        return jnp.linalg.norm(to_dense(kernel) - exact) / jnp.linalg.norm(exact)

    kernels = [resize(start(smallest), SHAPE) for smallest in SMALLEST]
    return [float(run(kernel, init(kernel))) for kernel in kernels]


def tdlrt_distances(integrator, tolerance=1e-6):
    tx = tdlrt(optax.sgd(STEP_SIZE), tolerance=tolerance, integrator=integrator)
    gradient = value_and_grad(loss)

    def update(kernel, state):
        _, grads = gradient(kernel)
        updates, state = tx.update(grads, state, kernel, value_and_grad_fn=gradient)
        return optax.apply_updates(kernel, updates), state

    return distances_to_dense(update, tx.init)


def test_bug_stays_with_dense_descent_for_any_singular_values(x64):
    assert max(tdlrt_distances("bug")) < 1e-5


def test_parallel_does_not_get_worse_with_small_singular_values(x64):
    distances = tdlrt_distances("parallel")
    assert max(distances) < 2 * distances[0]
    assert distances[0] < 0.05


def test_factor_gradient_descent_fails_the_same_test(x64):
    """Plain gradients of core and factors: the distance grows without the small singular values being trained."""

    def update(kernel, state):
        grads = jax.grad(loss)(kernel)
        return jax.tree.map(lambda p, g: p - STEP_SIZE * g, kernel, grads), state

    distances = distances_to_dense(update, lambda kernel: ())
    assert distances[-1] > 0.1  # bug stays below 1e-5
    assert min(distances) > 0.01


@pytest.mark.parametrize(("integrator", "bound"), [("bug", 1e-3), ("parallel", 0.05)])
def test_robust_in_float32(integrator, bound):
    assert max(tdlrt_distances(integrator, tolerance=1e-5)) < bound
