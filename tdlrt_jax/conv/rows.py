"""Products that contract all pixels of a batch: the gradients of factors, which have few rows and columns and a long sum."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["contract_rows"]

# XLA's CPU backend takes such a product whole, on one core where the result is small: chunks of about so many rows and their
# sum are faster from so many channels on, up to four times (benchmarks/results/cpu_xeon). They are at least eight, so that rows
# spread over as many devices are summed up on each of them first.
_ROWS = 2048
_CHANNELS = 32
_CHUNKS = 8


def contract_rows(a: Array, b: Array, *, precision: Any = None, dtype: Any = None) -> Array:
    """``A^T B`` over all dimensions but the last: ``(..., m)`` and ``(..., n)`` to ``(m, n)``.

    Args:
      a, b: with equal leading dimensions.
      precision: of the product.
      dtype: of the result; that of the operands by default.
    """
    # The narrow operand first: with few rows in the result the product is several times faster than with few columns.
    if a.shape[-1] > b.shape[-1]:
        return contract_rows(b, a, precision=precision, dtype=dtype).T
    chunks = _chunks(math.prod(a.shape[:-1])) if b.shape[-1] >= _CHANNELS and jax.default_backend() == "cpu" else 1
    a, b = (array.reshape(chunks, -1, array.shape[-1]) for array in (a, b))
    parts = jnp.einsum("knm,kno->kmo", a, b, precision=precision, preferred_element_type=dtype)
    return parts[0] if chunks == 1 else jnp.sum(parts, axis=0)


def _chunks(rows: int) -> int:
    """A power of two that divides the rows, for chunks of about ``_ROWS``, of half of that if they are few; or 1."""
    chunks = 1
    if not isinstance(rows, int):  # a symbolic batch
        return chunks
    while rows % (2 * chunks) == 0 and rows // (2 * chunks) >= (_ROWS if chunks >= _CHUNKS else _ROWS // 2):
        chunks *= 2
    return chunks if chunks >= _CHUNKS else 1
