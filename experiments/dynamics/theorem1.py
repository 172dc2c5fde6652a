"""Theorem 1: the flows (5), (7) and (8) are one flow; what a QR decomposition at every instant and frozen frames change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.dynamics.problems import graded_kernel, smooth, smooth_loss
from experiments.dynamics.results import slope
from tdlrt_jax import TuckerTensor, to_dense
from tdlrt_jax.dynamics import Trajectory, factor_flow, flow_step, integrate, kc_flow, projected_flow
from tdlrt_jax.tucker import multi_mode_product, unfold

__all__ = ["gauge_defects", "measure"]


def measure(
    *,
    shape: tuple[int, ...] = (5, 6, 7),
    rank: int = 3,
    smallest: Sequence[float] = (1e-1, 1e-2, 1e-3),
    end: float = 1.0,
    points: int = 10,
    steps: Sequence[float] = (0.1, 0.05, 0.025, 0.0125),
) -> dict[str, Any]:
    """Distances between the flows over time, defects of (8) in two gauges, and the error of one step with frozen frames.

    Args:
      shape, rank: of the kernel.
      smallest: singular values at the start, relative to the largest; one series each.
      end, points: integrate to ``end`` and look at so many times.
      steps: sizes of a single step.

    Returns:
      ``{"times", "series": [...]}``; distances relative to ``||W||``.
    """
    problem = smooth(shape, rank + 1)

    def loss(kernel: Any) -> Array:
        return smooth_loss(kernel, problem)

    flows = {
        "projected": projected_flow(loss, graded_kernel(shape, rank, 0.1)),
        "factors": factor_flow(loss),
        "kc": kc_flow(loss),
    }
    one_step = {name: flow_step(loss, integrator=name) for name in ("bug", "parallel", "fixed_rank")}
    gradient = jax.jit(jax.grad(loss))
    times = np.linspace(0, end, points + 1)[1:]
    series = []
    for value in smallest:
        kernel = graded_kernel(shape, rank, value)

        def solve(name: str, at: Sequence[float], kernel: TuckerTensor = kernel) -> Trajectory:
            return integrate(flows[name], kernel, at, solver="dopri8", rtol=1e-11, atol=1e-13, max_steps=100_000)

        found = {name: solve(name, times.tolist()) for name in flows}
        size = jnp.linalg.norm(found["factors"].params[0])
        states = [jax.tree.map(lambda leaf, k=k: leaf[k], found["factors"].states) for k in range(len(times))]
        defects = [
            gauge_defects(state, flows["factors"].velocity(state), gradient(to_dense(state))) for state in states
        ]
        small = solve("factors", sorted(steps))
        frozen = {
            name: [
                _distance(to_dense(step(kernel, h, 0.0)[0]), small.params[k], size) for k, h in enumerate(sorted(steps))
            ]
            for name, step in one_step.items()
        }
        series.append(
            {
                "smallest": value,
                "distance": {
                    f"{a}-{b}": [_distance(x, y, size) for x, y in zip(found[a].params, found[b].params)]
                    for a, b in (("factors", "kc"), ("factors", "projected"), ("kc", "projected"))
                },
                "moved": [_distance(x, to_dense(kernel), size) for x in found["factors"].params],
                "statistics": {name: trajectory.statistics._asdict() for name, trajectory in found.items()},
                "defect_qr": [max(plain) for plain, _ in defects],
                "defect_corrected": [max(corrected) for _, corrected in defects],
                "frozen": {name: {"error": e, "order": slope(sorted(steps), e)} for name, e in frozen.items()},
            }
        )
    return {"shape": shape, "rank": rank, "times": times.tolist(), "step_sizes": sorted(steps), "series": series}


def gauge_defects(kernel: TuckerTensor, velocity: TuckerTensor, gradient: Array) -> tuple[list[float], list[float]]:
    """How far ``K_i'`` is from ``-∇_{K_i} L`` if ``Q_i, S_i`` are the QR decomposition at every instant, relative, by mode.

    Args:
      kernel: ``C, U_i``, on a trajectory of (7).
      velocity: ``C', U_i'``.
      gradient: ``∇_W L``, full.

    Returns:
      ``||K_i' + ∇_{K_i} L|| / ||∇_{K_i} L||``, and the same after ``K_i Q_i'^T Q_i`` is added.
    """
    plain, corrected = [], []
    for mode, (u, du) in enumerate(zip(kernel.factors, velocity.factors)):

        def decomposition(core: Array, u: Array, mode: int = mode) -> tuple[Array, Array]:
            q, triangular = jnp.linalg.qr(unfold(core, mode).T)
            return u @ triangular.T, q

        (k, q), (dk, dq) = jax.jvp(decomposition, (kernel.core, u), (velocity.core, du))
        descent = -unfold(multi_mode_product(gradient, kernel.factors, transpose=True, skip=mode), mode) @ q
        size = jnp.linalg.norm(descent)
        plain.append(float(jnp.linalg.norm(dk - descent) / size))
        corrected.append(float(jnp.linalg.norm(dk + k @ (dq.T @ q) - descent) / size))
    return plain, corrected


def _distance(x: Array, y: Array, size: Array) -> float:
    return float(jnp.linalg.norm(x - y) / size)
