"""Batch normalization of what a Tucker kernel gives, in the coordinates of its rank.

A convolution that streams its out-channels ends with ``Y = B K^T``, ``B`` of ``r`` channels and ``Y`` of ``n_out``
(:mod:`tdlrt_jax.conv.onepass`). Over the ``N`` pixels of a batch, with ``B_c = B - mean(B)`` and the ``r x r`` covariance
``Σ = B_c^T B_c / N``, the statistics of ``Y`` are those of ``B``, and normalizing is another factor in the place of ``K``::

    mean(Y) = K mean(B)      var(Y)_o = K_o Σ K_o^T      Z = B_c (s K)^T + β      s = γ / sqrt(var + ε)

so that of ``Y``'s size there is only ``Z``, written once, where normalization by itself reads and writes such arrays again and
again. Likewise on the way back, with ``D = dZ^T B_c``::

    dβ = sum dZ      dγ = rowsum(D K) / sqrt(var + ε)      G = s dγ K / (N sqrt(var + ε))      h = s dβ / N
    dY = s dZ - B_c G^T - h      dK = dY^T B = s D - N G Σ      dY V = dZ (s V) - B_c (G^T V) - h V  for any basis V

The covariance is that of centered features, and no variance is the difference of two large numbers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax.conv.rows import contract_rows
from tdlrt_jax.tucker import HIGHEST

__all__ = [
    "Normalized",
    "OutputGradient",
    "Saved",
    "normalize",
    "normalize_dense",
    "normalize_in_reverse",
    "normalize_pullback",
]


class Normalized(NamedTuple):
    """The normalized output, and the statistics of the one before."""

    y: Array  # (..., n_out)
    mean: Array  # (n_out,)
    variance: Array  # (n_out,), with N and not N - 1 in the denominator


class Saved(NamedTuple):
    """What the way back needs of the way there; nothing of it has ``n_out`` channels for every pixel."""

    centered: Array  # (..., r), B_c in the dtype of the statistics
    mean: Array  # (r,), of B
    covariance: Array  # (r, r)
    inverse: Array  # (n_out,), 1 / sqrt(var + ε)
    gain: Array  # (n_out,), s


class OutputGradient(NamedTuple):
    """``dY = s dZ - B_c G^T - h``, the gradient before the normalization, as what it is made of."""

    dz: Array  # (..., n_out)
    gain: Array  # (n_out,), s
    centered: Array  # (..., r), B_c
    slopes: Array  # (n_out, r), G
    shift: Array  # (n_out,), h

    def project(self, basis: Array, precision: Any) -> Array:
        """``dY V`` for ``V`` of ``n_out`` rows, in the dtype of ``dZ`` and without ``dY``."""
        basis = basis.astype(self.gain.dtype)
        wide = _product(self.dz, self.gain[:, None] * basis, precision)
        correction = jnp.matmul(self.slopes.T, basis, precision=HIGHEST)
        return (
            wide
            - _product(self.centered.astype(wide.dtype), correction, precision)
            - (jnp.matmul(self.shift, basis, precision=HIGHEST).astype(wide.dtype))
        )

    def to_array(self) -> Array:
        """``dY`` itself."""
        low = jnp.matmul(self.centered, self.slopes.T, precision=HIGHEST) + self.shift
        return (self.gain * self.dz - low).astype(self.dz.dtype)


def normalize(
    b: Array,
    matrix: Array,
    scale: Array | None,
    bias: Array | None,
    *,
    epsilon: float,
    precision: Any,
    dtype: Any,
) -> tuple[Normalized, Saved]:
    """Normalizes ``Y = B K^T`` without forming it; every operation is JAX's own and differentiates to any order.

    Args:
      b: ``B``, ``(..., r)``.
      matrix: ``K``, ``(n_out, r)``.
      scale, bias: ``γ`` and ``β``, ``(n_out,)``; ``None`` for ones and zeros.
      epsilon: added to the variance.
      precision: of the product that gives the output; those of the statistics are at the highest.
      dtype: of the output. Statistics are in float32 at least.
    """
    features = b.astype(jnp.promote_types(b.dtype, jnp.float32))
    matrix = matrix.astype(features.dtype)
    every = tuple(range(b.ndim - 1))
    mean = jnp.mean(features, every)
    centered = features - mean
    covariance = contract_rows(centered, centered, precision=HIGHEST) / math.prod(b.shape[:-1])
    variance = jnp.maximum(jnp.sum(jnp.matmul(matrix, covariance, precision=HIGHEST) * matrix, axis=1), 0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    gain = inverse if scale is None else inverse * scale.astype(features.dtype)
    z = _product(centered.astype(b.dtype), (gain[:, None] * matrix).T, precision, dtype)
    z = z if bias is None else z + bias.astype(z.dtype)
    saved = Saved(centered, mean, covariance, inverse, gain)
    return Normalized(z, jnp.matmul(matrix, mean, precision=HIGHEST), variance), saved


def normalize_pullback(
    saved: Saved, matrix: Array, cotangents: Normalized, precision: Any
) -> tuple[OutputGradient, Array, Array, Array]:
    """The gradients of what :func:`normalize` gave.

    Args:
      saved: from there.
      matrix: ``K``.
      cotangents: of the output and of its statistics.
      precision: of the one product with ``dZ``.

    Returns:
      The gradient in ``Y``; ``dK``, ``(n_out, r)``; those in scale and bias, ``(n_out,)`` each.
    """
    dz, dmean, dvariance = cotangents
    kind = saved.gain.dtype
    matrix = matrix.astype(kind)
    n = math.prod(dz.shape[:-1])
    d = contract_rows(dz, saved.centered.astype(dz.dtype), precision=precision, dtype=kind)
    dbias = jnp.sum(dz, axis=tuple(range(dz.ndim - 1)), dtype=kind)
    dscale = jnp.sum(d * matrix, axis=1) * saved.inverse
    slopes = ((saved.gain * saved.inverse * dscale - 2 * dvariance) / n)[:, None] * matrix
    shift = (saved.gain * dbias - dmean) / n
    dmatrix = saved.gain[:, None] * d - n * jnp.matmul(slopes, saved.covariance, precision=HIGHEST)
    dmatrix = dmatrix + dmean[:, None] * saved.mean
    return OutputGradient(dz, saved.gain, saved.centered, slopes, shift), dmatrix, dscale, dbias


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def normalize_in_reverse(
    epsilon: float, precision: Any, dtype: Any, b: Array, matrix: Array, scale: Array, bias: Array
) -> Normalized:
    """:func:`normalize`, differentiated by :func:`normalize_pullback`: quicker than by JAX's rules, and in reverse mode alone."""
    return normalize(b, matrix, scale, bias, epsilon=epsilon, precision=precision, dtype=dtype)[0]


