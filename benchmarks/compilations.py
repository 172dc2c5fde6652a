"""Compilations of whole runs whose ranks fall, and what JAX's persistent cache saves at the next start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, Options

__all__ = ["cells"]

_ROOT = Path(__file__).resolve().parent.parent
INTEGRATORS = ("bug", "parallel")


def cells(options: Options) -> list[Cell]:
    """One cell an integrator."""
    return [Cell(name, partial(_measure, options.run_options, name)) for name in INTEGRATORS]


def _measure(run_options: tuple[str, ...], integrator: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The main job twice, with an empty cache and with the one that the first left."""
    runs = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in ("first start", "second start"):
            say(f"{integrator}, {name}: python -m experiments.train {' '.join(run_options)}")
            run = Path(directory) / name.replace(" ", "_")
            command = [sys.executable, "-m", "experiments.train", *run_options, "--integrator", integrator]
            started = time.perf_counter()
            done = subprocess.run(
                [*command, "--run-dir", str(run)],
                cwd=_ROOT,
                env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(Path(directory) / "cache")},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            seconds = time.perf_counter() - started
            result = json.loads((run / "result.json").read_text())
            runs[name] = {"process_seconds": seconds, **_compilations(result)}
    return {"command": f"python -m experiments.train {' '.join(run_options)} --integrator {integrator}", "runs": runs}


def _compilations(result: dict[str, Any]) -> dict[str, Any]:
    """What a run's record says of its compilations, ranks and arrays."""
    epochs = [epoch for epoch in result["epochs"] if "compile_seconds" in epoch]
    return {
        "epochs": len(epochs),
        "steps": result["final"]["step"],
        "compilations": sum(epoch["compilations"] for epoch in epochs),
        "compile_seconds": sum(epoch["compile_seconds"] for epoch in epochs),
        "training_seconds": sum(epoch["seconds"] for epoch in epochs),
        "ranks": [sum(map(sum, epoch["ranks"].values())) for epoch in epochs],
        "capacities": [sum(map(sum, epoch["capacities"].values())) for epoch in epochs],
        "compression_conv": [epoch["compression_conv"] for epoch in epochs],
        "test_accuracy": result["final"]["test_accuracy"],
    }
