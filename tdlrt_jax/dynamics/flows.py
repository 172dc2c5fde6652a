"""The gradient flows of section 3 as ODEs, for any loss of a pytree of parameters with Tucker kernels among them.

The full flow (4) moves dense kernels. The projected flow (5) keeps their Tucker ranks; (7) and (8) are the same flow in other
variables. All leaves that are not kernels follow ``-∇L``.

What holds of (8). Write ``Mat_i(C) = S_i Q_i^T`` with orthonormal columns in ``Q_i``, ``K_i = U_i S_i``, and let ``C, U_i``
follow (7). The product rule on ``K_i Q_i^T = U_i Mat_i(C)``, times ``Q_i``, gives::

    K_i' + K_i (Q_i'^T Q_i) = -∇_{K_i} L(Ten_i(Q_i^T) ×_{j != i} U_j ×_i K_i)

so (8) is exact, with nothing held constant, where ``Q_i^T Q_i' = 0``: the gauge of :func:`kc_flow`. If instead ``S_i`` is kept
triangular, as by a QR decomposition at every instant, ``Q_i'^T Q_i`` is a skew matrix and in general not zero: it turns the
columns of ``K_i`` among themselves, which changes neither their range nor ``K_i K_i^T``. No inverse is in (8), but
``U_i = K_i S_i^{-1}`` and ``Q_i`` have to be carried along, and there it is again: the curvature of the manifold belongs to the
flow, not to its variables. A step of Algorithm 1 is free of it because it holds ``U_j`` and ``Q_i`` still
(:func:`tdlrt_jax.dynamics.flow_step`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tdlrt_jax.arguments import check_callable
from tdlrt_jax.dynamics.tangent import project, tangent_coordinates
from tdlrt_jax.frame import Frame, lift_all, value_and_grad
from tdlrt_jax.paths import KernelTree, flatten_kernels
from tdlrt_jax.truncation import hosvd
from tdlrt_jax.tucker import (
    HIGHEST,
    ModeArray,
    TuckerTensor,
    active_rank,
    capacity,
    check_structure,
    fold,
    is_tucker,
    kernel_shape,
    to_dense,
    unfold,
)

__all__ = ["Flow", "MovingFrame", "factor_flow", "full_flow", "kc_flow", "projected_flow"]


class Flow(NamedTuple):
    """An autonomous ODE ``y' = velocity(y)`` and how its states relate to parameters; hashable, static under ``jit``."""

    initial: Callable[[Any], Any]  # parameters, with Tucker kernels, to a state
    velocity: Callable[[Any], Any]  # a state to its time derivative, of the same structure
    dense: Callable[[Any], Any]  # a state to parameters with full kernels, in which flows can be compared


class MovingFrame(NamedTuple):
    """The state of one kernel in :func:`kc_flow`: ``W = C ×_i U_i`` with ``U_i = K_i S_i^{-1}``, ``S_i = Mat_i(C) Q_i``."""

    core: Array  # (r_1, ..., r_d)
    K: tuple[ModeArray, ...]  # (n_i, r_i) each; None for a whole mode
    Q: tuple[ModeArray, ...]  # (r_1, ..., r_d) each: Ten_i(Q_i^T); None likewise

    def frame(self) -> Frame:
        """The chart of Theorem 1 at this state."""
        bases: list[ModeArray] = []
        for mode, (k, q) in enumerate(zip(self.K, self.Q)):
            bases.append(None if k is None else jnp.linalg.solve(_triangle(self.core, q, mode).T, k.T).T)
        return Frame(self.core, self.K, tuple(bases), self.Q)


