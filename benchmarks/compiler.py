"""What :func:`tdlrt_jax.compiler_options` change: how long compiling takes, how much of the host's memory, and what steps cost.

Every program is compiled in a process of its own, for its memory; another process takes the steps of both in turn, with the
programs out of JAX's cache.
"""

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

    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as cache:
        environ = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

        def child(*arguments: Any) -> Any:
            command = [sys.executable, "-m", "benchmarks.compiler", json.dumps(arguments)]
            done = subprocess.run(command, env=environ, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            return json.loads(done.stdout.splitlines()[-1])

        for method in (method for method in METHODS if method in options.methods):
            entry: dict[str, Any] = {}
            for name in (WITHOUT, WITH):
                say(f"compiling {method} {name} the options")
                entry[name] = child("compile", network, method, name)
            say(f"timing {options.rounds} rounds of {method}")
            seconds = child("steps", network, method, options.rounds)
            for name, values in seconds.items():
                entry[name]["step_seconds"] = spread(values)
            found[method] = {**entry, "step_ratio": ratio(seconds, WITH, WITHOUT)}
    return {
        "network": network._asdict(),
        "options": tdlrt_jax.compiler_options(),
        "rounds": options.rounds,
        "methods": found,
    }


def _compile(network: Network, method: str, name: str) -> dict[str, float]:
    """Seconds of compiling a step's program, by the wall's clock and the processor's, and the memory of the host it took."""
    import jax

    from benchmarks.methods import TrainingStep

    # All but the step, compiled before: what is left of the process' memory is the compiler's.
    jax.block_until_ready(jax.numpy.ones(3) + 1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    step = TrainingStep(network, method, compiler_options=_options(name))
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": step.seconds_to["compile"],
        "trace_seconds": step.seconds_to["trace"],
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "host_bytes": 1024 * (after.ru_maxrss - before.ru_maxrss),
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
    measures: dict[str, Callable[..., Any]] = {"compile": _compile, "steps": _steps}
    print(json.dumps(measures[what](Network(*given_network), *rest)))
