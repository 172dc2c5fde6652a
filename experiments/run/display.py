"""What a job shows while it runs, and the table at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.run.metrics import Layer, Totals

__all__ = ["Display", "history_table", "layer_table", "rank_table"]

_ROWS, _COLUMNS = 30, 8  # epochs that a table shows at most


class Display:
    """A live progress bar on a terminal, one plain line an epoch elsewhere. A context manager."""

    def __init__(self, console: Console, epochs: int, steps_per_epoch: int, done: int = 0):
        self.console = console
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.done = done  # steps of an earlier process
        self.started = time.monotonic()
        self.values: dict[str, Any] = {"loss": float("nan"), "accuracy": float("nan"), "compression": 0.0}
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  test {task.fields[accuracy]:.2%}"),
            TextColumn("compression {task.fields[compression]:.1%}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(
            "training", total=epochs * steps_per_epoch, completed=done, epoch="-", **self.values
        )

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()

    def step(self, epoch: int, steps: int, loss: float) -> None:
        """After a step: ``steps`` are done in all."""
        self.values["loss"] = loss
        self.progress.update(self.task, completed=steps, epoch=f"{epoch}/{self.epochs}", **self.values)

    def epoch(self, record: dict[str, Any]) -> None:
        """After an epoch, with its line of ``metrics.jsonl``."""
        self.values.update(accuracy=record["test_accuracy"], compression=record["compression_all"])
        self.progress.update(self.task, **self.values)
        if not self.console.is_terminal:
            done = record["epoch"] * self.steps_per_epoch
            pace = (time.monotonic() - self.started) / max(done - self.done, 1)
            left = pace * (self.epochs * self.steps_per_epoch - done)
            self.console.print(
                f"epoch {record['epoch']}/{self.epochs}  loss {record['train_loss']:.4f}  "
                f"train {record['train_accuracy']:.2%}  test {record['test_accuracy']:.2%}  "
                f"compression {record['compression_all']:.1%} (convolutions {record['compression_conv']:.1%})  "
                f"{record['seconds']:.1f} s, {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )


def layer_table(summary: list[Layer], total: Totals) -> Table:
    """Shapes, ranks in the paper's order, weights and compression, layer by layer and in all."""
    table = Table(
        title="Weights (biases not counted); shapes and ranks as (out, in, height, width)", title_justify="left"
    )
    table.add_column("layer", no_wrap=True)
    for header in ("shape", "rank", "dense", "stored", "compression"):
        table.add_column(header, justify="right", no_wrap=True)
    for layer in sorted(summary, key=lambda layer: layer.kind):  # convolutions first
        rank = "dense" if layer.rank is None else _product(layer.rank)
        table.add_row(
            escape(layer.name),
            _product(layer.shape),
            rank,
            f"{layer.full:,}",
            f"{layer.parameters:,}",
            f"{layer.compression:.1%}",
        )
    table.add_section()
    table.add_row(
        "convolutions only",
        "",
        "",
        f"{total.conv_full:,}",
        f"{total.conv_parameters:,}",
        f"{total.conv_compression:.1%}",
    )
    table.add_row("whole network", "", "", f"{total.full:,}", f"{total.parameters:,}", f"{total.compression:.1%}")
    return table


def history_table(history: Sequence[dict[str, Any]]) -> Table:
    """Losses, accuracies, compression and seconds, epoch by epoch; of a long run, epochs at even distances."""
    shown = _spread(history, _ROWS)
    skipped = "" if len(shown) == len(history) else f" (of {len(history)} epochs, {len(shown)} are shown)"
    table = Table(title=f"Epochs{skipped}", title_justify="left")
    columns = {
        "epoch": ("epoch", "d"),
        "train_loss": ("loss", ".4f"),
        "train_accuracy": ("train", ".2%"),
        "validation_accuracy": ("validation", ".2%"),
        "test_accuracy": ("test", ".2%"),
        "compression_conv": ("c.r. convolutions", ".1%"),
        "compression_all": ("c.r. all", ".1%"),
        "weights": ("weights", ",d"),
        "learning_rate": ("rate", ".3g"),
        "seconds": ("seconds", ".1f"),
        "compilations": ("compiled", "d"),
    }
    given = {field: how for field, how in columns.items() if any(record.get(field) is not None for record in history)}
    for header, _ in given.values():
        table.add_column(header, justify="right", no_wrap=True)
    for record in shown:
        table.add_row(*(_number(record.get(field), form) for field, (_, form) in given.items()))
    return table


def rank_table(history: Sequence[dict[str, Any]]) -> Table:
    """The ranks of every layer over the epochs, modes in the paper's order."""
    records = [record for record in history if record.get("ranks")]
    shown = _spread(records, _COLUMNS)
    table = Table(title="Ranks as (out, in, height, width) after epoch", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for record in shown:
        table.add_column(str(record["epoch"]), justify="right", no_wrap=True)
    for name in dict.fromkeys(name for record in records for name in record["ranks"]):
        table.add_row(escape(name), *(_product(tuple(record["ranks"].get(name, ()))) for record in shown))
    return table


def _spread(records: Sequence[Any], limit: int) -> list[Any]:
    """At most so many of them, the first and the last included."""
    if len(records) <= limit:
        return list(records)
    return [records[round(i * (len(records) - 1) / (limit - 1))] for i in range(limit)]


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _product(numbers: tuple[int, ...]) -> str:
    return "×".join(map(str, numbers))
