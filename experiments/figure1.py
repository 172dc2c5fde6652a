"""The paper's Figure 1: accuracy over compression of five methods on three networks, for CIFAR-10; and how to choose τ.

Runs what is missing, then writes figure1 (.png, .svg), tolerance (compression and accuracy over τ), ranks_NETWORK (ranks over
time) and figure1.md beside the results. Sweeps are in experiments/configs/figure1, the protocol is that of Table 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.grids.figures import Point, plot_rank_paths, plot_tolerance, plot_tradeoff
from experiments.grids.grid import Grid, Run, main
from experiments.grids.protocol import CONFIGS, NETWORKS, fitting, read_protocol, read_rows, read_toml
from experiments.grids.tables import Sources, final, options_of, read_results, shrunk, table
from experiments.run.plots import save_figure
from experiments.run.process import start_over

__all__ = ["GRID", "plan", "render", "sweeps"]

Results = Mapping[str, list[dict[str, Any]]]


class Sweep(NamedTuple):
    """One method over several values of the option that governs its compression."""

    name: str
    title: str
    option: str | None  # None for a single run
    values: tuple[float, ...]
    options: dict[str, Any]
    row: str | None = None  # the method of Table 1 whose settings at a scale these runs have too

    def rows(self, network: str) -> Iterator[tuple[str, float | None, dict[str, Any]]]:
        """Name, value and options of each row."""
        base = {"model": network, **self.options}
        if self.option is None:
            yield f"{network}/{self.name}", None, base
        for value in self.values:
            yield f"{network}/{self.name}-{value:g}", value, {**base, str(self.option): value}


def sweeps() -> tuple[list[str], list[Sweep]]:
    """The networks and the sweeps, as configured."""
    content = read_toml(CONFIGS / "figure1" / "sweeps.toml")
    found = [
        Sweep(
            entry["name"],
            entry["title"],
            entry.get("option"),
            tuple(entry.get("values", ())),
            entry["options"],
            entry.get("row"),
        )
        for entry in content["sweeps"]
    ]
    return content["networks"], found


def plan(scale: str, seeds: int | None, dataset: str | None) -> list[Run]:
    """The runs of all sweeps, network by network."""
    protocol = read_protocol(CONFIGS / "table1" / "protocol.toml")
    networks, found = sweeps()
    return [
        run
        for network in fitting(networks, dataset)
        for sweep in found
        for name, _, options in sweep.rows(network)
        for run in protocol.runs(
            name, options, scale=scale, seeds=seeds, dataset=dataset, row=sweep.row and f"{network}/{sweep.row}"
        )
    ]


def render(directory: Path) -> list[Path]:
    """Draws a results directory's figures and writes its table, into it.

    Raises:
      ValueError: if there are no results, or some that are none.
    """
    results = read_results(directory)
    networks, found = sweeps()
    points = {network: _points(network, found, results) for network in networks}
    panels = {network: swept for network, swept in points.items() if swept or f"{network}/dense" in results}
    if not panels:
        raise ValueError(f"{directory} holds no results of Figure 1, such as {networks[0]}/dense/seed0.json")
    titles = {sweep.title for sweep in found}
    dense, paper = {}, {}
    for network in panels:
        accuracy = final(results.get(f"{network}/dense", []), "test_accuracy")
        if accuracy is not None:
            dense[NETWORKS[network]] = accuracy
        paper[NETWORKS[network]] = {
            row.title: (row.compression, row.accuracy)
            for row in read_rows(CONFIGS / "table1")
            if row.network == network and row.title in titles and row.accuracy is not None and row.compression
        }
    named = {NETWORKS[network]: swept for network, swept in panels.items()}
    paths = save_figure(plot_tradeoff(named, dense, paper), directory, "figure1")
    by_tolerance = next(sweep for sweep in found if sweep.option == "tau")
    chosen = {network: swept[by_tolerance.title] for network, swept in named.items() if by_tolerance.title in swept}
    if chosen:
        paths += save_figure(plot_tolerance(chosen), directory, "tolerance")
    for network in panels:
        first = {f"τ = {value:g}": results[name][0] for name, value, _ in by_tolerance.rows(network) if name in results}
        if first:
            paths += save_figure(plot_rank_paths(first), directory, f"ranks_{network}")
    (directory / "figure1.md").write_text(_markdown(list(panels), found, results))
    return [*paths, directory / "figure1.md"]


def _points(network: str, found: Sequence[Sweep], results: Results) -> dict[str, list[Point]]:
    """Where every sweep's runs ended."""
    points: dict[str, list[Point]] = {}
    for sweep in found:
        for name, value, _ in sweep.rows(network) if sweep.option else ():
            accuracy, compression = (final(results.get(name, []), f) for f in ("test_accuracy", "compression_conv"))
            if accuracy is not None and compression is not None:
                points.setdefault(sweep.title, []).append(Point(compression, accuracy, value))
    return points


def _markdown(networks: Sequence[str], found: Sequence[Sweep], results: Results) -> str:
    protocol = read_protocol(CONFIGS / "table1" / "protocol.toml").options
    sources, lines, compared = Sources(), [], {}
    for network in networks:
        for sweep in found:
            for name, value, options in sweep.rows(network):
                group = results.get(name)
                if not group:
                    continue
                accuracy, compression = final(group, "test_accuracy"), final(group, "compression_conv")
                assert accuracy is not None and compression is not None
                asked = "" if value is None else f"{'τ' if sweep.option == 'tau' else sweep.option} {value:g}"
                cells = [NETWORKS[network], sweep.title, asked, accuracy.text(), compression.text(), str(len(group))]
                lines.append([*cells, sources.of(group)])
                compared[f"{sweep.title} {asked}".strip(), NETWORKS[network]] = (
                    options_of(group[0]),
                    {"limit": None, **protocol, **options},
                )
    header = ["network", "method", "asked for", "test acc. [%]", "c.r. of the convolutions [%]", "runs", "where"]
    about = (
        f"Mean ± standard deviation over seeds, after the last epoch. {shrunk(compared)} In the figure, bars are deviations and "
        "hollow markers the paper's Table 1. Ranks over time are those of the first seed."
    )
    return f"# Figure 1\n\n{about}\n\n{table(header, lines)}\n\n{sources.text()}\n"


GRID = Grid("figure1", __doc__, plan, render)

if __name__ == "__main__":
    start_over()
    sys.exit(main(GRID))
