"""Rank choice and HOSVD truncation at static shapes (line 11 of Algorithm 1).

Modes are truncated one after the other. Each is rotated by all eigenvectors of its Gram matrix, a small problem instead of
a wide SVD, and cut on the energies of the rotated slices: these are sums of squares of numbers actually stored, so they are
accurate far below the square root of the machine precision at which the Gram matrix's eigenvalues end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from tdlrt_jax.tucker import HIGHEST, ModeArray, TuckerTensor, fold, mode_product, unfold

__all__ = ["RankPolicy", "Truncated", "hosvd", "max_capacity", "truncate"]

Criterion = Literal["tail", "each"]
Convention = Literal["shared", "per_mode", "absolute"]
CRITERIA = ("tail", "each")
CONVENTIONS = ("shared", "per_mode", "absolute")

# Below this tolerance one round of eigenvectors no longer separates the directions near the cut in float32.
REFINE_BELOW = 1e-3
ALL_ROUNDS = 4


class RankPolicy(NamedTuple):
    """How a tolerance becomes ranks. Static (hashable); one a kernel.

    criterion: ``"tail"`` drops the largest tail whose norm is within the threshold (the paper); ``"each"`` drops every singular
      value under the threshold, which is idempotent: repeated truncation of the same kernel changes nothing.
    convention: the threshold of one mode. ``"shared"``: ``tau ||C|| / sqrt(m)`` over the ``m`` modes that are not whole, so that
      the whole relative error is at most ``tau``; ``"per_mode"``: ``tau ||C||``; ``"absolute"``: ``tau / sqrt(m)``. A matrix is
      truncated once, with the whole ``tau``.
    spare: directions kept beyond what the tolerance asks for.
    min_rank, max_rank: bounds, one for all modes or one a mode; a bound wins over the tolerance.
    """

    criterion: Criterion = "tail"
    convention: Convention = "shared"
    spare: int = 0
    min_rank: int | tuple[int, ...] = 1
    max_rank: int | tuple[int, ...] | None = None


DEFAULT_POLICY = RankPolicy()


class Truncated(NamedTuple):
    """A truncated core and how it came about: ``core = C ×_i P_i^T`` and ``||C - core ×_i P_i|| = error ||C||``."""

    core: Array  # (R_1, ..., R_d), zero beyond the ranks
    rotations: tuple[ModeArray, ...]  # P_i, (m_i, R_i) with orthonormal columns up to the rank; None for a whole mode
    rank: Array  # int32 (d,)
    error: Array  # scalar, relative to ||C||
    bound: Array  # bool (d,): a max_rank or the capacity kept the rank below what tolerance and ceiling ask for


def check_policy(policy: RankPolicy, order: int) -> None:
    """Raises ``ValueError`` for options that cannot work on a kernel of the given order."""
    if policy.criterion not in CRITERIA:
        raise ValueError(f"criterion={policy.criterion!r} is unknown: expected one of {CRITERIA}")
    if policy.convention not in CONVENTIONS:
        raise ValueError(f"convention={policy.convention!r} is unknown: expected one of {CONVENTIONS}")
    if policy.spare < 0:
        raise ValueError(f"spare={policy.spare} must be a number of directions, 0 or more")
    lows, highs = per_mode(policy.min_rank, order, "min_rank"), per_mode(policy.max_rank, order, "max_rank")
    for mode, (low, high) in enumerate(zip(lows, highs)):
        if low < 1:
            raise ValueError(f"min_rank={low} for mode {mode}: a rank is at least 1")
        if high is not None and high < low:
            raise ValueError(f"max_rank={high} for mode {mode} is below its min_rank={low}")


def check_tolerance(tolerance: float, convention: Convention = "shared") -> None:
    """Raises ``ValueError`` unless ``tolerance`` is a usable number for the convention."""
    if not math.isfinite(tolerance) or tolerance < 0:
        raise ValueError(f"tolerance={tolerance}: expected a finite number, 0 (keep everything) or more")
    if convention != "absolute" and tolerance >= 1:
        raise ValueError(
            f"tolerance={tolerance}: a relative tolerance is below 1 (1 would drop the whole kernel); "
            'for a threshold in the units of the kernel use convention="absolute"'
        )


def per_mode(bound: int | Sequence[int] | None, order: int, name: str) -> tuple:
    """A bound as a tuple with one entry a mode."""
    if bound is None or isinstance(bound, int):
        return (bound,) * order
    if len(bound) != order:
        raise ValueError(f"{name}={tuple(bound)} has {len(bound)} entries for a kernel with {order} modes")
    return tuple(bound)


def max_capacity(shape: Sequence[int], rank: Sequence[int] | None = None) -> tuple[int, ...]:
    """The largest useful ranks: ``R_i <= min(n_i, prod_{j != i} R_j)``, starting from ``rank`` (default: the shape).

    Example:
      >>> max_capacity((3, 3, 1, 64))
      (3, 3, 1, 9)
    """
    sizes = [min(n, r) for n, r in zip(shape, rank or shape)]
    for _ in sizes:  # a bound that falls can lower the others, at most once a mode
        sizes = [min(size, math.prod(sizes[:mode] + sizes[mode + 1 :])) for mode, size in enumerate(sizes)]
    return tuple(sizes)


def thresholds(tolerance: Array, norm: Array, whole: Sequence[bool], policy: RankPolicy) -> list[Array]:
    """The threshold of each mode, relative to ``||C||``; a matrix spends everything on its first mode."""
    if policy.convention == "absolute":
        tolerance = tolerance / norm
    compressed = [mode for mode, is_whole in enumerate(whole) if not is_whole]
    if len(whole) == 2 and len(compressed) == 2:
        return [tolerance, jnp.zeros_like(tolerance)]
    if policy.convention != "per_mode":
        tolerance = tolerance / math.sqrt(max(len(compressed), 1))
    return [tolerance] * len(whole)


def choose_rank(energies: Array, threshold: Array, policy: RankPolicy) -> Array:
    """How many of the slice energies (of a core of norm 1, descending to rounding) to keep, before bounds: an int32 scalar.

    ``tail``: the smallest r with ``sum_{j >= r} e_j <= threshold^2``. ``each``: the smallest r with all ``e_j <= threshold^2``
    from r on. Slices below the rounding of the core's norm are noise and always go; ``spare`` more of the others stay.
    """
    eps = jnp.finfo(energies.dtype).eps
    limit = threshold**2 * (1 - 100 * eps)
    kept = energies if policy.criterion == "each" else jnp.cumsum(energies[::-1])[::-1]
    return jnp.minimum(_last_above(kept, limit) + policy.spare, _last_above(energies, (4 * eps) ** 2))


def _last_above(values: Array, limit: ArrayLike) -> Array:
    """One more than the last index at which ``values > limit``, 0 if there is none."""
    return jnp.max(jnp.where(values > limit, jnp.arange(1, values.shape[0] + 1), 0)).astype(jnp.int32)


def principal_rotation(matrix: Array, valid: Array, rounds: Array | int) -> tuple[Array, Array, Array]:
    """All left principal directions of a matrix, by descending energy.

    The Gram matrix is only good to ``eps`` of its norm, so a direction of relative size ``s`` leaks ``eps / s`` into the smaller
    ones. In every further round the rows under a tenth of the largest so far are rotated again by the eigenvectors of their own
    Gram matrix; after :data:`ALL_ROUNDS` all directions are separated to rounding.

    Args:
      matrix: ``(m, k)``, of norm 1 at most; zero in rows that are not valid.
      valid: ``(m,)`` booleans, the directions that exist.
      rounds: how many to do, possibly traced; fewer are done where nothing small is left.

    Returns:
      ``V`` ``(m, m)``, with orthonormal columns for the valid directions, then zero ones; ``V^T matrix``; and the energies of its
      rows, ``(m,)``.
    """
    size = matrix.shape[0]
    index = jnp.arange(size)

    def rotate(carry: tuple) -> tuple:
        round_, vectors, rows, selected, exists = carry
        largest = jnp.max(jnp.where(selected[:, None], jnp.abs(rows), 0))
        chosen = jnp.where(selected[:, None], rows, 0) / jnp.where(largest > 0, largest, 1)
        # In descending order: rows that keep their place, the selected ones by energy, those that do not exist.
        place = jnp.where(selected, 0.0, jnp.where(exists, 2.0 * matrix.size, -1.0)).astype(rows.dtype)
        _, turn = jnp.linalg.eigh(jnp.matmul(chosen, chosen.T, precision=HIGHEST) + jnp.diag(place))
        before = jnp.sum(exists & ~selected)
        columns = (index >= before) & (index < before + jnp.sum(selected))
        turn = jnp.where(selected[:, None] & columns, turn[:, ::-1], 0) + jnp.diag(
            (exists & ~selected).astype(rows.dtype)
        )
        rows = jnp.matmul(turn.T, rows, precision=HIGHEST)
        exists = index < jnp.sum(exists)
        energies = jnp.sum(rows**2, axis=1)
        leading = jnp.max(jnp.where(columns, energies, 0))
        small = exists & (jnp.cumsum(columns & (energies < 1e-2 * leading)) > 0)
        return round_ + 1, jnp.matmul(vectors, turn, precision=HIGHEST), rows, small, exists

    start = (jnp.zeros((), jnp.int32), jnp.eye(size, dtype=matrix.dtype), matrix, valid, valid)

    def unfinished(carry: tuple) -> Array:
        return (carry[0] < rounds) & jnp.any(carry[3])

    _, vectors, rows, _, _ = jax.lax.while_loop(unfinished, rotate, start)
    return vectors, rows, jnp.sum(rows**2, axis=1)


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

    Returns:
      A :class:`Truncated`.

    Source: the rounding task of section 3.1, line 11 of Algorithm 1.
    """
    order = core.ndim
    whole = whole or (False,) * order
    sizes = tuple(min(m, c) for m, c in zip(core.shape, capacity or core.shape))
    lows, highs = per_mode(policy.min_rank, order, "min_rank"), per_mode(policy.max_rank, order, "max_rank")
    dtype = jnp.promote_types(core.dtype, jnp.float32)
    tolerance = jnp.asarray(tolerance, dtype)

    largest = jnp.max(jnp.abs(core)).astype(dtype)
    working = core.astype(dtype) / jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(working)
    working = working / jnp.where(norm > 0, norm, 1)
    limits = thresholds(tolerance, jnp.where(norm > 0, norm * largest, 1), whole, policy)

    rotations: list[ModeArray] = [None] * order
    masks: list[Array] = [
        jnp.ones(m, bool) if valid is None or valid[i] is None else valid[i] for i, m in enumerate(core.shape)
    ]
    # Spare directions lie below the cut, so they need one round more than the tolerance does.
    rounds = jnp.where(tolerance < REFINE_BELOW, ALL_ROUNDS, 2 if policy.spare else 1)
    dropped = jnp.zeros((), dtype)
    bound = [jnp.zeros((), bool)] * order
    for mode in range(order):
        if whole[mode]:
            continue
        v, rows, energies = principal_rotation(unfold(working, mode), masks[mode], rounds)
        wanted = choose_rank(energies, limits[mode], policy)
        others = math.prod([sizes[j] if j < mode else core.shape[j] for j in range(order) if j != mode])
        low = jnp.maximum(lows[mode], 0 if floor is None else floor[mode])
        high = jnp.minimum(jnp.sum(masks[mode], dtype=jnp.int32), min(sizes[mode], others))
        high = high if highs[mode] is None else jnp.minimum(high, highs[mode])
        if ceiling is not None:
            wanted, high = jnp.minimum(wanted, ceiling[mode]), jnp.minimum(high, ceiling[mode])
        rank = jnp.maximum(jnp.clip(wanted, low, jnp.maximum(high, low)), 1)
        rank = jnp.minimum(rank, jnp.maximum(high, 1))
        bound[mode] = wanted > rank
        keep = jnp.arange(core.shape[mode]) < rank
        dropped = dropped + jnp.sum(jnp.where(keep, 0, energies))
        keep = keep[: sizes[mode]]
        rotations[mode] = jnp.where(keep, v[:, : sizes[mode]], 0)
        shape = (*working.shape[:mode], sizes[mode], *working.shape[mode + 1 :])
        working = fold(jnp.where(keep[:, None], rows[: sizes[mode]], 0), mode, shape)
        masks[mode] = keep

    working, rotations, masks = _make_ranks_consistent(working, rotations, masks, whole)
    ranks = jnp.stack([jnp.sum(mask, dtype=jnp.int32) for mask in masks])
    scale = jnp.where(norm > 0, norm, 1) * jnp.where(largest > 0, largest, 1)
    return Truncated((working * scale).astype(core.dtype), tuple(rotations), ranks, jnp.sqrt(dropped), jnp.stack(bound))


