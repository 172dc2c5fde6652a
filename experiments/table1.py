"""The paper's Table 1: accuracy and compression of nine methods on three networks, for CIFAR-10.

Runs what is missing, then writes table1.md and table1.tex beside the results. Rows and the common protocol are in
experiments/configs/table1. A second table has all methods at the compression of the paper's TDLRT (runs called METHOD-same), a
third low-rank methods at that compression from normalized kernels (METHOD-normalized), where a scale asks for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from experiments.grids.grid import Grid, Run, main
from experiments.grids.protocol import CONFIGS, NETWORKS, Row, fitting, read_protocol, read_rows
from experiments.grids.tables import (
    Sources,
    Statistic,
    costs,
    final,
    latex_table,
    options_of,
    read_results,
    shrunk,
    table,
)
from experiments.run.process import start_over

__all__ = ["GRID", "markdown", "plan", "render"]

_CONFIGS = CONFIGS / "table1"
_NONE = "—"
_OWN, _SAME, _NORMALIZED = attrgetter("name"), attrgetter("name_same"), attrgetter("name_normalized")  # of a row's runs
_ABOUT = (
    "Test accuracy and c.r., the compression 1 - c/f of the convolutions' weights, are those after the last epoch: nothing was "
    "chosen by test images{validation}."
)


def plan(scale: str, seeds: int | None, dataset: str | None) -> list[Run]:
    """The runs of all rows, those at the paper's compression first."""
    protocol = read_protocol(_CONFIGS / "protocol.toml")
    rows = read_rows(_CONFIGS)
    networks = fitting(list(dict.fromkeys(row.network for row in rows)), dataset)
    rows = [row for row in rows if row.network in networks]
    runs = []
    for row in rows:
        runs += protocol.runs(row.name, row.options, scale=scale, seeds=seeds, dataset=dataset)
    for row in rows:
        if row.same is not None:
            runs += protocol.runs(row.name_same, row.options_same, scale=scale, seeds=seeds, dataset=dataset)
    for row in rows:
        if row.method in protocol.scales[scale].normalized:
            runs += protocol.runs(
                row.name_normalized, row.options_normalized, scale=scale, seeds=seeds, dataset=dataset
            )
    return runs


def render(directory: Path) -> list[Path]:
    """Writes the tables of a results directory into it.

    Raises:
      ValueError: if there are no results, or some that are none.
    """
    results = read_results(directory)
    rows = read_rows(_CONFIGS)
    paths = [directory / "table1.md", directory / "table1.tex"]
    paths[0].write_text(markdown(rows, results))
    groups, cells = _accuracies(rows, results, _OWN)
    paths[1].write_text(latex_table(groups, cells) + "\n")
    return paths


def markdown(rows: Sequence[Row], results: dict[str, list[dict[str, Any]]]) -> str:
    """The tables as Markdown.

    Args:
      rows: of the table.
      results: of their runs, by name less the seed; rows that lack some are shown as open.
    """
    validated = any("validation_accuracy" in result["final"] for group in results.values() for result in group)
    validation = ", and a part of the training images is set apart for whatever is to be chosen" if validated else ""
    parts = [
        "# Table 1\n",
        f"{_setting(rows, results)} {_ABOUT.format(validation=validation)} The paper's values stand beside ours; "
        f"{_NONE}: none, or not yet run.\n",
        _markdown_accuracies(rows, results, _OWN),
    ]
    if any(row.same is not None and row.name_same in results for row in rows):
        parts += ["\n## All methods at the compression of the paper's TDLRT\n"]
        parts += [_markdown_accuracies(rows, results, _SAME)]
    if normalized := [row for row in rows if row.name_normalized in results]:
        methods = {row.method for row in normalized}
        parts += ["\n## The same from normalized kernels\n"]
        parts += [_markdown_accuracies([row for row in rows if row.method in methods], results, _NORMALIZED)]
    parts += ["\n## What it took\n", _markdown_costs(rows, results)]
    return "\n".join(parts) + "\n"


