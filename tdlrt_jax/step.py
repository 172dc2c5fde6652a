"""``tdlrt_step``: one jitted training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tdlrt_jax import status as flags
from tdlrt_jax.arguments import check_callable, check_mapping, check_transformation
from tdlrt_jax.gradients import StepGradients
from tdlrt_jax.inspection import all_finite, stays_finite
from tdlrt_jax.optimizer import TdlrtState, left_out

__all__ = ["StepInfo", "tdlrt_step"]


class StepInfo(NamedTuple):
    """What one step tells; the dictionaries are keyed by the kernels' paths. All of it lives on the device."""

    loss: Array  # scalar, at the parameters before the step; the mean over micro-batches
    aux: Any  # from the first evaluation; with a leading axis of micro-batches if there are several
    rank: dict[str, Array]  # int32 (d,) a kernel
    truncation_error: dict[str, Array]  # relative, of this step
    cumulative_truncation_error: dict[str, Array]  # summed over all steps
    status: Array  # int32 bit flags, see tdlrt_jax.describe_status
    skipped: Array  # int32, steps in a row, up to this one, that tdlrt left out


def tdlrt_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    has_state: bool = False,
    accumulate: int = 1,
    donate: bool = True,
    second_pass: bool = False,
    cores_only: bool = False,
    ranks_stay: bool = False,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """One jitted training step of parameters with Tucker kernels.

    Args:
      loss_fn: ``loss_fn(params, *batch) -> loss``, or ``(loss, aux)`` with ``has_aux``. With ``has_state``:
        ``loss_fn(params, model_state, *batch) -> (loss, new_model_state)``, or ``(loss, (new_model_state, aux))``.
      tx: a transformation with :func:`tdlrt_jax.tdlrt` in it, possibly inside ``optax.chain``, ``partition`` or ``masked``. It is
        given ``value=`` (the loss) and ``value_and_grad_fn=``.
      has_aux: ``loss_fn`` returns something beside the loss.
      has_state: a model state (BatchNorm statistics) is threaded through. It moves once a step, from the first evaluation.
      accumulate: split every batch array along its first axis into so many micro-batches; all gradients of the step, the second
        one included, are means over them.
      second_pass: evaluate the second gradient of ``"bug"`` by a forward and backward pass of its own also where it can be had
        from the first (see :func:`tdlrt_jax.galerkin.value_and_two_grads`). Costs time; spares keeping all output gradients.
      cores_only: a step between two adaptations: only the cores move, and all leaves that are no kernels. Bases and ranks stay,
        so there is no gradient of factors to take and nothing to factorize: it costs less than a step of an ordinary factorized
        network. Alternate it with whole steps of the same ``tx``, one every ten steps, say; a Budget looks at the singular
        values in whole steps whose number is a multiple of its ``every``. What the inner state remembers of directions outside
        of the bases is let go. (``tdlrt(..., adapt_every=10)`` goes on collecting them, in one program, for the full price of a
        gradient.)
      ranks_stay: a step between two adaptations in which bases move as well, at ranks that stay: from one gradient, by products
        and Cholesky factorizations alone, where a whole step has eigenproblems. To first order it is a whole step at these
        ranks, see :mod:`tdlrt_jax.integrators.turning`, and all that the inner state remembers is carried along. Dearer than
        one with ``cores_only``; alternate it with whole steps as those.
      donate: let the step reuse the buffers of ``params``, ``opt_state`` and ``model_state``, which must not be used afterwards.
      compiler_options: those of :func:`jax.jit`, such as :func:`tdlrt_jax.compiler_options`. JAX refuses them where the step is
        called in another jitted function: give them to that one.

    Returns:
      ``step(params, opt_state, *batch) -> (params, opt_state, info)``; with ``has_state``
      ``step(params, opt_state, model_state, *batch) -> (params, opt_state, model_state, info)``. ``info`` is a :class:`StepInfo`.
      Where a number is not finite, be it the loss, a gradient, or what would become of parameters or a state, everything stays as
      it was and ``info.status`` says so; ``info.skipped`` counts such steps in a row.

    Raises:
      ValueError: for ``accumulate`` below 1, a batch that it does not divide, more than one of ``second_pass``, ``cores_only``
        and ``ranks_stay``, or ``compiler_options`` that are no mapping.

    Example:
      >>> import jax.numpy as jnp, optax, tdlrt_jax
      >>> params = {"w": tdlrt_jax.hosvd(jnp.arange(12.0).reshape(3, 4) / 12, rank=2)}
      >>> loss_fn = lambda p, x, y: jnp.mean((tdlrt_jax.tucker_linear(x, p["w"]) - y) ** 2)
      >>> tx = tdlrt_jax.tdlrt(optax.adam(0.01), tolerance=0.05)
      >>> step = tdlrt_jax.tdlrt_step(loss_fn, tx)
      >>> params, opt_state, info = step(params, tx.init(params), jnp.ones((8, 3)), jnp.ones((8, 4)))
      >>> info.rank["w"].shape
      (2,)
    """
    check_callable("loss_fn", loss_fn, "loss_fn(params, *batch) -> loss")
    check_transformation("tx", tx)
    gradients = StepGradients(
        accumulate=accumulate, second_pass=second_pass, cores_only=cores_only, ranks_stay=ranks_stay
    )
    options = check_compiler_options(compiler_options)
    tx = optax.with_extra_args_support(tx)

    def with_state(params: Any, model_state: Any, *batch: Any) -> tuple[Array, tuple[Any, Any]]:
        """Every signature of ``loss_fn`` as ``(loss, (model_state, aux))``."""
        out = loss_fn(params, model_state, *batch) if has_state else loss_fn(params, *batch)
        if has_state and has_aux:
            return out
        if has_state:
            return out[0], (out[1], None)
        return (out[0], (None, out[1])) if has_aux else (out, (None, None))

    def step(params: Any, opt_state: Any, model_state: Any, *batch: Any) -> tuple:
        if any(kind.__module__.startswith("flax.nnx") and kind.__name__ == "Module" for kind in type(params).__mro__):
            raise ValueError(
                f"params is the model {type(params).__name__}: expected a pytree of arrays. For models of flax.nnx and their "
                "nnx.Optimizer there is tdlrt_jax.nn.tdlrt_step"
            )
        first, how = gradients(with_state, params, model_state, batch)
        value = vetoed(first.loss, model_state, first.model_state)
        updates, after = tx.update(first.grads, opt_state, params, value=value, **how)
        status, called = combined_status(opt_state, after, (value, first.grads))
        moved = optax.apply_updates(params, updates)
        if not isinstance(opt_state, TdlrtState):
            moved, after, status = together((params, moved), (opt_state, after), status, called)
        moves = status & flags.SKIPPED == 0
        model_state = jax.tree.map(lambda new, old: jnp.where(moves, new, old), first.model_state, model_state)
        return moved, after, model_state, report(after, first.loss, first.aux, status)

    if has_state:
        return jax.jit(step, donate_argnums=(0, 1, 2) if donate else (), compiler_options=options)

    def stateless_step(params: Any, opt_state: Any, *batch: Any) -> tuple:
        params, opt_state, _, info = step(params, opt_state, None, *batch)
        return params, opt_state, info

    return jax.jit(stateless_step, donate_argnums=(0, 1) if donate else (), compiler_options=options)


