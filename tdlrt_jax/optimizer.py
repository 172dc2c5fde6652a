"""``tdlrt``: an optax transformation that moves Tucker kernels by an integrator.

An inner optax transformation is the descent step of lines 4 and 9 of Algorithm 1. It works in the coordinates of Theorem 1: its
state has the shapes of the parameters, its gradients are ``(dC, (I - U_i U_i^T) dK_i)``, its parameters ``(C, K_i)``. The
integrator turns its updates into the next kernel, and the transport carries its state along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from tdlrt_jax import status as flags
from tdlrt_jax.arguments import check_callable, check_transformation
from tdlrt_jax.budget import Budget
from tdlrt_jax.control import Bounds, RankControl
from tdlrt_jax.frame import lift_all
from tdlrt_jax.inspection import ORTHONORMAL, adds_up, all_finite, largest_deviation, look_plain, stays_finite
from tdlrt_jax.integrators import INTEGRATORS
from tdlrt_jax.moments import NetworkMoments, find_moments, start_above_zero
from tdlrt_jax.network import NetworkStep, StepOutcome, check_extra
from tdlrt_jax.paths import flatten_kernels
from tdlrt_jax.ranks import Convention, Criterion, RankPolicy, Route
from tdlrt_jax.rules import parse_rules
from tdlrt_jax.transport import Kind
from tdlrt_jax.tucker import TuckerTensor, active_rank, check_structure

__all__ = ["TdlrtState", "tdlrt"]


class TdlrtState(NamedTuple):
    """State of :func:`tdlrt`. The dictionaries have one entry a kernel, keyed by its path in ``params``."""

    step: Array  # int32, steps taken
    inner: Any  # the inner transformation's state, in the coordinates (C, K_i)
    tolerance: Array  # float32, the tolerance of the next step (of the last one, for a schedule); may be replaced
    rank: dict[str, Array]  # int32 (d,)
    truncation_error: dict[str, Array]  # relative, of the last step
    cumulative_truncation_error: dict[str, Array]  # sum over the steps so far
    status: Array  # int32 bit flags, see tdlrt_jax.describe_status
    skipped: Array  # int32, calls in a row, up to the last one, that left all as it was; status says why
    budget: Any = ()  # a tdlrt_jax.budget.BudgetState where the tolerance is a Budget
    anchor: Any = ()  # with keep_momentum, the kernels in whose frames the moments are: those before steps with cores_only


def tdlrt(
    inner: optax.GradientTransformation,
    *,
    tolerance: float | Callable[[Array], Array] | Budget,
    integrator: str = "bug",
    criterion: Criterion = "tail",
    convention: Convention = "shared",
    spare: int | None = None,
    route: Route = "gram",
    warmup: int = 0,
    adapt_every: int = 1,
    keep_momentum: bool = False,
    freeze_after: int | None = None,
    min_rank: Bounds = 1,
    max_rank: Bounds | None = None,
    rules: Mapping[str, Any] | None = None,
    moments: Mapping[str, Kind] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Dynamical low-rank training: an optax transformation for parameters with Tucker kernels among them.

    Kernels (:class:`TuckerTensor` anywhere in the parameters) move by the integrator, all other leaves by ``inner`` directly,
    once a step. It replaces bases, so it stands last in a chain; clipping, schedules, weight decay (which acts through the core),
    partitions and plateau schedules go inside.

    Args:
      inner: the descent step. Its state must mirror the parameters and start constant, or be scalar.
      tolerance: ``tau`` of line 11; a schedule ``step -> tau``; or a :class:`tdlrt_jax.Budget`, a compression to reach, which
        finds the tolerance (and ranks stay at what it allows).
      integrator: ``"bug"`` (Algorithm 1), ``"parallel"`` (one gradient a step) or ``"fixed_rank"`` (Algorithm 1, not adaptive).
      criterion, convention: what the tolerance means, see :class:`RankPolicy`.
      spare: directions kept beyond what the tolerance asks for; default 0, and 1 for ``"parallel"``, whose ranks rarely
        rise without: its new directions are of second order in the step.
      route: how line 11 finds directions: ``"gram"``, or ``"randomized"``, by a sketch where that is cheaper (on the CPU for
        large matrices only), see :class:`RankPolicy`. A budget's looks at the singular values stay as they are.
      warmup: for so many steps ranks may rise but not fall; a Budget's ceilings hold from then on.
      adapt_every: bases and ranks move every so many steps; in between only the cores do (from one gradient), while the inner
        state goes on collecting the directions outside of the bases.
      keep_momentum: steps with ``cores_only`` hold what the inner state has collected for the ``K_i``, and the next step that
        moves the bases takes it up, exactly: a tangent vector stays what it is while the cores move. Else it begins anew. This
        costs a copy of the kernels, and a second lift in those steps.
      freeze_after: from this step on ranks stay as they are, while bases and cores go on moving.
      min_rank, max_rank: bounds; one number, one a mode, or a mapping from a regular expression on the kernel's path to either.
      rules: for single layers, a mapping from a regular expression on the layer's path to the tolerance, criterion, convention,
        spare, min_rank and max_rank that it has instead of these; the rules given to ``tuckerize``, see
        :class:`tdlrt_jax.rules.Rule`. The first that fits decides.
      moments: how state fields that optax does not have transform: name to ``"linear"`` or ``"squared"``.

    Returns:
      A transformation with ``init(params)`` and ``update(grads, state, params, *, value_and_grad_fn=None, cores_only=False,
      ranks_stay=False, **extra)``. ``grads`` are those of :func:`tdlrt_jax.value_and_grad`. ``"bug"`` and ``"fixed_rank"`` call
      ``value_and_grad_fn(params) -> (value, grads)`` once more, with core-only frames in the place of the kernels. With
      ``cores_only`` the bases stay and gradients of factors are not looked at, with ``ranks_stay`` they move and their ranks do
      not, from ``grads`` alone, see :func:`tdlrt_jax.tdlrt_step`. ``inner`` gets what else it is given: a ``value_fn(params)``
      (of line searches) is evaluated at the kernels to which it would step, a ``grad`` is the kernels' own; other functions of
      parameters are refused.
      ``optax.apply_updates(params, updates)`` gives the next parameters. Where a gradient, the loss (if it is given, as
      ``value=``), or what would become of the parameters or the inner state is not finite, or where a kernel's factors are not
      orthonormal, parameters and state stay as they are, ``state.status`` says so and ``state.skipped`` counts: a limit on
      such steps in a row is the caller's.

    Raises:
      ValueError: at once for options that cannot work; from ``init`` for kernels and inner states that cannot.

    Example:
      >>> import jax.numpy as jnp, optax, tdlrt_jax
      >>> params = {"w": tdlrt_jax.hosvd(jnp.arange(12.0).reshape(3, 4), rank=2)}
      >>> loss = tdlrt_jax.value_and_grad(lambda p: jnp.sum((tdlrt_jax.to_dense(p["w"]) - 1.0) ** 2))
      >>> tx = tdlrt_jax.tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.01)
      >>> state = tx.init(params)
      >>> value, grads = loss(params)
      >>> updates, state = tx.update(grads, state, params, value_and_grad_fn=loss)
      >>> bool(loss(optax.apply_updates(params, updates))[0] < value)
      True

    Source: Algorithm 1; for ``"parallel"`` Ceruti, Kusch, Lubich & Sulz (2024).
    """
    check_transformation("inner", inner)
    if not isinstance(integrator, str) or integrator not in INTEGRATORS:
        raise ValueError(f"integrator={integrator!r} is unknown: expected one of {sorted(INTEGRATORS)}")
    scheme = INTEGRATORS[integrator]
    spare = (1 if integrator == "parallel" else 0) if spare is None else spare
    control = RankControl(
        tolerance=tolerance,
        policy=RankPolicy(criterion, convention, spare, route=route),
        min_rank=min_rank,
        max_rank=max_rank,
        rules=parse_rules(rules or {}),
        warmup=warmup,
        freeze_after=freeze_after,
        adapt_every=adapt_every,
        adaptive=integrator != "fixed_rank",
    )
    if not isinstance(keep_momentum, bool | np.bool_):
        raise ValueError(f"keep_momentum={keep_momentum!r}: expected True or False")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> TdlrtState:
        tree = flatten_kernels(params)
        for name, kernel in zip(tree.names, tree.kernels):
            _check_kernel(name, kernel)
        control.check(tree, params)
        # State that may be kept does not depend on the values that it starts from (see find_moments): factors stand for the K_i.
        state = inner.init(tree.replace([_start(kernel) for kernel in tree.kernels]))
        others = tree.paths_of_others if tree.kernels else None
        found = find_moments(state, list(zip(tree.paths, tree.kernels)), moments, check_values=True, others=others)
        if start_above_zero(state, found):  # as adagrad's do
            state = NetworkMoments(tree, moments).in_use(state)
        state = jax.tree.map(lambda leaf: jnp.array(leaf) if isinstance(leaf, jax.Array) else leaf, state)
        tau, budget = control.initial(tree, params)
        return TdlrtState(
            step=jnp.zeros((), jnp.int32),
            inner=state,
            tolerance=tau,
            rank={name: active_rank(kernel) for name, kernel in zip(tree.names, tree.kernels)},
            truncation_error={name: jnp.zeros((), jnp.float32) for name in tree.names},
            cumulative_truncation_error={name: jnp.zeros((), jnp.float32) for name in tree.names},
            status=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            budget=budget,
            anchor={n: jax.tree.map(jnp.copy, k) for n, k in zip(tree.names, tree.kernels)} if keep_momentum else (),
        )

    def update(
        grads: Any,
        state: TdlrtState,
        params: Any = None,
        *,
        value_and_grad_fn: Callable[[Any], tuple[Any, Any]] | None = None,
        cores_only: bool = False,
        ranks_stay: bool = False,
        **extra: Any,
    ) -> tuple[Any, TdlrtState]:
        if params is None:
            raise ValueError("tdlrt needs the parameters: call update(grads, state, params, value_and_grad_fn=...)")
        if not isinstance(state, TdlrtState):
            raise ValueError(
                f"state is a {type(state).__name__}: expected the TdlrtState that init or the last update gave"
            )
        tree = flatten_kernels(params)
        if not tree.positions:  # nothing to integrate: the inner transformation alone
            updates, after = inner.update(grads, state.inner, params, **extra)
            outcome, finite = _plain_outcome(updates, after, state), all_finite((grads, extra.get("value")))
            return _accept(outcome, params, state, [], finite=finite, plain=jnp.zeros((), bool))
        if value_and_grad_fn is not None:
            check_callable("value_and_grad_fn", value_and_grad_fn, "value_and_grad_fn(params) -> (value, grads)")
        if cores_only and ranks_stay:
            raise ValueError("cores_only=True, ranks_stay=True: expected one of them; with ranks_stay bases move too")
        if scheme.evaluations == 2 and value_and_grad_fn is None and not cores_only and not ranks_stay:
            raise ValueError(
                f"integrator={integrator!r} takes a second gradient at another basis: pass "
                "value_and_grad_fn=lambda params: tdlrt_jax.value_and_grad(loss_fn)(params, batch) to update "
                '(transformations such as optax.MultiSteps(...).gradient_transformation() drop it), or use integrator="parallel"'
            )
        if set(tree.names) != set(state.rank):
            raise ValueError(
                f"state is of the kernels {sorted(state.rank)}, params has {sorted(tree.names)}: expected the parameters that "
                "init saw. For nnx.Optimizer, which hands out others, there is tdlrt_jax.nn.tdlrt"
            )
        tau = control.tolerance_at(state.step, state.tolerance)
        check_extra(extra)
        network = NetworkStep(tree, inner, extra, moments)
        gradients = network.align(grads)
        finite = all_finite((gradients, extra.get("value")))
        given = largest_deviation([factor for kernel in tree.kernels for factor in kernel.factors])
        if cores_only:
            outcome = network.cores_only_step(gradients, state.inner, keep_momentum)
            outcome = outcome._replace(budget=(state.budget, tau), deviation=given)
            return _accept(outcome, params, state, tree.names, finite=finite, plain=jnp.zeros((), bool))
        frames = lift_all(tree.kernels)
        before = state.inner
        if keep_momentum:
            before = network.from_anchor(before, [state.anchor[name] for name in tree.names], frames)
        bounds = partial(control.truncations, tree, params, state.step, tau, state.budget, tree.pick(gradients))

        def adaptive() -> StepOutcome:
            outcome = network.adaptive_step(scheme, frames, gradients, before, bounds, value_and_grad_fn)
            return outcome._replace(budget=outcome.budget or (state.budget, tau))

        def core_only() -> StepOutcome:
            return network.core_only_step(frames, gradients, before)._replace(budget=(state.budget, tau))

        if ranks_stay:
            outcome = network.turning_step(frames, gradients, before)._replace(budget=(state.budget, tau))
        elif adapt_every == 1:
            outcome = adaptive()
        else:
            outcome = jax.lax.cond(state.step % adapt_every == 0, adaptive, core_only)
        outcome = outcome._replace(deviation=jnp.maximum(outcome.deviation, given))
        anchor = state.anchor
        if keep_momentum:
            moved = zip(tree.names, tree.kernels, tree.pick(flatten_kernels(outcome.updates).nodes))
            anchor = {name: optax.apply_updates(kernel, step) for name, kernel, step in moved}
        return _accept(
            outcome,
            params,
            state,
            tree.names,
            finite=finite,
            plain=look_plain(frames, tree.pick(gradients)),
            anchor=anchor,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _start(kernel: TuckerTensor) -> TuckerTensor:
    """Something of the shapes and dtypes of a kernel's ``(C, K_i)``."""
    return kernel._replace(core=kernel.core.astype(jnp.promote_types(kernel.core.dtype, jnp.float32)))


def _plain_outcome(updates: Any, inner: Any, state: TdlrtState) -> StepOutcome:
    """What a step without kernels proposes."""
    return StepOutcome(
        updates=updates,
        inner=inner,
        rank=[],
        error=[],
        pressing=jnp.zeros((), bool),
        finite=jnp.ones((), bool),
        deviation=jnp.zeros((), jnp.float32),
        budget=(state.budget, state.tolerance),
        other=jnp.zeros((), bool),
    )


def _accept(
    outcome: StepOutcome,
    params: Any,
    state: TdlrtState,
    names: list[str],
    *,
    finite: Array,
    plain: Array,
    anchor: Any = None,
) -> tuple[Any, TdlrtState]:
    """The proposed updates and state, or nothing at all where they are not in order; and the report.

    Args:
      outcome: of the step; its ``deviation`` is also that of the factors that it started from.
      params: before the step.
      state: before the step.
      names: of the kernels.
      finite: whether what the step was given is.
      plain: whether the gradients look like plain ones.
      anchor: the next one; default: that of before.
    """
    # Moments may overflow where updates do not.
    finite = finite & outcome.finite & adds_up(params, outcome.updates) & stays_finite(state.inner, outcome.inner)
    orthonormal = outcome.deviation <= ORTHONORMAL
    accepted = finite & orthonormal
    status = jnp.where(finite, jnp.where(orthonormal, flags.OK, flags.NOT_ORTHONORMAL), flags.NONFINITE)
    status = status | jnp.where(accepted & plain, flags.PLAIN_GRADIENTS, flags.OK)
    status = status | jnp.where(accepted & outcome.other, flags.OTHER_GRADIENT, flags.OK)
    status = (status | jnp.where(accepted & outcome.pressing, flags.RANK_AT_CAPACITY, flags.OK)).astype(jnp.int32)
    cumulative = state.cumulative_truncation_error
    assert outcome.budget is not None
    budget, tolerance = outcome.budget
    proposed = TdlrtState(
        step=state.step + 1,
        inner=outcome.inner,
        tolerance=tolerance,
        rank=dict(zip(names, outcome.rank)),
        truncation_error=dict(zip(names, outcome.error)),
        cumulative_truncation_error={name: cumulative[name] + error for name, error in zip(names, outcome.error)},
        status=status,
        skipped=jnp.zeros_like(state.skipped),
        budget=budget,
        anchor=state.anchor if anchor is None else anchor,
    )
    kept = left_out(state, status)
    # Not a selection leaf by leaf: XLA would compute the conjunction over all leaves anew in each of them, and a network's step
    # took minutes to compile.
    return jax.lax.cond(
        accepted,
        lambda: (outcome.updates, proposed),
        lambda: (_no_updates(outcome.updates), kept),
    )


def _no_updates(updates: Any) -> Any:
    """Updates that change nothing: negative zeros, since a positive one would make a positive one of a negative zero."""
    return jax.tree.map(lambda update: -jnp.zeros_like(update), updates)


def left_out(state: TdlrtState, status: Any) -> TdlrtState:
    """The state after a step that changes nothing."""
    return state._replace(status=jnp.asarray(status, jnp.int32), skipped=state.skipped + 1)


def _check_kernel(name: str, kernel: TuckerTensor) -> None:
    """Raises ``ValueError`` for a kernel that is not a Tucker tensor in this library's sense; eager values only."""
    check_structure(kernel, name)
    if not jnp.issubdtype(kernel.core.dtype, jnp.floating) or jnp.finfo(kernel.core.dtype).bits < 16:
        raise ValueError(
            f"kernel {name!r}: its core has dtype {kernel.core.dtype}, expected a floating one of 16 bits or more"
        )
    if not isinstance(kernel.core, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(kernel.core))):
        raise ValueError(f"kernel {name!r}: its core has entries that are not finite")
    for mode, factor in enumerate(kernel.factors):
        if factor is None:
            continue
        if not jnp.issubdtype(factor.dtype, jnp.floating) or jnp.finfo(factor.dtype).bits < 32:
            raise ValueError(
                f"kernel {name!r}: factor {mode} has dtype {factor.dtype}: factors are float32 or wider, since rounded ones are "
                "not orthonormal (the core may be narrower, and layers may compute in less). tdlrt_jax.canonicalize(kernel) "
                "makes them so"
            )
        if isinstance(factor, jax.core.Tracer):
            continue
        u = np.asarray(factor, np.float64)
        active = np.any(u != 0, axis=0)
        if not active.any() or np.any(np.diff(active.astype(int)) > 0):
            raise ValueError(
                f"kernel {name!r}: factor {mode} has active columns {active.astype(int).tolist()}: they come first and there is "
                "at least one. tdlrt_jax.canonicalize(kernel) makes it so"
            )
        error = np.abs(u.T @ u - np.diag(active)).max()
        if not error <= ORTHONORMAL:
            raise ValueError(
                f"kernel {name!r}: factor {mode} is not orthonormal (largest deviation {error:.1e}). "
                "tdlrt_jax.canonicalize(kernel) makes it so without changing the tensor"
            )
