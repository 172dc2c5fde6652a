"""Bases that turn at ranks that stay, from one gradient and without an eigenproblem: a step between two adaptations.

A step ``(step_C, step_K_i)`` of the chart's variables is a tangent vector, and the kernel moved along it has twice the ranks.
Algorithm 1 finds the best bases of the old ranks by augmenting and truncating. To first order they are those of
``K_i + step_K_i`` (line 4), which can be had with products and Cholesky factorizations of the ranks' size alone; the moved kernel
is then projected onto them, exactly. On a GPU eigenproblems are most of a whole step's time, and these steps have none.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_solve

from tdlrt_jax.batching import map_batched
from tdlrt_jax.frame import Frame
from tdlrt_jax.integrators.base import polished
from tdlrt_jax.orthonormal import cholesky_qr
from tdlrt_jax.tucker import HIGHEST, ModeArray, TuckerTensor, active_columns, mode_product

__all__ = ["TurnedTangent", "overlaps", "project_core", "turn", "turn_all", "turned_basis"]


# Of a turn, see turned_basis: the larger, the sooner it is cut; the condition number is at most that of 1 + 1 / (4 damping).
_DAMPING = 1 / 16


def turned_basis(basis: Array, K: Array, step: Array) -> Array:
    """``U_new``, which spans ``K + step`` where that is well-conditioned.

    ``K + step = U S + D`` has the range of ``U + D S^{-1}``. Small singular values of ``S`` are not to be inverted, which is what
    Theorem 3 is about. So the displacement is ``E = D (S^T S + D^T D / 16)^{-1} S^T``: a direction of size ``s`` that steps by
    ``d`` turns by ``d s / (s^2 + d^2 / 16)``, which is at most 2, the whole turn up to third order in ``d / s``, and nothing
    where there is only ``d``. Thus ``U + E`` has full rank and a condition number of at most ``sqrt(5)``, whatever the singular
    values. What a direction of nearly no size would become is left to the next augmentation.

    Args:
      basis: ``U``, ``(n, R)``, orthonormal up to its zero columns.
      K: ``U S``, ``(n, R)``.
      step: ``D``, ``(n, R)``, orthogonal to ``U``.

    Returns:
      ``(n, R)``, orthonormal, with zero columns where those of ``U`` are.
    """
    active = active_columns(basis)
    s = jnp.matmul(basis.T, K, precision=HIGHEST)
    gram = jnp.matmul(s.T, s, precision=HIGHEST) + _DAMPING * jnp.matmul(step.T, step, precision=HIGHEST)
    # Directions of next to no size, and those that are not there: what is solved for them is multiplied by that size again.
    trace = jnp.trace(gram)
    floor = 16 * jnp.finfo(gram.dtype).eps * jnp.where(trace > 0, trace, 1)
    factor = jnp.linalg.cholesky(gram + floor * jnp.eye(gram.shape[0], dtype=gram.dtype))
    solved = cho_solve((factor, True), s.T)
    turned = basis + jnp.matmul(step, solved, precision=HIGHEST)
    return cholesky_qr(jnp.where(active, turned, 0), active)


def project_core(tangent: TuckerTensor, frame: Frame, bases: Sequence[ModeArray]) -> Array:
    """The core, in other bases, of ``V_C ×_j U_j + sum_i Ten_i(Q_i^T) ×_{j != i} U_j ×_i V_{K_i}``.

    Args:
      tangent: ``(V_C, (V_{K_i}))`` with the shapes of the frame's core and factors; a ``V_{K_i}`` may have a part in ``U_i``.
      frame: ``U_i`` and ``Q_i``.
      bases: ``(n_i, R_i)``.

    Returns:
      ``(R_1, ..., R_d)``.
    """
    parts = [
        None if basis is None else jnp.matmul(basis.T, v, precision=HIGHEST) for v, basis in zip(tangent.factors, bases)
    ]
    tangent_there = TurnedTangent(tangent.core, parts, frame.Q, overlaps(frame.U, bases))
    return tangent_there.core(range(len(bases)))


class TurnedTangent:
    """The products of a tangent vector, and of the ``Q_i`` that it is made of, with the overlaps of old and new bases.

    A transport needs them in the new bases of all modes and of all but one. One by one these are 80 products of a tensor of four
    modes with a matrix; by a dimension tree, in which each is one product away from another that is there, they are 32. Each
    is taken once, when it is first asked for.

    Source: dimension trees, Phan, Tichavský & Cichocki (2013); Kaya & Robert (2019).
    """

    def __init__(self, core: Array, parts: Sequence[ModeArray], Q: Sequence[ModeArray], turns: Sequence[ModeArray]):
        """Nothing is computed yet.

        Args:
          core: ``V_C``, ``(R_1, ..., R_d)``.
          parts: of every ``V_{K_i}`` what lies in the new basis, ``U_new_i^T V_{K_i}``, ``(R_i, R_i)``; None for whole modes.
          Q: of the frame.
          turns: ``U_i^T U_new_i``, ``(R_i, R_i)``; None for whole modes.
        """
        self._parts, self._turns = tuple(parts), tuple(turns)
        self._cores: dict[frozenset[int], Array] = {frozenset(): core}
        self._q: list[dict[frozenset[int], Array]] = [{frozenset(): q} for q in Q]

    def core(self, modes: Iterable[int]) -> Array:
        """The vector in the new bases of some modes ``D`` and the old ones of the others, of whose ``V_K`` it has nothing.

        ``V_D = V_{D - i} ×_i turn_i^T + (Q_i ×_{j in D - i} turn_j^T) ×_i part_i``, for whichever ``i`` of ``D`` is the last.
        """
        modes = frozenset(modes)
        if modes not in self._cores:
            last = self._last(modes)
            before = modes - {last}
            core = self._turned(self.core(before), last)
            if self._parts[last] is not None:
                core = core + mode_product(self.q(last, before), self._parts[last], last)
            self._cores[modes] = core
        return self._cores[modes]

    def q(self, mode: int, modes: Iterable[int]) -> Array:
        """``Q_i`` of a mode in the new bases of some others."""
        modes, found = frozenset(modes), self._q[mode]
        if modes not in found:
            last = self._last(modes)
            found[modes] = self._turned(self.q(mode, modes - {last}), last)
        return found[modes]

    def but(self, mode: int) -> frozenset[int]:
        """All other modes."""
        return frozenset(range(len(self._turns))) - {mode}

    def _turned(self, tensor: Array, mode: int) -> Array:
        turn = self._turns[mode]
        return tensor if turn is None else mode_product(tensor, turn.T, mode)

    def _last(self, modes: frozenset[int]) -> int:
        """Which to take last, so that those taken before are one half of all modes wherever that can be."""
        half = frozenset(range(len(self._turns) // 2))
        return max(modes if half <= modes else modes & half or modes)


def turn(frame: Frame, step: TuckerTensor) -> tuple[TuckerTensor, Array]:
    """The next kernel, of the same ranks, and how far its bases were from orthonormal ones before their last correction.

    Args:
      frame: the point.
      step: increments of ``C`` and of every ``K_i``, those orthogonal to ``U_i``.
    """
    return turn_all([frame], [step])[0]


def turn_all(
    frames: Sequence[Frame], steps: Sequence[TuckerTensor], apart: Sequence[Hashable] | None = None
) -> list[tuple[TuckerTensor, Array]]:
    """:func:`turn` for all kernels of a network; bases of equal sizes are one batch, whichever kernels they belong to.

    ``apart`` is of the kernels, see :func:`tdlrt_jax.batching.map_batched`.
    """
    modes = [(i, mode) for i, frame in enumerate(frames) for mode, u in enumerate(frame.U) if u is not None]
    found = map_batched(
        _turned,
        [frames[i].U[mode] for i, mode in modes],
        [frames[i].K[mode] for i, mode in modes],
        [steps[i].factors[mode] for i, mode in modes],
        apart=[None] * len(modes),
    )
    bases: list[list[ModeArray]] = [[None] * len(frame.U) for frame in frames]
    outside: list[list[ModeArray]] = [[None] * len(frame.U) for frame in frames]
    deviations = [[jnp.zeros(())] for _ in frames]
    for (i, mode), (basis, part, deviation) in zip(modes, found):
        bases[i][mode], outside[i][mode] = basis, part
        deviations[i].append(deviation)
    tangents = [
        TuckerTensor(frame.core + step.core, tuple(parts)) for frame, step, parts in zip(frames, steps, outside)
    ]
    cores = map_batched(project_core, tangents, frames, list(map(tuple, bases)), apart=apart)
    return [
        (TuckerTensor(core, tuple(basis)), jnp.max(jnp.stack(errors)))
        for core, basis, errors in zip(cores, bases, deviations)
    ]


def _turned(basis: Array, K: Array, step: Array) -> tuple[Array, Array, Array]:
    """The turned basis, the part of the step that is orthogonal to the old one, and how far the new one was from orthonormal."""
    outside = step - jnp.matmul(basis, jnp.matmul(basis.T, step, precision=HIGHEST), precision=HIGHEST)
    turned, deviation = polished(turned_basis(basis, K, outside))
    return turned, outside, deviation


def overlaps(old: Sequence[ModeArray], new: Sequence[ModeArray]) -> list[ModeArray]:
    """``U_i^T U_new_i``, ``(R_i, R_i)``; None for whole modes."""
    return [None if u is None else jnp.matmul(u.T, v, precision=HIGHEST) for u, v in zip(old, new)]
