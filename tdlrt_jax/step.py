"""``tdlrt_step``: one jitted training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tdlrt_jax import status as flags
from tdlrt_jax.arguments import check_callable, check_integer, check_mapping, check_transformation
from tdlrt_jax.frame import core_frame, value_and_grad
from tdlrt_jax.galerkin import SecondGradient, value_and_two_grads
from tdlrt_jax.inspection import adds_up, all_finite, stays_finite
from tdlrt_jax.optimizer import TdlrtState, left_out, no_updates
from tdlrt_jax.paths import path_name
from tdlrt_jax.tucker import is_tucker

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
    check_integer("accumulate", accumulate, 1, "a number of micro-batches")
    check_kind_of_step(cores_only, ranks_stay)
    if compiler_options is not None:
        check_mapping("compiler_options", compiler_options, "from names of XLA's options to their values")
    options = dict(compiler_options) if compiler_options else None
    if second_pass and (cores_only or ranks_stay):
        which = "cores_only" if cores_only else "ranks_stay"
        raise ValueError(f"second_pass=True: a step with {which} has no second gradient, leave one of them out")
    tx = optax.with_extra_args_support(tx)

    def with_state(params: Any, model_state: Any, *batch: Any) -> tuple[Array, tuple[Any, Any]]:
        """Every signature of ``loss_fn`` as ``(loss, (model_state, aux))``."""
        out = loss_fn(params, model_state, *batch) if has_state else loss_fn(params, *batch)
        if has_state and has_aux:
            return out
        if has_state:
            return out[0], (out[1], None)
        return (out[0], (None, out[1])) if has_aux else (out, (None, None))

    gradient = value_and_grad(with_state, has_aux=True)

    def first_of_two(params: Any, model_state: Any, batch: tuple) -> tuple[tuple, Callable[[Any], Any] | None]:
        """The first evaluation, and what the transformation calls for the second."""
        if cores_only:
            loss, new_model_state, aux, grads = evaluate(core_frames(params), model_state, batch)
            return (loss, new_model_state, aux, without_factors(grads, params)), None
        if ranks_stay:
            return evaluate(params, model_state, batch), None
        if accumulate > 1 or second_pass:
            first = evaluate(params, model_state, batch)

            def again(at: Any) -> tuple[Array, Any]:
                loss, _, _, grads = evaluate(_fill_masked(at, params), model_state, batch)
                return loss, grads

            return first, again
        evaluated, second = value_and_two_grads(with_state, has_aux=True)(params, model_state, *batch)
        (loss, (new_model_state, aux)), grads = evaluated

        def anew(at: Any) -> tuple[Array, Any]:
            return _loss_and_grads(second(_fill_masked(at, params)))

        def same(at: Any) -> tuple[Array, Any]:
            return _loss_and_grads(second.at_same_network(_fill_masked(at, params)))

        return (loss, new_model_state, aux, grads), SecondGradient(anew, same)

    def evaluate(params: Any, model_state: Any, batch: tuple) -> tuple[Array, Any, Any, Any]:
        if accumulate == 1:
            (loss, (model_state, aux)), grads = gradient(params, model_state, *batch)
            return loss, model_state, aux, grads

        def micro_step(carry: tuple, micro_batch: tuple) -> tuple:
            model_state, loss, grads = carry
            (value, (model_state, aux)), grad = gradient(params, model_state, *micro_batch)
            return (model_state, *jax.tree.map(jnp.add, (loss, grads), (value, grad))), aux

        micro_batches = jax.tree.map(_split(accumulate), batch)
        shapes = jax.eval_shape(gradient, params, model_state, *jax.tree.map(lambda leaf: leaf[0], micro_batches))
        (mean, _), means = shapes
        # Sums of numbers of 16 bits overflow, and round too much, where their means do not.
        loss, grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _wide(leaf.dtype)), (mean, means))
        # XLA's CPU convolutions are 15 to 77 times slower inside of a loop (benchmarks/results/cpu).
        unroll = jax.default_backend() == "cpu"
        start = (model_state, loss, grads)
        (model_state, loss, grads), aux = jax.lax.scan(micro_step, start, micro_batches, unroll=unroll)
        loss, grads = jax.tree.map(
            lambda leaf, like: (leaf / accumulate).astype(like.dtype), (loss, grads), (mean, means)
        )
        return loss, model_state, aux, grads

    def step(params: Any, opt_state: Any, model_state: Any, *batch: Any) -> tuple:
        (loss, new_model_state, aux, grads), value_and_grad_fn = first_of_two(params, model_state, batch)
        value = vetoed(loss, model_state, new_model_state)
        how = kind_of_step(cores_only, ranks_stay) or {"value_and_grad_fn": value_and_grad_fn}
        updates, after = tx.update(grads, opt_state, params, value=value, **how)
        status = combined_status(opt_state, after, (value, grads))
        if not isinstance(opt_state, TdlrtState):
            # What is outside of tdlrt (another part of a partition) may have taken what it left out.
            updates, after, status = jax.lax.cond(
                adds_up(params, updates),
                lambda: (updates, after, status),
                lambda: (no_updates(updates), _none_taken(opt_state), jnp.int32(flags.NONFINITE)),
            )
        moves = status & flags.SKIPPED == 0
        model_state = jax.tree.map(lambda new, old: jnp.where(moves, new, old), new_model_state, model_state)
        return optax.apply_updates(params, updates), after, model_state, report(after, loss, aux, status)

    if has_state:
        return jax.jit(step, donate_argnums=(0, 1, 2) if donate else (), compiler_options=options)

    def stateless_step(params: Any, opt_state: Any, *batch: Any) -> tuple:
        params, opt_state, _, info = step(params, opt_state, None, *batch)
        return params, opt_state, info

    return jax.jit(stateless_step, donate_argnums=(0, 1) if donate else (), compiler_options=options)


def check_kind_of_step(cores_only: bool, ranks_stay: bool) -> None:
    """Raises ``ValueError`` for a step that cannot be."""
    if cores_only and ranks_stay:
        raise ValueError(
            "cores_only=True, ranks_stay=True: expected one of them; with ranks_stay the bases move too, with cores_only they do "
            "not"
        )


def kind_of_step(cores_only: bool, ranks_stay: bool) -> dict[str, Any]:
    """The arguments for the transformation's update of a step that is no whole one; nothing for one that is."""
    return {"cores_only": True} if cores_only else {"ranks_stay": True} if ranks_stay else {}


