"""The dense convolution underneath every plan: XLA's own, or a matrix product where that is the better way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from tdlrt_jax.conv.geometry import Geometry, output_size, resolve
from tdlrt_jax.conv.rows import contract_rows

__all__ = ["conv_general_dilated", "convolve", "kernel_gradient", "sample_pixels"]

# From so many in-channels on, a product for each position of the window beats one product with all patches side by side.
_MANY_CHANNELS = 16
# With so many out-channels XLA's CPU convolutions (jaxlib 0.10) of an odd number of in-channels take several times as long
# as those of one channel more (benchmarks/results/cpu).
_SLOW_IF_ODD = range(17, 35)
# Kernel gradients of XLA's CPU backend are slow where images are many pixels of more than a few channels: from so many pixels and
# so many multiply-adds a window position on, up to so many channels, a product for each position is up to three times as fast
# (two cores, jaxlib 0.10, benchmarks/results/cpu_xeon).
_MANY_PIXELS, _MUCH_WORK, _NOT_TOO_MANY_CHANNELS = 8192, 18_000_000, 100


def convolve(
    x: Array,
    kernel: Array,
    geometry: Geometry,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    products: bool = False,
) -> Array:
    """``(N, image..., g c)`` by ``(window..., c, n_out)`` to ``(N, image'..., n_out)``, channels last.

    A pointwise kernel (and no spatial dimension at all) is a matrix product. On the CPU so is a window wider than the
    image, where XLA leaves its fast convolution and is far slower than the product; for larger images the convolution is
    as fast or faster. An odd number of in-channels is made even there where that helps. With ``products`` it is matrix
    products in any case: inside of ``lax.cond``, ``scan`` and ``while_loop`` XLA's CPU convolutions take 15 to 77 times as
    long (jaxlib 0.10, benchmarks/results/cpu), its matrix products do not.
    """
    window, image = kernel.shape[:-2], x.shape[1:-1]
    if products and geometry.groups == 1 and kernel.shape[-2] >= _MANY_CHANNELS:
        return _shifted_products(x, kernel, geometry, precision, preferred_element_type)
    if products:
        return _product_with_patches(x, kernel, geometry, precision, preferred_element_type)
    if math.prod(window) == 1 or (jax.default_backend() == "cpu" and _wider_than_image(window, image, geometry)):
        return _product_with_patches(x, kernel, geometry, precision, preferred_element_type)
    if _is_slow(kernel, geometry) and jax.default_backend() == "cpu":
        one_more = [(0, 0)] * len(window)
        x = jnp.pad(x, [(0, 0), *one_more, (0, 1)])
        kernel = jnp.pad(kernel, [*one_more, (0, 1), (0, 0)])
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
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def kernel_gradient(
    x: Array, dy: Array, window: Sequence[int], geometry: Geometry, *, precision: Any = None, products: bool = False
) -> Array:
    """The transpose of :func:`convolve` in its kernel: ``(window..., c, n_out)`` in the dtype of ``x``.

    Args:
      x: ``(N, image..., g c)``.
      dy: ``(N, image'..., n_out)``, of the same dtype.
      window: the kernel's spatial shape.
      geometry, precision, products: as in :func:`convolve`, of which this chooses the other way where that is faster.
    """
    shape = (*window, x.shape[-1] // geometry.groups, dy.shape[-1])
    if geometry.groups == 1 and math.prod(window) > 1 and (products or _is_slow_gradient(dy, shape)):
        patches = _patches(x, window, geometry)
        return jnp.stack([contract_rows(patch, dy, precision=precision) for patch in patches]).reshape(shape)
    (gradient,) = jax.linear_transpose(
        lambda kernel: convolve(x, kernel, geometry, precision=precision, products=products),
        jax.ShapeDtypeStruct(shape, x.dtype),
    )(dy)
    return gradient


def _is_slow_gradient(dy: Array, shape: Sequence[int]) -> bool:
    """Whether matrix products have the kernel's gradient sooner."""
    channels, pixels = shape[-2:], math.prod(dy.shape[:-1])
    if not isinstance(pixels, int):  # a symbolic batch
        return False
    many = pixels >= _MANY_PIXELS and pixels * math.prod(channels) >= _MUCH_WORK
    return many and max(channels) <= _NOT_TOO_MANY_CHANNELS and jax.default_backend() == "cpu"


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
    """``jax.lax.conv_general_dilated`` with :func:`convolve`'s choice of a matrix product, for channels-last layouts.

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


def _wider_than_image(window: Sequence[int], image: Sequence[int], geometry: Geometry) -> bool:
    """Whether a window is wider than the input, or than the output, which the backward pass convolves."""
    sides = zip(window, geometry.dilation, image, output_size(geometry, window, image))
    return any((k - 1) * d + 1 > min(before, after) for k, d, before, after in sides)


def sample_pixels(x: Array, geometry: Geometry) -> tuple[Array, Geometry]:
    """The pixels of ``x (N, image..., channels)`` that a pointwise window visits, and the trivial geometry left."""
    (pixels,) = _patches(x, (1,) * (x.ndim - 2), geometry)
    ones = (1,) * (x.ndim - 2)
    return pixels, Geometry(ones, ((0, 0),) * len(ones), ones, ones, geometry.groups)


def _shifted_products(
    x: Array, kernel: Array, geometry: Geometry, precision: Any, preferred_element_type: Any
) -> Array:
    """A matrix product for each position in the window, and their sum: no copy of all patches side by side."""
    matrices = kernel.reshape(-1, *kernel.shape[-2:])
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    patches = _patches(x, kernel.shape[:-2], geometry)
    return sum(jnp.matmul(patch, matrix, **options) for patch, matrix in zip(patches, matrices))  # type: ignore[return-value]


def _product_with_patches(
    x: Array, kernel: Array, geometry: Geometry, precision: Any, preferred_element_type: Any
) -> Array:
    """One matrix product with the image's patches."""
    *window, channels, n_out = kernel.shape
    patches = _patches(x, window, geometry)
    columns = patches[0] if len(patches) == 1 else jnp.concatenate(patches, axis=-1)
    groups, rows = geometry.groups, len(patches) * channels
    if groups == 1:
        kernel = kernel.reshape(rows, n_out)
        return jnp.matmul(columns, kernel, precision=precision, preferred_element_type=preferred_element_type)
    product = jnp.einsum(
        "...kgc,kcgo->...go",
        columns.reshape(*columns.shape[:-1], len(patches), groups, channels),
        kernel.reshape(len(patches), channels, groups, n_out // groups),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return product.reshape(*product.shape[:-2], n_out)


def _patches(x: Array, window: Sequence[int], geometry: Geometry) -> list[Array]:
    """For each position in the window, the pixels under it: one strided slice ``(N, image'..., channels)`` of ``x``."""
    batch, *image, channels = x.shape
    size = output_size(geometry, window, image)
    borders = [(*pad, spread - 1) for pad, spread in zip(geometry.padding, geometry.input_dilation)]
    if any(border != (0, 0, 0) for border in borders):
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *borders, (0, 0, 0)])

    def under(position: tuple[int, ...]) -> Array:
        # Where the output has no pixels the window may lie outside of the image altogether.
        start = [o * d if n else 0 for o, d, n in zip(position, geometry.dilation, size)]
        stop = [o + max(n - 1, 0) * s + min(n, 1) for o, n, s in zip(start, size, geometry.strides)]
        return lax.slice(x, (0, *start, 0), (batch, *stop, channels), (1, *geometry.strides, 1))

    return [under(position) for position in itertools.product(*map(range, window))]
