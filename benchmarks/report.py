"""Tables of a results directory, from its JSON files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import Results

__all__ = ["markdown", "table", "where", "write_report"]

MIB = 2**20


def write_report(directory: Path) -> None:
    """Writes ``README.md`` into a results directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "README.md").write_text(markdown(directory))


def markdown(directory: Path) -> str:
    """The tables of all sections that have results.

    Raises:
      ResultsError: for a file that is none of the benchmarks'.
    """
    parts = [
        "# Benchmarks\n\nMade by `python -m benchmarks.run` from the JSON files beside it. Times are medians; compare them "
        "within one table.\n"
    ]
    for section, render in _SECTIONS.items():
        cells = Results(directory / f"{section}.json").cells
        if section == "steps" and len(cells) > 1:
            parts.append(f"## Overview\n\n{overview(cells)}\n")
        if cells:
            parts.append(f"## {section.capitalize()}\n")
            for key, cell in cells.items():
                parts.append(f"### {key}\n\n{where(cell['environment'])}\n\n{render(cell['result'])}\n")
    return "\n".join(parts)


def overview(cells: dict[str, dict[str, Any]]) -> str:
    """Seconds of a training step in all networks, with the ratio to dense PyTorch's where it was measured.

    Else it is to dense JAX's, or to what was measured first.
    """
    results = {key: cell["result"]["methods"] for key, cell in cells.items()}
    names = list(dict.fromkeys(name for methods in results.values() for name in methods))
    rows = []
    for name in names:
        row = [name]
        for methods in results.values():
            if name not in methods:
                row.append("")
                continue
            ratios = methods[name]["ratio"]
            to = next((name for name in ("torch dense", "dense") if name in ratios), next(iter(ratios)))
            row.append(f"{methods[name]['seconds']['median']:.3f} ({ratios[to]['of_medians']:.2f})")
        rows.append(row)
    about = (
        "Seconds of a step, and its ratio to dense PyTorch's (dense JAX's where there is no PyTorch, and the first method's "
        "where there is neither)."
    )
    return f"{about}\n\n{table(['method', *results], rows)}"


def where(environment: dict[str, Any]) -> str:
    """Hardware, version of JAX, commit and day of a measurement."""
    versions = environment["versions"]
    commit = (environment["commit"] or "no commit")[:12] + (
        " with changes" if "with" in (environment["commit"] or "") else ""
    )
    return f"{environment['hardware']}; jax {versions['jax']}, {commit}, {environment['started'][:10]}."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
      >>> print(table(["a", "b"], [["1", "2"]]))
      | a | b |
      |---|---|
      | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "|" + "|".join(line) + "|" if line[0] == "---" else "| " + " | ".join(line) + " |" for line in lines
    )


def _seconds(spread: dict[str, Any]) -> str:
    first, third = spread["quartiles"]
    return f"{spread['median']:.4g} ({first:.4g} to {third:.4g})"


def _steps(result: dict[str, Any]) -> str:
    methods = result["methods"]
    baselines = next(iter(methods.values()))["ratio"]
    rows = []
    for name, entry in sorted(methods.items(), key=lambda item: item[1]["seconds"]["median"]):
        compile_seconds = entry.get("seconds_to")
        rows.append(
            [
                name,
                _seconds(entry["seconds"]),
                *[f"{entry['ratio'][to]['of_medians']:.2f}" for to in baselines],
                f"{entry['state_bytes'] / MIB:.2f}",
                f"{entry['peak_bytes'] / MIB:.0f}" if "peak_bytes" in entry else "",
                f"{entry['flops'] / 2e9:.1f}" if entry.get("flops") else "",
                f"{sum(compile_seconds.values()):.0f}" if compile_seconds else "",
            ]
        )
    header = [
        "method",
        "s / step (quartiles)",
        *[f"/ {to}" for to in baselines],
        "parameters, gradients, optimizer [MiB]",
    ]
    header += ["peak of a step [MiB]", "multiply-adds [G]", "compilation [s]"]
    network = result["network"]
    return (
        f"{network['model']}, width {network['width']:g}, batch {network['batch']}, compression of the convolutions "
        f"{100 * result['compression']:.1f}%, {result['rounds']} rounds in turn.\n\n{table(header, rows)}"
    )


