"""Committed results as a Markdown table: ``python -m experiments.results_table experiments/results/mnist_lenet5``.

Runs that differ in nothing but the seed are one row: mean and standard deviation over the seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.grids.tables import costs
from experiments.methods import METHODS
from experiments.schema import check_result
from experiments.sealed import read_sealed

__all__ = ["asked", "is_adaptive", "markdown", "method_name", "rows"]

# What may differ between the runs of one row.
RUN_ONLY = ("seed", "run_dir", "resume", "data_dir", "cache_dir")


def rows(directory: Path) -> list[dict[str, Any]]:
    """One row a configuration, from every ``*.json`` in the directory; accuracies and compressions in percent.

    Raises:
      ValueError: if there is no result, or a file is none, naming it.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(directory.glob("*.json")):
        try:
            result = read_sealed(path)
            check_result(result)
            options = {key: value for key, value in result["options"].items() if key not in RUN_ONLY}
            result["final"]["test_accuracy"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of experiments.train: {error!r}") from None
        groups[json.dumps(options, sort_keys=True)].append(result)
    if not groups:
        raise ValueError(f"{directory} holds no *.json results")
    table = []
    for key, results in groups.items():
        options = json.loads(key)
        finals = [result["final"] for result in results]
        table.append(
            {
                "method": method_name(options),
                "tau": asked(options),
                "epochs": options["epochs"],
                "seeds": sorted(result["seed"] for result in results),
                "accuracy": _mean_and_deviation([100 * final["test_accuracy"] for final in finals]),
                "all": _mean_and_deviation([100 * final["compression_all"] for final in finals]),
                "convolutions": _mean_and_deviation([100 * final["compression_conv"] for final in finals]),
                "hardware": results[0]["hardware"],
                **_costs(results),
            }
        )
    return sorted(table, key=lambda row: (str(row["method"]), str(row["tau"])))


def is_adaptive(options: Mapping[str, Any]) -> bool:
    """Whether a run's method adapts ranks."""
    method = METHODS.get(str(options.get("method")))
    return method is not None and method.adaptive


def method_name(options: Mapping[str, Any]) -> str | None:
    """A run's method, its integrator if it has one and how often that adapts: ``"cp"``, ``"bug"``, ``"bug every 10 steps"``."""
    words = [str(options["method"])] if options.get("method") not in (None, "tdlrt") else []
    if is_adaptive(options) and "integrator" in options:
        words.append(str(options["integrator"]))
        if options.get("adapt_every", 1) > 1:
            parts = [part for part in ("cores", "bases") if options.get(f"{part}_between")]
            between = f", {parts[0]} between" if parts else ""
            words.append(f"every {options['adapt_every']} steps{between}")
        if options.get("keep_momentum"):
            words.append("with momentum")
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
    if not all("step_memory" in record for result in results for record in result["epochs"]):
        return {}
    found = costs(results)
    return {"seconds": found.step, "peak": found.last_peak, "state": found.state}


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(table: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    header = ["method", "τ", "epochs", "seeds", "test accuracy [%]", "compression, all weights [%]", "convolutions [%]"]
    costs = all("seconds" in row for row in table)
    if costs:
        header += ["s / step", "peak of a step [MiB]", "parameters and optimizer [MiB]"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in table:
        cells = [
            row["method"],
            "" if row["tau"] is None else row["tau"],
            row["epochs"],
            ", ".join(map(str, row["seeds"])),
        ]
        cells += [f"{row['accuracy'][0]:.2f} ± {row['accuracy'][1]:.2f}"]
        cells += [f"{row[name][0]:.1f} ± {row[name][1]:.1f}" for name in ("all", "convolutions")]
        if costs:
            cells += [f"{row['seconds']:.3f}", f"{row['peak']:.0f}", f"{row['state']:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(rows(Path(sys.argv[1]))))
