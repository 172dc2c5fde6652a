"""HOSVD truncation at static shapes (line 11 of Algorithm 1); :mod:`tdlrt_jax.ranks` chooses the ranks.

Modes are truncated one after the other. Each is rotated by all eigenvectors of its Gram matrix, a small problem instead of
a wide SVD, and cut on the energies of the rotated slices: these are sums of squares of numbers actually stored, so they are
accurate far below the square root of the machine precision at which the Gram matrix's eigenvalues end.

On the randomized route a mode that is cut to much less than its size is first projected onto a random sketch of its range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax.arguments import check_array
from tdlrt_jax.ranks import (
    DEFAULT_POLICY,
    Convention,
    Criterion,
    RankPolicy,
    Route,
    check_policy,
    check_ranks,
    check_tolerance,
    choose_rank,
    per_mode,
    thresholds,
)
from tdlrt_jax.rotation import ALL_ROUNDS, khatri_rao, principal_rotation, randomized_rotation, sketch_size
from tdlrt_jax.tucker import HIGHEST, ModeArray, TuckerTensor, fold, magnitude, mode_product, unfold

__all__ = ["Truncated", "hosvd", "truncate"]


# Below this tolerance one round of eigenvectors no longer separates the directions near the cut in float32.
REFINE_BELOW = 1e-3


class Truncated(NamedTuple):
    """A truncated core and how it came about: ``core = C ×_i P_i^T`` and ``||C - core ×_i P_i|| = error ||C||``."""

    core: Array  # (R_1, ..., R_d), zero beyond the ranks
    rotations: tuple[ModeArray, ...]  # P_i, (m_i, R_i) with orthonormal columns up to the rank; None for a whole mode
    rank: Array  # int32 (d,)
    error: Array  # scalar, relative to ||C||
    bound: Array  # bool (d,): a max_rank or the capacity kept the rank below what tolerance and ceiling ask for


@partial(jax.jit, static_argnames=("capacity", "whole", "policy"))
def truncate(
    core: Array,
    tolerance: Array | float,
    *,
    capacity: tuple[int, ...] | None = None,
    whole: tuple[bool, ...] | None = None,
    valid: Sequence[ModeArray] | None = None,
    policy: RankPolicy = DEFAULT_POLICY,
    floor: Array | None = None,
    ceiling: Array | None = None,
    step: Array | None = None,
    room: Array | None = None,
) -> Truncated:
    """Truncates a core to a relative tolerance by sequential HOSVD, at static shapes.

    Finds ranks with ``||C - C^|| <= tau ||C||``, each the smallest that the convention allows, and the rotations ``P_i`` with
    ``C^ = core ×_i P_i``. Not meant to be differentiated.

    Args:
      core: ``C``, ``(m_1, ..., m_d)``; computed on in float32 at least.
      tolerance: ``tau``, a scalar, possibly traced; 0 keeps everything above rounding.
      capacity: static sizes of the result, at most ``m_i``; default: those of the core.
      whole: modes to leave alone.
      valid: per mode ``(m_i,)`` booleans, the basis columns that exist; ``None`` for all. The core is zero elsewhere.
      policy: criterion, convention, spare directions and bounds.
      floor: ranks ``(d,)`` not to go below, traced (warm-up); the capacity and ``ceiling`` still win.
      ceiling: ranks ``(d,)`` not to go above, traced (a budget); it wins over ``policy.min_rank``.
      step: an int32 scalar, the number of this truncation: a sketch's random numbers are a function of it and of the mode alone,
        independent for different ones. Default: 0.
      room: ranks ``(d,)`` not to go above, as if they were the capacity, where that is larger for the sake of a batch.

    Returns:
      A :class:`Truncated`.

    Source: the rounding task of section 3.1, line 11 of Algorithm 1; for the randomized route, which the outlook names,
    see :func:`randomized_rotation`.
    """
    core = check_array("core", core, "a core (m_1, ..., m_d)", modes=2, floating=True)
    order = core.ndim
    check_policy(policy, order)
    for name, entries in (("capacity", capacity), ("whole", whole)):
        if entries is not None and len(entries) != order:
            raise ValueError(f"{name}={entries} has {len(entries)} entries: expected one for each of {order} modes")
    whole = whole or (False,) * order
    sizes = tuple(m if w else min(m, c) for m, c, w in zip(core.shape, capacity or core.shape, whole))
    lows, highs = per_mode(policy.min_rank, order, "min_rank"), per_mode(policy.max_rank, order, "max_rank")
    dtype = jnp.promote_types(core.dtype, jnp.float32)
    tolerance = jnp.asarray(tolerance, dtype)

    working = core.astype(dtype)
    largest = magnitude(working)
    working = working / largest
    norm = jnp.linalg.norm(working)
    limits = thresholds(tolerance, jnp.where(norm > 0, norm * largest, 1), whole, policy)

    # Spare directions lie below the cut, so they need one round more than the tolerance does.
    rounds = jnp.where(tolerance < REFINE_BELOW, ALL_ROUNDS, 2 if policy.spare else 1)

    # The implementation by name: what the user's configuration has as the default is no part of a resumed run.
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), 0 if step is None else step)

    def normalized() -> Array:
        return working / jnp.where(norm > 0, norm, 1)

    def bounds_of(mode: int, exist: Array) -> tuple[Array, Array]:
        """The lowest and the highest rank of a mode; the highest wins."""
        others = math.prod([sizes[j] if j < mode else core.shape[j] for j in range(order) if j != mode])
        low = jnp.maximum(lows[mode], 0 if floor is None else floor[mode])
        high = jnp.minimum(exist, min(sizes[mode], others))
        high = high if room is None else jnp.minimum(high, room[mode])
        high = high if highs[mode] is None else jnp.minimum(high, highs[mode])
        return low, high if ceiling is None else jnp.minimum(high, ceiling[mode])

    def chosen_rank(mode: int, energies: Array, lost: Array, exist: Array) -> tuple[Array, Array]:
        """The rank for the energies of a mode's slices, and whether it is held down."""
        wanted = jnp.minimum(choose_rank(energies, limits[mode], policy, lost), exist)
        wanted = wanted if ceiling is None else jnp.minimum(wanted, ceiling[mode])
        low, high = bounds_of(mode, exist)
        rank = jnp.maximum(jnp.clip(wanted, low, jnp.maximum(high, low)), 1)
        rank = jnp.minimum(rank, jnp.maximum(high, 1))
        return rank, wanted > rank

    def run_pass(carry: _Pass) -> _Pass:
        first = carry.done == 0
        rotations, masks, ranks = list(carry.rotations), list(carry.masks), list(carry.ranks)
        bound, dropped = list(carry.bound), carry.dropped
        working = jax.lax.cond(first, normalized, lambda: _padded(carry.core, core.shape))
        for mode in range(order):
            if whole[mode]:
                continue
            # More directions than the other modes have room for are rounding, and hold nothing down.
            exist = jnp.minimum(ranks[mode], _columns(ranks, mode, core.shape[mode]))
            matrix, turns = unfold(working, mode), jnp.where(first, rounds, ALL_ROUNDS)
            size = sketch_size(matrix.shape[0], matrix.shape[1], sizes[mode]) if policy.route == "randomized" else None
            if size is None:
                v, rows, energies = principal_rotation(matrix, masks[mode], turns, rotations[mode])
                lost = jnp.zeros((), dtype)
            else:
                others = working.shape[:mode] + working.shape[mode + 1 :]
                test = khatri_rao(jax.random.fold_in(key, mode), size, others, dtype)
                highest = bounds_of(mode, exist)[1]
                v, rows, energies, lost = randomized_rotation(
                    matrix, masks[mode], turns, test, limits[mode] ** 2, highest
                )
                v = jnp.matmul(rotations[mode], v, precision=HIGHEST)
            rank, held = chosen_rank(mode, energies, lost, exist)
            ranks[mode] = rank = jnp.where(first, rank, exist).astype(jnp.int32)
            bound[mode] = jnp.where(first, held, bound[mode])
            keep = jnp.arange(energies.shape[0]) < rank
            dropped = dropped + jnp.where(first, lost + jnp.sum(jnp.where(keep, 0, energies)), 0)
            rest = core.shape[mode] - energies.shape[0]
            rotations[mode] = jnp.pad(jnp.where(keep, v, 0), ((0, 0), (0, rest)))
            masks[mode] = jnp.pad(keep, (0, rest))
            keep = keep[: sizes[mode]]  # later modes are rotated on what is left
            shape = (*working.shape[:mode], sizes[mode], *working.shape[mode + 1 :])
            working = fold(jnp.where(keep[:, None], rows[: sizes[mode]], 0), mode, shape)
        return _Pass(carry.done + 1, working, tuple(rotations), tuple(masks), tuple(ranks), dropped, tuple(bound))

    def unfinished(carry: _Pass) -> Array:
        # Cutting a later mode can leave an earlier one with more slices than its unfolding has columns.
        dependent = [
            rank > _columns(carry.ranks, mode, core.shape[mode])
            for mode, rank in enumerate(carry.ranks)
            if not whole[mode]
        ]
        return (carry.done == 0) | jnp.any(jnp.stack(dependent))

    masks = [jnp.ones(m, bool) if valid is None or valid[i] is None else valid[i] for i, m in enumerate(core.shape)]
    start = _Pass(
        jnp.zeros((), jnp.int32),
        jnp.zeros(sizes, dtype),
        tuple(None if w else jnp.eye(m, dtype=dtype) for m, w in zip(core.shape, whole)),
        tuple(masks),
        tuple(jnp.sum(mask, dtype=jnp.int32) for mask in masks),
        jnp.zeros((), dtype),
        (jnp.zeros((), bool),) * order,
    )
    # One loop, since further passes are rare: by themselves they would be half of the program.
    end = start._replace(core=normalized()) if all(whole) else jax.lax.while_loop(unfinished, run_pass, start)
    scale = jnp.where(norm > 0, norm, 1) * largest
    return Truncated(
        (end.core * scale).astype(core.dtype),
        tuple(None if p is None else p[:, :size] for p, size in zip(end.rotations, sizes)),
        jnp.stack(end.ranks),
        jnp.sqrt(end.dropped),
        jnp.stack(end.bound),
    )


