"""What :func:`tdlrt_jax.compiler_options` change: how long compiling takes, how much of the host's memory, and what steps cost;
and how long it takes to build the network that is trained.

Every program is compiled in a process of its own, for its memory; another process takes the steps of both in turn, with the
programs out of JAX's cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, Options
from benchmarks.networks import Network
from benchmarks.steps import networks
from benchmarks.timing import in_turn, ratio, spread

__all__ = ["cells"]

METHODS = ("dense", "factorized", "parallel", "bug")
WITH, WITHOUT = "with", "without"


def cells(options: Options) -> list[Cell]:
    """One cell a network, at its first compression."""
    first = {network.model: network for network in reversed(list(networks(options)))}
    return [Cell(network.key, partial(_measure, options, network)) for network in first.values()]


def _measure(options: Options, network: Network, say: Callable[[str], None]) -> dict[str, Any]:
    import tdlrt_jax

    def child(cache: Path, *arguments: Any) -> Any:
        command = [sys.executable, "-m", "benchmarks.compiler", json.dumps(arguments)]
        environ = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    building: dict[str, dict[str, float]] = {}
    for kind in ("dense", "tucker"):
        building[kind] = {}
        for name in (WITHOUT, WITH):
            say(f"building the {kind} network {name} the options")
            with tempfile.TemporaryDirectory() as directory:
                building[kind][name] = child(Path(directory), "build", network, kind, name)
    found: dict[str, dict[str, Any]] = {}
    for method in (method for method in METHODS if method in options.methods):
        with tempfile.TemporaryDirectory() as directory:
            entry: dict[str, Any] = {}
            both = Path(directory) / "both"
            for name in (WITHOUT, WITH):
                say(f"compiling {method} {name} the options")
                own = Path(directory) / name  # empty, so that both compile all there is
                entry[name] = child(own, "compile", network, method, name)
                shutil.copytree(own, both, dirs_exist_ok=True)
            say(f"timing {options.rounds} rounds of {method}")
            seconds = child(both, "steps", network, method, options.rounds)
        for name, values in seconds.items():
            entry[name]["step_seconds"] = spread(values)
        found[method] = {**entry, "step_ratio": ratio(seconds, WITH, WITHOUT)}
    return {
        "network": network._asdict(),
        "options": tdlrt_jax.compiler_options(),
        "rounds": options.rounds,
        "building": building,
        "methods": found,
    }


def _build(network: Network, kind: str, name: str) -> float:
    """Seconds from nothing to a network's first weights: tracing and compiling what draws them, and drawing them."""
    import jax

    import tdlrt_jax
    from benchmarks.networks import creating

    options = tdlrt_jax.compiler_options(runs_once=True) if name == WITH else {}
    create = creating(network, kind)
    started = time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(jax.jit(create, compiler_options=options)()))
    return time.perf_counter() - started


def _compile(network: Network, method: str, name: str) -> dict[str, float]:
    """Seconds of tracing and of compiling a step, and what the latter needed of the host's memory."""
    from benchmarks.methods import TrainingStep

    step = TrainingStep(network, method, compiler_options=_options(name))
    return {
        "seconds": step.seconds_to["compile"],
        "trace_seconds": step.seconds_to["trace"],
        "host_bytes": step.host_bytes,
    }


def _steps(network: Network, method: str, rounds: int) -> dict[str, list[float]]:
    from benchmarks.methods import TrainingStep

    programs = {name: TrainingStep(network, method, compiler_options=_options(name)).run for name in (WITHOUT, WITH)}
    return in_turn(programs, rounds=rounds)


def _options(name: str) -> dict[str, Any]:
    import tdlrt_jax

    return tdlrt_jax.compiler_options() if name == WITH else {}


if __name__ == "__main__":
    what, given_network, *rest = json.loads(sys.argv[1])
    measures: dict[str, Callable[..., Any]] = {"build": _build, "compile": _compile, "steps": _steps}
    print(json.dumps(measures[what](Network(*given_network), *rest)))
