"""What decides the ranks of a step: tolerance or budget, policies and rules, warm-up and freezing, put together per kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax import sensitivity
from tdlrt_jax.arguments import check_integer, shown
from tdlrt_jax.batching import map_batched
from tdlrt_jax.budget import Budget, BudgetState, Plan, allowed, fit_ranks, initial_state, mode_energies, plan_budget
from tdlrt_jax.integrators import Galerkin, Truncation
from tdlrt_jax.integrators.bug import existing, stepped_core
from tdlrt_jax.paths import KernelTree, masked_paths
from tdlrt_jax.ranks import RankPolicy, check_policy, check_tolerance, per_mode
from tdlrt_jax.rules import Rule, check_rules_match, layer_path, rule_for
from tdlrt_jax.tucker import TuckerTensor, active_rank

__all__ = ["Bounds", "RankControl"]

Bounds = int | tuple[int, ...] | Mapping[str, int | tuple[int, ...]]


@dataclass(frozen=True)
class RankControl:
    """The options of :func:`tdlrt_jax.tdlrt` that concern ranks; see there."""

    tolerance: float | Callable[[Array], Array] | Budget
    policy: RankPolicy  # of kernels without a rule; its bounds are replaced by the two below
    min_rank: Bounds
    max_rank: Bounds | None
    rules: tuple[tuple[str, Rule], ...]
    warmup: int
    freeze_after: int | None
    adapt_every: int
    adaptive: bool  # whether the integrator changes ranks

    def __post_init__(self) -> None:
        tolerance = self.tolerance
        if isinstance(tolerance, Budget):
            if not self.adaptive:
                raise ValueError(
                    'a Budget moves ranks, which integrator="fixed_rank" does not: use "bug" or "parallel"'
                )
            if self.policy.convention == "absolute":
                raise ValueError('a Budget finds a relative tolerance: leave out convention="absolute"')
        elif not callable(tolerance):
            check_tolerance(tolerance, self.policy.convention)
        check_integer("warmup", self.warmup, 0, "a number of steps")
        check_integer("adapt_every", self.adapt_every, 1, "a number of steps")
        if self.freeze_after is not None:
            check_integer("freeze_after", self.freeze_after, 0, "None or a number of steps")
        for argument, bound in (("min_rank", self.min_rank), ("max_rank", self.max_rank)):
            for pattern in bound if isinstance(bound, Mapping) else ():
                _check_pattern(argument, pattern)
        check_policy(self.policy, 2)

    # At the start.

    def check(self, tree: KernelTree, params: Any) -> None:
        """Raises ``ValueError`` for bounds and rules that do not fit the kernels, naming them."""
        hidden = masked_paths(params)
        if isinstance(self.tolerance, Budget) and self.tolerance.of == "all" and hidden:
            raise ValueError(
                f"Budget(of='all') counts all parameters, and {shown(hidden)} are hidden by optax.partition or masked: put these "
                "inside, tdlrt(optax.partition(...), ...), or use of='kernels'"
            )
        for name, kernel in zip(tree.names, tree.kernels):
            policy = self.policy_of(name, kernel)
            if isinstance(self.tolerance, Budget) and policy.convention == "absolute":
                raise ValueError(
                    f"kernel {name!r}: a Budget compares relative tolerances, its rule has convention='absolute': give the rule "
                    "another convention, and its tolerance relative to the kernel's norm"
                )
        for argument, bound in (("min_rank", self.min_rank), ("max_rank", self.max_rank)):
            for pattern in bound if isinstance(bound, Mapping) else ():
                if not any(re.search(pattern, name) for name in tree.names):
                    raise ValueError(
                        f"{argument}: the pattern {pattern!r} is found in no kernel's path; the paths are {tree.names}"
                    )
        # Rules that tuckerize was given as well may be for layers that another part of a partition moves.
        try:
            check_rules_match(self.rules, dict.fromkeys(layer_path(name) for name in [*tree.node_names, *hidden]))
        except ValueError as error:
            raise ValueError(
                f"{error}. (Leave out rules for layers that a filter, wrt= of nnx.Optimizer, hides.)"
            ) from None

    def initial(self, tree: KernelTree, params: Any) -> tuple[Array, Any]:
        """The first tolerance, and the state of a budget (``()`` without one)."""
        if isinstance(self.tolerance, Budget):
            kernels = dict(zip(tree.names, tree.kernels))
            return jnp.zeros((), jnp.float32), initial_state(self.tolerance, params, kernels, self._plans(tree))
        tau = self.tolerance(jnp.zeros((), jnp.int32)) if callable(self.tolerance) else self.tolerance
        return jnp.array(tau, jnp.float32), ()

    # In a step.

    def tolerance_at(self, step: Array, present: Array) -> Array:
        """The tolerance of a step; the present one, which may have been replaced from outside, unless it is a schedule."""
        if isinstance(self.tolerance, Budget) or not callable(self.tolerance):
            return present
        return jnp.asarray(self.tolerance(step), jnp.float32)

    def truncations(
        self,
        tree: KernelTree,
        params: Any,
        step: Array,
        tolerance: Array,
        budget: Any,
        gradients: list[TuckerTensor],
        points: list[Galerkin],
        increments: list[Array],
    ) -> tuple[list[Truncation], tuple[Any, Array] | None]:
        """One :class:`Truncation` a kernel, and the budget's next state with the tolerance it found."""
        ceilings: list[Array | None] = [None] * len(tree.kernels)
        found = None
        if isinstance(self.tolerance, Budget):
            budget, tolerance = self._spend(tree, params, step, tolerance, budget, gradients, points, increments)
            ceilings = [budget.ceiling[name] for name in tree.names]
            found = (budget, tolerance)
        truncations = []
        highest = jnp.iinfo(jnp.int32).max
        for name, kernel, ceiling, increment in zip(tree.names, tree.kernels, ceilings, increments):
            rank = active_rank(kernel)
            warming = step < self.warmup
            floor = jnp.where(warming, rank, 0)
            if ceiling is not None:
                ceiling = jnp.where(warming, jnp.maximum(ceiling, rank), ceiling)
            if self.freeze_after is not None:
                frozen = step >= self.freeze_after
                floor = jnp.where(frozen, rank, floor)
                ceiling = jnp.where(frozen, rank, highest if ceiling is None else ceiling)
            own = self._rule(name).tolerance
            if found is None or own is not None:  # what a budget asks for it asks of all kernels but those
                # What does not move is not truncated: a layer that is frozen inside (optax.set_to_zero, stop_gradient) stays.
                still = ~jnp.any(increment != 0)
                floor = jnp.where(still, rank, floor)
                ceiling = jnp.where(still, rank, highest if ceiling is None else ceiling)
            tau = (jnp.zeros_like(tolerance) if found else tolerance) if own is None else jnp.float32(own)
            policy = self.policy_of(name, kernel)
            # A new sketch every step: cores depend on the earlier ones, and a resumed run draws what it would have drawn.
            number = step if policy.route == "randomized" else None
            truncations.append(Truncation(tau, policy, floor, ceiling, number))
        return truncations, found

    def _spend(
        self,
        tree: KernelTree,
        params: Any,
        step: Array,
        tolerance: Array,
        state: BudgetState,
        gradients: list[TuckerTensor],
        points: list[Galerkin],
        increments: list[Array],
    ) -> tuple[BudgetState, Array]:
        """Looks at the singular values if it is time, and sets the ceilings anew."""
        budget, plans = self.tolerance, self._plans(tree)
        assert isinstance(budget, Budget)
        period = budget.every * self.adapt_every
        apart = tree.whole_sizes
        if budget.importance == "loss":
            cores = [grad.core for grad in gradients]
            measured = map_batched(sensitivity.measure, tree.kernels, cores, apart=apart)
            state = state._replace(sensitivity=sensitivity.average(state.sensitivity, dict(zip(tree.names, measured))))

        def look() -> tuple[BudgetState, Array]:
            energies = map_batched(
                lambda point, increment: mode_energies(stepped_core(point, increment)), points, increments, apart=apart
            )
            exists = [tuple(None if v is None else jnp.sum(v, dtype=jnp.int32) for v in existing(p)) for p in points]
            # The ceilings hold until the next look: what is allowed then must fit already.
            limit = allowed(budget, state, params, plans, step + period)
            weights = self._weights(tree, plans, state) if budget.importance == "loss" else None
            ranks, tau = fit_ranks(energies, exists, plans, limit, weights)
            return state._replace(ceiling=dict(zip(tree.names, ranks)), look=step), tau

        # Not by the number of the step: a caller who takes one whole step in ten goes on counting where one is left out.
        due = (step - state.look >= period) | (step == 0)
        if self.freeze_after is not None:
            due = due & (step < self.freeze_after)
        return jax.lax.cond(due, look, lambda: (state, tolerance))

    def _weights(self, tree: KernelTree, plans: list[Plan], state: BudgetState) -> list[Array]:
        """What the loss has to do with a mode's energies, for every number that cutting them saves."""
        found = sensitivity.known(state.sensitivity)
        return [
            found[name] / sensitivity.cost_per_rank(plan.shape, active_rank(kernel), plan.whole)
            for name, kernel, plan in zip(tree.names, tree.kernels, plans)
        ]

    # Per kernel.

    def policy_of(self, name: str, kernel: TuckerTensor) -> RankPolicy:
        """The policy of a kernel: its rule's, and for what that leaves open the optimizer's."""
        order = len(kernel.factors)
        low, high = _bound(self.min_rank, name, 1), _bound(self.max_rank, name, None)
        try:
            policy = self.policy._replace(
                min_rank=per_mode(low, order, "min_rank"), max_rank=per_mode(high, order, "max_rank")
            )
            policy = self._rule(name).policy(order, policy)
            check_policy(policy, order)
        except ValueError as error:
            raise ValueError(f"kernel {name!r}: {error}") from None
        return policy

    def _rule(self, name: str) -> Rule:
        return rule_for(self.rules, layer_path(name)) or Rule()

    def _plans(self, tree: KernelTree) -> list[Plan]:
        return [
            plan_budget(kernel, self.policy_of(name, kernel), self._rule(name).tolerance)
            for name, kernel in zip(tree.names, tree.kernels)
        ]


def _check_pattern(argument: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{argument}: the pattern {pattern!r} must be a regular expression on kernels' paths ({error})"
        ) from None


def _bound(bound: Bounds | None, name: str, default: int | None) -> int | tuple[int, ...] | None:
    """The bound of one kernel: the first pattern that is found in its path, for a mapping."""
    if not isinstance(bound, Mapping):
        return bound
    return next((value for pattern, value in bound.items() if re.search(pattern, name)), default)
