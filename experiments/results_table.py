"""Committed results as a Markdown table: ``python -m experiments.results_table experiments/results/mnist_lenet5``.

It takes files, and directories of them. The best come first; runs that differ in nothing but the seed are one row, with mean and
standard deviation.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.grids.tables import costs, final, options_of, table
from experiments.methods import METHODS
from experiments.schema import check_result
from experiments.sealed import read_sealed

__all__ = ["asked", "is_adaptive", "markdown", "method_name", "rows"]

# What accuracies are titled; those of the test images alone are shown where not all runs have validation images.
ACCURACIES = {"train": "training accuracy [%]", "validation": "validation [%]", "test": "test accuracy [%]"}


def rows(*paths: Path) -> list[dict[str, Any]]:
    """One row a configuration, by descending test accuracy; accuracies and compressions in percent, weights in all.

    Args:
      *paths: of results, or of directories, of which every ``*.json`` is one.

    Raises:
      ValueError: if there is no result, or a file is none, naming it.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in _files(paths):
        try:
            result = read_sealed(path)
            check_result(result)
            options = {key: value for key, value in options_of(result).items() if key != "seed"}
            result["final"]["test_accuracy"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of experiments.train: {error!r}") from None
        groups[json.dumps(options, sort_keys=True)].append(result)
    found = []
    for key, results in groups.items():
        options = json.loads(key)
        found.append(
            {
                "options": options,
                "method": method_name(options),
                "tau": asked(options),
                "epochs": len(results[0]["epochs"]) or options["epochs"],
                "seeds": sorted(result["seed"] for result in results),
                **{name: final(results, f"{name}_accuracy") for name in ACCURACIES},
                "all": final(results, "compression_all"),
                "convolutions": final(results, "compression_conv"),
                "weights": final(results, "weights", factor=1.0),
                "hardware": results[0]["hardware"],
                **_costs(results),
            }
        )
    return sorted(found, key=lambda row: -row["test"].mean)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path} holds no *.json results")
        yield from files


def is_adaptive(options: Mapping[str, Any]) -> bool:
    """Whether a run's method adapts ranks."""
    method = METHODS.get(str(options.get("method")))
    return method is not None and method.adaptive


def method_name(options: Mapping[str, Any]) -> str | None:
    """A run's method, its integrator if it has one, how often that adapts, and how kernels start where that is special.

    Example:
      >>> method_name({"method": "cp"}), method_name({"method": "tdlrt", "integrator": "bug", "adapt_every": 10})
      ('cp', 'bug every 10 steps')
      >>> method_name({"method": "tucker", "initialization": "normalized", "least_rank": 3})
      'tucker (normalized, least rank 3)'
      >>> method_name({"method": "dense", "gain": 0.25})
      'dense (gain 0.25)'
    """
    words = [str(options["method"])] if options.get("method") not in (None, "tdlrt") else []
    if is_adaptive(options) and "integrator" in options:
        words.append(str(options["integrator"]))
        if options.get("adapt_every", 1) > 1:
            parts = [part for part in ("cores", "bases") if options.get(f"{part}_between")]
            between = f", {parts[0]} between" if parts else ""
            words.append(f"every {options['adapt_every']} steps{between}")
        if options.get("keep_momentum"):
            words.append("with momentum")
    start = ["normalized"] if options.get("initialization") == "normalized" else []
    start += [f"least rank {options['least_rank']}"] if options.get("least_rank", 1) > 1 else []
    start += [f"gain {options['gain']:g}"] if options.get("gain", 1) != 1 else []
    start += ["small windows"] if options.get("windows") == "small" else []
    if words and start:
        words.append(f"({', '.join(start)})")
    return " ".join(words) or None


def asked(options: Mapping[str, Any]) -> float | str | None:
    """The tolerance, the budget or the compression that a run was given; None for one without."""
    if options.get("compression") is not None:
        return f"compression {options['compression']:.0%}"
    if not is_adaptive(options):
        return None
    return options.get("tau") if options.get("budget") is None else f"budget {options['budget']:.0%}"


def _costs(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Time and memory, of results that record them: a step's median over the epochs, without compiling; MiB at the end."""
    if not all(result["epochs"] and all("step_memory" in record for record in result["epochs"]) for result in results):
        return {}
    found = costs(results)
    return {"seconds": found.step, "peak": found.last_peak, "state": found.state}


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, with the columns that all of them have."""
    held_out = all(row["validation"] is not None for row in found)
    accuracies = list(ACCURACIES) if held_out else ["test"]
    header = ["method", "τ", "epochs", "seeds", *[ACCURACIES[name] for name in accuracies]]
    header += ["compression, all weights [%]", "convolutions [%]"]
    with_costs = all("seconds" in row for row in found)
    if with_costs:
        header += ["s / step", "peak of a step [MiB]", "parameters and optimizer [MiB]"]
    lines = []
    for row in found:
        cells = [
            row["method"],
            "" if row["tau"] is None else row["tau"],
            row["epochs"],
            ", ".join(map(str, row["seeds"])),
        ]
        cells += [row[name].text() for name in accuracies] + [row[name].text(1) for name in ("all", "convolutions")]
        if with_costs:
            cells += [f"{row['seconds']:.3f}", f"{row['peak']:.0f}", f"{row['state']:.1f}"]
        lines.append([str(cell) for cell in cells])
    return table(header, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of a command line's paths."""
    parser = argparse.ArgumentParser(prog="python -m experiments.results_table", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="results, and directories of results")
    given = parser.parse_args(argv)
    try:
        print(markdown(rows(*given.paths)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
