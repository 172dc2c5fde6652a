"""Predictions of trained forms in turn: as trained, as plain layers, exported; with PyTorch's in another process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.cells import Cell, Options
from benchmarks.networks import Network, build, compression_of, fraction_for, images
from benchmarks.steps import PEERS, build_peer, networks, run_peer
from benchmarks.timing import in_turn, ratio, spread

__all__ = ["cells"]

FORMS = {
    "dense": "dense, with a matrix product where XLA's convolution is slow",
    "tucker": "the network as it is trained, kernels formed in every call",
    "plain": "plain layers (to_plain), kernels formed once",
    "exported": "tdlrt_jax.export, run as its users run it",
}
BASELINES = ("dense", "torch dense")


def cells(options: Options) -> list[Cell]:
    """One cell a network."""
    return [Cell(network.key, partial(_measure, options, network)) for network in networks(options)]


def _forms(network: Network) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every form as a function and its parameters."""
    import jax
    from flax import nnx

    from tdlrt_jax import export
    from tdlrt_jax.nn.plain import to_plain

    image = jax.ShapeDtypeStruct(network.image, "float32")
    dense, tucker = nnx.clone(build(network, "dense")), nnx.clone(build(network, "tucker"))
    dense.eval()
    tucker.eval()

    def of(model: nnx.Module) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        graphdef, state = nnx.split(model)

        def apply(state: Any, x: Any) -> Any:
            merged: Any = nnx.merge(graphdef, state)
            return merged(x)

        return apply, (nnx.as_pure(state),)

    program = export.deserialize(export.serialize(tucker, image))
    return {
        "dense": of(dense),
        "tucker": of(tucker),
        "plain": of(to_plain(tucker, image)),
        "exported": (program.exported.call, ()),
    }


def _measure(options: Options, network: Network, say: Callable[[str], None]) -> dict[str, Any]:
    import jax

    from benchmarks.methods import memory_of, tree_bytes
    from benchmarks.peers import Peer
    from tdlrt_jax import compiler_options

    x, _ = images(network)
    programs: dict[str, Callable[[], float | None]] = {}
    facts: dict[str, Any] = {}
    say("building")
    for name, (apply, parameters) in _forms(network).items():
        say(f"compiling {name}")
        started = time.perf_counter()
        compiled = jax.jit(apply, compiler_options=compiler_options(runs_often=True)).lower(*parameters, x).compile()
        facts[name] = {
            "what": FORMS[name],
            "compile_seconds": time.perf_counter() - started,
            "parameter_bytes": tree_bytes(parameters),
            **memory_of(compiled),
            "flops": (compiled.cost_analysis() or {}).get("flops"),
        }
        programs[name] = partial(_run, compiled, *parameters, x)
    # The exported program has its weights, those of the plain layers, as constants, which the compiler does not count.
    weights = facts["plain"]["parameter_bytes"]
    facts["exported"]["parameter_bytes"] = weights
    if "peak_bytes" in facts["exported"]:
        facts["exported"]["peak_bytes"] += weights
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(Peer(options.peers)) if options.peers else None
        if peer is not None:
            for method in PEERS:
                say(f"PyTorch, {method}")
                facts[f"torch {method}"] = build_peer(peer, network, method, "infer")
                programs[f"torch {method}"] = partial(run_peer, peer, method)
        say(f"timing {options.rounds} rounds of {len(programs)} forms in turn")
        seconds = in_turn(programs, rounds=options.rounds)
    return {
        "network": network._asdict(),
        "compression": compression_of(network, fraction_for(network)),
        "rounds": options.rounds,
        "forms": {
            name: {
                "seconds": spread(values),
                "images_per_second": network.batch / spread(values)["median"],
                "speedup": {to: 1 / ratio(seconds, name, to)["of_medians"] for to in BASELINES if to in seconds},
                **facts[name],
            }
            for name, values in seconds.items()
        },
    }


def _run(compiled: Callable[..., Any], *arguments: Any) -> None:
    import jax

    jax.block_until_ready(compiled(*arguments))
