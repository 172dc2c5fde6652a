"""Checkpoints of networks whose kernels change their shapes: arrays by path, true ranks beside them.

A checkpoint is one directory of orbax, ``DIRECTORY/STEP``, written under a temporary name and renamed when it is
complete. Arrays are stored by their path in the tree, so they are found again whatever containers the tree is made of,
and at the shapes they had; the ranks in use, a checksum of every array and the caller's own metadata are JSON beside
them. Nothing in it depends on the devices that the arrays were on: it is restored on any number of them. Of several
processes (``jax.distributed``) all call :func:`save`, on a directory that all see, and the first one writes; each reads by
itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tdlrt_jax.arguments import check_integer, check_mapping, check_path, shown
from tdlrt_jax.optimizer import TdlrtState
from tdlrt_jax.paths import path_name
from tdlrt_jax.tucker import active_rank, is_tucker

__all__ = ["DamagedError", "all_steps", "ranks", "restore", "save"]

PathLike = str | os.PathLike[str]
_FORMAT = 1


class DamagedError(ValueError):
    """A checkpoint that is not what was saved; the message names what is lost, and the other checkpoints there."""


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
    _check_metadata(metadata)
    _check_tree("tree", tree)
    arrays = {name: _to_host(leaf) for name, leaf in _leaves(tree).items()}
    # Orbax stores no arrays without entries; their shapes say all of them.
    empty = {name: [list(array.shape), str(array.dtype)] for name, array in arrays.items() if not array.size}
    description: dict[str, Any] = {
        "format": _FORMAT,
        "ranks": _ranks(tree),
        "checksums": {name: _checksum(array) for name, array in arrays.items()},
        "metadata": dict(metadata or {}),
        **({"empty": empty} if empty else {}),
    }
    description["checksum"] = _json_checksum(description)
    with _manager(directory, keep=keep, writing=True) as manager:
        if step in manager.all_steps():
            raise ValueError(f"step={step} has a checkpoint already in {directory}: use another step")
        items: dict[str, Any] = {"description": ocp.args.JsonSave(description)}
        if filled := {name: array for name, array in arrays.items() if array.size}:
            items["arrays"] = ocp.args.StandardSave(filled)
        try:
            manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise _not_written(directory, step, error) from error
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
    _check_tree("like", like)
    step = _existing_step(directory, step)
    where = f"checkpoint {step} in {directory}"
    _check_links(directory, step)
    wanted = _leaves(like)
    with _manager(directory) as manager:
        description = _description(manager, directory, step)
        checksums, empty = description["checksums"], _empty_arrays(description, directory, step)
        filled = [name for name in checksums if name not in empty]
        stored: dict[str, Any] = {}
        if filled:
            with _naming_leaves(directory, step, filled):
                # None where the file that lists the arrays is missing.
                stored = dict(manager.item_metadata(step)["arrays"] or {})
        stored |= empty
        lost = sorted(checksums.keys() ^ stored.keys())
        if lost:
            raise _damaged(directory, step, f"{_listed(lost)}: the list of arrays is not the one that was saved")
        absent = _younger(like) - stored.keys()
        _check_names(where, set(wanted) - absent, set(stored))
        free = _free_axes(like)
        for name in wanted.keys() - absent:
            _check_leaf(where, name, wanted[name], stored[name], free.get(name, {}))
        # As NumPy arrays: a checkpoint written on one kind of device is read on any other.
        arrays = {name: np.zeros(item.shape, item.dtype) for name, item in empty.items()}
        target = {name: np.broadcast_to(np.zeros((), stored[name].dtype), stored[name].shape) for name in filled}
        if target:
            with _naming_leaves(directory, step, filled):
                items = ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
                arrays |= manager.restore(step, args=items)["arrays"]
    altered = [name for name in stored if _checksum(np.asarray(arrays[name])) != checksums[name]]
    if altered:
        raise _damaged(directory, step, f"{_listed(altered)}: not what was saved")
    arrays |= {name: np.zeros(_data(wanted[name]).shape, _data(wanted[name]).dtype) for name in absent}
    leaves = [_to_device(np.asarray(arrays[name]), leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), description["metadata"]


def ranks(directory: PathLike, step: int | None = None) -> dict[str, list[int]]:
    """The ranks in use of every Tucker kernel in a checkpoint, by path, without reading arrays."""
    step = _existing_step(directory, step)
    _check_links(directory, step)
    with _manager(directory) as manager:
        return _description(manager, directory, step)["ranks"]


def all_steps(directory: PathLike) -> list[int]:
    """The steps that have a complete checkpoint, ascending; empty if there is no such directory."""
    check_path("directory", directory)
    if not Path(directory).is_dir():
        return []
    with _manager(directory) as manager:
        return sorted(manager.all_steps())


def _manager(directory: PathLike, *, keep: int | None = None, writing: bool = False) -> ocp.CheckpointManager:
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


def _description(manager: ocp.CheckpointManager, directory: PathLike, step: int) -> dict[str, Any]:
    """What is stored beside the arrays."""
    try:
        description = manager.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore()))["description"]
        version, checksum = description["format"], description.pop("checksum", None)
    except Exception as error:
        raise _damaged(
            directory, step, f"ranks and checksums cannot be read. {type(error).__name__}: {error}"
        ) from error
    if version != _FORMAT:
        raise ValueError(
            f"checkpoint {step} in {directory} has format {version}, written by another version of tdlrt_jax; this one reads "
            f"format {_FORMAT}"
        )
    try:
        _check_description(description)
    except (ValueError, RecursionError) as error:
        raise _damaged(directory, step, f"ranks, checksums or metadata cannot be used. {error}") from None
    # Checkpoints of the first versions have no checksum of the description itself.
    if checksum is not None and checksum != _json_checksum(description):
        raise _damaged(directory, step, "ranks, checksums or metadata are not what was saved")
    return description


def _empty_arrays(description: Mapping[str, Any], directory: PathLike, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays without entries, by path."""
    try:
        found = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for name, (shape, dtype) in description.get("empty", {}).items()
        }
        if all(0 in struct.shape and name in description["checksums"] for name, struct in found.items()):
            return found
        problem = "an array that is listed as empty has entries, or no checksum"
    except (TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise _damaged(directory, step, f"the list of arrays without entries cannot be used. {problem}")


def _check_description(description: Any) -> None:
    """Raises ``ValueError`` unless everything has the type with which it was written."""

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    checksums, ranks, metadata = (description.get(name) for name in ("checksums", "ranks", "metadata"))
    if not isinstance(checksums, dict) or not all(is_count(value) for value in checksums.values()):
        raise ValueError("The checksums are not one number for every array")
    if not isinstance(metadata, dict):
        raise ValueError(f"The metadata is a {type(metadata).__name__}")
    lists = isinstance(ranks, dict) and all(isinstance(value, list) for value in ranks.values())
    if not lists or not all(is_count(entry) for value in ranks.values() for entry in value):
        raise ValueError("The ranks are not lists of counts")


def _check_links(directory: PathLike, step: int) -> None:
    """Raises ``ValueError`` for a link that leads out of the checkpoints' directory: nothing there is read."""
    home, folder = Path(directory).resolve(), Path(directory) / str(step)
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise ValueError(
                f"checkpoint {step} in {directory} has a link to {path.resolve()}, outside of it, and was not read: expected "
                f"files alone. If it is meant, put what {path} leads to in its place"
            )


def _json_checksum(description: Mapping[str, Any]) -> int:
    """Of the content, not of the text: as JSON gives it back."""
    plain = json.loads(json.dumps(description))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def _existing_step(directory: PathLike, step: int | None) -> int:
    if step is not None:
        step = check_integer("step", step, 0, "None or the number of a checkpoint")
    steps = all_steps(directory)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}: there are {steps}")
    return steps[-1] if step is None else step


