"""Random kernels, a small problem to train on, and how to measure what comes out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tdlrt_jax import TuckerTensor, resize, to_dense, value_and_grad
from tdlrt_jax.step import find_states
from tdlrt_jax.tucker import multi_mode_product


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


def random_kernel(rng, shape, rank, capacity=None, dtype=None):
    """A kernel with orthonormal factors; ``None`` in ``rank`` leaves a mode whole; padded to ``capacity``."""
    sizes = [n if r is None else r for n, r in zip(shape, rank)]
    core = jnp.asarray(rng.normal(size=sizes), dtype)
    factors = tuple(None if r is None else jnp.asarray(orthonormal(rng, n, r), dtype) for n, r in zip(shape, rank))
    kernel = TuckerTensor(core, factors)
    return kernel if capacity is None else resize(kernel, capacity)


def dense64(kernel):
    """The full tensor in NumPy float64, for measuring errors of float32 kernels."""
    dense = np.asarray(kernel.core, np.float64)
    for mode, factor in enumerate(kernel.factors):
        if factor is not None:
            dense = np.moveaxis(np.tensordot(np.asarray(factor, np.float64), dense, (1, mode)), 0, mode)
    return dense


def orthonormality(kernel):
    """The largest deviation of any ``U_i^T U_i`` from the identity on active columns, in float64."""
    worst = 0.0
    for factor in kernel.factors:
        if factor is not None:
            u = np.asarray(factor, np.float64)
            worst = max(worst, np.abs(u.T @ u - np.diag(np.any(u != 0, axis=0))).max())
    return worst


def tangent_to_dense(tangent, frame):
    """``V = V_C ×_j U_j + sum_i Ten_i(Q_i^T) ×_{j != i} U_j ×_i (I - U_i U_i^T) V_{K_i}``, a tangent vector in full."""
    dense = multi_mode_product(tangent.core, frame.U)
    for mode, (u, k, q) in enumerate(zip(frame.U, tangent.factors, frame.Q)):
        if u is not None:
            outside = k - u @ (u.T @ k)
            dense += multi_mode_product(q, [outside if j == mode else v for j, v in enumerate(frame.U)])
    return dense


def regression(dtype=None, rank=(2, None, 3), capacity=(4, 3, 6), outputs=5, seed=0):
    """Two kernels and a bias fitted to what such a network could give: parameters and loss."""
    rng = np.random.default_rng(seed)
    params = {
        "first": {"kernel": random_kernel(rng, (4, 3, 6), rank, capacity, dtype), "bias": jnp.zeros(6, dtype)},
        "second": {"kernel": random_kernel(rng, (6, outputs), (2, 2), outputs, dtype)},
    }
    x = jnp.asarray(rng.normal(size=(32, 4, 3)), dtype)
    teacher = [rng.normal(size=shape) for shape in ((4, 3, 6), (6, outputs))]
    y = jnp.asarray(np.tanh(np.einsum("nab,abc->nc", x, teacher[0])) @ teacher[1], dtype)

    def loss(params, x=x, y=y):
        first = params["first"]
        hidden = jnp.tanh(jnp.einsum("nab,abc->nc", x, to_dense(first["kernel"])) + first["bias"])
        return jnp.mean((hidden @ to_dense(params["second"]["kernel"]) - y) ** 2)

    return params, loss


def kernels_of(params):
    """The two kernels of the parameters that `regression` gives."""
    return [params["first"]["kernel"], params["second"]["kernel"]]


def train(params, loss, tx, steps, state=None):
    """Steps of the optax face under lax.scan: parameters and state after them, and the loss and status of each."""
    (params, state), (losses, status) = scanned(loss, tx, steps)(params, tx.init(params) if state is None else state)
    return params, state, losses, status


@functools.lru_cache(maxsize=2)
def scanned(loss, tx, steps):
    """Compiled once for a test that goes on where it was."""
    gradient = value_and_grad(loss)

    @jax.jit
    def run(params, state):
        def body(carry, _):
            params, state = carry
            value, grads = gradient(params)
            extra = {"value": value, "value_and_grad_fn": gradient}
            updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state), (value, find_states(state)[0].status)

        return jax.lax.scan(body, (params, state), None, length=steps)

    return run
