"""Convolution by a kernel in CP format: a sum of ``R`` products of one vector a mode.

``W = sum_r a_r^1 ∘ ... ∘ a_r^d`` keeps ``R sum_i n_i`` numbers. A layer reduces the image to ``R`` channels, convolves each of
them along one spatial dimension after the other by a window of its own, and expands to the output channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tdlrt_jax.arguments import (
    check_array,
    check_dtype,
    check_input,
    check_integer,
    check_key,
    check_number,
    check_precision,
    check_shape,
    shown,
)
from tdlrt_jax.conv.geometry import PaddingLike, output_size, resolve_input
from tdlrt_jax.spectra import SMALLEST_VALUE

__all__ = ["CPTensor", "cp_als", "cp_conv", "cp_normal", "cp_rank", "cp_spectral", "cp_to_dense", "is_cp"]


class CPTensor(NamedTuple):
    """A kernel in CP format, without separate weights."""

    factors: tuple[Array, ...]  # (n_i, R) each


def is_cp(node: Any) -> bool:
    """Whether a node of a pytree is a kernel in CP format."""
    return isinstance(node, CPTensor)


def cp_rank(shape: Sequence[int], rank: int | float) -> int:
    """The number of terms from what a user writes: a count, or a fraction of the count at which nothing is saved.

    Args:
      shape: ``(n_1, ..., n_d)`` of the dense kernel.
      rank: an int of 1 or more; or a float in (0, 1], of ``prod n_i / sum n_i`` terms, which need as many numbers as the dense
        kernel: ``rank`` is then the part of the numbers that are kept, as nearly as whole terms allow, and at least one term.

    Raises:
      ValueError: for a number that is neither.

    Example:
      >>> cp_rank((3, 3, 64, 64), 7), cp_rank((3, 3, 64, 64), 0.1)
      (7, 27)
    """
    shape = check_shape(shape)
    if isinstance(rank, float) and 0 < rank <= 1:
        return max(1, math.floor(rank * math.prod(shape) / sum(shape)))
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1:
        raise ValueError(f"rank={shown(rank)}: expected a number of terms, 1 or more, or a fraction in (0, 1]")
    return int(rank)


def cp_to_dense(kernel: CPTensor) -> Array:
    """``sum_r a_r^1 ∘ ... ∘ a_r^d``, ``(n_1, ..., n_d)``.

    Example:
      >>> import jax.numpy as jnp
      >>> cp_to_dense(CPTensor((jnp.ones((2, 3)), jnp.ones((4, 3))))).tolist()[0]
      [3.0, 3.0, 3.0, 3.0]
    """
    _check_kernel(kernel)
    letters = "abcdefgh"[: len(kernel.factors)]
    terms = ",".join(f"{letter}z" for letter in letters)
    return jnp.einsum(f"{terms}->{letters}", *kernel.factors, precision=lax.Precision.HIGHEST)


def cp_conv(
    x: Array,
    kernel: CPTensor,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: PaddingLike = "SAME",
    dilation: int | Sequence[int] | None = 1,
    precision: Any = None,
) -> Array:
    """The convolution of ``x`` by a CP kernel ``(spatial..., in, out)``, channels last; the kernel is never formed.

    Args:
      x: ``(batch..., spatial..., in)``; the kernel is taken to its dtype, integers are taken to the kernel's.
      kernel: with factors ``(k_1, R), ..., (in, R), (out, R)``.
      strides, padding, dilation, precision: as in :func:`tdlrt_jax.tucker_conv`.

    Returns:
      ``(batch..., spatial'..., out)``.

    Raises:
      ValueError: for factors that do not fit each other or the input.

    Source: Lebedev et al. (2015).
    """
    _check_kernel(kernel)
    x = check_input("x", x)
    check_precision("precision", precision)
    *windows, first, last = kernel.factors
    spatial = len(windows)
    if (
        len({factor.shape[1] for factor in kernel.factors}) != 1
        or x.ndim < spatial + 1
        or x.shape[-1] != first.shape[0]
    ):
        raise ValueError(
            f"kernel has factors of shapes {[factor.shape for factor in kernel.factors]} for x of shape {x.shape}: expected "
            f"(k_1, R), ..., (in, R), (out, R) with one R, and in = {x.shape[-1]}"
        )
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.result_type(*kernel.factors))
    window = tuple(factor.shape[0] for factor in windows)
    x, geometry, lead = resolve_input(x, window, strides=strides, padding=padding, dilation=dilation)
    size = output_size(geometry, window, x.shape[1:-1])
    y = jnp.matmul(x, first.astype(x.dtype), precision=precision)
    pads = [(0, 0, 0), *[(*pad, 0) for pad in geometry.padding], (0, 0, 0)]
    y = lax.pad(y, jnp.zeros((), y.dtype), pads)
    for axis, factor in enumerate(windows, start=1):
        y = _along(
            y, factor.astype(y.dtype), axis, size[axis - 1], geometry.strides[axis - 1], geometry.dilation[axis - 1]
        )
    y = jnp.matmul(y, last.T.astype(y.dtype), precision=precision)
    return y.reshape(*lead, *y.shape[1:])


def _along(y: Array, factor: Array, axis: int, size: int, stride: int, dilation: int) -> Array:
    """Each channel's convolution along one axis by its own window, a column of ``factor``.

    One entry of the windows after the other, so that what they look at is neither there at once nor kept for the way back.
    """
    shape = [*y.shape[:axis], size, *y.shape[axis + 1 :]]
    if size == 0:  # the window may lie outside of the image altogether
        return jnp.zeros(shape, y.dtype)
    length = (size - 1) * stride + 1

    @jax.checkpoint
    def add(total: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
        start, row = entry
        part = lax.dynamic_slice_in_dim(y, start, length, axis)
        return total + lax.slice_in_dim(part, 0, length, stride, axis) * row, None

    return lax.scan(add, jnp.zeros(shape, y.dtype), (dilation * jnp.arange(factor.shape[0]), factor))[0]


def cp_normal(
    key: Array, shape: Sequence[int], rank: int, *, norm: Array | float, dtype: Any = jnp.float32
) -> CPTensor:
    """Gaussian factors, scaled alike so that the kernel has an expected squared norm of ``norm^2``.

    The kernel's entries are sums of ``R`` independent products, of variance ``R s^(2 d)`` for factors of deviation ``s``.
    """
    _check_draw(key, shape, rank, norm, dtype)
    wide = jnp.promote_types(dtype, jnp.float32)  # what is squared and counted here overflows 16 bits
    deviation = (jnp.asarray(norm, wide) ** 2 / (rank * math.prod(shape))) ** (1 / (2 * len(shape)))
    keys = jax.random.split(key, len(shape))
    draws = [deviation * jax.random.normal(k, (n, rank), wide) for k, n in zip(keys, shape)]
    return CPTensor(tuple(draw.astype(dtype) for draw in draws))


def cp_spectral(
    key: Array, shape: Sequence[int], rank: int, *, decay: float = 0.1, norm: Array | float, dtype: Any = jnp.float32
) -> CPTensor:
    """Terms of random directions whose norms decay, ``s_r = decay^r``: the CP twin of :func:`tdlrt_jax.tucker_spectral`.

    Each mode's directions are orthonormal as far as it has room, and then start anew: the singular values of every unfolding are
    ``s_r`` for the first ``min n_i`` of them. A term's norm is shared evenly by its vectors.

    Args:
      key: a random key.
      shape: ``(n_1, ..., n_d)``.
      rank: terms.
      decay: ratio of successive norms, in (0, 1]; none is below 1e-30 of the first.
      norm: expected norm of the kernel; a term is orthogonal to the ones before it.
      dtype: of the factors.

    Raises:
      ValueError: for a decay or a rank that cannot be.
    """
    _check_draw(key, shape, rank, norm, dtype)
    if not 0 < check_number("decay", decay, "the ratio of successive norms, in (0, 1]") <= 1:
        raise ValueError(f"decay={decay}: the ratio of successive norms is in (0, 1], expected such a number")
    norms = np.maximum(decay ** np.arange(rank, dtype=np.float64), SMALLEST_VALUE)
    wide = jnp.promote_types(dtype, jnp.float32)  # QR has none of 16 bits
    shared = jnp.asarray((norms / np.linalg.norm(norms)) ** (1 / len(shape)), wide)
    scale = jnp.asarray(norm, wide) ** (1 / len(shape))
    factors = []
    for mode_key, n in zip(jax.random.split(key, len(shape)), shape):
        bases = [
            jnp.linalg.qr(jax.random.normal(k, (n, n), wide))[0] for k in jax.random.split(mode_key, -(-rank // n))
        ]
        factors.append((jnp.concatenate(bases, axis=1)[:, :rank] * shared * scale).astype(dtype))
    return CPTensor(tuple(factors))


def cp_als(dense: Array, rank: int, *, iterations: int = 100, seed: int = 0) -> CPTensor:
    """The CP decomposition of a dense kernel by alternating least squares, with factors of equal norms; eager.

    Raises:
      ImportError: without tensorly, whose NumPy backend does it (its JAX backend would turn on float64 for the whole process).
    """
    check_integer("rank", rank, 1, "a number of terms")
    check_integer("iterations", iterations, 1, "a number of sweeps")
    dense = check_array("dense", dense, "a dense kernel (n_1, ..., n_d)", modes=2, floating=True)
    try:
        import tensorly
        from tensorly.decomposition import parafac
    except ImportError as error:
        raise ImportError("cp_als needs tensorly: pip install '.[baselines]' in this project's directory") from error
    with tensorly.backend_context("numpy"):
        weights, factors = parafac(
            np.asarray(dense, np.float64), rank, n_iter_max=iterations, init="random", random_state=seed
        )
    scale = np.ones(rank) if weights is None else np.asarray(weights)
    norms = [np.linalg.norm(factor, axis=0) for factor in factors]
    total = np.prod(norms, axis=0) * np.abs(scale)
    shared = total ** (1 / len(factors))
    balanced = [factor / np.where(n > 0, n, 1) * shared for factor, n in zip(factors, norms)]
    balanced[0] = balanced[0] * np.sign(scale)
    return CPTensor(tuple(jnp.asarray(factor, dense.dtype) for factor in balanced))


def _check_draw(key: Any, shape: Any, rank: Any, norm: Any, dtype: Any) -> None:
    check_key("key", key)
    check_shape(shape)
    check_integer("rank", rank, 1, "a number of terms")
    check_dtype("dtype", dtype)
    if not isinstance(norm, jax.Array):
        check_number("norm", norm, "a number, the kernel's Frobenius norm")


def _check_kernel(kernel: Any) -> None:
    if not is_cp(kernel):
        raise ValueError(f"kernel is {shown(kernel)}: expected a CPTensor, of a dense kernel cp_als makes one")
