"""Copies a finished run's result to where results are kept: ``python -m experiments.publish RUN FILE.json``.

What says where things were on one machine (``data_dir``, ``run_dir``, ...) is left out of options and command; nothing else
changes.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from experiments.config import LOCATIONS
from experiments.run.directory import RunDirectory, RunDirectoryError
from experiments.sealed import write_sealed

__all__ = ["main", "without_locations"]


def without_locations(result: dict[str, Any]) -> dict[str, Any]:
    """A result without the options in :data:`~experiments.config.LOCATIONS`, in its command too.

    Example:
      >>> result = {"options": {"seed": 1, "run_dir": "there"}, "command": "python -m experiments.train --run-dir there --seed 1"}
      >>> without_locations(result)
      {'options': {'seed': 1}, 'command': 'python -m experiments.train --seed 1'}
    """
    flags = {f"--{name.replace('_', '-')}" for name in LOCATIONS}
    words, kept = shlex.split(result["command"]), []
    while words:
        word = words.pop(0)
        name, _, value = word.partition("=")
        if name not in flags:
            kept.append(word)
        elif not value and words and not words[0].startswith("--"):
            words.pop(0)  # the option's value
    options = {name: value for name, value in result["options"].items() if name not in LOCATIONS}
    return {**result, "options": options, "command": shlex.join(kept)}


def main(argv: list[str] | None = None) -> int:
    """Publishes one run; returns the exit code, 2 for arguments that are no finished run and no new file."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) != 2 or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    run, target = map(Path, argv)
    try:
        result = RunDirectory(run).result()
        if result is None:
            raise RunDirectoryError(f"{run} holds no finished run (no result.json): finish it with --resume")
        if target.exists():
            raise RunDirectoryError(f"{target} exists already: remove it, or name another file")
    except RunDirectoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(target, without_locations(result))
    except OSError as error:
        print(f"error: {target} cannot be written ({error.strerror}): name another file", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