class _Pass(NamedTuple):
    """Between two passes over the modes, the first of which cuts; the others remove slices that depend on the rest."""

    done: Array  # int32, passes so far
    core: Array  # (R_1, ..., R_d), zero beyond the ranks; before the first pass not in use
    rotations: tuple[ModeArray, ...]  # (m_i, m_i), zero columns beyond the rank
    masks: tuple[Array, ...]  # bool (m_i,)
    ranks: tuple[Array, ...]  # int32 scalars, how many are true
    dropped: Array  # scalar, energy
    bound: tuple[Array, ...]  # bool scalars


def _padded(core: Array, shape: tuple[int, ...]) -> Array:
    return jnp.pad(core, [(0, m - n) for m, n in zip(shape, core.shape)])


def _columns(ranks: Sequence[Array], mode: int, highest: int) -> Array:
    """How many columns an unfolding has: the product of the other ranks, int32; exact as far as it can be below ``highest``."""
    others = [rank.astype(jnp.float32) for rank in (*ranks[:mode], *ranks[mode + 1 :])]
    return jnp.minimum(math.prod(others, start=jnp.ones((), jnp.float32)), highest).astype(jnp.int32)


def hosvd(
    tensor: Array,
    *,
    rank: Sequence[int | None] | int | None = None,
    tolerance: float | None = None,
    criterion: Criterion = "tail",
    convention: Convention = "shared",
    route: Route = "gram",
) -> TuckerTensor:
    """The Tucker decomposition of a full tensor by sequential HOSVD.

    Args:
      tensor: ``(n_1, ..., n_d)``, floating, d >= 2.
      rank: static capacities of the result, one for all modes (clipped to each) or one a mode; ``None`` entries leave a mode
        whole. Default: lossless.
      tolerance: ``tau``; the active ranks are the smallest with a relative error within it. The arrays keep the capacities
        (``tdlrt_jax.resize`` cuts them), so this runs under ``jit``.
      criterion, convention: what the tolerance means, see :class:`RankPolicy`.
      route: ``"randomized"`` sketches modes with a rank well below their size (of ``rank``, the capacity), see
        :class:`RankPolicy`.

    Returns:
      A :class:`TuckerTensor` with orthonormal factors, which are float32 at least, and a core of the tensor's dtype; capacities
      are lowered to ``R_i <= prod_{j != i} R_j``.

    Raises:
      ValueError: for a rank outside ``1..n_i``, a tolerance that is not usable, or a tensor that is not floating.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> kernel = hosvd(jnp.outer(jnp.arange(1.0, 4.0), jnp.ones(5)), tolerance=0.01)
      >>> kernel.core.shape, tdlrt_jax.active_rank(kernel).tolist()
      ((3, 3), [1, 1])

    Source: section 2.1; Kolda & Bader (2009) for the truncated HOSVD, used sequentially.
    """
    tensor = check_array("tensor", tensor, "a full tensor (n_1, ..., n_d)", modes=2, floating=True)
    if 0 in tensor.shape:
        raise ValueError(f"tensor has shape {tensor.shape}: expected entries, no mode of size 0")
    sizes, whole = check_ranks(rank, tensor.shape)
    if tolerance is not None:
        check_tolerance(tolerance, convention)
    policy = RankPolicy(criterion, convention, min_rank=1 if tolerance is not None else sizes, route=route)
    check_policy(policy, tensor.ndim)
    return _hosvd(tensor, 0.0 if tolerance is None else tolerance, sizes, whole, policy)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _hosvd(
    tensor: Array, tolerance: Array, sizes: tuple[int, ...], whole: tuple[bool, ...], policy: RankPolicy
) -> TuckerTensor:
    core = tensor.astype(jnp.promote_types(tensor.dtype, jnp.float32))
    bases: list[ModeArray] = [None] * tensor.ndim
    for mode in range(tensor.ndim):
        rows = unfold(core, mode)
        if not whole[mode] and rows.shape[0] > rows.shape[1]:  # a tall unfolding: its row space is all there is
            bases[mode], triangular = jnp.linalg.qr(rows)
            core = fold(triangular, mode, (*core.shape[:mode], rows.shape[1], *core.shape[mode + 1 :]))
    cut = truncate(core, tolerance, capacity=sizes, whole=whole, policy=policy)
    factors = [p if basis is None or p is None else mode_product(p, basis, 0) for basis, p in zip(bases, cut.rotations)]
    return TuckerTensor(cut.core.astype(tensor.dtype), tuple(factors))
