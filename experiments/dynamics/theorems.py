"""Theorems 1, 2 and 3 measured: ``python -m experiments.dynamics.theorems --output DIR``.

Writes theorems.json, and draws theorem1, theorem2 and theorem3 (.png, .svg) from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.dynamics import theorem1, theorem2, theorem3
from experiments.dynamics.figures import plot_theorem1, plot_theorem2, plot_theorem3
from experiments.dynamics.results import fail, provenance, read, write
from experiments.plots import save_figure
from experiments.process import start_over

__all__ = ["draw", "main"]

NAME = "theorems"


def draw(directory: Path) -> list[Path]:
    """Draws the figures from a directory's JSON alone, into it."""
    result = read(directory, NAME)
    plots = {"theorem1": plot_theorem1, "theorem2": plot_theorem2, "theorem3": plot_theorem3}
    return [path for name, plot in plots.items() for path in save_figure(plot(result[name]), directory, name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and draws for a command line; returns the exit code, 2 if there is nothing to draw."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.dynamics.{NAME}", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the JSON file and the figures")
    parser.add_argument("--draw", action="store_true", help="draw from the JSON file that is there")
    options = parser.parse_args(argv)
    try:
        if not options.draw:
            with jax.enable_x64(True):
                result = {
                    f"theorem{n}": part.measure() for n, part in enumerate((theorem1, theorem2, theorem3), start=1)
                }
            write({**provenance(f"experiments.dynamics.{NAME}", argv), **result}, options.output, NAME)
        for path in draw(options.output):
            print(path)
    except ValueError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    start_over()
    sys.exit(main())
