"""Application of a Tucker kernel in stages (:mod:`tdlrt_jax.conv.stages`), and all gradients of Theorem 1 in one backward pass.

``M[X]`` is a core-shaped ``X`` multiplied by the factors of the merged modes (:mod:`tdlrt_jax.conv.plans`). Since
``C = Ten_i(Q_i^T) ×_i S_i`` for every mode, each pass may use whichever ``Q_i`` it needs. With ``*`` the convolution,
``*^T`` its transpose in the input, ``corr`` its transpose in the kernel, and both channel modes streamed::

    forward    A = Z U_in           B = A * M[Q_out]         Y  = B K_out^T
    backward   P = dY U_out         E = P *^T M[Q_in]        dZ = E K_in^T
               dK_out = dY^T B      dK_in = Z^T E            dM = corr(A, P)

and ``dC``, ``dK_i`` of the merged modes by contracting ``dM`` with the ``U_j`` and ``Q_i``. A merged channel mode
drops its stage and joins the contraction; then ``C`` takes the place of its ``Q_i``. Three convolutions in all, as
many as an ordinary factorized layer. A normalization that follows is carried out on ``B``, and gives ``P`` and ``dK_out``
without ``dY`` (:mod:`tdlrt_jax.conv.normalization`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import get_opaque_trace_state

from tdlrt_jax.conv import stages
from tdlrt_jax.conv.convolution import convolve
from tdlrt_jax.conv.normalization import (
    Normalized,
    OutputGradient,
    Saved,
    normalize,
    normalize_dense,
    normalize_in_reverse,
    normalize_pullback,
)
from tdlrt_jax.conv.rows import contract_rows
from tdlrt_jax.conv.stages import Application
from tdlrt_jax.frame import Frame, in_chart
from tdlrt_jax.tucker import HIGHEST, TuckerTensor, multi_mode_product, unfold

__all__ = ["Applied", "Tap", "applications", "apply_kernel", "apply_normalized", "core_cotangent"]


@partial(jax.tree_util.register_dataclass, data_fields=["x", "dy"], meta_fields=["kernel"])
@dataclass(frozen=True)
class Tap:
    """Hands out what a kernel saw: the custom rule gives a tap's input ``x`` and output gradient ``dy`` as its "gradient".

    A tap without arrays is only noted down in :data:`applications`, with the shapes that it needs.
    """

    kernel: int  # which of the network's kernels
    x: Any = None  # (N, image..., channels), as apply_kernel is given it
    dy: Any = None  # (N, image'..., n_out), or the OutputGradient that it is made of


class Applied(NamedTuple):
    """One application of a kernel with a tap, as seen while tracing."""

    kernel: int
    how: Application
    x: jax.ShapeDtypeStruct
    dy: Any  # shapes and dtypes of the tap's dy
    trace: Any  # where: another one than the caller's within jit, scan, remat, vmap


# The applications noted down, while someone listens.
applications: ContextVar[list[Applied] | None] = ContextVar("applications", default=None)


def apply_kernel(how: Application, x: Array, kernel: TuckerTensor | Frame) -> Array:
    """Applies a kernel ``(window..., c, n_out)`` to ``x (N, image..., g c)``, in the dtype of ``x``.

    A full frame differentiates by the custom rule of this module. A TuckerTensor, and a frame of the core alone,
    differentiate by JAX's own rules, forward mode and higher orders included.

    Returns:
      ``(N, image'..., n_out)``.
    """
    if isinstance(kernel, Frame):
        if kernel.K is not None:
            _note(how, x, kernel, lambda x, frame: _forward(how, x, frame)[0])
            return _one_pass(how, x, kernel)
        kernel = TuckerTensor(kernel.core, kernel.bases())
    return stages.expand(how, _features(how, x, kernel), kernel.factors[-1])


def apply_normalized(
    how: Application,
    x: Array,
    kernel: TuckerTensor | Frame,
    scale: Array | None,
    bias: Array | None,
    *,
    epsilon: float,
    dtype: Any,
) -> Normalized:
    """:func:`apply_kernel` and batch normalization of the result, which itself is not formed.

    Args:
      how: with streamed out-channels and without groups.
      x, kernel: as in :func:`apply_kernel`, which says how they differentiate; any frame in reverse mode alone.
      scale, bias, epsilon: of the normalization.
      dtype: of the output.
    """
    if not isinstance(kernel, Frame):
        b, last = _features(how, x, kernel), kernel.factors[-1]
        return normalize(b, last, scale, bias, epsilon=epsilon, precision=how.precision, dtype=dtype)[0]

    gain = jnp.ones(kernel.U[-1].shape[0], scale.dtype if scale is not None else x.dtype)
    scale, bias = gain if scale is None else scale, jnp.zeros_like(gain) if bias is None else bias
    if kernel.K is None:
        fixed = TuckerTensor(kernel.core, kernel.bases())
        b = _features(how, x, fixed)
        return normalize_in_reverse(epsilon, how.precision, dtype, b, fixed.factors[-1], scale, bias)

    def output_gradient(x: Array, frame: Frame) -> OutputGradient:
        result, (*_, saved) = _normalized_forward(how, epsilon, dtype, x, frame, gain, gain)
        return normalize_pullback(saved, frame.K[-1], result, how.precision)[0]

    _note(how, x, kernel, output_gradient)
    return _one_pass_normalized(how, epsilon, dtype, x, kernel, scale, bias)


def core_cotangent(how: Application, tap: Tap, frame: Frame) -> Array:
    """``dC`` at a core-only frame, from the input and the output gradient that the kernel saw."""
    how = how._replace(preferred_element_type=None)
    a = stages.reduce(how, tap.x, frame.U[-2])
    if isinstance(tap.dy, OutputGradient):
        p = tap.dy.project(frame.U[-1], how.precision) if how.stream_out else tap.dy.to_array()
    else:
        p = tap.dy.astype(a.dtype)
        if how.stream_out:
            merged = jax.ShapeDtypeStruct(stages.merged_shape(how, frame), a.dtype)
            p = stages.project(how, p, frame.U[-1], jax.eval_shape(partial(stages.convolve_merged, how), a, merged))
    # Everything is linear in the core, so its gradient needs no forward pass.
    dM = stages.correlate(how, a, p.astype(a.dtype), stages.merged_shape(how, frame))
    return stages.transpose(lambda core: stages.merge(how, core, frame.U), frame.core, dM.astype(frame.core.dtype))


def _features(how: Application, x: Array, kernel: TuckerTensor) -> Array:
    """``B``, or ``Y`` where the out-channels are merged."""
    a = stages.reduce(how, x, kernel.factors[-2])
    return stages.convolve_merged(how, a, stages.merge(how, kernel.core, kernel.factors))


def _note(how: Application, x: Array, frame: Frame, like: Callable[[Array, Frame], Any]) -> None:
    """Notes an application down if someone listens; ``like(x, frame)`` is like the tap's ``dy``."""
    noted = applications.get()
    if noted is not None and frame.tap is not None:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        dy = jax.eval_shape(like, x, frame._replace(tap=None))
        noted.append(Applied(frame.tap.kernel, how, shape, dy, get_opaque_trace_state()))


# The custom rules: that of a layer for a first derivative, and how its two halves differentiate again.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_pass(how: Application, x: Array, frame: Frame) -> Array:
    return _forward(how, x, frame)[0]


def _forward(how: Application, x: Array, frame: Frame) -> tuple[Array, Any]:
    y, a, b = _applied(how, frame._replace(tap=None), x)
    return y, (x, a, b, frame)


def _backward(how: Application, residuals: Any, dy: Array) -> tuple[Array, Frame]:
    x, a, b, frame = residuals
    dx, gradient = _pulled_back(how, frame._replace(tap=None), x, a, b, dy)
    return dx, _with_tap(gradient, frame.tap, x, dy)


_one_pass.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _one_pass_normalized(
    how: Application, epsilon: float, dtype: Any, x: Array, frame: Frame, scale: Array, bias: Array
) -> Normalized:
    return _normalized_forward(how, epsilon, dtype, x, frame, scale, bias)[0]


def _normalized_forward(
    how: Application, epsilon: float, dtype: Any, x: Array, frame: Frame, scale: Array, bias: Array
) -> tuple[Normalized, Any]:
    result, a, saved = _normalized((how, epsilon, dtype), frame._replace(tap=None), x, scale, bias)
    return result, (x, a, frame, scale, bias, saved)


def _normalized_backward(
    how: Application, epsilon: float, dtype: Any, residuals: Any, cotangents: Normalized
) -> tuple[Array, Frame, Array, Array]:
    x, a, frame, scale, bias, saved = residuals
    dx, gradient, dscale, dbias, dy = _normalized_pulled_back(
        (how, epsilon, dtype), frame._replace(tap=None), x, a, scale, bias, saved, cotangents
    )
    return dx, _with_tap(gradient, frame.tap, x, dy), dscale, dbias


_one_pass_normalized.defvjp(_normalized_forward, _normalized_backward)


def _with_tap(gradient: Frame, tap: Tap | None, x: Array, dy: Any) -> Frame:
    """Not a derivative: this is how the two leave the backward pass."""
    return gradient if tap is None else gradient._replace(tap=Tap(tap.kernel, x, dy))


def _apply(how: Application, frame: Frame, x: Array) -> tuple[Array, Array | None, Array | None]:
    """``Y``, and the two stages that the way back needs."""
    a, b = _stages(how, x, frame)
    return stages.expand(how, b, frame.K[-1]), a if how.stream_in else None, b if how.stream_out else None


def _apply_in_chart(how: Application, frame: Frame, x: Array) -> tuple[Array, Array | None, Array | None]:
    _, a, b = jax.lax.stop_gradient(_apply(how, frame, x))  # of no use on a way back in the chart
    return _by_chart(how, frame, x), a, b


def _pull_back(
    how: Application, frame: Frame, x: Array, a: Array | None, b: Array | None, dy: Array
) -> tuple[Array, Frame]:
    """The gradients of input and frame."""
    dy = dy.astype(x.dtype)
    if b is None:
        return _gradients(how, x, a, frame, dy, None)
    plain = how._replace(preferred_element_type=None)
    p = stages.project(plain, dy, frame.U[-1], b)
    if how.geometry.groups == 1:
        last = contract_rows(dy, b, precision=how.precision, dtype=frame.K[-1].dtype)
    else:
        last = stages.transpose(lambda k: stages.expand(plain, b, k), frame.K[-1], dy)
    return _gradients(how, x, a, frame, p, last)


def _pull_back_in_chart(
    how: Application, frame: Frame, x: Array, a: Array | None, b: Array | None, dy: Array
) -> tuple[Array, Frame]:
    def apply(x: Array, core: Array, K: Any) -> Array:
        return _by_chart(how, frame._replace(core=core, K=K), x)

    dx, dcore, dK = jax.vjp(apply, x, frame.core, frame.K)[1](dy)
    return dx, Frame(dcore, dK, None, None)  # type: ignore[arg-type]


def _apply_and_normalize(
    static: tuple, frame: Frame, x: Array, scale: Array, bias: Array
) -> tuple[Normalized, Array | None, Saved]:
    """The normalized output, and what the way back needs."""
    how, epsilon, dtype = static
    a, b = _stages(how, x, frame)
    result, saved = normalize(b, frame.K[-1], scale, bias, epsilon=epsilon, precision=how.precision, dtype=dtype)
    return result, a if how.stream_in else None, saved


def _apply_and_normalize_in_chart(
    static: tuple, frame: Frame, x: Array, scale: Array, bias: Array
) -> tuple[Normalized, Array | None, Saved]:
    _, a, saved = jax.lax.stop_gradient(_apply_and_normalize(static, frame, x, scale, bias))
    return _normalized_by_chart(static, frame, x, scale, bias), a, saved


def _pull_back_normalized(
    static: tuple,
    frame: Frame,
    x: Array,
    a: Array | None,
    scale: Array,
    bias: Array,
    saved: Saved,
    cotangents: Normalized,
) -> tuple[Array, Frame, Array, Array, OutputGradient]:
    """The gradients of input, frame, scale and bias, and of what was normalized."""
    how, *_ = static
    dy, last, dscale, dbias = normalize_pullback(saved, frame.K[-1], cotangents, how.precision)
    p = dy.project(frame.U[-1], how.precision).astype(x.dtype)
    dx, gradient = _gradients(how, x, a, frame, p, last.astype(frame.K[-1].dtype))
    return dx, gradient, dscale.astype(scale.dtype), dbias.astype(bias.dtype), dy


def _pull_back_normalized_in_chart(
    static: tuple,
    frame: Frame,
    x: Array,
    a: Array | None,
    scale: Array,
    bias: Array,
    saved: Saved,
    cotangents: Normalized,
) -> tuple[Array, Frame, Array, Array, OutputGradient]:
    def normalized(x: Array, core: Array, K: Any, scale: Array, bias: Array) -> Normalized:
        return _normalized_by_chart(static, frame._replace(core=core, K=K), x, scale, bias)

    dx, dcore, dK, dscale, dbias = jax.vjp(normalized, x, frame.core, frame.K, scale, bias)[1](cotangents)
    dy, *_ = jax.lax.stop_gradient(normalize_pullback(saved, frame.K[-1], cotangents, static[0].precision))
    return dx, Frame(dcore, dK, None, None), dscale, dbias, dy  # type: ignore[arg-type]


_applied = in_chart(_apply, _apply_in_chart)
_pulled_back = in_chart(_pull_back, _pull_back_in_chart)
_normalized = in_chart(_apply_and_normalize, _apply_and_normalize_in_chart)
_normalized_pulled_back = in_chart(_pull_back_normalized, _pull_back_normalized_in_chart)


def _by_chart(how: Application, frame: Frame, x: Array) -> Array:
    """The application by the kernel itself, as :meth:`Frame.chart_to_dense` forms it: differentiable to any order."""
    kernel, result = frame.chart_to_dense().astype(x.dtype), how.preferred_element_type
    return convolve(x, kernel, how.geometry, precision=how.precision, preferred_element_type=result)


def _normalized_by_chart(static: tuple, frame: Frame, x: Array, scale: Array, bias: Array) -> Normalized:
    how, epsilon, dtype = static
    return normalize_dense(_by_chart(how, frame, x), scale, bias, epsilon=epsilon, dtype=dtype)


def _stages(how: Application, x: Array, frame: Frame) -> tuple[Array, Array]:
    """``A`` and ``B``; where a channel mode is merged, the one before or after it."""
    a = stages.reduce(how, x, frame.U[-2])
    return a, stages.convolve_merged(
        how, a, stages.merge(how, _orthonormal(frame.Q[-1], frame.core, how.stream_out), frame.U)
    )


def _gradients(
    how: Application, x: Array, a: Array | None, frame: Frame, p: Array, last: Array | None
) -> tuple[Array, Frame]:
    """What is left to do with ``P`` and ``dK_out``, which is ``None`` where the out-channels are merged and ``P = dY``."""
    core, K, U, Q = frame[:4]
    how = how._replace(preferred_element_type=None)
    a = stages.reduce(how, x, None) if a is None else a
    dK: list[Array | None] = [*[None] * (len(U) - 1), last]

    kernel = stages.merge(how, _orthonormal(Q[-2], core, how.stream_in), U)
    e = stages.transpose(lambda a: stages.convolve_merged(how, a, kernel), a, p)
    dx = stages.transpose(lambda z: stages.reduce(how, z, K[-2]), x, e)
    if how.stream_in and how.geometry.groups == 1:
        dK[-2] = contract_rows(x, e, precision=how.precision, dtype=K[-2].dtype)
    elif how.stream_in:
        dK[-2] = stages.transpose(lambda k: stages.reduce(how, x, k), K[-2], e)

    dM = stages.correlate(how, a, p, kernel.shape).astype(kernel.dtype)
    merged = stages.merged_factors(how, U)
    channels = len(U) - 2
    # The spatial modes and the core share the products with the large channel factors.
    inner = multi_mode_product(dM, (None,) * channels + merged[channels:], transpose=True)
    spatial = (*merged[:channels], None, None)
    dcore = multi_mode_product(inner, spatial, transpose=True)
    for mode, factor in enumerate(merged):
        if factor is not None:
            source, matrices = (inner, spatial) if mode < channels else (dM, merged)
            rest = multi_mode_product(source, matrices, transpose=True, skip=mode)
            dK[mode] = jnp.matmul(unfold(rest, mode), unfold(Q[mode], mode).T, precision=HIGHEST).astype(K[mode].dtype)
    return dx, Frame(dcore.astype(core.dtype), tuple(dK), None, None)  # type: ignore[arg-type]


def _orthonormal(q: Array | None, core: Array, streamed: bool) -> Array:
    """The core-shaped ``X`` of ``M[X]``: ``Q_i`` where mode ``i`` is streamed (``K_i`` completes it), else ``C``."""
    return core if q is None or not streamed else q
