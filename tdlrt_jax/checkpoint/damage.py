"""What is wrong with a checkpoint, in words: which leaves are lost, and what else there is to continue from."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from tdlrt_jax.checkpoint.directory import PathLike, all_steps

__all__ = ["DamagedError", "damaged", "listed", "naming_leaves", "not_written"]


class DamagedError(ValueError):
    """A checkpoint that is not what was saved; the message names what is lost, and the other checkpoints there."""


def damaged(directory: PathLike, step: int, problem: str) -> DamagedError:
    """The error to raise."""
    others = [other for other in all_steps(directory) if other != step]
    advice = f"Pass step= for another one: {others}" if others else "It is the only one there"
    return DamagedError(f"checkpoint {step} in {directory} is damaged: {problem}. {advice}")


def not_written(directory: PathLike, step: int, error: Exception) -> OSError:
    """An error that names the checkpoint; what there is of it already is removed, since it takes up room."""
    for part in Path(directory).absolute().glob(f"{step}.orbax-checkpoint-tmp*"):
        shutil.rmtree(part, ignore_errors=True)
    text = str(error)
    text = text if len(text) < 300 else f"{text[:150]} ... {text[-150:]}"  # the end says what the system said
    return OSError(
        f"checkpoint {step} could not be written to {directory}: {type(error).__name__}: {text}. Those before it are as they were"
    )


@contextlib.contextmanager
def naming_leaves(directory: PathLike, step: int, names: list[str]) -> Iterator[None]:
    """Turns whatever goes wrong inside into an error that names the leaves that cannot be read."""
    try:
        yield
    except Exception as error:
        unreadable = _unreadable(Path(directory).absolute() / str(step) / "arrays", names)
        what = listed(unreadable) if unreadable else "the list of its arrays"
        problem = f"{what} cannot be read. {type(error).__name__}: {str(error)[:300]}"
        raise damaged(directory, step, problem) from error


def _unreadable(arrays: Path, names: list[str]) -> list[str]:
    """The arrays that cannot be read, by path: each is tried by itself, since all of them together fail as one."""
    failed = []
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for name in names:
            how = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
            only = ocp.args.PyTreeRestore(item={name: 0}, restore_args=how, partial_restore=True)
            try:
                reader.restore(arrays, args=only)
            except Exception:
                failed.append(name)
    return failed


def listed(names: list[str]) -> str:
    """The first few of them, as ``leaf 'a'`` or ``leaves 'a', 'b', ...``."""
    first = ", ".join(repr(name) for name in names[:5])
    return (
        f"leaf {first}" if len(names) == 1 else f"leaves {first}" + (f" and {len(names) - 5} more" * (len(names) > 5))
    )
