"""The leaves of a tree under their paths: which of them may have which shape, and their way to the host and back."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tdlrt_jax.arguments import shown
from tdlrt_jax.budget import BudgetState
from tdlrt_jax.checkpoint.damage import listed
from tdlrt_jax.optimizer import TdlrtState
from tdlrt_jax.paths import kernels_in_parts, path_name
from tdlrt_jax.tucker import active_rank, is_tucker

__all__ = [
    "check_leaf",
    "check_names",
    "check_tree",
    "checksum",
    "free_axes",
    "kernel_ranks",
    "named_leaves",
    "stored_form",
    "to_device",
    "to_host",
    "younger",
]

_key_data = jax.jit(jax.random.key_data)  # once: jax keeps the trace of every function that eval_shape is given


def check_tree(argument: str, tree: Any) -> None:
    """Raises ``ValueError`` for a leaf that cannot be stored."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise ValueError(
                f"{argument} has the leaf {path_name(path)!r}, {shown(leaf)}: expected arrays, scalars and PRNG keys"
            )
        if isinstance(leaf, np.ndarray) and leaf.dtype.hasobject:
            raise ValueError(f"{argument} has the leaf {path_name(path)!r} of Python objects: expected numbers")
        if isinstance(leaf, int | float) and not _fits(leaf):
            raise ValueError(
                f"{argument} has the leaf {path_name(path)!r}, {shown(leaf)}, which {jnp.result_type(leaf)} does not hold: "
                f"give a NumPy number, which stays what it is, such as np.{type(leaf).__name__}64({leaf})"
            )


def named_leaves(tree: Any) -> dict[str, Any]:
    """All leaves by their path, in the order of the tree."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in named:
            raise ValueError(f"two leaves have the path {name!r}: rename one of the containers' keys")
        named[name] = leaf
    return named


def free_axes(tree: Any) -> dict[str, dict[int, int]]:
    """For every array of a Tucker kernel, by path, the axes whose length is a capacity, and the most that it can be."""
    free: dict[str, dict[int, int]] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_tucker):
        if is_tucker(node) and jax.tree.leaves(node):  # there are none of another label's parameters, in a partition
            order = len(node.factors)
            stacked = node.core.ndim - order
            modes = {stacked + mode: u.shape[-2] for mode, u in enumerate(node.factors) if u is not None and u.ndim > 1}
            for inner, leaf in jax.tree_util.tree_leaves_with_path(node):
                if leaf is node.core:
                    free[path_name((*path, *inner))] = modes
                elif leaf.ndim > 1:
                    free[path_name((*path, *inner))] = {leaf.ndim - 1: leaf.shape[-2]}
    for name, _, factors in kernels_in_parts(tree).values():
        for other, factor in factors.items():
            if np.ndim(factor) == 2:
                mode = int(other.removesuffix("/value").rpartition("/")[2])
                free.setdefault(name, {})[mode] = factor.shape[-2]
                free[other] = {1: factor.shape[-2]}
    return free


def kernel_ranks(tree: Any) -> dict[str, list[int]]:
    """Ranks of the kernels; moments inside an optimizer state have the form of kernels, but no rank of their own."""

    def is_leaf(node: Any) -> bool:
        return is_tucker(node) or isinstance(node, TdlrtState)

    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    kernels = [(path, node) for path, node in nodes if is_tucker(node) and jax.tree.leaves(node)]
    return {path_name(path): np.asarray(active_rank(node)).tolist() for path, node in kernels}


def younger(tree: Any) -> set[str]:
    """Paths of what checkpoints of earlier versions lack, and that starts as zero: counts of optimizers' and budgets' states."""

    def of(kind: type, field: str) -> set[str]:
        nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, kind))
        return {path_name((*path, jax.tree_util.GetAttrKey(field))) for path, node in nodes if isinstance(node, kind)}

    return of(TdlrtState, "skipped") | of(BudgetState, "look")


def _fits(number: float) -> bool:
    """Whether a Python number is one in the dtype that JAX makes of it, up to rounding."""
    kind = jnp.result_type(number)
    if isinstance(number, bool) or not math.isfinite(number):
        return True
    limits = np.iinfo(kind) if isinstance(number, int) else np.finfo(kind)
    low, high = map(type(number), (limits.min, limits.max))
    return low <= number <= high


def _is_numpy(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | np.generic)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored_form(leaf: Any) -> Any:
    """Shape and dtype under which a leaf is stored: PRNG keys as their raw data, NumPy's numbers as they are."""
    if _is_key(leaf):
        return jax.eval_shape(_key_data, leaf)
    if _is_numpy(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    shape = leaf.shape if hasattr(leaf, "shape") else np.shape(leaf)
    return jax.ShapeDtypeStruct(shape, jnp.result_type(leaf))


def to_host(leaf: Any) -> np.ndarray:
    """The whole array, whichever devices and processes have it; of PRNG keys the raw data."""
    if _is_numpy(leaf):
        return np.asarray(leaf)
    array = jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
    if not (array.is_fully_addressable or array.is_fully_replicated):  # parts of it are in other processes
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def to_device(array: np.ndarray, like: Any) -> Any:
    """Back to where, and as what, ``like`` is."""
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(jnp.zeros((), like.dtype)))
    if _is_numpy(like):
        return array.astype(like.dtype)[() if isinstance(like, np.generic) else ...]
    sharding = getattr(like, "sharding", None)
    # Another capacity may not divide evenly among devices; then the default device holds it and the caller places it.
    if sharding is None or like.shape != array.shape:
        return jax.device_put(array)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def checksum(array: np.ndarray) -> int:
    """Of the bytes."""
    return zlib.crc32(array.tobytes())


def check_names(where: str, wanted: set[str], stored: set[str]) -> None:
    """Raises ``ValueError`` for leaves that are missing or left over."""
    for names, text in (
        (wanted - stored, "lacks"),
        (stored - wanted, "has, without a place for it in the given tree,"),
    ):
        if names:
            raise ValueError(
                f"{where} {text} {listed(sorted(names))}: was it saved from another model, or with another optimizer or other "
                "options of it? Build the given tree as it was built then"
            )


def check_leaf(where: str, name: str, leaf: Any, stored: Any, free: Mapping[int, int]) -> None:
    """Raises unless the stored array has the dtype and the shape that is wanted; ``free`` axes have a highest length."""
    like = stored_form(leaf)
    expected, found = tuple(like.shape), tuple(stored.shape)
    if len(expected) != len(found) or any(
        not 0 <= b <= free[axis] if axis in free else a != b for axis, (a, b) in enumerate(zip(expected, found))
    ):
        raise ValueError(
            f"{where}: leaf {name!r} has shape {found}, the given tree {expected}: was it saved from another model?"
        )
    # Of what is NumPy's, earlier versions stored what JAX makes of it.
    fitting = {like.dtype, jax.dtypes.canonicalize_dtype(like.dtype)} if _is_numpy(leaf) else {like.dtype}
    if np.dtype(stored.dtype) not in map(np.dtype, fitting):
        raise ValueError(
            f"{where}: leaf {name!r} has dtype {stored.dtype}, the given tree {like.dtype}: build it with "
            "the dtype that was saved, and cast what comes back"
        )
