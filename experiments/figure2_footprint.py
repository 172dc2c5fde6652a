"""The paper's Figure 2, left: time and memory of the inference of VGG16 and AlexNet over compression.

Measures what is missing, by the functions of benchmarks.inference, a cell a network and compression; a cell is kept as soon as it
is measured. Then writes figure2_footprint (.png, .svg, .md) beside the results. Cells are in
experiments/configs/figure2_footprint.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cells import Cell, Options, Results
from experiments.grids.figures import plot_footprint
from experiments.grids.grid import SCALES
from experiments.grids.pace import duration
from experiments.grids.protocol import CONFIGS, NETWORKS, read_toml
from experiments.grids.tables import Sources, table
from experiments.run.interruption import Interruption
from experiments.run.plots import save_figure
from experiments.run.process import start_over

__all__ = ["Crossing", "batches_of", "cells", "crossing", "main", "measure", "render"]

_NAME = "figure2_footprint"
_PATH = CONFIGS / _NAME / "protocol.toml"


class Crossing(NamedTuple):
    """From which compression on a form needs less than the dense network, in percent."""

    below: float | None  # the largest measured compression at which it does not; None where it always does
    above: float | None  # the next measured one, from which on it always does; None where there is none
    between: float | None  # by a straight line between the two


def crossing(points: Sequence[tuple[float, float]]) -> Crossing:
    """Where a ratio to the dense network falls below one for good.

    Args:
      points: compression in percent and ratio, in any order, one or more.

    Example:
      >>> crossing([(30.0, 1.5), (50.0, 1.1), (60.0, 0.9), (95.0, 0.4)])
      Crossing(below=50.0, above=60.0, between=55.0)
    """
    ordered = sorted(points)
    higher = [index for index, (_, ratio) in enumerate(ordered) if ratio >= 1]
    if not higher:
        return Crossing(None, ordered[0][0], None)
    if higher[-1] == len(ordered) - 1:
        return Crossing(ordered[-1][0], None, None)
    (low, over), (high, under) = ordered[higher[-1]], ordered[higher[-1] + 1]
    return Crossing(low, high, round(low + (high - low) * (over - 1) / (over - under), 10))


def batches_of(images: int, batch: int) -> int:
    """How many batches hold so many images.

    Example:
      >>> batches_of(120_000, 128)
      938
    """
    return math.ceil(images / batch)


def cells(scale: str) -> list[Cell]:
    """The measurements of a scale."""
    from benchmarks import inference
    from benchmarks.run import SCALES as BENCHMARKS

    content = read_toml(_PATH)
    chosen = {**content, **content["scales"][scale]}
    options: Options = BENCHMARKS["cpu"]._replace(
        models=tuple(chosen["networks"]),
        compressions=tuple(chosen["compressions"]),
        batches=(chosen["batch"],),
        width=chosen["width"],
        rounds=chosen["rounds"],
        peers=None,
    )
    return inference.cells(options)


class _StopError(Exception):
    """A wish to stop, within a cell."""


def measure(
    todo: Sequence[Cell],
    results: Results,
    environment: Callable[[], dict[str, Any]],
    *,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> tuple[list[str], int, int]:
    """Measures cells that the results lack, and keeps each at once.

    Args:
      todo: the cells.
      results: where they are kept.
      environment: says what is kept with each: hardware, versions, commit.
      seconds: begin no cell after so many.
      say: shows progress.

    Returns:
      Keys of the cells that failed, how many are left, and the exit code of a signal (0 without one).
    """
    missing = [cell for cell in todo if cell.key not in results.cells]
    failed: list[str] = []
    done, started = 0, time.monotonic()
    with Interruption() as interruption, contextlib.suppress(_StopError):
        for number, cell in enumerate(missing, start=1):
            spent = time.monotonic() - started
            if interruption.signal is not None or (seconds is not None and spent >= seconds):
                break
            left = duration(spent / done * (len(missing) - done)) if done else "?"
            where = f"[{len(todo) - len(missing) + number}/{len(todo)}] {cell.key}"
            say(f"{where}; all: {left} left")

            def tell(what: str, where: str = where) -> None:
                if interruption.signal is not None:
                    raise _StopError
                say(f"{where}: {what}")

            try:
                results.add(cell.key, environment(), cell.measure(tell))
            except _StopError:
                raise
            except Exception as error:  # one that fails does not take the others with it
                failed.append(cell.key)
                say(f"{where} failed: {type(error).__name__}: {error}")
            done += 1
    return failed, len(missing) - done, interruption.exit_code


def render(directory: Path) -> list[Path]:
    """Draws a results directory's figure and writes its table, into it.

    Raises:
      ValueError: if there are no results.
    """
    found = Results(directory / f"{_NAME}.json").cells
    if not found:
        raise ValueError(f"{directory} holds no results yet: run this without --render first")
    images = read_toml(_PATH)["images"]
    networks: dict[str, list[dict[str, Any]]] = {}
    for cell in found.values():
        networks.setdefault(NETWORKS[cell["result"]["network"]["model"]], []).append(cell["result"])
    panels, dense = {}, {}
    for network, results in networks.items():
        results.sort(key=lambda result: result["compression"])
        forms = [form for form in results[0]["forms"] if form != "dense"]
        panels[network] = {form: [_point(result, form, images) for result in results] for form in forms}
        base = [_point(result, "dense", images) for result in results]
        middle = sorted(seconds for _, seconds, _ in base)[len(base) // 2]
        dense[network] = (middle, base[0][2])
    paths = save_figure(plot_footprint(panels, dense), directory, _NAME)
    target = directory / f"{_NAME}.md"
    target.write_text(_markdown(networks, images, [cell["environment"] for cell in found.values()]))
    return [*paths, target]


def _point(result: Mapping[str, Any], form: str, images: int) -> tuple[float, float, float | None]:
    """Compression in percent, seconds of all images, peak in MiB."""
    entry = result["forms"][form]
    peak = entry["peak_bytes"] / 2**20 if "peak_bytes" in entry else None
    seconds = entry["seconds"]["median"] * batches_of(images, result["network"]["batch"])
    return 100 * result["compression"], seconds, peak


def _markdown(networks: Mapping[str, list[dict[str, Any]]], images: int, environments: list[dict[str, Any]]) -> str:
    sources, lines, sentences = Sources(), [], []
    for network, results in networks.items():
        for result in results:
            dense = _point(result, "dense", images)
            for form in result["forms"]:
                at, seconds, peak = _point(result, form, images)
                speedup = 1.0 if form == "dense" else result["forms"][form]["speedup"]["dense"]
                cells = [network, f"{at:.1f}", form, f"{seconds:.4g}", f"{speedup:.2f}"]
                cells += ["—" if peak is None else f"{peak:.0f}"]
                cells += ["—" if peak is None or not dense[2] else f"{peak / dense[2]:.2f}"]
                lines.append(cells)
        for form in results[0]["forms"]:
            if form != "dense":
                sentences += _sentences(network, form, results, images)
    shapes = {
        (result["network"]["width"], result["network"]["batch"]) for group in networks.values() for result in group
    }
    sizes = "; ".join(f"width {width:g}, batches of {batch}" for width, batch in sorted(shapes))
    rounds = sorted({result["rounds"] for group in networks.values() for result in group})
    header = ["network", "c.r. of the convolutions [%]", "form", f"seconds for {images:,} images", "speed, of dense"]
    header += ["peak [MiB]", "peak, of dense"]
    sources.of(environments)
    about = (
        f"Random images of 32x32 pixels, {sizes}. The time of {images:,} images is the median time of a batch (of "
        f"{' or '.join(map(str, rounds))} rounds, all forms of a cell in turn) times the number of batches, the last one whole; "
        "they were not all run. Peak is what the compiler plans for a batch, with parameters. In the "
        "figure, the dense line is the median over the cells."
    )
    return (
        f"# Figure 2, footprint\n\n{about}\n\n" + "\n".join(f"- {sentence}" for sentence in sentences) + f"\n\n"
        f"{table(header, lines)}\n\n{sources.text()}\n"
    )


def _sentences(network: str, form: str, results: Sequence[Mapping[str, Any]], images: int) -> list[str]:
    """From which compression on a form is faster, and smaller, than dense."""
    faster = [(100 * result["compression"], 1 / result["forms"][form]["speedup"]["dense"]) for result in results]
    smaller = []
    for result in results:
        (at, _, peak), (_, _, dense) = _point(result, form, images), _point(result, "dense", images)
        if peak is not None and dense:
            smaller.append((at, peak / dense))
    said = []
    for what, points in (("faster", faster), ("smaller", smaller)):
        if not points:
            continue
        below, above, between = crossing(points)
        if above is None:
            text = f"not {what} than dense at {below:.1f}% compression, the most that was measured"
        elif below is None:
            text = f"{what} than dense at all measured compressions, from {above:.1f}%"
        else:
            text = f"{what} than dense from between {below:.1f}% and {above:.1f}% compression on (a line between: {between:.1f}%)"
        said.append(f"{network}, {form}: {text}.")
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and draws what a command line asks for; exit codes as :func:`experiments.grids.grid.main`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{_NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="how large (default: %(default)s)")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no cell after so many minutes")
    parser.add_argument("--results", type=Path, metavar="DIR", help=f"default: experiments/results/{_NAME}/SCALE")
    parser.add_argument("--list", action="store_true", help="say what is done and open, and stop")
    parser.add_argument("--render", action="store_true", help="only write figure and table of the results there are")
    given = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    directory = given.results or Path("experiments") / "results" / _NAME / given.scale
    failed: list[str] = []
    try:
        if not given.render:
            todo, results = cells(given.scale), Results(directory / f"{_NAME}.json")
            if given.list:
                print("\n".join(f"{'done' if cell.key in results.cells else 'open'}  {cell.key}" for cell in todo))
                return 0
            seconds = None if given.minutes is None else 60 * given.minutes
            failed, left, code = measure(todo, results, _environment, seconds=seconds, say=_say)
            if left:
                print(f"{left} of {len(todo)} cells left; continue with the same command")
            if left or not results.cells:
                return code or (1 if failed else 0)
        for path in render(directory):
            print(f"wrote {path}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; what was measured is kept", file=sys.stderr)
        return 130
    return 1 if failed else 0


def _say(text: str) -> None:
    print(text, flush=True)


def _environment() -> dict[str, Any]:
    from experiments.run.directory import environment

    stored = environment([])
    return {key: stored[key] for key in ("hardware", "settings", "versions", "commit", "started")}


if __name__ == "__main__":
    start_over()
    sys.exit(main())
