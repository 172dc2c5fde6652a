"""What the measurements of this package share: regression, and how a result gets into a file and out of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["provenance", "read", "slope", "write"]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of ``log y`` over ``log x`` by least squares: the observed order.

    Example:
      >>> round(slope([1, 2, 4], [3, 12, 48]), 12)
      2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def provenance(module: str, argv: Sequence[str]) -> dict[str, Any]:
    """Command, commit, versions and hardware of a result; what says where things were on one machine is left out."""
    import importlib.metadata

    from experiments.run_directory import environment

    found = environment([])
    versions = {name: found["versions"][name] for name in ("python", "tdlrt_jax", "jax", "jaxlib", "numpy")}
    words = [
        word
        for position, word in enumerate(argv)
        if word != "--output" and argv[position - 1 : position] != ["--output"]
    ]
    return {
        "command": shlex.join(["python", "-m", module, *words]),
        "commit": found["commit"],
        "versions": {**versions, "diffrax": importlib.metadata.version("diffrax")},
        "hardware": found["hardware"],
        "dtype": "float64",
    }


def write(result: dict[str, Any], directory: Path, name: str) -> Path:
    """Writes ``directory/name.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def read(directory: Path, name: str) -> dict[str, Any]:
    """Reads ``directory/name.json``; raises ``ValueError`` if it is not there."""
    path = directory / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there: measure first (without --draw)")
    return json.loads(path.read_text())


def fail(error: Exception) -> int:
    """Prints an error of the command line; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2
