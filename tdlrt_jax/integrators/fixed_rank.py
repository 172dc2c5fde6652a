"""Algorithm 1 with ``adaptive = False``: the ranks stay, and the second gradient is taken at a new point.

``U_new`` is an orthonormal basis of the range of ``K_i`` after its step (line 7), and the core is carried over by
``C ×_i U_new^T U`` (line 8), which loses what leaves the old bases; line 9 then steps it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from tdlrt_jax.integrators.augmentation import Augmented
from tdlrt_jax.integrators.base import Galerkin, Integrator, Moved, Truncation, orthonormal_factors
from tdlrt_jax.rotation import ALL_ROUNDS, principal_rotation
from tdlrt_jax.tucker import (
    HIGHEST,
    ModeArray,
    TuckerTensor,
    active_columns,
    active_rank,
    magnitude,
    multi_mode_product,
    unfold,
)

__all__ = ["fixed_rank"]


def basis_step(augmented: Augmented, step: TuckerTensor) -> Galerkin:
    """Lines 4-8: an orthonormal basis of the range of ``K_i + step_{K_i}``, found in the coordinates of ``[U | Ũ]``.

    The part of the ``K_i``-step within ``range(U_i)`` is the core's: ``U_i^T step_{K_i} = Mat_i(step_C) Q_i``, as for the
    gradients of Theorem 1, so an optimizer may leave it out of its norms.
    """
    frame = augmented.frame
    turns: list[ModeArray] = []
    carried: list[ModeArray] = []
    for mode, (u, new, k, dk, q) in enumerate(zip(frame.U, augmented.new, frame.K, step.factors, frame.Q)):
        if u is None:
            turns.append(None)
            carried.append(None)
            continue
        within = jnp.matmul(unfold(step.core, mode), unfold(q, mode).T, precision=HIGHEST)
        old = jnp.matmul(u.T, k, precision=HIGHEST) + within
        stepped = augmented.join(mode, old, jnp.matmul(new.T, dk, precision=HIGHEST))
        exists = augmented.join(mode, active_columns(u), active_columns(new))
        turns_of_mode, _, _ = principal_rotation(_normalized(stepped), exists, ALL_ROUNDS)
        turn = jnp.where(active_columns(u), turns_of_mode[:, : u.shape[1]], 0)
        turns.append(turn)
        carried.append(augmented.old_rows(mode, turn))
    bases, deviation = orthonormal_factors(augmented.bases, tuple(turns))
    core = multi_mode_product(frame.core, carried, transpose=True)
    return Galerkin(core, bases, tuple(turns), deviation)


def _normalized(matrix: Array) -> Array:
    matrix = matrix / magnitude(matrix)
    return matrix / jnp.maximum(jnp.linalg.norm(matrix), jnp.finfo(matrix.dtype).tiny)


def core_step(augmented: Augmented, point: Galerkin, increment: Array, truncation: Truncation) -> Moved:
    """Lines 9 and 14: the core steps in the new bases; nothing is truncated."""
    del truncation
    assert point.turns is not None and point.deviation is not None  # from basis_step
    kernel = TuckerTensor(point.core + increment, point.bases)
    rank = active_rank(TuckerTensor(augmented.frame.core, augmented.frame.U))
    still, free = jnp.zeros((), increment.dtype), jnp.zeros(rank.shape, bool)
    return Moved(kernel, point.turns, rank, still, free, point.deviation)


fixed_rank = Integrator(evaluations=2, basis_step=basis_step, core_step=core_step, same_network=False)
