"""``TuckerConvTranspose``: the transposed convolution of ``flax.nnx`` with a kernel in Tucker format.

A transposed convolution is a convolution of the dilated input, so the one-pass gradients of :func:`tdlrt_jax.tucker_conv` hold
for it as they are. Transposing the kernel (spatial axes flipped, channel axes swapped) only flips and permutes the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax.typing import DTypeLike

from tdlrt_jax.conv import tucker_conv
from tdlrt_jax.conv.geometry import PaddingLike, resolve
from tdlrt_jax.frame import Frame
from tdlrt_jax.initialization import Rank, initial_kernel
from tdlrt_jax.nn.layers import (
    NO_METADATA,
    compute_inputs,
    default_bias_init,
    default_kernel_init,
    hashable,
)
from tdlrt_jax.tucker import TuckerTensor, kernel_shape, to_dense

__all__ = ["TuckerConvTranspose", "transpose_kernel", "tucker_conv_transpose"]


class TuckerConvTranspose(nnx.Module):
    """A transposed convolution whose kernel is a Tucker tensor; the arguments of ``flax.nnx.ConvTranspose``, and the rank's.

    ``kernel`` is an ``nnx.Param`` of a :class:`tdlrt_jax.TuckerTensor` with the dense shape ``(spatial..., in, out)``, or
    ``(spatial..., out, in)`` with ``transpose_kernel``. Train it as :class:`~tdlrt_jax.nn.TuckerConv`.

    Args:
      in_features, out_features, kernel_size, strides, kernel_dilation: the geometry, as in ``flax.nnx.ConvTranspose``.
      padding: ``"SAME"`` or ``"VALID"`` (of the convolution that this one is the transpose of), ``"CIRCULAR"``, or
        numbers of pixels to pad the dilated input with: an integer, or for each spatial dimension an integer or a pair.
      transpose_kernel: flips the kernel's spatial axes and swaps its channel axes; the layer is then the transpose of the
        convolution by that kernel.
      use_bias, mask, dtype, param_dtype, precision, preferred_element_type, kernel_init, bias_init, promote_dtype, rngs,
        kernel_metadata, bias_metadata: as in ``flax.nnx.ConvTranspose``, with the remarks of
        :class:`~tdlrt_jax.nn.TuckerConv`.
      rank, initialization, plan: as in :class:`~tdlrt_jax.nn.TuckerConv`; ``rank`` in the layout of the kernel.

    Raises:
      ValueError: for ranks, masks or names that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = TuckerConvTranspose(16, 8, kernel_size=(3, 3), strides=(2, 2), rank=0.5, rngs=nnx.Rngs(0))
      >>> layer.kernel.core.shape
      (3, 3, 8, 4)
      >>> jax.eval_shape(layer, jnp.ones((2, 8, 8, 16))).shape
      (2, 16, 16, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        padding: PaddingLike = "SAME",
        kernel_dilation: int | Sequence[int] | None = None,
        use_bias: bool = True,
        mask: Array | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        transpose_kernel: bool = False,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        rank: Rank = None,
        initialization: str | Callable[..., TuckerTensor] = "dense",
        plan: str | None = None,
    ):
        kernel_size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        channels = (out_features, in_features) if transpose_kernel else (in_features, out_features)
        self.kernel_shape = (*kernel_size, *channels)
        if mask is not None and jnp.shape(mask) != self.kernel_shape:
            raise ValueError(f"mask has shape {jnp.shape(mask)}: expected the kernel's, {self.kernel_shape}")
        kernel = initial_kernel(
            rngs.params(),
            self.kernel_shape,
            rank,
            initialization=initialization,
            kernel_init=kernel_init,
            dtype=param_dtype,
        )
        self.kernel = nnx.Param(kernel, **kernel_metadata)
        self.bias = (
            nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata)
            if use_bias
            else nnx.data(None)
        )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = kernel_size
        self.strides = hashable(strides)
        self.padding = hashable(padding)
        self.kernel_dilation = hashable(kernel_dilation)
        self.use_bias = use_bias
        self.mask = nnx.data(mask)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.transpose_kernel = transpose_kernel
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.plan = plan

    def __call__(self, inputs: Array) -> Array:
        """Applies the transposed convolution.

        Args:
          inputs: ``(batch..., spatial..., in)``, any number of batch dimensions.

        Returns:
          ``(batch..., spatial'..., out)``.
        """
        kernel: Any = self.kernel.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        inputs, bias = compute_inputs(self, inputs, kernel, bias)
        if self.mask is not None:
            kernel = to_dense(kernel) * self.mask
        y = tucker_conv_transpose(
            inputs,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            transposed=self.transpose_kernel,
            plan=self.plan,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        return y if bias is None else y + bias


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
      padding: as in :class:`TuckerConvTranspose`.
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
    if transposed:
        kernel = transpose_kernel(kernel)
    window = (kernel_shape(kernel) if isinstance(kernel, TuckerTensor | Frame) else kernel.shape)[:-2]
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
    K = None if kernel.K is None else flip_rows(kernel.K)
    Q = None if kernel.Q is None else per_mode(tuple(core_shaped(q) for q in kernel.Q))
    return Frame(core_shaped(kernel.core), K, flip_rows(kernel.U), Q)
