"""An hour of training in which ranks move and arrays change sizes: ``python -m reliability.soak``.

LeNet5 on the embedded digits, with the main job's own programs. The tolerance swings between two values, so that ranks fall and
rise again, arrays shrink and grow, and steps are compiled anew; now and then the state is saved, and training goes on from what
is restored. At every look the kernels are held to what they promise (orthonormal factors, ranks that are those reported, zeros
beyond them, nothing that is not finite), and what the process and its devices hold is noted: at the end none of it may have
grown.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich.console import Console

import tdlrt_jax
from experiments.options import ModelConfig
from experiments.run import data
from experiments.run.arrays import fit_arrays
from experiments.run.batches import epoch_order, to_device, transform_of
from experiments.run.build import build_model
from experiments.run.memory import give_back, heap_in_use, resident_bytes
from experiments.run.process import start_over
from experiments.run.programs import Programs, TrainState, build_programs
from experiments.sealed import write_sealed
from reliability.report import machine
from tdlrt_jax import checkpoint
from tdlrt_jax.status import NONFINITE, RANK_AT_CAPACITY

__all__ = ["Look", "broken_invariants", "growth", "main", "soak"]

BATCH = 32
LOOK_EVERY = 60  # steps
SWING = 1800  # steps in which the tolerance goes up and down again
TOLERANCES = (1e-4, 0.5)
RANKS = (16, 40)  # at the start and at most
SAVE_EVERY = 10  # looks
INTEGRATOR = "bug"


class Look(NamedTuple):
    """What was found after so many steps."""

    minutes: float
    step: int
    loss: float
    tolerance: float
    rank: dict[str, list[int]]
    stored: int  # numbers in the kernels' arrays
    deviation: float  # of the factors from orthonormality, largest entry
    compilations: int  # of the step so far
    changes: int  # of array sizes so far
    host_bytes: int  # of the process, resident, once the C library has given back what is free
    heap_bytes: int  # of these, what the C library has handed out (glibc's; 0 elsewhere)
    device_bytes: int  # of all live arrays, and of the allocator where the device has one
    state_bytes: int  # of these, what training itself has at these array sizes
    arrays: int  # that are live


def swinging(step: Array) -> Array:
    """The tolerance at a step, between the two of ``TOLERANCES`` evenly in its logarithm."""
    low, high = map(math.log, TOLERANCES)
    return jnp.exp(low + (high - low) * (1 - jnp.cos(2 * jnp.pi * step / SWING)) / 2)


def broken_invariants(params: Any, rank: dict[str, Any]) -> tuple[list[str], float]:
    """What is wrong with the kernels, in words, and the largest deviation of a factor from orthonormality.

    Args:
      params: on the host.
      rank: as the step reported.
    """
    problems, largest = [], 0.0
    for name, kernel in tdlrt_jax.kernel_paths(params).items():
        core, beyond = np.asarray(kernel.core), np.zeros(kernel.core.shape, bool)
        for mode, factor in enumerate(kernel.factors):
            if factor is None:
                continue
            u, r = np.asarray(factor, np.float64), int(rank[name][mode])
            unit = np.diag(np.arange(u.shape[1]) < r).astype(float)
            deviation = float(np.abs(u.T @ u - unit).max())
            largest = max(largest, deviation)
            if not deviation < 1e-5:
                problems.append(f"{name}: factor {mode} of rank {r} deviates by {deviation:.1e}")
            if np.any(u[:, r:]) or not 1 <= r <= u.shape[1]:
                problems.append(f"{name}: factor {mode} has columns beyond its rank {r}")
            beyond |= np.expand_dims(
                np.arange(core.shape[mode]) >= r, [axis for axis in range(core.ndim) if axis != mode]
            )
        if np.any(core[beyond]):
            problems.append(f"{name}: the core has entries beyond its ranks")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        problems.append("a parameter is not finite")
    return problems, largest


def growth(values: Sequence[float]) -> float:
    """By how much the last quarter's median is above the second quarter's, as a part of that; the first is for warming up.

    Example:
      >>> growth([5, 7, 10, 10, 10, 10, 11, 11])
      0.1
    """
    quarter = len(values) // 4
    before = statistics.median(values[quarter : 2 * quarter])
    return (statistics.median(values[-quarter:]) - before) / before if before else 0.0


def soak(minutes: float, directory: Path, *, seed: int = 0) -> Iterator[Look]:
    """Trains for so long and yields what it finds.

    Args:
      minutes: of wall time.
      directory: for checkpoints.
      seed: of the network and the order of images.

    Raises:
      RuntimeError: as soon as an invariant does not hold, naming it.
    """
    loaded = data.load("digits", data_dir=None, cache_dir=None, validation=0.0, limit=None)
    model = build_model(ModelConfig(model="lenet5", rank=RANKS[0]), loaded, seed)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02, momentum=0.9))
    tx = tdlrt_jax.tdlrt(inner, tolerance=swinging, integrator=INTEGRATOR, max_rank=RANKS[1])
    programs, state = build_programs(model, tx, transform_of(loaded, crop=True, flip=False), seed=seed)
    images, count = to_device(loaded.train), len(loaded.train.labels)
    started, step, looks, changes = time.monotonic(), 0, 0, 0
    epoch, order = -1, jnp.zeros(0)
    while time.monotonic() - started < 60 * minutes:
        pressing, reports = False, []
        for _ in range(LOOK_EVERY):
            if step // (count // BATCH) != epoch:
                epoch = step // (count // BATCH)
                order = epoch_order(seed, epoch, count, BATCH)
            state, report = programs.train(state, images, order, np.int32(epoch), np.int32(step % (count // BATCH)))
            reports.append(report)
            step += 1
        for report in jax.device_get(reports):
            pressing |= bool(report.status & RANK_AT_CAPACITY)
            if not report.finite or report.status & NONFINITE:
                raise RuntimeError(f"step {step - LOOK_EVERY}..{step}: not finite, status {report.status}")
        loss = float(report.loss)
        yield _look(state, programs, changes, loss, step, (time.monotonic() - started) / 60)
        looks += 1
        del reports, report
        fitted = fit_arrays(state, RANKS[1], grow=pressing)
        changes += fitted is not state
        state = fitted
        if looks % SAVE_EVERY == 0:
            programs.evaluate(state, images)
            checkpoint.save(directory, step, state._asdict(), keep=2)
            state = TrainState(**checkpoint.restore(directory, state._asdict())[0])


def _look(state: TrainState, programs: Programs, changes: int, loss: float, step: int, minutes: float) -> Look:
    host = jax.device_get(state)
    problems, deviation = broken_invariants(host.params, host.opt_state.rank)
    if problems:
        raise RuntimeError(f"step {step}: {'; '.join(problems)}")
    kernels = tdlrt_jax.kernel_paths(host.params)
    live = jax.live_arrays()
    give_back()
    statistics_ = [device.memory_stats() or {} for device in jax.local_devices()]
    allocated = sum(found.get("bytes_in_use", 0) for found in statistics_)
    return Look(
        minutes=minutes,
        step=step,
        loss=loss,
        tolerance=float(host.opt_state.tolerance),
        rank={name: np.asarray(rank).tolist() for name, rank in host.opt_state.rank.items()},
        stored=sum(leaf.size for kernel in kernels.values() for leaf in jax.tree.leaves(kernel)),
        deviation=deviation,
        compilations=programs.compilations,
        changes=changes,
        host_bytes=resident_bytes(),
        heap_bytes=heap_in_use(),
        device_bytes=allocated or sum(array.nbytes for array in live),
        state_bytes=sum(array.nbytes for array in jax.tree.leaves(state)),
        arrays=len(live),
    )


def summary(looks: list[Look]) -> dict[str, Any]:
    """What the looks come to, and ``problems``: what has grown."""
    ranks = {
        name: {"least": np.min(found, axis=0).tolist(), "most": np.max(found, axis=0).tolist()}
        for name, found in ((name, [look.rank[name] for look in looks]) for name in looks[0].rank)
    }
    grown = {
        "host memory": (growth([look.host_bytes for look in looks]), 0.02),
        "heap in use": (growth([look.heap_bytes for look in looks]), 0.02),
        # The state's arrays grow and shrink with the ranks.
        "device memory beyond the state": (growth([look.device_bytes - look.state_bytes for look in looks]), 0.02),
        "live arrays": (growth([look.arrays for look in looks]), 0.0),
    }
    last = looks[-1]
    problems = [f"{name} grew by {by:.1%}" for name, (by, most) in grown.items() if by > most]
    if last.compilations > last.changes + 1:
        problems.append(f"{last.compilations} compilations for {last.changes} changes of array sizes")
    return {
        "minutes": last.minutes,
        "steps": last.step,
        "looks": len(looks),
        "swings": last.step / SWING,
        "compilations": last.compilations,
        "changes": last.changes,
        "largest_deviation": max(look.deviation for look in looks),
        "ranks": ranks,
        "stored": {"least": min(look.stored for look in looks), "most": max(look.stored for look in looks)},
        "growth": {name: by for name, (by, _) in grown.items()},
        "host_bytes": {"first": looks[0].host_bytes, "last": last.host_bytes, "most": max(x.host_bytes for x in looks)},
        "heap_bytes": {"first": looks[0].heap_bytes, "last": last.heap_bytes, "most": max(x.heap_bytes for x in looks)},
        "device_bytes": {"last": last.device_bytes, "most": max(look.device_bytes for look in looks)},
        "problems": problems,
    }


def main(argv: list[str] | None = None) -> int:
    """Soaks, prints a line a minute, and writes the summary; returns 1 if something has grown or does not hold."""
    parser = argparse.ArgumentParser(prog="python -m reliability.soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, metavar="M", help="how long (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the summary as JSON")
    given = parser.parse_args(argv)
    console, looks = Console(highlight=False), list[Look]()
    described = machine(["reliability.soak", *(sys.argv[1:] if argv is None else argv)])
    with tempfile.TemporaryDirectory() as directory:
        try:
            for look in soak(given.minutes, Path(directory)):
                if not looks or int(look.minutes) > int(looks[-1].minutes):
                    console.print(
                        f"{look.minutes:.1f} of {given.minutes:.0f} min: step {look.step:,}, loss {look.loss:.3f}, "
                        f"τ {look.tolerance:.2f}, {look.stored:,} numbers, {look.compilations} compilations, host "
                        f"{look.host_bytes / 2**20:,.0f} MiB, device {look.device_bytes / 2**20:.1f} MiB in {look.arrays} arrays",
                        soft_wrap=True,
                    )
                looks.append(look)
        except RuntimeError as error:
            console.print(f"failed: {error}")
            return 1
    found = summary(looks)
    console.print(json.dumps(found, indent=1))
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {"integrator": INTEGRATOR, "tolerances": TOLERANCES, "swing": SWING, "batch": BATCH}
        minutes = [
            look
            for before, look in zip([None, *looks], looks)
            if before is None or int(look.minutes) > int(before.minutes)
        ]
        write_sealed(
            given.output, {**described, **settings, **found, "each_minute": [look._asdict() for look in minutes]}
        )
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    start_over()
    sys.exit(main())
