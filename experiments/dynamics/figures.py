"""Figures of the theorems, from their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["plot_theorem1", "plot_theorem2", "plot_theorem3"]

Result = Mapping[str, Any]
_LINES = ("-", "--", ":", "-.")


def plot_theorem1(result: Result) -> Figure:
    """Distances between the three flows, defects of (8) in two gauges, and errors of one step with frozen frames."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    distance, defect, frozen = figure.subplots(1, 3)
    for number, series in enumerate(result["series"]):
        label, color = f"σ = {series['smallest']:.0e}", f"C{number}"
        for (pair, values), line in zip(series["distance"].items(), _LINES):
            distance.semilogy(result["times"], _shown(values), color=color, linestyle=line, label=f"{pair}, {label}")
        defect.semilogy(
            result["times"], _shown(series["defect_qr"]), color=color, label=f"QR at every instant, {label}"
        )
        corrected = _shown(series["defect_corrected"])
        defect.semilogy(result["times"], corrected, color=color, linestyle="--", label=f"with its turn added, {label}")
        for (name, found), line in zip(series["frozen"].items(), _LINES):
            frozen.loglog(
                result["step_sizes"], found["error"], color=color, linestyle=line, marker=".", label=f"{name}, {label}"
            )
    distance.set(title="distance between flows (5), (7), (8)", xlabel="t", ylabel="relative to ||W||")
    defect.set(title="||K' + ∇L|| / ||∇L|| along (7)", xlabel="t")
    frozen.set(title="one step with frozen frames, error to (5)", xlabel="h")
    return _finished(figure)


def plot_theorem2(result: Result) -> Figure:
    """Descent over the step size, and what truncation adds over the tolerance, for one step."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    descent, excess = figure.subplots(1, 2)
    h, tau = np.array(result["step_sizes"]), np.array(result["tolerances"])
    smallest = min(series["smallest"] for series in result["series"])
    shown = [series for series in result["series"] if series["smallest"] == smallest]
    for number, series in enumerate(shown):
        style = {"color": f"C{number // 2}", "linestyle": "-" if series["inner"] == "exact" else "--"}
        label = f"{series['integrator']}, {series['inner']}"
        descent.loglog(h, _shown(series["descent"]), label=label, marker=".", **style)
        excess.loglog(tau, _shown(series["excess"][len(h) // 2]), label=label, marker=".", **style)
    descent.loglog(h, shown[0]["alpha"] * h, color="0.5", linewidth=1, label="α h of bug, exact")
    excess.loglog(tau, shown[0]["beta_bound"] * tau, color="0.5", linewidth=1, label="bound on β, times τ")
    descent.set(title="L(W(0)) - L(W(h)), no truncation", xlabel="h")
    excess.set(title=f"L(W(h)) with truncation less without, h = {h[len(h) // 2]:.2g}", xlabel="τ")
    return _finished(figure)


def plot_theorem3(result: Result) -> Figure:
    """The three terms of the error, a panel each, and the constant of the second over the smallest singular value."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, field, title in (
        (panels[0, 0], "h", "error over h, gradient in the tangent space"),
        (panels[0, 1], "h_normal", "error over h, gradient 0.01-close to it"),
    ):
        methods = list(dict.fromkeys((s["integrator"], s["inner"]) for s in result[field]))
        values = list(dict.fromkeys(s["smallest"] for s in result[field]))
        for series in result[field]:
            number = methods.index((series["integrator"], series["inner"]))
            line = _LINES[values.index(series["smallest"]) % len(_LINES)]
            label = f"{series['integrator']}, {series['inner']}"
            label += f", order {series['order']:.2f}" if field == "h" else ""
            axes.loglog(
                series["step_sizes"],
                series["error"],
                color=f"C{number}",
                linestyle=line,
                marker=".",
                label=label if series["smallest"] == values[0] else None,
            )
        axes.set(title=title, xlabel="h", ylabel="||W(t) - Y(t)||")
    axes = panels[1, 0]
    for number, series in enumerate(result["eps"]):
        label = f"{series['integrator']}, σ = {series['smallest']:.0e}, order {series['order']:.2f}"
        error = np.array(series["error"]) - series["error_without"]
        axes.loglog(series["eps"], error, color=f"C{number}", linestyle=_LINES[number % 4], marker=".", label=label)
    axes.set(title="error over ε, less the error without", xlabel="ε")
    axes = panels[1, 1]
    for number, series in enumerate(result["tau"]):
        for k, h in enumerate(series["step_sizes"]):
            name = f"σ = {series['smallest']:.0e}, order {series['order']:.2f}" if k == 0 else None
            x = np.array(series["tolerances"]) / h
            y = [row[k] for row in series["lost"]]
            axes.loglog(x, y, color=f"C{number}", marker="osD^"[k % 4], linestyle=_LINES[number % 4], label=name)
    axes.set(title="distance to the steps without truncation over τ / h", xlabel="τ / h")
    return _finished(figure)


def _shown(values: Sequence[float]) -> np.ndarray:
    """What has a place on a logarithmic axis."""
    found = np.array(values, float)
    return np.where(found > 0, found, np.nan)


def _finished(figure: Figure) -> Figure:
    axes: Axes
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure
