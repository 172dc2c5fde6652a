"""Training ``flax.nnx`` models with Tucker kernels: gradients of Theorem 1, and the jitted step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import tdlrt_jax.frame
from tdlrt_jax import status as flags
from tdlrt_jax.arguments import check_callable, shown
from tdlrt_jax.frame import is_kernel
from tdlrt_jax.gradients import StepGradients
from tdlrt_jax.optimizer import TdlrtState
from tdlrt_jax.step import StepInfo, check_compiler_options, combined_status, report, together, vetoed

__all__ = ["tdlrt_step", "value_and_grad", "value_and_grad_fn", "value_and_two_grads"]


class _Place(NamedTuple):
    """Stands in the arguments of a loss where a module is."""


def _is_module(node: Any) -> bool:
    """Modules, random streams, Variables: whatever a loss may change in place."""
    return isinstance(node, nnx.Pytree | nnx.Variable)


def _take_modules(arguments: Any) -> tuple[tuple[Any, ...], Any]:
    """The modules in a pytree, and the pytree with places for them."""
    leaves, treedef = jax.tree.flatten(arguments, is_leaf=_is_module)
    structure: Any = treedef
    modules = tuple(leaf for leaf in leaves if _is_module(leaf))
    return modules, structure.unflatten([_Place() if _is_module(leaf) else leaf for leaf in leaves])


def _put_modules(places: Any, modules: Iterable[Any]) -> Any:
    """Undoes :func:`_take_modules`."""
    rest = iter(modules)

    def is_place(node: Any) -> bool:
        return isinstance(node, _Place)

    return jax.tree.map(lambda node: next(rest) if is_place(node) else node, places, is_leaf=is_place)


def _split(modules: tuple[Any, ...], wrt: Any) -> tuple[Any, Any, Any]:
    """The modules' structure, the Variables that ``wrt`` selects in the first, and all other ones; as they are now.

    The Variables are copies: those of ``nnx.split`` would follow the modules.
    """
    selects = nnx.filterlib.to_predicate(wrt)

    def in_model(path: tuple, value: Any) -> bool:
        return path[0] == 0 and selects(path[1:], value)

    graphdef, *states = nnx.split(modules, in_model, ...)
    selected, rest = jax.tree.map(lambda leaf: leaf, states)
    return graphdef, selected.get(0, nnx.State({})), rest


class Functional(NamedTuple):
    """A loss of a model, and of what else it may change, as a function of the parameters without Variables."""

    loss: Callable[
        ..., Any
    ]  # (params, rest, args, kwargs) -> (value, (rest, aux)), params a pytree of arrays and kernels
    params: Any  # the parameters, without Variables
    rest: nnx.State  # everything else: BatchNorm statistics, random counters
    arguments: tuple[Any, Any]  # args and kwargs, with places for modules
    rewrap: Callable[[Any], nnx.State]  # a tree of the parameters' structure into their Variables
    update: Callable[[Any], None]  # takes another rest over into the model and the modules among the arguments


def _functional(
    loss_fn: Callable[..., Any],
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    wrt: Any,
    has_aux: bool,
) -> Functional:
    others, arguments = _take_modules((args, dict(kwargs)))
    modules = (model, *others)
    graphdef, variables, rest = _split(modules, wrt)
    treedef: Any = jax.tree.structure(variables, is_leaf=is_kernel)

    def rewrap(params: Any) -> nnx.State:
        # By leaves, so that a Frame may stand where a kernel was.
        return treedef.unflatten(jax.tree.leaves(params, is_leaf=is_kernel))

    def loss(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        # A plain merge would hand out the caller's Variables, which may not be changed inside of a transformation.
        copied = nnx.merge(graphdef, nnx.State({0: rewrap(params)}), rest, copy=True)
        args, kwargs = _put_modules((args, kwargs), copied[1:])
        out = loss_fn(copied[0], *args, **kwargs)
        value, aux = out if has_aux else (out, None)
        return value, (_split(copied, wrt)[2], aux)

    return Functional(loss, nnx.as_pure(variables), rest, arguments, rewrap, partial(nnx.update, modules))


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _check_model(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model is {shown(model)}: expected an nnx.Module")


def value_and_grad(loss_fn: Callable[..., Any], has_aux: bool = False, *, wrt: Any = nnx.Param) -> Callable[..., Any]:
    """``nnx.value_and_grad`` in the model, with the gradients of Theorem 1 for its Tucker kernels.

    What ``loss_fn`` changes in the model beside the parameters (BatchNorm statistics, dropout's counters), and in other modules
    and random streams (``nnx.Rngs``) that it is given, is changed in those, as by ``nnx.value_and_grad``.

    Args:
      loss_fn: ``loss_fn(model, *batch)``, a scalar, or ``(scalar, aux)`` with ``has_aux``. It may contain derivatives of the
        model; those in forward mode (``jax.jvp``) of ``tdlrt_jax.densify(model)``, which is differentiated as the model is.
      has_aux: as in ``nnx.value_and_grad``.
      wrt: filter for the Variables to differentiate in; that of ``nnx.Optimizer``.

    Returns:
      ``f(model, *batch, **more) -> (value, grads)``; ``grads`` is an ``nnx.State`` of the parameters' structure, for
      ``nnx.Optimizer.update(model, grads)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import tdlrt_jax.nn
      >>> model = tdlrt_jax.nn.TuckerLinear(6, 5, rank=2, rngs=nnx.Rngs(0))
      >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
      >>> value, grads = tdlrt_jax.nn.value_and_grad(loss_fn)(model, jnp.ones((3, 6)))
      >>> grads["kernel"].get_value().core.shape
      (2, 2)

    Source: Theorem 1, equation (8).
    """

    check_callable("loss_fn", loss_fn, "loss_fn(model, *batch) -> loss")

    def evaluate(model: Any, *args: Any, **kwargs: Any) -> Any:
        _check_model(model)
        parts = _functional(loss_fn, model, args, kwargs, wrt=wrt, has_aux=has_aux)
        gradient = tdlrt_jax.frame.value_and_grad(parts.loss, has_aux=True)
        (value, (rest, aux)), grads = gradient(parts.params, parts.rest, *parts.arguments)
        parts.update(rest)
        return ((value, aux) if has_aux else value), parts.rewrap(grads)

    return evaluate


def value_and_two_grads(
    loss_fn: Callable[..., Any], has_aux: bool = False, *, wrt: Any = nnx.Param
) -> Callable[..., Any]:
    """:func:`value_and_grad`, and the second gradient that ``"bug"`` asks for, without a second pass where possible.

    See :func:`tdlrt_jax.value_and_two_grads` for where it is. Both gradients see the same random numbers and statistics; the
    model's move once.

    Args:
      loss_fn, has_aux, wrt: those of :func:`value_and_grad`.

    Returns:
      ``f(model, *batch, **more) -> ((value, grads), second)``: ``grads`` for ``nnx.Optimizer.update(model, grads,
      value_and_grad_fn=second)``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import tdlrt_jax.nn
      >>> model = tdlrt_jax.nn.TuckerLinear(6, 5, rank=2, rngs=nnx.Rngs(0))
      >>> tx = tdlrt_jax.nn.tdlrt(optax.sgd(0.1), tolerance=0.1)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> gradients = value_and_two_grads(lambda model, x: jnp.mean((model(x) - 1) ** 2))
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     (loss, grads), second = gradients(model, x)
      ...     optimizer.update(model, grads, value_and_grad_fn=second)
      ...     return loss
      >>> losses = [float(step(model, optimizer, jnp.ones((3, 6)))) for _ in range(3)]
      >>> losses[2] < losses[0]
      True

    Source: Algorithm 1, lines 8 and 9.
    """

    check_callable("loss_fn", loss_fn, "loss_fn(model, *batch) -> loss")
    gradients = StepGradients()

    def evaluate(model: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, Any], Callable[[Any], Any]]:
        _check_model(model)
        parts = _functional(loss_fn, model, args, kwargs, wrt=wrt, has_aux=has_aux)
        first, second = gradients(parts.loss, parts.params, parts.rest, parts.arguments)
        parts.update(first.model_state)
        value = (first.loss, first.aux) if has_aux else first.loss
        return (value, parts.rewrap(first.grads)), second["value_and_grad_fn"]

    return evaluate


def value_and_grad_fn(
    loss_fn: Callable[..., Any], has_aux: bool = False, *, wrt: Any = nnx.Param
) -> Callable[..., Callable[[Any], tuple[Any, Any]]]:
    """What ``"bug"`` and ``"fixed_rank"`` ask for: the gradient at other parameters, for the same batch.

    :func:`value_and_two_grads` has it beside the first gradient. Take this one *before* :func:`value_and_grad` changes the
    model, so that both evaluations see the same random numbers and statistics::

        again = nn.value_and_grad_fn(loss_fn)(model, x, y)
        loss, grads = nn.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, grads, value_and_grad_fn=again)

    :func:`tdlrt_step` does this. Nothing in the model changes here.

    Args:
      loss_fn, has_aux, wrt: those of :func:`value_and_grad`.

    Returns:
      ``f(model, *batch) -> g``, and ``g(params) -> (value, grads)`` with the parameters as ``nnx.Optimizer`` hands them
      to optax, without Variables.
    """

    check_callable("loss_fn", loss_fn, "loss_fn(model, *batch) -> loss")

    def fix(model: Any, *args: Any, **kwargs: Any) -> Callable[[Any], tuple[Any, Any]]:
        _check_model(model)
        parts = _functional(loss_fn, model, args, kwargs, wrt=wrt, has_aux=has_aux)
        gradient = tdlrt_jax.frame.value_and_grad(parts.loss, has_aux=True)

        def evaluate(params: Any) -> tuple[Any, Any]:
            (value, (_, aux)), grads = gradient(params, parts.rest, *parts.arguments)
            return ((value, aux) if has_aux else value), grads

        return evaluate

    return fix


def tdlrt_step(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    accumulate: int = 1,
    second_pass: bool = False,
    cores_only: bool = False,
    ranks_stay: bool = False,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[..., StepInfo]:
    """One jitted training step of an nnx model, in place; :func:`tdlrt_jax.tdlrt_step` with nnx's conventions.

    Args:
      loss_fn: ``loss_fn(model, *batch)``, a scalar, or ``(scalar, aux)`` with ``has_aux``.
      has_aux: ``loss_fn`` returns something beside the loss.
      accumulate: split every batch array along its first axis into so many micro-batches, one after the other, and take means
        of all gradients over them.
      second_pass: evaluate the second gradient of ``"bug"`` by a pass of its own; see :func:`tdlrt_jax.tdlrt_step`.
      cores_only: a step between two adaptations, in which bases and ranks stay; see there.
      ranks_stay: one in which bases move and ranks stay; see there.
      compiler_options: those of :func:`jax.jit`, such as :func:`tdlrt_jax.compiler_options`. JAX refuses them where the
        step is called in another jitted function: give them to that one.

    Returns:
      ``step(model, optimizer, *batch, **more) -> info``, a :class:`tdlrt_jax.StepInfo`. ``optimizer`` is an ``nnx.Optimizer``
      of :func:`tdlrt_jax.nn.tdlrt`. The model's other state, and that of modules and random streams in the batch
      (``nnx.Rngs``), moves once, from the first evaluation; where a number is not finite (see
      :func:`tdlrt_jax.tdlrt_step`), model and optimizer stay as they were and ``info.status`` says so.

    Raises:
      ValueError: for ``accumulate`` below 1, a batch that it does not divide, more than one of ``second_pass``, ``cores_only``
        and ``ranks_stay``, or ``compiler_options`` that are no mapping; if there is no :func:`tdlrt_jax.nn.tdlrt` in the
        optimizer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import tdlrt_jax.nn
      >>> model = tdlrt_jax.nn.TuckerLinear(6, 5, rank=2, rngs=nnx.Rngs(0))
      >>> tx = tdlrt_jax.nn.tdlrt(optax.sgd(0.1), tolerance=0.1)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> step = tdlrt_jax.nn.tdlrt_step(lambda model, x: jnp.mean((model(x) - 1) ** 2))
      >>> losses = [float(step(model, optimizer, jnp.ones((3, 6))).loss) for _ in range(3)]
      >>> losses[2] < losses[0]
      True
    """

    check_callable("loss_fn", loss_fn, "loss_fn(model, *batch) -> loss")
    gradients = StepGradients(
        accumulate=accumulate, second_pass=second_pass, cores_only=cores_only, ranks_stay=ranks_stay
    )
    options = check_compiler_options(compiler_options)

    def step(model: Any, optimizer: nnx.Optimizer, *batch: Any, **more: Any) -> StepInfo:
        _check_model(model)
        if not isinstance(optimizer, nnx.Optimizer):
            raise ValueError(
                f"optimizer is {shown(optimizer)}: expected an nnx.Optimizer(model, tdlrt(...), wrt=nnx.Param)"
            )
        parts = _functional(loss_fn, model, batch, more, wrt=optimizer.wrt, has_aux=has_aux)
        first, how = gradients(parts.loss, parts.params, parts.rest, parts.arguments)
        before = nnx.as_pure(optimizer.opt_state)
        # By path: a loss may have made Variables (nnx.Module.sow), which nothing was before.
        old, new = _by_path(parts.rest), _by_path(first.model_state)
        value = vetoed(first.loss, *([tree[name] for name in old if name in new] for tree in (old, new)))
        optimizer.update(model, parts.rewrap(first.grads), value=value, **how)

        after = nnx.as_pure(optimizer.opt_state)
        status, called = combined_status(before, after, (value, first.grads))
        if not isinstance(before, TdlrtState):
            params = nnx.as_pure(nnx.state(model, optimizer.wrt))
            params, after, status = together((parts.params, params), (before, after), status, called)
            nnx.update(model, params)
            nnx.update(optimizer.opt_state, nnx.state(after))
        moves = status & flags.SKIPPED == 0

        def keep(path: tuple, leaf: Any) -> Any:
            before = old.get(jax.tree_util.keystr(path))
            return leaf if before is None else jnp.where(moves, leaf, before)

        parts.update(jax.tree_util.tree_map_with_path(keep, first.model_state))
        return report(after, first.loss, first.aux, status)

    return nnx.jit(step) if options is None else _jit_in_place(step, options)


def _jit_in_place(step: Callable[..., Any], compiler_options: dict[str, Any]) -> Callable[..., Any]:
    """``nnx.jit`` of a function that changes modules in place, with compiler options, which it does not take."""

    @partial(jax.jit, static_argnums=0, compiler_options=compiler_options)
    def pure(graphdef: Any, state: Any, arguments: Any) -> tuple[Any, Any]:
        modules = nnx.merge(graphdef, state)
        args, kwargs = _put_modules(arguments, modules)
        out = step(*args, **kwargs)
        return nnx.state(modules), out

    def in_place(*args: Any, **kwargs: Any) -> Any:
        modules, arguments = _take_modules((args, kwargs))
        state, out = pure(*nnx.split(modules), arguments)
        nnx.update(modules, state)
        return out

    return in_place
