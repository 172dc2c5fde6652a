"""Convolution layers with kernels in the formats that TDLRT is compared with: a low-rank matrix, and CP."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax.typing import DTypeLike

from tdlrt_jax.baselines.cp import CPTensor, cp_als, cp_conv, cp_normal
from tdlrt_jax.baselines.matrix import matrix_conv
from tdlrt_jax.conv.geometry import PaddingLike
from tdlrt_jax.initialization import Rank, initial_kernel
from tdlrt_jax.nn.layers import compute_inputs, default_bias_init, default_kernel_init, hashable
from tdlrt_jax.tucker import TuckerTensor

__all__ = ["CPConv", "MatrixConv"]


class _Convolution(nnx.Module):
    """What the two layers have in common: everything but the kernel."""

    kernel: nnx.Param

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None,
        padding: PaddingLike,
        kernel_dilation: int | Sequence[int] | None,
        use_bias: bool,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        precision: Any,
        bias_init: Callable[..., Any],
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.strides = hashable(strides)
        self.padding = hashable(padding)
        self.kernel_dilation = hashable(kernel_dilation)
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = dtypes.promote_dtype
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else nnx.data(None)

    def __call__(self, inputs: Array) -> Array:
        """``(batch..., spatial..., in)`` to ``(batch..., spatial'..., out)``."""
        kernel: Any = self.kernel.get_value()
        inputs, bias = compute_inputs(self, inputs, kernel, None if self.bias is None else self.bias.get_value())
        y = self._apply(
            inputs,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            precision=self.precision,
        )
        return y if bias is None else y + bias

    def _apply(self, inputs: Array, kernel: Any, **options: Any) -> Array:
        raise NotImplementedError


class MatrixConv(_Convolution):
    """A convolution whose kernel is kept as a low-rank matrix ``(prod(kernel_size) * in, out)``.

    Trained with :func:`tdlrt_jax.nn.tdlrt` it is a layer of matrix DLRT; with plain gradients, of the matrix-factorized network.

    Args:
      in_features, out_features, kernel_size, strides, padding, kernel_dilation, use_bias, dtype, param_dtype, precision,
        kernel_init, bias_init, rngs: as in ``flax.nnx.Conv``. ``kernel_init`` is given the matrix's shape, whose rows are the
        fan-in.
      rank: ``None`` for full rank; an int (count) or a float (fraction of the mode's size), the smaller mode decides.
      initialization: as in :class:`tdlrt_jax.nn.TuckerConv`.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = MatrixConv(3, 16, kernel_size=(3, 3), rank=4, rngs=nnx.Rngs(0))
      >>> layer.kernel.core.shape, layer(jnp.ones((2, 8, 8, 3))).shape
      ((4, 4), (2, 8, 8, 16))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: PaddingLike = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        rngs: nnx.Rngs,
        rank: Rank = None,
        initialization: str | Callable[..., TuckerTensor] = "dense",
    ):
        window = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        kernel = initial_kernel(
            rngs.params(),
            (math.prod(window) * in_features, out_features),
            rank,
            initialization=initialization,
            kernel_init=kernel_init,
            dtype=param_dtype,
        )
        self.kernel = nnx.Param(kernel)
        super().__init__(
            in_features,
            out_features,
            window,
            strides,
            padding,
            kernel_dilation,
            use_bias,
            dtype,
            param_dtype,
            precision,
            bias_init,
            rngs,
        )

    def _apply(self, inputs: Array, kernel: Any, **options: Any) -> Array:
        return matrix_conv(inputs, kernel, self.kernel_size, **options)


class CPConv(_Convolution):
    """A convolution whose kernel is a CP tensor ``(spatial..., in, out)``, trained by plain gradients of its factors.

    Args:
      in_features, out_features, kernel_size, strides, padding, kernel_dilation, use_bias, dtype, param_dtype, precision,
        kernel_init, bias_init, rngs: as in ``flax.nnx.Conv``.
      rank: terms of the sum.
      initialization: ``"normal"``: random factors with the norm that ``kernel_init`` draws; ``"als"``: its draw, decomposed by
        alternating least squares, which needs tensorly and cannot be jitted.

    Raises:
      ValueError: for a rank below 1 or an unknown initialization.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = CPConv(3, 16, kernel_size=(3, 3), rank=5, rngs=nnx.Rngs(0))
      >>> [factor.shape for factor in layer.kernel.factors]
      [(3, 5), (3, 5), (3, 5), (16, 5)]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: PaddingLike = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        rngs: nnx.Rngs,
        rank: int,
        initialization: str = "normal",
    ):
        window = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        shape = (*window, in_features, out_features)
        self.kernel = nnx.Param(_cp_kernel(rngs.params(), shape, rank, initialization, kernel_init, param_dtype))
        super().__init__(
            in_features,
            out_features,
            window,
            strides,
            padding,
            kernel_dilation,
            use_bias,
            dtype,
            param_dtype,
            precision,
            bias_init,
            rngs,
        )

    def _apply(self, inputs: Array, kernel: Any, **options: Any) -> Array:
        return cp_conv(inputs, kernel, **options)


def _cp_kernel(
    key: Array, shape: tuple[int, ...], rank: int, initialization: str, kernel_init: Callable[..., Any], dtype: Any
) -> CPTensor:
    if initialization not in ("normal", "als"):
        raise ValueError(f'initialization={initialization!r} is unknown: expected "normal" or "als"')
    dense_key, key = jax.random.split(key)
    dense = kernel_init(dense_key, shape, dtype)
    if initialization == "als":
        return cp_als(dense, rank)
    return cp_normal(key, shape, rank, norm=jnp.linalg.norm(dense.ravel()), dtype=dtype)
