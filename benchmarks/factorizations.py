"""Factorizations on many devices: every device does all of them, or its part of the layers.

    python -m benchmarks.factorizations

A step of ``parallel`` without its gradients, as data-parallel training does it: from given gradients to new kernels and moments.
Replicated, every device works on all kernels. Spread, kernels of equal shapes, which are one batch anyway, are shared among the
devices, and what comes out is gathered. Host devices share the machine's cores, so no clock sees what a device of its own would
take. What is counted is the work of LAPACK's routines and the matrix products in one device's program, loops included, and
what is gathered; the processor's time of the whole is that of all devices together.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.cells import Results, ResultsError
from benchmarks.communication import DEVICES, collectives
from benchmarks.counts import computations
from experiments.run.process import SETTINGS, start_over

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from benchmarks.networks import Network

__all__ = ["main", "markdown", "measure", "work_of"]

# Leading terms of the operations in a routine on an m x n matrix, without the factor that all share.
_ROUTINES: dict[str, Callable[[int, int], float]] = {
    "syevd": lambda m, n: 9 * n**3,  # eigenvalues and eigenvectors
    "geqrf": lambda m, n: 2 * m * n**2,
    "orgqr": lambda m, n: 2 * m * n**2,
    "potrf": lambda m, n: n**3 / 3,
    "trsm": lambda m, n: m * n**2,
}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")


def work_of(text: str) -> dict[str, float]:
    """Operations in one run of a compiled program on one device: of LAPACK's routines, and of matrix products (``dot``).

    Bodies of loops count as often as the compiler knows them to run, of a condition's branches the one with most.

    Args:
      text: ``compiled.as_text()``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> square = lambda xs: jax.lax.map(lambda x: x @ x, xs)
      >>> work_of(jax.jit(square).lower(jnp.ones((5, 4, 4))).compile().as_text())
      {'dot': 640.0}
    """
    bodies, entry = computations(text)

    @functools.cache
    def total(name: str) -> tuple[tuple[str, float], ...]:
        found: dict[str, float] = {}
        shapes: dict[str, list[int]] = {}
        for line in bodies.get(name, []):
            matched = _INSTRUCTION.match(line)
            if not matched:
                continue
            result, shape, kind, rest = matched.groups()
            first = re.search(r"\w+\[([\d,]*)\]", shape)
            shapes[result] = [int(n) for n in first.group(1).split(",") if n] if first else []
            if kind == "dot":
                lhs = shapes.get(re.split(r"[,)]", rest)[0].split()[-1].lstrip("%"), [])
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
                axes = [int(d) for d in contracted.group(1).split(",") if d] if contracted else []
                _add(found, "dot", 2.0 * math.prod(shapes[result]) * math.prod(lhs[d] for d in axes if d < len(lhs)))
            elif kind == "custom-call":
                target = re.search(r'custom_call_target="\w*?lapack_[sd](\w+?)(?:_ffi)?"', rest)
                target_name = target.group(1) if target else ""
                if target_name in _ROUTINES:
                    sizes = [[int(n) for n in s.split(",") if n] for s in re.findall(r"\w+\[([\d,]*)\]", shape)]
                    m, n = max((s[-2:] for s in sizes if len(s) >= 2), key=math.prod)
                    _add(found, target_name, _ROUTINES[target_name](max(m, n), min(m, n)))
            elif kind == "while":
                times = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
                _merge(found, total(_named(rest, "body")), int(times.group(1)) if times else 1)
            elif kind == "conditional":
                names = re.findall(r"(?:true_computation=|false_computation=)%?([\w.\-]+)", rest)
                listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
                names += [n.strip().lstrip("%") for n in listed.group(1).split(",")] if listed else []
                _merge(found, max((total(n) for n in names), key=lambda part: sum(v for _, v in part), default=()), 1)
            elif kind in ("fusion", "call"):
                _merge(found, total(_named(rest, "calls") or _named(rest, "to_apply")), 1)
        return tuple(found.items())

    return dict(total(entry))


def _named(rest: str, attribute: str) -> str:
    found = re.search(rf"{attribute}=%?([\w.\-]+)", rest)
    return found.group(1) if found else ""


def _add(found: dict[str, float], kind: str, work: float) -> None:
    found[kind] = found.get(kind, 0.0) + work


def _merge(found: dict[str, float], part: Sequence[tuple[str, float]], times: int) -> None:
    for kind, work in part:
        _add(found, kind, times * work)


@contextlib.contextmanager
def spread_over(mesh: Mesh) -> Iterator[None]:
    """Within, batches of kernels (:func:`tdlrt_jax.batching.map_batched`) are shared among the devices of a mesh."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from tdlrt_jax import batching

    def run(call: Callable[..., Any], *batch: Any) -> Any:
        count = jax.tree.leaves(batch)[0].shape[0]
        rows = jnp.minimum(jnp.arange(-(-count // mesh.size) * mesh.size), count - 1)  # the last again, as a filling
        filled = jax.tree.map(lambda leaf: leaf[rows], batch)
        part = PartitionSpec("data")
        share = jax.shard_map(
            lambda rows: jax.lax.map(lambda row: call(*row), rows),
            mesh=mesh,
            in_specs=part,
            out_specs=part,
            check_vma=False,
        )
        gathered = jax.lax.with_sharding_constraint(share(filled), NamedSharding(mesh, PartitionSpec()))
        return jax.tree.map(lambda leaf: leaf[:count], gathered)

    with mock.patch.object(batching, "_run", run):
        yield


def measure(network: Network, devices: int, rounds: int) -> dict[str, Any]:
    """The linear algebra of a step, replicated and spread."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import tdlrt_jax
    from benchmarks.methods import TOLERANCE
    from benchmarks.networks import build, compression_of, fraction_for
    from tdlrt_jax.tucker import is_tucker

    params = dict(tdlrt_jax.kernel_paths(nnx.as_pure(nnx.state(build(network, "tucker"), nnx.Param))))
    tx = tdlrt_jax.tdlrt(optax.sgd(0.01, momentum=0.9), tolerance=TOLERANCE, integrator="parallel")

    def loss_fn(params: Any, dense: Any) -> Any:  # whose gradients are those of a linear function with random slopes
        return sum(jnp.sum(tdlrt_jax.to_dense(params[name]) * slope) for name, slope in dense.items())

    def slopes(params: Any) -> Any:
        keys = jax.random.split(jax.random.key(1), len(params))
        return {
            name: 1e-2 * jax.random.normal(key, tdlrt_jax.kernel_shape(kernel))
            for key, (name, kernel) in zip(keys, params.items())
        }

    grads = jax.jit(lambda params: tdlrt_jax.value_and_grad(loss_fn)(params, slopes(params))[1])(params)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    same = NamedSharding(mesh, PartitionSpec())
    arguments = (params, jax.jit(tx.init)(params), grads)
    forms: dict[str, Any] = {}
    outcomes = {}
    for name, where in (("one device", None), ("replicated", same), ("spread", same)):
        placed = arguments if where is None else jax.device_put(arguments, where)
        with spread_over(mesh) if name == "spread" else contextlib.nullcontext():
            # A function of its own: what was traced for another form is not to be found again.
            function = functools.partial(lambda *given: update(*given))
            compiled = jax.jit(function, out_shardings=where).lower(*placed).compile()
        text = compiled.as_text() or ""
        outcomes[name] = jax.block_until_ready(compiled(*placed))
        wall, processor = [], []
        for _ in range(rounds):
            started = time.perf_counter(), time.process_time()
            jax.block_until_ready(compiled(*placed))
            wall.append(time.perf_counter() - started[0])
            processor.append(time.process_time() - started[1])
        forms[name] = {
            "work": work_of(text),
            "collectives": {kind: entry._asdict() for kind, entry in collectives(text).items()},
            "seconds": sorted(wall)[rounds // 2],
            "processor_seconds": sorted(processor)[rounds // 2],
        }
        print(f"{network.key}, {name}: {json.dumps(forms[name])}", flush=True)
    pairs = [
        (jax.device_get(a), jax.device_get(b))
        for a, b in zip(outcomes["spread"][0].values(), outcomes["replicated"][0].values())
        if is_tucker(a)
    ]
    dense = [tuple(tdlrt_jax.to_dense(kernel) for kernel in pair) for pair in pairs]
    return {
        "network": network._asdict(),
        "devices": devices,
        "rounds": rounds,
        "compression": compression_of(network, fraction_for(network)),
        "forms": forms,
        "largest_difference": max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in dense),
    }


def markdown(cells: dict[str, dict[str, Any]]) -> str:
    """The tables of a results file."""
    from benchmarks.report import table, where

    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    parts = [f"# Factorizations on many devices\n\nMade by `python -m benchmarks.factorizations`. {about}\n"]
    for key, cell in cells.items():
        forms = cell["result"]["forms"]
        rows = []
        for name, form in forms.items():
            routines = sum(work for kind, work in form["work"].items() if kind != "dot")
            gathered = sum(entry["bytes"] for entry in form["collectives"].values())
            rows.append(
                [
                    name,
                    f"{routines / 1e9:.3f}",
                    f"{form['work'].get('dot', 0.0) / 1e9:.3f}",
                    f"{gathered:,}",
                    f"{form['seconds']:.3f}",
                    f"{form['processor_seconds']:.3f}",
                ]
            )
        header = ["form", "LAPACK, one device [G]", "products, one device [G]", "exchanged [bytes]", "wall [s]"]
        header += ["processor, all devices [s]"]
        difference = cell["result"]["largest_difference"]
        parts.append(
            f"## {key}\n\n{where(cell['environment'])}\n\n{cell['result']['devices']} devices; kernels of both forms differ by "
            f"{difference:.1e} at most.\n\n{table(header, rows)}\n"
        )
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what a command line asks for; returns the exit code, 2 for options that cannot work."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.factorizations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=("vgg16", "alexnet", "resnet18"))
    parser.add_argument("--width", type=float, default=1.0, help="factor of all numbers of filters")
    parser.add_argument("--compression", type=float, default=0.95, help="of the convolutions (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=DEVICES, help="host devices (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each form is timed (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/factorizations"), help="directory")
    given = parser.parse_args(argv)

    import jax

    from benchmarks.networks import MODELS, Network
    from experiments.run.directory import environment

    if given.devices > jax.device_count():
        print(
            f"error: --devices {given.devices}: there are {jax.device_count()} (on the CPU more by "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={given.devices})",
            file=sys.stderr,
        )
        return 2
    try:
        results = Results(given.output / "factorizations.json")
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for model in given.models or MODELS:
        network = Network(model, given.width, 128, given.compression)
        stored = environment([])
        kept: dict[str, Any] = {key: stored[key] for key in ("hardware", "settings", "versions", "commit", "started")}
        results.add(network.key, kept, measure(network, given.devices, given.rounds))
        (given.output / "README.md").write_text(markdown(results.cells))
    print(f"results and tables: {given.output}")
    return 0


if __name__ == "__main__":
    start_over({**SETTINGS, "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"})
    sys.exit(main())
