"""What pages of memory cost: steps with the settings of :mod:`experiments.run.process` and without, in processes in turn."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.cells import Cell, Options
from benchmarks.networks import Network
from benchmarks.steps import networks
from benchmarks.timing import in_turn, spread
from experiments.run.process import SETTINGS

__all__ = ["cells"]

VARIABLE = "GLIBC_TUNABLES"
METHODS = ("dense", "factorized", "parallel")
TURNS = 2


def cells(options: Options) -> list[Cell]:
    """One cell a network, at its first compression; none elsewhere than on Linux."""
    if not sys.platform.startswith("linux"):
        return []
    first = {network.model: network for network in reversed(list(networks(options)))}
    return [Cell(network.key, partial(_measure, options, network)) for network in first.values()]


def _measure(options: Options, network: Network, say: Callable[[str], None]) -> dict[str, Any]:
    methods = [method for method in METHODS if method in options.methods]
    found: dict[str, dict[str, list[Any]]] = {"without": {}, "with": {}}
    command = [sys.executable, "-m", "benchmarks.pages", json.dumps([network, methods, options.rounds])]
    with tempfile.TemporaryDirectory() as cache:  # compiled once, not in every process
        for turn in range(TURNS):
            for name, value in (("without", ""), ("with", SETTINGS[VARIABLE])):
                say(f"{name} huge pages, {turn + 1} of {TURNS}")
                environ = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, VARIABLE: value}
                done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
                for key, values in json.loads(done.stdout.splitlines()[-1]).items():
                    found[name].setdefault(key, []).extend(values)
    return {
        "network": network._asdict(),
        "settings": {VARIABLE: SETTINGS[VARIABLE]},
        "rounds": options.rounds * TURNS,
        "faults": {name: spread(values.pop("faults")) for name, values in found.items()},
        "seconds": {name: {key: spread(values) for key, values in of.items()} for name, of in found.items()},
    }


def _steps(network: Network, methods: list[str], rounds: int) -> dict[str, list[Any]]:
    """Seconds of steps by method, and the pages that the kernel handed out for a round of one step of each."""
    from benchmarks.methods import TrainingStep

    programs = {method: TrainingStep(network, method).run for method in methods}

    def faults() -> float:
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    so_far, *seconds = in_turn({"faults": faults, **programs}, rounds=rounds, warmup=2, ahead=0).values()
    counts = [after - before for before, after in zip(so_far, [*so_far[1:], faults()])]
    return {**dict(zip(methods, seconds)), "faults": counts}


if __name__ == "__main__":
    given_network, given_methods, given_rounds = json.loads(sys.argv[1])
    print(json.dumps(_steps(Network(*given_network), given_methods, given_rounds)))
