"""Momentum on the manifold: the optimizer beside the heavy-ball flow, and what becomes of moments that are not carried along.

    python -m experiments.dynamics.momentum --output DIR

Measures, in float64 on one small kernel: the distance of tdlrt(optax.sgd(s**2, momentum=1 - γ s)) from the heavy-ball flow as
the step s falls; the same for a fixed momentum and the gradient flow; the way to an optimum of low rank beside dense heavy ball;
and the energy of the flows. Writes momentum.json and draws momentum (.png, .svg) from it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

from experiments.dynamics.problems import Smooth, graded_kernel, smooth, smooth_loss
from experiments.dynamics.results import command, read, slope
from experiments.run.plots import save_figure
from experiments.run.process import start_over
from tdlrt_jax import TuckerTensor, hosvd, tdlrt, to_dense, value_and_grad
from tdlrt_jax.dynamics import (
    Flow,
    dense_velocity,
    factor_flow,
    factor_heavy_ball_flow,
    full_heavy_ball_flow,
    integrate,
)

__all__ = ["MOMENTS", "approach", "descent", "draw", "energies", "main", "measure"]

NAME = "momentum"
INTEGRATORS = ("bug", "parallel", "fixed_rank")

# What becomes of the moments (m_C, m_{K_i}) when the bases move.
MOMENTS = {
    "carried": "projected onto the next tangent space (this library)",
    "core only": "the core's turned with its bases, the K_i's forgotten",
    "kept": "the same numbers in the new bases",
}


def _with_moments(state: Any, moments: str, before: Any, gradient: TuckerTensor, momentum: Array) -> Any:
    """The state of ``tdlrt(optax.sgd(..., momentum))`` after a step, its trace as ``moments`` says."""
    trace, *rest = state.inner
    if moments == "core only":
        changed = trace.trace._replace(factors=jax.tree.map(jnp.zeros_like, trace.trace.factors))
    elif moments == "kept":
        changed = jax.tree.map(lambda m, g: momentum * m + g, before.inner[0].trace, gradient)
    else:
        return state
    return state._replace(inner=(trace._replace(trace=changed), *rest))


@functools.cache
def _runner(
    integrator: str, moments: str, looks: int
) -> Callable[[TuckerTensor, Smooth, Array, Array, Array], tuple[Array, Array]]:
    """``run(kernel, problem, learning_rate, momentum, stride)``: the full kernels after every ``stride`` steps."""

    @jax.jit
    def run(kernel: TuckerTensor, problem: Smooth, learning_rate: Array, momentum: Array, stride: Array) -> Any:
        gradient = value_and_grad(lambda kernel: smooth_loss(kernel, problem))
        # The arrays have room for these ranks alone, and with a tolerance of zero nothing smaller is asked for.
        tx = tdlrt(optax.sgd(learning_rate, momentum=momentum), tolerance=0.0, integrator=integrator)

        def step(_: Any, carry: Any) -> Any:
            kernel, state = carry
            _, grads = gradient(kernel)
            updates, after = tx.update(grads, state, kernel, value_and_grad_fn=gradient)
            outside = [g if u is None else g - u @ (u.T @ g) for u, g in zip(kernel.factors, grads.factors)]
            after = _with_moments(after, moments, state, grads._replace(factors=tuple(outside)), momentum)
            return optax.apply_updates(kernel, updates), after

        def look(carry: Any, _: Any) -> tuple[Any, Array]:
            carry = jax.lax.fori_loop(0, stride, step, carry)
            return carry, to_dense(carry[0])

        (_, state), found = jax.lax.scan(look, (kernel, tx.init(kernel)), None, length=looks)
        return found, state.status

    return run


def follow(
    kernel: TuckerTensor,
    problem: Smooth,
    *,
    learning_rate: float,
    momentum: float,
    stride: int,
    looks: int = 1,
    integrator: str = "bug",
    moments: str = "carried",
) -> np.ndarray:
    """The full kernels ``(looks, n_1, ..., n_d)`` after every ``stride`` steps of the optimizer, at the kernel's ranks.

    Raises:
      RuntimeError: if a step was not finite.
    """
    rate, beta = jnp.asarray(learning_rate, kernel.core.dtype), jnp.asarray(momentum, kernel.core.dtype)
    found, status = _runner(integrator, moments, looks)(kernel, problem, rate, beta, jnp.asarray(stride))
    if not np.isfinite(np.asarray(found)).all() or int(status) & 1:
        raise RuntimeError(f"{integrator} with moments {moments!r} diverged at learning rate {learning_rate}")
    return np.asarray(found)


def approach(
    *,
    smallest: Sequence[float] = (1e-1, 1e-2, 1e-3),
    steps: Sequence[int] = (25, 50, 100, 200, 400),
    shape: tuple[int, ...] = (5, 6, 7),
    rank: int = 3,
    friction: float = 1.0,
    end: float = 2.0,
    fixed: float = 0.9,
    integrators: Sequence[str] = INTEGRATORS,
    moments: Sequence[str] = tuple(MOMENTS),
) -> dict[str, Any]:
    """Distances to the flows at ``t = end`` in so many steps, relative to how far the flow has moved.

    ``limit`` is ``"heavy ball"`` for ``sgd(s**2, momentum=1 - γ s)`` with ``s = end / steps``, ``"gradient flow"`` for a momentum
    that stays ``fixed`` and the learning rate ``s (1 - fixed)``.
    """
    problem = smooth(shape, rank + 1, norm=2.0)

    def loss(kernel: Any) -> Array:
        return smooth_loss(kernel, problem)

    flows = {"heavy ball": factor_heavy_ball_flow(loss, friction=friction), "gradient flow": factor_flow(loss)}
    series = []
    for value in smallest:
        kernel = graded_kernel(shape, rank, value)
        start = np.asarray(to_dense(kernel))
        for limit, flow in flows.items():
            exact = _solved(flow, kernel, [end])[-1]
            moved = float(np.linalg.norm(exact - start))
            for integrator in integrators:
                for handling in moments:
                    errors = []
                    for number in steps:
                        s = end / number
                        rate, beta = (s**2, 1 - friction * s) if limit == "heavy ball" else (s * (1 - fixed), fixed)
                        (found,) = follow(
                            kernel,
                            problem,
                            learning_rate=rate,
                            momentum=beta,
                            stride=number,
                            integrator=integrator,
                            moments=handling,
                        )
                        errors.append(float(np.linalg.norm(found - exact)) / moved)
                    sizes = [end / number for number in steps]
                    series.append(
                        {
                            "limit": limit,
                            "integrator": integrator,
                            "moments": handling,
                            "smallest": value,
                            "moved": moved,
                            "step_sizes": sizes,
                            "error": errors,
                            "order": slope(sizes, errors),
                        }
                    )
    return {"shape": shape, "rank": rank, "friction": friction, "end": end, "fixed_momentum": fixed, "series": series}


def _solved(flow: Flow, kernel: TuckerTensor, times: Sequence[float]) -> np.ndarray:
    found = integrate(flow, kernel, times, solver="dopri8", rtol=1e-10, atol=1e-12, max_steps=200_000)
    if not found.statistics.succeeded:
        raise RuntimeError("the flow could not be integrated")
    return np.asarray(found.params)


def descent(
    *,
    steps: int = 400,
    looks: int = 40,
    learning_rate: float = 0.02,
    momentum: float = 0.9,
    shape: tuple[int, ...] = (5, 6, 7),
    rank: int = 3,
    integrators: Sequence[str] = INTEGRATORS,
    moments: Sequence[str] = tuple(MOMENTS),
) -> dict[str, Any]:
    """Distances to a known optimum of the kernel's ranks over the steps, relative to its norm.

    Beside dense heavy ball (``"dense"``) and plain dense gradient descent with the same learning rate (``"plain"``). The start is
    the optimum and a random tensor, truncated to the ranks.
    """
    problem = smooth(shape, rank, norm=2.0)
    optimum = np.asarray(problem.target)
    rng = np.random.default_rng(1)
    kernel = hosvd(jnp.asarray(optimum + 0.1 * rng.standard_normal(shape)), rank=rank)
    stride = steps // looks

    def distances(kernels: np.ndarray) -> list[float]:
        gaps = (kernels - optimum).reshape(len(kernels), -1)
        return (np.linalg.norm(gaps, axis=1) / np.linalg.norm(optimum)).tolist()

    def dense(beta: float) -> np.ndarray:
        gradient = jax.jit(jax.grad(lambda w: smooth_loss(w, problem)))
        w, trace, found = to_dense(kernel), jnp.zeros(shape), []
        for number in range(stride * looks):
            trace = beta * trace + gradient(w)
            w = w - learning_rate * trace
            if (number + 1) % stride == 0:
                found.append(np.asarray(w))
        return np.stack(found)

    return {
        "steps": [stride * (look + 1) for look in range(looks)],
        "learning_rate": learning_rate,
        "momentum": momentum,
        "shape": shape,
        "rank": rank,
        "dense": distances(dense(momentum)),
        "plain": distances(dense(0.0)),
        "series": {
            integrator: {
                handling: distances(
                    follow(
                        kernel,
                        problem,
                        learning_rate=learning_rate,
                        momentum=momentum,
                        stride=stride,
                        looks=looks,
                        integrator=integrator,
                        moments=handling,
                    )
                )
                for handling in moments
            }
            for integrator in integrators
        },
    }


def energies(
    *, shape: tuple[int, ...] = (5, 6, 7), rank: int = 3, friction: float = 0.3, end: float = 12.0, points: int = 121
) -> dict[str, Any]:
    """Energy ``L(W) + ||W'||^2 / 2`` and loss along the full flow and the one on the manifold, from the same start."""
    problem = smooth(shape, rank, norm=2.0)

    def loss(kernel: Any) -> Array:
        return smooth_loss(kernel, problem)

    times = np.linspace(0, end, points)
    kernel, found = graded_kernel(shape, rank, 0.1), {}
    for name, make in (("full", full_heavy_ball_flow), ("manifold", factor_heavy_ball_flow)):
        flow = make(loss, friction=friction)
        way = integrate(flow, kernel, times.tolist(), solver="dopri8", rtol=1e-9, atol=1e-11, max_steps=200_000)
        losses = jax.vmap(loss)(way.params)
        kinetic = 0.5 * jnp.sum(jax.vmap(dense_velocity)(way.states) ** 2, axis=range(1, len(shape) + 1))
        found[name] = {"loss": losses.tolist(), "energy": (losses + kinetic).tolist()}
    return {"friction": friction, "times": times.tolist(), **found}


