"""Looks at runs: ``python -m experiments.show RUN [RUN ...]``.

A run is a directory of ``experiments.train``, finished or not, or a result file of one (``experiments/results``).
Prints its layers, its epochs and the ranks over them, and draws plots; of several runs, a comparison too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.options import PruningConfig
from experiments.results_table import asked, is_adaptive, method_name
from experiments.run import plots
from experiments.run.directory import RunDirectory, RunDirectoryError, distinct_names
from experiments.run.display import history_table, layer_table, rank_table
from experiments.run.metrics import Layer, totals
from experiments.schema import check_layer, check_links, check_records, check_result
from experiments.sealed import read_sealed

__all__ = ["Run", "comparison_table", "load", "main", "show"]


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of a run."""

    name: str
    source: Path
    options: Mapping[str, Any]  # empty if they cannot be read
    history: list[dict[str, Any]]  # a record an epoch
    layers: list[Layer] | None  # of a finished run
    notes: tuple[str, ...]  # what is missing or damaged

    @property
    def plots(self) -> Path:
        """Where its plots go by default: into its own directory; for a result file under ``runs/``."""
        return self.source / "plots" if self.source.is_dir() else Path("runs") / "plots" / self.name


class NoRunError(ValueError):
    """A path that is no run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Shows the runs of a command line.

    Args:
      argv: arguments without the program's name; default those of the process.

    Returns:
      The exit code: 0, or 2 if a path is no run.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.show", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run directory, or a result file (*.json)")
    parser.add_argument("--output", type=Path, help="where to put plots; default RUN/plots, for files runs/plots/NAME")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file has no width
    try:
        runs = _with_distinct_names([load(path) for path in arguments.runs])
    except NoRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        directory = None if arguments.no_plots else run.plots
        if directory is not None and arguments.output is not None:
            directory = arguments.output / run.name if len(runs) > 1 else arguments.output
        try:
            show(run, console, directory)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            print(f"error: {run.source} cannot be shown: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            return _not_drawn(directory, error)
    if len(runs) > 1:
        console.print(comparison_table(runs))
        histories = {run.name: run.history for run in runs if run.history}
        if not arguments.no_plots and histories:
            directory = arguments.output or Path("runs") / "plots"
            try:
                paths = plots.save_figure(plots.plot_comparison(histories), directory, "comparison")
            except OSError as error:
                return _not_drawn(directory, error)
            _say(console, f"comparison: {paths[0]}, {paths[1].name}")
    return 0


def _not_drawn(directory: Path | None, error: OSError) -> int:
    print(
        f"error: plots cannot be written to {directory} ({error.strerror}): name another directory with --output, or leave them "
        "out with --no-plots",
        file=sys.stderr,
    )
    return 2


def load(path: Path) -> Run:
    """Reads what there is of a run.

    Args:
      path: a run directory or a result file.

    Returns:
      The run; its notes say what is missing.

    Raises:
      NoRunError: if there is nothing of a run.
    """
    if path.is_dir():
        try:
            check_links(path)
        except ValueError as error:
            raise NoRunError(str(error)) from None
        return _load_directory(path)
    if not path.exists():
        raise NoRunError(f"{path} does not exist: give a run directory of experiments.train or a result file (*.json)")
    try:
        result = read_sealed(path)
        check_result(result)
        history = _records(result["epochs"])
        options, name = dict(result["options"]), path.stem
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise NoRunError(f"{path} is not a result of experiments.train: {type(error).__name__}: {error}") from None
    layers, notes = _layers(result)
    return Run(name, path, options, history, layers, tuple(notes))


def _load_directory(path: Path) -> Run:
    directory, notes = RunDirectory(path), list[str]()
    if not any((path / name).is_file() for name in ("config.json", "metrics.jsonl", "result.json")):
        several = len(list(path.glob("*.json")))
        hint = f"; name its result files, {path / '*.json'}" if several else ""
        raise NoRunError(f"{path} is not the directory of a run (no config.json){hint}")
    stored: dict[str, dict[str, Any]] = {}
    for part in ("config", "result"):
        try:
            stored[part] = getattr(directory, part)() or {}
        except RunDirectoryError as error:
            notes.append(str(error))
            stored[part] = {}
    config, result = stored["config"], stored["result"]
    if not (path / "config.json").is_file():
        notes.append("config.json is missing: its options are not known")
    history = _history(directory, notes)
    if not history and result:
        try:
            history = _records(result["epochs"])
        except (ValueError, TypeError, KeyError) as error:
            notes.append(f"the epochs of result.json cannot be read: {type(error).__name__}: {error}")
    options = config.get("options") or result.get("options") or {}
    layers = None
    if result:
        layers, more = _layers(result)
        notes += more
    else:
        notes.append(
            f"not finished: {len(history)} of {_epochs(options)} epochs are done; shapes of the layers come with its end"
        )
    if not history:
        notes.append("no epoch is complete: nothing to tabulate or draw")
    return Run(path.resolve().name, path, options, history, layers, tuple(notes))


def _history(directory: RunDirectory, notes: list[str]) -> list[dict[str, Any]]:
    """The epochs that can be read, from the first on."""
    path = directory.path / "metrics.jsonl"
    if not path.is_file():
        notes.append("metrics.jsonl is missing")
        return []
    try:
        history = _records(directory.history())
        lines = len(path.read_text().splitlines())
    except (ValueError, TypeError, KeyError) as error:
        notes.append(f"metrics.jsonl cannot be read: {type(error).__name__}: {error}")
        return []
    if lines > len(history):
        notes.append(f"metrics.jsonl is damaged: line {len(history) + 1} of {lines} and all after it are left out")
    return history


def _records(records: Any) -> list[dict[str, Any]]:
    """Records as they are, if they are some."""
    records = list(records)
    for record in records:
        if not isinstance(record["epoch"], int):
            raise ValueError(f"an epoch is numbered {record['epoch']!r}")
    check_records(records, "epochs")
    return records


def _layers(result: Mapping[str, Any]) -> tuple[list[Layer] | None, list[str]]:
    """The layers of a result, and a note if there are none."""
    try:
        stored = result["layers"]
        layers = [
            Layer(
                entry["name"],
                entry["kind"],
                tuple(entry["shape"]),
                None if entry["rank"] is None else tuple(entry["rank"]),
                entry["parameters"],
                entry["full"],
            )
            for entry in stored
        ]
        for entry in stored:
            check_layer(entry)
        return layers, []
    except (KeyError, TypeError, ValueError) as error:
        return None, [f"its layers cannot be read: {type(error).__name__}: {error}"]


def show(run: Run, console: Console, directory: Path | None) -> None:
    """Prints a run's tables and draws its plots.

    Args:
      run: the run.
      console: where to print.
      directory: for the plots; ``None`` for none.
    """
    console.rule(f"[bold]{escape(run.name)}", align="left")
    _say(console, _describe(run.options))
    for note in run.notes:
        _say(console, f"note: {note}")
    if run.layers:
        console.print(layer_table(run.layers, totals(run.layers)))
    if run.history:
        console.print(history_table(run.history))
        if any(record.get("ranks") for record in run.history):
            console.print(rank_table(run.history))
    if directory is None or not run.history:
        return
    figures = {
        "learning": plots.plot_learning(run.history),
        "ranks": plots.plot_ranks(run.history),
        "compression": plots.plot_compression(run.history),
        "truncation": plots.plot_truncation(run.history),
        "seconds": plots.plot_seconds(run.history),
    }
    drawn = [name for name, figure in figures.items() if figure is not None]
    for name, figure in figures.items():
        if figure is not None:
            plots.save_figure(figure, directory, name)
    _say(console, f"plots in {directory}: {', '.join(drawn)} (.png and .svg)")


def comparison_table(runs: Sequence[Run]) -> Table:
    """Where each of several runs stands after its last epoch."""
    table = Table(title="Comparison, after the last epoch of each", title_justify="left")
    table.add_column("run")
    headers = ("model", "method", "τ", "seed", "epochs", "test", "c.r. all", "c.r. conv.", "weights", "s/epoch")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for run in runs:
        last, options = run.history[-1] if run.history else {}, run.options
        seconds = [record["seconds"] for record in run.history if "seconds" in record]
        cells = [
            options.get("model"),
            method_name(options),
            asked(options),
            options.get("seed"),
            f"{len(run.history)}/{_epochs(options)}",
            _percent(last.get("test_accuracy"), 2),
            _percent(last.get("compression_all"), 1),
            _percent(last.get("compression_conv"), 1),
            f"{last['weights']:,}" if "weights" in last else None,
            f"{sum(seconds) / len(seconds):.1f}" if seconds else None,
        ]
        table.add_row(escape(run.name), *("-" if cell is None else escape(str(cell)) for cell in cells))
    return table


def _with_distinct_names(runs: list[Run]) -> list[Run]:
    """Runs of one name, told apart by their paths."""
    names = distinct_names([run.source for run in runs])
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names)]


def _describe(options: Mapping[str, Any]) -> str:
    """The options that tell runs apart, in a line."""
    if not options:
        return "options are not known"
    threshold = "tau" if options.get("budget") is None else "budget"
    names = ["integrator", threshold, "spare", "criterion", "rank", "max_rank"] if is_adaptive(options) else []
    names += ["compression", "width", "optimizer", "learning_rate", "batch_size", "epochs", "seed"]
    words = [f"{name} {options[name]}" for name in names if options.get(name) is not None]
    start = f"{options.get('model', '?')} ({options.get('method', '?')}) on {options.get('dataset', '?')}"
    return f"{start}: {', '.join(words)}"


def _epochs(options: Mapping[str, Any]) -> int | str:
    """Epochs in all, if the options say."""
    epochs, rounds = options.get("epochs"), options.get("rounds", PruningConfig().rounds)
    if not isinstance(epochs, int) or not isinstance(rounds, int):
        return "?"
    return epochs * (rounds + 1 if options.get("method") == "imp" else 1)


def _percent(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{100 * value:.{digits}f}%"


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
