"""Pooling that is quick to differentiate."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array

from tdlrt_jax.arguments import check_array, check_integer

__all__ = ["max_pool"]


def max_pool(x: Array, window: int = 2) -> Array:
    """Max pooling over windows that do not overlap, by selections, which are quick to differentiate.

    The gradient goes to the first of equal maxima, of a column's before those of a row. It is not that of ``jnp.max``, which
    looks for the entries that equal the result and divides by their number: where the compiler computes the input a second time
    and rounds it otherwise there are none, and 0 / 0 is not a number.

    Args:
      x: ``(batch..., H, W, channels)``; rows and columns that do not fill a window are left out.
      window: its side, and the stride.

    Returns:
      ``(batch..., H // window, W // window, channels)``; not a number where one in the window is none.

    Example:
      >>> import jax.numpy as jnp
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, ..., 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    x = check_array("x", x, "an array (batch..., H, W, channels)")
    check_integer("window", window, 1, "the side of a window")
    if x.ndim < 3:
        raise ValueError(f"x has shape {x.shape}: expected (batch..., H, W, channels)")
    *lead, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x[..., : rows * window, : columns * window, :].reshape(*lead, rows, window, columns, window, channels)
    x = functools.reduce(_larger, [x[..., row, :, :, :] for row in range(window)])
    return functools.reduce(_larger, [x[..., column, :] for column in range(window)])


def _larger(a: Array, b: Array) -> Array:
    return jnp.where((a >= b) | jnp.isnan(a), a, b)
