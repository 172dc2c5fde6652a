"""What an integrator is: two pure functions on one kernel around the second gradient, and what they hand on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from tdlrt_jax.inspection import deviation
from tdlrt_jax.integrators.augmentation import Augmented
from tdlrt_jax.ranks import RankPolicy
from tdlrt_jax.tucker import HIGHEST, ModeArray, TuckerTensor

__all__ = ["Galerkin", "Integrator", "Moved", "Truncation", "orthonormal_factors", "polished"]


class Galerkin(NamedTuple):
    """The core in the bases of the Galerkin step (line 8), before its own step."""

    core: Array  # (M_1, ..., M_d), the augmented capacities; of fixed_rank (R_1, ..., R_d)
    bases: tuple[ModeArray, ...]  # (n_i, M_i), or (n_i, R_i)
    turns: tuple[ModeArray, ...] | None  # (M_i, R_i), from the augmented bases to these; None where they agree
    deviation: Array | None = None  # scalar, see Moved; None where the bases are still to be turned


class Moved(NamedTuple):
    """The next kernel and how its bases came from the augmented ones."""

    kernel: TuckerTensor  # capacities as before the step
    rotations: tuple[ModeArray, ...]  # P_i, (M_i, R_i): U_i_new = [U_i | Ũ_i] P_i
    rank: Array  # int32 (d,)
    error: Array  # relative truncation error of this step
    bound: Array  # bool (d,): a bound or the capacity kept the rank below what the tolerance asks for
    deviation: Array  # scalar, the largest entry of |U^T U - I| of the new factors before their correction


class Truncation(NamedTuple):
    """What line 11 needs to know."""

    tolerance: Array
    policy: RankPolicy
    floor: Array  # int32 (d,), ranks not to go below (warm-up, frozen ranks)
    ceiling: Array | None = None  # int32 (d,), ranks not to go above (a budget, frozen ranks)
    step: Array | None = None  # int32 scalar, what random numbers depend on; None where there are none
    room: Array | None = (
        None  # int32 (d,), what the kernel's own arrays have room for, where those of its batch have more
    )


class Integrator(NamedTuple):
    """One step of a kernel, in the two halves that a gradient evaluation separates.

    With ``evaluations == 1`` the core's increment comes from the first gradient; with 2 from the gradient at the Galerkin point.
    """

    evaluations: int
    basis_step: Callable[[Augmented, TuckerTensor], Galerkin]  # lines 5-8, from the step of (C, K_i)
    core_step: Callable[[Augmented, Galerkin, Array, Truncation], Moved]  # lines 9-14, from the core's increment
    same_network: bool  # whether the Galerkin point is the network itself in other bases


def orthonormal_factors(
    bases: tuple[ModeArray, ...], rotations: tuple[ModeArray, ...]
) -> tuple[tuple[ModeArray, ...], Array]:
    """``U_i = bases_i P_i`` (line 12) and one Newton-Schulz step ``U (3 I - U^T U) / 2``, which stops the drift of rounding.

    Returns:
      The factors, and how far they were from orthonormal ones before that step, for which ``U^T U`` is at hand: a scalar ``E``;
      afterwards it is ``3/4 E^2``.
    """
    factors: list[ModeArray] = []
    deviations: list[Array] = []
    for basis, rotation in zip(bases, rotations):
        if basis is None or rotation is None:
            factors.append(None)
            continue
        factor, error = polished(jnp.matmul(basis, rotation, precision=HIGHEST))
        factors.append(factor)
        deviations.append(error)
    return tuple(factors), jnp.max(jnp.stack([jnp.zeros(()), *deviations]))


def polished(factor: Array) -> tuple[Array, Array]:
    """One Newton-Schulz step of a nearly orthonormal factor, and how far from orthonormal it was, see above."""
    gram = jnp.matmul(factor.T, factor, precision=HIGHEST)
    return 1.5 * factor - 0.5 * jnp.matmul(factor, gram, precision=HIGHEST), deviation(factor, gram)
