"""Algorithm 1, adaptive: basis update and Galerkin, with augmentation and truncation.

Lines 1-4 step every ``K_i`` from one gradient; line 6 augments the bases, which leaves the network unchanged; line 9 steps the
augmented core with the gradient there; lines 11-12 truncate. The steps themselves are the optimizer's.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from tdlrt_jax.frame import active_entries
from tdlrt_jax.integrators.augmentation import Augmented
from tdlrt_jax.integrators.base import Galerkin, Integrator, Moved, Truncation, orthonormal_factors
from tdlrt_jax.truncation import truncate
from tdlrt_jax.tucker import ModeArray, TuckerTensor, active_columns, capacity

__all__ = ["bug"]


def basis_step(augmented: Augmented, step: TuckerTensor) -> Galerkin:
    """Lines 5-8: the Galerkin point is the kernel itself in the bases ``[U | Ũ]``; its core is ``C`` padded with zeros."""
    del step  # the augmented bases hold its range
    return Galerkin(augmented.core, augmented.bases, None)


def core_step(augmented: Augmented, point: Galerkin, increment: Array, truncation: Truncation) -> Moved:
    """Lines 9-12: ``C̃ + increment``, truncated to the relative tolerance, back at the capacities of the kernel.

    Args:
      augmented: the bases of this step.
      point: from :func:`basis_step`.
      increment: step of the augmented core, of its shape; masked to the directions that exist.
      truncation: tolerance and policy.
    """
    valid = existing(point)
    cut = truncate(
        stepped_core(point, increment),
        truncation.tolerance,
        capacity=capacity(TuckerTensor(augmented.frame.core, augmented.frame.U)),
        whole=tuple(basis is None for basis in point.bases),
        valid=valid,
        policy=truncation.policy,
        floor=truncation.floor,
        ceiling=truncation.ceiling,
        step=truncation.step,
        room=truncation.room,
    )
    factors, deviation = orthonormal_factors(point.bases, cut.rotations)
    return Moved(TuckerTensor(cut.core, factors), cut.rotations, cut.rank, cut.error, cut.bound, deviation)


def existing(point: Galerkin) -> list[ModeArray]:
    """Per mode ``(M_i,)`` booleans, the columns of the bases that exist; None for a whole mode."""
    return [None if basis is None else active_columns(basis) for basis in point.bases]


def stepped_core(point: Galerkin, increment: Array) -> Array:
    """Line 9: ``C̃ + increment``, masked to the directions that exist; what line 11 truncates."""
    return jnp.where(active_entries(point.core.shape, point.bases), point.core + increment, 0)


bug = Integrator(evaluations=2, basis_step=basis_step, core_step=core_step, same_network=True)
