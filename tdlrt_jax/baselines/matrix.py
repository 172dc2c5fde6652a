"""Convolution by a matricized kernel: the low-rank matrix format, with which the integrators are matrix DLRT.

The kernel ``(spatial..., in, out)`` is looked at as a matrix ``W`` of ``prod(spatial) in`` rows and ``out`` columns and kept as a
Tucker tensor of two modes, ``W = U_1 C U_2^T``. ``U_1`` is then itself the kernel of a convolution to ``r_1`` channels, and a
layer is ``((x * U_1) C) U_2^T`` with ``*`` the convolution. Under :func:`tdlrt_jax.value_and_grad` all gradients of Theorem 1
come from one pass, as for Tucker convolutions::

    forward    A = x * U_1          B = A Q_2            Y  = B K_2^T
    backward   P = dY U_2           E = P Q_1^T          dx = E *^T K_1
               dK_2 = dY^T B        dK_1 = corr(x, E)    dC = A^T P

Networks whose factors are trained at once by plain gradients have no core, ``W = A B^T``: a CP tensor of two modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax.arguments import check_input, check_integers, check_precision, shown
from tdlrt_jax.baselines.cp import CPTensor, is_cp
from tdlrt_jax.conv.convolution import convolve
from tdlrt_jax.conv.geometry import Geometry, PaddingLike, resolve_input
from tdlrt_jax.frame import Frame, in_chart
from tdlrt_jax.tucker import TuckerTensor, check_kernel, kernel_shape

__all__ = ["matrix_conv", "two_factors"]

_Static = tuple[tuple[int, ...], Geometry, Any]  # window, geometry, precision


def matrix_conv(
    x: Array,
    kernel: TuckerTensor | Frame | CPTensor,
    window: Sequence[int],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: PaddingLike = "SAME",
    dilation: int | Sequence[int] | None = 1,
    precision: Any = None,
) -> Array:
    """The convolution of ``x`` by a kernel kept as a low-rank matrix, channels last.

    Args:
      x: ``(batch..., spatial..., in)``; the kernel is taken to its dtype, integers are taken to the kernel's.
      kernel: of shape ``(prod(window) * in, out)``, rows in the order of ``(window..., in)``; both modes with factors. A Frame
        differentiates by the gradients of Theorem 1, a TuckerTensor, and a CPTensor ``A B^T`` of the factors
        ``(prod(window) * in, R), (out, R)``, by the ordinary ones, to any order.
      window: the kernel's spatial shape.
      strides, padding, dilation, precision: as in :func:`tdlrt_jax.tucker_conv`.

    Returns:
      ``(batch..., spatial'..., out)``.

    Raises:
      ValueError: for a kernel that has other than two modes, a whole mode, or does not fit window and input.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jnp.arange(9 * 2 * 5.0).reshape(18, 5), rank=2)
      >>> matrix_conv(jnp.ones((1, 6, 6, 2)), kernel, (3, 3)).shape
      (1, 6, 6, 5)

    Source: Schotthöfer, Zangrando, Kusch, Ceruti & Tudisco (2022), as the paper compares with it in section 4.
    """
    window = check_integers("window", window, 1, what="sizes, one a spatial dimension")
    x = check_input("x", x)
    check_precision("precision", precision)
    if not isinstance(kernel, TuckerTensor | Frame | CPTensor):
        raise ValueError(
            f"kernel is {shown(kernel)}: expected a TuckerTensor, Frame or CPTensor (prod(window) * in, out)"
        )
    factors = kernel.U if isinstance(kernel, Frame) else kernel.factors
    if len(factors) != 2 or any(factor is None for factor in factors):
        raise ValueError(
            "kernel must be a TuckerTensor, Frame or CPTensor of two modes (prod(window) * in, out), both with factors, got "
            f"{len(factors)} modes, of which {sum(factor is None for factor in factors)} are whole"
        )
    spatial = len(window)
    rows = factors[0].shape[0] if is_cp(kernel) else kernel_shape(kernel)[0]
    if x.ndim < spatial + 1 or rows != math.prod(window) * x.shape[-1]:
        raise ValueError(
            f"kernel has {rows} rows: expected prod(window) * in for window={window} and x of shape {x.shape}"
        )
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.result_type(*kernel.factors if isinstance(kernel, CPTensor) else [kernel.core]))
    x, geometry, lead = resolve_input(x, window, strides=strides, padding=padding, dilation=dilation)
    reduce = partial(_reduce, window, geometry, precision)
    if isinstance(kernel, CPTensor):
        y = _product(reduce(x, kernel.factors[0]), kernel.factors[1].T, precision)
    elif isinstance(kernel, Frame) and kernel.K is not None:
        y = _one_pass(window, geometry, precision, x, kernel._replace(tap=None))
    else:
        if isinstance(kernel, Frame):
            kernel = TuckerTensor(kernel.core, kernel.bases())
        first, last = (jnp.asarray(factor) for factor in kernel.factors)
        a = reduce(x, first)
        y = _product(_product(a, kernel.core, precision), last.T, precision)
    return y.reshape(*lead, *y.shape[1:])


def two_factors(kernel: TuckerTensor) -> CPTensor:
    """The matrix ``U_1 C U_2^T`` as ``A B^T`` with evenly shared singular values: ``A = U_1 P S^(1/2)``, ``B = U_2 Q S^(1/2)``.

    Args:
      kernel: of two modes, both with factors; ``C = P S Q^T`` is its core.

    Returns:
      A :class:`CPTensor` of the factors ``(n_1, R)`` and ``(n_2, R)`` with ``R`` the smaller of the core's sizes.

    Raises:
      ValueError: for a kernel of other than two modes, or with a whole one.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> kernel = two_factors(tdlrt_jax.hosvd(jnp.diag(jnp.array([4.0, 9.0])), rank=1))
      >>> [round(float(jnp.abs(factor).max()), 3) for factor in kernel.factors]
      [3.0, 3.0]

    Source: spectral initialization of ``U V^T`` (Khodak et al., 2021), one of the matrix factorizations of the paper's Table 1.
    """
    check_kernel(kernel)
    if len(kernel.factors) != 2 or any(factor is None for factor in kernel.factors):
        raise ValueError(
            f"kernel has {len(kernel.factors)} modes, of which {sum(factor is None for factor in kernel.factors)} are whole: "
            "expected a matrix (n_1, n_2), both modes with factors"
        )
    wide = jnp.promote_types(kernel.core.dtype, jnp.float32)  # there is no SVD of 16 bits
    p, values, qt = jnp.linalg.svd(kernel.core.astype(wide), full_matrices=False)
    shares = jnp.sqrt(values)
    return CPTensor(
        tuple(
            (jnp.asarray(factor).astype(wide) @ vectors * shares).astype(kernel.core.dtype)
            for factor, vectors in zip(kernel.factors, (p, qt.T))
        )
    )


def _reduce(window: tuple[int, ...], geometry: Geometry, precision: Any, x: Array, matrix: Array) -> Array:
    """``x * U_1``: a convolution whose kernel has the rows of a matrix."""
    kernel = matrix.reshape(*window, x.shape[-1], matrix.shape[1])
    return convolve(x, kernel.astype(x.dtype), geometry, precision=precision)


def _product(x: Array, matrix: Array, precision: Any) -> Array:
    return jnp.matmul(x, matrix.astype(x.dtype), precision=precision)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _one_pass(window: tuple[int, ...], geometry: Geometry, precision: Any, x: Array, frame: Frame) -> Array:
    return _forward(window, geometry, precision, x, frame)[0]


def _forward(window: tuple[int, ...], geometry: Geometry, precision: Any, x: Array, frame: Frame) -> tuple[Array, Any]:
    y, a, b = _applied((window, geometry, precision), frame, x)
    return y, (x, a, b, frame)


def _backward(
    window: tuple[int, ...], geometry: Geometry, precision: Any, residuals: Any, dy: Array
) -> tuple[Array, Frame]:
    x, a, b, frame = residuals
    return _pulled_back((window, geometry, precision), frame, x, a, b, dy)


_one_pass.defvjp(_forward, _backward)


def _apply(static: _Static, frame: Frame, x: Array) -> tuple[Array, Array, Array]:
    """``Y``, ``A`` and ``B``."""
    precision = static[-1]
    a = _reduce(*static, x, frame.U[0])
    b = _product(a, frame.Q[1], precision)  # C = Ten_2(Q_2^T) ×_2 S_2, and K_2 = U_2 S_2
    return _product(b, frame.K[1].T, precision), a, b


def _pull_back(static: _Static, frame: Frame, x: Array, a: Array, b: Array, dy: Array) -> tuple[Array, Frame]:
    """The gradients of input and frame."""
    precision = static[-1]
    reduce = partial(_reduce, *static)
    rows, columns = (lambda z: z.reshape(-1, z.shape[-1])), partial(jnp.matmul, precision=precision)
    p = _product(dy, frame.U[1], precision)
    e = _product(p, frame.Q[0].T, precision)
    (dx,) = jax.linear_transpose(lambda z: reduce(z, frame.K[0]), x)(e)
    (first,) = jax.linear_transpose(lambda k: reduce(x, k), frame.K[0])(e)
    # The small operand first: XLA's CPU backend transposes it for the product.
    last = columns(rows(b).T, rows(dy)).T
    core = columns(rows(a).T, rows(p))
    gradient = Frame(core.astype(frame.core.dtype), (first, last.astype(frame.K[1].dtype)), None, None)  # type: ignore[arg-type]
    return dx, gradient


def _by_chart(static: _Static, frame: Frame, x: Array) -> Array:
    """The convolution by the kernel itself, differentiable to any order."""
    window, geometry, precision = static
    dense = frame.chart_to_dense().reshape(*window, x.shape[-1], -1)
    return convolve(x, dense.astype(x.dtype), geometry, precision=precision)


def _apply_in_chart(static: _Static, frame: Frame, x: Array) -> tuple[Array, Array, Array]:
    _, a, b = jax.lax.stop_gradient(_apply(static, frame, x))  # of no use on a way back in the chart
    return _by_chart(static, frame, x), a, b


def _pull_back_in_chart(static: _Static, frame: Frame, x: Array, a: Array, b: Array, dy: Array) -> tuple[Array, Frame]:
    def apply(x: Array, core: Array, K: Any) -> Array:
        return _by_chart(static, frame._replace(core=core, K=K), x)

    dx, dcore, dK = jax.vjp(apply, x, frame.core, frame.K)[1](dy)
    return dx, Frame(dcore, dK, None, None)  # type: ignore[arg-type]


_applied = in_chart(_apply, _apply_in_chart)
_pulled_back = in_chart(_pull_back, _pull_back_in_chart)
