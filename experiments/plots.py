"""Figures of a run, each as PNG and SVG. Drawn without pyplot, so no display and no global state are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

__all__ = ["plot_learning", "plot_ranks", "plot_spectra", "save_figure"]

_MODES = {2: ("out", "in"), 3: ("out", "in", "width"), 4: ("out", "in", "height", "width")}


def mode_names(order: int) -> tuple[str, ...]:
    """Names of the modes in the paper's order."""
    return _MODES.get(order, ("out", "in", *(f"spatial {axis + 1}" for axis in range(order - 2))))


def save_figure(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Writes ``directory/name.png`` and ``.svg`` and returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def plot_learning(history: Sequence[dict[str, Any]]) -> Figure:
    """Loss, accuracy and compression over the epochs."""
    epochs = [record["epoch"] for record in history]
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
            if field in history[0]:
                axes.plot(epochs, [record[field] for record in history], marker=".", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_yscale("log")
    return figure


def plot_ranks(history: Sequence[dict[str, Any]]) -> Figure | None:
    """Rank of every mode of every layer over the epochs; ``None`` where no kernel is in Tucker format."""
    names = list(history[0]["ranks"])
    if not names:
        return None
    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    for axes, name in zip(np.ravel(figure.subplots(1, len(names), squeeze=False)), names):
        ranks = np.array([record["ranks"][name] for record in history])
        for mode, label in enumerate(mode_names(ranks.shape[1])):
            axes.plot(epochs, ranks[:, mode], marker=".", label=label)
        axes.set(title=name, xlabel="epoch", ylabel="rank")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def plot_spectra(spectra: dict[str, list[np.ndarray]]) -> Figure:
    """Singular values of every unfolding of every kernel, relative to the largest."""
    figure = Figure(figsize=(3.4 * len(spectra), 3.2), layout="constrained")
    for axes, (name, modes) in zip(np.ravel(figure.subplots(1, len(spectra), squeeze=False)), spectra.items()):
        for label, values in zip(mode_names(len(modes)), modes):
            relative = values / max(values[0], np.finfo(float).tiny)
            axes.semilogy(np.arange(1, len(values) + 1), np.maximum(relative, 1e-12), marker=".", label=label)
        axes.set(title=name, xlabel="index", ylabel="relative singular value")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure
