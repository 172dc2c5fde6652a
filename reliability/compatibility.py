"""The tests on the oldest and the newest supported versions: ``python -m reliability.compatibility`` (``make compatibility``).

For every Python there is an environment with the oldest versions that ``pyproject.toml`` allows, one with the newest there are,
or both; the tests run in each as they are, and in the first and the last of them also with x64 on, and with flax's graph mode off
and on (those tests that use flax). What is done at this commit is not done again, so an interrupted command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments.sealed import read_sealed, write_sealed
from reliability.report import machine

__all__ = ["ENVIRONMENTS", "SELECTIONS", "SETTINGS", "Environment", "constraints", "main"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "numpy", "tensorflow-datasets")


class Environment(NamedTuple):
    """A Python, and which of the supported versions of everything else."""

    python: str  # "3.12"
    versions: str  # "oldest" or "newest"

    @property
    def name(self) -> str:
        """As in results."""
        return f"python{self.python}-{self.versions}"


ENVIRONMENTS = (
    Environment("3.11", "oldest"),
    Environment("3.11", "newest"),
    Environment("3.12", "newest"),
    Environment("3.13", "newest"),
)

# What is set beside the defaults. Graph mode is flax's flag for references among modules, to be off by default one day.
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "x64": {"JAX_ENABLE_X64": "1"},
    "no-graph-mode": {"FLAX_NNX_GRAPH_MODE": "0", "FLAX_NNX_GRAPH_UPDATES": "0"},
    "graph-mode": {"FLAX_NNX_GRAPH_MODE": "1", "FLAX_NNX_GRAPH_UPDATES": "1"},
}
EXTREMES = (ENVIRONMENTS[0], ENVIRONMENTS[-1])  # where these are set
JOB = ["tests/experiments/test_job.py", "tests/experiments/test_programs.py"]
FLAX = ["tests/nn", "tests/models", "tests/test_checkpoint.py", "tests/test_export.py", *JOB]

# All tests; and those of everything that touches another library: transformations, modules, checkpoints, export, the main job.
SELECTIONS: dict[str, list[str]] = {
    "all": [],
    "interfaces": [
        *("tests/test_step.py", "tests/test_optimizer.py", "tests/conv", "tests/test_capacity.py"),
        *(
            "tests/test_checkpoint.py",
            "tests/test_checkpoint_process.py",
            "tests/test_export.py",
            "tests/test_guards.py",
        ),
        *("tests/nn", "tests/models", *JOB),
    ],
}


def constraints(versions: str) -> list[str]:
    """What pip is held to: for ``"oldest"`` the lower bounds of ``pyproject.toml``, for ``"newest"`` nothing."""
    if versions == "newest":
        return []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = (re.match(r"([a-z_-]+)>=([0-9.]+)", requirement) for requirement in project["dependencies"])
    lowest = {found[1]: found[2] for found in bounds if found}
    pins = [f"{name}=={lowest[name]}" for name in ("jax", "flax", "optax", "chex", "orbax-checkpoint")]
    return [*pins, f"jaxlib=={lowest['jax']}"]


def interpreter(version: str) -> str | None:
    """A Python of this version: on the path, or one that pyenv installed."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}"), *sorted(root.glob(f"versions/{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        command = [str(candidate), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode == 0 and found.stdout.strip() == version:
            return str(candidate)
    return None


def prepare(environment: Environment, directory: Path, console: Console) -> Path:
    """Makes an environment, or brings it up to date; returns its Python.

    Raises:
      RuntimeError: without such a Python, or where pip fails; with what it said.
    """
    python = directory / environment.name / "bin" / "python"
    if not python.exists():
        found = interpreter(environment.python)
        if found is None:
            raise RuntimeError(f"there is no Python {environment.python}: install it, or leave it out with --only")
        subprocess.run([found, "-m", "venv", str(python.parents[1])], check=True)
    console.print(f"{environment.name}: installing")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints(environment.versions)) + "\n")
        file.flush()
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
        command += ["--upgrade-strategy", "eager", "--constraint", file.name, "--editable", f"{ROOT}[dev]"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{environment.name}: pip failed:\n{done.stderr[-3000:]}")
    return python


def versions_of(python: Path) -> dict[str, str]:
    """The versions that an environment has."""
    code = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({'python': platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))"
    )
    command = [str(python), "-c", code, *PACKAGES]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def run_tests(python: Path, variables: dict[str, str], paths: list[str], parallel: int, log: Path) -> dict[str, Any]:
    """Runs the tests; numbers of those that passed, failed and were skipped, names of failures, and seconds.

    Programs are kept beside the log, since another Python, or other flags of flax, compile the same ones again.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [
            str(python),
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            "--durations=25",
            *paths,
        ]
        if parallel > 1:
            command += ["-n", str(parallel), "--dist", "loadfile"]
        kept = {"JAX_COMPILATION_CACHE_DIR": str(log.parent.resolve() / "programs")}
        kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **kept, **variables}
        with log.open("w") as file:
            code = subprocess.run(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT).returncode
        if not report.exists():
            raise RuntimeError(f"pytest ended with {code} and without a report: see {log}")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 1),
    }


def cells_of(selection: str) -> Iterator[tuple[Environment, str, list[str]]]:
    """What there is to run: an environment, the name of a setting, and paths of tests (none: all)."""
    for environment in ENVIRONMENTS:
        for setting in SETTINGS if environment in EXTREMES else ("default",):
            yield environment, setting, FLAX if setting.endswith("graph-mode") else SELECTIONS[selection]


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, prints a table's lines as they come, and returns 1 if a test failed anywhere."""
    parser = argparse.ArgumentParser(prog="python -m reliability.compatibility", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tests", choices=sorted(SELECTIONS), default="all", help="default: %(default)s")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only cells with this in their name, such as 3.12 or x64"
    )
    parser.add_argument(
        "--parallel", type=int, default=2, metavar="N", help="processes of pytest (default: %(default)s)"
    )
    parser.add_argument("--environments", type=Path, default=Path(".venv-compatibility"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("reliability/results/compatibility.json"), metavar="FILE")
    given = parser.parse_args(argv)
    console, failed = Console(highlight=False), False
    described = machine(["reliability.compatibility", *(sys.argv[1:] if argv is None else argv)])
    cells: dict[str, Any] = read_sealed(given.output)["cells"] if given.output.exists() else {}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    pythons: dict[str, Path] = {}
    for environment, setting, paths in cells_of(given.tests):
        name = f"{environment.name}/{setting}"
        if given.only not in name:
            continue
        done = cells.get(name, {})
        if (done.get("commit"), done.get("paths")) != (described["commit"], paths):
            try:
                if environment.name not in pythons:
                    pythons[environment.name] = prepare(environment, given.environments, console)
                python = pythons[environment.name]
                log = given.environments / f"{name.replace('/', '-')}.log"
                found = run_tests(python, SETTINGS[setting], paths, given.parallel, log)
            except RuntimeError as error:
                console.print(f"error: {error}")
                return 2
            done = {"commit": described["commit"], "paths": paths, **found, "versions": versions_of(python)}
            cells[name] = {**done, "hardware": described["hardware"], "variables": SETTINGS[setting]}
            write_sealed(given.output, {"cells": cells})
        jax = done["versions"]["jax"]
        console.print(
            f"{name} (jax {jax}): {done['passed']} passed, {done['failed']} failed, {done['skipped']} skipped, "
            f"{done['seconds']:.0f} s"
        )
        for failure in done["failures"]:
            console.print(f"  {failure}", soft_wrap=True)
        failed |= bool(done["failed"]) or done["exit_code"] != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
