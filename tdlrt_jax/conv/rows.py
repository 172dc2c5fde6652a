"""Products that contract all pixels of a batch: the gradients of factors, which have few rows and columns and a long sum."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

__all__ = ["contract_rows"]


def contract_rows(a: Array, b: Array, *, precision: Any = None, dtype: Any = None) -> Array:
    """``A^T B`` over all dimensions but the last: ``(..., m)`` and ``(..., n)`` to ``(m, n)``.

    On a CPU the product with few rows is taken and transposed where the result has few columns, which takes XLA up to twice as
    long (two cores, jaxlib 0.10, ``benchmarks/results/cpu``).

    Args:
      a, b: with equal leading dimensions.
      precision: of the product.
      dtype: of the result; that of the operands by default.
    """
    a, b = (array.reshape(-1, array.shape[-1]) for array in (a, b))
    product = partial(jnp.einsum, "rm,rn->mn", precision=precision, preferred_element_type=dtype)
    if a.shape[-1] <= b.shape[-1] or jax.default_backend() != "cpu":
        return product(a, b)
    # The barrier keeps XLA from taking the transpose of a product for the product of the transposes.
    return lax.optimization_barrier(product(b, a)).T
