"""Grids of runs: what is planned, what is done, and one command that does the rest.

Every run is a process of ``experiments.train`` with a directory of its own. Stopped at any moment, a grid goes on where it was.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments.config import LOCATIONS, TrainConfig, from_json
from experiments.grids.pace import Pace
from experiments.publish import without_locations
from experiments.run.directory import RunDirectory
from experiments.run.process import interpreter
from experiments.schema import check_result
from experiments.sealed import read_sealed, sealed, write_text

__all__ = ["SCALES", "TRAIN", "Grid", "GridError", "Places", "Run", "main", "publish", "state_of"]

SCALES = ("smoke", "cpu", "full")
TRAIN = (sys.executable, "-m", "experiments.train")


class GridError(ValueError):
    """A grid that cannot be run as asked for, with the remedy."""


class Run(NamedTuple):
    """One planned run."""

    name: str  # such as "vgg16/tdlrt/seed0": rows that differ in the last part only are one row of a table
    options: dict[str, Any]  # of experiments.train, those that differ from its defaults; no locations

    def config(self) -> dict[str, Any]:
        """All options of the run, as results store them.

        Raises:
          GridError: for an option that experiments.train does not know, or a value that cannot be.
        """
        unknown = sorted(self.options.keys() - TrainConfig().to_json().keys())
        if unknown:
            raise GridError(f"{self.name}: experiments.train has no option {', '.join(unknown)}")
        try:
            return _essential(from_json(self.options).to_json())
        except ValueError as error:
            raise GridError(f"{self.name}: {error}") from None

    @property
    def epochs(self) -> int:
        """How many the run has in all."""
        return from_json(self.options).epochs

    def flags(self) -> list[str]:
        """The options on a command line.

        Example:
          >>> Run("a", {"width": 0.25, "linear": False, "limit": None}).flags()
          ['--width', '0.25', '--no-linear']
        """
        words = []
        for name, value in self.options.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                words += [f"--{flag}", str(value)]
        return words


class Places(NamedTuple):
    """Where a grid's files are."""

    runs: Path  # directories and logs of runs, one scale's
    results: Path  # one JSON file a finished run, tables and figures

    def directory(self, run: Run) -> RunDirectory:
        """The run's directory."""
        return RunDirectory(self.runs / run.name)

    def log(self, run: Run) -> Path:
        """What the run prints."""
        return self.runs / f"{run.name}.log"

    def published(self, run: Run) -> Path:
        """The run's result."""
        return self.results / f"{run.name}.json"


class Grid(NamedTuple):
    """What an experiment consists of."""

    name: str  # of the experiment and its module: "table1"
    doc: str  # for --help
    plan: Callable[
        [str, int | None, str | None], list[Run]
    ]  # of scale, number of seeds, data set (None: as configured)
    render: Callable[[Path], list[Path]]  # writes tables and figures of a results directory into it


def _essential(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in LOCATIONS}