def _inference(result: dict[str, Any]) -> str:
    forms = result["forms"]
    baselines = next(iter(forms.values()))["speedup"]
    rows = [
        [
            name,
            f"{entry['images_per_second']:.0f}",
            *[f"{entry['speedup'][to]:.2f}" for to in baselines],
            f"{entry['peak_bytes'] / MIB:.0f}" if "peak_bytes" in entry else "",
            f"{entry['flops'] / 2e9:.1f}" if entry.get("flops") else "",
        ]
        for name, entry in sorted(forms.items(), key=lambda item: -item[1]["images_per_second"])
    ]
    header = ["form", "images / s", *[f"times {to}" for to in baselines], "peak [MiB]", "multiply-adds [G]"]
    return (
        f"Compression {100 * result['compression']:.1f}%, batch {result['network']['batch']}.\n\n{table(header, rows)}"
    )


def _parts(result: dict[str, Any]) -> str:
    if "layers" in result:
        names = list(result["layers"][0]["seconds"])
        rows = [
            [
                row["layer"],
                "x".join(map(str, row["shape"])),
                ", ".join("whole" if r is None else str(r) for r in row["rank"]),
                row["plan"],
                *[f"{1e3 * row['seconds'][name]['median']:.2f}" for name in names],
            ]
            for row in result["layers"]
        ]
        return "Milliseconds of every layer taken alone.\n\n" + table(["layer", "kernel", "rank", "plan", *names], rows)
    methods = result["methods"]
    parts = list(dict.fromkeys(part for entry in methods.values() for part in entry["parts"]))
    rows = [[part, *[f"{entry['parts'].get(part, 0):.1f}" for entry in methods.values()]] for part in parts]
    kinds = list(dict.fromkeys(kind for entry in methods.values() for kind in list(entry["kinds"])[:6]))
    rows += [[f"*{kind}*", *[f"{entry['kinds'].get(kind, 0):.1f}" for entry in methods.values()]] for kind in kinds]
    rows.append(["all operations", *[f"{entry['milliseconds']:.1f}" for entry in methods.values()]])
    rows.append(["the step by the clock", *[f"{1e3 * entry['seconds']['median']:.1f}" for entry in methods.values()]])
    title = (
        "Milliseconds by JAX's profiler, by part of the step and by *kind of operation*; operations overlap on several "
        "threads."
    )
    return f"{title}\n\n{table(['part', *methods], rows)}"


def _growth(result: dict[str, Any]) -> str:
    methods = list(result["slopes"])
    rows = [
        [
            str(point["channels"]),
            str(point["rank"]),
            str(point["batch"]),
            *[f"{1e3 * point['seconds'][method]['median']:.2f}" for method in methods],
        ]
        for point in result["points"]
    ]
    for kind in ("measured", "counted"):
        slopes = [result["slopes"][method][kind] for method in methods]
        rows.append([f"slope, {kind}", "", "", *["" if s is None else f"{s:.2f}" for s in slopes]])
    return "Milliseconds of a training step of one layer.\n\n" + table(["channels", "rank", "batch", *methods], rows)


def _compilations(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            str(run["epochs"]),
            str(run["compilations"]),
            f"{run['compile_seconds']:.1f}",
            f"{run['training_seconds']:.1f}",
            f"{run['process_seconds']:.1f}",
            f"{run['ranks'][0]} to {run['ranks'][-1]}" if run["ranks"] else "",
            f"{100 * run['compression_conv'][-1]:.1f}" if run["compression_conv"] else "",
        ]
        for name, run in result["runs"].items()
    ]
    header = [
        "start",
        "epochs",
        "compilations",
        "compiling [s]",
        "training [s]",
        "process [s]",
        "sum of ranks",
        "compression [%]",
    ]
    return f"`{result['command']}`\n\n{table(header, rows)}"


