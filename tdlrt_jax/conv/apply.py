"""``tucker_conv`` and ``tucker_linear``, the ways in which a layer applies its kernel; the first with batch normalization too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from tdlrt_jax.arguments import check_dtype, check_input, check_number, check_precision, shown
from tdlrt_jax.conv.convolution import convolve, sample_pixels
from tdlrt_jax.conv.geometry import PaddingLike, resolve_input
from tdlrt_jax.conv.normalization import Normalized, normalize_dense
from tdlrt_jax.conv.onepass import apply_kernel, apply_normalized
from tdlrt_jax.conv.plans import check_plan, is_depthwise, plan_for, streamed_modes
from tdlrt_jax.conv.stages import Application
from tdlrt_jax.frame import Frame
from tdlrt_jax.tucker import TuckerTensor, kernel_shape

__all__ = ["tucker_conv", "tucker_conv_batch_norm", "tucker_linear"]


def tucker_conv(
    x: Array,
    kernel: TuckerTensor | Frame | Array,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: PaddingLike = "SAME",
    dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
    input_dilation: int | Sequence[int] | None = 1,
    plan: str | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """The convolution of ``x`` by a Tucker kernel, channels last, without rebuilding the kernel where that saves work.

    Under :func:`tdlrt_jax.value_and_grad` the kernel is a :class:`~tdlrt_jax.Frame` and its gradients are those of
    Theorem 1, all from one backward pass. As a TuckerTensor it differentiates by the ordinary factor gradients, to any
    order and in forward mode.

    Args:
      x: ``(batch..., spatial..., in)``, any number of batch dimensions. Its dtype is that of the computation (integers
        are taken to the kernel's); kernels are formed in their own dtype and then cast, and get gradients of their own
        dtype.
      kernel: of shape ``(spatial..., in / groups, out)``: a TuckerTensor, a Frame (full, or of the core alone), or an
        array, which gives the ordinary convolution. The spatial dimensions are counted from it; there may be none.
      strides: one integer, or one for each spatial dimension; so too the dilations.
      padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"``, ``"CAUSAL"``, ``"CIRCULAR"``, ``"REFLECT"``, an integer, or
        for each spatial dimension an integer or a pair ``(before, after)``; as in ``flax.nnx.Conv``.
      dilation: of the kernel.
      groups: of channels; output channel ``o`` reads group ``o // (out / groups)``.
      input_dilation: of the input; a convolution with it is a transposed convolution.
      plan: ``"factored"``, ``"merge_in"``, ``"merge_out"`` or ``"dense"`` (:mod:`tdlrt_jax.conv.plans`); by default
        the one that :func:`tdlrt_jax.conv.choose_plan` names. All give the same numbers.
      precision: of the products with activations, as in ``jax.lax.conv_general_dilated``; kernels are always formed at
        the highest.
      preferred_element_type: dtype of the result; that of the computation by default.

    Returns:
      ``(batch..., spatial'..., out)``.

    Raises:
      ValueError: for shapes that do not fit, an unknown plan or padding, or a depthwise kernel with a plan other than
        ``"dense"``.

    Example:
      >>> import jax, jax.numpy as jnp, tdlrt_jax
      >>> weight = jax.random.normal(jax.random.key(0), (3, 3, 8, 16))
      >>> kernel = tdlrt_jax.hosvd(weight, rank=(3, 3, 4, 5))
      >>> tucker_conv(jnp.ones((2, 10, 10, 8)), kernel, strides=2).shape
      (2, 5, 5, 16)

    Source: paper, section 3.1; the plans and the single backward pass are this library's own.
    """
    x, how, _, lead = _prepare(
        x,
        kernel,
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
        input_dilation=input_dilation,
        plan=plan,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    y = _apply(how, x, kernel)
    return y.reshape(*lead, *y.shape[1:])


def tucker_conv_batch_norm(
    x: Array,
    kernel: TuckerTensor | Frame | Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    epsilon: float = 1e-5,
    strides: int | Sequence[int] | None = 1,
    padding: PaddingLike = "SAME",
    dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
    input_dilation: int | Sequence[int] | None = 1,
    plan: str | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Normalized:
    """:func:`tucker_conv` and batch normalization of its output, by statistics that are taken at the kernel's rank.

    Where the plan streams the out-channels (``"factored"``, ``"merge_in"``) and there are no groups, mean and variance come from
    the ``r_out`` features before the last factor, and the output is written once, normalized; else it is normalized as it is.
    Both give the same numbers. All gradients, those of Theorem 1 under :func:`tdlrt_jax.value_and_grad` among them, are those
    of the two operations one after the other.

    Args:
      x, kernel, strides, padding, dilation, groups, input_dilation, plan, precision: as in :func:`tucker_conv`.
      scale, bias: ``γ`` and ``β``, ``(out,)`` each; ``None`` for ones and zeros.
      epsilon: added to the variance.
      preferred_element_type: dtype of the output; by default that of the computation. Statistics are in float32 at least.

    Returns:
      ``(y, mean, variance)``: ``y`` is ``(batch..., spatial'..., out)``, normalized over all dimensions but the last; ``mean``
      and ``variance``, ``(out,)`` each, are those of the convolution's output, with ``N`` in the variance's denominator.

    Raises:
      ValueError: as :func:`tucker_conv`, and for a scale or bias of another shape, or an epsilon that is negative.

    Example:
      >>> import jax, jax.numpy as jnp, tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jax.random.normal(jax.random.key(0), (3, 3, 8, 16)), rank=(3, 3, 4, 5))
      >>> y, mean, variance = tucker_conv_batch_norm(jax.random.normal(jax.random.key(1), (2, 10, 10, 8)), kernel)
      >>> y.shape, mean.shape, bool(jnp.allclose(y.std((0, 1, 2)), 1, atol=1e-3))
      ((2, 10, 10, 16), (16,), True)

    Source: batch normalization, Ioffe and Szegedy (2015); at the rank, this library's own (:mod:`tdlrt_jax.conv.normalization`).
    """
    if not check_number("epsilon", epsilon, "a small number, 0 or more") >= 0:
        raise ValueError(f"epsilon={epsilon}: expected a small number, 0 or more")
    x, how, shape, lead = _prepare(
        x,
        kernel,
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
        input_dilation=input_dilation,
        plan=plan,
        precision=precision,
        preferred_element_type=None,
    )
    dtype = x.dtype if preferred_element_type is None else check_dtype("preferred_element_type", preferred_element_type)
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and np.shape(value) != shape[-1:]:
            raise ValueError(f"{name} is {shown(value)}: expected an array of the kernel's {shape[-1]} output channels")
    if how.stream_out and groups == 1:
        result = apply_normalized(how, x, kernel, scale, bias, epsilon=epsilon, dtype=dtype)  # type: ignore[arg-type]
    else:
        result = normalize_dense(_apply(how, x, kernel), scale, bias, epsilon=epsilon, dtype=dtype)
    return result._replace(y=result.y.reshape(*lead, *result.y.shape[1:]))


def _prepare(
    x: Array,
    kernel: TuckerTensor | Frame | Array,
    *,
    groups: int,
    plan: str | None,
    precision: Any,
    preferred_element_type: Any,
    **options: Any,
) -> tuple[Array, Application, tuple[int, ...], tuple[int, ...]]:
    """The arguments checked: ``x`` with one batch dimension, how to apply the kernel, its shape, and the batch dimensions."""
    shape, rank = _shape_and_rank(kernel)
    x = check_input("x", x)
    _check_channels(x, shape, groups)
    _check_plan(plan, shape, groups)
    check_precision("precision", precision)
    if preferred_element_type is not None:
        check_dtype("preferred_element_type", preferred_element_type)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.result_type(kernel if rank is None else kernel.core))  # type: ignore[union-attr]
    x, geometry, lead = resolve_input(x, shape[:-2], groups=groups, **options)
    if math.prod(shape[:-2]) == 1:
        x, geometry = sample_pixels(x, geometry)
    if rank is None:
        return x, Application(False, False, geometry, precision, preferred_element_type), shape, lead
    plan = plan or plan_for(shape, rank, x.shape[0], x.shape[1:-1], geometry)
    stream_in, stream_out = (s and r is not None for s, r in zip(streamed_modes(plan), rank[-2:]))
    return x, Application(stream_in, stream_out, geometry, precision, preferred_element_type), shape, lead


def _apply(how: Application, x: Array, kernel: TuckerTensor | Frame | Array) -> Array:
    if isinstance(kernel, TuckerTensor | Frame):
        return apply_kernel(how, x, kernel)
    dense, result = jnp.asarray(kernel).astype(x.dtype), how.preferred_element_type
    return convolve(x, dense, how.geometry, precision=how.precision, preferred_element_type=result)


def tucker_linear(
    x: Array,
    kernel: TuckerTensor | Frame | Array,
    *,
    plan: str | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """``x W`` for a Tucker kernel of two modes, ``W = U_in C U_out^T``; see :func:`tucker_conv`.

    Args:
      x: ``(batch..., in)``.
      kernel: of shape ``(in, out)``: a TuckerTensor, a Frame or an array.
      plan, precision, preferred_element_type: as in :func:`tucker_conv`.

    Returns:
      ``(batch..., out)``.

    Raises:
      ValueError: if the kernel is not a matrix or does not fit ``x``.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jnp.arange(12.0).reshape(3, 4), rank=(2, 2))
      >>> tucker_linear(jnp.ones((5, 3)), kernel).shape
      (5, 4)
    """
    shape, _ = _shape_and_rank(kernel)
    if len(shape) != 2:
        raise ValueError(f"kernel must have two modes (in, out), got the shape {shape}: use tucker_conv")
    return tucker_conv(x, kernel, plan=plan, precision=precision, preferred_element_type=preferred_element_type)


def _shape_and_rank(kernel: Any) -> tuple[tuple[int, ...], tuple[int | None, ...] | None]:
    """The kernel's full shape, and its capacities with ``None`` for whole modes; no ranks for an array."""
    if not isinstance(kernel, TuckerTensor | Frame):
        if not hasattr(kernel, "ndim") or kernel.ndim < 2:
            raise ValueError(
                f"kernel must be a TuckerTensor, a Frame or an array (spatial..., in, out), got {shown(kernel)}"
            )
        return tuple(kernel.shape), None
    factors = kernel.U if isinstance(kernel, Frame) else kernel.factors
    if not isinstance(factors, Sequence) or len(factors) < 2 or np.ndim(kernel.core) != len(factors):
        raise ValueError(
            f"kernel must have a core of as many dimensions as factors, at least two, got a core of shape "
            f"{np.shape(kernel.core)} and the factors {shown(factors)}; map over stacked kernels with jax.vmap"
        )
    rank = tuple(None if factor is None else size for size, factor in zip(kernel.core.shape, factors))
    return kernel_shape(kernel), rank


def _check_channels(x: Array, shape: tuple[int, ...], groups: int) -> None:
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    if x.ndim < len(shape) - 1:
        raise ValueError(
            f"x must be (batch..., {len(shape) - 2} spatial dimensions, channels) for a kernel of shape {shape}, "
            f"got the shape {x.shape}"
        )
    if x.shape[-1] != shape[-2] * groups:
        raise ValueError(
            f"x must have in / groups * groups = {shape[-2]} * {groups} channels for a kernel of shape {shape}, "
            f"got the shape {x.shape}"
        )
    if shape[-1] % groups:
        raise ValueError(f"groups must divide the kernel's {shape[-1]} output channels, got groups={groups}")


def _check_plan(plan: str | None, shape: tuple[int, ...], groups: int) -> None:
    check_plan(plan, or_none=True)
    if plan not in (None, "dense") and is_depthwise(shape, groups):
        raise ValueError(f"plan must be 'dense' or None for a depthwise kernel (one in-channel a group), got {plan!r}")
