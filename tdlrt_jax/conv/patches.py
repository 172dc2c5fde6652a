"""Convolution as matrix products with the patches of an image, which on a CPU is the faster way to a kernel's gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from tdlrt_jax.conv.geometry import Geometry, output_size, pad_zeros

__all__ = ["convolve_by_patches", "has_fast_patches", "patches", "product_of_patches"]

# Bytes of patches that are side by side at once, about what fits a CPU's caches. With so many for one image the convolution is
# left alone, which needs no such copy.
_AT_ONCE, _TOO_MANY = 4 * 2**20, 64 * 2**20
# So many multiply-adds are worth it, in windows of at most so many positions for each channel: copying pixels of few channels
# takes longer than what is won (two cores, jaxlib 0.10, benchmarks/results/cpu).
_MUCH_WORK, _POSITIONS_A_CHANNEL = 50_000_000, 4


def patches(x: Array, window: Sequence[int], geometry: Geometry) -> list[Array]:
    """For each position in the window, the pixels under it: one strided slice ``(N, image'..., channels)`` of ``x``."""
    batch, *image, channels = x.shape
    size = output_size(geometry, window, image)
    x, geometry = pad_zeros(x, geometry)

    def under(position: tuple[int, ...]) -> Array:
        # Where the output has no pixels the window may lie outside of the image altogether.
        start = [o * d if n else 0 for o, d, n in zip(position, geometry.dilation, size)]
        stop = [o + max(n - 1, 0) * s + min(n, 1) for o, n, s in zip(start, size, geometry.strides)]
        return lax.slice(x, (0, *start, 0), (batch, *stop, channels), (1, *geometry.strides, 1))

    return [under(position) for position in itertools.product(*map(range, window))]


def product_of_patches(
    x: Array, kernel: Array, geometry: Geometry, *, precision: Any = None, preferred_element_type: Any = None
) -> Array:
    """One matrix product with all patches side by side; arguments as in :func:`~tdlrt_jax.conv.convolution.convolve`."""
    *window, channels, n_out = kernel.shape
    columns = _side_by_side(x, window, geometry)
    groups, positions = geometry.groups, math.prod(window)
    if groups == 1:
        kernel = kernel.reshape(positions * channels, n_out)
        return jnp.matmul(columns, kernel, precision=precision, preferred_element_type=preferred_element_type)
    product = jnp.einsum(
        "...kgc,kcgo->...go",
        columns.reshape(*columns.shape[:-1], positions, groups, channels),
        kernel.reshape(positions, channels, groups, n_out // groups),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return product.reshape(*product.shape[:-2], n_out)


def convolve_by_patches(
    x: Array, kernel: Array, geometry: Geometry, *, precision: Any = None, preferred_element_type: Any = None
) -> Array:
    """:func:`product_of_patches`, a few images at a time, for the sake of its transpose in the kernel.

    That is a sum of products over parts of the batch, whose patches fit the caches: on two cores as fast as the transpose of
    XLA's convolution, whose work is not spread well over them, or several times as fast, and where images are large in a
    fraction of its memory (``benchmarks/results/cpu``). Over several devices, on which images lie apart, it is
    taken at once.
    """
    *window, channels, n_out = kernel.shape
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    images = _images_at_once(x, kernel.shape, geometry)
    if geometry.groups > 1 or images == x.shape[0]:
        return product_of_patches(x, kernel, geometry, **options)
    rows = math.prod(window) * channels
    few_rows = rows <= n_out  # a gradient with few rows is sooner there than one with few columns
    # Sums over parts, which the transpose takes, are in float32 at least.
    matrix = kernel.reshape(rows, n_out).astype(jnp.promote_types(kernel.dtype, jnp.float32))
    matrix = matrix if few_rows else matrix.T

    # Without this the patches of all parts are kept for the transpose.
    @partial(jax.checkpoint, prevent_cse=False)
    def convolved(x: Array, matrix: Array) -> Array:
        columns = _side_by_side(x, window, geometry)
        product = jnp.einsum(
            "nk,ko->no" if few_rows else "nk,ok->no", columns.reshape(-1, rows), matrix.astype(kernel.dtype), **options
        )
        return product.reshape(*columns.shape[:-1], n_out)

    rest = x.shape[0] % images
    parts = x[: x.shape[0] - rest].reshape(-1, images, *x.shape[1:])
    y = lax.map(lambda part: convolved(part, matrix), parts)
    y = y.reshape(-1, *y.shape[2:])
    return jnp.concatenate([y, convolved(x[-rest:], matrix)]) if rest else y


def has_fast_patches(x: Array, kernel: Any, geometry: Geometry) -> bool:
    """Whether :func:`convolve_by_patches` has the gradient of a kernel (an array, or its shape) sooner than the convolution."""
    *window, channels, n_out = kernel.shape
    static = all(isinstance(size, int) for size in x.shape)
    if not static or geometry.groups > 1 or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    positions, pixels = math.prod(window), math.prod(output_size(geometry, window, x.shape[1:-1]))
    if positions == 1 or positions > _POSITIONS_A_CHANNEL * channels:
        return False
    work = x.shape[0] * pixels * positions * channels * n_out
    return work >= _MUCH_WORK and _patches_of_an_image(x, window, geometry) <= _TOO_MANY


def _side_by_side(x: Array, window: Sequence[int], geometry: Geometry) -> Array:
    columns = patches(x, window, geometry)
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=-1)


def _patches_of_an_image(x: Array, window: Sequence[int], geometry: Geometry) -> int:
    """Bytes of the patches of one image."""
    pixels = math.prod(output_size(geometry, window, x.shape[1:-1]))
    return pixels * math.prod(window) * x.shape[-1] * x.dtype.itemsize


def _images_at_once(x: Array, shape: Sequence[int], geometry: Geometry) -> int:
    """As many images as fit with their patches, or a half of that and more if it divides the batch; all over several devices."""
    images = x.shape[0]
    if not isinstance(images, int) or jax.device_count() > 1:
        return images
    # Each part's product is added to a sum of the kernel's size, which should not be what takes the time.
    bytes_at_once = max(_AT_ONCE, 2 * math.prod(shape) * x.dtype.itemsize)
    most = bytes_at_once // max(_patches_of_an_image(x, shape[:-2], geometry), 1)
    most = min(max(most, 1), images)
    return next((n for n in range(most, most // 2, -1) if images % n == 0), most)
