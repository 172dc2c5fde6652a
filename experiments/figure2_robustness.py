"""The paper's Figure 2, right: LeNet5 on MNIST from an overestimated rank, with TDLRT and with plain gradients of all factors.

Runs what is missing, then writes figure2_robustness (.png, .svg, .md) beside the results. Methods and protocol are in
experiments/configs/figure2_robustness.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.grids.figures import Curves, plot_robustness
from experiments.grids.grid import Grid, Run, main
from experiments.grids.protocol import CONFIGS, read_protocol, read_toml
from experiments.grids.tables import Sources, Statistic, final, options_of, read_results, shrunk, table
from experiments.run.plots import save_figure
from experiments.run.process import start_over

__all__ = ["GRID", "THRESHOLDS", "curves", "plan", "render", "steps_to"]

THRESHOLDS = (90, 95, 97)  # test accuracy, percent
_PATH = CONFIGS / "figure2_robustness" / "protocol.toml"
_NAME = "figure2_robustness"


def _methods() -> dict[str, dict[str, Any]]:
    return {
        name: {"title": entry["title"], "options": {"method": name, **entry.get("options", {})}}
        for name, entry in read_toml(_PATH)["methods"].items()
    }


def plan(scale: str, seeds: int | None, dataset: str | None) -> list[Run]:
    """The runs of all methods."""
    protocol = read_protocol(_PATH)
    return [
        run
        for name, method in _methods().items()
        for run in protocol.runs(name, method["options"], scale=scale, seeds=seeds, dataset=dataset)
    ]


def render(directory: Path) -> list[Path]:
    """Draws a results directory's figure and writes its table, into it.

    Raises:
      ValueError: if there are no results, some that are none, or some without a curve.
    """
    results = read_results(directory)
    found = {name: method["title"] for name, method in _methods().items() if name in results}
    if not found:
        raise ValueError(f"{directory} holds no results of {_NAME}, such as tdlrt/seed0.json")
    drawn = {title: curves(results[name]) for name, title in found.items()}
    paths = save_figure(plot_robustness(drawn), directory, _NAME)
    target = directory / f"{_NAME}.md"
    target.write_text(_markdown(found, drawn, results))
    return [*paths, target]


def curves(results: Sequence[Mapping[str, Any]]) -> Curves:
    """Test accuracies within the epochs, of runs of one configuration.

    Args:
      results: of runs with ``--evaluate-every``.

    Returns:
      Steps, and accuracies in percent.

    Raises:
      ValueError: if a run has no curve, or not the steps of the others.
    """
    found = [[point for record in result["epochs"] for point in record.get("curve", ())] for result in results]
    steps = [point["step"] for point in found[0]]
    for result, points in zip(results, found):
        if not points or [point["step"] for point in points] != steps:
            seed = result["options"]["seed"]
            raise ValueError(
                f"seed {seed} has no curve at steps {steps[:3]}...: run it with the --evaluate-every of the others"
            )
    accuracies = [[100 * point["test_accuracy"] for point in points] for points in found]
    return Curves(np.array(steps), np.array(accuracies))


def steps_to(curve: Curves, threshold: float) -> tuple[Statistic | None, int]:
    """The first step with an accuracy, over the runs that reach it; and how many do.

    Example:
      >>> steps_to(Curves(np.array([20, 40]), np.array([[50.0, 91.0], [50.0, 60.0]])), 90)
      (Statistic(mean=40.0, deviation=None, number=1), 1)
    """
    reached = [curve.steps[row >= threshold] for row in curve.values]
    first = [float(steps[0]) for steps in reached if len(steps)]
    return (Statistic.of(first) if first else None), len(first)


def _markdown(
    found: Mapping[str, str], drawn: Mapping[str, Curves], results: Mapping[str, list[dict[str, Any]]]
) -> str:
    protocol, methods, sources = read_protocol(_PATH).options, _methods(), Sources()
    lines, compared = [], {}
    for name, title in found.items():
        group, curve = results[name], drawn[title]
        line = [title, str(len(group))]
        for threshold in THRESHOLDS:
            steps, count = steps_to(curve, threshold)
            line.append(f"{'—' if steps is None else steps.text(0)} ({count} of {len(group)})")
        accuracy, compression = final(group, "test_accuracy"), final(group, "compression_conv")
        assert accuracy is not None
        line += [accuracy.text(), "—" if compression is None else compression.text(1), sources.of(group)]
        lines.append(line)
        planned = {"limit": None, **protocol, **methods[name]["options"]}
        compared[title, "LeNet5"] = (options_of(group[0]), planned)
    every = sorted({options_of(group[0])["evaluate_every"] for group in results.values()}, key=str)
    header = ["method", "runs", *[f"steps to {threshold}% (runs that reach it)" for threshold in THRESHOLDS]]
    header += ["final test acc. [%]", "final c.r. of the convolutions [%]", "where"]
    about = (
        f"Mean ± standard deviation over seeds. Steps are the first at which an evaluation has that accuracy, over the runs that "
        f"reach it; there is one every {' or '.join(map(str, every))} steps. {shrunk(compared)}"
    )
    return f"# Figure 2, robustness\n\n{about}\n\n{table(header, lines)}\n\n{sources.text()}\n"


GRID = Grid(_NAME, __doc__, plan, render)

if __name__ == "__main__":
    start_over()
    sys.exit(main(GRID))
