"""``tdlrt``: an optax transformation that moves Tucker kernels by an integrator.

An inner optax transformation is the descent step of lines 4 and 9 of Algorithm 1. It works in the coordinates of Theorem 1: its
state has the shapes of the parameters, its gradients are ``(dC, (I - U_i U_i^T) dK_i)``, its parameters ``(C, K_i)``. The
integrator turns its updates into the next kernel, and the transport carries its state along.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from tdlrt_jax import status as flags
from tdlrt_jax.frame import chart_point, lift
from tdlrt_jax.integrators import INTEGRATORS
from tdlrt_jax.network import NetworkStep, StepOutcome, look_plain
from tdlrt_jax.paths import flatten_kernels
from tdlrt_jax.transport import Kind, find_moments
from tdlrt_jax.truncation import Convention, Criterion, RankPolicy, check_policy, check_tolerance, per_mode
from tdlrt_jax.tucker import TuckerTensor, active_rank, check_structure

__all__ = ["TdlrtState", "tdlrt"]

Bounds = int | tuple[int, ...] | Mapping[str, int | tuple[int, ...]]


class TdlrtState(NamedTuple):
    """State of :func:`tdlrt`. The dictionaries have one entry a kernel, keyed by its path in ``params``."""

    step: Array  # int32, steps taken
    inner: Any  # the inner transformation's state, in the coordinates (C, K_i)
    tolerance: Array  # float32, the tolerance of the next step (of the last one, for a schedule); may be replaced
    rank: dict[str, Array]  # int32 (d,)
    truncation_error: dict[str, Array]  # relative, of the last step
    cumulative_truncation_error: dict[str, Array]  # sum over the steps so far
    status: Array  # int32 bit flags, see tdlrt_jax.describe_status


def tdlrt(
    inner: optax.GradientTransformation,
    *,
    tolerance: float | Callable[[Array], Array],
    integrator: str = "bug",
    criterion: Criterion = "tail",
    convention: Convention = "shared",
    spare: int | None = None,
    warmup: int = 0,
    adapt_every: int = 1,
    min_rank: Bounds = 1,
    max_rank: Bounds | None = None,
    moments: Mapping[str, Kind] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Dynamical low-rank training: an optax transformation for parameters with Tucker kernels among them.

    Kernels (:class:`TuckerTensor` anywhere in the parameters) move by the integrator, all other leaves by ``inner`` directly,
    once a step. It replaces bases, so it stands last in a chain; clipping, schedules, weight decay (which acts through the core),
    partitions and plateau schedules go inside.

    Args:
      inner: the descent step. Its state must mirror the parameters and start constant, or be scalar.
      tolerance: ``tau`` of line 11, or a schedule ``step -> tau``.
      integrator: ``"bug"`` (Algorithm 1), ``"parallel"`` (one gradient a step) or ``"fixed_rank"`` (Algorithm 1, not adaptive).
      criterion, convention: what the tolerance means, see :class:`RankPolicy`.
      spare: directions kept beyond what the tolerance asks for; default 0, and 1 for ``"parallel"``, whose ranks cannot rise
        without.
      warmup: for so many steps ranks may rise but not fall.
      adapt_every: bases and ranks move every so many steps; in between only the cores do (from one gradient), while the inner
        state goes on collecting the directions outside of the bases.
      min_rank, max_rank: bounds; one number, one a mode, or a mapping from a regular expression on the kernel's path to either.
      moments: how state fields that optax does not have transform: name to ``"linear"`` or ``"squared"``.

    Returns:
      A transformation with ``init(params)`` and ``update(grads, state, params, *, value_and_grad_fn=None, **extra)``. ``grads``
      are those of :func:`tdlrt_jax.value_and_grad`. ``"bug"`` and ``"fixed_rank"`` call
      ``value_and_grad_fn(params) -> (value, grads)`` once more, with core-only frames in the place of the kernels.
      ``optax.apply_updates(params, updates)`` gives the next parameters. With a gradient that is not finite, parameters and
      inner state stay and ``state.status`` says so.

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
    if integrator not in INTEGRATORS:
        raise ValueError(f"integrator={integrator!r} is unknown: expected one of {sorted(INTEGRATORS)}")
    if not callable(tolerance):
        check_tolerance(tolerance, convention)
    if warmup < 0:
        raise ValueError(f"warmup={warmup} must be a number of steps, 0 or more")
    if adapt_every < 1:
        raise ValueError(f"adapt_every={adapt_every} must be a number of steps, 1 or more")
    spare = (1 if integrator == "parallel" else 0) if spare is None else spare
    check_policy(RankPolicy(criterion, convention, spare), 2)
    scheme = INTEGRATORS[integrator]
    inner = optax.with_extra_args_support(inner)

    def policy_of(name: str, kernel: TuckerTensor) -> RankPolicy:
        order = len(kernel.factors)
        low, high = _bound(min_rank, name, 1), _bound(max_rank, name, None)
        policy = RankPolicy(
            criterion, convention, spare, per_mode(low, order, "min_rank"), per_mode(high, order, "max_rank")
        )
        try:
            check_policy(policy, order)
        except ValueError as error:
            raise ValueError(f"kernel {name!r}: {error}") from None
        return policy

    def init(params: Any) -> TdlrtState:
        tree = flatten_kernels(params)
        for name, kernel in zip(tree.names, tree.kernels):
            _check_kernel(name, kernel)
            policy_of(name, kernel)
        _check_patterns({"min_rank": min_rank, "max_rank": max_rank}, tree.names)
        state = inner.init(tree.replace([chart_point(lift(kernel)) for kernel in tree.kernels]))
        find_moments(state, list(zip(tree.paths, tree.kernels)), moments, check_values=True)
        state = jax.tree.map(lambda leaf: jnp.array(leaf) if isinstance(leaf, jax.Array) else leaf, state)
        tau = tolerance(jnp.zeros((), jnp.int32)) if callable(tolerance) else tolerance
        return TdlrtState(
            step=jnp.zeros((), jnp.int32),
            inner=state,
            tolerance=jnp.array(tau, jnp.float32),
            rank={name: active_rank(kernel) for name, kernel in zip(tree.names, tree.kernels)},
            truncation_error={name: jnp.zeros((), jnp.float32) for name in tree.names},
            cumulative_truncation_error={name: jnp.zeros((), jnp.float32) for name in tree.names},
            status=jnp.zeros((), jnp.int32),
        )

    def update(
        grads: Any,
        state: TdlrtState,
        params: Any = None,
        *,
        value_and_grad_fn: Callable[[Any], tuple[Any, Any]] | None = None,
        **extra: Any,
    ) -> tuple[Any, TdlrtState]:
        if params is None:
            raise ValueError("tdlrt needs the parameters: call update(grads, state, params, value_and_grad_fn=...)")
        tree = flatten_kernels(params)
        if not tree.positions:  # nothing to integrate: the inner transformation alone
            updates, inner_state = inner.update(grads, state.inner, params, **extra)
            return updates, state._replace(step=state.step + 1, inner=inner_state)
        if scheme.evaluations == 2 and value_and_grad_fn is None:
            raise ValueError(
                f"integrator={integrator!r} takes a second gradient at another basis: pass "
                "value_and_grad_fn=lambda params: tdlrt_jax.value_and_grad(loss_fn)(params, batch) to update "
                '(transformations such as optax.MultiSteps drop it), or use integrator="parallel"'
            )
        tau = jnp.asarray(tolerance(state.step), jnp.float32) if callable(tolerance) else state.tolerance
        network = NetworkStep(
            tree, [policy_of(name, k) for name, k in zip(tree.names, tree.kernels)], inner, extra, moments
        )
        gradients = network.align(grads)
        frames = [lift(kernel) for kernel in tree.kernels]

        def adaptive() -> StepOutcome:
            return network.adaptive_step(
                scheme, frames, gradients, state.inner, tau, state.step < warmup, value_and_grad_fn
            )

        if adapt_every == 1:
            outcome = adaptive()
        else:
            outcome = jax.lax.cond(
                state.step % adapt_every == 0, adaptive, lambda: network.core_only_step(frames, gradients, state.inner)
            )
        plain = look_plain(frames, tree.pick(gradients))
        return _accept(outcome, gradients, plain, state, tau, tree.names)

    return optax.GradientTransformationExtraArgs(init, update)


def _accept(
    outcome: StepOutcome,
    gradients: list[Any],
    plain: Array,
    state: TdlrtState,
    tolerance: Array,
    names: list[str],
) -> tuple[Any, TdlrtState]:
    """The proposed updates and state, or nothing at all where a number is not finite; and the report."""
    finite = _all_finite((outcome.updates, gradients))
    status = jnp.where(finite, flags.OK, flags.NONFINITE)
    status = status | jnp.where(finite & plain, flags.PLAIN_GRADIENTS, flags.OK)
    status = (status | jnp.where(finite & outcome.pressing, flags.RANK_AT_CAPACITY, flags.OK)).astype(jnp.int32)
    cumulative = state.cumulative_truncation_error
    proposed = TdlrtState(
        step=state.step + 1,
        inner=outcome.inner,
        tolerance=tolerance,
        rank=dict(zip(names, outcome.rank)),
        truncation_error=dict(zip(names, outcome.error)),
        cumulative_truncation_error={name: cumulative[name] + error for name, error in zip(names, outcome.error)},
        status=status,
    )
    kept = state._replace(status=status)
    updates = jax.tree.map(lambda update: jnp.where(finite, update, jnp.zeros_like(update)), outcome.updates)
    return updates, jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, kept)


def _all_finite(tree: Any) -> Array:
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(checks))


def _check_kernel(name: str, kernel: TuckerTensor) -> None:
    """Raises ``ValueError`` for a kernel that is not a Tucker tensor in this library's sense; eager values only."""
    check_structure(kernel, name)
    for leaf in jax.tree.leaves(kernel):
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.finfo(leaf.dtype).bits < 32:
            raise ValueError(
                f"kernel {name!r} has dtype {leaf.dtype}: cores and factors are float32 or wider (layers may compute in less)"
            )
    for mode, factor in enumerate(kernel.factors):
        if factor is None or isinstance(factor, jax.core.Tracer):
            continue
        u = np.asarray(factor, np.float64)
        active = np.any(u != 0, axis=0)
        if not active.any() or np.any(np.diff(active.astype(int)) > 0):
            raise ValueError(
                f"kernel {name!r}: factor {mode} has active columns {active.astype(int).tolist()}: they come first and there is "
                "at least one. tdlrt_jax.canonicalize(kernel) makes it so"
            )
        error = np.abs(u.T @ u - np.diag(active)).max()
        if not error < 1e-3:
            raise ValueError(
                f"kernel {name!r}: factor {mode} is not orthonormal (largest deviation {error:.1e}). "
                "tdlrt_jax.canonicalize(kernel) makes it so without changing the tensor"
            )


def _bound(bound: Bounds | None, name: str, default: int | None) -> int | tuple[int, ...] | None:
    """The bound of one kernel: the first pattern that is found in its path, for a mapping."""
    if not isinstance(bound, Mapping):
        return bound
    return next((value for pattern, value in bound.items() if re.search(pattern, name)), default)


def _check_patterns(bounds: dict[str, Bounds | None], names: list[str]) -> None:
    for argument, bound in bounds.items():
        for pattern in bound if isinstance(bound, Mapping) else ():
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(
                    f"{argument}: the pattern {pattern!r} is found in no kernel's path; the paths are {names}"
                )
