"""The gradient of the augmented core (line 9 of Algorithm 1) out of the first forward and backward pass.

The augmented bases ``[U | Ũ]`` leave the network as it is (line 8), so the second gradient of ``bug`` is one at the same network:
``dC̃ = ∇_W L ×_j [U_j | Ũ_j]^T``. It needs no second pass through the network, only what every kernel saw in the first: its
layer's input ``Z`` and output gradient ``dY``, for ``dC̃ = corr(Z Ũ_in, dY Ũ_out)`` with the spatial modes contracted.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, get_opaque_trace_state

from tdlrt_jax.arguments import check_callable
from tdlrt_jax.conv.onepass import Applied, Tap, applications, core_cotangent
from tdlrt_jax.conv.plans import plan_for, streamed_modes
from tdlrt_jax.frame import Frame, chart_point, is_kernel, lift_nodes, value_and_grad, with_point
from tdlrt_jax.tucker import kernel_shape

__all__ = ["SecondGradient", "core_gradient", "value_and_two_grads"]

_SAME_NUMBERS = ("convert_element_type", "copy", "copy_p")  # what may come between a parameter and its layer


class SecondGradient:
    """What :func:`tdlrt_jax.tdlrt` is given as ``value_and_grad_fn``: the gradient at other bases, for the same batch.

    Called, it evaluates anew, at any parameters. ``at_same_network`` takes parameters that give the same network, and needs no
    pass through it where the first evaluation could keep what is needed.
    """

    def __init__(self, anew: Callable[[Any], Any], same: Callable[[Any], Any] | None = None):
        self._anew = anew
        self.at_same_network = anew if same is None else same

    def __call__(self, params: Any) -> Any:
        """``(value, grads)`` at the given parameters, from a pass of its own."""
        return self._anew(params)


def value_and_two_grads(loss_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """:func:`tdlrt_jax.value_and_grad`, and the second gradient that ``bug`` asks for, without a second pass where possible.

    Possible if every Tucker kernel is used once, by :func:`tdlrt_jax.tucker_conv` or ``tucker_linear``, and not within a
    transformation of the loss's own (jit, scan, remat, vmap); else, and where the loss depends on a kernel in another way
    (a penalty on its norm, say), the second gradient is evaluated anew. Keeping the output gradients of all Tucker layers
    until then is its price in memory.

    Args:
      loss_fn, has_aux: as in :func:`tdlrt_jax.value_and_grad`.

    Returns:
      ``f(params, *args) -> ((value, grads), second)``, ``second`` a :class:`SecondGradient`; ``second(at)`` and
      ``second.at_same_network(at)`` give ``(value, grads)`` for core-only frames in the place of the kernels.

    Example:
      >>> import jax.numpy as jnp, optax, tdlrt_jax
      >>> params = {"w": tdlrt_jax.hosvd(jnp.arange(12.0).reshape(3, 4) / 12, rank=2)}
      >>> loss = lambda params, x: jnp.sum((tdlrt_jax.tucker_linear(x, params["w"]) - 1) ** 2)
      >>> tx = tdlrt_jax.tdlrt(optax.sgd(0.01), tolerance=0.01)
      >>> state = tx.init(params)
      >>> (value, grads), second = value_and_two_grads(loss)(params, jnp.ones((5, 3)))
      >>> updates, state = tx.update(grads, state, params, value_and_grad_fn=second)
      >>> bool(loss(optax.apply_updates(params, updates), jnp.ones((5, 3))) < value)
      True

    Source: Algorithm 1, lines 8 and 9.
    """

    check_callable("loss_fn", loss_fn, "loss_fn(params, *batch) -> loss")

    def evaluate(params: Any, *args: Any) -> tuple[tuple[Any, Any], SecondGradient]:
        def anew(at: Any) -> tuple[Any, Any]:
            return value_and_grad(loss_fn, has_aux)(at, *args)

        here = get_opaque_trace_state()
        nodes, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_kernel)
        frames = lift_nodes(nodes)
        points = [chart_point(node) if isinstance(node, Frame) else node for node in frames]
        kernels = [position for position, node in enumerate(frames) if isinstance(node, Frame)]

        def loss(points: list[Any], taps: dict[int, Tap]) -> Any:
            lifted = [
                with_point(frame, point)._replace(tap=taps[position]) if position in taps else point
                for position, (frame, point) in enumerate(zip(frames, points))
            ]
            return loss_fn(jax.tree.unflatten(treedef, lifted), *args)

        applied = _applications(loss, points, kernels)
        if applied is None:
            return anew(params), SecondGradient(anew)
        taps = {
            position: Tap(position, *jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), (at.x, at.dy)))
            for position, at in applied.items()
        }
        value, (grads, seen) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=has_aux)(points, taps)

        def same(at: Any) -> tuple[Any, Any]:
            there = jax.tree.leaves(at, is_leaf=is_kernel)
            # Asked for within a lax.cond (adapt_every), where XLA's CPU convolutions are slow.
            products = jax.default_backend() == "cpu" and get_opaque_trace_state() != here
            gradients = [
                core_gradient(node, applied[position], seen[position], products=products)
                if isinstance(node, Frame)
                else grads[position]
                for position, node in enumerate(there)
            ]
            return value, jax.tree.unflatten(treedef, gradients)

        return (value, jax.tree.unflatten(treedef, grads)), SecondGradient(anew, same)

    return evaluate


def core_gradient(frame: Frame, applied: Applied, tap: Tap, *, products: bool = False) -> Any:
    """``dC̃`` at a core-only frame, from the input and the output gradient that the kernel saw.

    Args:
      frame: the bases ``[U_j | Ũ_j]``.
      applied: how the kernel was applied.
      tap: ``x`` and ``dy``.
      products: by matrix products instead of a convolution.

    Returns:
      ``TuckerTensor(dC̃, (None, ...))``.
    """
    shape = kernel_shape(frame)
    rank = tuple(None if u is None else size for u, size in zip(frame.U, frame.core.shape))
    geometry = applied.how.geometry
    plan = plan_for(shape, rank, applied.x.shape[0], applied.x.shape[1:-1], geometry)
    stream_in, stream_out = (s and r is not None for s, r in zip(streamed_modes(plan), rank[-2:]))
    how = applied.how._replace(stream_in=stream_in, stream_out=stream_out, products=products)
    return chart_point(Frame(core_cotangent(how, tap, frame), None, frame.U, None))


def _applications(
    loss: Callable[[list[Any], dict[int, Tap]], Any], points: list[Any], kernels: Sequence[int]
) -> dict[int, Applied] | None:
    """How each kernel is applied, found by tracing the loss without computing it.

    None unless each is exactly once, and the loss depends on it by nothing else.
    """
    if not kernels:
        return None
    noted: list[Applied] = []
    outside: list[Any] = []

    def listen(points: list[Any]) -> Any:
        outside.append(get_opaque_trace_state())
        return loss(points, {position: Tap(position) for position in kernels})

    token = applications.set(noted)
    try:
        traced = jax.make_jaxpr(listen)(points)
    finally:
        applications.reset(token)
    if sorted(at.kernel for at in noted) != list(kernels) or any(at.trace != outside[0] for at in noted):
        return None
    users = _users(traced.jaxpr)
    rest = iter(traced.jaxpr.invars)
    for position, point in enumerate(points):
        ends = [_end(variable, users) for variable in itertools.islice(rest, len(jax.tree.leaves(point)))]
        if position in kernels and not _is_one_application(ends):
            return None
    return {at.kernel: at for at in noted}


def _users(jaxpr: Jaxpr) -> dict[Var, list[JaxprEqn]]:
    """The operations that every variable goes into, once for each time; those that the first output depends on."""
    needed, users = set(jaxpr.outvars[:1]), defaultdict[Var, list[JaxprEqn]](list)
    for operation in reversed(jaxpr.eqns):
        if needed.isdisjoint(operation.outvars):
            continue
        for variable in operation.invars:
            if not isinstance(variable, Literal):
                needed.add(variable)
                users[variable].append(operation)
    return users


def _end(variable: Var, users: dict[Var, list[JaxprEqn]]) -> JaxprEqn | None:
    """The one operation that a variable goes into, under another dtype perhaps; None where there are several, or none."""
    while len(users.get(variable, ())) == 1:
        (operation,) = users[variable]
        if operation.primitive.name not in _SAME_NUMBERS:
            return operation
        (variable,) = operation.outvars
    return None


def _is_one_application(ends: Sequence[JaxprEqn | None]) -> bool:
    """Whether all parts of a kernel go into one rule of :mod:`tdlrt_jax.conv.onepass`."""
    first = ends[0]
    return (
        first is not None and first.primitive.name.startswith("custom_vjp_call") and all(end is first for end in ends)
    )
