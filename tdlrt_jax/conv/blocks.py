"""A strided convolution as one of stride one between blocks of pixels (space-to-depth), which on a CPU can be the faster way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from tdlrt_jax.conv.geometry import Geometry, output_size

__all__ = ["has_fast_blocks", "in_blocks"]

# With so few in-channels in a block and so few out-channels it is faster (two cores, jaxlib 0.10, benchmarks/results/cpu).
_FEW_IN, _FEW_OUT = 16, 16


def in_blocks(x: Array, kernel: Array, geometry: Geometry) -> tuple[Array, Array, Geometry]:
    """The same convolution with blocks of pixels, as large as the strides, side by side in the channels.

    Args:
      x: ``(N, image..., c)``.
      kernel: ``(window..., c, n_out)``.
      geometry: without dilation, input dilation and groups.

    Returns:
      An image ``(N, blocks..., s c)``, a kernel ``(ceil(window / strides)..., s c, n_out)`` and a geometry without strides and
      padding, with ``s`` pixels in a block: what the convolution needs of the image, and the kernel with zeros to whole blocks.
    """
    window, image, strides = kernel.shape[:-2], x.shape[1:-1], geometry.strides
    blocks = [-(-k // s) for k, s in zip(window, strides)]
    size = output_size(geometry, window, image)
    border = [
        (before, (n - 1 + k) * s - before - pixels, 0)
        for n, k, s, pixels, (before, _) in zip(size, blocks, strides, image, geometry.padding)
    ]
    rest = [(0, k * s - w, 0) for k, s, w in zip(blocks, strides, window)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *border, (0, 0, 0)])
    kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [*rest, (0, 0, 0), (0, 0, 0)])
    ones, none = (1,) * len(window), ((0, 0),) * len(window)
    return _side_by_side(x, 1, strides), _side_by_side(kernel, 0, strides), Geometry(ones, none, ones, ones, 1)


def has_fast_blocks(kernel: Array, geometry: Geometry) -> bool:
    """Whether :func:`in_blocks` has a result, and a gradient in the images, sooner; as measured, for two spatial dimensions."""
    *window, channels, n_out = kernel.shape
    plain = geometry.groups == 1 and set(geometry.dilation + geometry.input_dilation) == {1}
    if not plain or len(window) != 2 or jax.default_backend() != "cpu":
        return False
    few = channels * math.prod(geometry.strides) <= _FEW_IN and n_out <= _FEW_OUT
    return few and all(1 < s < k for s, k in zip(geometry.strides, window))


def _side_by_side(a: Array, first: int, block: Sequence[int]) -> Array:
    """``(..., k_1 b_1, ..., k_d b_d, c, ...)`` to ``(..., k_1, ..., k_d, b c, ...)``, with ``k_1`` on the axis ``first``."""
    last = first + len(block)
    split: list[Any] = [size for n, b in zip(a.shape[first:last], block) for size in (n // b, b)]
    a = a.reshape(*a.shape[:first], *split, *a.shape[last:])
    outer = range(first, first + len(split), 2)
    a = a.transpose(*range(first), *outer, *(axis + 1 for axis in outer), *range(first + len(split), a.ndim))
    channels, *others = a.shape[last + len(block) :]
    return a.reshape(*a.shape[:last], math.prod(block) * channels, *others)
