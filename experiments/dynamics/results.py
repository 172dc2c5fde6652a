"""What the measurements of this package share: regression, the command line, and how results get into a file and out of it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["command", "provenance", "read", "slope", "write"]


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

    from experiments.run.directory import environment

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


def command(
    name: str,
    about: str,
    measure: Callable[[], dict[str, Any]],
    draw: Callable[[Path], Sequence[Path]],
    argv: Sequence[str],
) -> int:
    """Measures in float64 and draws for a command line; returns the exit code, 2 if there is nothing to draw.

    Args:
      name: of the module and of the JSON file.
      about: the module's docstring.
      measure: gives the result.
      draw: draws from a directory's JSON file, into the directory.
      argv: the command line.
    """
    import jax

    parser = argparse.ArgumentParser(prog=f"python -m experiments.dynamics.{name}", description=about.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory of the JSON file and the figures")
    parser.add_argument("--draw", action="store_true", help="draw from the JSON file that is there")
    options = parser.parse_args(argv)
    try:
        if not options.draw:
            with jax.enable_x64(True):
                result = measure()
            write({**provenance(f"experiments.dynamics.{name}", argv), **result}, options.output, name)
        for path in draw(options.output):
            print(path)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
