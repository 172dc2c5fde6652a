"""Tucker tensors and their multilinear algebra.

A kernel ``W = C ×_1 U_1 ... ×_d U_d`` (equation (2) of the paper) is stored as its core ``C`` and its factors ``U_i``.
The arrays have a static *capacity*; the *rank* in use may be lower and is read from the data: columns of ``U_i`` and
slices of ``C`` beyond it are exactly zero and come last, so that every formula holds on the padded arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax.arguments import check_array, check_integers, shown

__all__ = [
    "ModeArray",
    "TuckerTensor",
    "active_rank",
    "capacity",
    "check_structure",
    "fold",
    "is_tucker",
    "kernel_shape",
    "magnitude",
    "mode_product",
    "multi_mode_product",
    "parameter_count",
    "rank_of",
    "to_dense",
    "unfold",
]

HIGHEST = jax.lax.Precision.HIGHEST

# What belongs to one mode (a factor, K_i, Q_i, a rotation, a mask): an array, or None for a whole mode. Which of the two follows
# from the kernel's structure, the same in all tuples of one kernel, and types cannot say so: to a type checker it is Any.
ModeArray: TypeAlias = Any


class TuckerTensor(NamedTuple):
    """A tensor in Tucker format, ``C ×_1 U_1 ... ×_d U_d`` (paper, equation (2)); a pytree.

    Convolution kernels keep JAX's layout ``(spatial..., in, out)``; a matrix is the case d = 2. A factor that is ``None``
    stands for the identity: that mode is *whole*, it is not compressed and costs nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = TuckerTensor(core=jnp.ones((1, 1)), factors=(jnp.ones((3, 1)), jnp.ones((2, 1))))
      >>> to_dense(kernel).shape
      (3, 2)
    """

    core: Array  # (R_1, ..., R_d), R_i the capacity of mode i
    factors: tuple[ModeArray, ...]  # (n_i, R_i) with orthonormal columns up to the rank; None for a whole mode


def _no_arithmetic(self: TuckerTensor, *_: Any) -> NoReturn:
    raise TypeError(
        "a TuckerTensor has no arithmetic (tuple arithmetic would be silently wrong): map over its arrays with "
        "jax.tree.map, or go through tdlrt_jax.to_dense(kernel)"
    )


# A NamedTuple's body allows a type checker no such assignments.
for _operator in ("__add__", "__radd__", "__mul__", "__rmul__", "__sub__", "__rsub__", "__truediv__"):
    setattr(TuckerTensor, _operator, _no_arithmetic)


def is_tucker(node: Any) -> bool:
    """Whether a pytree node is a :class:`TuckerTensor`; meant for ``is_leaf=``."""
    return isinstance(node, TuckerTensor)


def check_kernel(kernel: Any, who: str = "kernel") -> None:
    """Raises ``ValueError`` for anything but a :class:`TuckerTensor`."""
    if not isinstance(kernel, TuckerTensor):
        raise ValueError(
            f"{who} is {shown(kernel)}: expected a TuckerTensor, of a full tensor tdlrt_jax.hosvd makes one"
        )


def check_structure(kernel: TuckerTensor, name: str | None = None) -> None:
    """Raises ``ValueError`` unless core and factors fit together: one factor a mode, of shapes that a lift can work on.

    Only shapes are read, so it works under ``jit``.

    Args:
      kernel: core ``(R_1, ..., R_d)``, d >= 2, and factors ``(n_i, R_i)`` with ``R_i <= min(n_i, prod_{j != i} R_j)``, or None.
      name: the kernel's path, for the message.
    """
    who = "the kernel" if name is None else f"kernel {name!r}"
    check_kernel(kernel, who)
    core, factors = kernel.core, kernel.factors
    for part in (core, *(factor for factor in factors if factor is not None)):
        if not hasattr(part, "ndim"):
            raise ValueError(
                f"{who} holds a {type(part).__name__} where an array belongs: mask or label a kernel as a whole, with one entry "
                "for its core and factors together"
            )
    if core.ndim != len(factors) or core.ndim < 2:
        raise ValueError(
            f"{who} has a core with {core.ndim} modes and {len(factors)} factors: expected one factor a mode "
            "(None for a whole mode) and at least two modes"
        )
    for mode, (size, factor) in enumerate(zip(core.shape, factors)):
        if factor is None:
            continue
        if factor.ndim != 2 or factor.shape[1] != size or not 1 <= size <= factor.shape[0]:
            raise ValueError(
                f"{who}: factor {mode} has shape {factor.shape}, its core mode size {size}: expected (n, {size}) with "
                f"n >= {size} >= 1"
            )
        others = math.prod(core.shape[:mode] + core.shape[mode + 1 :])
        if size > others:
            raise ValueError(
                f"{who}: capacity {size} of mode {mode} exceeds the product {others} of the others (core shape "
                f"{core.shape}), so its unfolding cannot have that rank. "
                f"tdlrt_jax.resize(tdlrt_jax.canonicalize(kernel), {core.shape}) lowers it without changing the tensor"
            )


def _check_mode(mode: int, order: int) -> None:
    if not isinstance(mode, int) or not 0 <= mode < order:
        raise ValueError(f"mode={mode!r}: expected one of 0..{order - 1}, the modes of the tensor")


def unfold(tensor: Array, mode: int) -> Array:
    """``Mat_i``: the ``(n_i, prod_{j != i} n_j)`` matrix whose rows are the slices of mode ``i`` (paper, section 2.1)."""
    _check_mode(mode, check_array("tensor", tensor, modes=1).ndim)
    return jnp.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def fold(matrix: Array, mode: int, shape: Sequence[int]) -> Array:
    """``Ten_i``: the tensor of the given ``shape`` whose unfolding along ``mode`` is ``matrix``; inverse of :func:`unfold`."""
    _check_mode(mode, len(shape))
    rest = [n for axis, n in enumerate(shape) if axis != mode]
    if jnp.shape(matrix) != (shape[mode], math.prod(rest)):
        raise ValueError(
            f"matrix has shape {jnp.shape(matrix)}: expected the unfolding along mode {mode} of a tensor of shape "
            f"{tuple(shape)}, {(shape[mode], math.prod(rest))}"
        )
    return jnp.moveaxis(matrix.reshape(shape[mode], *rest), 0, mode)


def mode_product(tensor: Array, matrix: ModeArray, mode: int) -> Array:
    """``tensor ×_i matrix``: contracts mode ``i`` of ``tensor`` with the columns of an ``(m, n_i)`` matrix.

    ``None`` stands for the identity. Done at the highest precision: the product forms bases and cores.
    """
    if matrix is None:
        return tensor
    _check_mode(mode, tensor.ndim)
    if jnp.ndim(matrix) != 2 or matrix.shape[1] != tensor.shape[mode]:
        raise ValueError(
            f"matrix has shape {jnp.shape(matrix)}: expected (m, {tensor.shape[mode]}) for mode {mode} of a tensor of shape "
            f"{tensor.shape}"
        )
    product = jnp.tensordot(matrix, tensor, axes=(1, mode), precision=HIGHEST)
    return jnp.moveaxis(product, 0, mode)


def multi_mode_product(
    tensor: Array, matrices: Sequence[ModeArray], *, transpose: bool = False, skip: int | None = None
) -> Array:
    """``tensor ×_{j != skip} A_j``, or ``×_j A_j^T`` with ``transpose``.

    Args:
      tensor: d-dimensional.
      matrices: d matrices ``(m_j, n_j)``, ``(n_j, m_j)`` with ``transpose``; ``None`` for the identity.
      transpose: multiply by the transposed matrices.
      skip: a mode to leave alone.

    Returns:
      The product, contracted in the order in which intermediate results grow least.
    """

    sizes = [None if m is None else m.shape[0 if transpose else 1] for m in matrices]
    if len(sizes) != tensor.ndim or any(
        size not in (None, n) for mode, (size, n) in enumerate(zip(sizes, tensor.shape)) if mode != skip
    ):
        raise ValueError(
            f"matrices of shapes {[None if m is None else m.shape for m in matrices]} do not fit a tensor of shape "
            f"{tensor.shape}: expected one a mode, {'(n_j, m_j)' if transpose else '(m_j, n_j)'}, or None"
        )

    def growth(mode: int) -> float:
        matrix = matrices[mode]
        if matrix is None:
            return 1.0
        rows, columns = matrix.shape[::-1] if transpose else matrix.shape
        return rows / max(columns, 1)

    for mode in sorted(range(tensor.ndim), key=growth):
        matrix = matrices[mode]
        if mode != skip and matrix is not None:
            tensor = mode_product(tensor, matrix.T if transpose else matrix, mode)
    return tensor


def magnitude(array: Array) -> Array:
    """What to divide an array by so that its squares neither overflow nor vanish: its largest absolute value; 1 for zeros.

    At most what still has a normal reciprocal, by which XLA multiplies in the place of a division: the reciprocals of the very
    largest numbers are flushed to zero, and the array with them. The quotient is at most 16 then.
    """
    largest = jnp.max(jnp.abs(array))
    return jnp.where(largest > 0, jnp.minimum(largest, 1 / (4 * jnp.finfo(array.dtype).tiny)), 1)


def to_dense(kernel: Any) -> Array:
    """The full ``(n_1, ..., n_d)`` tensor of a :class:`TuckerTensor` or a :class:`~tdlrt_jax.frame.Frame`.

    For a TuckerTensor, ``W = C ×_j U_j`` (paper, equation (2)). For a Frame, the affine chart of the tangent space at ``W``
    in which Theorem 1 takes its derivatives; its value is the same ``W``. Arrays pass through.
    """
    if isinstance(kernel, TuckerTensor):
        return multi_mode_product(kernel.core, kernel.factors)
    if hasattr(kernel, "chart_to_dense"):
        return kernel.chart_to_dense()
    return check_array("kernel", kernel, "a TuckerTensor, a Frame or an array")


def kernel_shape(kernel: Any) -> tuple[int, ...]:
    """The shape ``(n_1, ..., n_d)`` of the full tensor that a TuckerTensor (or a Frame) stands for."""
    bases = kernel.factors if isinstance(kernel, TuckerTensor) else getattr(kernel, "U", None)
    if bases is None:
        raise ValueError(f"kernel is {shown(kernel)}: expected a TuckerTensor or a Frame (an array has kernel.shape)")
    return tuple(r if u is None else u.shape[-2] for r, u in zip(kernel.core.shape[-len(bases) :], bases))


def capacity(kernel: TuckerTensor) -> tuple[int, ...]:
    """The static capacities ``(R_1, ..., R_d)``: the shape of the core's array."""
    check_kernel(kernel)
    return tuple(kernel.core.shape[-len(kernel.factors) :])


