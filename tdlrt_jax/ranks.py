"""How a tolerance becomes ranks: the policy, what ranks a tensor can have, and where a mode's singular values are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from tdlrt_jax.arguments import check_integer, check_integers, check_number, check_shape, shown

__all__ = [
    "RankPolicy",
    "check_policy",
    "check_ranks",
    "check_tolerance",
    "choose_rank",
    "divisors",
    "last_above",
    "max_capacity",
    "per_mode",
    "tails",
    "thresholds",
]

Criterion = Literal["tail", "each"]
Convention = Literal["shared", "per_mode", "absolute"]
Route = Literal["gram", "randomized"]
CRITERIA = ("tail", "each")
CONVENTIONS = ("shared", "per_mode", "absolute")
ROUTES = ("gram", "randomized")


class RankPolicy(NamedTuple):
    """How a tolerance becomes ranks. Static (hashable); one a kernel.

    Args:
      criterion: ``"tail"`` drops the largest tail whose norm is within the threshold (the paper); ``"each"`` drops every singular
        value under the threshold, which for a matrix is idempotent: a second truncation changes nothing. Of more modes, cutting
        one lowers the singular values of the others, so a second truncation may cut a little more.
      convention: the threshold of one mode. ``"shared"``: ``tau ||C|| / sqrt(m)`` over the ``m`` modes that are not whole, so
        that with ``"tail"`` the whole relative error is at most ``tau``; ``"per_mode"``: ``tau ||C||``; ``"absolute"``:
        ``tau / sqrt(m)``. A matrix is truncated once, with the whole ``tau``.
      spare: directions kept beyond what the tolerance asks for.
      min_rank, max_rank: bounds, one for all modes or one a mode; a bound wins over the tolerance.
      route: ``"gram"`` rotates by all directions of a mode; ``"randomized"`` only by those of a random sketch of it, where that
        is expected to be cheaper: where the capacity is well below the mode's size. The augmented core of a step is only twice as
        large, and of these only large matrices' are sketched. Reported errors are exact and count what a sketch lost, so the
        tolerance holds all the same. Ranks are those of ``"gram"`` unless a tail is within 1% of its threshold (in norm) or the
        capacity holds them down; in that case the error may be somewhat above the least.
    """

    criterion: Criterion = "tail"
    convention: Convention = "shared"
    spare: int = 0
    min_rank: int | tuple[int, ...] = 1
    max_rank: int | tuple[int, ...] | None = None
    route: Route = "gram"


DEFAULT_POLICY = RankPolicy()


def check_policy(policy: RankPolicy, order: int) -> None:
    """Raises ``ValueError`` for options that cannot work on a kernel of the given order."""
    if not isinstance(policy, RankPolicy):
        raise ValueError(f"policy={shown(policy)}: expected a RankPolicy")
    if policy.criterion not in CRITERIA:
        raise ValueError(f"criterion={policy.criterion!r} is unknown: expected one of {CRITERIA}")
    if policy.convention not in CONVENTIONS:
        raise ValueError(f"convention={policy.convention!r} is unknown: expected one of {CONVENTIONS}")
    if policy.route not in ROUTES:
        raise ValueError(f"route={policy.route!r} is unknown: expected one of {ROUTES}")
    check_integer("spare", policy.spare, 0, "a number of directions")
    lows, highs = per_mode(policy.min_rank, order, "min_rank"), per_mode(policy.max_rank, order, "max_rank")
    for mode, (low, high) in enumerate(zip(lows, highs)):
        if not is_count(low) or low < 1:
            raise ValueError(f"min_rank={shown(low)} for mode {mode}: a rank is at least 1, an integer")
        if high is not None and not is_count(high):
            raise ValueError(f"max_rank={shown(high)} for mode {mode}: expected an integer, or None for no bound")
        if high is not None and high < low:
            raise ValueError(f"max_rank={high} for mode {mode} is below its min_rank={low}: it must be at least that")


def check_tolerance(tolerance: float, convention: Convention = "shared") -> None:
    """Raises ``ValueError`` unless ``tolerance`` is a usable number for the convention."""
    tolerance = check_number("tolerance", tolerance, "a number, 0 (keep everything) or more")
    if not math.isfinite(tolerance) or tolerance < 0:
        raise ValueError(f"tolerance={tolerance}: expected a finite number, 0 (keep everything) or more")
    if convention != "absolute" and tolerance >= 1:
        raise ValueError(
            f"tolerance={tolerance}: a relative tolerance is below 1 (1 would drop the whole kernel); "
            'for a threshold in the units of the kernel use convention="absolute"'
        )


def check_ranks(
    rank: Sequence[int | None] | int | None, shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Capacities and whole modes for a requested rank; raises ``ValueError`` naming the mode that does not fit."""
    shape = check_shape(shape)
    if rank is None or is_count(rank):
        if rank is not None and int(rank) < 1:  # type: ignore[arg-type]
            raise ValueError(f"rank={rank}: a rank is at least 1")
        ranks: list[int | None] = [n if rank is None else min(int(rank), n) for n in shape]  # type: ignore[arg-type]
    else:
        ranks = one_a_mode("rank", rank, len(shape), f"for a kernel of shape {shape}")
    for mode, (r, n) in enumerate(zip(ranks, shape)):
        if r is not None and not (is_count(r) and 1 <= r <= n):
            raise ValueError(f"rank={r!r} of mode {mode}: expected a count in 1..{n}, or None (kernel shape {shape})")
    whole = tuple(r is None for r in ranks)
    sizes = max_capacity(shape, [n if r is None else r for r, n in zip(ranks, shape)])
    return tuple(n if w else s for n, s, w in zip(shape, sizes, whole)), whole


