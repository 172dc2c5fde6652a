"""Static rank capacities: arrays shrink and grow as ranks do, and the optimizer's state follows.

Decided on the host at stated moments (the end of an epoch, say), since every change of shapes compiles the step anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tdlrt_jax.paths import kernel_paths, path_name
from tdlrt_jax.truncation import max_capacity, truncate
from tdlrt_jax.tucker import (
    HIGHEST,
    ModeArray,
    TuckerTensor,
    active_rank,
    capacity,
    is_tucker,
    kernel_shape,
    multi_mode_product,
)

__all__ = ["canonicalize", "fit_capacity", "resize"]

Capacity = int | Sequence[int]


def resize(tree: Any, capacity: Capacity | Mapping[str, Capacity]) -> Any:
    """Cuts or pads the arrays of Tucker kernels to other capacities; the tensors do not change.

    Works on parameters and on optimizer states alike: a moment is matched with the kernel whose path ends its own.

    Args:
      tree: a kernel, or any pytree with kernels in it. Host side, concrete values.
      capacity: for every kernel, one number for all modes or one a mode, both lowered to what is useful
        (``R_i <= prod_{j != i} R_j``); or a mapping from kernel paths to these, in which kernels that are not named keep theirs.

    Returns:
      The tree with resized kernels. Whole modes stay.

    Raises:
      ValueError: naming the kernel, if anything that is not zero would be cut, or a capacity is impossible.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jnp.outer(jnp.arange(1.0, 4.0), jnp.ones(5)), tolerance=0.01)
      >>> resize(kernel, 1).core.shape
      (1, 1)
    """

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_tucker)
    names = [path_name(path) for path, node in leaves if is_tucker(node)]
    if isinstance(capacity, Mapping):
        if list(capacity) == ["kernel"] and not any(_ends(name, "kernel") for name in names):
            capacity = capacity["kernel"]  # the parameters are one kernel, whose empty path ends every other
        else:
            for key in capacity:
                if names and not any(_ends(name, key) for name in names):
                    raise ValueError(f"capacity names {key!r}, which ends no kernel's path; the paths are {names}")

    def resize_node(path: tuple, node: Any) -> Any:
        if not is_tucker(node) or any(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(node)):
            return node
        wanted = _wanted(path_name(path), capacity)
        return node if wanted is None else _resize_kernel(path_name(path), node, wanted)

    return jax.tree_util.tree_map_with_path(resize_node, tree, is_leaf=is_tucker)


def _ends(name: str, key: str) -> bool:
    return name == key or name.endswith("/" + key)


def _wanted(name: str, wanted: Capacity | Mapping[str, Capacity]) -> Capacity | None:
    """What is asked for a kernel: by the longest key that ends its path, for a mapping."""
    if not isinstance(wanted, Mapping):
        return wanted
    fits = [key for key in wanted if _ends(name, key)]
    return wanted[max(fits, key=len)] if fits else None


def _resize_kernel(name: str, kernel: TuckerTensor, wanted: Capacity) -> TuckerTensor:
    shape, present = kernel_shape(kernel), capacity(kernel)
    order = len(shape)
    sizes = [min(n, wanted) for n in shape] if isinstance(wanted, int) else list(wanted)
    if len(sizes) != order or any(not 1 <= size <= n for size, n in zip(sizes, shape)):
        raise ValueError(f"kernel {name!r} of shape {shape}: capacity {wanted} needs one number in 1..n a mode")
    useful = max_capacity(shape, [size if u is None else s for size, u, s in zip(present, kernel.factors, sizes)])
    sizes = [size if u is None else s for size, u, s in zip(present, kernel.factors, useful)]

    def fit(array: Array, targets: Sequence[int]) -> Array:
        for axis, target in enumerate(targets):
            cut = jax.lax.slice_in_dim(array, min(target, array.shape[axis]), array.shape[axis], axis=axis)
            if np.any(np.asarray(cut) != 0):
                raise ValueError(
                    f"kernel {name!r}: capacity {target} on axis {axis} would cut entries that are not zero (shape "
                    f"{array.shape}, ranks {_ranks_text(kernel)}): truncate first, or ask for at least the active rank"
                )
            array = jax.lax.slice_in_dim(array, 0, min(target, array.shape[axis]), axis=axis)
        return jnp.pad(array, [(0, target - have) for target, have in zip(targets, array.shape)])

    core = fit(kernel.core, sizes)
    factors = [None if u is None else fit(u, (u.shape[0], size)) for u, size in zip(kernel.factors, sizes)]
    return TuckerTensor(core, tuple(factors))


def _ranks_text(kernel: TuckerTensor) -> str:
    return str(tuple(np.asarray(active_rank(kernel)).tolist()))


def fit_capacity(
    params: Any,
    *,
    headroom: float = 1.5,
    multiple: int = 8,
    hysteresis: float = 0.75,
    max_rank: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Proposes a capacity for every kernel from the ranks in use now; give it to :func:`resize`.

    Args:
      params: any pytree with kernels.
      headroom: room for a rank ``r`` to rise: at least ``headroom * r`` columns.
      multiple: sizes are rounded up to a multiple of this (and down to what is useful for the kernel).
      hysteresis: arrays shrink only if the proposal needs less than this fraction of the core's present size, and grow only if a
        rank fills its capacity, so that the step is compiled anew a few times in a run and not at every change.
      max_rank: largest useful capacities by kernel path, if there are bounds.

    Returns:
      Kernel path to capacities; the present ones where nothing is worth a change.
    """
    proposal = {}
    for name, kernel in kernel_paths(params).items():
        shape, present = kernel_shape(kernel), capacity(kernel)
        limit = max_capacity(shape, (max_rank or {}).get(name, shape))
        ranks = np.asarray(active_rank(kernel)).tolist()
        rounded = [min(n, math.ceil(headroom * r / multiple) * multiple) for r, n in zip(ranks, limit)]
        rounded = [size if u is None else max(r, c) for size, u, r, c in zip(present, kernel.factors, ranks, rounded)]
        proposed = tuple(max(r, c) for r, c in zip(ranks, max_capacity(shape, rounded)))
        full = any(r >= size < n for r, size, n in zip(ranks, present, limit))
        shrinks = math.prod(proposed) < hysteresis * math.prod(present)
        proposal[name] = (
            tuple(max(p, q) for p, q in zip(present, proposed)) if full else proposed if shrinks else present
        )
    return proposal


def canonicalize(kernel: TuckerTensor) -> TuckerTensor:
    """The same tensor with orthonormal factors and active columns first, for kernels that were set by hand or averaged.

    Args:
      kernel: any core and factors of matching shapes, ``R_i <= n_i``.

    Returns:
      A kernel of the same capacities, rotated so that its core is all-orthogonal with slices by descending energy. Directions
      that carry nothing are dropped.
    """
    core = kernel.core
    bases: list[ModeArray] = []
    for mode, factor in enumerate(kernel.factors):
        if factor is None:
            bases.append(None)
            continue
        q, triangular = jnp.linalg.qr(factor)
        bases.append(q)
        core = multi_mode_product(core, [triangular if j == mode else None for j in range(core.ndim)])
    cut = truncate(core, 0.0, whole=tuple(u is None for u in kernel.factors))
    factors = [None if q is None else jnp.matmul(q, p, precision=HIGHEST) for q, p in zip(bases, cut.rotations)]
    return TuckerTensor(cut.core, tuple(factors))
