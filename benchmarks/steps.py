"""Training steps of all methods, in turn in one process, with PyTorch's in another one between them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from benchmarks.cells import Cell, Options
from benchmarks.networks import CLASSES, Network, compression_of, fraction_for, kernels
from benchmarks.timing import in_turn, ratio, spread

__all__ = ["build_peer", "cells", "compilers", "networks", "peer_ranks", "run_peer"]

PEERS = ("dense", "factorized", "tensorly")
BASELINES = ("dense", "factorized", "torch dense")


def networks(options: Options) -> Iterator[Network]:
    """The networks that the options name, the tightest compression of each model first."""
    for batch in options.batches:
        for compression in sorted(options.compressions, key=lambda c: abs(c - 0.95)):
            for model in options.models:
                yield Network(model, options.width, batch, compression, options.spatial)


def cells(options: Options) -> list[Cell]:
    """One cell a network."""
    return [Cell(network.key, partial(_measure, options, network)) for network in networks(options)]


def compilers() -> int:
    """How many programs are compiled at a time: on a CPU one, so that times of compilation compare, and on a GPU all."""
    import jax

    return 1 if jax.default_backend() == "cpu" else 8


def peer_ranks(network: Network) -> dict[str, list[int]]:
    """The network's ranks by layer for another framework, spatial modes at their size where they are whole."""
    return {
        name.removesuffix("/kernel"): [int(size) for size in kernel.core.shape]
        for name, kernel in kernels(network, fraction_for(network)).items()
    }


def _measure(options: Options, network: Network, say: Callable[[str], None]) -> dict[str, Any]:
    from benchmarks.methods import JAX_METHODS, TrainingStep
    from benchmarks.peers import Peer

    steps: dict[str, Any] = {}
    with ThreadPoolExecutor(compilers()) as threads:
        for method, step in zip(options.methods, threads.map(partial(TrainingStep, network), options.methods)):
            say(f"compiled {method}")
            steps[method] = step
    programs: dict[str, Callable[[], float]] = {name: step.run for name, step in steps.items()}
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(Peer(options.peers)) if options.peers else None
        facts: dict[str, Any] = {}
        if peer is not None:
            for method in PEERS:
                say(f"PyTorch, {method}")
                facts[f"torch {method}"] = build_peer(peer, network, method, "train")
                programs[f"torch {method}"] = partial(run_peer, peer, method)
        say(f"timing {options.rounds} rounds of {len(programs)} methods in turn")
        seconds = in_turn(programs, rounds=options.rounds)
        versions = peer.versions if peer is not None else None
    facts |= {name: {"what": JAX_METHODS[name], **step.facts()} for name, step in steps.items()}
    del steps
    gc.collect()
    baselines = [name for name in BASELINES if name in seconds] or list(seconds)[:1]
    return {
        "network": network._asdict(),
        "fraction": fraction_for(network),
        "compression": compression_of(network, fraction_for(network)),
        "rounds": options.rounds,
        "peers": versions,
        "methods": {
            name: {
                "seconds": spread(values),
                "ratio": {to: ratio(seconds, name, to) for to in baselines},
                **facts[name],
            }
            for name, values in seconds.items()
        },
    }


def build_peer(peer: Any, network: Network, method: str, mode: str) -> dict[str, Any]:
    """Builds a network in the peers' process, for ``"train"`` or ``"infer"``; what it says of it."""
    facts: dict[str, Any] = peer.build(
        method,
        mode=mode,
        model=network.model,
        method=method,
        width=network.width,
        num_classes=CLASSES,
        image=[32, 32],
        batch=network.batch,
        ranks=None if method == "dense" else peer_ranks(network),
        learning_rate=0.01,
        momentum=0.9,
        seed=0,
    )
    return facts


def run_peer(peer: Any, name: str) -> float:
    """Seconds of one step of a network in the peers' process."""
    (seconds,) = peer.run(name, steps=1)
    return float(seconds)
