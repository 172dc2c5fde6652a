"""Training steps compiled for a GPU ahead of time, on a machine without one: what they launch, wait for and plan to store.

Where kernels are small, a GPU may need less time for them than its host for handing them over. JAX's CUDA plugin (``pip install
".[cuda]"``) compiles for a GPU by its description alone. Not done then is what needs one, the choice among algorithms of
matrix products by trying them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

from benchmarks.cells import Cell, Options
from benchmarks.networks import Network
from benchmarks.steps import networks

__all__ = ["METHODS", "cells"]

METHODS = ("dense", "factorized", "factorized_at_rank", "cores_only", "ranks_stay", "parallel", "bug")
PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
COMPILER_OPTIONS: dict[str, Any] = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}  # both need the GPU
NAME = "an NVIDIA H100"
# What XLA wants to know of it, by the names that it has for it.
_H100 = {
    "platform_name": "CUDA",
    "device_description_str": "NVIDIA H100",
    "gpu_device_info": {
        "cuda_compute_capability": {"major": 9},
        "core_count": 132,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "device_memory_size": 80 * 2**30,
        "memory_bandwidth": 3_352_320_000_000,
        "l2_cache_size": 50 * 2**20,
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_block_limit": 2**16,
        "registers_per_core_limit": 2**16,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": 227 * 2**10,
        "shared_memory_per_core": 228 * 2**10,
    },
    "dnn_version_info": {"major": 9, "minor": 10},
    "runtime_version": {"major": 12, "minor": 9},
}


def cells(options: Options) -> list[Cell]:
    """One cell a network, at its first compression; none where JAX's CUDA plugin is not installed."""
    if not any(map(_is_installed, PLUGINS)):
        print('ahead: left out; pip install ".[cuda]" makes it possible, without a GPU too')
        return []
    first = {network.model: network for network in reversed(list(networks(options)))}
    return [Cell(network.key, partial(_measure, network)) for network in first.values()]


def _measure(network: Network, say: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        say(f"compiling {method} for {NAME}")
        command = [sys.executable, "-m", "benchmarks.ahead", json.dumps([network, method])]
        # The plugin looks for a GPU where JAX may use one.
        done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found[method] = json.loads(done.stdout.splitlines()[-1])
    return {"network": network._asdict(), "device": NAME, "options": COMPILER_OPTIONS, "methods": found}


def _compiled(network: Network, method: str) -> dict[str, Any]:
    """What a method's step launches and plans."""
    from benchmarks.counts import launches
    from benchmarks.methods import TrainingStep
    from experiments.run.programs import memory_of

    step = TrainingStep(network, method, compile=_for_the_gpu)
    return {
        **launches(step.compiled.as_text() or "")._asdict(),
        **memory_of(step.compiled),
        "seconds_to": step.seconds_to,
    }


def _for_the_gpu(function: Callable[..., Any], arguments: Any) -> Callable[[], Any]:
    """Traces a step for the GPU, and returns what compiles it."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    jax.devices()  # finds the plugin
    there = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=_as_text(_H100)
    )
    place = SingleDeviceSharding(there.devices[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments)
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):  # which the library asks while it is traced
        lowered = jax.jit(function, donate_argnums=(0, 1, 2), out_shardings=place).lower(*shapes)
    return partial(lowered.compile, COMPILER_OPTIONS)


def _as_text(message: dict[str, Any]) -> str:
    """A protocol buffer in its text format."""
    parts = []
    for name, value in message.items():
        if isinstance(value, dict):
            parts.append(f"{name} {{ {_as_text(value)} }}")
        else:
            parts.append(f"{name}: {json.dumps(value)}")
    return " ".join(parts)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    given_network, given_method = json.loads(sys.argv[1])
    print(json.dumps(_compiled(Network(*given_network), given_method)))