def core_frames(params: Any) -> Any:
    """The parameters with a core-only frame in the place of every kernel."""
    return jax.tree_util.tree_map_with_path(
        lambda path, node: core_frame(node, path_name(path)) if is_tucker(node) else node, params, is_leaf=is_tucker
    )


def without_factors(grads: Any, params: Any) -> Any:
    """Gradients at :func:`core_frames` with the parameters' structure: zeros for the factors."""

    def fill(node: Any, grad: Any) -> Any:
        return grad._replace(factors=jax.tree.map(jnp.zeros_like, node.factors)) if is_tucker(node) else grad

    return jax.tree.map(fill, params, grads, is_leaf=is_tucker)


def _loss_and_grads(evaluated: tuple) -> tuple[Array, Any]:
    (loss, _), grads = evaluated
    return loss, grads


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


def combined_status(before: Any, after: Any, given: Any) -> Array:
    """The status of a step, from the optimizer's states before and after it.

    A transformation around tdlrt may not have called it (``optax.apply_if_finite``, or ``optax.MultiSteps`` between its steps);
    what its state then says is about an earlier step, and ``given``, the loss and the gradients, decides.
    """
    old, new = find_states(before), find_states(after)
    status = new[0].status
    for state in new[1:]:
        status = status | state.status
    if isinstance(before, TdlrtState):
        return status
    called = jnp.stack([(a.step != b.step) | (a.skipped != b.skipped) for a, b in zip(old, new)])
    unseen = jnp.where(all_finite(given), flags.OK, flags.NONFINITE).astype(jnp.int32)
    return jnp.where(jnp.any(called), status, unseen)


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


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def _split(parts: int) -> Callable[[Array], Array]:
    def split(leaf: Array) -> Array:
        if leaf.ndim == 0 or leaf.shape[0] % parts:
            raise ValueError(
                f"accumulate={parts} does not divide a batch array of shape {leaf.shape} along its first axis"
            )
        return leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:])

    return split


def _fill_masked(params: Any, full: Any) -> Any:
    """Parameters with optax's MaskedNodes, which ``partition`` and ``masked`` put in, filled from the full ones."""

    def fill(node: Any, subtree: Any) -> Any:
        return subtree if isinstance(node, optax.MaskedNode) else node

    def stop(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode) or is_kernel_node(node)

    def is_kernel_node(node: Any) -> bool:
        return is_tucker(node) or hasattr(node, "chart_to_dense")

    return jax.tree.map(fill, params, full, is_leaf=stop)


def _merge(dictionaries: Any) -> dict[str, Array]:
    return {name: value for dictionary in dictionaries for name, value in dictionary.items()}
