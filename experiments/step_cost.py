"""What a training step of finished runs costs, side by side: ``python -m experiments.step_cost RUN [RUN ...]``.

Restores the last checkpoint of every run, compiles its step at the capacities it ended with, and times steps of all runs in turn,
so that what disturbs one of them disturbs all. Of runs whose steps are not alike (``--adapt-every``) the time is the mean over a
period. Writes medians and the compiler's plan of the memory as JSON and prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.run.process import start_over

__all__ = ["main", "measure"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurement for a command line; returns the exit code, 2 for a directory that holds no finished run."""
    parser = argparse.ArgumentParser(prog="python -m experiments.step_cost", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directories of finished runs")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each run that are timed")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="directory of prepared tfds data sets")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(argv)
    try:
        result = measure(options.runs, rounds=options.rounds, data_dir=options.data_dir)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(result))
    return 0


def measure(directories: Sequence[Path], *, rounds: int = 30, data_dir: Path | None = None) -> dict[str, Any]:
    """Times ``rounds`` steps of every run, one after the other in turn.

    Args:
      directories: of finished runs.
      rounds: how often each run's step, or period of steps, is timed, 1 or more; two more go before that are not.
      data_dir: directory of prepared tfds data sets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
      ``{"hardware", "settings", "versions", "commit", "rounds", "runs": {name: {...}}}``: seconds (median, lowest, highest),
      compile seconds, and bytes of parameters and optimizer state, of the step's temporaries and of its peak without the
      data set.

    Raises:
      ValueError: for a directory that holds no finished run.
    """
    import jax

    from experiments.run.directory import distinct_names, environment

    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be 1 or more")
    names = distinct_names(directories)
    steps = {name: _Step(directory, data_dir) for name, directory in zip(names, directories)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in itertools.count(-2):  # the first two warm caches up
        if index == rounds:
            break
        for name, step in steps.items():
            taken = step.period()
            if index >= 0:
                seconds[name].append(taken)
    stored = environment([])
    return {
        **{key: stored[key] for key in ("hardware", "settings", "versions", "commit")},
        "backend": jax.default_backend(),
        "rounds": rounds,
        "runs": {
            name: {
                "seconds": {
                    "median": statistics.median(seconds[name]),
                    "lowest": min(seconds[name]),
                    "highest": max(seconds[name]),
                },
                **step.facts(),
            }
            for name, step in steps.items()
        },
    }


class _Step:
    """The step of a run at its last checkpoint, with real batches."""

    def __init__(self, directory: Path, data_dir: Path | None):
        import jax.numpy as jnp

        from experiments.run.batches import epoch_order
        from experiments.run.finished import bring_back

        config, stored, loaded, work = bring_back(directory, data_dir)
        self.programs, self.train = work.programs, work.train
        self.state = work.state
        self.order = epoch_order(config.run.seed, 0, len(loaded.train.labels), config.optimizer.batch_size)
        self.epoch, self.index = jnp.int32(0), 0
        self.every = config.tdlrt.adapt_every if config.model.parts.adaptive else 1
        self.between = config.between
        self.accuracy = stored["final"]["test_accuracy"]
        self.compression = stored["final"]["compression_conv"]

    def period(self) -> float:
        """Seconds of a step: the mean over whole ones and those between, as they follow one another."""
        if self.between is None:
            return sum(self._run(whole=True) for _ in range(self.every)) / self.every
        # All steps between are alike: one of them stands for the others.
        return (self._run(whole=True) + (self.every - 1) * self._run(whole=False)) / self.every

    def _run(self, *, whole: bool) -> float:
        """Seconds of one step, waited for."""
        import jax
        import jax.numpy as jnp

        index = jnp.int32(self.index % self.order.shape[0])
        started = time.perf_counter()
        self.state, report = self.programs.train(self.state, self.train, self.order, self.epoch, index, whole=whole)
        jax.block_until_ready((self.state, report))
        self.index += 1
        return time.perf_counter() - started

    def facts(self) -> dict[str, Any]:
        """Everything but the times."""
        import jax

        memory = self.programs.memory
        state = sum(leaf.nbytes for leaf in jax.tree.leaves((self.state.params, self.state.opt_state)))
        return {
            "compile_seconds": self.programs.compile_seconds,
            "compilations": self.programs.compilations,
            "state_bytes": state,
            "temporary_bytes": memory["temporaries"],
            "peak_bytes": memory["peak"] - memory["arguments"] + state,
            "test_accuracy": self.accuracy,
            "compression_conv": self.compression,
        }


def markdown(result: dict[str, Any]) -> str:
    """The numbers as a Markdown table; ratios are to the first run."""
    names = list(result["runs"])
    first = result["runs"][names[0]]
    lines = [
        "| run | test accuracy [%] | compression of the convolutions [%] | s / step (median, lowest) | ratio | "
        "parameters and optimizer [MiB] | peak of a step [MiB] |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        run = result["runs"][name]
        seconds = run["seconds"]
        lines.append(
            f"| {name} | {100 * run['test_accuracy']:.2f} | {100 * run['compression_conv']:.1f} | {seconds['median']:.3f}, "
            f"{seconds['lowest']:.3f} | {seconds['median'] / first['seconds']['median']:.2f} | "
            f"{run['state_bytes'] / 2**20:.2f} | {run['peak_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    start_over()
    sys.exit(main())