def _setting(rows: Sequence[Row], results: dict[str, list[dict[str, Any]]]) -> str:
    """Data, seeds, and what is other than at full scale; all from the results."""
    protocol = read_protocol(_CONFIGS / "protocol.toml").options
    compared = {}
    for row in rows:
        for name, options in (
            (row.name, row.options),
            (row.name_same, row.options_same),
            (row.name_normalized, row.options_normalized),
        ):
            if name in results:
                planned = {"limit": None, **protocol, **options}
                title = f"{row.title} normalized" if name == row.name_normalized else row.title
                compared[title, NETWORKS[row.network]] = (options_of(results[name][0]), planned)
    some = [group[0] for group in results.values()]
    data = _data({result.get("data") or result["options"]["dataset"] for result in some})
    sizes = sorted({(result["images"]["train"], result["images"]["test"]) for result in some})
    images = " or ".join(f"{train:,} training and {test:,} test images" for train, test in sizes)
    seeds = sorted({result["options"]["seed"] for group in results.values() for result in group})
    spread = (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    return f"{data}: {images}; {spread}. {shrunk(compared)}"


def _data(names: Collection[str]) -> str:
    """Names of data sets; one of which newer results say more than older ones is named once."""
    found = []
    for name in sorted(names):
        more = [other for other in names if other.startswith(f"{name}, ")]
        if not more:
            older = any(name.startswith(f"{other}, ") for other in names)
            found.append(f"{name} (as newer results say)" if older else name)
    return "; ".join(found)


def _accuracies(
    rows: Sequence[Row], results: dict[str, list[dict[str, Any]]], which: Callable[[Row], str]
) -> tuple[list[tuple[str, Sequence[str]]], list[list[str]]]:
    """Groups of columns and cells: a line a method, a group a network."""
    networks, methods = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("network", "method"))
    by_place = {(row.network, row.method): row for row in rows}
    most = max(len(group) for group in results.values())
    columns = ["test acc. [%]", "c.r. [%]"] + (["paper acc.", "paper c.r."] if which is _OWN else [])
    cells = []
    for method in methods:
        line = [next(row.title for row in rows if row.method == method)]
        for network in networks:
            row = by_place[network, method]
            group = results.get(which(row), [])
            line += [_cell(final(group, "test_accuracy"), 2, most), _cell(final(group, "compression_conv"), 2)]
            if which is _OWN:
                line += [_NONE if value is None else f"{value:.2f}" for value in (row.accuracy, row.compression)]
        cells.append(line)
    return [(NETWORKS[network], columns) for network in networks], cells


def _markdown_accuracies(
    rows: Sequence[Row], results: dict[str, list[dict[str, Any]]], which: Callable[[Row], str]
) -> str:
    groups, cells = _accuracies(rows, results, which)
    header = [
        f"{network}: {columns[0]}" if n == 0 else columns[n] for network, columns in groups for n in range(len(columns))
    ]
    return table(["method", *header], cells)


def _markdown_costs(rows: Sequence[Row], results: dict[str, list[dict[str, Any]]]) -> str:
    sources, lines = Sources(), []
    for row in rows:
        titles = {
            row.name_normalized: f"{row.title} (normalized)",
            row.name_same: f"{row.title} (same c.r.)",
            row.name: row.title,
        }
        for name, title in reversed(titles.items()):
            group = results.get(name)
            if not group:
                continue
            cost = costs(group)
            peak = _NONE if cost.peak is None or cost.last_peak is None else f"{cost.peak:.0f} / {cost.last_peak:.0f}"
            lines.append(
                [
                    NETWORKS[row.network],
                    title,
                    _cell(final(group, "compression_all"), 2),
                    _cell(final(group, "validation_accuracy"), 2),
                    str(len(group)),
                    f"{cost.step:.4g}",
                    f"{cost.training:.0f}",
                    f"{cost.compiling:.0f}",
                    peak,
                    _NONE if cost.state is None else f"{cost.state:.2f}",
                    sources.of(group),
                ]
            )
    header = ["network", "method", "c.r. of all weights [%]", "validation acc. [%]", "runs", "s / step", "training [s]"]
    header += ["compiling [s]", "peak of a step [MiB], largest / last", "parameters and optimizer [MiB]", "where"]
    about = (
        "Means over seeds; times compare within one letter only. A step's time is the median over epochs without compiling, its "
        "peak what the compiler plans without the data set; training is without compiling and evaluating."
    )
    return f"{about}\n\n{table(header, lines)}\n\n{sources.text()}"


def _cell(statistic: Statistic | None, digits: int, of: int | None = None) -> str:
    return _NONE if statistic is None else statistic.text(digits, of=of)


GRID = Grid("table1", __doc__, plan, render)

if __name__ == "__main__":
    start_over()
    sys.exit(main(GRID))
