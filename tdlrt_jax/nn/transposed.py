"""``TuckerConvTranspose``: the transposed convolution of ``flax.nnx`` with a kernel in Tucker format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax.typing import DTypeLike

from tdlrt_jax.conv import tucker_conv_transpose
from tdlrt_jax.conv.geometry import PaddingLike
from tdlrt_jax.conv.plans import check_plan
from tdlrt_jax.initialization import Rank, initial_kernel
from tdlrt_jax.nn.layers import (
    NO_METADATA,
    check_geometry,
    check_layer,
    check_mask,
    check_metadata,
    compute_inputs,
    default_bias_init,
    default_kernel_init,
    hashable,
)
from tdlrt_jax.tucker import TuckerTensor, to_dense

__all__ = ["TuckerConvTranspose"]


class TuckerConvTranspose(nnx.Module):
    """A transposed convolution whose kernel is a Tucker tensor; the arguments of ``flax.nnx.ConvTranspose``, and the rank's.

    ``kernel`` is an ``nnx.Param`` of a :class:`tdlrt_jax.TuckerTensor` with the dense shape ``(spatial..., in, out)``, or
    ``(spatial..., out, in)`` with ``transpose_kernel``. Train it as :class:`~tdlrt_jax.nn.TuckerConv`.

    Args:
      in_features, out_features, kernel_size, strides, kernel_dilation: the geometry, as in ``flax.nnx.ConvTranspose``.
      padding: ``"SAME"`` or ``"VALID"`` (of the convolution that this one is the transpose of), ``"CIRCULAR"``, or
        numbers of pixels to pad the dilated input with: an integer, or for each spatial dimension an integer or a pair.
      transpose_kernel: flips the kernel's spatial axes and swaps its channel axes; the layer is then the transpose of the
        convolution by that kernel.
      use_bias, mask, dtype, param_dtype, precision, preferred_element_type, kernel_init, bias_init, promote_dtype, rngs,
        kernel_metadata, bias_metadata: as in ``flax.nnx.ConvTranspose``, with the remarks of
        :class:`~tdlrt_jax.nn.TuckerConv`.
      rank, initialization, plan: as in :class:`~tdlrt_jax.nn.TuckerConv`; ``rank`` in the layout of the kernel.

    Raises:
      ValueError: for ranks, masks or names that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = TuckerConvTranspose(16, 8, kernel_size=(3, 3), strides=(2, 2), rank=0.5, rngs=nnx.Rngs(0))
      >>> layer.kernel.core.shape
      (3, 3, 8, 4)
      >>> jax.eval_shape(layer, jnp.ones((2, 8, 8, 16))).shape
      (2, 16, 16, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        padding: PaddingLike = "SAME",
        kernel_dilation: int | Sequence[int] | None = None,
        use_bias: bool = True,
        mask: Array | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        transpose_kernel: bool = False,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        rank: Rank = None,
        initialization: str | Callable[..., TuckerTensor] = "dense",
        plan: str | None = None,
    ):
        kernel_size = check_layer(
            in_features, out_features, kernel_size, dtype=dtype, param_dtype=param_dtype, bias_init=bias_init, rngs=rngs
        )
        check_plan(plan, or_none=True)
        check_geometry(kernel_size, transposed=True, strides=strides, padding=padding, kernel_dilation=kernel_dilation)
        channels = (out_features, in_features) if transpose_kernel else (in_features, out_features)
        self.kernel_shape = (*kernel_size, *channels)
        check_mask(mask, self.kernel_shape)
        kernel = initial_kernel(
            rngs.params(),
            self.kernel_shape,
            rank,
            initialization=initialization,
            kernel_init=kernel_init,
            dtype=param_dtype,
        )
        self.kernel = nnx.Param(kernel, **check_metadata(kernel_metadata))
        self.bias = (
            nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata)
            if use_bias
            else nnx.data(None)
        )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = kernel_size
        self.strides = hashable(strides)
        self.padding = hashable(padding)
        self.kernel_dilation = hashable(kernel_dilation)
        self.use_bias = use_bias
        self.mask = nnx.data(mask)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.transpose_kernel = transpose_kernel
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.plan = plan

    def __call__(self, inputs: Array) -> Array:
        """Applies the transposed convolution.

        Args:
          inputs: ``(batch..., spatial..., in)``, any number of batch dimensions.

        Returns:
          ``(batch..., spatial'..., out)``.
        """
        kernel: Any = self.kernel.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        inputs, bias = compute_inputs(self, inputs, kernel, bias)
        if self.mask is not None:
            kernel = to_dense(kernel) * self.mask
        y = tucker_conv_transpose(
            inputs,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            transposed=self.transpose_kernel,
            plan=self.plan,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        return y if bias is None else y + bias
