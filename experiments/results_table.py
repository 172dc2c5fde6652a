"""Committed results as a Markdown table: ``python -m experiments.results_table experiments/results/mnist_lenet5``.

Runs that differ in nothing but the seed are one row: mean and standard deviation over the seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

__all__ = ["markdown", "rows"]

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
            result = json.loads(path.read_text())
            options = {key: value for key, value in result["options"].items() if key not in RUN_ONLY}
            result["final"]["test_accuracy"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
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
                "method": options["integrator"] if options["method"] == "tdlrt" else "dense",
                "tau": options["tau"] if options["method"] == "tdlrt" else None,
                "epochs": options["epochs"],
                "seeds": sorted(result["seed"] for result in results),
                "accuracy": _mean_and_deviation([100 * final["test_accuracy"] for final in finals]),
                "all": _mean_and_deviation([100 * final["compression_all"] for final in finals]),
                "convolutions": _mean_and_deviation([100 * final["compression_conv"] for final in finals]),
                "hardware": results[0]["hardware"],
            }
        )
    return sorted(table, key=lambda row: (row["method"], row["tau"] or 0))


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(table: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| method | τ | epochs | seeds | test accuracy [%] | compression, all weights [%] | convolutions [%] |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        cells = [
            row["method"],
            "" if row["tau"] is None else row["tau"],
            row["epochs"],
            ", ".join(map(str, row["seeds"])),
        ]
        cells += [f"{row['accuracy'][0]:.2f} ± {row['accuracy'][1]:.2f}"]
        cells += [f"{row[name][0]:.1f} ± {row[name][1]:.1f}" for name in ("all", "convolutions")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(rows(Path(sys.argv[1]))))
