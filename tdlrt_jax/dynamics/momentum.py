"""The heavy-ball flow, full and on the Tucker manifold: what descent with momentum tends to as its steps become short.

A ball of friction ``γ`` rolls by ``W'' = -γ W' - ∇L(W)``. Held on the manifold, it is pushed by forces normal to it only
(d'Alembert's principle)::

    P(W) (W'' + γ W' + ∇L(W)) = 0,      W' in the tangent space at W

``optax.sgd(s**2, momentum=1 - γ s)`` is the symplectic Euler method with the step ``s`` for the full flow. Its trace is
``-W' / s``, a tangent vector, and after every step the transport of :func:`tdlrt_jax.tdlrt` projects it orthogonally onto the
next tangent space; as ``s`` falls, these projections become the normal force. With a momentum that stays as it is while the
learning rate falls, both tend to the gradient flow instead, at the time ``learning rate × steps / (1 - momentum)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax.arguments import check_callable, check_number
from tdlrt_jax.dynamics.flows import Flow, check_full_rank, dense_kernels
from tdlrt_jax.dynamics.tangent import outside, tangent_to_dense
from tdlrt_jax.paths import flatten_kernels
from tdlrt_jax.tucker import HIGHEST, ModeArray, TuckerTensor, is_tucker, mode_product, multi_mode_product, unfold

__all__ = ["Rolling", "dense_velocity", "factor_heavy_ball_flow", "full_heavy_ball_flow"]


class Rolling(NamedTuple):
    """The state of a heavy-ball flow."""

    params: Any  # kernels as arrays in the full flow, as TuckerTensor in the factors' one
    velocity: Any  # of the same structure: W', or (C', U_i') with U_i^T U_i' = 0


def full_heavy_ball_flow(loss_fn: Callable[[Any], Array], *, friction: float) -> Flow:
    """``W'' = -γ W' - ∇_W L(W)`` from rest, for dense kernels; states are :class:`Rolling`.

    Args:
      loss_fn: ``loss_fn(params)``, a scalar; kernels in ``params`` are arrays then.
      friction: ``γ``, not negative.

    Raises:
      ValueError: for a negative friction.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> from tdlrt_jax.dynamics import integrate
      >>> flow = full_heavy_ball_flow(lambda params: 0.5 * jnp.sum(params["w"] ** 2), friction=0.0)
      >>> found = integrate(flow, {"w": tdlrt_jax.hosvd(jnp.ones((3, 4)))}, jnp.pi, rtol=1e-5)
      >>> bool(jnp.allclose(found.params["w"][-1], -1, rtol=1e-3))  # half a period of a pendulum
      True

    Source: the continuous limit of section 3.1's SGD with momentum.
    """
    _check_friction(friction)
    check_callable("loss_fn", loss_fn, "loss_fn(params) -> loss")
    gradient = jax.grad(loss_fn)

    def velocity(state: Rolling) -> Rolling:
        pull = gradient(state.params)
        return Rolling(state.velocity, jax.tree.map(lambda v, g: -friction * v - g, state.velocity, pull))

    return Flow(lambda params: _at_rest(dense_kernels(params)), velocity, lambda state: state.params)


def factor_heavy_ball_flow(loss_fn: Callable[[Any], Array], *, friction: float) -> Flow:
    """The heavy-ball flow on the manifold, from rest, in core and factors; the second-order counterpart of (7).

    With ``F = -∇_W L(W)``, the gauge ``U_i^T U_i' = 0`` and the terms of second order that the curvature adds::

        C''   = F ×_j U_j^T - γ C' + sum_i C ×_i (U_i'^T U_i')
        U_i'' = (I - U_i U_i^T) [Mat_i(F ×_{j != i} U_j^T) - 2 U_i' Mat_i(C')] Mat_i(C)^† - γ U_i' - U_i U_i'^T U_i'

    Args:
      loss_fn: ``loss_fn(params)``, a scalar; kernels in ``params`` are arrays then.
      friction: ``γ``, not negative.

    Returns:
      A :class:`Flow` whose states are :class:`Rolling` of Tucker kernels. Its ``initial`` raises ``ValueError`` for kernels with
      padding.

    Raises:
      ValueError: for a negative friction.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> flow = factor_heavy_ball_flow(lambda w: 0.5 * jnp.sum((tdlrt_jax.to_dense(w) - 2) ** 2), friction=1.0)
      >>> state = flow.initial(tdlrt_jax.hosvd(jnp.arange(12.0).reshape(3, 4), rank=2))
      >>> [u.shape for u in flow.velocity(state).velocity.factors]
      [(3, 2), (4, 2)]
    """
    check_callable("loss_fn", loss_fn, "loss_fn(params) -> loss")
    _check_friction(friction)
    gradient = jax.grad(loss_fn)

    def initial(params: Any) -> Rolling:
        tree = check_full_rank(params)
        return _at_rest(tree.replace(tree.kernels))

    def velocity(state: Rolling) -> Rolling:
        tree, speeds = flatten_kernels(state.params), flatten_kernels(state.velocity)
        force = [-g for g in jax.tree.leaves(gradient(dense_kernels(state.params)))]
        pushes = [f - friction * v if not is_tucker(v) else f for f, v in zip(force, speeds.nodes)]
        for position, kernel, speed in zip(tree.positions, tree.kernels, speeds.kernels):
            pushes[position] = _acceleration(kernel, speed, force[position], friction)
        return Rolling(state.velocity, tree.replace(tree.pick(pushes), pushes))

    return Flow(initial, velocity, lambda state: dense_kernels(state.params))


def dense_velocity(state: Rolling) -> Any:
    """``W'`` of every kernel as a full array, other leaves' velocities as they are.

    Args:
      state: of one of this module's flows.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> flow = factor_heavy_ball_flow(lambda w: jnp.sum(tdlrt_jax.to_dense(w) ** 2), friction=0.0)
      >>> dense_velocity(flow.initial(tdlrt_jax.hosvd(jnp.ones((3, 4)), rank=1))).shape
      (3, 4)

    Source: equation (3).
    """
    if not isinstance(state, Rolling):
        raise ValueError(f"state is a {type(state).__name__}: expected a Rolling, of one of this module's flows")
    tree, speeds = flatten_kernels(state.params), flatten_kernels(state.velocity)
    return speeds.replace([tangent_to_dense(kernel, speed) for kernel, speed in zip(tree.kernels, speeds.kernels)])


def _acceleration(kernel: TuckerTensor, speed: TuckerTensor, force: Array, friction: float) -> TuckerTensor:
    """``(C'', U_i'')`` of one kernel."""
    core = multi_mode_product(force, kernel.factors, transpose=True) - friction * speed.core
    turns: list[ModeArray] = []
    for mode, (u, du) in enumerate(zip(kernel.factors, speed.factors)):
        if u is None or du is None:
            turns.append(None)
            continue
        bend = _dot(du.T, du)
        core = core + mode_product(kernel.core, bend, mode)
        rows = unfold(multi_mode_product(force, kernel.factors, transpose=True, skip=mode), mode)
        rows = outside(rows - 2 * _dot(du, unfold(speed.core, mode)), u)
        turns.append(_dot(rows, jnp.linalg.pinv(unfold(kernel.core, mode))) - friction * du - _dot(u, bend))
    return TuckerTensor(core, tuple(turns))


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def _at_rest(params: Any) -> Rolling:
    return Rolling(params, jax.tree.map(jnp.zeros_like, params))


def _check_friction(friction: float) -> None:
    if not check_number("friction", friction, "a number that is not negative") >= 0:
        raise ValueError(f"friction={friction}: expected a number that is not negative, so that no energy is fed in")