def _normalize_forward(
    epsilon: float, precision: Any, dtype: Any, b: Array, matrix: Array, scale: Array, bias: Array
) -> tuple[Normalized, Any]:
    result, saved = normalize(b, matrix, scale, bias, epsilon=epsilon, precision=precision, dtype=dtype)
    return result, (b, matrix, scale, bias, saved)


def _normalize_backward(
    epsilon: float, precision: Any, dtype: Any, residuals: Any, cotangents: Normalized
) -> tuple[Array, Array, Array, Array]:
    b, matrix, scale, bias, saved = residuals
    dy, *rest = normalize_pullback(saved, matrix, cotangents, precision)
    dmatrix, dscale, dbias = (d.astype(like.dtype) for d, like in zip(rest, (matrix, scale, bias)))
    return dy.project(matrix, precision).astype(b.dtype), dmatrix, dscale, dbias


normalize_in_reverse.defvjp(_normalize_forward, _normalize_backward)


def normalize_dense(y: Array, scale: Array | None, bias: Array | None, *, epsilon: float, dtype: Any) -> Normalized:
    """The same of a ``Y`` that is there."""
    wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    every = tuple(range(y.ndim - 1))
    mean = jnp.mean(wide, every)
    centered = wide - mean
    variance = jnp.mean(centered**2, every)
    gain = jax.lax.rsqrt(variance + epsilon)
    z = centered * (gain if scale is None else gain * scale.astype(gain.dtype))
    z = z if bias is None else z + bias.astype(z.dtype)
    return Normalized(z.astype(dtype), mean, variance)


def _product(x: Array, matrix: Array, precision: Any, dtype: Any = None) -> Array:
    return jnp.matmul(x, matrix.astype(x.dtype), precision=precision, preferred_element_type=dtype)
