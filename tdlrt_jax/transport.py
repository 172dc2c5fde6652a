"""Carries a kernel's optimizer state through a change of basis.

The moments of a kernel, ``(m_C, m_{K_i})``, are the coordinates of one tangent vector
``V = m_C ×_j U_j + sum_i Ten_i(Q_i^T) ×_{j != i} U_j ×_i (I - U_i U_i^T) m_{K_i}``. When the bases move, the new moments are the
coordinates of the orthogonal projection of ``V`` onto the new tangent space. Second moments are not vectors: they are carried by
the same maps with every matrix squared entrywise, which keeps them nonnegative and bounded, and then every entry is at least the
average of the core's. Entries of which nothing is remembered, or that averages over other bases left small, would otherwise take
steps of several learning rates however small their gradients: Adam then stays away from an optimum, or leaves it. Repeated, this
makes the entries of a kernel nearly equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax.frame import Frame, active_entries
from tdlrt_jax.integrators import Augmented, TurnedTangent, embed, overlaps
from tdlrt_jax.tucker import (
    HIGHEST,
    ModeArray,
    TuckerTensor,
    active_columns,
    multi_mode_product,
    unfold,
)

__all__ = [
    "Kind",
    "core_moment",
    "embed_moment",
    "transport",
    "transport_moment",
    "transport_squares",
    "transport_turned",
    "turn_moment",
]

Kind = Literal["linear", "squared", "scalar"]  # an average of gradients, of their squares, or one number a kernel


def embed_moment(moment: TuckerTensor, augmented: Augmented, kind: Kind) -> Array:
    """A moment as a core in the augmented bases, ``(M_1, ...)``, see :func:`tdlrt_jax.integrators.embed`.

    A second moment is at least the average of the old core's, so in the mixed blocks, of which nothing is remembered.
    """
    if kind != "squared":
        return embed(moment, augmented)
    average = _average(moment.core, active_entries(moment.core.shape, augmented.frame.U))
    core = embed(moment, _squared_bases(augmented))
    return _at_least(core, average, active_entries(core.shape, augmented.bases))


def turn_moment(moment: TuckerTensor, augmented: Augmented, turns: tuple[ModeArray, ...] | None, kind: Kind) -> Array:
    """The moment of the core in the bases of the Galerkin step, where line 9 takes it up.

    Args:
      moment: in the coordinates of the frame, before the step.
      augmented: the augmented bases.
      turns: ``(M_i, R_i)``, from the augmented bases to those of the Galerkin step; None where they agree.
      kind: how the moment transforms.

    Returns:
      A core in those bases.
    """
    core = embed_moment(moment, augmented, kind)
    if turns is None:
        return core
    return multi_mode_product(core, _squares(turns) if kind == "squared" else turns, transpose=True)


def core_moment(moment: TuckerTensor, kernel: TuckerTensor, kind: Kind) -> TuckerTensor:
    """A moment before a step of the core alone, which takes up nothing of the ``K_i``: what it has of them is let go.

    To keep it would take two lifts, to carry it along with the core, which are most of what such a step spares. A second moment
    keeps its ``K_i``, at least at the average of the core's, so that the next step of the bases is not of several learning rates.
    """
    if kind != "squared":
        return moment._replace(factors=jax.tree.map(jnp.zeros_like, moment.factors))
    average = _average(moment.core, active_entries(moment.core.shape, kernel.factors))
    columns = [None if u is None else active_columns(u) for u in kernel.factors]
    return moment._replace(
        factors=tuple(
            None if k is None or c is None else _at_least(k, average, c) for k, c in zip(moment.factors, columns)
        )
    )


def transport_moment(
    core: Array,
    K: Sequence[ModeArray],
    augmented: Augmented,
    rotations: Sequence[ModeArray],
    frame: Frame,
    kind: Kind,
) -> TuckerTensor:
    """:func:`transport` or :func:`transport_squares`, by the kind of the moment."""
    move = transport_squares if kind == "squared" else transport
    return move(core, K, augmented, rotations, frame)


def transport(
    core: Array,
    K: Sequence[ModeArray],
    augmented: Augmented,
    rotations: Sequence[ModeArray],
    frame: Frame,
) -> TuckerTensor:
    """Projects a tangent vector onto the tangent space at the next kernel.

    Args:
      core: the vector's part within the augmented bases, ``(M_1, ..., M_d)``.
      K: ``m_{K_i}`` in the old frame; only what lies outside of the augmented bases is read.
      augmented: old frame and augmented bases.
      rotations: ``P_i``, from the augmented bases to the new ones.
      frame: at the next kernel.

    Returns:
      ``TuckerTensor(m_C, m_{K_i})`` in the coordinates of ``frame``.
    """
    moments: list[ModeArray] = []
    overlaps = [None if p is None else augmented.old_rows(i, p) for i, p in enumerate(rotations)]
    for mode, (basis, k, p, q_old, q_new) in enumerate(zip(augmented.bases, K, rotations, augmented.frame.Q, frame.Q)):
        if basis is None:
            moments.append(None)
            continue
        columns = unfold(q_new, mode).T
        within = _dot(unfold(multi_mode_product(core, rotations, transpose=True, skip=mode), mode), columns)
        within = within - _dot(p, _dot(p.T, within))
        outside = k - _dot(basis, _dot(basis.T, k))
        change = _dot(unfold(multi_mode_product(q_old, overlaps, transpose=True, skip=mode), mode), columns)
        moments.append(_dot(basis, within) + _dot(outside, change))
    return TuckerTensor(multi_mode_product(core, rotations, transpose=True), tuple(moments))


def transport_squares(
    core: Array,
    K: Sequence[ModeArray],
    augmented: Augmented,
    rotations: Sequence[ModeArray],
    frame: Frame,
) -> TuckerTensor:
    """Carries a second moment: the maps of :func:`transport` with every matrix squared entrywise, ``v <- (T ∘ T) v``.

    ``(T sqrt(v))^2`` would cancel and make steps of many learning rates. What the augmented core and ``K`` both describe is taken
    once, as the larger of the two. Entries below the average of the new core's are raised to it, none beyond the largest.
    """
    moments: list[ModeArray] = []
    squared = _squares(rotations)
    overlaps = [None if p is None else augmented.old_rows(i, p) for i, p in enumerate(squared)]
    for mode, (basis, k, p, q_old, q_new) in enumerate(zip(augmented.bases, K, rotations, augmented.frame.Q, frame.Q)):
        if basis is None:
            moments.append(None)
            continue
        columns = unfold(q_new, mode).T ** 2
        within = _dot(unfold(multi_mode_product(core, squared, transpose=True, skip=mode), mode), columns)
        leaving = (jnp.eye(p.shape[0], dtype=p.dtype) - _dot(p, p.T)) ** 2
        change = _dot(unfold(multi_mode_product(q_old**2, overlaps, transpose=True, skip=mode), mode), columns)
        moments.append(jnp.maximum(_dot(basis**2, _dot(leaving, within)), _dot(k, change)))
    return _raised(TuckerTensor(multi_mode_product(core, squared, transpose=True), tuple(moments)), frame)


def transport_turned(moment: TuckerTensor, frame: Frame, new_frame: Frame, kind: Kind) -> TuckerTensor:
    """:func:`transport_moment` where bases have turned at ranks that stay, and there are no augmented ones.

    Args:
      moment: ``(m_C, m_{K_i})`` in the coordinates of ``frame``.
      frame: before the step.
      new_frame: at the next kernel.
      kind: how the moment transforms.

    Returns:
      The coordinates, in ``new_frame``, of the projection of that tangent vector onto the new tangent space. Of second moments,
      the same maps with every matrix squared entrywise, and none below the average of the new core's.
    """
    square = kind == "squared"

    def squared(matrices: Sequence[ModeArray]) -> Sequence[ModeArray]:
        return _squares(matrices) if square else matrices

    q_old, q_new = squared(frame.Q), squared(new_frame.Q)
    rotations = overlaps(frame.U, new_frame.U)
    pairs = list(zip(frame.U, new_frame.U, rotations))
    leave = squared(
        [None if u is None else u - _dot(v, m.T) for u, v, m in pairs]
    )  # of U_i, what is outside of U_new_i
    enter = squared([None if u is None else v - _dot(u, m) for u, v, m in pairs])  # of U_new_i, what is outside of U_i
    inside = [None if new is None else _dot(new.T, k) for new, k in zip(enter, moment.factors)]  # (R_i, R_i)
    tangent = TurnedTangent(moment.core, inside, q_old, squared(rotations))
    moments: list[ModeArray] = []
    for mode, (k, (u, v, _), leaving, q) in enumerate(zip(moment.factors, pairs, leave, q_new)):
        if k is None:
            moments.append(None)
            continue
        columns, others = unfold(q, mode).T, tangent.but(mode)
        # In U_i along this mode, in the new bases along all others: what leaves U_new of the core and of the other K_j.
        within, change = (_dot(unfold(part, mode), columns) for part in (tangent.core(others), tangent.q(mode, others)))
        if not square:
            k = k - _dot(u, _dot(u.T, k))
            k = k - _dot(v, _dot(v.T, k))
        moments.append(_dot(leaving, within) + _dot(k, change))
    core = tangent.core(range(len(moments)))
    carried = TuckerTensor(core, tuple(moments))
    return _raised(carried, new_frame) if square else carried


def _raised(moment: TuckerTensor, frame: Frame) -> TuckerTensor:
    """A second moment, nothing of it below the average of its core's."""
    exists = active_entries(moment.core.shape, frame.U)
    average = _average(moment.core, exists)
    factors = [
        None if k is None or u is None else _at_least(k, average, active_columns(u))
        for k, u in zip(moment.factors, frame.U)
    ]
    return TuckerTensor(_at_least(moment.core, average, exists), tuple(factors))


def _average(core: Array, exists: Array) -> Array:
    return jnp.sum(core, where=exists) / jnp.maximum(jnp.sum(exists), 1)


def _at_least(values: Array, least: Array, exists: Array) -> Array:
    """``max(values, least)`` where there is something; padding stays zero."""
    return jnp.where(exists, jnp.maximum(values, least), 0)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def _squares(matrices: Sequence[ModeArray]) -> tuple[ModeArray, ...]:
    return tuple(None if m is None else m**2 for m in matrices)


def _squared_bases(augmented: Augmented) -> Augmented:
    frame = augmented.frame
    return Augmented(frame._replace(U=_squares(frame.U), Q=_squares(frame.Q)), _squares(augmented.new))
