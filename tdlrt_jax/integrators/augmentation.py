"""Basis augmentation: new directions for every mode, and tangent vectors as cores in the augmented bases (lines 5-8).

The augmented basis is ``[U | Ũ]`` with ``U`` kept as it is, so ``[U | Ũ]^T U = [I; 0]``: the augmented core is ``C`` padded with
zeros and the network does not change. ``Ũ`` is built from the step ``K_new - K`` itself, never from ``K_new``, in which it
cancels. A mode has no more than ``n_i`` directions in all: where the columns of ``U`` and ``Ũ`` are more, the new directions take
the place of columns of ``U`` that are not in use. Where kernels of other sizes share a batch they always do: then the place of a
direction does not depend on the capacities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax import batching
from tdlrt_jax.batching import map_batched
from tdlrt_jax.frame import Frame
from tdlrt_jax.orthonormal import cholesky_qr
from tdlrt_jax.ranks import tails
from tdlrt_jax.rotation import ALL_ROUNDS, principal_rotation
from tdlrt_jax.tucker import HIGHEST, ModeArray, TuckerTensor, active_columns, magnitude, mode_product

__all__ = ["Augmented", "augment", "augment_all", "augmented_width", "embed", "new_directions", "unchanged"]


class Augmented(NamedTuple):
    """Augmented bases at a kernel, ``[U_i | Ũ_i]``; zero columns where a direction does not exist."""

    frame: Frame  # the point: C, K_i, U_i, Q_i
    new: tuple[ModeArray, ...]  # Ũ_i, (n_i, A_i), orthonormal and orthogonal to U_i; None for a whole mode

    @property
    def capacity(self) -> tuple[int, ...]:
        """``M_i = min(R_i + A_i, n_i)``, and the size of a whole mode."""
        sizes = zip(self.frame.core.shape, self.frame.U, self.new)
        return tuple(r if u is None or t is None else min(r + t.shape[1], u.shape[0]) for r, u, t in sizes)

    @property
    def bases(self) -> tuple[ModeArray, ...]:
        """``[U_i | Ũ_i]``, ``(n_i, M_i)``."""
        pairs = zip(self.frame.U, self.new)
        return tuple(None if u is None else self.join(i, u, t, axis=1) for i, (u, t) in enumerate(pairs))

    @property
    def core(self) -> Array:
        """``C̃ = C ×_i [U_i | Ũ_i]^T U_i``: the core padded with zeros (line 8)."""
        return _padded(self.frame.core, self.capacity)

    def place(self, mode: int, new: Array, axis: int = 0) -> Array:
        """What belongs to the columns of ``Ũ_i``, ``A_i`` along an axis, as ``M_i`` along it, zero where ``U_i`` is.

        ``new`` is zero where a column of ``Ũ_i`` is: the columns that exist fit in beside those of ``U_i``; zeros that do not
        are cut.
        """
        u = self.frame.U[mode]
        assert u is not None
        total, rank = self.capacity[mode], u.shape[1]
        free = total - new.shape[axis]
        widths = [(0, 0)] * new.ndim
        if rank <= free and not batching.few_and_large():
            widths[axis] = (rank, free - rank)
            return jnp.pad(new, widths)
        # A window of an array with room on both sides. (jnp.roll searches the whole trace where its shift is traced, for a
        # message that nobody sees; a large network's step then takes seconds longer to trace.)
        widths[axis] = (rank, free)
        return jax.lax.dynamic_slice_in_dim(jnp.pad(new, widths), rank - jnp.sum(active_columns(u)), total, axis)

    def join(self, mode: int, old: Array, new: Array, axis: int = 0) -> Array:
        """The same with what belongs to the columns of ``U_i``, ``R_i`` along the axis, which is zero where they are."""
        widths = [(0, 0)] * old.ndim
        widths[axis] = (0, self.capacity[mode] - old.shape[axis])
        return jnp.pad(old, widths) + self.place(mode, new, axis)

    def old_rows(self, mode: int, matrix: Array) -> Array:
        """Of ``(M_i, ...)``, the rows that belong to ``U_i``: ``(R_i, ...)``, zero for columns that are."""
        u = self.frame.U[mode]
        assert u is not None
        return jnp.where(active_columns(u)[:, None], matrix[: u.shape[1]], 0)


def augmented_width(size: int, capacity: int) -> int:
    """Columns that ``Ũ`` may need: no more than the step has, nor than the complement of the least rank that has as many."""
    return min(capacity, size // 2)


def _project_out(directions: Array, basis: Array) -> Array:
    return directions - jnp.matmul(basis, jnp.matmul(basis.T, directions, precision=HIGHEST), precision=HIGHEST)


def new_directions(step: Array, basis: Array, width: int) -> Array:
    """An orthonormal basis ``Ũ`` of the range of ``(I - U U^T) step``, robust to any conditioning.

    The principal directions of what lies outside of ``U`` are separated by size, a few orders of magnitude a round; a tail of
    them within 50 roundings of the step is dropped, the rest normalized, and what then lies in the range of ``U`` or of larger
    ones, rounding errors that passed for directions, is dropped as well; a Cholesky-QR makes the result orthonormal to
    rounding. The order matters: columns that are normalized before they are separated can be parallel to rounding, and then the
    Cholesky factorization breaks down. (A QR of ``[U | K]`` with small diagonal entries dropped loses a third of the
    step and more.)

    Args:
      step: ``K_new - K``, ``(n, R)``; zero in inactive columns.
      basis: ``U``, ``(n, R)``, orthonormal up to its zero columns.
      width: static number of columns to return.

    Returns:
      ``(n, width)``, zero in the columns that are not needed; not finite where the step is not.
    """
    if width == 0:
        return step[:, :0]
    floor = 50 * jnp.finfo(step.dtype).eps
    columns = step / magnitude(step)
    norm = jnp.linalg.norm(columns)
    columns = columns / jnp.where(norm > 0, norm, 1)
    columns = _project_out(_project_out(columns, basis), basis)

    _, rows, energies = principal_rotation(columns.T, active_columns(step), ALL_ROUNDS)
    kept = ~(tails(energies) <= floor**2)  # so that a step that is not finite stays visible
    rows = jnp.where(kept[:, None], rows / jnp.sqrt(jnp.where(energies > 0, energies, 1))[:, None], 0)
    columns = _project_out(rows[:width].T, basis)
    gram = jnp.matmul(columns.T, columns, precision=HIGHEST)
    seen = jnp.diag(gram) - jnp.sum(
        jnp.tril(gram, -1) ** 2, axis=1
    )  # squared norm outside of all that is larger, nearly 1
    columns = jnp.where(seen < 0.5, 0, columns)
    return cholesky_qr(columns, active_columns(columns))


def unchanged(frame: Frame) -> Augmented:
    """The bases as they are, with no new directions."""
    return Augmented(frame, tuple(None if u is None else u[:, :0] for u in frame.U))


def augment(frame: Frame, step: TuckerTensor) -> Augmented:
    """The augmented bases for a step ``(step_C, step_K_i)`` in the coordinates of the frame (lines 5-7).

    Args:
      frame: the point.
      step: increments of ``C`` and of every ``K_i``, with the shapes of the frame's; only those of the ``K_i`` are read.
    """
    return augment_all([frame], [step])[0]


def augment_all(frames: Sequence[Frame], steps: Sequence[TuckerTensor]) -> list[Augmented]:
    """:func:`augment` for all kernels of a network; modes of equal sizes are one batch, whichever kernels they belong to."""
    modes = [(i, mode) for i, frame in enumerate(frames) for mode, u in enumerate(frame.U) if u is not None]
    found = map_batched(
        lambda dk, u: new_directions(dk, u, augmented_width(*u.shape)),
        [steps[i].factors[mode] for i, mode in modes],
        [frames[i].U[mode] for i, mode in modes],
        apart=[None] * len(modes),
    )
    new: list[list[ModeArray]] = [[None] * len(frame.U) for frame in frames]
    for (i, mode), directions in zip(modes, found):
        new[i][mode] = directions
    return [Augmented(frame, tuple(directions)) for frame, directions in zip(frames, new)]


def embed(tangent: TuckerTensor, augmented: Augmented) -> Array:
    """A tangent vector in the frame's coordinates as a core in the augmented bases.

    ``V = V_C ×_j U_j + sum_i Ten_i(Q_i^T) ×_{j != i} U_j ×_i (I - U_i U_i^T) V_{K_i}`` has ``V_C`` in the old block,
    ``Ũ_i^T V_{K_i} Q_i^T`` in the block in which only mode ``i`` is new, and zeros in the mixed blocks. What lies outside of the
    augmented bases is not seen.

    Args:
      tangent: ``TuckerTensor(V_C, (V_K1, ...))`` with the shapes of the frame's core and factors.
      augmented: the bases.

    Returns:
      ``(M_1, ..., M_d)``.
    """
    core = _padded(tangent.core, augmented.capacity)
    for mode, (t, v, q) in enumerate(zip(augmented.new, tangent.factors, augmented.frame.Q)):
        if t is None:
            continue
        block = mode_product(q, jnp.matmul(t.T, v, precision=HIGHEST), mode)
        core = core + _padded(augmented.place(mode, block, axis=mode), augmented.capacity)
    return core


def _padded(array: Array, shape: tuple[int, ...]) -> Array:
    return jnp.pad(array, [(0, after - before) for before, after in zip(array.shape, shape)])
