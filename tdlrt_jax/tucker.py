"""Tucker tensors and their multilinear algebra.

A kernel ``W = C ×_1 U_1 ... ×_d U_d`` (equation (2) of the paper) is stored as its core ``C`` and its factors ``U_i``.
The arrays have a static *capacity*; the *rank* in use may be lower and is read from the data: columns of ``U_i`` and
slices of ``C`` beyond it are exactly zero and come last, so that every formula holds on the padded arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import Array

__all__ = [
    "TuckerTensor",
    "active_rank",
    "capacity",
    "fold",
    "is_tucker",
    "kernel_shape",
    "mode_product",
    "multi_mode_product",
    "parameter_count",
    "to_dense",
    "unfold",
]

HIGHEST = jax.lax.Precision.HIGHEST


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
    factors: tuple[Array | None, ...]  # (n_i, R_i) with orthonormal columns up to the rank; None for a whole mode

    def _no_arithmetic(self, *_: Any) -> NoReturn:
        raise TypeError(
            "a TuckerTensor has no arithmetic (tuple arithmetic would be silently wrong): map over its arrays with "
            "jax.tree.map, or go through tdlrt_jax.to_dense(kernel)"
        )

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = _no_arithmetic  # type: ignore[assignment]


def is_tucker(node: Any) -> bool:
    """Whether a pytree node is a :class:`TuckerTensor`; meant for ``is_leaf=``."""
    return isinstance(node, TuckerTensor)


def unfold(tensor: Array, mode: int) -> Array:
    """``Mat_i``: the ``(n_i, prod_{j != i} n_j)`` matrix whose rows are the slices of mode ``i`` (paper, section 2.1)."""
    return jnp.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def fold(matrix: Array, mode: int, shape: Sequence[int]) -> Array:
    """``Ten_i``: the tensor of the given ``shape`` whose unfolding along ``mode`` is ``matrix``; inverse of :func:`unfold`."""
    rest = [n for axis, n in enumerate(shape) if axis != mode]
    return jnp.moveaxis(matrix.reshape(shape[mode], *rest), 0, mode)


def mode_product(tensor: Array, matrix: Array | None, mode: int) -> Array:
    """``tensor ×_i matrix``: contracts mode ``i`` of ``tensor`` with the columns of an ``(m, n_i)`` matrix.

    ``None`` stands for the identity. Done at the highest precision: the product forms bases and cores.
    """
    if matrix is None:
        return tensor
    product = jnp.tensordot(matrix, tensor, axes=(1, mode), precision=HIGHEST)
    return jnp.moveaxis(product, 0, mode)


def multi_mode_product(
    tensor: Array, matrices: Sequence[Array | None], *, transpose: bool = False, skip: int | None = None
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


def to_dense(kernel: Any) -> Array:
    """The full ``(n_1, ..., n_d)`` tensor of a :class:`TuckerTensor` or a :class:`~tdlrt_jax.frame.Frame`.

    For a TuckerTensor, ``W = C ×_j U_j`` (paper, equation (2)). For a Frame, the affine chart of the tangent space at ``W``
    in which Theorem 1 takes its derivatives; its value is the same ``W``. Arrays pass through.
    """
    if isinstance(kernel, TuckerTensor):
        return multi_mode_product(kernel.core, kernel.factors)
    if hasattr(kernel, "chart_to_dense"):
        return kernel.chart_to_dense()
    return jnp.asarray(kernel)


def kernel_shape(kernel: Any) -> tuple[int, ...]:
    """The shape ``(n_1, ..., n_d)`` of the full tensor that a TuckerTensor (or a Frame) stands for."""
    bases = kernel.factors if isinstance(kernel, TuckerTensor) else kernel.U
    return tuple(r if u is None else u.shape[-2] for r, u in zip(kernel.core.shape[-len(bases) :], bases))


def capacity(kernel: TuckerTensor) -> tuple[int, ...]:
    """The static capacities ``(R_1, ..., R_d)``: the shape of the core's array."""
    return tuple(kernel.core.shape[-len(kernel.factors) :])


def active_columns(factor: Array) -> Array:
    """Which columns of an ``(n, R)`` factor are in use: a boolean ``(R,)``; the others are exactly zero."""
    return jnp.any(factor != 0, axis=0)


def active_rank(kernel: TuckerTensor) -> Array:
    """The ranks ``(r_1, ..., r_d)`` in use, an int32 ``(d,)``; ``n_i`` for a whole mode. Works under ``jit``.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = TuckerTensor(jnp.eye(2), (jnp.eye(3, 2), jnp.eye(4, 2)))
      >>> active_rank(kernel).tolist()
      [2, 2]
    """
    ranks = [
        jnp.int32(size) if factor is None else jnp.sum(active_columns(factor), dtype=jnp.int32)
        for size, factor in zip(capacity(kernel), kernel.factors)
    ]
    return jnp.stack(ranks)


def parameter_count(shape: Sequence[int], rank: Sequence[int], whole: Sequence[bool] | None = None) -> int:
    """Numbers to store for a Tucker tensor, ``prod r_i + sum n_i r_i`` (paper, section 2.1); whole modes have no factor.

    Example:
      >>> parameter_count((256, 256, 3, 3), (76, 76, 3, 3))  # the paper's AlexNet layer, 5.2e4 and the factors
      90914
    """
    whole = whole or (False,) * len(shape)
    return math.prod(int(r) for r in rank) + sum(int(n) * int(r) for n, r, w in zip(shape, rank, whole) if not w)
