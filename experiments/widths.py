"""Accuracy over the number of weights, of networks of several widths: ``python -m experiments.widths RESULT...``.

A network of half the width has a quarter of the weights. Whether it pays to train low-rank kernels is whether they are ahead of
that: of a smaller dense network of as many weights. Takes results, and directories of them; prints a table in which every row
stands beside the dense network of its width, and draws a figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from experiments.grids.protocol import NETWORKS
from experiments.grids.tables import table
from experiments.methods import METHODS
from experiments.results_table import ACCURACIES, asked, rows

__all__ = ["comparable", "main", "markdown", "points"]

Rows = Sequence[Mapping[str, Any]]  # of experiments.results_table

# What results have to have in common for their accuracies to be compared.
PROTOCOL = (
    "dataset",
    "limit",
    "validation",
    "augment",
    "batch_size",
    "optimizer",
    "learning_rate",
    "momentum",
    "weight_decay",
    "schedule",
    "patience",
    "plateau_of",
    "norm_momentum",
    "gain",
    "windows",
    "hidden_units",
    "dropout",
)


def comparable(*paths: Path) -> Rows:
    """Rows of results under one protocol, network by network, the widest first and of a width the dense one.

    Args:
      *paths: of results, or of directories of them.

    Raises:
      ValueError: for a file that is no result, for a network or method that is none of this project's, for a run without
        validation images, and for results that differ in the protocol; it says in what.
    """
    found = rows(*paths)
    for row in found:
        options = row["options"]
        known = options.get("model") in NETWORKS and options.get("method") in METHODS
        if not known or not isinstance(options.get("width"), int | float) or not 0 < options["width"] < 1e3:
            raise ValueError(
                f"{_title(row)}: expected a width, one of {', '.join(NETWORKS)} and one of {', '.join(METHODS)}"
            )
        if row["weights"] is None or any(row[name] is None for name in ACCURACIES):
            raise ValueError(
                f"{_title(row)}: expected the number of weights and accuracies on {', '.join(ACCURACIES)} images "
                "in every result: train with --validation"
            )
        for name in PROTOCOL:
            value, first = (each.get(name) for each in (options, found[0]["options"]))
            if value != first:
                raise ValueError(
                    f"{name} is {value} in {_title(row)} and {first} in {_title(found[0])}: "
                    "give results of one protocol"
                )
    networks = list(NETWORKS)

    def order(row: Mapping[str, Any]) -> tuple[int, float, bool, float]:
        options = row["options"]
        return networks.index(options["model"]), -options["width"], options["method"] != "dense", -row["test"].mean

    return sorted(found, key=order)


def markdown(found: Rows) -> str:
    """The rows of :func:`comparable` as a Markdown table."""
    header = ["network", "width", "method", "epochs", "seeds", "weights", *ACCURACIES.values(), "behind dense"]
    lines = []
    for row in found:
        behind = _behind(row, found)
        cells = [
            NETWORKS[row["options"]["model"]],
            _fraction(row["options"]["width"]),
            _series(row),
            str(row["epochs"]),
            ", ".join(map(str, row["seeds"])),
            f"{row['weights'].mean:,.0f}",
            *[row[name].text(1) for name in ACCURACIES],
            "" if behind is None else f"{behind:.1f}".replace("-", "−"),
        ]
        lines.append(cells)
    return table(header, lines)


def points(found: Rows) -> dict[str, dict[str, list[tuple[float, float, str]]]]:
    """Weights, test accuracy in percent and width of every row, by network and method."""
    panels: dict[str, dict[str, list[tuple[float, float, str]]]] = {}
    for row in found:
        series = panels.setdefault(NETWORKS[row["options"]["model"]], {}).setdefault(_series(row), [])
        series.append((row["weights"].mean, row["test"].mean, _fraction(row["options"]["width"])))
    return panels


def _behind(row: Mapping[str, Any], found: Rows) -> float | None:
    """Points of test accuracy to the dense networks of the same width; None for one of these, and where there is none."""
    same = [other for other in found if all(other["options"][n] == row["options"][n] for n in ("model", "width"))]
    dense = [
        value
        for other in same
        if other["options"]["method"] == "dense"
        for value in [other["test"]] * len(other["seeds"])
    ]
    if row["options"]["method"] == "dense" or not dense:
        return None
    return sum(value.mean for value in dense) / len(dense) - row["test"].mean


def _series(row: Mapping[str, Any]) -> str:
    """What a row is called in the table and in the figure."""
    method = row["options"]["method"]
    if method == "dense":
        return "dense"
    what = asked(row["options"])
    return METHODS[method].title + ("" if what is None else f", {what}")


def _title(row: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {row['options'].get(name)!r}" for name in ("method", "model", "width"))


def _fraction(width: float) -> str:
    """A width as it is said.

    Example:
      >>> _fraction(0.25), _fraction(1.0), _fraction(0.3)
      ('1/4', '1', '3/10')
    """
    return str(Fraction(width).limit_denominator(64))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of a command line's results, and draws them if it names a figure."""
    parser = argparse.ArgumentParser(prog="python -m experiments.widths", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RESULT", help="results, and directories of results")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="where to draw, without .png and .svg, which are both written"
    )
    given = parser.parse_args(argv)
    try:
        found = comparable(*given.paths)
    except ValueError as error:
        parser.error(str(error))
    if given.figure is not None:
        from experiments.grids.figures import plot_widths
        from experiments.run.plots import save_figure

        save_figure(plot_widths(points(found)), given.figure.parent, given.figure.name)
    print(markdown(found))


if __name__ == "__main__":
    main()
