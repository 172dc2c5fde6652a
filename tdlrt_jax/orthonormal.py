"""Orthonormal bases without Householder reflections, which on a GPU are done one matrix after the other, column by column."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax.ranks import tails
from tdlrt_jax.rotation import ALL_ROUNDS, principal_rotation
from tdlrt_jax.tucker import HIGHEST, magnitude

__all__ = ["cholesky_qr", "orthonormal_rows"]

# In roundings: the largest entry of |Q^T Q - I| of rows that pass for orthonormal.
_EXACT = 100


def cholesky_qr(columns: Array, active: Array) -> Array:
    """Two rounds of Cholesky-QR: ``Q`` of nearly orthonormal columns, orthonormal to rounding.

    Args:
      columns: ``(n, R)``; not finite results where they are nearly dependent.
      active: ``(R,)`` booleans; the others are zero, and stay so.

    Source: Yamamoto, Nakatsukasa, Yanagisawa & Fukaya (2015), CholeskyQR2.
    """

    def orthonormalize(_: int, columns: Array) -> Array:
        gram = jnp.matmul(columns.T, columns, precision=HIGHEST)
        triangular = jnp.linalg.cholesky(gram + jnp.diag(jnp.where(active, 0, 1).astype(gram.dtype)))
        return jax.lax.linalg.triangular_solve(triangular, columns, left_side=False, lower=True, transpose_a=True)

    return jnp.where(active, jax.lax.fori_loop(0, 2, orthonormalize, columns), 0)


def orthonormal_rows(matrix: Array) -> Array:
    """``Q^T``, whose rows are an orthonormal basis of the row space of a matrix, for any conditioning.

    A core that comes from a truncation has nearly orthogonal slices, and then two rounds of Cholesky-QR do, once they have
    norm 1. Where these find that slices depend on one another, the principal directions take their place. What is within 50
    roundings of the matrix, all of it together, is left out: it says nothing of the core that its rounding errors do not.

    Args:
      matrix: ``(R, k)``.

    Returns:
      ``(R, k)``, with zero rows for what does not exist. ``matrix = S Q^T`` for ``S = matrix Q``, to rounding.
    """
    matrix = matrix / magnitude(matrix)
    norm = jnp.linalg.norm(matrix)
    matrix = matrix / jnp.where(norm > 0, norm, 1)
    floor = 50 * jnp.finfo(matrix.dtype).eps

    def quickly() -> Array:
        norms = jnp.linalg.norm(matrix, axis=1)
        active = ~(norms <= floor / matrix.shape[0] ** 0.5)  # so that a matrix that is not finite stays visible
        rows = jnp.where(active[:, None], matrix / jnp.where(norms > 0, norms, 1)[:, None], 0)
        return cholesky_qr(rows.T, active).T

    def failed(carry: tuple[Array, Array]) -> Array:
        done, rows = carry
        gram = jnp.matmul(rows, rows.T, precision=HIGHEST)
        deviation = jnp.max(jnp.abs(gram - jnp.diag(jnp.any(rows != 0, axis=1).astype(gram.dtype))))
        return ~done & ~(deviation <= _EXACT * jnp.finfo(gram.dtype).eps)

    def surely(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        del carry
        _, rows, energies = principal_rotation(matrix, jnp.any(matrix != 0, axis=1), ALL_ROUNDS)
        kept = ~(tails(energies) <= floor**2)
        rows = jnp.where(kept[:, None], rows / jnp.sqrt(jnp.where(energies > 0, energies, 1))[:, None], 0)
        return jnp.ones((), bool), cholesky_qr(rows.T, kept).T

    # A loop and no conditional: of a batch, a conditional would always do both.
    return jax.lax.while_loop(failed, surely, (jnp.zeros((), bool), quickly()))[1]
