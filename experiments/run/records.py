"""What a run notes down: sums over the steps of an epoch, and the lines that ``metrics.jsonl`` gets from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import tdlrt_jax
from experiments.run import plots
from experiments.run.metrics import Layer, layer_name, paper_order, totals

__all__ = ["Sums", "network_record", "scalars", "truncation_record"]


@dataclasses.dataclass
class Sums:
    """What an epoch has added up so far; saved with a checkpoint in its midst."""

    steps: int = 0
    loss: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    compilations: int = 0
    compile_seconds: float = 0.0
    pressing_steps: int = 0  # steps that reported a rank at its capacity
    skipped: int = 0  # steps left out, among the others; they have no loss
    skipped_in_a_row: int = 0  # up to now, those of epochs before included
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # points of --evaluate-every, each with sums

    def add_point(self, step: int, batch_size: int, test_loss: float, test_accuracy: float) -> None:
        """A point of the curve over steps: the test images now, and the training images since the last point."""
        now = {"steps": self.taken, "loss": self.loss, "correct": self.correct}
        before = self.curve[-1]["sums"] if self.curve else dict.fromkeys(now, 0)
        train = _means(
            self.taken - before["steps"], self.loss - before["loss"], self.correct - before["correct"], batch_size
        )
        point = {"step": step, **train, "test_loss": test_loss, "test_accuracy": test_accuracy}
        self.curve.append({**point, "sums": now})

    def means(self, batch_size: int) -> dict[str, float]:
        """Loss and accuracy of the epoch's training images."""
        return _means(self.taken, self.loss, self.correct, batch_size)

    def counts(self) -> dict[str, Any]:
        """Steps that were out of the ordinary, time and compilations."""
        return {
            "pressing_steps": self.pressing_steps,
            "skipped_steps": self.skipped,
            "seconds": self.seconds,
            "compilations": self.compilations,
            "compile_seconds": self.compile_seconds,
        }

    @property
    def taken(self) -> int:
        """Steps that were not left out."""
        return self.steps - self.skipped

    @property
    def points(self) -> list[dict[str, Any]]:
        """The curve as it is published."""
        return [{name: value for name, value in point.items() if name != "sums"} for point in self.curve]


def _means(steps: int, loss: float, correct: int, batch_size: int) -> dict[str, float]:
    steps = max(steps, 1)  # where all were left out
    return {"train_loss": loss / steps, "train_accuracy": correct / (steps * batch_size)}


def network_record(params: Any, summary: list[Layer]) -> dict[str, Any]:
    """Compression rates, weights, and ranks and capacities by layer; ranks in the paper's order (out, in, height, width)."""
    total = totals(summary)
    return {
        "compression_conv": total.conv_compression,
        "compression_all": total.compression,
        "weights": total.parameters,
        "ranks": {layer.name: layer.rank for layer in summary if layer.rank is not None},
        "capacities": {
            layer_name(name): paper_order(kernel.core.shape) for name, kernel in tdlrt_jax.kernel_paths(params).items()
        },
    }


def truncation_record(opt_state: Any) -> dict[str, Any]:
    """Errors by layer and the tolerance, of methods that adapt ranks."""
    errors = ("truncation_error", "cumulative_truncation_error")
    return {
        **{name: {layer_name(k): float(v) for k, v in getattr(opt_state, name).items()} for name in errors},
        "tolerance": float(opt_state.tolerance),
    }


def scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    """An epoch's line as named curves: ``loss/train``, ``rank/conv1/out`` and so on."""
    curves: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            for layer, entry in value.items():
                if isinstance(entry, tuple):
                    modes = plots.mode_names(len(entry))
                    curves += [(f"{name}/{layer}/{mode}", float(number)) for mode, number in zip(modes, entry)]
                else:
                    curves.append((f"{name}/{layer}", entry))
        elif name not in ("epoch", "step", "pressing", "curve"):
            part, _, kind = name.rpartition("_")
            curves.append((f"{kind}/{part}" if kind in ("loss", "accuracy") else name, float(value)))
    return curves
