"""Saving and restoring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tdlrt_jax.arguments import check_integer, check_path
from tdlrt_jax.checkpoint.damage import damaged, listed, naming_leaves, not_written
from tdlrt_jax.checkpoint.description import FORMAT, check_metadata, empty_arrays, json_checksum, read_description
from tdlrt_jax.checkpoint.directory import PathLike, check_links, existing_step, open_manager
from tdlrt_jax.checkpoint.leaves import (
    check_leaf,
    check_names,
    check_tree,
    checksum,
    free_axes,
    kernel_ranks,
    named_leaves,
    stored_form,
    to_device,
    to_host,
    younger,
)

__all__ = ["ranks", "restore", "save"]


def save(
    directory: PathLike, step: int, tree: Any, metadata: Mapping[str, Any] | None = None, *, keep: int | None = None
) -> Path:
    """Saves a pytree (parameters, optimizer state, model state, alone or together) as one checkpoint.

    Args:
      directory: of all checkpoints of a run; made if need be.
      step: number of the checkpoint, 0 or more; restored without a step, the highest one is taken.
      tree: arrays, scalars and PRNG keys in any containers, Tucker kernels among them.
      metadata: whatever JSON can hold; :func:`restore` returns it.
      keep: delete the oldest checkpoints beyond so many; default all are kept.

    Returns:
      The checkpoint's directory. It exists only once it is complete: after an interrupted save the one before is the last.

    Raises:
      ValueError: for a step that exists already or is negative, or two leaves with one path.
      OSError: if it cannot be written: the disk is full, say. Those before it are as they were.

    Example:
      >>> import tempfile, jax.numpy as jnp, tdlrt_jax
      >>> from tdlrt_jax import checkpoint
      >>> params = {"kernel": tdlrt_jax.hosvd(jnp.ones((4, 3)), rank=1), "bias": jnp.zeros(3)}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = checkpoint.save(directory, 7, params, {"epoch": 1})
      ...     restored, metadata = checkpoint.restore(directory, params)
      ...     path.name, metadata, checkpoint.ranks(directory)
      ('7', {'epoch': 1}, {'kernel': [1, 1]})
    """
    check_path("directory", directory)
    step = check_integer("step", step, 0, "a number of steps")
    if keep is not None:
        check_integer("keep", keep, 1, "None or a number of checkpoints")
    check_metadata(metadata)
    check_tree("tree", tree)
    arrays = {name: to_host(leaf) for name, leaf in named_leaves(tree).items()}
    # Orbax stores no arrays without entries; their shapes say all of them.
    empty = {name: [list(array.shape), str(array.dtype)] for name, array in arrays.items() if not array.size}
    description: dict[str, Any] = {
        "format": FORMAT,
        "ranks": kernel_ranks(tree),
        "checksums": {name: checksum(array) for name, array in arrays.items()},
        "metadata": dict(metadata or {}),
        **({"empty": empty} if empty else {}),
    }
    description["checksum"] = json_checksum(description)
    with open_manager(directory, keep=keep, writing=True) as manager:
        if step in manager.all_steps():
            raise ValueError(f"step={step} has a checkpoint already in {directory}: use another step")
        items: dict[str, Any] = {"description": ocp.args.JsonSave(description)}
        if filled := {name: array for name, array in arrays.items() if array.size}:
            items["arrays"] = ocp.args.StandardSave(filled)
        try:
            manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise not_written(directory, step, error) from error
    return Path(directory).absolute() / str(step)


def restore(directory: PathLike, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Restores a checkpoint into the structure of ``like``, matching leaves by path.

    Arrays of Tucker kernels (and of optimizer moments, which are stored like them) come back at the *stored* capacity,
    whatever capacity ``like`` has; :func:`tdlrt_jax.resize` brings them to another one. All other shapes, and all
    dtypes, must be those of ``like``.

    Args:
      directory: as given to :func:`save`.
      like: a pytree such as a freshly built model's parameters, or ``jax.eval_shape`` of what builds it.
      step: which checkpoint; default the last.

    Returns:
      The pytree, each leaf on the device(s) of its counterpart in ``like``, and the metadata given to :func:`save`.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: for a leaf that is missing, left over, or of another shape or dtype; the message names it.
      DamagedError: a ``ValueError`` for a leaf that is not what was saved. Of the checkpoints before it, the last that does not
        raise this is the one to continue from.
    """
    check_tree("like", like)
    step = existing_step(directory, step)
    where = f"checkpoint {step} in {directory}"
    check_links(directory, step)
    wanted = named_leaves(like)
    with open_manager(directory) as manager:
        description = read_description(manager, directory, step)
        checksums, empty = description["checksums"], empty_arrays(description, directory, step)
        filled = [name for name in checksums if name not in empty]
        stored: dict[str, Any] = {}
        if filled:
            with naming_leaves(directory, step, filled):
                # None where the file that lists the arrays is missing.
                stored = dict(manager.item_metadata(step)["arrays"] or {})
        stored |= empty
        lost = sorted(checksums.keys() ^ stored.keys())
        if lost:
            raise damaged(directory, step, f"{listed(lost)}: the list of arrays is not the one that was saved")
        absent = younger(like) - stored.keys()
        check_names(where, set(wanted) - absent, set(stored))
        free = free_axes(like)
        for name in wanted.keys() - absent:
            check_leaf(where, name, wanted[name], stored[name], free.get(name, {}))
        # As NumPy arrays: a checkpoint written on one kind of device is read on any other.
        arrays = {name: np.zeros(item.shape, item.dtype) for name, item in empty.items()}
        target = {name: np.broadcast_to(np.zeros((), stored[name].dtype), stored[name].shape) for name in filled}
        if target:
            with naming_leaves(directory, step, filled):
                items = ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
                arrays |= manager.restore(step, args=items)["arrays"]
    altered = [name for name in stored if checksum(np.asarray(arrays[name])) != checksums[name]]
    if altered:
        raise damaged(directory, step, f"{listed(altered)}: not what was saved")
    arrays |= {name: np.zeros(stored_form(wanted[name]).shape, stored_form(wanted[name]).dtype) for name in absent}
    leaves = [to_device(np.asarray(arrays[name]), leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), description["metadata"]


def ranks(directory: PathLike, step: int | None = None) -> dict[str, list[int]]:
    """The ranks in use of every Tucker kernel in a checkpoint, by path, without reading arrays."""
    step = existing_step(directory, step)
    check_links(directory, step)
    with open_manager(directory) as manager:
        return read_description(manager, directory, step)["ranks"]
