"""Where a window goes: strides, padding, dilations and groups of a convolution, checked and made explicit."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

__all__ = [
    "Geometry",
    "PaddingLike",
    "output_size",
    "pad_border",
    "pad_zeros",
    "resolve",
    "resolve_input",
    "wider_than_image",
]

PaddingLike = str | int | Sequence[int | Sequence[int]]

_BORDER = {"CIRCULAR": "wrap", "REFLECT": "reflect"}  # padding with the image's own values; the mode of jnp.pad
_NAMED = ("SAME", "SAME_LOWER", "VALID", "CAUSAL", *_BORDER)


class Geometry(NamedTuple):
    """A convolution without its numbers; hashable. One entry for each spatial dimension."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros (before, after)
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    groups: int


def resolve(
    window: Sequence[int],
    image: Sequence[int],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: PaddingLike = "SAME",
    dilation: int | Sequence[int] | None = 1,
    input_dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
) -> tuple[Geometry, str | None]:
    """Makes the arguments of a convolution explicit.

    Args:
      window: the kernel's spatial shape.
      image: the input's spatial shape.
      strides, dilation, input_dilation: one positive integer, or one for each spatial dimension; ``None`` means 1.
      padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"``, ``"CAUSAL"`` (one spatial dimension), ``"CIRCULAR"``,
        ``"REFLECT"``, an integer, or for each spatial dimension an integer or a pair ``(before, after)``.
      groups: a positive integer.

    Returns:
      The geometry, and the mode in which its padding is filled by :func:`pad_border`: ``None`` (zeros, by the
      convolution itself), ``"wrap"`` or ``"reflect"``.

    Raises:
      ValueError: for a wrong length or sign, an unknown padding, or a named padding with input dilation (other than
        ``"VALID"``), which has no settled meaning.
    """
    spatial = len(window)
    strides = _per_dimension("strides", strides, spatial)
    dilation = _per_dimension("dilation", dilation, spatial)
    input_dilation = _per_dimension("input_dilation", input_dilation, spatial)
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    extent = tuple((k - 1) * d + 1 for k, d in zip(window, dilation))
    border = None
    if isinstance(padding, str):
        name = padding.upper()
        if name not in _NAMED:
            raise ValueError(f"padding must be one of {', '.join(_NAMED)}, an integer or pairs, got {padding!r}")
        if name != "VALID" and any(d != 1 for d in input_dilation):
            raise ValueError(
                f"padding={padding!r} is not defined with input_dilation={input_dilation}: give (before, after) pairs"
            )
        border = _BORDER.get(name)
        pads = _named_padding(name, image, extent, strides)
    else:
        pads = _explicit_padding(padding, spatial)
    return Geometry(strides, pads, dilation, input_dilation, groups), border


def resolve_input(x: Array, window: Sequence[int], **options: Any) -> tuple[Array, Geometry, tuple[int, ...]]:
    """What every convolution begins with: one batch axis, an explicit geometry, and a border that is not of zeros.

    Args:
      x: ``(batch..., spatial..., channels)``.
      window: the kernel's spatial shape.
      options: of :func:`resolve`.

    Returns:
      ``(N, spatial..., channels)`` with its border where that holds the image's own values; the geometry that is left; and the
      batch axes, for the result.

    Raises:
      ValueError: see :func:`resolve`.
    """
    split = x.ndim - 1 - len(window)
    lead, image = x.shape[:split], x.shape[split:-1]
    geometry, border = resolve(window, image, **options)
    x, geometry = pad_border(x.reshape(math.prod(lead), *image, x.shape[-1]), geometry, border)
    return x, geometry, lead


def pad_border(x: Array, geometry: Geometry, border: str | None) -> tuple[Array, Geometry]:
    """Pads ``x (N, spatial..., channels)`` with its own values where ``border`` says so; the rest is for zeros."""
    if border is None:
        return x, geometry
    widths = [(0, 0), *geometry.padding, (0, 0)]
    zero = ((0, 0),) * len(geometry.padding)
    return jnp.pad(x, widths, mode=border), geometry._replace(padding=zero)


def pad_zeros(x: Array, geometry: Geometry) -> tuple[Array, Geometry]:
    """``x (N, spatial..., channels)`` with the zeros around and between its pixels, or cut, and the geometry that is left."""
    borders = [(*pad, spread - 1) for pad, spread in zip(geometry.padding, geometry.input_dilation)]
    if any(border != (0, 0, 0) for border in borders):
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *borders, (0, 0, 0)])
    spatial = len(borders)
    return x, geometry._replace(padding=((0, 0),) * spatial, input_dilation=(1,) * spatial)


def output_size(geometry: Geometry, window: Sequence[int], image: Sequence[int]) -> tuple[int, ...]:
    """The output's spatial shape for a kernel's and an input's."""
    sizes = []
    for k, n, stride, pad, d, spread in zip(
        window, image, geometry.strides, geometry.padding, geometry.dilation, geometry.input_dilation
    ):
        padded = (max(n - 1, -1) * spread + 1 if n else 0) + sum(pad)
        sizes.append(max((padded - (k - 1) * d - 1) // stride + 1, 0))
    return tuple(sizes)


def _per_dimension(name: str, value: int | Sequence[int] | None, spatial: int) -> tuple[int, ...]:
    if value is None:
        value = 1
    try:
        if isinstance(value, bool):
            raise TypeError
        values = (operator.index(value),) * spatial  # type: ignore[arg-type]
    except TypeError:
        values = tuple(value) if isinstance(value, Sequence) else ()
    numbers = all(isinstance(v, int | np.integer) and not isinstance(v, bool) and v >= 1 for v in values)
    if len(values) != spatial or not numbers or not isinstance(value, int | np.integer | Sequence):
        raise ValueError(f"{name} must be a positive integer or {spatial} of them, got {value!r}")
    return values


def _named_padding(
    name: str, image: Sequence[int], extent: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    if name in _BORDER:
        return tuple(((k - 1) // 2, k // 2) for k in extent)
    if name == "CAUSAL":
        if len(extent) != 1:
            raise ValueError(f"padding='CAUSAL' needs one spatial dimension, the kernel has {len(extent)}")
        return ((extent[0] - 1, 0),)
    return tuple((int(low), int(high)) for low, high in lax.padtype_to_pads(image, extent, strides, name))


def _explicit_padding(padding: Any, spatial: int) -> tuple[tuple[int, int], ...]:
    expected = f"padding must be a name, an integer, or {spatial} integers or (before, after) pairs, got {padding!r}"
    try:
        entries = list(padding) if isinstance(padding, Sequence) else [operator.index(padding)] * spatial
        pairs = [
            tuple(map(operator.index, e)) if isinstance(e, Sequence) else (operator.index(e),) * 2 for e in entries
        ]
    except TypeError as error:
        raise ValueError(expected) from error
    if len(pairs) != spatial or any(len(pair) != 2 for pair in pairs):
        raise ValueError(expected)
    return tuple((pair[0], pair[1]) for pair in pairs)


def wider_than_image(window: Sequence[int], image: Sequence[int], geometry: Geometry) -> bool:
    """Whether a window is wider than the input, or than the output, which the backward pass convolves."""
    sides = zip(window, geometry.dilation, image, output_size(geometry, window, image))
    return any((k - 1) * d + 1 > min(before, after) for k, d, before, after in sides)
