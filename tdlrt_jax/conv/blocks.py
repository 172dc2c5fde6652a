"""A convolution between blocks of pixels (space-to-depth), which on a CPU can be the faster way if there are few channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from tdlrt_jax.conv.geometry import Geometry, output_size, wider_than_image

__all__ = ["fast_blocks", "in_blocks"]

# With so few in- and out-channels it is faster: in blocks as large as the strides, and in blocks of so many pixels of a row
# (two cores, jaxlib 0.10, benchmarks/results/cpu).
_FEW_IN, _FEW_OUT = 16, 16
_IN_A_ROW = (8, 4, 2)
_FEW_OUT_IN_A_ROW, _FEW_WEIGHTS = 32, 64


def in_blocks(x: Array, kernel: Array, geometry: Geometry, blocks: Sequence[int]) -> tuple[Array, Array, Geometry]:
    """The same convolution with blocks of pixels side by side in the channels.

    A block is as large as the strides, for one pixel of the output, or wider by a factor ``m`` in the last dimension, for ``m``
    pixels of a row of the output.

    Args:
      x: ``(N, image..., c)``.
      kernel: ``(window..., c, n_out)``.
      geometry: without dilation, input dilation and groups.
      blocks: pixels of a block in each dimension.

    Returns:
      An image ``(N, blocks..., b c)``, a kernel ``(ceil((window + blocks - strides) / blocks)..., b c, m n_out)`` and a geometry
      without strides and padding, with ``b`` pixels in a block: what the convolution needs of the image, and the kernel with
      zeros to whole blocks. The result is that of the convolution, of as many numbers in the same order.

    Raises:
      ValueError: if a row of the output is not of whole blocks.
    """
    window, image, strides = kernel.shape[:-2], x.shape[1:-1], geometry.strides
    size = output_size(geometry, window, image)
    at_once = blocks[-1] // strides[-1]
    if size[-1] % at_once:
        raise ValueError(f"blocks={tuple(blocks)} are of {at_once} pixels of a row of the output, which has {size[-1]}")
    count = [*size[:-1], size[-1] // at_once]
    covered = [-(-(k + b - s) // b) for k, b, s in zip(window, blocks, strides)]
    border = [
        (before, (n - 1 + k) * b - before - pixels, 0)
        for n, k, b, pixels, (before, _) in zip(count, covered, blocks, image, geometry.padding)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *border, (0, 0, 0)])
    # The window at each of the pixels that a block gives.
    rest = [k * b - w for k, b, w in zip(covered, blocks, window)]
    shifts = [pixel * strides[-1] for pixel in range(at_once)]
    edges = [[(0, r, 0) for r in rest[:-1]] + [(shift, rest[-1] - shift, 0), (0, 0, 0), (0, 0, 0)] for shift in shifts]
    kernel = jnp.concatenate([lax.pad(kernel, jnp.zeros((), kernel.dtype), edge) for edge in edges], axis=-1)
    ones, none = (1,) * len(window), ((0, 0),) * len(window)
    return _side_by_side(x, 1, blocks), _side_by_side(kernel, 0, blocks), Geometry(ones, none, ones, ones, 1)


def fast_blocks(x: Array, kernel: Array, geometry: Geometry) -> tuple[int, ...] | None:
    """The blocks in which :func:`in_blocks` has a result, and a gradient in the images, sooner, or ``None``.

    As measured, for two spatial dimensions on a CPU: blocks as large as the strides, and of 2, 4 or 8 pixels of a row without.
    """
    *window, channels, n_out = kernel.shape
    plain = geometry.groups == 1 and set(geometry.dilation + geometry.input_dilation) == {1}
    if not plain or len(window) != 2 or jax.default_backend() != "cpu":
        return None
    image, strides = x.shape[1:-1], geometry.strides
    if math.prod(window) == 1 or wider_than_image(window, image, geometry):
        return None
    if set(strides) == {1}:
        width = output_size(geometry, window, image)[-1]
        if channels * n_out > _FEW_WEIGHTS:
            return None
        for side in _IN_A_ROW:
            if width % side == 0 and channels * side <= _FEW_IN and n_out * side <= _FEW_OUT_IN_A_ROW:
                return (1, side)
        return None
    few = channels * math.prod(strides) <= _FEW_IN and n_out <= _FEW_OUT
    return strides if few and all(1 < s < k for s, k in zip(strides, window)) else None


def _side_by_side(a: Array, first: int, block: Sequence[int]) -> Array:
    """``(..., k_1 b_1, ..., k_d b_d, c, ...)`` to ``(..., k_1, ..., k_d, b c, ...)``, with ``k_1`` on the axis ``first``."""
    last = first + len(block)
    split: list[Any] = [size for n, b in zip(a.shape[first:last], block) for size in (n // b, b)]
    a = a.reshape(*a.shape[:first], *split, *a.shape[last:])
    outer = range(first, first + len(split), 2)
    a = a.transpose(*range(first), *outer, *(axis + 1 for axis in outer), *range(first + len(split), a.ndim))
    channels, *others = a.shape[last + len(block) :]
    return a.reshape(*a.shape[:last], math.prod(block) * channels, *others)