def active_columns(factor: Array) -> Array:
    """Which columns of an ``(n, R)`` factor are in use: a boolean ``(R,)``; the others are exactly zero."""
    return jnp.any(factor != 0, axis=0)


def whole_sizes(kernel: TuckerTensor) -> tuple[int | None, ...]:
    """The sizes of the whole modes, None for the others."""
    return tuple(size if factor is None else None for size, factor in zip(kernel.core.shape, kernel.factors))


def active_rank(kernel: TuckerTensor) -> Array:
    """The ranks ``(r_1, ..., r_d)`` in use, an int32 ``(d,)``; ``n_i`` for a whole mode. Works under ``jit``.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = TuckerTensor(jnp.eye(2), (jnp.eye(3, 2), jnp.eye(4, 2)))
      >>> active_rank(kernel).tolist()
      [2, 2]
    """
    check_kernel(kernel)
    columns = [None if factor is None else active_columns(factor) for factor in kernel.factors]
    return rank_of(capacity(kernel), columns)


def rank_of(sizes: Sequence[int], columns: Sequence[ModeArray]) -> Array:
    """The same, given the core's sizes and which columns of each mode are in use; None for a whole mode."""
    pairs = zip(sizes, columns)
    return jnp.stack([jnp.int32(n) if used is None else jnp.sum(used, dtype=jnp.int32) for n, used in pairs])


def parameter_count(shape: Sequence[int], rank: Sequence[int], whole: Sequence[bool] | None = None) -> int:
    """Numbers to store for a Tucker tensor, ``prod r_i + sum n_i r_i`` (paper, section 2.1); whole modes have no factor.

    Example:
      >>> parameter_count((256, 256, 3, 3), (76, 76, 3, 3))  # the paper's AlexNet layer, 5.2e4 and the factors
      90914
    """
    shape = check_integers("shape", shape, 0, what="sizes, one a mode")
    rank = check_integers("rank", rank, 0, len(shape), "ranks, one a mode")
    whole = whole or (False,) * len(shape)
    if len(whole) != len(shape):
        raise ValueError(
            f"whole={tuple(whole)} has {len(whole)} entries: expected one a mode of a kernel of shape {shape}"
        )
    return math.prod(int(r) for r in rank) + sum(int(n) * int(r) for n, r, w in zip(shape, rank, whole) if not w)
