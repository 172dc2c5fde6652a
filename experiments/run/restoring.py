"""Going on from the last checkpoint that can be read, if that is what the options ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from experiments.run.devices import Devices
from experiments.run.directory import RunDirectory, RunDirectoryError
from tdlrt_jax import checkpoint

__all__ = ["check_begun", "restore_last_good"]


def check_begun(directory: RunDirectory, epochs: int, steps_per_epoch: int) -> None:
    """Raises ``RunDirectoryError`` for a run whose last checkpoint is of an epoch after the last one asked for."""
    begun = -(-max(checkpoint.all_steps(directory.checkpoints), default=0) // steps_per_epoch)
    if begun > epochs:
        raise RunDirectoryError(
            f"{directory.path} holds a run that is in epoch {begun}, which cannot be made one of {epochs}: expected "
            f"--epochs {begun} or more. Nothing was changed"
        )


def restore_last_good(
    directory: RunDirectory, restore: Callable[[int], dict[str, Any]], devices: Devices, console: Console
) -> dict[str, Any] | None:
    """Restores the last checkpoint of a run that is not damaged, and puts those after it aside.

    Args:
      directory: of the run.
      restore: takes the checkpoint after so many steps and returns what was saved with it, or raises
        :class:`~tdlrt_jax.checkpoint.DamagedError`.
      devices, console: of the run.

    Returns:
      What ``restore`` returned; ``None`` where there is no checkpoint.

    Raises:
      RunDirectoryError: if there are checkpoints, and all of them are damaged; if there are none, and there were some.
    """
    damaged: dict[int, checkpoint.DamagedError] = {}
    metadata = None
    steps = checkpoint.all_steps(directory.checkpoints)
    for step in reversed(steps):
        try:
            metadata = restore(step)
            break
        except checkpoint.DamagedError as error:
            damaged[step] = error
    if not steps:
        _check_none_is_missing(directory)
    elif metadata is None:
        problems = "\n".join(f"  {problem}" for problem in damaged.values())
        raise RunDirectoryError(
            f"no checkpoint of {directory.path} can be read:\n{problems}\n"
            "Start the run anew in another --run-dir. Nothing was changed"
        )
    devices.wait()  # until all processes have read
    for step, problem in damaged.items():
        aside = f"Kept as {directory.put_aside(f'checkpoints/{step}')}" if devices.leads else ""
        console.print(f"{problem}. {aside}", soft_wrap=True, highlight=False)
    return metadata


def _check_none_is_missing(directory: RunDirectory) -> None:
    """Raises ``RunDirectoryError`` for a run without checkpoints that has more than one killed before its first has."""
    metrics = directory.path / "metrics.jsonl"
    epochs = len(metrics.read_text(errors="replace").splitlines()) if metrics.exists() else 0
    finished = (directory.path / "result.json").exists()
    if epochs > 1 or finished:  # an epoch's line is written before its checkpoint
        state = "is finished" if finished else f"has the metrics of {epochs} epochs"
        raise RunDirectoryError(
            f"{directory.path} {state}, but has no checkpoint to go on from: expected one in {directory.checkpoints}. "
            "Put it back, or start the run anew in another --run-dir. Nothing was changed"
        )
