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

from tdlrt_jax.arguments import check_callable
from tdlrt_jax.baselines.cp import CPTensor, cp_als, cp_conv, cp_normal, cp_rank, cp_spectral
from tdlrt_jax.baselines.matrix import matrix_conv, two_factors
from tdlrt_jax.conv.geometry import PaddingLike
from tdlrt_jax.initialization import Rank, drawn, initial_kernel
from tdlrt_jax.nn.layers import (
    check_geometry,
    check_layer,
    compute_inputs,
    default_bias_init,
    default_kernel_init,
    hashable,
)
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
        rank: Any,
        initialization: Any,
    ):
        self.kernel_size = check_layer(
            in_features, out_features, kernel_size, dtype=dtype, param_dtype=param_dtype, bias_init=bias_init, rngs=rngs
        )
        check_geometry(self.kernel_size, strides=strides, padding=padding, kernel_dilation=kernel_dilation)
        check_callable("kernel_init", kernel_init, "kernel_init(key, shape, dtype) -> weights")
        self.in_features = in_features
        self.out_features = out_features
        self.strides = hashable(strides)
        self.padding = hashable(padding)
        self.kernel_dilation = hashable(kernel_dilation)
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = dtypes.promote_dtype
        shape = (*self.kernel_size, in_features, out_features)
        self.kernel = nnx.Param(self._draw(rngs.params(), shape, rank, initialization, kernel_init))
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

    def _draw(
        self, key: Array, shape: tuple[int, ...], rank: Any, initialization: Any, kernel_init: Callable[..., Any]
    ) -> Any:
        """The initial kernel for a dense one of ``shape``."""
        raise NotImplementedError

    def _apply(self, inputs: Array, kernel: Any, **options: Any) -> Array:
        raise NotImplementedError


class MatrixConv(_Convolution):
    """A convolution whose kernel is kept as a low-rank matrix ``(prod(kernel_size) * in, out)``.

    Trained with :func:`tdlrt_jax.nn.tdlrt` it is a layer of matrix DLRT; without a core and with plain gradients, of the
    matrix-factorized network.

    Args:
      in_features, out_features, kernel_size, strides, padding, kernel_dilation, use_bias, dtype, param_dtype, precision,
        kernel_init, bias_init, rngs: as in ``flax.nnx.Conv``. ``kernel_init`` is given the matrix's shape, whose rows are the
        fan-in.
      rank: ``None`` for full rank; an int (count) or a float (fraction of the mode's size), the smaller mode decides.
      initialization: as in :class:`tdlrt_jax.nn.TuckerConv`.
      core: ``False`` for two factors ``A B^T`` with evenly shared singular values, a
        :class:`tdlrt_jax.baselines.CPTensor`, in the place of ``U_1 C U_2^T``. Integrators need the core.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = MatrixConv(3, 16, kernel_size=(3, 3), rank=4, rngs=nnx.Rngs(0))
      >>> layer.kernel.core.shape, layer(jnp.ones((2, 8, 8, 3))).shape
      ((4, 4), (2, 8, 8, 16))
    """

    def __init__(
        self,
        *arguments: Any,
        rank: Rank = None,
        initialization: str | Callable[..., TuckerTensor] = "dense",
        core: bool = True,
        **options: Any,
    ):
        if not isinstance(core, bool):
            raise ValueError(f"core={core!r}: expected True, or False for two factors alone")
        self.core = core
        super().__init__(*arguments, rank=rank, initialization=initialization, **options)

    def _draw(
        self, key: Array, shape: tuple[int, ...], rank: Any, initialization: Any, kernel_init: Callable[..., Any]
    ) -> TuckerTensor | CPTensor:
        matrix = (math.prod(shape[:-1]), shape[-1])
        kernel = initial_kernel(
            key, matrix, rank, initialization=initialization, kernel_init=kernel_init, dtype=self.param_dtype
        )
        return kernel if self.core else two_factors(kernel)

    def _apply(self, inputs: Array, kernel: Any, **options: Any) -> Array:
        return matrix_conv(inputs, kernel, self.kernel_size, **options)


class CPConv(_Convolution):
    """A convolution whose kernel is a CP tensor ``(spatial..., in, out)``, trained by plain gradients of its factors.

    Args:
      in_features, out_features, kernel_size, strides, padding, kernel_dilation, use_bias, dtype, param_dtype, precision,
        kernel_init, bias_init, rngs: as in ``flax.nnx.Conv``.
      rank: terms of the sum, or a float, see :func:`tdlrt_jax.baselines.cp_rank`.
      initialization: ``"normal"``: random factors with the norm that ``kernel_init`` draws; ``"spectral"``: terms of that norm
        that decay with powers of ten; ``"als"``: the draw, decomposed by alternating least squares, which needs tensorly and
        cannot be jitted.

    Raises:
      ValueError: for a rank below 1 or an unknown initialization.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = CPConv(3, 16, kernel_size=(3, 3), rank=5, rngs=nnx.Rngs(0))
      >>> [factor.shape for factor in layer.kernel.factors]
      [(3, 5), (3, 5), (3, 5), (16, 5)]
    """

    def __init__(self, *arguments: Any, rank: int | float, initialization: str = "normal", **options: Any):
        super().__init__(*arguments, rank=rank, initialization=initialization, **options)

    def _draw(
        self, key: Array, shape: tuple[int, ...], rank: Any, initialization: Any, kernel_init: Callable[..., Any]
    ) -> CPTensor:
        if initialization not in ("normal", "als", "spectral"):
            raise ValueError(f'initialization={initialization!r} is unknown: expected "normal", "als" or "spectral"')
        rank = cp_rank(shape, rank)
        dense_key, key = jax.random.split(key)
        dense = drawn(kernel_init, dense_key, shape, self.param_dtype)
        if initialization == "als":
            return cp_als(dense, rank)
        draw = cp_normal if initialization == "normal" else cp_spectral
        wide = dense.ravel().astype(jnp.promote_types(dense.dtype, jnp.float32))
        return draw(key, shape, rank, norm=jnp.linalg.norm(wide), dtype=self.param_dtype)

    def _apply(self, inputs: Array, kernel: Any, **options: Any) -> Array:
        return cp_conv(inputs, kernel, **options)
