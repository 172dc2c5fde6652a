"""The directory of a run's checkpoints: which there are, and what reads and writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tdlrt_jax.arguments import check_integer, check_path

__all__ = ["PathLike", "all_steps", "check_links", "existing_step", "open_manager"]

PathLike = str | os.PathLike[str]


def all_steps(directory: PathLike) -> list[int]:
    """The steps that have a complete checkpoint, ascending; empty if there is no such directory."""
    check_path("directory", directory)
    if not Path(directory).is_dir():
        return []
    with open_manager(directory) as manager:
        return sorted(manager.all_steps())


def existing_step(directory: PathLike, step: int | None) -> int:
    """The number given, or the last there is; ``FileNotFoundError`` unless it has a checkpoint."""
    if step is not None:
        step = check_integer("step", step, 0, "None or the number of a checkpoint")
    steps = all_steps(directory)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}: there are {steps}")
    return steps[-1] if step is None else step


def open_manager(directory: PathLike, *, keep: int | None = None, writing: bool = False) -> ocp.CheckpointManager:
    """What reads checkpoints, or writes them and then deletes the oldest; to be closed."""
    processes: Any = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1 and not writing:  # each reads by itself, whatever the others do meanwhile
        here = jax.process_index()
        processes = ocp.options.MultiprocessingOptions(
            primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
        )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=writing,
        create=writing,
        multiprocessing_options=processes,
    )
    handlers = {
        "arrays": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
        "description": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
    }
    return ocp.CheckpointManager(Path(directory).absolute(), options=options, item_handlers=handlers)


def check_links(directory: PathLike, step: int) -> None:
    """Raises ``ValueError`` for a link that leads out of the checkpoints' directory: nothing there is read."""
    home, folder = Path(directory).resolve(), Path(directory) / str(step)
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise ValueError(
                f"checkpoint {step} in {directory} has a link to {path.resolve()}, outside of it, and was not read: expected "
                f"files alone. If it is meant, put what {path} leads to in its place"
            )
