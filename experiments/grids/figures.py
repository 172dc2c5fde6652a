"""Figures of grids of runs. Drawn without pyplot, as those of a single run are (:mod:`experiments.run.plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from experiments.grids.tables import Statistic

__all__ = [
    "Curves",
    "Point",
    "plot_cut_costs",
    "plot_footprint",
    "plot_rank_paths",
    "plot_robustness",
    "plot_tolerance",
    "plot_tradeoff",
    "plot_widths",
]

_MARKERS = "osD^vPX*"


class Point(NamedTuple):
    """Where runs of one configuration ended, in percent."""

    compression: Statistic
    accuracy: Statistic
    asked: float | None = None  # the tolerance or compression that was asked for


class Curves(NamedTuple):
    """The same quantity after the same steps in several runs."""

    steps: np.ndarray  # (points,)
    values: np.ndarray  # (runs, points)


def _style(index: int) -> dict[str, Any]:
    """Color and marker of a series."""
    return {"color": f"C{index % 10}", "marker": _MARKERS[index % len(_MARKERS)]}


def plot_tradeoff(
    panels: Mapping[str, Mapping[str, Sequence[Point]]],
    dense: Mapping[str, Statistic],
    paper: Mapping[str, Mapping[str, tuple[float, float]]],
) -> Figure:
    """Accuracy over compression, a panel a network (Figure 1).

    Args:
      panels: points of every series, by network and series.
      dense: accuracy of the dense network, a horizontal line with its deviation, by network.
      paper: compression and accuracy in the paper, hollow in the color of the series of that name, by network and series.
    """
    series = list(dict.fromkeys(name for shown in (panels, paper) for points in shown.values() for name in points))
    figure = Figure(figsize=(4.6 * len(panels), 4.6), layout="constrained")
    for axes, (network, points) in zip(np.ravel(figure.subplots(1, len(panels), squeeze=False)), panels.items()):
        for number, name in enumerate(series):
            style = _style(number)
            if name in points:
                _errorbar(axes, points[name], label=name, **style)
            if name in paper.get(network, {}):
                at, height = paper[network][name]
                axes.plot(at, height, linestyle="", markersize=11, markerfacecolor="none", **style, label="_paper")
        if network in dense:
            _dense_line(axes, dense[network])
        axes.set(title=network, xlabel="compression of the convolutions [%]", ylabel="test accuracy [%]")
        axes.grid(alpha=0.3)
    if any(paper.values()):
        handle: dict[str, Any] = {
            "linestyle": "",
            "marker": "o",
            "markersize": 11,
            "markerfacecolor": "none",
            "color": "0.3",
        }
        figure.axes[0].plot([], [], **handle, label="hollow: the paper's")
    _legend_below(figure)
    return figure


def _errorbar(axes: Axes, points: Sequence[Point], **style: Any) -> None:
    ordered = sorted(points, key=lambda point: point.compression.mean)
    axes.errorbar(
        [point.compression.mean for point in ordered],
        [point.accuracy.mean for point in ordered],
        xerr=[point.compression.deviation or 0.0 for point in ordered],
        yerr=[point.accuracy.deviation or 0.0 for point in ordered],
        capsize=2,
        markersize=5,
        **style,
    )


def _dense_line(axes: Axes, dense: Statistic) -> None:
    axes.axhline(dense.mean, color="0.3", linestyle="--", label="Baseline")
    if dense.deviation is not None:
        axes.axhspan(dense.mean - dense.deviation, dense.mean + dense.deviation, color="0.3", alpha=0.12, linewidth=0)


def plot_tolerance(points: Mapping[str, Sequence[Point]]) -> Figure:
    """Compression and accuracy over the tolerance τ, a line a network: how to choose it.

    Args:
      points: of runs whose ``asked`` is τ, by network.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, field in zip(panels, ("compression", "accuracy")):
        for number, (network, found) in enumerate(points.items()):
            ordered = sorted(
                (point for point in found if point.asked is not None), key=lambda point: point.asked or 0.0
            )
            statistics = [getattr(point, field) for point in ordered]
            axes.errorbar(
                [point.asked for point in ordered],
                [statistic.mean for statistic in statistics],
                yerr=[statistic.deviation or 0.0 for statistic in statistics],
                capsize=2,
                label=network,
                **_style(number),
            )
        axes.set(xscale="log", xlabel="tolerance τ")
        axes.grid(alpha=0.3, which="both")
    panels[0].set(title="compression of the convolutions [%]")
    panels[1].set(title="test accuracy [%]")
    _legend_below(figure)
    return figure


