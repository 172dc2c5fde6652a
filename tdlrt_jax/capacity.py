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

from tdlrt_jax.arguments import (
    check_concrete,
    check_integer,
    check_integers,
    check_mapping,
    check_number,
    shown,
)
from tdlrt_jax.optimizer import TdlrtState
from tdlrt_jax.paths import kernel_paths, kernels_in_parts, path_name
from tdlrt_jax.ranks import max_capacity
from tdlrt_jax.truncation import truncate
from tdlrt_jax.tucker import (
    HIGHEST,
    ModeArray,
    TuckerTensor,
    active_rank,
    capacity,
    check_kernel,
    is_tucker,
    kernel_shape,
    multi_mode_product,
    parameter_count,
)

__all__ = ["COMPILATION_STEPS", "array_bytes", "canonicalize", "fit_capacity", "full_kernels", "resize"]

Capacity = int | Sequence[int]

# What compiling a step anew costs, in steps: of "parallel", 110 (ResNet18) to 360 (AlexNet) on two CPU cores, see
# benchmarks/results/cpu.
COMPILATION_STEPS = 300
# Room for ranks to rise that may still do so.
HEADROOM = 1.5


def resize(tree: Any, capacity: Capacity | Mapping[str, Capacity]) -> Any:
    """Cuts or pads the arrays of Tucker kernels to other capacities; the tensors do not change.

    Works on parameters and on optimizer states alike: a moment is matched with the kernel whose path ends its own.

    Args:
      tree: a kernel, or any pytree with kernels in it. Host side, concrete values.
      capacity: for every kernel, one number for all modes or one a mode, both lowered to what is useful
        (``R_i <= prod_{j != i} R_j``); or a mapping from kernel paths to these, in which kernels that are not named keep theirs.
        Of a state of :func:`tdlrt_jax.tdlrt` they are the paths in the parameters, and may be of kernels without moments.

    Returns:
      The tree with resized kernels. Whole modes stay.

    Raises:
      ValueError: naming the kernel, if anything that is not zero would be cut, a capacity is impossible, or core and factors are
        there by themselves (those of ``nnx.state(optimizer)``; ``nnx.as_pure(optimizer.opt_state)`` has kernels).

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jnp.outer(jnp.arange(1.0, 4.0), jnp.ones(5)), tolerance=0.01)
      >>> resize(kernel, 1).core.shape
      (1, 1)
    """

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_tucker)
    check_concrete("tree", [node for _, node in leaves if is_tucker(node)])
    names = [path_name(path) for path, node in leaves if is_tucker(node)]
    kernels = _kernel_paths(tree) or names
    if parts := kernels_in_parts(tree):
        raise ValueError(
            f"tree has the parts of the kernel {next(iter(parts))!r}, core and factors, by themselves: expected a TuckerTensor "
            "of them. Of an nnx.Optimizer, nnx.as_pure(optimizer.opt_state) has them so, and nnx.state(optimizer) has not"
        )
    if isinstance(capacity, Mapping):
        if list(capacity) == ["kernel"] and not any(_ends(name, "kernel") for name in names):
            capacity = capacity["kernel"]  # the parameters are one kernel, whose empty path ends every other
        else:
            for key in capacity:
                if names and not any(_ends(name, key) for name in [*names, *kernels]):
                    raise ValueError(f"capacity names {key!r}, which ends no kernel's path; the paths are {names}")
    elif isinstance(capacity, str) or not isinstance(capacity, int | np.integer | Sequence | np.ndarray):
        raise ValueError(
            f"capacity={shown(capacity)}: expected one number for all modes, one a mode, or a mapping from kernel paths to these"
        )

    def resize_node(path: tuple, node: Any) -> Any:
        arrays = jax.tree.leaves(node)  # there are none of another label's parameters, in a partition
        if not is_tucker(node) or not arrays or any(jnp.ndim(leaf) == 0 for leaf in arrays):
            return node
        wanted = _wanted(path_name(path), capacity, kernels)
        return node if wanted is None else _resize_kernel(path_name(path), node, wanted)

    return jax.tree_util.tree_map_with_path(resize_node, tree, is_leaf=is_tucker)


def _ends(name: str, key: str) -> bool:
    name, key = _plain(name), _plain(key)
    return name == key or name.endswith("/" + key)


def _plain(name: str) -> str:
    return name.removesuffix("/value")  # of a flax Variable


def _kernel_paths(tree: Any) -> list[str]:
    """Of the parameters whose moments a tree has, as far as states of tdlrt in it say so."""
    states = [node for node in jax.tree.leaves(tree, is_leaf=_has_ranks) if _has_ranks(node)]
    return [name for state in states for name in state.rank]


def _has_ranks(node: Any) -> bool:
    return isinstance(node, TdlrtState)


def _wanted(name: str, wanted: Capacity | Mapping[str, Capacity], kernels: Sequence[str]) -> Capacity | None:
    """What is asked for a kernel or a moment: for a mapping by the key that is the kernel's path, or the longest that ends it."""
    if not isinstance(wanted, Mapping):
        return wanted
    own = max((kernel for kernel in kernels if _ends(name, kernel)), key=len, default=name)
    others = {_plain(kernel) for kernel in kernels} - {_plain(own)}
    fits = [key for key in wanted if _ends(name, key) and _plain(key) not in others]
    return wanted[max(fits, key=len)] if fits else None


def _resize_kernel(name: str, kernel: TuckerTensor, wanted: Capacity) -> TuckerTensor:
    shape, present = kernel_shape(kernel), capacity(kernel)
    order = len(shape)
    if isinstance(wanted, int | np.integer) and not isinstance(wanted, bool):
        wanted = int(wanted)
        sizes = [min(n, wanted) for n in shape]
    else:
        sizes = list(wanted) if isinstance(wanted, Sequence | np.ndarray) else []
    integers = all(isinstance(size, int | np.integer) and not isinstance(size, bool) for size in sizes)
    if len(sizes) != order or not integers or any(not 1 <= size <= n for size, n in zip(sizes, shape)):
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
    headroom: float = HEADROOM,
    multiple: int = 8,
    hysteresis: float = 0.75,
    max_rank: Mapping[str, Sequence[int]] | None = None,
    grow: bool = True,
    steps_left: int | None = None,
    compilation_steps: int = COMPILATION_STEPS,
) -> dict[str, tuple[int, ...]]:
    """Proposes a capacity for every kernel from the ranks in use now; give it to :func:`resize`.

    Any change of shapes compiles the whole step anew, so the network is looked at as a whole. What fits a rank ``r`` is
    ``headroom * r`` rounded up, to a multiple but in small modes. If a rank fills its arrays and could be higher, all arrays
    take the sizes that fit. Else those that are larger than that shrink, all of them or none: if the arrays of all kernels
    together come to less than ``hysteresis`` times what they are.

    How often this happens, for any number of layers and of calls: let ``S`` be the numbers stored in the arrays of all kernels.
    Arrays that shrink take ``S`` below ``hysteresis * S``, so while ranks only fall this happens at most
    ``log(S_0 / S_1) / log(1 / hysteresis)`` times, from ``S_0`` of the first arrays down to ``S_1`` of those that fit ranks
    of 1 (or are smaller from the first); if a rank filled the first arrays there is one change more, at the beginning, and
    ``S_0`` and ``S_1`` are of those after it. Arrays that grow had their first size, or one with room for ``headroom`` times
    the rank of that moment.

    Args:
      params: any pytree with kernels; host side, concrete values.
      headroom: room for a rank ``r`` to rise: at least ``headroom * r`` columns; 1 or more.
      multiple: sizes are rounded up to a multiple of this (and down to what is useful for the kernel), but for modes with fewer
        than two multiples of it; 1 or more.
      hysteresis: the fraction, in (0, 1], of the present arrays that the fitting ones must stay below to be worth a compilation.
      max_rank: largest useful capacities by kernel path, one a mode, if there are bounds.
      grow: whether a rank that fills its arrays is a reason. Such a rank need not press: pass ``False`` where no step since the
        last call reported ``tdlrt_jax.status.RANK_AT_CAPACITY``.
      steps_left: how many steps are still to come, where that is known. Arrays then shrink only if the steps saved by it are more
        than a compilation costs: at the most the part of the numbers stored that goes, times the steps that are left. With none
        left there is nothing more to compile, and they shrink.
      compilation_steps: what a compilation costs, in steps: some hundreds on a CPU.

    Returns:
      Kernel path to capacities, one a mode; the present ones, all of them, where nothing is worth a change.

    Raises:
      ValueError: for an option outside of its range, or ``max_rank`` for a kernel that is not there.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> params = {"kernel": tdlrt_jax.hosvd(jnp.outer(jnp.arange(1.0, 65.0), jnp.ones(32)), tolerance=0.01)}
      >>> params["kernel"].core.shape, fit_capacity(params)
      ((32, 32), {'kernel': (8, 8)})
    """
    if not check_number("headroom", headroom, "a number, 1 or more") >= 1:
        raise ValueError(f"headroom={headroom} must be 1 or more: arrays have to hold the ranks in use")
    check_integer("multiple", multiple, 1, "a number of columns (1 for no rounding)")
    if not 0 < check_number("hysteresis", hysteresis, "a fraction in (0, 1]") <= 1:
        raise ValueError(
            f"hysteresis={hysteresis}: expected a fraction in (0, 1], 0.75 to shrink for a quarter or more"
        )
    if steps_left is not None:
        check_integer("steps_left", steps_left, 0, "None or a number of steps")
    check_integer("compilation_steps", compilation_steps, 0, "a number of steps")
    kernels = kernel_paths(params)
    limits = _limits(kernels, max_rank)
    ranks = _ranks(kernels)

    def useful(name: str, kernel: TuckerTensor, sizes: list[int]) -> tuple[int, ...]:
        lowered = max_capacity(kernel_shape(kernel), sizes)
        return tuple(r if u is None else max(r, s) for u, r, s in zip(kernel.factors, ranks[name], lowered))

    def fitting(name: str, kernel: TuckerTensor) -> tuple[int, ...]:
        # In modes of fewer than two multiples, spatial ones above all, rounding up to one would leave no size but the largest.
        units = [multiple if n >= 2 * multiple else 1 for n in kernel_shape(kernel)]
        # The small term keeps 1.1 * 10 = 11.000000000000002 from being rounded up to 12.
        columns = [math.ceil(headroom * r / unit - 1e-9) * unit for r, unit in zip(ranks[name], units)]
        sizes = [max(r, min(size, limit)) for r, size, limit in zip(ranks[name], columns, limits[name])]
        return useful(name, kernel, [r if u is None else s for u, r, s in zip(kernel.factors, ranks[name], sizes)])

    present = {name: capacity(kernel) for name, kernel in kernels.items()}
    fitted = {name: fitting(name, kernel) for name, kernel in kernels.items()}
    if grow and any(_is_full(ranks[name], present[name], limits[name]) for name in kernels):
        return fitted
    smaller = {
        name: useful(name, kernel, [min(size, fit) for size, fit in zip(present[name], fitted[name])])
        for name, kernel in kernels.items()
    }
    before, after = _stored(kernels, present), _stored(kernels, smaller)
    worth = not steps_left or (before - after) * steps_left > compilation_steps * before
    return smaller if after < hysteresis * before and worth else present


