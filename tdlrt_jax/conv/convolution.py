"""The dense convolution underneath every plan: XLA's own, or a matrix product where that is the better way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from tdlrt_jax.conv.blocks import fast_blocks, in_blocks
from tdlrt_jax.conv.geometry import Geometry, output_size, pad_zeros, resolve, wider_than_image
from tdlrt_jax.conv.patches import convolve_by_patches, has_fast_patches, patches, product_of_patches

__all__ = ["conv_general_dilated", "convolve", "kernel_gradient", "sample_pixels"]

# With so many out-channels XLA's CPU convolutions (jaxlib 0.10) of an odd number of in-channels take several times as long
# as those of one channel more (benchmarks/results/cpu).
_SLOW_IF_ODD = range(17, 35)


def convolve(
    x: Array,
    kernel: Array,
    geometry: Geometry,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """``(N, image..., g c)`` by ``(window..., c, n_out)`` to ``(N, image'..., n_out)``, channels last.

    A pointwise kernel (and no spatial dimension at all) is a matrix product. On the CPU so is a window wider than the
    image, where XLA leaves its fast convolution and is far slower than the product; for larger images the convolution is
    as fast or faster. An odd number of in-channels is made even there where that helps, and few channels become more, those of
    blocks of pixels (:func:`~tdlrt_jax.conv.blocks.in_blocks`). The derivative in the kernel is taken by the way that is
    the fastest for it, :func:`~tdlrt_jax.conv.patches.convolve_by_patches` or without blocks, in both modes and to any order.
    """
    if has_fast_patches(x, kernel, geometry) or fast_blocks(x, kernel, geometry):
        return _with_fast_gradient(geometry, precision, preferred_element_type, x, kernel)
    return _convolve(geometry, precision, preferred_element_type, x, kernel)


def _by_the_fastest_way(
    geometry: Geometry, precision: Any, preferred_element_type: Any, x: Array, kernel: Array
) -> Array:
    blocks = fast_blocks(x, kernel, geometry)
    if blocks is None:
        return _convolve(geometry, precision, preferred_element_type, x, kernel)
    shape = (x.shape[0], *output_size(geometry, kernel.shape[:-2], x.shape[1:-1]), kernel.shape[-1])
    x, kernel, geometry = in_blocks(x, kernel, geometry, blocks)
    return _convolve(geometry, precision, preferred_element_type, x, kernel).reshape(shape)


def _convolve(geometry: Geometry, precision: Any, preferred_element_type: Any, x: Array, kernel: Array) -> Array:
    window, image = kernel.shape[:-2], x.shape[1:-1]
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    if math.prod(window) == 1 or (jax.default_backend() == "cpu" and wider_than_image(window, image, geometry)):
        return product_of_patches(x, kernel, geometry, **options)
    if _is_slow(kernel, geometry) and jax.default_backend() == "cpu":
        one_more = [(0, 0)] * len(window)
        x = jnp.pad(x, [(0, 0), *one_more, (0, 1)])
        kernel = jnp.pad(kernel, [*one_more, (0, 1), (0, 0)])
    if _needs_padding_first(window, geometry):
        x, geometry = pad_zeros(x, geometry)
    spatial = "".join("DHW"[-len(image) :]) if len(image) <= 3 else "".join(map(chr, range(97, 97 + len(image))))
    layout = f"N{spatial}C"
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.padding,
        lhs_dilation=geometry.input_dilation,
        rhs_dilation=geometry.dilation,
        dimension_numbers=(layout, f"{spatial}IO", layout),
        feature_group_count=geometry.groups,
        **options,
    )


_with_fast_gradient = jax.custom_jvp(_by_the_fastest_way, nondiff_argnums=(0, 1, 2))


@partial(_with_fast_gradient.defjvp, symbolic_zeros=True)
def _derivative(
    geometry: Geometry, precision: Any, preferred_element_type: Any, primals: Any, tangents: Any
) -> tuple[Array, Any]:
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _with_fast_gradient(geometry, precision, preferred_element_type, x, kernel)
    parts = []
    if not isinstance(dx, SymbolicZero):
        parts.append(_by_the_fastest_way(geometry, precision, preferred_element_type, dx, kernel))
    if not isinstance(dkernel, SymbolicZero):
        parts.append(_in_the_kernel(geometry, precision, preferred_element_type, x, dkernel))
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


def _in_the_kernel(
    geometry: Geometry, precision: Any, preferred_element_type: Any, x: Array, kernel: Array, products: bool = False
) -> Array:
    """By the way whose transpose in the kernel is the fastest, or by matrix products in any case."""
    if products or has_fast_patches(x, kernel, geometry):
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        return convolve_by_patches(x, kernel, geometry, **options)
    return _convolve(geometry, precision, preferred_element_type, x, kernel)


def kernel_gradient(
    x: Array, dy: Array, window: Sequence[int], geometry: Geometry, *, precision: Any = None, products: bool = False
) -> Array:
    """The transpose of :func:`convolve` in its kernel, ``(window..., c, n_out)`` in the dtype of ``x``, by the faster way.

    Args:
      x: ``(N, image..., g c)``.
      dy: ``(N, image'..., n_out)``, of the same dtype.
      window: the kernel's spatial shape.
      geometry, precision: as in :func:`convolve`.
      products: by matrix products in any case: inside of ``lax.cond``, ``scan`` and ``while_loop`` XLA's CPU convolutions take 15
        to 77 times as long (jaxlib 0.10, benchmarks/results/cpu), its matrix products do not.
    """
    kernel = jax.ShapeDtypeStruct((*window, x.shape[-1] // geometry.groups, dy.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda k: _in_the_kernel(geometry, precision, None, x, k, products), kernel)(dy)[0]


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> Array:
    """``jax.lax.conv_general_dilated`` with the ways to it and to its derivative that :func:`convolve` chooses, channels last.

    Meant for ``flax.nnx.Conv(..., conv_general_dilated=...)``, so that a dense network profits as a Tucker network
    does and their times can be compared. Any other layout and any other option goes to ``jax.lax`` unchanged.

    Example:
      >>> import jax.numpy as jnp
      >>> x, kernel = jnp.ones((1, 2, 2, 3)), jnp.ones((3, 3, 3, 4))
      >>> conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).shape
      (1, 2, 2, 4)
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    last = lhs.ndim - 1
    data, weights = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    ours = {"precision", "preferred_element_type"}
    if tuple(numbers) != (data, weights, data) or any(v is not None for k, v in options.items() if k not in ours):
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            **options,
        )
    geometry, _ = resolve(
        rhs.shape[:-2],
        lhs.shape[1:-1],
        strides=window_strides,
        padding=padding,
        dilation=rhs_dilation,
        input_dilation=lhs_dilation,
        groups=feature_group_count,
    )
    precision, result = options.get("precision"), options.get("preferred_element_type")
    return convolve(lhs, rhs, geometry, precision=precision, preferred_element_type=result)


def _is_slow(kernel: Array, geometry: Geometry) -> bool:
    """Whether a channel of zeros makes the convolution quicker."""
    channels, n_out = kernel.shape[-2:]
    return geometry.groups == 1 and channels > 1 and channels % 2 == 1 and n_out in _SLOW_IF_ODD


def _needs_padding_first(window: Sequence[int], geometry: Geometry) -> bool:
    """Whether an image is cut off, or padded beyond the window, so that its gradient is cut off.

    XLA's CPU convolution of an image that is cut off before and padded behind reads what lies beyond it in memory (jaxlib 0.10).
    """
    extents = [(k - 1) * d + 1 for k, d in zip(window, geometry.dilation)]
    return not all(0 <= zeros < extent for pair, extent in zip(geometry.padding, extents) for zeros in pair)


def sample_pixels(x: Array, geometry: Geometry) -> tuple[Array, Geometry]:
    """The pixels of ``x (N, image..., channels)`` that a pointwise window visits, and the trivial geometry left."""
    (pixels,) = patches(x, (1,) * (x.ndim - 2), geometry)
    ones = (1,) * (x.ndim - 2)
    return pixels, Geometry(ones, ((0, 0),) * len(ones), ones, ones, geometry.groups)
