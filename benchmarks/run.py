"""Measures what TDLRT costs beside every alternative, on this machine: ``python -m benchmarks.run``.

Sections (all by default): steps (training steps of all methods), inference, parts (of a step, by a profile and by layer), growth
(of cost with width, rank and batch), compilations (of whole runs, and the persistent cache), truncation (its two routes),
convolutions (inside of control flow, and of few channels), pages (of memory, and what they cost), compiler (what the
library's compiler options change), ahead (steps compiled for a GPU that need not be there).

Every cell is kept as soon as it is measured, in OUTPUT/SECTION.json, and cells that are there are not measured again;
OUTPUT/README.md has the tables. Methods are timed in turn in one process: compare times within one cell, not between cells or
files.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import Options, Results, ResultsError
from experiments.run.process import start_over

__all__ = ["SCALES", "SECTIONS", "main"]

SECTIONS = (
    "steps",
    "inference",
    "parts",
    "growth",
    "compilations",
    "truncation",
    "convolutions",
    "pages",
    "compiler",
    "ahead",
)
_METHODS = (
    "dense",
    "factorized",
    "factorized_at_rank",
    "bug",
    "parallel",
    "fixed_rank",
    "amortized",
    "amortized_turning",
    "paper",
)
_CPU = Options(
    models=("vgg16", "alexnet", "resnet18"),
    compressions=(0.95, 0.9, 0.98, 0.8),
    batches=(128,),
    width=1.0,
    spatial="tucker",
    methods=_METHODS,
    rounds=10,
    peers=None,
    growth_widths=(64, 128, 256, 512, 1024, 2048),
    growth_rank=32,
    growth_ranks=(8, 16, 32, 64, 128),
    growth_width=512,
    growth_batches=(32, 64, 128, 256),
    truncation_ranks=(16, 32, 64, 128),
    run_options=("--dataset", "digits", "--epochs", "12", "--rank", "0.5", "--tau", "0.2"),
)
SCALES = {
    "smoke": _CPU._replace(
        models=("alexnet",),
        compressions=(0.9,),
        batches=(8,),
        width=0.125,
        methods=("dense", "factorized", "parallel"),
        rounds=2,
        growth_widths=(8, 16),
        growth_rank=4,
        growth_ranks=(4,),
        growth_width=8,
        growth_batches=(2,),
        truncation_ranks=(16,),
        run_options=("--dataset", "digits", "--epochs", "1", "--limit", "256", "--rank", "8"),
    ),
    "cpu": _CPU,
    "gpu": _CPU._replace(
        methods=(*_METHODS, "dense_at_once", "amortized_at_once", "amortized_turning_at_once"),
        batches=(128, 512),
        rounds=20,
        growth_batches=(128, 256, 512),
        truncation_ranks=(16, 32, 64, 128, 256),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what a command line asks for; returns the exit code: 1 if cells failed, 2 for options that cannot work."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="how large and how many (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--output", type=Path, help="directory of the results (default: runs/benchmarks/SCALE)")
    parser.add_argument("--models", nargs="+", choices=("vgg16", "alexnet", "resnet18"))
    parser.add_argument("--compressions", nargs="+", type=float, metavar="C", help="such as 0.95")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="of steps: dense, dense_xla, factorized, bug, ..."
    )
    parser.add_argument("--width", type=float, help="factor of all numbers of filters")
    parser.add_argument("--spatial", choices=("tucker", "whole"), help="whether spatial modes have factors")
    parser.add_argument("--rounds", type=int, help="how often each method is timed")
    parser.add_argument("--no-peers", action="store_true", help="without PyTorch, though its environment is there")
    parser.add_argument("--again", action="store_true", help="measure cells anew that are there")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    given = parser.parse_args(argv)

    from benchmarks.peers import available

    options = SCALES[given.scale]
    chosen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name in ("models", "compressions", "batches", "methods", "width", "spatial", "rounds")
        if (value := getattr(given, name)) is not None
    }
    options = options._replace(**chosen, peers=None if given.no_peers else available())
    problem = _problem(options)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    output = given.output or Path("runs/benchmarks") / given.scale
    try:
        failed = _measure(options, given.sections, output, again=given.again, only_list=given.list)
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _problem(options: Options) -> str | None:
    from benchmarks.methods import JAX_METHODS

    unknown = [method for method in options.methods if method not in JAX_METHODS]
    if unknown:
        return f"--methods {' '.join(unknown)}: expected some of {', '.join(JAX_METHODS)}"
    if not all(0 < compression < 1 for compression in options.compressions):
        return f"--compressions {options.compressions}: expected fractions of the weights to save, between 0 and 1"
    if options.rounds < 1 or options.width <= 0 or min(options.batches) < 1:
        return "--rounds, --width and --batches must be positive"
    return None


def _measure(options: Options, sections: Sequence[str], output: Path, *, again: bool, only_list: bool) -> list[str]:
    """Measures all cells that are missing, tables after each; returns what failed."""
    from benchmarks.report import write_report

    todo = []
    results = {section: Results(output / f"{section}.json") for section in sections}
    for section in sections:
        for cell in importlib.import_module(f"benchmarks.{section}").cells(options):
            done = cell.key in results[section].cells and not again
            if only_list:
                print(f"{'done' if done else 'open'}  {section}: {cell.key}")
            elif not done:
                todo.append((section, cell))
    if only_list:
        return []
    from experiments.run.directory import environment

    failed = []
    started = time.monotonic()
    for index, (section, cell) in enumerate(todo):
        where = f"[{index + 1}/{len(todo)}] {section}: {cell.key}"

        def say(what: str, where: str = where) -> None:
            print(f"{time.monotonic() - started:7.0f} s  {where}: {what}", flush=True)

        say("...")
        stored = environment([])
        kept: dict[str, Any] = {key: stored[key] for key in ("hardware", "settings", "versions", "commit", "started")}
        try:
            result = cell.measure(say)
        except Exception as error:  # one cell that fails does not take the others with it
            failed.append(where)
            print(f"{where} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        results[section].add(cell.key, kept, result)
        write_report(output)
    write_report(output)
    print(f"results and tables: {output}")
    for where in failed:
        print(f"failed: {where}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    start_over()
    sys.exit(main())
