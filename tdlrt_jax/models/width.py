"""Narrower networks of the same shape."""

from __future__ import annotations

from tdlrt_jax.arguments import check_number

__all__ = ["scaled"]


def scaled(filters: int, width: float) -> int:
    """``filters * width``, rounded, at least 1.

    Example:
      >>> scaled(64, 0.25)
      16
    """
    if not check_number("width", width, "a positive factor of the numbers of filters") > 0:
        raise ValueError(f"width={width}: expected a positive factor of the numbers of filters")
    return max(1, round(filters * width))
