"""``tucker_conv_transpose``: the transposed convolution, as a convolution of the dilated input.

So the one-pass gradients of :func:`tdlrt_jax.tucker_conv` hold for it as they are. Transposing the kernel (spatial axes
flipped, channel axes swapped) only flips and permutes the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from tdlrt_jax.arguments import check_input, shown
from tdlrt_jax.conv.apply import tucker_conv
from tdlrt_jax.conv.geometry import PaddingLike, resolve
from tdlrt_jax.frame import Frame
from tdlrt_jax.tucker import TuckerTensor, kernel_shape

__all__ = ["transpose_kernel", "transposed_padding", "tucker_conv_transpose"]


def tucker_conv_transpose(
    x: Array,
    kernel: TuckerTensor | Frame | Array,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: PaddingLike = "SAME",
    dilation: int | Sequence[int] | None = 1,
    transposed: bool = False,
    plan: str | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """The transposed convolution of ``x`` by a Tucker kernel: :func:`tdlrt_jax.tucker_conv` of ``x`` dilated by the strides.

    Args:
      x: ``(batch..., spatial..., in)``.
      kernel: a TuckerTensor, a Frame or an array of shape ``(spatial..., in, out)``.
      strides: one integer, or one for each spatial dimension: by how much the output is larger than the input.
      padding: ``"SAME"`` or ``"VALID"`` (of the convolution that this one is the transpose of), ``"CIRCULAR"``, or
        numbers of pixels to pad the dilated input with: an integer, or for each spatial dimension an integer or a pair;
        as in ``flax.nnx.ConvTranspose``.
      dilation: of the kernel.
      transposed: the kernel is ``(spatial..., out, in)`` and comes flipped, see :func:`transpose_kernel`.
      plan, precision, preferred_element_type: as in :func:`tdlrt_jax.tucker_conv`.

    Returns:
      ``(batch..., spatial'..., out)``.

    Raises:
      ValueError: for a padding that has no meaning here, or shapes that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, tdlrt_jax
      >>> weight = jax.random.normal(jax.random.key(0), (3, 3, 8, 4))
      >>> tucker_conv_transpose(jnp.ones((2, 5, 5, 8)), tdlrt_jax.hosvd(weight), strides=2).shape
      (2, 10, 10, 4)
    """
    x = check_input("x", x)
    if transposed:
        kernel = transpose_kernel(kernel)
    window = _check_kernel(kernel)[:-2]
    if x.ndim <= len(window):
        raise ValueError(
            f"x must be (batch..., {len(window)} spatial dimensions, channels) for a kernel with a window {window}, "
            f"got the shape {x.shape}"
        )
    image = x.shape[x.ndim - 1 - len(window) : -1]
    geometry, _ = resolve(window, image, strides=strides, dilation=dilation)
    extent = [(k - 1) * d + 1 for k, d in zip(window, geometry.dilation)]
    circular = padding == "CIRCULAR"
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID", "CIRCULAR"):
            raise ValueError(
                f"padding must be SAME, VALID, CIRCULAR, an integer or pairs for a transposed convolution, got {padding!r}"
            )
        same = padding == "SAME"
        padding = [transposed_padding(size, stride, same) for size, stride in zip(extent, geometry.strides)]
    y = tucker_conv(
        x,
        kernel,
        padding=padding,
        dilation=geometry.dilation,
        input_dilation=geometry.strides,
        plan=plan,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    if circular:
        for axis, (size, stride) in enumerate(zip(image, geometry.strides), start=y.ndim - 1 - len(window)):
            y = wrap(y, axis, size * stride, extra_first=not transposed)
    return y


def _check_kernel(kernel: Any) -> tuple[int, ...]:
    """The kernel's shape; raises ``ValueError`` for what is none."""
    if isinstance(kernel, TuckerTensor | Frame):
        return kernel_shape(kernel)
    if not hasattr(kernel, "ndim") or kernel.ndim < 2:
        raise ValueError(
            f"kernel must be a TuckerTensor, a Frame or an array (spatial..., in, out), got {shown(kernel)}"
        )
    return tuple(kernel.shape)


def transposed_padding(extent: int, stride: int, same: bool) -> tuple[int, int]:
    """The zeros around a dilated input that make the result as large as the input of a SAME or VALID convolution was.

    Args:
      extent: the dilated kernel's size; ``stride``: of the convolution that is transposed.
      same: its padding was SAME, otherwise VALID.
    """
    if not same:
        return extent - 1, max(extent, stride) - 1
    total = extent + stride - 2
    before = extent - 1 if stride >= extent else -(-total // 2)
    return before, total - before


def wrap(y: Array, axis: int, period: int, *, extra_first: bool) -> Array:
    """Sums what is ``period`` apart along an axis: a periodic image from one that reaches over its ends.

    The image proper is in the middle, so that an odd surplus leaves one more pixel before it (``extra_first``) or after.
    """
    lacking = -(y.shape[axis] - period) % (2 * period)
    smaller, larger = lacking // 2, lacking - lacking // 2
    widths = [(0, 0)] * y.ndim
    widths[axis] = (larger, smaller) if extra_first else (smaller, larger)
    y = jnp.pad(y, widths)
    return y.reshape(*y.shape[:axis], -1, period, *y.shape[axis + 1 :]).sum(axis=axis)


def transpose_kernel(kernel: Any) -> Any:
    """A kernel with its spatial axes flipped and its channel axes swapped; a TuckerTensor, a Frame or an array.

    Flipping a mode flips the rows of its factor (of the core, and of every ``Q_j``, where the mode is whole); swapping two
    modes swaps their factors and the axes of everything core-shaped. All of it is linear, so a Frame stays the chart of
    Theorem 1, and the gradients are those of the kernel given.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> weight = jnp.arange(24.0).reshape(2, 3, 4)
      >>> found = tdlrt_jax.to_dense(transpose_kernel(tdlrt_jax.hosvd(weight)))
      >>> bool(jnp.allclose(found, weight[::-1].swapaxes(1, 2), atol=1e-4))
      True
    """
    _check_kernel(kernel)
    if not isinstance(kernel, TuckerTensor | Frame):
        return jnp.flip(kernel, range(kernel.ndim - 2)).swapaxes(-1, -2)
    bases = kernel.factors if isinstance(kernel, TuckerTensor) else kernel.U
    spatial = range(len(bases) - 2)
    whole = [mode for mode in spatial if bases[mode] is None]

    def per_mode(entries: tuple) -> tuple:
        return (*entries[:-2], entries[-1], entries[-2])

    def flip_rows(matrices: Any) -> Any:
        flipped = [m if m is None or mode not in spatial else m[::-1] for mode, m in enumerate(matrices)]
        return per_mode(tuple(flipped))

    def core_shaped(tensor: Any) -> Any:
        return None if tensor is None else jnp.flip(tensor, whole).swapaxes(-1, -2)

    if isinstance(kernel, TuckerTensor):
        return TuckerTensor(core_shaped(kernel.core), flip_rows(kernel.factors))
    K, origin = (None if matrices is None else flip_rows(matrices) for matrices in (kernel.K, kernel.origin))
    Q = None if kernel.Q is None else per_mode(tuple(core_shaped(q) for q in kernel.Q))
    return Frame(core_shaped(kernel.core), K, flip_rows(kernel.U), Q, origin=origin)
