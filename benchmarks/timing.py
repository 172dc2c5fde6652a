"""Timing of several programs in turn, so that what disturbs one of them disturbs all; ratios hold within one such run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["in_turn", "ratio", "spread"]


def in_turn(
    programs: Mapping[str, Callable[[], float | None]], *, rounds: int, warmup: int = 1, ahead: int = 1
) -> dict[str, list[float]]:
    """Seconds of every program, ``rounds`` of each, run one after the other in turn.

    Args:
      programs: each runs once and waits for its result. One that times itself (in another process, or a mean over
        several steps) returns its seconds; otherwise the call is timed.
      rounds: how often each is timed, 1 or more.
      warmup: rounds before those that are counted.
      ahead: runs before each that is timed, not counted. After a pause of some seconds, others' long programs for instance, a
        first run may take longer: a virtual machine's host takes idle memory back, it seems.

    Raises:
      ValueError: for fewer than one round.

    Example:
      >>> list(in_turn({"a": lambda: None, "b": lambda: 2.0}, rounds=3)["b"])
      [2.0, 2.0, 2.0]
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be 1 or more")
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for index in range(-warmup, rounds):
        for name, program in programs.items():
            for _ in range(ahead):
                program()
            started = time.perf_counter()
            own = program()
            taken = time.perf_counter() - started if own is None else own
            if index >= 0:
                seconds[name].append(taken)
    return seconds


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and spread: ``{"median", "lowest", "highest", "quartiles": [first, third]}``.

    Example:
      >>> spread([3.0, 1.0, 2.0])["median"]
      2.0
    """
    ordered = sorted(seconds)
    first, third = (
        (ordered[0],) * 2 if len(ordered) == 1 else statistics.quantiles(ordered, n=4, method="inclusive")[::2]
    )
    return {
        "median": statistics.median(ordered),
        "lowest": ordered[0],
        "highest": ordered[-1],
        "quartiles": [first, third],
    }


def ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> dict[str, Any]:
    """How ``name`` compares with ``to``: the ratio of their medians, and the quartiles of the ratios round by round.

    Example:
      >>> ratio({"a": [2.0, 2.0], "b": [1.0, 1.0]}, "a", "b")["of_medians"]
      2.0
    """
    rounds = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return {
        "of_medians": statistics.median(seconds[name]) / statistics.median(seconds[to]),
        "quartiles": spread(rounds)["quartiles"],
    }
