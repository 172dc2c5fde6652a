"""Winning tickets: a teacher of low Tucker rank, and whether Algorithm 1 finds its ranks from an overestimate.

    python -m experiments.dynamics.tickets --output DIR

A convolution, and a network of two with tanh between them, learn what a teacher with kernels of low Tucker rank gives for random
images. The student starts with all ranks full: from a random kernel, in the network from the teacher's with noise of half their
norm. Ranks over time stand beside the teacher's, and the student's kernels beside those of the full flow (4) from the same start.
Writes tickets.json and draws tickets (.png, .svg) from it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from experiments.dynamics.results import command, read
from experiments.run.plots import save_figure
from experiments.run.process import start_over
from tdlrt_jax import TuckerTensor, hosvd, to_dense, tucker_conv
from tdlrt_jax.dynamics import flow_step, full_flow, integrate

__all__ = ["PROBLEMS", "Lesson", "draw", "lesson", "main", "measure", "study"]

NAME = "tickets"

# Kernels (height, width, in, out) and the teacher's ranks, by layer.
PROBLEMS = {
    "one convolution": {"conv1": ((3, 3, 6, 8), (2, 2, 3, 4))},
    "two convolutions": {"conv1": ((3, 3, 4, 8), (2, 2, 3, 4)), "conv2": ((3, 3, 8, 6), (2, 2, 4, 3))},
}


# What is drawn of a series: where the full flow's is, and a title.
_FIELDS = {
    "distance": (None, "distance to the full flow"),
    "to_teacher": ("distance_full", "distance to the teacher"),
    "loss": ("loss_full", "loss"),
}


class Lesson(NamedTuple):
    """What is to be learned, and from where."""

    loss: Callable[[Any], Array]  # of parameters with kernels in any form
    teacher: dict[str, TuckerTensor]
    start: dict[str, TuckerTensor]  # full ranks


def network(params: dict[str, Any], images: Array) -> Array:
    """One convolution after the other, tanh in between."""
    x = images
    for number, kernel in enumerate(params.values()):
        x = tucker_conv(x if number == 0 else jnp.tanh(x), kernel)
    return x


def lesson(
    kernels: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], *, images: int = 48, size: int = 6, seed: int = 0
) -> Lesson:
    """A teacher, and a student to be.

    Args:
      kernels: shape and the teacher's ranks, by layer, in order.
      images, size: so many random images of ``size × size`` pixels.
      seed: of everything random.
    """
    rng = np.random.default_rng(seed)

    def low_rank(shape: tuple[int, ...], rank: tuple[int, ...]) -> TuckerTensor:
        factors = tuple(jnp.asarray(np.linalg.qr(rng.standard_normal((n, r)))[0]) for n, r in zip(shape, rank))
        core = rng.standard_normal(rank)
        return TuckerTensor(jnp.asarray(core * np.sqrt(shape[-1]) / np.linalg.norm(core)), factors)

    def overestimate(kernel: TuckerTensor) -> TuckerTensor:
        dense = to_dense(kernel)
        noise = rng.standard_normal(dense.shape)
        noise *= float(jnp.linalg.norm(dense)) / np.linalg.norm(noise)
        # A layer by itself learns from any start. A network could learn its hidden channels in any order, and its kernels could
        # not be compared with the teacher's.
        return hosvd(jnp.asarray(noise) if len(kernels) == 1 else dense + 0.5 * noise)

    teacher = {name: low_rank(*entry) for name, entry in kernels.items()}
    channels = next(iter(kernels.values()))[0][2]
    z = jnp.asarray(rng.standard_normal((images, size, size, channels)))
    answer = network(teacher, z)

    def loss(params: dict[str, Any]) -> Array:
        return 0.5 * jnp.mean(jnp.sum((network(params, z) - answer) ** 2, axis=-1))

    return Lesson(loss, teacher, {name: overestimate(kernel) for name, kernel in teacher.items()})


def study(
    task: Lesson,
    *,
    tolerances: Sequence[float],
    end: float,
    step_size: float,
    looks: int,
    integrator: str = "bug",
    inner: str = "euler",
) -> dict[str, Any]:
    """Follows the full flow, and Algorithm 1 at some tolerances.

    Returns:
      ``{"times", "loss_full", "distance_full", "series": [...]}`` with a series a tolerance: ``ranks`` by layer at all times, the
      start included; ``loss``; ``distance``, that of all kernels to the full flow's, and ``to_teacher``, both relative to the
      teacher's norm. ``distance_full`` is the full flow's to the teacher.
    """
    stride = max(1, round(end / looks / step_size))
    times = [look * stride * step_size for look in range(looks + 1)]
    full = integrate(full_flow(task.loss), task.start, times, rtol=1e-8, atol=1e-10)
    if not full.statistics.succeeded:
        raise RuntimeError("the full flow could not be integrated")
    step = flow_step(task.loss, integrator=integrator, inner=inner)  # type: ignore[arg-type]
    names = list(task.teacher)
    wanted = {name: to_dense(kernel) for name, kernel in task.teacher.items()}
    size = _norm(wanted)

    @partial(jax.jit, static_argnums=2)
    def follow(params: Any, tolerance: Array, looks: int) -> Any:
        def one(params: Any, _: Any) -> tuple[Any, dict[str, Array]]:
            params, info = step(params, step_size, tolerance)
            return params, info.rank

        def look(params: Any, _: Any) -> tuple[Any, Any]:
            params, ranks = jax.lax.scan(one, params, None, length=stride)
            last = {name: ranks[name][-1] for name in names}
            return params, (last, {name: to_dense(params[name]) for name in names}, task.loss(params))

        return jax.lax.scan(look, params, None, length=looks)[1]

    series = []
    for tolerance in tolerances:
        ranks, kernels, losses = jax.tree.map(np.asarray, follow(task.start, jnp.asarray(tolerance), looks))
        paths = {name: [list(task.start[name].core.shape), *(row.tolist() for row in ranks[name])] for name in names}
        gaps = [_norm({n: kernels[n][k] - full.params[n][k + 1] for n in names}) / size for k in range(looks)]
        rest = [_norm({n: kernels[n][k] - wanted[n] for n in names}) / size for k in range(looks)]
        series.append(
            {
                "tolerance": tolerance,
                "ranks": paths,
                "loss": [float(task.loss(task.start)), *losses.tolist()],
                "distance": [0.0, *gaps],
                "to_teacher": [_norm({n: to_dense(task.start[n]) - wanted[n] for n in names}) / size, *rest],
            }
        )
    return {
        "teacher": {name: list(kernel.core.shape) for name, kernel in task.teacher.items()},
        "shapes": {name: list(dense.shape) for name, dense in wanted.items()},
        "times": times,
        "step_size": step_size,
        "integrator": integrator,
        "inner": inner,
        "loss_full": jax.vmap(task.loss)(full.params).tolist(),
        "distance_full": [_norm({n: full.params[n][k] - wanted[n] for n in names}) / size for k in range(len(times))],
        "series": series,
    }


def _norm(kernels: dict[str, Any]) -> float:
    return float(np.sqrt(sum(np.sum(np.asarray(kernel) ** 2) for kernel in kernels.values())))


def found_at(result: dict[str, Any], series: dict[str, Any]) -> float | None:
    """The time from which on all ranks are the teacher's; ``None`` if they are not at the end."""
    right = [
        all(series["ranks"][name][k] == rank for name, rank in result["teacher"].items())
        for k in range(len(result["times"]))
    ]
    if not right[-1]:
        return None
    last_wrong = max((k for k, is_right in enumerate(right) if not is_right), default=-1)
    return result["times"][last_wrong + 1]


