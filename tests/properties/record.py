"""The record of a session of ``make properties``: what hypothesis counted, where, and on what."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import hypothesis

from experiments.run.directory import environment

# Replayed failures, new examples, and those of shrinking a failure.
PHASES = ("reuse-phase", "generate-phase", "shrink-phase")


def read(path: Path) -> dict:
    """The record so far; a new one where there is none."""
    if path.exists():
        return json.loads(path.read_text())
    here = environment([])
    return {
        "command": "make properties",
        "commit": commit(),
        "versions": {**here["versions"], "hypothesis": hypothesis.__version__},
        "hardware": here["hardware"],
        "started": here["started"],
        "cases": 0,
        "failures": 0,
        "seconds": 0.0,
        "properties": {},
    }


def add(path: Path, name: str, phases: list, passed: bool, seconds: float) -> None:
    """Adds one property: its cases are the examples that fulfilled its assumptions."""
    record = read(path)
    found = Counter(case["status"] for phase in phases for case in phase["test-cases"])
    record["properties"][name] = {
        "cases": found["valid"] + found["interesting"],
        "discarded": found["invalid"] + found["overrun"],
        "passed": passed,
        "seconds": round(seconds, 1),
        "commit": commit(),
    }
    entries = record["properties"].values()
    record["cases"] = sum(entry["cases"] for entry in entries)
    record["failures"] = sum(not entry["passed"] for entry in entries)
    record["seconds"] = round(sum(entry["seconds"] for entry in entries), 1)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def commit() -> str | None:
    """The commit of the checkout, with a mark if files other than records differ from it; ``None`` outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)tests/properties/results"
        )
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def finished(path: Path) -> set[str]:
    """The properties that have passed."""
    return {name for name, entry in read(path)["properties"].items() if entry["passed"]} if path.exists() else set()