def measure() -> dict[str, Any]:
    """All of it, by name."""
    return {"approach": approach(), "descent": descent(), "energies": energies(), "moments": MOMENTS}


def draw(directory: Path) -> list[Path]:
    """Draws the figure from a directory's JSON alone, into it."""
    result = read(directory, NAME)
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    series = result["approach"]["series"]
    values = sorted({entry["smallest"] for entry in series}, reverse=True)
    for axes, limit in ((panels[0, 0], "heavy ball"), (panels[0, 1], "gradient flow")):
        for entry in series:
            if entry["limit"] != limit or entry["smallest"] != values[0]:
                continue
            axes.loglog(
                entry["step_sizes"],
                entry["error"],
                color=f"C{list(MOMENTS).index(entry['moments'])}",
                linestyle=("-", "--", ":")[INTEGRATORS.index(entry["integrator"])],
                marker=".",
                label=f"{entry['integrator']}, {entry['moments']}, order {entry['order']:.2f}",
            )
        axes.set(title=f"distance to the {limit} on the manifold, σ = {values[0]:g}", xlabel="s", ylabel="relative")
    axes = panels[1, 0]
    found = result["descent"]
    axes.semilogy(found["steps"], found["dense"], color="k", label="dense heavy ball")
    axes.semilogy(found["steps"], found["plain"], color="0.6", label="dense gradient descent")
    for integrator, line in zip(INTEGRATORS, ("-", "--", ":")):
        for number, (moments, gaps) in enumerate(found["series"].get(integrator, {}).items()):
            axes.semilogy(found["steps"], gaps, color=f"C{number}", linestyle=line, label=f"{integrator}, {moments}")
    axes.set(title=f"distance to the optimum, momentum {found['momentum']:g}", xlabel="step")
    axes = panels[1, 1]
    for number, name in enumerate(("full", "manifold")):
        for field, line in (("energy", "-"), ("loss", ":")):
            axes.plot(
                result["energies"]["times"],
                result["energies"][name][field],
                color=f"C{number}",
                linestyle=line,
                label=f"{name} flow, {field}",
            )
    axes.set(title=f"heavy-ball flows, friction {result['energies']['friction']:g}", xlabel="t")
    for axes in panels.ravel():
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return save_figure(figure, directory, NAME)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and draws for a command line; returns the exit code, 2 if there is nothing to draw."""
    return command(NAME, __doc__ or "", measure, draw, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    start_over()
    sys.exit(main())
