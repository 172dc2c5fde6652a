"""Bases that turn at ranks that stay, from one gradient and without an eigenproblem: a step between two adaptations.

A step ``(step_C, step_K_i)`` of the chart's variables is a tangent vector, and the kernel moved along it has twice the ranks.
Algorithm 1 finds the best bases of the old ranks by augmenting and truncating. To first order they are those of
``K_i + step_K_i`` (line 4), which can be had with products and Cholesky factorizations of the ranks' size alone; the moved kernel
is then projected onto them, exactly. On a GPU eigenproblems are most of a whole step's time, and these steps have none.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_solve

from tdlrt_jax.frame import Frame
from tdlrt_jax.integrators.base import polished
from tdlrt_jax.orthonormal import cholesky_qr
from tdlrt_jax.tucker import HIGHEST, ModeArray, TuckerTensor, active_columns, mode_product, multi_mode_product

__all__ = ["overlaps", "project_core", "turn", "turned_basis"]


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
    between = overlaps(frame.U, bases)
    core = multi_mode_product(tangent.core, between, transpose=True)
    for mode, (q, v, basis) in enumerate(zip(frame.Q, tangent.factors, bases)):
        if basis is None:
            continue
        within = jnp.matmul(basis.T, v, precision=HIGHEST)
        core = core + mode_product(multi_mode_product(q, between, transpose=True, skip=mode), within, mode)
    return core


def turn(frame: Frame, step: TuckerTensor) -> tuple[TuckerTensor, Array]:
    """The next kernel, of the same ranks, and how far its bases were from orthonormal ones before their last correction.

    Args:
      frame: the point.
      step: increments of ``C`` and of every ``K_i``, those orthogonal to ``U_i``.
    """
    steps: list[ModeArray] = []
    bases: list[ModeArray] = []
    deviations = [jnp.zeros(())]
    for u, k, d in zip(frame.U, frame.K, step.factors):
        if u is None or d is None:
            steps.append(None)
            bases.append(None)
            continue
        outside = d - _within(u, d)
        basis, deviation = polished(turned_basis(u, k, outside))
        steps.append(outside)
        bases.append(basis)
        deviations.append(deviation)
    core = project_core(TuckerTensor(frame.core + step.core, tuple(steps)), frame, bases)
    return TuckerTensor(core, tuple(bases)), jnp.max(jnp.stack(deviations))


def _within(basis: Array, columns: Array) -> Array:
    return jnp.matmul(basis, jnp.matmul(basis.T, columns, precision=HIGHEST), precision=HIGHEST)


def overlaps(old: Sequence[ModeArray], new: Sequence[ModeArray]) -> list[ModeArray]:
    """``U_i^T U_new_i``, ``(R_i, R_i)``; None for whole modes."""
    return [None if u is None else jnp.matmul(u.T, v, precision=HIGHEST) for u, v in zip(old, new)]