def per_mode(bound: int | Sequence[int] | None, order: int, name: str) -> tuple:
    """A bound as a tuple with one entry a mode."""
    if bound is None or is_count(bound):
        return (bound,) * order
    return tuple(one_a_mode(name, bound, order, f"for a kernel with {order} modes"))


def is_count(value: Any) -> bool:
    """Whether a value is an integer, NumPy's too; a boolean is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def one_a_mode(name: str, value: Any, order: int, where: str) -> list[Any]:
    """A sequence as long as there are modes; raises ``ValueError`` naming the argument."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        raise ValueError(f"{name}={shown(value)}: expected an integer, or one a mode {where}")
    if len(value) != order:
        raise ValueError(f"{name}={tuple(value)} has {len(value)} entries {where}: expected one number, or one a mode")
    return list(value)


def max_capacity(shape: Sequence[int], rank: Sequence[int] | None = None) -> tuple[int, ...]:
    """The largest useful ranks: ``R_i <= min(n_i, prod_{j != i} R_j)``, starting from ``rank`` (default: the shape).

    Example:
      >>> max_capacity((3, 3, 1, 64))
      (3, 3, 1, 9)
    """
    shape = check_integers("shape", shape, 1, what="sizes, one a mode")
    rank = shape if rank is None else check_integers("rank", rank, 1, len(shape), "ranks, one a mode")
    sizes = [min(n, r) for n, r in zip(shape, rank)]
    for _ in sizes:  # a bound that falls can lower the others, at most once a mode
        sizes = [min(size, math.prod(sizes[:mode] + sizes[mode + 1 :])) for mode, size in enumerate(sizes)]
    return tuple(sizes)


def thresholds(tolerance: Array, norm: Array, whole: Sequence[bool], policy: RankPolicy) -> list[Array]:
    """The threshold of each mode, relative to ``||C||``."""
    if policy.convention == "absolute":
        tolerance = tolerance / norm
    return [tolerance / divisor for divisor in divisors(whole, policy)]


def divisors(whole: Sequence[bool], policy: RankPolicy) -> list[float]:
    """By what the tolerance is divided in each mode; a matrix spends everything on its first one."""
    compressed = len(whole) - sum(whole)
    if len(whole) == compressed == 2:
        return [1.0, math.inf]
    return [1.0 if policy.convention == "per_mode" else math.sqrt(max(compressed, 1))] * len(whole)


def choose_rank(energies: Array, threshold: Array, policy: RankPolicy, lost: ArrayLike = 0) -> Array:
    """How many of the slice energies (of a core of norm 1, descending to rounding) to keep, before bounds: an int32 scalar.

    ``tail``: the smallest r with ``sum_{j >= r} e_j <= threshold^2``. ``each``: the smallest r with all ``e_j <= threshold^2``
    from r on. Slices below the rounding of the core's norm are noise and always go; ``spare`` more of the others stay. ``lost``
    is the energy outside of all slices, part of every tail.
    """
    eps = jnp.finfo(energies.dtype).eps
    limit = threshold**2 * (1 - 100 * eps)
    kept = energies if policy.criterion == "each" else tails(energies) + lost
    return jnp.minimum(last_above(kept, limit) + policy.spare, last_above(energies, (4 * eps) ** 2))


def tails(values: Array) -> Array:
    """``sum_{j >= r} values_j`` for all ``r`` of the last axis. A masked sum, which compiles faster than ``cumsum``."""
    index = jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(index >= index[:, None], values[..., None, :], 0), axis=-1)


def last_above(values: Array, limit: ArrayLike) -> Array:
    """One more than the last index of the last axis at which ``values > limit``, 0 if there is none; int32."""
    index = jnp.arange(1, values.shape[-1] + 1)
    return jnp.max(jnp.where(values > limit, index, 0), axis=-1).astype(jnp.int32)