def full_kernels(params: Any, *, max_rank: Mapping[str, Sequence[int]] | None = None) -> list[str]:
    """Paths of the kernels with a rank that fills its arrays though it could be higher.

    These are the candidates where a step reports ``tdlrt_jax.status.RANK_AT_CAPACITY``, which says that there is a rank for
    which the tolerance asks for more.

    Args:
      params: any pytree with kernels; host side, concrete values.
      max_rank: largest useful capacities by kernel path, one a mode, if there are bounds; they are not full.

    Returns:
      The paths, in the order of the tree.

    Raises:
      ValueError: for ``max_rank`` of a kernel that is not there.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> full_kernels({"kernel": tdlrt_jax.hosvd(jnp.eye(4), rank=2)})
      ['kernel']
      >>> full_kernels({"kernel": tdlrt_jax.hosvd(jnp.eye(4), rank=4)})
      []
    """
    kernels = kernel_paths(params)
    limits, ranks = _limits(kernels, max_rank), _ranks(kernels)
    return [name for name, kernel in kernels.items() if _is_full(ranks[name], capacity(kernel), limits[name])]


def array_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree, padding included: what it occupies on its devices, one copy of each array counted.

    Args:
      tree: arrays, scalars and PRNG keys in any containers, or ``jax.eval_shape`` of what makes them.

    Returns:
      The sum over the leaves.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jnp.outer(jnp.arange(1.0, 4.0), jnp.ones(5)), tolerance=0.01)
      >>> array_bytes(kernel), array_bytes(resize(kernel, 1))
      (132, 36)
    """

    def size(leaf: Any) -> int:
        if not isinstance(leaf, int | float | complex | np.generic) and not hasattr(leaf, "dtype"):
            raise ValueError(f"tree has the leaf {shown(leaf)}: expected arrays, scalars and PRNG keys")
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _ranks(kernels: Mapping[str, TuckerTensor]) -> dict[str, list[int]]:
    """The ranks in use, counted by NumPy: many small arrays, for which eager operations of JAX take far longer."""
    check_concrete("params", kernels)
    return {
        name: [
            size if u is None else int(np.any(np.asarray(u) != 0, axis=0).sum())
            for size, u in zip(capacity(kernel), kernel.factors)
        ]
        for name, kernel in kernels.items()
    }


def _limits(
    kernels: Mapping[str, TuckerTensor], max_rank: Mapping[str, Sequence[int]] | None
) -> dict[str, tuple[int, ...]]:
    """The largest useful capacities of every kernel."""
    max_rank = max_rank or {}
    check_mapping("max_rank", max_rank, "from kernel paths to one size a mode")
    for name, bound in max_rank.items():
        if name not in kernels:
            raise ValueError(f"max_rank names {name!r}, which is no kernel's path; the paths are {list(kernels)}")
        bound = check_integers(f"max_rank[{name!r}]", bound, 1, what="sizes, one a mode")
        if len(bound) != len(kernels[name].factors):
            raise ValueError(
                f"max_rank[{name!r}]={tuple(bound)} has {len(bound)} entries: expected one a mode of a kernel of shape "
                f"{kernel_shape(kernels[name])}"
            )
    shapes = {name: kernel_shape(kernel) for name, kernel in kernels.items()}
    return {name: max_capacity(shape, max_rank.get(name, shape)) for name, shape in shapes.items()}


def _is_full(rank: Sequence[int], present: Sequence[int], limit: Sequence[int]) -> bool:
    return any(r >= size < n for r, size, n in zip(rank, present, limit))


def _stored(kernels: Mapping[str, TuckerTensor], sizes: Mapping[str, Sequence[int]]) -> int:
    """Numbers in the arrays of all kernels at the given capacities."""
    return sum(
        parameter_count(kernel_shape(kernel), sizes[name], [u is None for u in kernel.factors])
        for name, kernel in kernels.items()
    )


def canonicalize(kernel: TuckerTensor) -> TuckerTensor:
    """The same tensor with orthonormal factors and active columns first, for kernels that were set by hand or averaged.

    Args:
      kernel: any core and factors of matching shapes, ``R_i <= n_i``.

    Returns:
      A kernel of the same capacities, rotated so that its core is all-orthogonal with slices by descending energy. Directions
      that carry nothing are dropped. The core's dtype stays; factors are float32 at least.

    Raises:
      ValueError: for anything but a TuckerTensor whose core and factors fit each other.
    """
    check_kernel(kernel)
    fit = all(
        u is None or (jnp.ndim(u) == 2 and u.shape[1] == n) for n, u in zip(jnp.shape(kernel.core), kernel.factors)
    )
    if jnp.ndim(kernel.core) < 2 or jnp.ndim(kernel.core) != len(kernel.factors) or not fit:
        raise ValueError(
            f"kernel has a core of shape {jnp.shape(kernel.core)} and factors of shapes "
            f"{[jnp.shape(u) for u in kernel.factors]}: "
            "expected one factor a mode, (n_i, R_i) for a core (R_1, ..., R_d), or None"
        )
    core = kernel.core.astype(jnp.promote_types(kernel.core.dtype, jnp.float32))
    bases: list[ModeArray] = []
    for mode, factor in enumerate(kernel.factors):
        if factor is None:
            bases.append(None)
            continue
        q, triangular = jnp.linalg.qr(factor.astype(jnp.promote_types(factor.dtype, jnp.float32)))
        bases.append(q)
        core = multi_mode_product(core, [triangular if j == mode else None for j in range(core.ndim)])
    cut = truncate(core, 0.0, whole=tuple(u is None for u in kernel.factors))
    factors = [None if q is None else jnp.matmul(q, p, precision=HIGHEST) for q, p in zip(bases, cut.rotations)]
    return TuckerTensor(cut.core.astype(kernel.core.dtype), tuple(factors))
