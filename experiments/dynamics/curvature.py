"""The curvature of the Tucker manifold: what small singular values cost (7), and not the steps of Algorithm 1.

    python -m experiments.dynamics.curvature --output DIR

Measures the largest step of explicit Euler on (7), and the steps that adaptive solvers accept and reject, as the smallest
singular value falls; beside them the largest step of every integrator, and the steps of a solver of the K- and core-flows. Writes
curvature.json and draws curvature (.png, .svg) from it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from experiments.dynamics.problems import graded_kernel, smooth, smooth_loss
from experiments.dynamics.results import command, read, slope
from experiments.run.plots import save_figure
from experiments.run.process import start_over
from tdlrt_jax import TuckerTensor, resize
from tdlrt_jax.dynamics import factor_flow, flow_step, integrate

__all__ = ["draw", "largest_step", "main", "measure"]

NAME = "curvature"


def largest_step(
    descends: Callable[[float], bool], low: float = 1e-14, high: float = 10.0, *, halvings: int = 24
) -> float:
    """The largest step size with ``descends``, by bisection of its logarithm; 0 if there is none above ``low``.

    Example:
      >>> round(largest_step(lambda h: h < 0.03), 5)
      0.03
    """
    if not descends(low):
        return 0.0
    for _ in range(halvings):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if descends(middle) else (low, middle)
    return low


def descent_test(
    step: Callable[[TuckerTensor, Array], TuckerTensor], loss: Callable[[TuckerTensor], Array], steps: int
) -> Callable[[TuckerTensor, float], bool]:
    """Whether the loss falls, or stays, in each of so many steps of a size."""

    @jax.jit
    def run(kernel: TuckerTensor, step_size: Array) -> Array:
        def body(kernel: TuckerTensor, _: Any) -> tuple[TuckerTensor, Array]:
            kernel = step(kernel, step_size)
            return kernel, loss(kernel)

        _, losses = jax.lax.scan(body, kernel, None, length=steps)
        losses = jnp.concatenate([loss(kernel)[None], losses])
        return jnp.all(losses[1:] <= losses[:-1] * (1 + 1e-12)) & jnp.all(jnp.isfinite(losses))

    return lambda kernel, step_size: bool(run(kernel, jnp.asarray(step_size, kernel.core.dtype)))


def measure(
    *,
    smallest: Sequence[float] = tuple(np.geomspace(1e-1, 1e-8, 8).tolist()),
    shape: tuple[int, ...] = (5, 6, 7),
    rank: int = 3,
    steps: int = 20,
    end: float = 1.0,
    rtol: float = 1e-6,
    solvers: Sequence[str] = ("tsit5", "dopri8", "kvaerno5"),
    integrators: Sequence[str] = ("bug", "parallel", "fixed_rank"),
    max_steps: int = 20_000,
) -> dict[str, Any]:
    """All measurements of one loss (:class:`~experiments.dynamics.problems.Smooth`), at a fixed rank.

    ``bug`` is also measured with room for every rank: back at a fixed one, what truncation costs is not small with ``h``.

    Args:
      smallest: singular values at the start, relative to the largest.
      shape, rank: of the kernel.
      steps: in how many steps the loss has to fall.
      end, rtol, max_steps: of the adaptive solvers.
      solvers, integrators: their names.

    Returns:
      ``{"largest_step": {method: [...]}, "order": {method: ...}, "adaptive": {solver: [...]}, "inner_steps": [...], ...}``.
      ``order`` is the slope of the largest step over the smallest value; ``inner_steps`` are those of one ``bug`` step of 0.1.
    """
    problem = smooth(shape, rank + 1)

    def loss(kernel: Any) -> Array:
        return smooth_loss(kernel, problem)

    flow = factor_flow(loss)
    kernels = [graded_kernel(shape, rank, value) for value in smallest]

    def factor_euler(kernel: TuckerTensor, step_size: Array) -> TuckerTensor:
        return jax.tree.map(lambda x, v: x + step_size * v, kernel, flow.velocity(kernel))

    methods: dict[str, Callable[[TuckerTensor, Array], TuckerTensor]] = {"euler on (7)": factor_euler}
    for name in integrators:
        step = flow_step(loss, integrator=name, inner="euler")
        methods[name] = lambda kernel, h, step=step: step(kernel, h, 0.0)[0]  # type: ignore[misc]
    largest: dict[str, list[float]] = {}
    for name, method in methods.items():
        test = descent_test(method, loss, steps)
        largest[name] = [largest_step(partial(test, kernel)) for kernel in kernels]
        if name == "bug":
            largest["bug, ranks free"] = [largest_step(partial(test, resize(kernel, shape))) for kernel in kernels]
    adaptive: dict[str, list[dict[str, Any]]] = {
        solver: [
            integrate(
                flow, kernel, end, solver=solver, rtol=rtol, atol=rtol * 1e-2, max_steps=max_steps
            ).statistics._asdict()
            for kernel in kernels
        ]
        for solver in solvers
    }
    exact = flow_step(loss, integrator="bug", inner="exact", rtol=rtol, atol=rtol * 1e-2)
    return {
        "shape": shape,
        "rank": rank,
        "steps": steps,
        "end": end,
        "rtol": rtol,
        "smallest": list(smallest),
        "largest_step": largest,
        "order": {name: slope(smallest, np.maximum(found, 1e-300).tolist()) for name, found in largest.items()},
        "adaptive": adaptive,
        "inner_steps": [int(exact(kernel, 0.1, 0.0)[1].inner_steps) for kernel in kernels],
    }


def draw(directory: Path) -> list[Path]:
    """Draws the figure from a directory's JSON alone, into it."""
    result = read(directory, NAME)
    figure = Figure(figsize=(10, 4), layout="constrained")
    largest, steps = figure.subplots(1, 2)
    for number, (name, found) in enumerate(result["largest_step"].items()):
        largest.loglog(result["smallest"], found, marker="osD^"[number % 4], label=name)
    largest.set(title=f"largest step with descent in {result['steps']} steps", ylabel="step size h")
    for number, (name, found) in enumerate(result["adaptive"].items()):
        shown = [(s, f) for s, f in zip(result["smallest"], found) if f["succeeded"]]
        for field, line in (("accepted", "-"), ("rejected", ":")):
            steps.semilogx(
                [s for s, _ in shown],
                [f[field] for _, f in shown],
                color=f"C{number}",
                linestyle=line,
                marker="osD^"[number % 4],
                label=f"{name} on (7), {field}",
            )
    steps.semilogx(
        result["smallest"], result["inner_steps"], color="0.3", marker="x", label="K and core flows, h = 0.1"
    )
    steps.set(title=f"steps to t = {result['end']:g}, tolerance {result['rtol']:g}", ylabel="steps")
    for axes in (largest, steps):
        axes.set(xlabel="smallest singular value at the start")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return save_figure(figure, directory, NAME)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and draws for a command line; returns the exit code, 2 if there is nothing to draw."""
    return command(NAME, __doc__ or "", measure, draw, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    start_over()
    sys.exit(main())
