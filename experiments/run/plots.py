"""Figures of a run, each as PNG and SVG. Drawn without pyplot, so no display and no global state are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

__all__ = [
    "mode_names",
    "plot_comparison",
    "plot_compression",
    "plot_learning",
    "plot_ranks",
    "plot_seconds",
    "plot_spectra",
    "plot_truncation",
    "save_figure",
]

History = Sequence[dict[str, Any]]  # the lines of metrics.jsonl

_MODES = {1: ("terms",), 2: ("out", "in"), 3: ("out", "in", "width"), 4: ("out", "in", "height", "width")}


def mode_names(order: int) -> tuple[str, ...]:
    """Names of the modes in the paper's order."""
    return _MODES.get(order, ("out", "in", *(f"spatial {axis + 1}" for axis in range(order - 2))))


def save_figure(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Writes ``directory/name.png`` and ``.svg`` and returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.{suffix}" for suffix in ("png", "svg")]
    # The same figure is the same file: no date, and names of parts that are not drawn at random.
    with matplotlib.rc_context({"svg.hashsalt": "tdlrt_jax"}):
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def plot_learning(history: History) -> Figure:
    """Loss, accuracy and compression over the epochs."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, compression = figure.subplots(1, 3)
    curves = [
        (loss, "cross entropy", {"train_loss": "training", "validation_loss": "validation", "test_loss": "test"}),
        (
            accuracy,
            "accuracy",
            {"train_accuracy": "training", "validation_accuracy": "validation", "test_accuracy": "test"},
        ),
        (compression, "compression 1 - c/f", {"compression_conv": "convolutions", "compression_all": "all weights"}),
    ]
    for axes, title, fields in curves:
        for field, label in fields.items():
            if any(field in record for record in history):
                axes.plot(*_curve(history, field), marker=_marker(history), label=label)
        axes.set(title=title, xlabel="epoch")
        _epochs(axes)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    loss.set_yscale("log")
    _percent(accuracy.yaxis, compression.yaxis)
    return figure


def plot_ranks(history: History) -> Figure | None:
    """Rank of every mode of every layer over the epochs; ``None`` where no kernel is in Tucker format."""
    names = list(history[0].get("ranks", {}))

    def draw(axes: Axes, name: str) -> None:
        records = [record for record in history if name in record.get("ranks", {})]
        ranks = np.array([record["ranks"][name] for record in records])
        for mode, label in enumerate(mode_names(ranks.shape[1])):
            # Ranks often coincide: a broken line over a whole one shows both.
            style: dict[str, Any] = {
                "linestyle": ("-", "--")[mode % 2],
                "linewidth": (2.2, 1.4)[mode % 2],
                "label": label,
            }
            axes.plot([record["epoch"] for record in records], ranks[:, mode], marker=_marker(records), **style)
        axes.set_ylim(bottom=0)
        _epochs(axes)

    return _grid(names, draw, "epoch", "rank") if names else None


def plot_spectra(spectra: Mapping[str, list[np.ndarray]]) -> Figure:
    """Singular values of every unfolding of every kernel, relative to the largest."""

    def draw(axes: Axes, name: str) -> None:
        for label, values in zip(mode_names(len(spectra[name])), spectra[name]):
            relative = values / max(values[0], np.finfo(float).tiny)
            axes.semilogy(np.arange(1, len(values) + 1), np.maximum(relative, 1e-12), marker=".", label=label)

    return _grid(list(spectra), draw, "index", "relative singular value")


def plot_compression(history: History) -> Figure:
    """Compression over the epochs, and the accuracy that went with it."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    over_time, trade = figure.subplots(1, 2)
    for field, label in {"compression_conv": "convolutions", "compression_all": "all weights"}.items():
        over_time.plot(*_curve(history, field), marker=_marker(history), label=label)
    over_time.set(title="compression 1 - c/f", xlabel="epoch")
    _epochs(over_time)
    over_time.grid(alpha=0.3)
    over_time.legend()
    records = [r for r in history if "test_accuracy" in r and "compression_all" in r]
    compression, accuracy = ([r[field] for r in records] for field in ("compression_all", "test_accuracy"))
    trade.plot(compression, accuracy, color="0.7", zorder=1)
    points = trade.scatter(compression, accuracy, c=[r["epoch"] for r in records], cmap="viridis", zorder=2, s=20)
    trade.set(title="test accuracy against compression", xlabel="compression of all weights", ylabel="test accuracy")
    trade.grid(alpha=0.3)
    _percent(over_time.yaxis, trade.xaxis, trade.yaxis)
    figure.colorbar(points, ax=trade, label="epoch").ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def plot_truncation(history: History) -> Figure | None:
    """Relative truncation error of every layer, of an epoch's last step and added up; ``None`` without any."""
    names = list(history[0].get("truncation_error", {}))
    if not names:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    fields = {"truncation_error": "of the epoch's last step", "cumulative_truncation_error": "added up over all steps"}
    for axes, (field, title) in zip(figure.subplots(1, 2), fields.items()):
        for name, style in zip(names, _styles(len(names))):
            records = [record for record in history if name in record.get(field, {})]
            errors = np.array([record[field][name] for record in records], float)
            axes.plot(
                [record["epoch"] for record in records],
                np.where(errors > 0, errors, np.nan),  # a step that truncates nothing has no place on a log axis
                marker=_marker(records),
                label=_plain(name),
                **style,
            )
        axes.set(title=f"relative truncation error {title}", xlabel="epoch", yscale="log")
        axes.title.set_fontsize("medium")
        _epochs(axes)
        axes.grid(alpha=0.3)
    _legend(figure, names)
    return figure


def plot_seconds(history: History) -> Figure:
    """Seconds of every epoch, and in which of them programs were compiled."""
    figure = Figure(figsize=(min(6 + 0.08 * len(history), 14), 3.6), layout="constrained")
    axes = figure.subplots()
    epochs = np.array([record["epoch"] for record in history])
    below = np.zeros(len(history))
    for field, label in {"seconds": "training", "evaluation_seconds": "evaluation"}.items():
        heights = np.array([record.get(field, 0.0) for record in history], float)
        axes.bar(epochs, heights, bottom=below, width=0.8, label=label)
        below += heights
    compiled = [(e, top) for e, top, record in zip(epochs, below, history) if record.get("compilations")]
    if compiled:
        offset = 0.03 * max(below)
        tops = [top + offset for _, top in compiled]
        axes.plot([e for e, _ in compiled], tops, linestyle="", marker="v", color="0.3", label="compilations within")
    axes.set(title="seconds per epoch", xlabel="epoch", ylabel="seconds")
    axes.margins(x=0.01, y=0.1)
    _epochs(axes)
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    _legend(figure, ["training", "evaluation", "compilations within"])
    return figure


def plot_comparison(histories: Mapping[str, History]) -> Figure:
    """Several runs side by side: accuracy and compression over the epochs, and where they ended."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    accuracy, compression, ends = figure.subplots(1, 3)
    for (name, history), style in zip(histories.items(), _styles(len(histories), broken=True)):
        for axes, field in ((accuracy, "test_accuracy"), (compression, "compression_all")):
            axes.plot(*_curve(history, field), marker=_marker(history), label=_plain(name), **style)
        last = history[-1]
        if "compression_all" in last and "test_accuracy" in last:
            ends.plot(last["compression_all"], last["test_accuracy"], marker="o", color=style["color"], linestyle="")
    accuracy.set(title="test accuracy", xlabel="epoch")
    compression.set(title="compression of all weights", xlabel="epoch")
    ends.set(title="after the last epoch", xlabel="compression of all weights", ylabel="test accuracy")
    ends.margins(0.15)
    ends.set_xlim(right=min(ends.get_xlim()[1], 1))
    compression.set_ylim(top=min(compression.get_ylim()[1], 1))
    for axes in (accuracy, compression, ends):
        axes.grid(alpha=0.3)
    for axes in (accuracy, compression):
        _epochs(axes)
    _percent(accuracy.yaxis, compression.yaxis, ends.xaxis, ends.yaxis)
    _legend(figure, list(histories))
    return figure


def _curve(history: History, field: str) -> tuple[list[int], list[float]]:
    """Epochs and values, where there are any."""
    records = [record for record in history if field in record]
    return [record["epoch"] for record in records], [record[field] for record in records]


def _plain(name: str) -> str:
    """A name from a file, which may have the sign that begins a formula."""
    return name.replace("$", r"\$")


def _grid(names: Sequence[str], draw: Callable[[Axes, str], None], xlabel: str, ylabel: str) -> Figure:
    """One panel a layer, as many rows as need be, and one legend for all."""
    columns = len(names) if len(names) <= 4 else min(5, math.ceil(math.sqrt(1.4 * len(names))))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.5), layout="constrained")
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for number, (axes, name) in enumerate(zip(panels, names)):
        draw(axes, name)
        axes.set_title(_plain(name), fontsize="medium")
        if number + columns >= len(names):  # nothing below
            axes.set_xlabel(xlabel)
        if number % columns == 0:
            axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.remove()
    labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    _legend(figure, list(dict.fromkeys(labels)))
    return figure


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    """One legend below all panels, an entry a label."""
    handles = {
        label: handle for axes in reversed(figure.axes) for handle, label in zip(*axes.get_legend_handles_labels())
    }
    shown = [label for label in labels if label in handles]
    longest = max(map(len, shown), default=1)
    width = figure.get_figwidth() * 14  # characters of the small font, roughly
    columns = max(1, min(len(shown), int(width / (longest + 7))))
    figure.legend([handles[n] for n in shown], shown, loc="outside lower center", ncols=columns, fontsize="small")


def _styles(count: int, *, broken: bool = False) -> list[dict[str, Any]]:
    """Colors that differ, ten named ones or a color map's, with three kinds of line for more or for ``broken``."""
    lines = ("-", "--", ":") if broken or count > 10 else ("-",)
    if count <= 10:
        colors: Sequence[Any] = [f"C{number}" for number in range(count)]
    else:
        colors = list(matplotlib.colormaps["turbo"](np.linspace(0.02, 0.95, count)))
    return [{"color": color, "linestyle": lines[number % len(lines)]} for number, color in enumerate(colors)]


def _marker(records: Sequence[Any]) -> str | None:
    """Points as long as they can be told apart."""
    return "." if len(records) <= 25 else None


def _percent(*every: Axis) -> None:
    """Shares as percentages, few enough of them that they do not run into one another."""
    for axis in every:
        axis.set_major_locator(MaxNLocator(nbins=5))
        axis.set_major_formatter(PercentFormatter(1))


def _epochs(axes: Axes) -> None:
    """Epochs are whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
