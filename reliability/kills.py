"""Kills training at random moments and continues it: ``python -m reliability.kills``.

A run of the main job is killed (SIGKILL) in the midst of training, of a compilation, of a checkpoint, and of a change of
capacities, continued with ``--resume``, killed again, and so on to its end. Whatever was killed, its numbers have to be those of
a run that nobody touched: metrics, layers, and every bit of the last checkpoint. Whole runs follow one another until there were
as many kills as asked for.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments import train

# All that a run imports, so that a fork of this process starts at once; nothing here may compute with JAX.
from experiments.run import arrays, plots, programs, training
from experiments.run.process import start_over
from experiments.sealed import read_sealed, write_sealed
from reliability.report import CLOCK, machine
from tdlrt_jax import checkpoint

__all__ = ["PHASES", "Kill", "Moment", "kill_runs", "main"]

PHASES = ("training", "compilation", "checkpoint", "capacity change")

# LeNet5 on the embedded digits, whose ranks fall from epoch to epoch, so that its arrays change sizes.
OPTIONS: tuple[str, ...] = (
    "--limit",
    "160",
    "--batch-size",
    "16",
    "--epochs",
    "6",
    "--learning-rate",
    "0.02",
    "--save-every",
    "4",
)
OPTIONS += ("--rank", "24", "--budget", "0.98", "--budget-epochs", "5", "--compilation-steps", "0")


class Moment:
    """Where a run is, in memory that it shares with the process that watches it: a phase, and how often it came there."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 16)
        self.set(None)

    def set(self, phase: str | None) -> None:
        """Says that a phase has begun, or that none is under way."""
        _, count = struct.unpack_from("qq", self._shared)
        struct.pack_into("qq", self._shared, 0, -1 if phase is None else PHASES.index(phase), count + 1)

    def get(self) -> tuple[str | None, int]:
        """The phase under way, and a number that changes with every phase."""
        number, count = struct.unpack_from("qq", self._shared)
        return (None if number < 0 else PHASES[number]), count

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A phase, and then the one before it again."""
        before, _ = self.get()
        self.set(phase)
        try:
            yield
        finally:
            self.set(before)


class Kill(NamedTuple):
    """How one process ended."""

    run: int
    aimed_at: str  # a phase
    phase: str | None  # in which it was; None between phases: while it starts, evaluates or writes its metrics
    seconds: float  # from its start
    checkpoints: list[int]  # steps, those complete at that moment


def watch(moment: Moment) -> None:
    """Makes the job say where it is; in a process that will run it."""

    def saying(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            with moment.within(phase):
                return function(*arguments, **options)

        return wrapped

    training.Training._train_epoch = saying("training", training.Training._train_epoch)  # type: ignore[method-assign]
    programs.Programs._compile = saying("compilation", programs.Programs._compile)  # type: ignore[method-assign]
    checkpoint.save = saying("checkpoint", checkpoint.save)
    training.fit_arrays = saying("capacity change", arrays.fit_arrays)
    plots.save_figure = lambda figure, directory, name: []


def _start(directory: Path, options: list[str], moment: Moment | None) -> int:
    """A new process that begins or continues the run; its number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        log = os.open(directory.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        watch(moment or Moment())
        resume = ["--resume"] if (directory / "config.json").exists() else []
        code = train.main([*options, "--run-dir", str(directory), *resume])
        sys.stdout.flush()
    finally:
        os._exit(code)


def _wait(child: int, ended: Callable[[], bool]) -> int | None:
    """Waits for the process to end, and returns its code; ``None`` if ``ended`` was true before."""
    while not ended():
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0002)
    return None


def _kill_once(directory: Path, options: list[str], number: int, aim: str, rng: random.Random) -> Kill | int:
    """Starts or continues a run and kills it in the phase aimed at; its exit code if it ended by itself."""
    moment, started = Moment(), time.monotonic()
    skip = rng.randrange(3) if aim in ("training", "checkpoint") else 0  # of the times that the phase begins
    # Within the phase: most are over within hundredths of a second, a compilation takes seconds.
    delay = rng.random() * (2.0 if aim == "compilation" else 0.05 if aim == "capacity change" else 0.3)
    child = _start(directory, options, moment)
    seen: set[int] = set()

    def begun() -> bool:
        phase, count = moment.get()
        if phase == aim:
            seen.add(count)
        return len(seen) > skip

    code = _wait(child, begun)
    if code is None:
        until = time.monotonic() + delay
        code = _wait(child, lambda: time.monotonic() >= until)
    if code is not None:
        return code
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    phase, _ = moment.get()
    steps = _steps(directory)
    return Kill(number, aim, phase, time.monotonic() - started, steps)