def plot_rank_paths(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Ranks of every layer over the epochs, a panel a result: the mean of both channel modes' ranks, relative to their sizes.

    Args:
      results: of one run each, by title; layers in the paper's order of modes (out, in, ...).
    """
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows + 0.6), layout="constrained")
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes, (title, result) in zip(panels, results.items()):
        layers = [layer for layer in result["layers"] if layer["rank"] is not None]
        for number, layer in enumerate(layers):
            records = [record for record in result["epochs"] if layer["name"] in record.get("ranks", {})]
            sizes = np.array(layer["shape"][:2])
            shares = [100 * float(np.mean(record["ranks"][layer["name"]][:2] / sizes)) for record in records]
            color = _color(number, len(layers))
            axes.plot([record["epoch"] for record in records], shares, color=color, marker=".", label=layer["name"])
        axes.set(title=title, xlabel="epoch", ylabel="rank of the channels' size [%]")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.grid(alpha=0.3)
    for axes in panels[len(results) :]:
        axes.remove()
    _legend_below(figure)
    return figure


def _color(number: int, count: int) -> Any:
    """A color of a sequence from first to last, dark to light."""
    return matplotlib.colormaps["viridis"](0.9 * number / max(1, count - 1))


def plot_robustness(curves: Mapping[str, Curves]) -> Figure:
    """Test accuracy over optimization steps, mean and shaded deviation over runs (Figure 2, right).

    Args:
      curves: accuracies in percent, by method.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, curve) in enumerate(curves.items()):
        mean, color = curve.values.mean(0), f"C{number}"
        axes.plot(curve.steps, mean, color=color, label=name)
        if len(curve.values) > 1:
            deviation = curve.values.std(0, ddof=1)
            # Shares end at 0 and 100 percent, whatever a deviation says.
            low, high = np.clip(mean - deviation, 0, 100), np.clip(mean + deviation, 0, 100)
            axes.fill_between(curve.steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="optimization steps", ylabel="test accuracy [%]")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def plot_footprint(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float | None]]]],
    dense: Mapping[str, tuple[float, float | None]],
) -> Figure:
    """Inference time and peak memory over compression, two panels a network (Figure 2, left).

    Args:
      panels: compression in percent, seconds and peak in MiB (``None`` where it is not known), by network and form.
      dense: seconds and peak of the dense network, a horizontal line, by network.
    """
    figure = Figure(figsize=(9.6, 3.8 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for pair, (network, forms) in zip(grid, panels.items()):
        for index, (axes, title) in enumerate(zip(pair, ("seconds", "peak memory [MiB]")), start=1):
            for number, (form, points) in enumerate(forms.items()):
                shown = [(point[0], point[index]) for point in sorted(points) if point[index] is not None]
                if shown:
                    axes.plot(*zip(*shown), label=form, **_style(number))
            if (line := dense[network][index - 1]) is not None:
                axes.axhline(line, color="0.3", linestyle="--", label="dense")
            axes.set(title=f"{network}: {title}", xlabel="compression of the convolutions [%]")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    _legend_below(figure)
    return figure


def plot_widths(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, str]]]]) -> Figure:
    """Accuracy over the number of weights, a line a method and a point a width, a panel a network.

    Args:
      panels: weights, accuracy in percent and what is written beside the point, by network and method.
    """
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    methods = list(dict.fromkeys(method for shown in panels.values() for method in shown))
    methods.sort(key=lambda method: method != "dense")
    for axes, (network, shown) in zip(np.ravel(figure.subplots(1, len(panels), squeeze=False)), panels.items()):
        for method, points in shown.items():
            ordered = sorted(points)
            axes.plot(*zip(*[point[:2] for point in ordered]), label=method, **_style(methods.index(method)))
            # Of several points at one width the highest is named.
            highest = {text: (w, a) for w, a, text in sorted(points, key=lambda point: point[1])}
            for text, place in highest.items():
                axes.annotate(text, place, (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axes.set(title=network, xscale="log", xlabel="weights", ylabel="test accuracy [%]")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.margins(0.1, 0.12)
        axes.grid(alpha=0.3, which="both")
    _legend_below(figure)
    return figure


def _legend_below(figure: Figure) -> None:
    """One legend for all panels, an entry a label."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if not handles:
        return
    characters = 14 * figure.get_figwidth()  # of the small font in a line, roughly
    columns = max(1, min(len(handles), int(characters / (max(map(len, handles)) + 7))))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize="small")


def plot_cut_costs(cuts: Sequence[Mapping[str, Any]]) -> Figure:
    """By how much the loss rose where directions were cut, over the energy that went and over what was expected.

    Where it rose by less than 1e-4, or fell, it is drawn at that.

    Args:
      cuts: of :func:`experiments.cut_costs.measure`.
    """
    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    layers = list(dict.fromkeys(cut["layer"] for cut in cuts))
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, max(len(layers), 2)))
    titles = {"energy": "energy cut, relative to the kernel", "expected": "expected rise of the loss"}
    for axes, (part, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        for number, layer in enumerate(layers):
            shown = [cut for cut in cuts if cut["layer"] == layer]
            values, rises = [cut[part] for cut in shown], [max(cut["rise"], 1e-4) for cut in shown]
            axes.scatter(values, rises, color=colors[number], marker=_MARKERS[number % len(_MARKERS)], label=layer)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("rise of the loss")
    low, high = figure.axes[1].get_xlim()
    figure.axes[1].plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure
