"""Orthonormal bases without Householder reflections, which on a GPU are done one matrix after the other, column by column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax import batching
from tdlrt_jax.batching import Batches
from tdlrt_jax.ranks import tails
from tdlrt_jax.rotation import ALL_ROUNDS, principal_rotation
from tdlrt_jax.tucker import HIGHEST, magnitude

__all__ = ["cholesky_qr", "orthonormal_rows"]

# In roundings: the largest entry of |Q^T Q - I| of rows that pass for orthonormal.
_EXACT = 100
# So many columns, those of the spatial modes of a 3x3 kernel, are kept out of the libraries' calls on a GPU.
_SMALL = 4


def cholesky_qr(columns: Array, active: Array) -> Array:
    """Two rounds of Cholesky-QR: ``Q`` of nearly orthonormal columns, orthonormal to rounding.

    Args:
      columns: ``(n, R)``; not finite results where they are nearly dependent.
      active: ``(R,)`` booleans; the others are zero, and stay so.

    Source: Yamamoto, Nakatsukasa, Yanagisawa & Fukaya (2015), CholeskyQR2.
    """

    size = columns.shape[1]

    def orthonormalize(_: int, columns: Array) -> Array:
        gram = jnp.matmul(columns.T, columns, precision=HIGHEST)
        gram = gram + jnp.diag(jnp.where(active, 0, 1).astype(gram.dtype))
        if batching.few_and_large() and size <= _SMALL:
            return jnp.matmul(columns, _inverse_factor(gram).T, precision=HIGHEST)
        triangular = jnp.linalg.cholesky(gram)
        return jax.lax.linalg.triangular_solve(triangular, columns, left_side=False, lower=True, transpose_a=True)

    # A loop is compiled once; on a GPU it would keep what is before and after it from being launched together.
    return jnp.where(
        active, jax.lax.fori_loop(0, 2, orthonormalize, columns, unroll=2 if batching.few_and_large() else 1), 0
    )


def _inverse_factor(gram: Array) -> Array:
    """``L^-1`` of ``gram = L L^T``, entry by entry: for a few rows one kernel, where a GPU's library needs several calls.

    As a factorization by the library it is not finite where the matrix is not positive definite.
    """
    size = gram.shape[0]
    factor: dict[tuple[int, int], Array] = {}
    inverse: dict[tuple[int, int], Array] = {}
    for i in range(size):
        for j in range(i):
            factor[i, j] = (gram[i, j] - sum(factor[i, k] * factor[j, k] for k in range(j))) * inverse[j, j]
        inverse[i, i] = jax.lax.rsqrt(gram[i, i] - sum(factor[i, k] ** 2 for k in range(i)))
        for j in range(i):
            inverse[i, j] = -inverse[i, i] * sum(factor[i, k] * inverse[k, j] for k in range(j, i))
    zero = jnp.zeros((), gram.dtype)
    return jnp.stack([jnp.stack([inverse.get((i, j), zero) for j in range(size)]) for i in range(size)])


def orthonormal_rows(
    matrices: Sequence[Array], then: Callable[..., Any] = lambda rows: rows, *columns: Sequence[Any]
) -> list[Any]:
    """``Q^T`` of each matrix, whose rows are an orthonormal basis of its row space, for any conditioning.

    A core that comes from a truncation has nearly orthogonal slices, and then two rounds of Cholesky-QR do, once they have
    norm 1. Where these find that slices depend on one another, the principal directions take their place: whether they do
    anywhere is looked at once for all matrices, since a GPU waits for its host each time. What is within 50 roundings of the
    matrix, all of it together, is left out: it says nothing of the core that its rounding errors do not.

    Args:
      matrices: ``(R, k)`` each.
      then: ``then(Q^T, *row)`` with the row of the ``columns``, what is wanted of them; default: they themselves.
      columns: as many entries as there are matrices.

    Returns:
      ``Q^T`` ``(R, k)`` each, with zero rows for what does not exist, and ``matrix = S Q^T`` for ``S = matrix Q``, to rounding;
      or what ``then`` made of it.
    """
    batches = Batches([matrices, *columns], apart=[None] * len(matrices))

    def quickly(matrix: Array, *row: Any) -> tuple[Any, Array]:
        rows, failed = _quickly(matrix)
        return then(rows, *row), failed

    def surely(matrix: Array, *rest: Any) -> tuple[Any, Array]:
        *row, (found, failed) = rest
        again = then(_surely(matrix), *row)
        return jax.tree.map(partial(jnp.where, failed), again, found), jnp.zeros((), bool)

    # A loop and no conditional: under vmap, a conditional would always do both.
    found = jax.lax.while_loop(
        lambda found: jnp.any(jnp.stack([jnp.zeros((), bool), *(jnp.any(failed) for _, failed in found)])),
        lambda found: batches.run(surely, found),
        batches.run(quickly),
    )
    # Whatever is not used of it: else loops over the same matrices differ, and XLA keeps both.
    found = jax.lax.optimization_barrier(found)
    return batches.split(lambda *row: then(*row), [result for result, _ in found])


def _quickly(matrix: Array) -> tuple[Array, Array]:
    """Rows by Cholesky-QR, and whether they are not orthonormal."""
    matrix, floor = _scaled(matrix)
    norms = jnp.linalg.norm(matrix, axis=1)
    active = ~(norms <= floor / matrix.shape[0] ** 0.5)  # so that a matrix that is not finite stays visible
    rows = jnp.where(active[:, None], matrix / jnp.where(norms > 0, norms, 1)[:, None], 0)
    rows = cholesky_qr(rows.T, active).T
    gram = jnp.matmul(rows, rows.T, precision=HIGHEST)
    deviation = jnp.max(jnp.abs(gram - jnp.diag(jnp.any(rows != 0, axis=1).astype(gram.dtype))))
    return rows, ~(deviation <= _EXACT * jnp.finfo(gram.dtype).eps)


def _surely(matrix: Array) -> Array:
    """Rows by principal directions."""
    matrix, floor = _scaled(matrix)
    _, rows, energies = principal_rotation(matrix, jnp.any(matrix != 0, axis=1), ALL_ROUNDS)
    kept = ~(tails(energies) <= floor**2)
    rows = jnp.where(kept[:, None], rows / jnp.sqrt(jnp.where(energies > 0, energies, 1))[:, None], 0)
    return cholesky_qr(rows.T, kept).T


def _scaled(matrix: Array) -> tuple[Array, float]:
    """A matrix at norm 1, and what of it counts as rounding."""
    matrix = matrix / magnitude(matrix)
    norm = jnp.linalg.norm(matrix)
    return matrix / jnp.where(norm > 0, norm, 1), 50 * float(jnp.finfo(matrix.dtype).eps)
