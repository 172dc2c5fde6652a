"""What a benchmark consists of: cells that are measured one after the other, each kept as soon as it is there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Cell", "Options", "Results", "ResultsError"]


class ResultsError(ValueError):
    """A results file that cannot be used, with the remedy."""


class Options(NamedTuple):
    """What is measured, and how thoroughly."""

    models: tuple[str, ...]
    compressions: tuple[float, ...]
    batches: tuple[int, ...]
    width: float
    spatial: str  # "tucker" or "whole"
    methods: tuple[str, ...]  # of benchmarks.methods.JAX_METHODS
    rounds: int
    peers: Path | None  # interpreter of the environment with PyTorch
    growth_widths: tuple[int, ...]  # channels of one layer, at growth_rank
    growth_rank: int
    growth_ranks: tuple[int, ...]  # ranks of one layer, at growth_width channels
    growth_width: int
    growth_batches: tuple[int, ...]
    truncation_ranks: tuple[int, ...]
    run_options: tuple[str, ...]  # of experiments.train, for a whole run with falling ranks


class Cell(NamedTuple):
    """One measurement: what it is called, and a function that makes it and says in between what it does."""

    key: str
    measure: Callable[[Callable[[str], None]], dict[str, Any]]


class Results:
    """The cells of one section in a JSON file, written anew after every cell; a file cut off never takes its place.

    Args:
      path: the file; made with its directories by the first cell.

    Raises:
      ResultsError: if there is a file that is not one of these.
    """

    def __init__(self, path: Path):
        self.path = path
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.cells = json.loads(path.read_text())["cells"]
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise ResultsError(
                    f"{path} is no results file ({error}): move it away, or name another --output"
                ) from None

    def add(self, key: str, environment: dict[str, Any], result: dict[str, Any]) -> None:
        """Keeps a cell."""
        self.cells[key] = {"environment": environment, "result": result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps({"cells": self.cells}, indent=1) + "\n")
        os.replace(temporary, self.path)