def _truncation(result: dict[str, Any]) -> str:
    rows = [
        [
            route,
            f"{1e3 * entry['seconds']['median']:.3f}",
            f"{entry['error']:.3e}",
            f"{entry['reported_error']:.3e}",
            f"{entry['orthonormality']:.1e}",
        ]
        for route, entry in result["routes"].items()
    ]
    shape, capacity = ("x".join(map(str, result[name])) for name in ("shape", "capacity"))
    header = ["route", "ms", "relative error", "as reported", "deviation from orthonormality"]
    return (
        f"{shape} to {capacity}; no truncation has an error below {result['least_error']:.3e}.\n\n{table(header, rows)}"
    )


def _convolutions(result: dict[str, Any]) -> str:
    rows = [[name, f"{1e3 * entry['median']:.2f}"] for name, entry in result["seconds"].items()]
    header = ["program", "ms"]
    if "temporary_bytes" in result:
        header.append("memory meanwhile [MiB]")
        rows = [[*row, f"{result['temporary_bytes'][row[0]] / 2**20:.1f}"] for row in rows]
    return f"Batch {result['batch']}.\n\n{table(header, rows)}"


def _pages(result: dict[str, Any]) -> str:
    of = result["seconds"]
    rows = [
        [
            method,
            *[f"{of[name][method]['median']:.4g}" for name in of],
            f"{of['with'][method]['median'] / plain['median']:.2f}",
        ]
        for method, plain in of["without"].items()
    ]
    rows.append(["pages handed out a round", *[f"{result['faults'][name]['median']:.0f}" for name in of], ""])
    settings = ", ".join(f"`{name}={value}`" for name, value in result["settings"].items())
    return f"Seconds of a step without and with {settings}.\n\n{table(['method', *of, 'ratio'], rows)}"


def _compiler(result: dict[str, Any]) -> str:
    rows = []
    for method, entry in result["methods"].items():
        rows.append(
            [
                method,
                *[f"{entry[name]['seconds']:.1f}" for name in ("without", "with")],
                *[f"{entry[name]['host_bytes'] / MIB:.0f}" for name in ("without", "with")],
                *[f"{entry[name]['step_seconds']['median']:.4g}" for name in ("without", "with")],
                f"{entry['step_ratio']['of_medians']:.2f}",
            ]
        )
    options = ", ".join(f"`{name}={value}`" for name, value in result["options"].items())
    header = ["method", "compiling [s]", "with", "host [MiB]", "with", "step [s]", "with", "ratio"]
    built = [
        [kind, *[f"{seconds[name]:.1f}" for name in ("without", "with")]]
        for kind, seconds in result["building"].items()
    ]
    building = table(["network", "building it [s]", "with those for what runs once"], built)
    return f"Without and with {options or 'any options'}.\n\n{table(header, rows)}\n\n{building}"


def _ahead(result: dict[str, Any]) -> str:
    rows = [
        [
            method,
            *[str(entry[name]) for name in ("always", "library", "waits", "in_loops")],
            *[f"{entry[name] / MIB:.0f}" for name in ("arguments", "peak")],
            f"{sum(entry['seconds_to'].values()):.0f}",
        ]
        for method, entry in result["methods"].items()
    ]
    header = ["method", "launches", "of them library calls", "waits of the host", "launches in loops it may enter"]
    header += ["arguments [MiB]", "planned peak [MiB]", "tracing and compiling [s]"]
    options = ", ".join(f"`{name}={value}`" for name, value in result["options"].items())
    return f"Compiled for {result['device']}, with {options}.\n\n{table(header, rows)}"


_SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "steps": _steps,
    "inference": _inference,
    "parts": _parts,
    "growth": _growth,
    "compilations": _compilations,
    "truncation": _truncation,
    "convolutions": _convolutions,
    "pages": _pages,
    "compiler": _compiler,
    "ahead": _ahead,
}
