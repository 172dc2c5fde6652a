"""Principal directions of an unfolding, by descending energy: all of them, or the leading ones out of a random sketch.

A truncation needs rotations whose rows are sorted by the energy actually stored in them. The Gram matrix gives all of them for
the price of a small symmetric eigenproblem; a sketch gives the leading ones of a matrix with many more rows than are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax.tucker import HIGHEST, magnitude

__all__ = ["ALL_ROUNDS", "khatri_rao", "principal_rotation", "randomized_rotation", "sketch_size"]

ALL_ROUNDS = 4  # of principal_rotation, after which all directions are separated to rounding

# Of a sketch: directions beyond the capacity; the part of the dropped energy that it may lose before there is a power iteration;
# and how many of these at most. Without one the error is well above the least at the same ranks where the capacity holds them
# down (tests/test_randomized.py bounds it with one); a second costs as much again.
OVERSAMPLING = 8
SKETCH_LOSS = 0.01
POWER_ITERATIONS = 1


def principal_rotation(
    matrix: Array, valid: Array, rounds: Array | int, vectors: Array | None = None
) -> tuple[Array, Array, Array]:
    """All left principal directions of a matrix, by descending energy.

    The Gram matrix is only good to ``eps`` of its norm, so a direction of relative size ``s`` leaks ``eps / s`` into the smaller
    ones. In every further round the rows under a tenth of the largest so far are rotated again by the eigenvectors of their own
    Gram matrix; after :data:`ALL_ROUNDS` all directions are separated to rounding.

    Args:
      matrix: ``(m, k)``, of norm 1 at most; zero in rows that are not valid.
      valid: ``(m,)`` booleans, the directions that exist.
      rounds: how many to do, at least one, possibly traced; fewer are done where nothing small is left.
      vectors: ``(n, m)``, what ``V`` is multiplied to from the right; default: the identity.

    Returns:
      ``V`` ``(m, m)``, with orthonormal columns for the valid directions, then zero ones, times ``vectors``; ``V^T matrix``; and
      the energies of its rows, ``(m,)``.
    """
    size = matrix.shape[0]
    index, exist = jnp.arange(size, dtype=jnp.int32), jnp.sum(valid, dtype=jnp.int32)

    def rotate(carry: _Rotation) -> _Rotation:
        # Rows from ``first`` on are rotated, those before it keep their place; in the first round valid ones lie anywhere.
        _, first, valid, vectors, rows, _ = carry
        chosen = valid & (index >= first)
        small = jnp.where(chosen[:, None], rows, 0)
        small = small / magnitude(small)
        norm = jnp.linalg.norm(small)
        small = small / jnp.where(norm > 0, norm, 1)
        # In descending order: rows that keep their place, the chosen ones by energy, those that do not exist. Energies are 1 at
        # most, and the places not much more: eigenvectors are exact beside the largest eigenvalue only.
        place = jnp.where(chosen, 0.0, jnp.where(valid, 2.0, -1.0)).astype(rows.dtype)
        gram = jnp.matmul(small, small.T, precision=HIGHEST) + jnp.diag(place)
        turn, _ = jax.lax.linalg.eigh(gram, symmetrize_input=False)
        sorted_ = index < exist
        columns = sorted_ & (index >= first)
        turn = jnp.where(chosen[:, None] & columns, turn[:, ::-1], 0)
        turn = turn + jnp.diag((valid & (index < first)).astype(rows.dtype))
        rows = jnp.matmul(turn.T, rows, precision=HIGHEST)
        energies = jnp.sum(rows**2, axis=1)
        leading = jax.lax.dynamic_index_in_dim(energies, first, keepdims=False)
        # The energies descend to rounding: the next round begins where they fall under a hundredth.
        first = jnp.min(jnp.where(columns & (energies < 1e-2 * leading), index, size))
        return _Rotation(carry.round + 1, first, sorted_, jnp.matmul(vectors, turn, precision=HIGHEST), rows, energies)

    def unfinished(carry: _Rotation) -> Array:
        return (carry.round < rounds) & (carry.first < exist)

    vectors = jnp.eye(size, dtype=matrix.dtype) if vectors is None else vectors
    zero = jnp.zeros((), jnp.int32)
    start = _Rotation(zero, zero, valid, vectors, matrix, jnp.zeros(size, matrix.dtype))
    end = jax.lax.while_loop(unfinished, rotate, start)
    return end.vectors, end.rows, end.energies


class _Rotation(NamedTuple):
    """Between two rounds of :func:`principal_rotation`."""

    round: Array  # int32
    first: Array  # int32, the first row that the next round rotates
    valid: Array  # bool (m,), the rows that exist
    vectors: Array  # (n, m)
    rows: Array  # (m, k)
    energies: Array  # (m,)


def sketch_size(rows: int, columns: int, capacity: int) -> int | None:
    """How many directions of a ``(rows, columns)`` unfolding to sketch, or ``None`` where a rotation of all is not dearer.

    In multiplications and additions of large matrix products; eigenvectors, QR, narrow products and the fixed cost of a sketch
    as measured on a CPU in float32. At ``rows = 2 capacity``, an augmented core's, a sketch is cheaper only from about 200 rows
    on, and only if there are hardly more columns than rows (a matrix, a convolution of size 1).
    """
    size = capacity + OVERSAMPLING
    rotation = 4 * rows**2 * columns + 14 * rows**3
    sketch = 10 * rows * columns * size + 7 * size**2 * columns + 24 * size**3 + 15 * rows * size**2 + 3_000_000
    return size if sketch < rotation else None


def khatri_rao(key: Array, size: int, modes: Sequence[int], dtype: jnp.dtype) -> Array:
    """A random test matrix, ``(size, prod_j n_j)``: rows are Kronecker products of one Gaussian vector a mode.

    It takes ``size sum_j n_j`` random numbers, which on the CPU cost more than the products with them. A Kronecker product of
    matrices would also be cheaper to apply, but finds next to nothing where the columns of the unfolding differ in one mode only.
    """
    vectors = jax.random.normal(key, (size, sum(modes)), dtype)
    vectors = jax.lax.optimization_barrier(vectors)  # or else each is drawn anew for every entry that it is in
    rows, start = jnp.ones((size, 1), dtype), 0
    for n in modes:
        rows = (rows[:, :, None] * vectors[:, None, start : start + n]).reshape(size, -1)
        start += n
    return rows


def randomized_rotation(
    matrix: Array, valid: Array, rounds: Array | int, test: Array, limit: Array, highest: Array
) -> tuple[Array, Array, Array, Array]:
    """The leading left principal directions of a matrix, of a random sketch of its range.

    ``Q R = X Omega``, ``V`` the principal directions of ``Q^T X``. What the sketch loses is the residual's norm: a difference of
    norms would be rounding from ``sqrt(eps)`` on. If it matters beside what the cut may drop or has to, the rows of ``V^T Q^T X``
    are the next test matrix (a power iteration); normalized, so that small directions are not lost in the rounding of large ones.
    One costs as much as the sketch, and where ranks are below the capacity none is needed.

    Args:
      matrix: ``X``, ``(m, k)``, of norm 1 at most; zero in rows that are not valid.
      valid: ``(m,)`` booleans, the directions that exist.
      rounds: of :func:`principal_rotation`.
      test: ``Omega^T``, ``(s, k)``.
      limit: the energy that the cut may drop.
      highest: the highest rank that it may keep.

    Returns:
      ``Q V`` ``(m, s)``, with orthonormal columns for as many directions as exist, then zero ones; ``V^T Q^T X``; the energies of
      its rows, ``(s,)``; and ``||X - Q Q^T X||^2``.

    Source: Halko, Martinsson & Tropp (2011), algorithms 4.1 and 4.4; Minster, Saibaba & Kilmer (2020), algorithm 3.2.
    """
    size, index = test.shape[0], jnp.arange(test.shape[0])
    order = jnp.argsort(~valid, stable=True)
    exist = index < jnp.sum(valid)
    rounding = (10 * jnp.finfo(matrix.dtype).eps) ** 2

    def project(carry: tuple) -> tuple:
        count, _, rows, energies, _ = carry
        test = rows / jnp.sqrt(jnp.where(energies > 0, energies, 1))[:, None]
        # Householder's Q is orthonormal for any conditioning, and with the valid rows first it stays within them: its leading
        # columns do, as many as exist. Columns of a range that is smaller are arbitrary, and none may be left out by size.
        sketch = jnp.matmul(matrix, test.T, precision=HIGHEST)[order]
        basis = jnp.zeros_like(sketch).at[order].set(jnp.where(exist, jnp.linalg.qr(sketch)[0], 0))
        inside = jnp.matmul(basis.T, matrix, precision=HIGHEST)
        lost = jnp.sum((matrix - jnp.matmul(basis, inside, precision=HIGHEST)) ** 2)
        return count + 1, *principal_rotation(inside, exist, rounds, basis), lost

    def unfinished(carry: tuple) -> Array:
        count, _, _, energies, lost = carry
        dropped = jnp.maximum(limit, jnp.sum(jnp.where(index < highest, 0, energies)))
        return (count == 0) | ((count <= POWER_ITERATIONS) & (lost > jnp.maximum(SKETCH_LOSS * dropped, rounding)))

    ones = jnp.ones(size, matrix.dtype)
    start = (jnp.zeros((), jnp.int32), jnp.zeros((matrix.shape[0], size), matrix.dtype), test, ones, ones[0])
    _, vectors, rows, energies, lost = jax.lax.while_loop(unfinished, project, start)
    return vectors, rows, energies, lost
