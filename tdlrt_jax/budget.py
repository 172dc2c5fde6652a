"""A budget in the place of a tolerance: "reach 95% compression by step s".

What a network may store falls along a schedule. Now and then the singular values of all kernels, those of the augmented cores
just before truncation (line 11 of Algorithm 1), are looked at together, and the one relative tolerance is found at which the
ranks that it asks for fit what may be stored. These ranks are the kernels' upper bounds until the next look. So the layers share
the budget as one tolerance would have them do, and none has to be found by trial.

Or they share it as the loss would have them do (``importance="loss"``): singular values count by what cutting them is expected to
cost the loss for every number that it saves, see :mod:`tdlrt_jax.sensitivity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tdlrt_jax import sensitivity
from tdlrt_jax.arguments import check_integer, check_number
from tdlrt_jax.ranks import RankPolicy, divisors, last_above, max_capacity, per_mode, tails
from tdlrt_jax.tucker import (
    HIGHEST,
    ModeArray,
    TuckerTensor,
    active_rank,
    check_kernel,
    kernel_shape,
    magnitude,
    parameter_count,
    unfold,
)

__all__ = ["Budget", "BudgetState", "Plan", "allowed", "fit_ranks", "initial_state", "mode_energies", "plan_budget"]

# The tolerance is searched between these. Under the first, float32 no longer tells directions from rounding; at the second the
# share of each mode is the whole kernel, up to nine modes, so that nothing stays but the least ranks.
_SMALLEST, _LARGEST = 1e-4, 3.0
_SMALLEST_WEIGHTED = 1e-7  # what the loss hardly depends on weighs that much less
_HALVINGS = 24


@dataclass(frozen=True)
class Budget:
    """What to reach, and by when; given to ``tdlrt(..., tolerance=Budget(...))``.

    What may be stored falls from what the kernels start with, ``c_0``, to the target ``c_T`` as
    ``c_T + (c_0 - c_T) (1 - t)^power``, ``t`` from 0 at step ``start`` to 1 at step ``steps``: fast at first, while much can
    still be learned anew. After that it stays, and ranks only move between layers.

    Args:
      compression: ``1 - c / f`` to reach, in (0, 1): ``c`` numbers stored in place of ``f``.
      steps: training steps by which it is reached.
      start: steps before it begins to fall.
      of: what is counted: ``"kernels"``, the Tucker kernels (the paper's rate, where those are the convolutions), or
        ``"all"``, every parameter, so that kernels make up for the layers left dense.
      every: adaptive steps between two looks at the singular values.
      power: of the schedule; 1 for a straight line.
      importance: what decides between layers. ``"error"``: all kernels have the same relative error (the paper's tolerance,
        by the policy's criterion). ``"loss"``: the least expected rise of the loss for what is stored, from the scatter of
        the gradients of batches, see :mod:`tdlrt_jax.sensitivity`; directions are compared one by one, as
        ``criterion="each"`` does, and the tolerance that the state shows is that of the mode that counts most.

    Raises:
      ValueError: for values that cannot work.

    Example:
      >>> Budget(0.95, steps=1000).compression
      0.95

    Source: section 3.1 (the tolerance); the schedule is that of Zhu and Gupta (2017) for pruning.
    """

    compression: float
    steps: int
    start: int = 0
    of: Literal["kernels", "all"] = "kernels"
    every: int = 10
    power: float = 3.0
    importance: Literal["error", "loss"] = "error"

    def __post_init__(self) -> None:
        rate = check_number("compression", self.compression, "a fraction between 0 and 1")
        if not 0 < rate < 1:
            raise ValueError(
                f"compression={self.compression}: expected a fraction between 0 and 1, 0.95 to store a twentieth"
            )
        check_integer("steps", self.steps, 1, "a number of steps")
        check_integer("start", self.start, 0, "a number of steps")
        if not self.start < self.steps:
            raise ValueError(f"start={self.start}, steps={self.steps}: expected 0 <= start < steps")
        if self.of not in ("kernels", "all"):
            raise ValueError(f"of={self.of!r} is unknown: expected 'kernels' or 'all'")
        check_integer("every", self.every, 1, "a number of adaptive steps")
        if not check_number("power", self.power, "a positive number") > 0:
            raise ValueError(f"power={self.power} must be positive")
        if self.importance not in ("error", "loss"):
            raise ValueError(f"importance={self.importance!r} is unknown: expected 'error' or 'loss'")


class BudgetState(NamedTuple):
    """What a budget remembers between its looks."""

    start: Array  # float32 scalar, numbers stored in the kernels at the beginning
    ceiling: dict[str, Array]  # int32 (d,) a kernel, ranks not to exceed
    look: Array  # int32, the step of the last look
    sensitivity: Any = ()  # a tdlrt_jax.sensitivity.Sensitivity where the loss decides


class Plan(NamedTuple):
    """A kernel as the budget sees it; static and hashable."""

    shape: tuple[int, ...]
    capacity: tuple[int, ...]
    whole: tuple[bool, ...]
    policy: RankPolicy
    tolerance: float | None = None  # the kernel's own, which the search leaves alone


def plan_budget(kernel: TuckerTensor, policy: RankPolicy, tolerance: float | None = None) -> Plan:
    """The :class:`Plan` of a kernel."""
    check_kernel(kernel)
    whole = tuple(factor is None for factor in kernel.factors)
    return Plan(kernel_shape(kernel), tuple(kernel.core.shape), whole, policy, tolerance)


def initial_state(
    budget: Budget, params: Any, kernels: Mapping[str, TuckerTensor], plans: Sequence[Plan]
) -> BudgetState:
    """The state at the start; raises ``ValueError`` for a budget that the least possible ranks exceed, naming the kernels."""
    least = {}
    for name, plan in zip(kernels, plans):
        lows = per_mode(plan.policy.min_rank, len(plan.shape), "min_rank")
        lowest = [n if w else min(max(low, plan.policy.spare), n) for n, low, w in zip(plan.shape, lows, plan.whole)]
        least[name] = parameter_count(plan.shape, lowest, plan.whole)
    target = _target(budget, params, plans)
    if sum(least.values()) > target:
        most = sorted(least, key=lambda name: -least[name])[:3]
        listed = ", ".join(f"{name!r} ({least[name]:,})" for name in most)
        raise ValueError(
            f"compression={budget.compression} of {budget.of!r} leaves {max(target, 0):,.0f} numbers for the kernels, but their "
            f"least ranks need {sum(least.values()):,}, most of it {listed}: ask for less compression, lower min_rank or spare, "
            'give these kernels fewer whole modes, or make more layers Tucker layers if of="all"'
        )
    ranks = [active_rank(kernel).astype(jnp.float32) for kernel in kernels.values()]
    start = _add([_count(plan, rank) for plan, rank in zip(plans, ranks, strict=True)])
    measured = (
        sensitivity.start(list(kernels), [len(plan.shape) for plan in plans]) if budget.importance == "loss" else ()
    )
    ceiling = {name: jnp.array(plan.shape, jnp.int32) for name, plan in zip(kernels, plans)}
    return BudgetState(start, ceiling, jnp.zeros((), jnp.int32), measured)


def allowed(budget: Budget, state: BudgetState, params: Any, plans: Sequence[Plan], step: Array) -> Array:
    """Numbers that the kernels may store at a step, a float32 scalar."""
    target = _target(budget, params, plans)
    t = jnp.clip((step - budget.start) / (budget.steps - budget.start), 0, 1).astype(jnp.float32)
    return target + (state.start - target) * (1 - t) ** budget.power


def mode_energies(core: Array) -> tuple[Array, ...]:
    """Squared singular values of every unfolding of a core, descending, relative to ``||C||^2``: ``(M_i,)`` each.

    From the Gram matrices, so they are good to rounding of the largest: enough to share a budget.
    """
    core = core.astype(jnp.promote_types(core.dtype, jnp.float32))
    core = core / magnitude(core)
    norm = jnp.linalg.norm(core)
    core = core / jnp.where(norm > 0, norm, 1)

    def energies(mode: int) -> Array:
        rows = unfold(core, mode)
        return jnp.maximum(jnp.linalg.eigvalsh(jnp.matmul(rows, rows.T, precision=HIGHEST))[::-1], 0)

    return tuple(energies(mode) for mode in range(core.ndim))


def fit_ranks(
    energies: Sequence[tuple[Array, ...]],
    exists: Sequence[tuple[ModeArray, ...]],
    plans: Sequence[Plan],
    limit: Array,
    weights: Sequence[Array] | None = None,
) -> tuple[list[Array], Array]:
    """The ranks of one common tolerance, the smallest at which the kernels store no more than ``limit`` numbers.

    Args:
      energies: of :func:`mode_energies`, one tuple a kernel.
      exists: per kernel and mode an int32 scalar, how many directions there are; None for a whole mode.
      plans: one a kernel.
      limit: numbers that may be stored in all of them.
      weights: per kernel ``(d,)``, not negative: what energies of its modes' directions count for, each by itself whatever
        the policy's criterion. Kernels with a tolerance of their own are left alone.

    Returns:
      int32 ``(d,)`` a kernel, ranks not to exceed (above the capacity where that is what holds a rank down), and the tolerance.
    """

    modes = _side_by_side(energies, exists, plans, weights)
    smallest = _SMALLEST if weights is None else _SMALLEST_WEIGHTED

    def choose(fits: Array, these: Any, others: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(fits, a, b), these, others)

    def halve(_: int, bracket: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        low, high, best = bracket
        middle = (low + high) / 2
        candidate = _ranks(modes, jnp.exp(middle))
        fits = _stored(modes, candidate[0]) <= limit
        # The ranks are carried and not found again from the tolerance, which in the end is a rounding away from a jump.
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high), choose(fits, candidate, best)

    low, high = jnp.float32(math.log(smallest)), jnp.float32(math.log(_LARGEST))
    _, high, best = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high, _ranks(modes, jnp.exp(high))))
    everything = _ranks(modes, jnp.float32(0))
    fits = _stored(modes, everything[0]) <= limit
    ceilings = choose(fits, everything, best)[1]
    return [ceilings[row, : len(plan.shape)] for row, plan in enumerate(plans)], jnp.where(fits, 0, jnp.exp(high))


class _Modes(NamedTuple):
    """The modes of all kernels side by side, ``(kernels, modes)``: what a search looks at again and again.

    A mode that a kernel of lower order does not have is a whole one of size 1, which stores nothing.
    """

    whole: np.ndarray
    size: np.ndarray  # rows of the factor, 0 where there is none
    capacity: np.ndarray
    spare: np.ndarray
    fixed: np.ndarray  # a tolerance that the search leaves alone, -1 where there is none
    divisor: np.ndarray  # of the tolerance
    rounding: np.ndarray  # of the singular values' precision
    curve: Array  # (kernels, modes, directions): what must not be above the threshold squared; 0 where there is no direction
    known: Array  # int32, directions that are more than rounding
    least: Array  # int32, the bounds; of a whole mode both are its size
    most: Array  # int32


def _side_by_side(
    energies: Sequence[tuple[Array, ...]],
    exists: Sequence[tuple[ModeArray, ...]],
    plans: Sequence[Plan],
    weights: Sequence[Array] | None = None,
) -> _Modes:
    """The modes of the kernels, a kernel a row."""
    orders = [len(plan.shape) for plan in plans]
    length = max(mode.shape[0] for modes in energies for mode in modes)

    def table(of_kernel: Callable[[Plan], Sequence[Any] | Any], missing: Any) -> np.ndarray:
        """One entry a mode, or the same for all of a kernel."""
        rows = [np.broadcast_to(of_kernel(plan), order).tolist() for plan, order in zip(plans, orders)]
        return np.array([row + [missing] * (max(orders) - len(row)) for row in rows])

    def useful(plan: Plan) -> Sequence[int]:
        bounds = per_mode(plan.policy.max_rank, len(plan.shape), "max_rank")
        return max_capacity(plan.shape, [n if bound is None else min(n, bound) for n, bound in zip(plan.shape, bounds)])

    def stack(of_modes: Sequence[Sequence[Any]], missing: Any, kind: Any) -> Array:
        flat = [entry for row in of_modes for entry in [*row, *[missing] * (max(orders) - len(row))]]
        stacked = jnp.stack([jnp.asarray(entry, kind) for entry in flat])
        return stacked.reshape(len(plans), max(orders), *stacked.shape[1:])

    # All padded with zeros, so that their tails are those of the kernels alone.
    kind = jnp.result_type(*(mode for modes in energies for mode in modes))
    padded = [[jnp.pad(mode, (0, length - mode.shape[0])) for mode in modes] for modes in energies]
    values = stack(padded, jnp.zeros(length, kind), kind)
    each = table(lambda plan: plan.policy.criterion == "each", True)
    rounding = np.array([[float(jnp.finfo(modes[0].dtype).eps)] for modes in energies])
    whole = table(lambda plan: plan.whole, True)
    size = table(lambda plan: plan.shape, 1)
    there = stack([[n if v is None else v for n, v in zip(p.shape, e)] for p, e in zip(plans, exists)], 1, jnp.int32)
    most = jnp.where(whole, size, jnp.minimum(there, table(useful, 1)))
    lows = table(lambda plan: per_mode(plan.policy.min_rank, len(plan.shape), "min_rank"), 1)
    curve = jnp.where(each[..., None], values, tails(values))
    divisor = table(lambda plan: divisors(plan.whole, plan.policy), 1.0)
    fixed = table(lambda plan: -1.0 if plan.tolerance is None else plan.tolerance, -1.0)
    if weights is not None:
        free = (fixed < 0) & ~whole & np.isfinite(divisor)
        rows = jnp.where(free, stack([list(row) for row in weights], 0, jnp.float32), 0)
        # At most one, so that the largest tolerance still cuts everything.
        largest = jnp.max(rows)
        rows = jnp.where(largest > 0, rows / jnp.where(largest > 0, largest, 1), 1).astype(kind)
        curve = jnp.where(free[..., None], values * rows[..., None], curve)
    return _Modes(
        whole=whole,
        size=np.where(whole, 0, size),
        capacity=table(lambda plan: plan.capacity, 1),
        spare=table(lambda plan: plan.policy.spare, 0),
        fixed=fixed,
        divisor=divisor,
        rounding=rounding,
        curve=curve,
        known=last_above(values, ((4 * rounding) ** 2).astype(kind)[..., None]),
        least=jnp.where(whole, size, jnp.minimum(lows, most)),
        most=most,
    )


def _ranks(modes: _Modes, tau: Array) -> tuple[Array, Array]:
    """The ranks at a tolerance, float32 within the capacity; and int32, what they would be without it; ``(kernels, modes)``."""
    threshold = jnp.where(modes.fixed < 0, tau, modes.fixed.astype(np.float32)) / modes.divisor.astype(np.float32)
    limit = threshold**2 * (1 - 100 * modes.rounding).astype(modes.curve.dtype)
    wanted = jnp.minimum(last_above(modes.curve, limit[..., None]) + modes.spare, modes.known)
    free = jnp.clip(wanted, modes.least, modes.most).astype(jnp.float32)
    bounded = _consistent(jnp.where(modes.whole, free, jnp.minimum(free, modes.capacity)), modes.whole)
    unbounded = _consistent(free, modes.whole)
    at_capacity = (bounded == modes.capacity) & (unbounded > bounded)
    return bounded, jnp.where(at_capacity, unbounded, bounded).astype(jnp.int32)


def _consistent(ranks: Array, whole: np.ndarray) -> Array:
    """Lowers ranks to ``r_i <= prod_{j != i} r_j``; whole modes stay."""
    for _ in range(ranks.shape[-1]):
        ranks = jnp.where(whole, ranks, jnp.minimum(ranks, jnp.round(jnp.prod(ranks, -1, keepdims=True) / ranks)))
    return ranks


def _stored(modes: _Modes, ranks: Array) -> Array:
    """Numbers that all kernels store at float32 ranks; each exact up to 2^24."""
    return jnp.sum(jnp.prod(ranks, -1) + jnp.sum(modes.size.astype(np.float32) * ranks, -1))


def _count(plan: Plan, ranks: Array) -> Array:
    """:func:`parameter_count` of float32 ranks; exact up to 2^24."""
    sizes = jnp.array([0 if w else n for n, w in zip(plan.shape, plan.whole)], jnp.float32)
    return jnp.prod(ranks) + jnp.sum(sizes * ranks)


def _add(counts: list[Array]) -> Array:
    return jnp.sum(jnp.stack(counts))


def _target(budget: Budget, params: Any, plans: Sequence[Plan]) -> float:
    """Numbers that the kernels may store in the end."""
    full = sum(math.prod(plan.shape) for plan in plans)
    if budget.of == "kernels":
        return (1 - budget.compression) * full
    kernels = sum(
        math.prod(p.capacity) + sum(n * r for n, r, w in zip(p.shape, p.capacity, p.whole) if not w) for p in plans
    )
    others = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params)) - kernels
    return (1 - budget.compression) * (full + others) - others
