"""What a data-parallel step sends between devices: the collective operations of the compiled program, dense against TDLRT.

    python -m benchmarks.communication

The steps of whole networks are compiled for a mesh of host devices, on which the batch is spread and everything else is held by
all, and not run: sizes are those in the text of the optimized program.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.cells import Results, ResultsError
from experiments.run.process import SETTINGS, start_over

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from benchmarks.networks import Network

__all__ = ["Collective", "collectives", "compile_step", "main", "markdown"]

DEVICES = 8
METHODS = ("dense", "parallel", "bug")
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_KIND = "|".join(sorted(KINDS, key=len, reverse=True))
_LINE = re.compile(rf"^ *(?:ROOT )?%?[\w.\-]+ = (.*?) ({_KIND})(-start|-done)?\(", re.M)
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """All collective operations of one kind in a program; those inside of loops and branches counted once."""

    operations: int
    arrays: int  # results; one operation may combine many
    bytes: int  # of the results on one device


def collectives(text: str) -> dict[str, Collective]:
    """The collective operations in the text of a compiled program (``compiled.as_text()``), by kind.

    Example:
      >>> sum_line = "  %all-reduce.1 = (f32[5]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add"
      >>> collectives(sum_line)
      {'all-reduce': Collective(operations=1, arrays=2, bytes=44)}
    """
    found: dict[str, Collective] = {}
    for shape, kind, stage in _LINE.findall(text):
        if stage == "-start":  # its result names the operands too; that of -done does not
            continue
        arrays = [_bytes(*part) for part in _SHAPE.findall(re.sub(r"/\*.*?\*/|\{[^}]*\}", "", shape))]
        before = found.get(kind, Collective(0, 0, 0))
        found[kind] = Collective(before.operations + 1, before.arrays + len(arrays), before.bytes + sum(arrays))
    return found


def _bytes(dtype: str, shape: str) -> int:
    digits = re.search(r"\d+", dtype)
    size = _BYTES.get(dtype) or (int(digits.group()) // 8 if digits else 0)
    return size * math.prod(int(n) for n in shape.split(",") if n)


def compile_step(network: Network, method: str, mesh: Mesh) -> tuple[Any, Any]:
    """The compiled step of a method on a mesh with the axis ``"data"``, and the shapes of the network's parameters."""
    import functools

    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.methods import step_of
    from benchmarks.networks import build, loss_of

    kind = "dense" if method == "dense" else "tucker"
    parts: Any = nnx.split(nnx.eval_shape(functools.partial(build, network, kind)), nnx.Param, ...)
    graphdef, params, model_state = parts[0], nnx.as_pure(parts[1]), nnx.as_pure(parts[2])
    step, init = step_of(method, loss_of(graphdef), optax.sgd(0.01, momentum=0.9))
    batch = (jax.ShapeDtypeStruct(network.image, jnp.float32), jax.ShapeDtypeStruct((network.batch,), jnp.int32))

    def on_mesh(tree: Any, *axes: str) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    state = on_mesh((params, jax.eval_shape(init, params), model_state))
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*state, *on_mesh(batch, "data")).compile()
    return compiled, params


def measure(network: Network, methods: Sequence[str], devices: int) -> dict[str, Any]:
    """Collective operations of every method's step, and what they are compared with."""
    import jax
    from jax.sharding import AxisType

    from benchmarks.methods import tree_bytes
    from benchmarks.networks import compression_of, fraction_for

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    result: dict[str, Any] = {}
    for method in methods:
        started = time.perf_counter()
        compiled, params = compile_step(network, method, mesh)
        found = collectives(compiled.as_text())
        result[method] = {
            "collectives": {kind: entry._asdict() for kind, entry in found.items()},
            "bytes": sum(entry.bytes for entry in found.values()),
            "parameter_bytes": tree_bytes(params),
            "compile_seconds": time.perf_counter() - started,
        }
        say = ", ".join(f"{kind} {entry.bytes:,} bytes in {entry.operations}" for kind, entry in found.items())
        print(f"{network.key}, {method}: {say}; {result[method]['compile_seconds']:.0f} s", flush=True)
    return {
        "network": network._asdict(),
        "devices": devices,
        "compression": compression_of(network, fraction_for(network)),
        "methods": result,
    }


def markdown(cells: dict[str, dict[str, Any]]) -> str:
    """The tables of a results file."""
    from benchmarks.report import table, where

    parts = [
        "# What a data-parallel step sends\n\nMade by `python -m benchmarks.communication` from the JSON file beside it. Bytes "
        "are those of the results of all collective operations in the optimized program of one step, on one device; a ring "
        "sends and receives nearly twice as many for an all-reduce.\n"
    ]
    for key, cell in cells.items():
        result = cell["result"]
        methods = result["methods"]
        kinds = [kind for kind in KINDS if any(kind in entry["collectives"] for entry in methods.values())]
        rows = []
        for name, entry in methods.items():
            found = entry["collectives"]
            row = [name, f"{entry['parameter_bytes']:,}"]
            row += [
                f"{found[kind]['bytes']:,} in {found[kind]['operations']}" if kind in found else "0" for kind in kinds
            ]
            rows.append([*row, f"{entry['bytes'] / methods['dense']['bytes']:.4f}" if "dense" in methods else ""])
        header = ["method", "parameters [bytes]", *[f"{kind} [bytes]" for kind in kinds], "/ dense"]
        about = (
            f"Compression of the convolutions {100 * result['compression']:.1f}%, {result['devices']} devices, batch "
            f"{result['network']['batch']} in all."
        )
        parts.append(f"## {key}\n\n{where(cell['environment'])}\n\n{about}\n\n{table(header, rows)}\n")
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what a command line asks for; returns the exit code, 2 for options that cannot work."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.communication",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=("vgg16", "alexnet", "resnet18"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--width", type=float, default=1.0, help="factor of all numbers of filters")
    parser.add_argument("--compression", type=float, default=0.95, help="of the convolutions (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images on all devices (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=DEVICES, help="host devices (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/communication"), help="directory")
    given = parser.parse_args(argv)

    import jax

    from benchmarks.networks import MODELS, Network
    from experiments.run.directory import environment

    if given.devices > jax.device_count() or given.batch % given.devices:
        print(
            f"error: --devices {given.devices}: there are {jax.device_count()} (on the CPU more by "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={given.devices}), and they must divide --batch {given.batch}",
            file=sys.stderr,
        )
        return 2
    try:
        results = Results(given.output / "communication.json")
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for model in given.models or MODELS:
        network = Network(model, given.width, given.batch, given.compression)
        stored = environment([])
        kept: dict[str, Any] = {key: stored[key] for key in ("hardware", "settings", "versions", "commit", "started")}
        results.add(network.key, kept, measure(network, given.methods, given.devices))
        (given.output / "README.md").write_text(markdown(results.cells))
    print(f"results and tables: {given.output}")
    return 0


if __name__ == "__main__":
    start_over({**SETTINGS, "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"})
    sys.exit(main())
