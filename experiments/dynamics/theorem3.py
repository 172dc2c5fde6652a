"""Theorem 3: ||W(t) - Y(t)|| <= c1 eps + c2 h + c3 tau / h, each term by itself, down to singular values of 1e-12."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.dynamics.problems import Quadratic, graded_kernel, quadratic, quadratic_loss
from experiments.dynamics.results import slope
from tdlrt_jax import TuckerTensor, resize, to_dense
from tdlrt_jax.dynamics import flow_step

__all__ = ["distance", "follow", "measure", "normal_term", "step_term", "truncation_term"]

END = 0.5
METHODS = tuple((integrator, inner) for integrator in ("bug", "parallel", "fixed_rank") for inner in ("exact", "euler"))


@functools.cache
def _runner(integrator: str, inner: str) -> Callable[..., tuple[TuckerTensor, Array]]:
    """Many steps as one program: ``run(kernel, step_size, tolerance, steps, problem)``."""
    step = flow_step(quadratic_loss, integrator=integrator, inner=inner)  # type: ignore[arg-type]

    @jax.jit
    def run(kernel: TuckerTensor, step_size: Array, tolerance: Array, steps: Array, problem: Quadratic) -> Any:
        def body(_: Array, carry: tuple[TuckerTensor, Array]) -> tuple[TuckerTensor, Array]:
            kernel, solved = carry
            kernel, info = step(kernel, step_size, tolerance, problem)
            return kernel, solved & info.solved

        return jax.lax.fori_loop(0, steps, body, (kernel, jnp.ones((), bool)))

    return run


def follow(
    kernel: TuckerTensor,
    problem: Quadratic,
    *,
    steps: int,
    tolerance: float = 0.0,
    integrator: str = "bug",
    inner: str = "exact",
) -> np.ndarray:
    """``Y(t)``, the full tensor after so many equal steps to ``t = END``.

    Raises:
      RuntimeError: if a sub-step was not solved to its tolerance.
    """
    moved, solved = _runner(integrator, inner)(kernel, END / steps, tolerance, steps, problem)
    if not solved:
        raise RuntimeError(f"sub-steps of {integrator} did not reach their tolerance")
    return np.asarray(to_dense(moved))


def distance(kernel: TuckerTensor, problem: Quadratic, **options: Any) -> float:
    """``||W(t) - Y(t)||`` at ``t = END``, ``W`` the solution of the full flow (4), ``Y`` that of :func:`follow`."""
    return float(np.linalg.norm(follow(kernel, problem, **options) - problem.solution(to_dense(kernel), END)))


def step_term(
    smallest: Sequence[float],
    steps: Sequence[int],
    methods: Sequence[tuple[str, str]] = METHODS,
    *,
    shape: tuple[int, ...] = (6, 7, 8),
    rank: int = 3,
    eps: float = 0.0,
) -> list[dict[str, Any]]:
    """The term in ``h``: no truncation beyond the capacity, which is the rank; observed orders and ``c2 = max error / h``."""
    problem = quadratic(shape, eps=eps)
    found = []
    for integrator, inner in methods:
        for value in smallest:
            kernel = graded_kernel(shape, rank, value)
            errors = [distance(kernel, problem, steps=n, integrator=integrator, inner=inner) for n in steps]
            sizes = [END / n for n in steps]
            found.append(
                {
                    "integrator": integrator,
                    "inner": inner,
                    "smallest": value,
                    "step_sizes": sizes,
                    "error": errors,
                    "order": slope(sizes, errors),
                    "c2": max(e / h for e, h in zip(errors, sizes)),
                }
            )
    return found


def normal_term(
    smallest: Sequence[float],
    eps: Sequence[float],
    *,
    steps: int = 128,
    shape: tuple[int, ...] = (6, 7, 8),
    rank: int = 3,
    integrators: Sequence[str] = ("bug", "parallel"),
) -> list[dict[str, Any]]:
    """The term in ``eps``: steps so short that theirs hardly counts; ``c1 = max error / eps``."""
    found = []
    for integrator in integrators:
        for value in smallest:
            kernel = graded_kernel(shape, rank, value)
            errors = [
                distance(kernel, quadratic(shape, eps=e), steps=steps, integrator=integrator) for e in (0.0, *eps)
            ]
            rest = errors.pop(0)
            found.append(
                {
                    "integrator": integrator,
                    "smallest": value,
                    "eps": list(eps),
                    "error": errors,
                    "error_without": rest,
                    "order": slope(eps, [e - rest for e in errors]),
                    "c1": max((e - rest) / x for e, x in zip(errors, eps)),
                }
            )
    return found


def truncation_term(
    smallest: Sequence[float],
    tolerances: Sequence[float],
    steps: Sequence[int],
    *,
    shape: tuple[int, ...] = (12, 12, 12),
    rank: int = 3,
    decay: float = 0.6,
) -> list[dict[str, Any]]:
    """The term in ``tau / h``: every step adds directions of all sizes, and loses those under ``tau``.

    Kernels have room for every rank, so that nothing else is lost. ``lost`` is the distance to the same steps without truncation,
    which leaves the other terms out; ``error`` that to the full flow. The regression is over all pairs of tolerance and step size
    at which anything but rounding is lost.
    """
    problem = quadratic(shape, eps=1.0, decay=decay)
    found = []
    for value in smallest:
        kernel = resize(graded_kernel(shape, rank, value), shape)
        ends = [follow(kernel, problem, steps=n) for n in steps]
        exact = problem.solution(to_dense(kernel), END)
        rows = [[follow(kernel, problem, steps=n, tolerance=tau) for n in steps] for tau in tolerances]
        lost = [[float(np.linalg.norm(w - end)) for w, end in zip(row, ends)] for row in rows]
        ratios = [[tau * n / END for n in steps] for tau in tolerances]
        found.append(
            {
                "smallest": value,
                "tolerances": list(tolerances),
                "step_sizes": [END / n for n in steps],
                "lost": lost,
                "error": [[float(np.linalg.norm(w - exact)) for w in row] for row in rows],
                "error_without": [float(np.linalg.norm(end - exact)) for end in ends],
                "order": slope(*zip(*[(x, y) for x, y in zip(np.ravel(ratios), np.ravel(lost)) if y > 1e-12])),
                "c3": float(np.max(np.array(lost) / np.array(ratios))),
            }
        )
    return found


def measure(
    *,
    smallest: Sequence[float] = (1e-1, 1e-4, 1e-8, 1e-12),
    steps: Sequence[int] = (4, 8, 16, 32, 64),
    eps: Sequence[float] = tuple(np.geomspace(1e-3, 1e-1, 5).tolist()),
    tolerances: Sequence[float] = tuple(np.geomspace(6e-4, 4e-3, 5).tolist()),
) -> dict[str, Any]:
    """All three terms; ``h_normal`` is the term in ``h`` where ``eps`` is not zero, and adds its own to every error."""
    return {
        "end": END,
        "h": step_term(smallest, steps),
        "h_normal": step_term(smallest, steps, METHODS[:4], eps=1e-2),
        "eps": normal_term(smallest, eps),
        "tau": truncation_term(smallest, tolerances, (16, 32, 64)),
    }