def full_flow(loss_fn: Callable[[Any], Array]) -> Flow:
    """``W' = -∇_W L(W)`` (paper, equation (4)), for dense kernels.

    Args:
      loss_fn: ``loss_fn(params)``, a scalar; kernels in ``params`` are arrays then.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> flow = full_flow(lambda params: 0.5 * jnp.sum(tdlrt_jax.to_dense(params["w"]) ** 2))
      >>> params = {"w": tdlrt_jax.hosvd(jnp.ones((3, 4)))}
      >>> flow.velocity(flow.initial(params))["w"].shape
      (3, 4)
    """
    return Flow(dense_kernels, _descent(loss_fn), lambda state: state)


def projected_flow(loss_fn: Callable[[Any], Array], params: Any) -> Flow:
    """``W' = -P(W) ∇_W L(W)`` (paper, equation (5)) in dense coordinates, at the ranks that the kernels of ``params`` have.

    The tangent space is that of the HOSVD of ``W`` at these ranks, so the flow is defined beside the manifold too, where rounding
    and the errors of a solver take it. For explicit solvers: a HOSVD has no derivative where singular values coincide.

    Args:
      loss_fn: ``loss_fn(params)``, a scalar; kernels in ``params`` are arrays then.
      params: read for the ranks of its kernels, the sizes of their cores.

    Raises:
      ValueError: for kernels with padding.

    Source: equations (5) and (6).
    """
    tree = check_full_rank(params)
    ranks = {
        position: tuple(None if u is None else r for u, r in zip(kernel.factors, capacity(kernel)))
        for position, kernel in zip(tree.positions, tree.kernels)
    }
    descent = _descent(loss_fn)

    def velocity(state: Any) -> Any:
        nodes, treedef = jax.tree.flatten(state)
        steepest = jax.tree.leaves(descent(state))
        for position, rank in ranks.items():
            steepest[position] = project(hosvd(nodes[position], rank=rank), steepest[position])
        return jax.tree.unflatten(treedef, steepest)

    return Flow(dense_kernels, velocity, lambda state: state)


def factor_flow(loss_fn: Callable[[Any], Array]) -> Flow:
    """The coupled system (7) in core and factors, with its pseudoinverses; stiff where singular values are small.

    The state has the structure of ``params``. Its factors are orthonormal to the tolerance of the solver: the flow keeps
    ``U_i^T U_i``, nothing restores it.

    Args:
      loss_fn: ``loss_fn(params)``, a scalar; kernels in ``params`` are arrays then.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> flow = factor_flow(lambda params: 0.5 * jnp.sum((tdlrt_jax.to_dense(params["w"]) - 2) ** 2))
      >>> params = {"w": tdlrt_jax.hosvd(jnp.arange(12.0).reshape(3, 4), rank=2)}
      >>> [u.shape for u in flow.velocity(flow.initial(params))["w"].factors]
      [(3, 2), (4, 2)]

    Source: equation (7).
    """
    descent = _descent(loss_fn)

    def initial(params: Any) -> Any:
        tree = _checked(params)
        return tree.replace(tree.kernels)

    def velocity(state: Any) -> Any:
        tree = flatten_kernels(state)
        steepest = jax.tree.leaves(descent(dense_kernels(state)))
        for position, kernel in zip(tree.positions, tree.kernels):
            steepest[position] = tangent_coordinates(kernel, steepest[position])
        return tree.replace(tree.pick(steepest), steepest)

    return Flow(initial, velocity, dense_kernels)


