"""What all reliability results have in common."""

from __future__ import annotations

import shlex
from typing import Any

from experiments.run.directory import environment

__all__ = ["CLOCK", "machine"]

# What depends on the clock and on how often a run was started, and so differs between runs with the same numbers.
CLOCK = ("seconds", "evaluation_seconds", "compilations", "compile_seconds")


def machine(words: list[str]) -> dict[str, Any]:
    """Command, commit, versions and hardware of a result."""
    return {**environment([]), "command": shlex.join(["python", "-m", *words])}
