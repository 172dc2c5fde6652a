"""Tucker kernels for plain gradients of all parts, whose factors need not be orthonormal."""

from __future__ import annotations

import jax.numpy as jnp

from tdlrt_jax.tucker import ModeArray, TuckerTensor, check_kernel

__all__ = ["balance"]


def balance(kernel: TuckerTensor) -> TuckerTensor:
    """The same kernel with its singular values shared evenly by the core and the factors, as ``U Σ^(1/2)``, ``Σ^(1/2) V^T`` does.

    ``U_i <- U_i D_i`` and ``C <- C ×_i D_i^-1`` with ``D_i = diag(s_i)^(1 / (m + 1))`` for the norms ``s_i`` of the core's slices
    along mode ``i`` and ``m`` factors: of a superdiagonal core, every part gets the same power of a singular value. Plain
    gradients are not the same in the new coordinates: those of parts that multiply a small singular value become small.

    Args:
      kernel: a Tucker kernel; for the norms to be singular values, its core's slices are orthogonal along every mode, as after
        :func:`tdlrt_jax.hosvd`.

    Returns:
      A :class:`~tdlrt_jax.tucker.TuckerTensor` of the same ranks, whose factors are not orthonormal. Algorithm 1 is not for it.

    Example:
      >>> import tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jnp.diag(jnp.array([8.0, 1.0])))
      >>> [round(float(size), 3) for size in jnp.linalg.norm(balance(kernel).factors[0], axis=0)]
      [2.0, 1.0]

    Source: spectral initialization (Khodak et al., 2021; section 4.3 of the paper), carried over to a core and its factors.
    """
    check_kernel(kernel)
    factored = [mode for mode, factor in enumerate(kernel.factors) if factor is not None]
    core = kernel.core
    factors: list[ModeArray] = list(kernel.factors)
    for mode in factored:
        others = tuple(axis for axis in range(core.ndim) if axis != mode)
        largest = jnp.max(jnp.abs(kernel.core), axis=others, keepdims=True)  # squares of small values would vanish
        largest = jnp.where(largest > 0, largest, 1)
        norms = largest * jnp.sqrt(jnp.sum((kernel.core / largest) ** 2, axis=others, keepdims=True))
        shares = jnp.where(norms > 0, norms, 1) ** (1 / (len(factored) + 1))
        core = core / shares
        factors[mode] = factors[mode] * shares.reshape(-1)
    return TuckerTensor(core, tuple(factors))