def _make_ranks_consistent(
    core: Array, rotations: list[ModeArray], masks: list[Array], whole: Sequence[bool]
) -> tuple[Array, list[ModeArray], list[Array]]:
    """Removes exactly dependent slices: a rank never exceeds the product of the others, ``r_i <= prod_{j != i} r_j``.

    Cutting a later mode can leave an earlier one with more slices than its unfolding has columns.
    """
    order = core.ndim

    def limit(masks: list[Array], mode: int) -> Array:
        ranks = [jnp.sum(mask).astype(jnp.float32) for mask in masks]
        others = math.prod(ranks[:mode] + ranks[mode + 1 :], start=jnp.ones((), jnp.float32))
        return jnp.minimum(others, core.shape[mode]).astype(jnp.int32)

    def inconsistent(carry: tuple) -> Array:
        masks = carry[2]
        violated = [jnp.sum(masks[mode]) > limit(masks, mode) for mode in range(order) if not whole[mode]]
        return jnp.any(jnp.stack(violated)) if violated else jnp.zeros((), bool)

    def sweep(carry: tuple) -> tuple:
        core, rotations, masks = carry[0], list(carry[1]), list(carry[2])
        for mode in range(order):
            if whole[mode]:
                continue
            v, rows, _ = principal_rotation(unfold(core, mode), masks[mode], ALL_ROUNDS)
            keep = jnp.arange(core.shape[mode]) < jnp.minimum(limit(masks, mode), jnp.sum(masks[mode]))
            rotations[mode] = jnp.matmul(rotations[mode], jnp.where(keep, v, 0), precision=HIGHEST)
            core = fold(jnp.where(keep[:, None], rows, 0), mode, core.shape)
            masks[mode] = keep
        return core, tuple(rotations), masks

    core, fixed, masks = jax.lax.while_loop(inconsistent, sweep, (core, tuple(rotations), masks))
    return core, list(fixed), masks


