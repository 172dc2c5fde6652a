"""Runs processes of a grid, some at a time, and watches them: an epoch a line, and how long all of it still takes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from experiments.grids.grid import GridError, Places, Run, publish
from experiments.grids.pace import Pace, duration
from experiments.run.interruption import Interruption
from experiments.run.lock import lock

__all__ = ["Ended", "execute"]

_TAIL = 15  # lines of a failed run's log that are shown


class Ended(NamedTuple):
    """How an execution ended."""

    failed: list[str]  # names of runs
    left: int  # runs that are neither finished nor failed
    signal_code: int  # 130 or 143 if SIGINT or SIGTERM ended it, else 0


class _Child:
    """A run at work."""

    def __init__(self, run: Run, position: str, process: subprocess.Popen[bytes], epochs: int):
        self.run, self.position, self.process = run, position, process
        self.epochs = epochs  # told of, the last one's number


def execute(
    runs: Sequence[Run],
    states: Mapping[str, str],
    places: Places,
    *,
    command: Sequence[str],
    locations: Sequence[str] = (),
    jobs: int = 1,
    seconds: float | None = None,
    console: Console,
    pace: Pace,
    poll: float = 0.3,
) -> Ended:
    """Runs what is not done, resumes what was cut off, and publishes every result the moment it is there.

    SIGINT and SIGTERM are passed on to the runs, once, and waited for; a second signal ends the runs at once.

    Args:
      runs: all of them, in their order.
      states: where each stands, as :func:`experiments.grids.grid.state_of` says.
      places: where files are.
      command: what starts a run.
      locations: further arguments, which say where things are.
      jobs: how many run at a time.
      seconds: stop, as at a signal, after so many.
      console: where progress is shown.
      pace: of what was done before; learns from the runs.
      poll: seconds between two looks at the runs.

    Raises:
      GridError: if another execution is at work in the same directory.
      KeyboardInterrupt: at the second signal.
    """
    with Interruption() as interruption, _lock(places.runs) as lock, _bar(console) as bar:
        execution = _Execution(runs, states, places, [*command], [*locations], jobs, pace, bar, lock)
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            return execution.loop(interruption, deadline, poll)
        finally:
            for child in execution.children:  # only after a second signal, or an error
                child.process.kill()
                child.process.wait()


class _Execution:
    def __init__(
        self,
        runs: Sequence[Run],
        states: Mapping[str, str],
        places: Places,
        command: list[str],
        locations: list[str],
        jobs: int,
        pace: Pace,
        bar: Progress,
        lock: int | None,
    ):
        self.places, self.command, self.locations, self.jobs = places, command, locations, jobs
        self.pace, self.bar, self.lock = pace, bar, lock
        self.children: list[_Child] = []
        self.failed: list[str] = []
        self.states = dict(states)
        self.positions = {run.name: f"[{number}/{len(runs)}]" for number, run in enumerate(runs, start=1)}
        for run in runs:
            if states[run.name] == "finished":  # the runner was ended between the two
                publish(run, places)
                self.states[run.name] = "done"
        # Epochs to do, of every run that is not done; those of runs at work follow them.
        self.left = {run.name: self._epochs_left(run) for run in runs if self.states[run.name] != "done"}
        self.queue = [run for run in runs if run.name in self.left]
        self.task = bar.add_task("", total=sum(run.epochs for run in runs))
        self.say(f"{len(runs)} runs: {len(runs) - len(self.queue)} done, {len(self.queue)} to do")

    def say(self, text: str) -> None:
        self.bar.console.print(text)

    def loop(self, interruption: Interruption, deadline: float | None, poll: float) -> Ended:
        stopping = False
        while self.queue or self.children:
            late = deadline is not None and time.monotonic() >= deadline
            if not stopping and (interruption.signal is not None or late):
                stopping = True
                number = signal.SIGTERM if interruption.signal is None else interruption.signal
                why = "the time is over" if interruption.signal is None else number.name
                self.say(f"{why}: waiting for {len(self.children)} runs to save what they have")
                for child in self.children:
                    child.process.send_signal(number)
            while not stopping and self.queue and len(self.children) < self.jobs:
                self._start(self.queue.pop(0))
            if stopping and not self.children:
                break
            time.sleep(poll)
            for child in list(self.children):
                code = child.process.poll()  # before reading, so that nothing written before the end is missed
                self._watch(child)
                if code is not None:
                    self.children.remove(child)
                    self._end(child, code, stopping)
            left = duration(self.pace.left(self.left.items(), self.jobs))
            done = self.bar.tasks[0].total - sum(self.left.values())  # type: ignore[operator]
            self.bar.update(self.task, completed=done, description=f"{left} left")
        return Ended(self.failed, len(self.left), interruption.exit_code)

    def _epochs_left(self, run: Run) -> int:
        return max(0, run.epochs - len(self.places.directory(run).history()))

    def _start(self, run: Run) -> None:
        directory, log = self.places.directory(run), self.places.log(run)
        resumed = self.states[run.name] == "cut off"
        words = [*self.command, *run.flags(), *self.locations, "--run-dir", str(directory.path)]
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self.jobs > 1:  # else the first process takes most of a GPU's memory
            environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*words, "--resume"] if resumed else words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,  # a terminal's Ctrl-C reaches the runner only, which passes it on once
                pass_fds=() if self.lock is None else (self.lock,),
            )
        epochs = len(directory.history())
        self.children.append(_Child(run, self.positions[run.name], process, epochs))
        how = f"continues after epoch {epochs}" if resumed else "starts"
        self.say(f"{self.positions[run.name]} {run.name} {how}")

    def _watch(self, child: _Child) -> None:
        """Tells of epochs that are new."""
        directory = self.places.directory(child.run)
        history = directory.history()
        if not history or history[-1]["epoch"] <= child.epochs:
            return
        stored = directory.config() or {}
        place = [stored, *stored.get("continued", [])][-1]
        self.pace.learn(child.run.name, place.get("hardware"), history, here=True)
        total = child.run.epochs
        self.left[child.run.name] = max(0, total - len(history))
        left = duration(self.pace.left(self.left.items(), self.jobs))
        for record in history:
            if record["epoch"] > child.epochs:
                child.epochs = record["epoch"]
                self.say(f"{child.position} {child.run.name} {_epoch(record, total)}; all: {left} left")

    def _end(self, child: _Child, code: int, stopping: bool) -> None:
        run = child.run
        if self.places.directory(run).result() is not None:
            result = publish(run, self.places)
            del self.left[run.name]
            final = result["final"]
            self.say(f"{child.position} {run.name} is finished: {_numbers(final)}; {self.places.published(run)}")
        elif stopping and code in (130, 143, -signal.SIGINT, -signal.SIGTERM):
            self.say(f"{child.position} {run.name} has stopped after epoch {child.epochs}")
        else:
            del self.left[run.name]
            self.failed.append(run.name)
            self.say(f"{child.position} {run.name} failed with exit code {code}; the others go on. Its last lines:")
            self.say("".join(f"    {line}\n" for line in _tail(self.places.log(run))).rstrip())


def _epoch(record: Mapping[str, Any], total: int) -> str:
    return f"epoch {record['epoch']}/{total}: {_numbers(record)}, {record['seconds']:.1f} s"


def _numbers(record: Mapping[str, Any]) -> str:
    """Accuracy, of validation where there is one, and compression."""
    name = "validation" if "validation_accuracy" in record else "test"
    compression = f"compression {record['compression_conv']:.1%}"
    return f"{name} accuracy {record[f'{name}_accuracy']:.2%}, {compression}"


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-_TAIL:]


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[int | None]:
    """Holds the directory's lock. Runs inherit it, so it is held as long as one of them lives, even without the runner."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        file = lock(directory / ".lock")
    except BlockingIOError:
        raise GridError(
            f"another command, or a run that outlived its own, is at work in {directory}: wait for its end, "
            f"or name another directory with --runs"
        ) from None
    try:
        yield file
    finally:
        if file is not None:
            os.close(file)


def _bar(console: Console) -> Progress:
    """The epochs of the whole grid, at the bottom of a terminal; elsewhere nothing."""
    columns = (
        TextColumn("epochs"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}, {task.description}"),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