def _steps(directory: Path) -> list[int]:
    """The checkpoints there; by name, since orbax starts JAX, and a process in which JAX has started cannot be forked."""
    return sorted(int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdigit())


def _numbers(directory: Path) -> dict[str, Any]:
    """All of a finished run that does not depend on the clock."""
    result = read_sealed(directory / "result.json")
    epochs = [{name: value for name, value in record.items() if name not in CLOCK} for record in result["epochs"]]
    step = _steps(directory)[-1]
    stored = json.loads((directory / "checkpoints" / str(step) / "description" / "metadata").read_text())
    final = {name: value for name, value in result["final"].items() if name not in CLOCK}
    return {"epochs": epochs, "layers": result["layers"], "final": final, "step": step, "arrays": stored["checksums"]}


def kill_runs(directory: Path, kills: int, *, seed: int = 0, options: tuple[str, ...] = OPTIONS) -> Iterator[Any]:
    """Kills runs as often as asked for, and compares those that come to their end with one that nobody touched.

    Args:
      directory: for the runs; new.
      kills: how often, over all runs.
      seed: of the moments.
      options: of ``experiments.train``.

    Yields:
      A :class:`Kill` for each, and for each run that ended a dictionary: its ``run``, and ``differing``, the names of what is not
      the same (empty: everything is).

    Raises:
      RuntimeError: if a run that is not killed ends with another exit code than 0; the message has what it printed last.
    """
    rng = random.Random(seed)
    words = [*options, "--cache-dir", str(directory / "cache")]

    def failed(run: Path, code: int) -> RuntimeError:
        return RuntimeError(f"{run} ended with {code}: {run.with_suffix('.log').read_text()[-3000:]}")

    reference = directory / "untouched"
    code = _wait(_start(reference, words, None), lambda: False)
    if code != 0:
        raise failed(reference, code or 0)
    expected = _numbers(reference)
    done, number = 0, 0
    while done < kills:
        run, code = directory / f"run{number}", None
        while code is None:
            if done < kills:
                aim = PHASES[done % len(PHASES)]
                ended = _kill_once(run, words, number, aim, rng)
                if isinstance(ended, Kill):
                    done += 1
                    yield ended
                else:
                    code = ended
            else:
                code = _wait(_start(run, words, None), lambda: False)
        if code != 0:
            raise failed(run, code)
        found = _numbers(run)
        yield {"run": number, "differing": [name for name in expected if found[name] != expected[name]]}
        number += 1


def main(argv: list[str] | None = None) -> int:
    """Kills, prints every kill, and writes the summary; returns 1 if a run differs."""
    parser = argparse.ArgumentParser(prog="python -m reliability.kills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how often (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the summary as JSON")
    given = parser.parse_args(argv)
    console, kills, ends = Console(highlight=False), list[Kill](), list[dict[str, Any]]()
    described = None
    with tempfile.TemporaryDirectory() as directory:
        for item in kill_runs(Path(directory), given.kills, seed=given.seed):
            if isinstance(item, Kill):
                kills.append(item)
                where = item.phase or "between phases"
                console.print(
                    f"kill {len(kills)} of {given.kills}: run {item.run} after {item.seconds:.1f} s, in {where}; "
                    f"checkpoints {item.checkpoints}"
                )
            else:
                ends.append(item)
                console.print(f"run {item['run']} ended: {item['differing'] or 'the same as the one not touched'}")
    described = machine(["reliability.kills", *(sys.argv[1:] if argv is None else argv)])
    phases = Counter(kill.phase or "between phases" for kill in kills)
    differing = [end for end in ends if end["differing"]]
    console.print(
        f"{len(kills)} kills: {dict(phases)}; {len(ends)} runs ended, {len(differing)} of them with other numbers"
    )
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        summary = {"kills": len(kills), "phases": dict(phases), "runs": len(ends), "differing": differing}
        content = {**described, "options": list(OPTIONS), "seed": given.seed, **summary}
        write_sealed(given.output, {**content, "each": [kill._asdict() for kill in kills]})
    return 1 if differing else 0


if __name__ == "__main__":
    start_over()
    sys.exit(main())