def kc_flow(loss_fn: Callable[[Any], Array]) -> Flow:
    """The flow (8) of Theorem 1: ``K_i' = -∇_{K_i} L`` and ``C' = -∇_C L`` in frames that move along.

    The gradients are those of :func:`tdlrt_jax.value_and_grad`, all from one pass. ``Q_i`` moves as the row space of ``Mat_i(C)``
    does, by ``S_i Q_i'^T = Mat_i(C') (I - Q_i Q_i^T)``, which keeps ``Q_i^T Q_i' = 0``; in this gauge (8) is exact.

    Args:
      loss_fn: ``loss_fn(params)``, a scalar, of parameters with frames in the place of kernels. Layers have no forward-mode
        derivative there, which implicit solvers need: give these a loss that uses ``tdlrt_jax.to_dense``.

    Returns:
      A :class:`Flow` with a :class:`MovingFrame` in the place of every kernel. Its ``initial`` raises ``ValueError`` for
      kernels with padding.

    Source: Theorem 1, equation (8).
    """
    gradient = value_and_grad(loss_fn)

    def initial(params: Any) -> Any:
        tree = check_full_rank(params)
        return tree.replace([MovingFrame(frame.core, frame.K, frame.Q) for frame in lift_all(tree.kernels)])

    def velocity(state: Any) -> Any:
        nodes, treedef = jax.tree.flatten(state, is_leaf=_is_moving)
        at = jax.tree.unflatten(treedef, [node.frame() if _is_moving(node) else node for node in nodes])
        grads = jax.tree.leaves(gradient(at)[1], is_leaf=is_tucker)
        moves = [_frame_velocity(n, g) if _is_moving(n) else -g for n, g in zip(nodes, grads)]
        return jax.tree.unflatten(treedef, moves)

    def dense(state: Any) -> Any:
        def kernel_to_dense(node: Any) -> Any:
            if not _is_moving(node):
                return node
            frame = node.frame()
            return to_dense(TuckerTensor(frame.core, frame.U))

        return jax.tree.map(kernel_to_dense, state, is_leaf=_is_moving)

    return Flow(initial, velocity, dense)


def _frame_velocity(state: MovingFrame, grad: TuckerTensor) -> MovingFrame:
    turns: list[ModeArray] = []
    for mode, q in enumerate(state.Q):
        if q is None:
            turns.append(None)
            continue
        rows, move = unfold(q, mode), unfold(-grad.core, mode)
        move = move - jnp.matmul(jnp.matmul(move, rows.T, precision=HIGHEST), rows, precision=HIGHEST)
        turns.append(fold(jnp.linalg.solve(_triangle(state.core, q, mode), move), mode, state.core.shape))
    return MovingFrame(-grad.core, tuple(None if k is None else -k for k in grad.factors), tuple(turns))


def _triangle(core: Array, q: Array, mode: int) -> Array:
    """``S_i = Mat_i(C) Q_i``, which is triangular at the start only."""
    return jnp.matmul(unfold(core, mode), unfold(q, mode).T, precision=HIGHEST)


def _is_moving(node: Any) -> bool:
    return isinstance(node, MovingFrame)


def _descent(loss_fn: Callable[[Any], Array]) -> Callable[[Any], Any]:
    """``-∇L`` with respect to all leaves."""
    check_callable("loss_fn", loss_fn, "loss_fn(params) -> loss")
    gradient = jax.grad(loss_fn)
    return lambda params: jax.tree.map(jnp.negative, gradient(params))


def dense_kernels(params: Any) -> Any:
    """The parameters with every Tucker kernel as a full array."""
    tree = flatten_kernels(params)
    return tree.replace([to_dense(kernel) for kernel in tree.kernels])


def _checked(params: Any) -> KernelTree:
    tree = flatten_kernels(params)
    for name, kernel in zip(tree.names, tree.kernels):
        check_structure(kernel, name)
    return tree


def check_full_rank(params: Any) -> KernelTree:
    """The flattened parameters; raises ``ValueError`` for a kernel whose arrays are wider than its rank (eager values only)."""
    tree = _checked(params)
    for name, kernel in zip(tree.names, tree.kernels):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(kernel)):
            continue
        rank = tuple(np.asarray(active_rank(kernel)).tolist())
        if rank != capacity(kernel):
            raise ValueError(
                f"kernel {name!r} of shape {kernel_shape(kernel)} has rank {rank} in arrays for {capacity(kernel)}: a flow on "
                f"the manifold has a fixed rank, tdlrt_jax.resize(kernel, {rank}) cuts them"
            )
    return tree