def hosvd(
    tensor: Array,
    *,
    rank: Sequence[int | None] | int | None = None,
    tolerance: float | None = None,
    criterion: Criterion = "tail",
    convention: Convention = "shared",
) -> TuckerTensor:
    """The Tucker decomposition of a full tensor by sequential HOSVD.

    Args:
      tensor: ``(n_1, ..., n_d)``, floating, d >= 2.
      rank: static capacities of the result, one for all modes (clipped to each) or one a mode; ``None`` entries leave a mode
        whole. Default: lossless.
      tolerance: ``tau``; the active ranks are the smallest with a relative error within it. The arrays keep the capacities
        (``tdlrt_jax.resize`` cuts them), so this runs under ``jit``.
      criterion, convention: what the tolerance means, see :class:`RankPolicy`.

    Returns:
      A :class:`TuckerTensor` with orthonormal factors; capacities are lowered to ``R_i <= prod_{j != i} R_j``.

    Raises:
      ValueError: for a rank outside ``1..n_i``, a tolerance that is not usable, or a tensor that is not floating.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> kernel = hosvd(jnp.outer(jnp.arange(1.0, 4.0), jnp.ones(5)), tolerance=0.01)
      >>> kernel.core.shape, tdlrt_jax.active_rank(kernel).tolist()
      ((3, 3), [1, 1])

    Source: section 2.1; Kolda & Bader (2009) for the truncated HOSVD, used sequentially.
    """
    tensor = jnp.asarray(tensor)
    sizes, whole = check_ranks(rank, tensor.shape)
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"tensor has dtype {tensor.dtype}: a Tucker kernel is floating, convert it first")
    if tolerance is not None:
        check_tolerance(tolerance, convention)
    policy = RankPolicy(criterion, convention, min_rank=1 if tolerance is not None else sizes)
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
    return TuckerTensor(
        cut.core.astype(tensor.dtype), tuple(f if f is None else f.astype(tensor.dtype) for f in factors)
    )


def check_ranks(
    rank: Sequence[int | None] | int | None, shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Capacities and whole modes for a requested rank; raises ``ValueError`` naming the mode that does not fit."""
    if len(shape) < 2:
        raise ValueError(f"a Tucker kernel has at least two modes, got shape {tuple(shape)}")
    if rank is None or isinstance(rank, int):
        if rank is not None and rank < 1:
            raise ValueError(f"rank={rank}: a rank is at least 1")
        ranks: list[int | None] = [n if rank is None else min(rank, n) for n in shape]
    else:
        ranks = list(rank)
    if len(ranks) != len(shape):
        raise ValueError(f"rank={tuple(ranks)} has {len(ranks)} entries for a kernel of shape {tuple(shape)}")
    for mode, (r, n) in enumerate(zip(ranks, shape)):
        if r is not None and not 1 <= r <= n:
            raise ValueError(f"rank {r} of mode {mode} is outside 1..{n} (kernel shape {tuple(shape)})")
    whole = tuple(r is None for r in ranks)
    sizes = max_capacity(shape, [n if r is None else r for r, n in zip(ranks, shape)])
    return tuple(n if w else s for n, s, w in zip(shape, sizes, whole)), whole
