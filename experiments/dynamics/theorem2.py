"""Theorem 2: one step lowers the loss, L(W(h)) <= L(W(0)) - alpha h + beta tau; alpha and beta measured, the inequality tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.dynamics.problems import graded_kernel, smooth, smooth_loss
from tdlrt_jax import TuckerTensor, lift, resize, to_dense
from tdlrt_jax.dynamics import chart_coordinates, flow_step, project
from tdlrt_jax.integrators import augment
from tdlrt_jax.tucker import multi_mode_product

__all__ = ["measure"]


def measure(
    *,
    shape: tuple[int, ...] = (6, 7, 8),
    rank: int = 3,
    smallest: Sequence[float] = (1e-1, 1e-12),
    step_sizes: Sequence[float] = tuple(np.geomspace(1e-3, 1.0, 7).tolist()),
    tolerances: Sequence[float] = tuple(np.geomspace(1e-4, 0.3, 8).tolist()),
    integrators: Sequence[str] = ("bug", "parallel", "fixed_rank"),
    inners: Sequence[str] = ("exact", "euler"),
) -> dict[str, Any]:
    """Losses after one step over step sizes and tolerances, and the constants that follow.

    ``alpha`` is the least of ``(L(0) - L(h)) / h`` without truncation, ``beta`` the largest of ``(L(h, tau) - L(h, 0)) / tau``,
    both over every other step size. The inequality is tried with them at the rest. Kernels have room for every rank.

    Returns:
      ``{"series": [...]}``. ``rate`` is what the descent per step size tends to with ``h``: ``||P(W) ∇L||^2`` for one gradient a
      step, ``||∇L ×_i [U_i | Ũ_i]^T||^2`` for ``bug``. ``beta_bound`` is the product of bounds on ``||∇L||`` and ``||W(h)||``,
      which no truncation can exceed. ``violations`` counts pairs with a larger loss than the inequality allows, by ``beyond`` at
      most.
    """
    problem = smooth(shape, rank, norm=2.0)
    lipschitz = float(jnp.linalg.norm(problem.weights))
    loss_of = jax.jit(smooth_loss)
    series = []
    for integrator in integrators:
        for inner in inners:
            step = flow_step(smooth_loss, integrator=integrator, inner=inner)  # type: ignore[arg-type]
            for value in smallest:
                start = graded_kernel(shape, rank, value)
                kernel = resize(start, shape)
                before = float(loss_of(kernel, problem))
                gradient = jax.grad(smooth_loss)(to_dense(start), problem)

                def after(h: float, tau: float, kernel: Any = kernel, step: Any = step) -> tuple[float, float]:
                    moved, _ = step(kernel, h, tau, problem)
                    return float(loss_of(moved, problem)), float(jnp.linalg.norm(moved.core))

                exact = [after(h, 0.0) for h in step_sizes]
                cut = np.array([[after(h, tau)[0] for tau in tolerances] for h in step_sizes])
                rates = [(before - loss) / h for h, (loss, _) in zip(step_sizes, exact)]
                excess = cut - np.array([loss for loss, _ in exact])[:, None]
                alpha = min(rates[::2])
                beta = max(float(np.max(excess[::2] / np.array(tolerances))), 0.0)
                allowed = before - alpha * np.array(step_sizes)[:, None] + beta * np.array(tolerances)
                beyond = (cut - allowed)[1::2]
                series.append(
                    {
                        "integrator": integrator,
                        "inner": inner,
                        "smallest": value,
                        "loss": before,
                        "descent": [before - loss for loss, _ in exact],
                        "excess": excess.tolist(),
                        "alpha": alpha,
                        "rates": rates,
                        "rate": descent_rate(start, gradient, integrator),
                        "beta": beta,
                        "beta_bound": lipschitz * max(norm for _, norm in exact),
                        "pairs": int(beyond.size),
                        "violations": int(np.sum(beyond > 1e-12)),
                        "beyond": float(np.max(beyond)),
                    }
                )
    return {
        "shape": shape,
        "rank": rank,
        "step_sizes": list(step_sizes),
        "tolerances": list(tolerances),
        "series": series,
    }


def descent_rate(kernel: TuckerTensor, gradient: Array, integrator: str) -> float:
    """``-dL/dh`` of one step at ``h = 0``, for a kernel without padding and the full gradient there."""
    if integrator != "bug":
        return float(jnp.sum(project(kernel, gradient) ** 2))
    frame = lift(kernel)
    bases = augment(frame, chart_coordinates(frame, gradient)).bases
    return float(jnp.sum(multi_mode_product(gradient, bases, transpose=True) ** 2))
