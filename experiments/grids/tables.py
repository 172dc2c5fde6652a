"""Tables of grids of runs, from their JSON results alone: means and deviations over seeds, costs, and where they are from."""

from __future__ import annotations

import statistics
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import table
from experiments.config import LOCATIONS, TrainConfig
from experiments.schema import check_result
from experiments.sealed import read_sealed

__all__ = [
    "Costs",
    "Sources",
    "Statistic",
    "costs",
    "final",
    "latex_table",
    "options_of",
    "read_results",
    "shrunk",
    "table",
]

Results = Sequence[Mapping[str, Any]]  # one a seed, of one configuration

_MIB = 2**20
_NONE = "—"


class Statistic(NamedTuple):
    """Mean and deviation over seeds."""

    mean: float
    deviation: float | None  # of a sample; None of a single value
    number: int  # of values

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Of one value or more."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def text(self, digits: int = 2, *, of: int | None = None) -> str:
        """``mean ± deviation``; with the number of values if it is not ``of``.

        Example:
          >>> Statistic.of([89.0, 90.0]).text(1), Statistic.of([89.0]).text(of=3)
          ('89.5 ± 0.7', '89.00 (n=1)')
        """
        deviation = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{deviation}" + ("" if of in (None, self.number) else f" (n={self.number})")