def _check_metadata(metadata: Any) -> None:
    check_mapping("metadata", {} if metadata is None else metadata, "which JSON can hold")
    try:
        json.dumps(dict(metadata or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata must be what JSON can hold: {error}") from None


def _check_tree(argument: str, tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise ValueError(
                f"{argument} has the leaf {path_name(path)!r}, {shown(leaf)}: expected arrays, scalars and PRNG keys"
            )
        if isinstance(leaf, np.ndarray) and leaf.dtype.hasobject:
            raise ValueError(f"{argument} has the leaf {path_name(path)!r} of Python objects: expected numbers")


def _leaves(tree: Any) -> dict[str, Any]:
    """All leaves by their path, in the order of the tree."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in named:
            raise ValueError(f"two leaves have the path {name!r}: rename one of the containers' keys")
        named[name] = leaf
    return named


def _free_axes(tree: Any) -> dict[str, dict[int, int]]:
    """For every array of a Tucker kernel, by path, the axes whose length is a capacity, and the most that it can be."""
    free: dict[str, dict[int, int]] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_tucker):
        if is_tucker(node):
            order = len(node.factors)
            stacked = node.core.ndim - order
            modes = {stacked + mode: u.shape[-2] for mode, u in enumerate(node.factors) if u is not None and u.ndim > 1}
            for inner, leaf in jax.tree_util.tree_leaves_with_path(node):
                if leaf is node.core:
                    free[path_name((*path, *inner))] = modes
                elif leaf.ndim > 1:
                    free[path_name((*path, *inner))] = {leaf.ndim - 1: leaf.shape[-2]}
    return free


def _ranks(tree: Any) -> dict[str, list[int]]:
    """Ranks of the kernels; moments inside an optimizer state have the form of kernels, but no rank of their own."""

    def is_leaf(node: Any) -> bool:
        return is_tucker(node) or isinstance(node, TdlrtState)

    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {path_name(path): np.asarray(active_rank(node)).tolist() for path, node in nodes if is_tucker(node)}


def _younger(tree: Any) -> set[str]:
    """Paths of what checkpoints of earlier versions lack, and that starts as zero: the count of a :class:`TdlrtState`."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, TdlrtState))
    skipped = jax.tree_util.GetAttrKey("skipped")
    return {path_name((*path, skipped)) for path, node in nodes if isinstance(node, TdlrtState)}


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


_key_data = jax.jit(jax.random.key_data)  # once: jax keeps the trace of every function that eval_shape is given


def _data(leaf: Any) -> Any:
    """Shape and dtype under which a leaf is stored: PRNG keys as their raw data."""
    if _is_key(leaf):
        return jax.eval_shape(_key_data, leaf)
    shape = leaf.shape if hasattr(leaf, "shape") else np.shape(leaf)
    return jax.ShapeDtypeStruct(shape, jnp.result_type(leaf))


def _to_host(leaf: Any) -> np.ndarray:
    array = jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
    if not (array.is_fully_addressable or array.is_fully_replicated):  # parts of it are in other processes
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _to_device(array: np.ndarray, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    sharding = getattr(like, "sharding", None)
    # Another capacity may not divide evenly among devices; then the default device holds it and the caller places it.
    if sharding is None or like.shape != array.shape:
        return jax.device_put(array)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.tobytes())


def _check_names(where: str, wanted: set[str], stored: set[str]) -> None:
    for names, text in (
        (wanted - stored, "lacks"),
        (stored - wanted, "has, without a place for it in the given tree,"),
    ):
        if names:
            raise ValueError(
                f"{where} {text} {_listed(sorted(names))}: was it saved from another model, or with another optimizer or other "
                "options of it? Build the given tree as it was built then"
            )


def _check_leaf(where: str, name: str, leaf: Any, stored: Any, free: Mapping[int, int]) -> None:
    """Raises unless the stored array has the dtype and the shape that is wanted; ``free`` axes have a highest length."""
    like = _data(leaf)
    expected, found = tuple(like.shape), tuple(stored.shape)
    if len(expected) != len(found) or any(
        not 0 <= b <= free[axis] if axis in free else a != b for axis, (a, b) in enumerate(zip(expected, found))
    ):
        raise ValueError(
            f"{where}: leaf {name!r} has shape {found}, the given tree {expected}: was it saved from another model?"
        )
    if np.dtype(stored.dtype) != np.dtype(like.dtype):
        raise ValueError(
            f"{where}: leaf {name!r} has dtype {stored.dtype}, the given tree {like.dtype}: build it with "
            "the dtype that was saved, and cast what comes back"
        )


def _listed(names: list[str]) -> str:
    """The first few of them, as ``leaf 'a'`` or ``leaves 'a', 'b', ...``."""
    listed = ", ".join(repr(name) for name in names[:5])
    return (
        f"leaf {listed}" if len(names) == 1 else f"leaves {listed}" + (f" and {len(names) - 5} more" * (len(names) > 5))
    )


@contextlib.contextmanager
def _naming_leaves(directory: PathLike, step: int, names: list[str]) -> Iterator[None]:
    """Turns whatever goes wrong inside into an error that names the leaves that cannot be read."""
    try:
        yield
    except Exception as error:
        unreadable = _unreadable(Path(directory).absolute() / str(step) / "arrays", names)
        what = _listed(unreadable) if unreadable else "the list of its arrays"
        problem = f"{what} cannot be read. {type(error).__name__}: {str(error)[:300]}"
        raise _damaged(directory, step, problem) from error


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


def _not_written(directory: PathLike, step: int, error: Exception) -> OSError:
    """An error that names the checkpoint; what there is of it already is removed, since it takes up room."""
    for part in Path(directory).absolute().glob(f"{step}.*"):
        shutil.rmtree(part, ignore_errors=True)
    text = str(error)
    text = text if len(text) < 300 else f"{text[:150]} ... {text[-150:]}"  # the end says what the system said
    return OSError(
        f"checkpoint {step} could not be written to {directory}: {type(error).__name__}: {text}. Those before it are as they were"
    )


def _damaged(directory: PathLike, step: int, problem: str) -> DamagedError:
    others = [other for other in all_steps(directory) if other != step]
    advice = f"Pass step= for another one: {others}" if others else "It is the only one there"
    return DamagedError(f"checkpoint {step} in {directory} is damaged: {problem}. {advice}")
