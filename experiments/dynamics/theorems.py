"""Theorems 1, 2 and 3 measured: ``python -m experiments.dynamics.theorems --output DIR``.

Writes theorems.json, and draws theorem1, theorem2 and theorem3 (.png, .svg) from it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.dynamics import theorem1, theorem2, theorem3
from experiments.dynamics.figures import plot_theorem1, plot_theorem2, plot_theorem3
from experiments.dynamics.results import command, read
from experiments.run.plots import save_figure
from experiments.run.process import start_over

__all__ = ["draw", "main", "measure"]

NAME = "theorems"


def draw(directory: Path) -> list[Path]:
    """Draws the figures from a directory's JSON alone, into it."""
    result = read(directory, NAME)
    plots = {"theorem1": plot_theorem1, "theorem2": plot_theorem2, "theorem3": plot_theorem3}
    return [path for name, plot in plots.items() for path in save_figure(plot(result[name]), directory, name)]


def measure() -> dict[str, Any]:
    """All three theorems, by name."""
    return {f"theorem{n}": part.measure() for n, part in enumerate((theorem1, theorem2, theorem3), start=1)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and draws for a command line; returns the exit code, 2 if there is nothing to draw."""
    return command(NAME, __doc__ or "", measure, draw, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    start_over()
    sys.exit(main())
