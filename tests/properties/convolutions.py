"""Convolutions by loops, in NumPy float64: one output pixel and one position in the window after the other."""

import itertools
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """How a kernel moves over an image; one entry a spatial dimension, paddings as (before, after), possibly negative."""

    strides: tuple
    padding: tuple
    dilation: tuple
    input_dilation: tuple
    groups: int = 1
    border: str = "constant"  # what np.pad fills with


def named_padding(name, image, window, strides, dilation):
    """The pixels on both sides that a name stands for."""
    pads = []
    for n, k, s, d in zip(image, window, strides, dilation):
        extent = (k - 1) * d + 1
        total = max((-(-n // s) - 1) * s + extent - n, 0)
        pads.append(
            {
                "SAME": (total // 2, total - total // 2),
                "SAME_LOWER": (total - total // 2, total // 2),
                "VALID": (0, 0),
                "CAUSAL": (extent - 1, 0),
                "CIRCULAR": ((extent - 1) // 2, extent // 2),
                "REFLECT": ((extent - 1) // 2, extent // 2),
            }[name]
        )
    return tuple(pads)


def padded(x, how):
    """``x (N, image..., channels)`` with its border, and spread by the input dilation."""
    for axis, ((before, after), spread) in enumerate(zip(how.padding, how.input_dilation), start=1):
        shape = list(x.shape)
        shape[axis] = (shape[axis] - 1) * spread + 1
        wide = np.zeros(shape)
        wide[(slice(None),) * axis + (slice(None, None, spread),)] = x
        widths = [(0, 0)] * x.ndim
        widths[axis] = (max(before, 0), max(after, 0))
        x = np.pad(wide, widths, mode=how.border)
        keep = slice(max(-before, 0), x.shape[axis] - max(-after, 0))
        x = x[(slice(None),) * axis + (keep,)]
    return x


def positions(shape, window, how):
    """The output pixels, and for each position in the window the input pixel under it."""
    sizes = [max((n - (k - 1) * d - 1) // s + 1, 0) for n, k, s, d in zip(shape, window, how.strides, how.dilation)]
    for pixel in itertools.product(*map(range, sizes)):
        for tap in itertools.product(*map(range, window)):
            yield pixel, tap, tuple(p * s + t * d for p, t, s, d in zip(pixel, tap, how.strides, how.dilation))


def output_shape(x, weight, how):
    window, image = weight.shape[:-2], padded(x, how).shape[1:-1]
    sizes = [max((n - (k - 1) * d - 1) // s + 1, 0) for n, k, s, d in zip(image, window, how.strides, how.dilation)]
    return (x.shape[0], *sizes, weight.shape[-1])


def convolution(x, weight, how):
    """``x (N, image..., groups * c)`` by ``weight (window..., c, out)``."""
    y = np.zeros(output_shape(x, weight, how))
    x, each = padded(x, how), weight.shape[-1] // how.groups
    for pixel, tap, source in positions(x.shape[1:-1], weight.shape[:-2], how):
        under = x[(slice(None), *source)].reshape(x.shape[0], how.groups, -1)
        for group in range(how.groups):
            mine = slice(group * each, (group + 1) * each)
            y[(slice(None), *pixel, mine)] += under[:, group] @ weight[tap][:, mine]
    return y


def kernel_gradient(x, weight_shape, dy, how):
    """The gradient of ``sum(y * dy)`` in the kernel."""
    x, dense, each = padded(x, how), np.zeros(weight_shape), weight_shape[-1] // how.groups
    for pixel, tap, source in positions(x.shape[1:-1], weight_shape[:-2], how):
        under = x[(slice(None), *source)].reshape(x.shape[0], how.groups, -1)
        for group in range(how.groups):
            mine = slice(group * each, (group + 1) * each)
            dense[tap][:, mine] += under[:, group].T @ dy[(slice(None), *pixel, mine)]
    return dense


def transposed(x, weight, strides, padding, dilation):
    """What every pixel of ``x`` scatters over the output, then ``padding`` pixels more or less than an extent less one."""
    window, image = weight.shape[:-2], x.shape[1:-1]
    extent = [(k - 1) * d + 1 for k, d in zip(window, dilation)]
    full = np.zeros((x.shape[0], *[(n - 1) * s + e for n, s, e in zip(image, strides, extent)], weight.shape[-1]))
    for pixel in itertools.product(*map(range, image)):
        for tap in itertools.product(*map(range, window)):
            # jax's transposed convolutions do not flip: the window's last entry is what falls first.
            goal = [p * s + e - 1 - t * d for p, s, e, t, d in zip(pixel, strides, extent, tap, dilation)]
            full[(slice(None), *goal)] += x[(slice(None), *pixel)] @ weight[tap]
    for axis, ((before, after), e) in enumerate(zip(padding, extent), start=1):
        more = (before - (e - 1), after - (e - 1))
        widths = [(0, 0)] * full.ndim
        widths[axis] = tuple(max(m, 0) for m in more)
        full = np.pad(full, widths)
        full = full[(slice(None),) * axis + (slice(max(-more[0], 0), full.shape[axis] - max(-more[1], 0)),)]
    return full