def state_of(run: Run, places: Places) -> str:
    """Where a run stands: ``"done"`` (published), ``"finished"`` (to be published), ``"cut off"`` or ``"open"``.

    Raises:
      GridError: if what is there was made with other options, or cannot be read; with the remedy.
    """
    published, directory = places.published(run), places.directory(run)
    if published.exists():
        try:
            result = read_sealed(published)
            check_result(result)
            stored = result["options"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GridError(f"{published} is no result ({type(error).__name__}: {error}): move it away") from None
        _check_same(run, stored, published, "--results")
        return "done"
    stored = directory.config()
    if stored is None:
        return "open"
    _check_same(run, stored["options"], directory.path, "--runs")
    return "cut off" if directory.result() is None else "finished"


def _check_same(run: Run, stored: dict[str, Any], where: Path, option: str) -> None:
    planned = run.config()
    stored = _essential({**TrainConfig().to_json(), **stored})  # options younger than the run had their defaults
    names = [name for name in sorted(planned.keys() | stored.keys()) if planned.get(name) != stored.get(name)]
    if names:
        listed = "\n".join(f"  {name}: {stored.get(name)} there, {planned.get(name)} planned" for name in names)
        raise GridError(
            f"{where} was made with other options than {run.name} has now:\n{listed}\n"
            f"Move it away to have the run made anew, or name another directory with {option}"
        )


def publish(run: Run, places: Places) -> dict[str, Any]:
    """Copies a finished run's result, less its locations, to the results directory, and returns it."""
    result = places.directory(run).result()
    assert result is not None
    result = without_locations(result)
    target = places.published(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, _a_line_an_entry(sealed(result)))
    return result


def _a_line_an_entry(result: dict[str, Any]) -> str:
    """JSON with a line for every entry and for every item of a list: small, and differences can be read."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in result.items()) + "\n}\n"


def main(grid: Grid, argv: Sequence[str] | None = None, *, command: Sequence[str] = TRAIN, poll: float = 0.3) -> int:
    """Runs what is missing of a grid, and writes its tables and figures.

    Args:
      grid: the experiment.
      argv: arguments without the program's name; default those of the process.
      command: what starts a run; the options of ``experiments.train`` follow it.
      poll: seconds between two looks at the runs.

    Returns:
      The exit code: 0 when all is done or the time given by ``--minutes`` is over, 1 if a run failed, 2 for options that cannot
      work, 130 and 143 when interrupted by SIGINT and SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(grid, argv, command, poll)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoints stay", file=sys.stderr)
        return 130


def _main(grid: Grid, argv: list[str], command: Sequence[str], poll: float) -> int:
    given = _parser(grid).parse_args(argv)
    for name in ("minutes", "jobs", "seeds"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            raise GridError(f"--{name} {value}: expected a number above 0")
    places = Places(given.runs / grid.name / given.scale, given.results or _results(grid, given.scale))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for name in ("only", "seeds", "dataset"):
        if given.render and getattr(given, name) is not None:
            raise GridError(
                f"--{name} {getattr(given, name)} with --render, which shows all results that there are: leave it out, or name "
                "other ones with --results"
            )
    if given.render:
        return _render(grid, places, console)
    planned = grid.plan(given.scale, given.seeds, given.dataset)
    chosen = [run for run in planned if given.only is None or fnmatch.fnmatch(run.name, given.only)]
    if not chosen:
        names = ", ".join(run.name for run in planned[:3])
        raise GridError(f"--only {given.only}: matches none of {len(planned)} runs ({names}, ...); see --list")
    states = _states(chosen, places)
    if given.list:
        for run in chosen:
            console.print(f"{states[run.name]:8}  {run.name}")
        return 0

    from experiments.grids.execution import execute

    # A run's data directory is relative to where it starts, which is here.
    locations = [] if given.data_dir is None else ["--data-dir", str(given.data_dir)]
    ended = execute(
        chosen,
        states,
        places,
        command=command,
        locations=locations,
        jobs=given.jobs,
        seconds=None if given.minutes is None else 60 * given.minutes,
        console=console,
        pace=_pace(chosen, places),
        poll=poll,
    )
    for name in ended.failed:
        console.print(f"failed: {name} (see {places.runs / name}.log)")
    if ended.left:
        again = shlex.join([interpreter(), "-m", f"experiments.{grid.name}", *argv])
        console.print(f"{ended.left} of {len(chosen)} runs left; continue with\n  {again}")
    elif any(places.published(run).exists() for run in chosen):
        _render(grid, places, console)
    if ended.signal_code:
        return ended.signal_code
    return 1 if ended.failed else 0


def _parser(grid: Grid) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{grid.name}",
        description=grid.doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="how large (default: %(default)s)")
    parser.add_argument("--only", metavar="PATTERN", help="only runs whose names match, such as 'vgg16/tdlrt*/seed0'")
    parser.add_argument("--seeds", type=int, metavar="N", help="so many seeds (default: as the scale says)")
    parser.add_argument("--dataset", help="another data set than the configured one, such as digits")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="directory of prepared tfds data sets")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many runs at a time (default: 1)")
    parser.add_argument("--minutes", type=float, metavar="M", help="save and stop after so many minutes")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="of runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="DIR", help=f"default: {_results(grid, 'SCALE')}")
    parser.add_argument("--list", action="store_true", help="say what is done, cut off and open, and stop")
    parser.add_argument("--render", action="store_true", help="only write tables and figures of the results there are")
    return parser


def _results(grid: Grid, scale: str) -> Path:
    return Path("experiments") / "results" / grid.name / scale


def _states(runs: Iterable[Run], places: Places) -> dict[str, str]:
    """Where all runs stand.

    Raises:
      GridError: with what is wrong with any of them.
    """
    states, problems = {}, []
    for run in runs:
        try:
            states[run.name] = state_of(run, places)
        except ValueError as error:  # one of RunDirectory's too
            problems.append(str(error))
    if problems:
        shown = "\n".join(problems[:3])
        more = f"\nand {len(problems) - 3} more" if len(problems) > 3 else ""
        raise GridError(f"{shown}{more}\nNothing was changed")
    return states


def _pace(runs: Iterable[Run], places: Places) -> Pace:
    """What the runs that there are tell about time."""
    pace = Pace()
    for run in runs:
        if places.published(run).exists():
            result = read_sealed(places.published(run))
            pace.learn(run.name, result.get("hardware"), result["epochs"])
        elif (stored := places.directory(run).config()) is not None:
            pace.learn(run.name, stored.get("hardware"), places.directory(run).history())
    return pace


def _render(grid: Grid, places: Places, console: Console) -> int:
    for path in grid.render(places.results):
        console.print(f"wrote {path}")
    return 0
