"""Random kernels for the tests."""

import jax.numpy as jnp
import numpy as np

from tdlrt_jax import TuckerTensor, resize


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
