"""Averages of kernels: of the tensors, not of their factors, whose bases differ from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tdlrt_jax.arguments import check_integers, shown
from tdlrt_jax.ranks import check_tolerance, max_capacity
from tdlrt_jax.truncation import truncate
from tdlrt_jax.tucker import HIGHEST, ModeArray, TuckerTensor, check_kernel, kernel_shape, multi_mode_product

__all__ = ["average"]


def average(
    kernels: Sequence[TuckerTensor],
    weights: Sequence[float] | None = None,
    *,
    tolerance: float = 0.0,
    capacity: Sequence[int] | None = None,
) -> TuckerTensor:
    """``sum_k w_k W_k`` as a Tucker tensor: the bases side by side, orthonormalized, and the sum of the cores truncated.

    Args:
      kernels: of one shape, with the same whole modes; orthonormal factors, any ranks.
      weights: one a kernel; default: all ``1 / len(kernels)``.
      tolerance: relative error of the truncation; 0 keeps everything above rounding.
      capacity: static sizes of the result; default: what the sum of the kernels' capacities can need.

    Returns:
      A kernel with active columns first. Works under ``jit``.

    Raises:
      ValueError: for no kernels, kernels of different shapes or whole modes, another number of weights, a tolerance outside of
        [0, 1), or a capacity that is not one count a mode.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> first, second = (tdlrt_jax.hosvd(jnp.eye(3) * scale) for scale in (1.0, 3.0))
      >>> bool(jnp.allclose(tdlrt_jax.to_dense(average([first, second])), 2 * jnp.eye(3), atol=1e-5))
      True
    """
    kernels = list(kernels) if isinstance(kernels, Iterable) and not isinstance(kernels, TuckerTensor) else [kernels]
    for kernel in kernels:
        check_kernel(kernel, "one of the kernels")
    forms = {(kernel_shape(kernel), tuple(u is None for u in kernel.factors)) for kernel in kernels}
    if len(forms) != 1:
        raise ValueError(
            f"kernels must be of one shape with the same whole modes, at least one: got (shape, whole) {sorted(forms)}"
        )
    if weights is None:
        weights = [1 / len(kernels)] * len(kernels)
    count = jnp.shape(weights)[0] if isinstance(weights, Array) and weights.ndim else len(_listed(weights))
    if count != len(kernels):
        raise ValueError(f"weights={shown(weights)}: expected {len(kernels)} numbers, one a kernel")
    if not isinstance(tolerance, jax.core.Tracer):
        check_tolerance(tolerance)
    ((shape, whole),) = forms
    bases: list[ModeArray] = [
        None if whole[mode] else jnp.linalg.qr(jnp.concatenate([kernel.factors[mode] for kernel in kernels], axis=1))[0]
        for mode in range(len(shape))
    ]
    core = jnp.zeros([n if q is None else q.shape[1] for n, q in zip(shape, bases)], kernels[0].core.dtype)
    for weight, kernel in zip(weights, kernels):
        overlaps = [_overlap(q, u) for q, u in zip(bases, kernel.factors)]
        core = core + weight * multi_mode_product(kernel.core, overlaps)
    if capacity is not None:
        capacity = check_integers("capacity", capacity, 1, len(shape), "sizes, one a mode")
        capacity = [min(size, have) for size, have in zip(capacity, core.shape)]
    sizes = max_capacity(shape, core.shape if capacity is None else capacity)
    cut = truncate(core, tolerance, capacity=sizes, whole=whole)
    factors = [_product(q, p) for q, p in zip(bases, cut.rotations)]
    return TuckerTensor(cut.core, tuple(factors))


def _listed(weights: Any) -> list[Any]:
    """The weights if they are numbers, else none."""
    numbers = list(weights) if isinstance(weights, Iterable) and not isinstance(weights, str) else []
    return numbers if all(isinstance(number, int | float | np.number | jax.Array) for number in numbers) else []


def _overlap(basis: ModeArray, factor: ModeArray) -> ModeArray:
    return None if basis is None else jnp.matmul(basis.T, factor, precision=HIGHEST)


def _product(basis: ModeArray, rotation: ModeArray) -> ModeArray:
    return None if basis is None else jnp.matmul(basis, rotation, precision=HIGHEST)