def measure(
    *,
    tolerances: Sequence[float] = (0.3, 0.2, 0.1, 0.03),
    ends: Sequence[float] = (12.0, 300.0),
    step_sizes: Sequence[float] = (0.05, 0.1),
    looks: int = 80,
) -> dict[str, Any]:
    """Both problems, with steps of gradient descent, as in training."""
    found = {}
    for (name, kernels), end, step_size in zip(PROBLEMS.items(), ends, step_sizes):
        result = study(lesson(kernels), tolerances=tolerances, end=end, step_size=step_size, looks=looks)
        for series in result["series"]:
            series["found_at"] = found_at(result, series)
        found[name] = result
    return {"problems": found}


def draw(directory: Path) -> list[Path]:
    """Draws the figure from a directory's JSON alone, into it."""
    problems = read(directory, NAME)["problems"]
    layers = [(name, layer) for name, result in problems.items() for layer in result["teacher"]]
    fields = [(name, field) for name in problems for field in ("distance", "to_teacher")]
    columns = max(len(layers) + 1, len(fields))
    figure = Figure(figsize=(3.6 * columns + 1, 8), layout="constrained")
    panels = figure.subplots(2, columns)
    modes = ("height", "width", "in", "out")
    for column, (name, layer) in enumerate(layers):
        result, axes = problems[name], panels[0, column]
        chosen = _shown(result)
        for mode, label in enumerate(modes[: len(result["teacher"][layer])]):
            ranks = [rank[mode] for rank in chosen["ranks"][layer]]
            axes.plot(result["times"], ranks, color=f"C{mode}", label=f"{label} (of {result['shapes'][layer][mode]})")
            axes.axhline(result["teacher"][layer][mode], color=f"C{mode}", linestyle=":")
        axes.set(title=f"{name}, {layer}: ranks at τ = {chosen['tolerance']:g}", xlabel="t", ylim=(0, None))
    last = list(problems)[-1]
    for axes, (name, field) in zip((*panels[1], panels[0, len(layers)]), (*fields, (last, "loss"))):
        result = problems[name]
        for number, series in enumerate(result["series"]):
            axes.semilogy(
                result["times"],
                [value if value > 0 else np.nan for value in series[field]],
                color=f"C{number}",
                label=f"τ = {series['tolerance']:g}",
            )
        full, title = _FIELDS[field]
        if full is not None:
            axes.semilogy(result["times"], result[full], color="k", linestyle=":", label="full flow")
        axes.set(title=f"{name}: {title}", xlabel="t")
    for axes in panels.ravel():
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        axes.title.set_fontsize("medium")
    return save_figure(figure, directory, NAME)


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    """The smallest tolerance that has found the teacher's ranks; else the first."""
    right = [series for series in result["series"] if series["found_at"] is not None]
    return min(right, key=lambda series: series["tolerance"], default=result["series"][0])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and draws for a command line; returns the exit code, 2 if there is nothing to draw."""
    return command(NAME, __doc__ or "", measure, draw, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    start_over()
    sys.exit(main())