def check_compiler_options(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Options as :func:`jax.jit` takes them; raises ``ValueError`` for what is no mapping."""
    if options is not None:
        check_mapping("compiler_options", options, "from names of XLA's options to their values")
    return dict(options) if options else None


def find_states(opt_state: Any) -> list[TdlrtState]:
    """Every :class:`TdlrtState` in an optimizer's state; raises ``ValueError`` when there is none."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, TdlrtState))
    states = [node for node in nodes if isinstance(node, TdlrtState)]
    if not states:
        raise ValueError("the optimizer's state holds no TdlrtState: wrap the optimizer in tdlrt_jax.tdlrt(...)")
    return states


def vetoed(loss: Array, before: Any, after: Any) -> Array:
    """The loss, for :func:`tdlrt_jax.tdlrt` to judge a step by: infinite where the model's state would no longer be finite."""
    return jnp.where(stays_finite(before, after), loss, jnp.inf)


def combined_status(before: Any, after: Any, given: Any) -> tuple[Array, Array]:
    """The status of a step, from the optimizer's states before and after it, and whether tdlrt was called.

    A transformation around tdlrt may not have called it (``optax.apply_if_finite``, or ``optax.MultiSteps`` between its steps);
    what its state then says is about an earlier step, and ``given``, the loss and the gradients, decides.
    """
    old, new = find_states(before), find_states(after)
    status = new[0].status
    for state in new[1:]:
        status = status | state.status
    called = jnp.any(jnp.stack([(a.step != b.step) | (a.skipped != b.skipped) for a, b in zip(old, new)]))
    if isinstance(before, TdlrtState):
        return status, called
    unseen = jnp.where(all_finite(given), flags.OK, flags.NONFINITE).astype(jnp.int32)
    return jnp.where(called, status, unseen), called


def together(params: tuple[Any, Any], states: tuple[Any, Any], status: Array, called: Array) -> tuple[Any, Any, Array]:
    """Parameters, state and status after a step that tdlrt and what is around it take together, or not at all.

    Another part of a partition may have taken what tdlrt left out, or something that is not finite.

    Args:
      params: before the step and after it.
      states: of the whole optimizer, likewise.
      status, called: of :func:`combined_status`.
    """
    (old, new), (before, after) = params, states
    fits = stays_finite(old, new)
    skips = called & (status & flags.SKIPPED != 0)

    def not_taken() -> tuple[Any, Any, Array]:
        state = jax.lax.cond(fits, lambda: _parts_held_back(before, after), lambda: _none_taken(before))
        return old, state, jnp.where(fits, status, flags.NONFINITE).astype(jnp.int32)

    return jax.lax.cond(fits & ~skips, lambda: (new, after, status), not_taken)


def report(opt_state: Any, loss: Array, aux: Any, status: Array) -> StepInfo:
    """What a step tells, put together from all states in an optimizer's."""
    states = find_states(opt_state)
    return StepInfo(
        loss=loss,
        aux=aux,
        rank=_merge(state.rank for state in states),
        truncation_error=_merge(state.truncation_error for state in states),
        cumulative_truncation_error=_merge(state.cumulative_truncation_error for state in states),
        status=status,
        skipped=jnp.max(jnp.stack([state.skipped for state in states])),
    )


def _none_taken(opt_state: Any) -> Any:
    """An optimizer's state after a step that changes nothing."""

    def is_leaf(node: Any) -> bool:
        return isinstance(node, TdlrtState)

    return jax.tree.map(
        lambda node: left_out(node, flags.NONFINITE) if is_leaf(node) else node, opt_state, is_leaf=is_leaf
    )


def _parts_held_back(before: Any, after: Any) -> Any:
    """The next state where tdlrt left a step out: other parts are as before, what is around all parts goes on counting."""

    def is_leaf(node: Any) -> bool:
        return isinstance(node, TdlrtState)

    def is_part(node: Any) -> bool:
        return isinstance(node, TdlrtState | optax.MaskedState | optax.MultiTransformState)

    def hold_back(old: Any, new: Any) -> Any:
        if not is_part(old):
            return new
        return jax.tree.map(lambda o, n: n if is_leaf(o) else o, old, new, is_leaf=is_leaf)

    return jax.tree.map(hold_back, before, after, is_leaf=is_part)


def _merge(dictionaries: Any) -> dict[str, Array]:
    return {name: value for dictionary in dictionaries for name, value in dictionary.items()}