def read_results(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The results under a directory, by their path less the seed's file: ``{"vgg16/tdlrt": [seed 0, seed 1, ...]}``.

    Raises:
      ValueError: if there is none, if a file is no result, or if results of one row differ in more than the seed; with the name.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(directory.rglob("*/*.json")):
        try:
            result = read_sealed(path)
            check_result(result)
            result["final"]["test_accuracy"], result["epochs"][-1], result["options"]["seed"]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is no result of experiments.train ({error!r}): move it away") from None
        group = groups.setdefault(path.parent.relative_to(directory).as_posix(), [])
        if group and _apart_from_seed(group[0]) != _apart_from_seed(result):
            raise ValueError(f"{path} has other options than the results beside it: move away what is old")
        group.append(result)
    if not groups:
        raise ValueError(f"{directory} holds no results yet: run this without --render first")
    return {name: sorted(group, key=lambda result: result["options"]["seed"]) for name, group in groups.items()}


def options_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a result, those younger than it with their defaults, without locations."""
    options = {**TrainConfig().to_json(), **result["options"]}
    return {name: value for name, value in options.items() if name not in LOCATIONS}


def _apart_from_seed(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options_of(result).items() if name != "seed"}


def final(results: Results, field: str, *, factor: float = 100.0) -> Statistic | None:
    """A number after the last epoch, in percent; ``None`` where results do not have it.

    Nothing is chosen by it: not the epoch, not the run.
    """
    values = [result["final"].get(field) for result in results]
    return None if None in values or not values else Statistic.of([factor * value for value in values])


class Costs(NamedTuple):
    """What runs of one configuration took; the mean over seeds, ``None`` where it was not recorded."""

    step: float  # seconds, the median over epochs, without compiling
    training: float  # seconds of all epochs, without compiling and evaluating
    compiling: float  # seconds
    peak: float | None  # MiB of a step, of the epoch where it is largest, without the data set
    last_peak: float | None  # of the last epoch
    state: float | None  # MiB of parameters and optimizer at the end


def costs(results: Results) -> Costs:
    """Time and memory, from the epochs' records."""
    columns: list[list[float | None]] = [[] for _ in Costs._fields]
    for result in results:
        steps = result["images"]["train"] // result["options"]["batch_size"]
        epochs = result["epochs"]
        compiling = [record.get("compile_seconds", 0.0) for record in epochs]
        seconds = [record["seconds"] - compiled for record, compiled in zip(epochs, compiling)]
        peaks = [_peak(record) for record in epochs]
        known = [peak for peak in peaks if peak is not None]
        state = epochs[-1].get("state_bytes")
        values = [
            statistics.median(seconds) / steps,
            sum(seconds),
            sum(compiling),
            max(known, default=None),
            peaks[-1],
            None if state is None else state / _MIB,
        ]
        for column, value in zip(columns, values):
            column.append(value)
    return Costs(*[None if None in column else statistics.fmean(column) for column in columns])  # type: ignore[arg-type]


def _peak(record: Mapping[str, Any]) -> float | None:
    memory, state = record.get("step_memory") or {}, record.get("state_bytes")
    if state is None or not {"peak", "arguments"} <= memory.keys():
        return None
    # A step's arguments hold the whole data set beside the state; it is the same for all methods and left out.
    return (memory["peak"] - memory["arguments"] + state) / _MIB


class Sources:
    """Hardware and commits, as letters that a table refers to."""

    def __init__(self) -> None:
        self._letters: dict[tuple[str, str, str], str] = {}

    def of(self, results: Iterable[Mapping[str, Any]]) -> str:
        """The letters of where results are from, all stretches of their runs."""
        letters: list[str] = []
        for place in [place for result in results for place in (result, *result.get("continued", []))]:
            jax = (place.get("versions") or {}).get("jax", "?")
            commit, _, changed = (place.get("commit") or "").partition(" ")
            commit = f"commit {commit[:12]} {changed}".strip() if commit else "no commit"
            key = (place.get("hardware") or "unknown hardware", commit, jax)
            letter = self._letters.setdefault(key, _letters(len(self._letters)))
            if letter not in letters:
                letters.append(letter)
        return ", ".join(letters)

    def text(self) -> str:
        """A list of what the letters mean."""
        return "\n".join(
            f"- {letter}: {hardware}; {commit}, jax {jax}" for (hardware, commit, jax), letter in self._letters.items()
        )


def _letters(number: int) -> str:
    """A name of letters: ``"a"`` to ``"z"``, then ``"aa"``, ``"ab"``, ..."""
    before, last = divmod(number, 26)
    return (_letters(before - 1) if before else "") + string.ascii_lowercase[last]


def shrunk(rows: Mapping[tuple[str, str], tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """A sentence about what results have other than the experiment's protocol, from all of their options but the seed.

    Args:
      rows: by method and network, the options of a result, and those that the protocol asks for at full scale; what neither it
        names is asked for as is the default.

    Example:
      >>> asked = {"width": 1.0, "limit": None}
      >>> shrunk({
      ...     ("TDLRT", "VGG16"): ({"width": 0.25, "limit": 10, "gain": 0.25}, asked),
      ...     ("TDLRT", "ResNet18"): ({"width": 0.125, "limit": 10, "gain": 0.25}, asked),
      ...     ("SNIP", "ResNet18"): ({"width": 0.125, "limit": 10}, asked),
      ... })
      'Other than the protocol: limit 10 instead of none; gain 0.25 instead of 1.0 (TDLRT); width 0.125 instead of 1.0 (ResNet18);
      width 0.25 instead of 1.0 (VGG16).'
    """
    defaults = {name: value for name, value in TrainConfig().to_json().items() if name != "seed"}
    where: dict[str, list[tuple[str, str]]] = {}
    for place, (options, protocol) in rows.items():
        planned = {**{name: defaults[name] for name in options if name in defaults}, **protocol}
        for name in [*protocol, *[name for name in planned if name not in protocol]]:
            if options.get(name) != planned[name]:
                where.setdefault(f"{name} {_word(options.get(name))} instead of {_word(planned[name])}", []).append(
                    place
                )
    together: dict[str, list[str]] = {}
    for found, places in sorted(where.items(), key=lambda item: -len(item[1])):
        together.setdefault(_places(places, list(rows)), []).append(found)
    if not together:
        return "All as the protocol says."
    parts = [", ".join(found) + (f" ({places})" if places else "") for places, found in together.items()]
    return f"Other than the protocol: {'; '.join(parts)}."


def _places(some: Sequence[tuple[str, str]], rows: Sequence[tuple[str, str]]) -> str:
    """Rows in few words: whole networks, or methods on all networks, by their names alone."""
    if len(some) == len(rows):
        return ""
    methods, networks = (list(dict.fromkeys(row[part] for row in some)) for part in (0, 1))
    if all(row in some for row in rows if row[0] in methods):
        return ", ".join(methods)
    whole = [network for network in networks if all(row in some for row in rows if row[1] == network)]
    words = [", ".join(whole)] if whole else []
    rest: dict[tuple[str, ...], list[str]] = {}  # networks by methods
    for network in networks:
        if network not in whole:
            rest.setdefault(tuple(method for method, of in some if of == network), []).append(network)
    return "; ".join(words + [f"{', '.join(of)} on {', '.join(where)}" for of, where in rest.items()])


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def latex_table(groups: Sequence[tuple[str, Sequence[str]]], rows: Sequence[Sequence[str]]) -> str:
    """A LaTeX ``tabular`` for the package booktabs.

    Args:
      groups: title and column titles of each group of columns; the first column, before all groups, has no title.
      rows: cells as in a Markdown table.

    Example:
      >>> print(latex_table([("VGG16", ["acc. [%]"])], [["TDLRT", "89.6 ± 0.1"]]))
      \\begin{tabular}{lr}
      \\toprule
       & VGG16 \\\\
      \\cmidrule(lr){2-2}
       & acc. [\\%] \\\\
      \\midrule
      TDLRT & 89.6 $\\pm$ 0.1 \\\\
      \\bottomrule
      \\end{tabular}
    """
    count = sum(len(columns) for _, columns in groups)
    titles, rules, start = [""], [], 2
    for title, columns in groups:
        titles.append(f"\\multicolumn{{{len(columns)}}}{{c}}{{{_latex(title)}}}" if len(columns) > 1 else _latex(title))
        rules.append(f"\\cmidrule(lr){{{start}-{start + len(columns) - 1}}}")
        start += len(columns)
    lines = [
        f"\\begin{{tabular}}{{l{'r' * count}}}",
        "\\toprule",
        " & ".join(titles) + " \\\\",
        "".join(rules),
        " & ".join(["", *[_latex(column) for _, columns in groups for column in columns]]) + " \\\\",
        "\\midrule",
        *[" & ".join(map(_latex, row)) + " \\\\" for row in rows],
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines)


def _latex(text: str) -> str:
    for character, replacement in {
        "%": "\\%",
        "&": "\\&",
        "_": "\\_",
        "±": "$\\pm$",
        _NONE: "--",
        "τ": "$\\tau$",
    }.items():
        text = text.replace(character, replacement)
    return text
