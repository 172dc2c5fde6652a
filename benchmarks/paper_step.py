"""The paper's formulation as it is written: one forward and backward pass for every factor, and one for the core.

Algorithm 1 states a K-step for each mode, each with the gradient of its own loss ``L(Ten_i(Q_i^T) ×_{j != i} U_j ×_i K_i)``, and
an S-step. Written plainly that is ``d + 1`` passes through the network (all layers at once in each). It is the yardstick for what
the single pass of :func:`tdlrt_jax.value_and_grad` saves; augmentation, truncation and optimizer are the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import tdlrt_jax
from tdlrt_jax import TuckerTensor
from tdlrt_jax.frame import lift_all
from tdlrt_jax.paths import flatten_kernels

__all__ = ["one_pass_per_factor", "paper_step"]


def one_pass_per_factor(loss_fn: Callable[..., Any], params: Any, model_state: Any, *batch: Any) -> Any:
    """Lines 1 to 3 of Algorithm 1: ``((loss, new_model_state), grads)`` with a pass for every mode.

    ``grads`` has the gradients of all ``K_i``, zeros for the cores (whose gradient Algorithm 1 takes at the augmented bases),
    and those of the other leaves from the first pass.
    """
    tree = flatten_kernels(params)
    frames = lift_all(tree.kernels)
    order = max(len(kernel.factors) for kernel in tree.kernels)
    in_mode: list[list[Any]] = []
    first: Any = None
    for mode in range(order):
        has = [mode < len(frame.U) and frame.U[mode] is not None for frame in frames]
        if not any(has):
            in_mode.append([None] * len(frames))
            continue
        variables = [frame.K[mode] if ok else None for frame, ok in zip(frames, has)]

        def loss(variables: list[Any], others: Any, mode: int = mode, has: list[bool] = has) -> Any:
            kernels = [
                TuckerTensor(frame.Q[mode], (*frame.U[:mode], k, *frame.U[mode + 1 :])) if ok else kernel
                for frame, k, ok, kernel in zip(frames, variables, has, tree.kernels)
            ]
            return loss_fn(tree.replace(kernels, flatten_kernels(others).nodes), model_state, *batch)

        wrt = (0, 1) if first is None else 0
        (value, state), grads = jax.value_and_grad(loss, argnums=wrt, has_aux=True)(variables, params)
        if first is None:
            first, grads = (value, state, grads[1]), grads[0]
        in_mode.append(grads)
    value, state, others = first
    grads = [
        TuckerTensor(jnp.zeros_like(kernel.core), tuple(in_mode[mode][i] for mode in range(len(kernel.factors))))
        for i, kernel in enumerate(tree.kernels)
    ]
    return (value, state), tree.replace(grads, flatten_kernels(others).nodes)


def paper_step(loss_fn: Callable[..., Any], tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """``step(params, opt_state, model_state, *batch) -> (params, opt_state, model_state, loss)``, Algorithm 1 plainly."""

    def step(params: Any, opt_state: Any, model_state: Any, *batch: Array) -> tuple[Any, Any, Any, Array]:
        (value, new_state), grads = one_pass_per_factor(loss_fn, params, model_state, *batch)

        def second(at: Any) -> Any:
            (again, _), grads = tdlrt_jax.value_and_grad(loss_fn, has_aux=True)(at, model_state, *batch)
            return again, grads

        updates, opt_state = tx.update(grads, opt_state, params, value_and_grad_fn=second)
        return optax.apply_updates(params, updates), opt_state, new_state, value

    return step
