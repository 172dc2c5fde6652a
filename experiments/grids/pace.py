"""How long the rest of a grid of runs takes, from the epochs that are done."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["Pace", "duration"]


def duration(seconds: float | None) -> str:
    """A time in words, ``"?"`` for one that is not known.

    Example:
      >>> duration(42.3), duration(5400), duration(9000), duration(None)
      ('42 s', '90 min', '2 h 30 min', '?')
    """
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Pace:
    """Seconds of an epoch by run, and from them the time that runs still take.

    A run that has done no epoch takes as long as others do: those that differ in the seed only, else those of its network (the
    first part of its name), else all. Epochs of other hardware than the one last seen at work count only where there are none
    of this.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, tuple[str | None, float]] = {}
        self._hardware: str | None = None

    def learn(
        self, name: str, hardware: str | None, history: Sequence[Mapping[str, Any]], *, here: bool = False
    ) -> None:
        """Takes in what a run has done.

        Args:
          name: of the run, such as ``"vgg16/tdlrt/seed0"``.
          hardware: where it runs or ran.
          history: its epochs' records, with ``seconds`` and ``evaluation_seconds``.
          here: whether it runs now, on this machine.
        """
        if here and hardware:
            self._hardware = hardware
        if history:
            seconds = [record["seconds"] + record.get("evaluation_seconds", 0.0) for record in history]
            self._seconds[name] = hardware, statistics.fmean(seconds)

    def of(self, name: str) -> float | None:
        """Seconds of an epoch of a run; ``None`` where nothing is known."""
        here = {run: seconds for run, (hardware, seconds) in self._seconds.items() if hardware == self._hardware}
        known = here or {run: seconds for run, (_, seconds) in self._seconds.items()}
        if name in known:
            return known[name]
        for alike in (name.rpartition("/")[0] + "/", name.partition("/")[0] + "/", ""):
            seconds = [value for run, value in known.items() if run.startswith(alike)]
            if seconds:
                return statistics.fmean(seconds)
        return None

    def left(self, epochs: Iterable[tuple[str, int]], jobs: int = 1) -> float | None:
        """Seconds that runs still take, so many at a time; ``None`` where nothing is known.

        Args:
          epochs: names of runs and the epochs that they have to do.
          jobs: how many run at a time.
        """
        total = 0.0
        for name, count in epochs:
            seconds = self.of(name)
            if seconds is None:
                return None
            total += count * seconds
        return total / jobs
