"""The tangent space (3) of the Tucker manifold and the orthogonal projection (6) onto it, in two kinds of coordinates.

In the chart of Theorem 1 a tangent vector is ``(dC, dK_i)`` with ``U_i^T dK_i = 0``, and nothing is inverted. In the factors it
is ``(dC, dU_i)`` with the gauge ``U_i^T dU_i = 0``, and ``dU_i = dK_i S_i^{-1}``: there the small singular values come in.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from tdlrt_jax.frame import Frame, lift
from tdlrt_jax.tucker import (
    HIGHEST,
    ModeArray,
    TuckerTensor,
    check_kernel,
    check_structure,
    kernel_shape,
    mode_product,
    multi_mode_product,
    unfold,
)

__all__ = ["chart_coordinates", "chart_to_dense", "project", "tangent_coordinates", "tangent_to_dense"]


def project(kernel: TuckerTensor, dense: Array) -> Array:
    """``P(W) Z``, the orthogonal projection of a full tensor onto the tangent space at ``W`` (paper, equation (6)).

    Args:
      kernel: ``W``, with orthonormal factors, of any order.
      dense: ``Z``, ``(n_1, ..., n_d)``.

    Returns:
      ``(n_1, ..., n_d)``.

    Raises:
      ValueError: for factors that do not fit the core.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jnp.outer(jnp.arange(1.0, 4.0), jnp.ones(5)), rank=1)
      >>> bool(jnp.allclose(project(kernel, tdlrt_jax.to_dense(kernel)), tdlrt_jax.to_dense(kernel), atol=1e-5))
      True

    Source: equations (3) and (6).
    """
    frame = lift(kernel)
    _check_dense(dense, kernel_shape(kernel))
    return chart_to_dense(frame, chart_coordinates(frame, dense))


def outside(directions: Array, basis: Array) -> Array:
    """``(I - U U^T) directions``, twice, so that the rounding of what is taken out stays small."""
    for _ in range(2):
        inside = jnp.matmul(basis.T, directions, precision=HIGHEST)
        directions = directions - jnp.matmul(basis, inside, precision=HIGHEST)
    return directions


def _check_dense(dense: Any, shape: tuple[int, ...]) -> None:
    if jnp.shape(dense) != shape:
        raise ValueError(f"dense has shape {jnp.shape(dense)}: expected the kernel's, {shape}")


def _check_frame(frame: Any) -> None:
    if not isinstance(frame, Frame) or frame.Q is None:
        raise ValueError(f"frame is a {type(frame).__name__}: expected the Frame that tdlrt_jax.lift makes of a kernel")


def chart_coordinates(frame: Frame, dense: Array) -> TuckerTensor:
    """``P(W) Z`` in the chart: ``dC = Z ×_j U_j^T`` and ``dK_i = (I - U_i U_i^T) Mat_i(Z ×_{j != i} U_j^T) Q_i``.

    Args:
      frame: at ``W``, from :func:`tdlrt_jax.lift`.
      dense: ``Z``, ``(n_1, ..., n_d)``.

    Returns:
      ``TuckerTensor(dC, (dK_1, ..., dK_d))`` with the shapes of the kernel's; ``None`` for whole modes.
    """
    _check_frame(frame)
    _check_dense(dense, kernel_shape(frame))
    factors: list[ModeArray] = []
    for mode, (u, q) in enumerate(zip(frame.U, frame.Q)):
        if u is None:
            factors.append(None)
            continue
        rows = unfold(multi_mode_product(dense, frame.U, transpose=True, skip=mode), mode)
        factors.append(outside(jnp.matmul(rows, unfold(q, mode).T, precision=HIGHEST), u))
    return TuckerTensor(multi_mode_product(dense, frame.U, transpose=True), tuple(factors))


def chart_to_dense(frame: Frame, tangent: TuckerTensor) -> Array:
    """``dC ×_j U_j + sum_i Ten_i(Q_i^T) ×_{j != i} U_j ×_i dK_i``: a tangent vector in the chart as a full tensor."""
    _check_frame(frame)
    check_kernel(tangent, "tangent")
    dense = multi_mode_product(tangent.core, frame.U)
    for mode, (dk, q) in enumerate(zip(tangent.factors, frame.Q)):
        if dk is not None:
            dense = dense + multi_mode_product(mode_product(q, dk, mode), frame.U, skip=mode)
    return dense


def tangent_coordinates(kernel: TuckerTensor, dense: Array) -> TuckerTensor:
    """``P(W) Z`` in the factors: ``dC = Z ×_j U_j^T``, ``dU_i = (I - U_i U_i^T) Mat_i(Z ×_{j != i} U_j^T) Mat_i(C)^†``.

    For ``Z = -∇_W L`` the right-hand side of (7), with its pseudoinverses: ``dU_i`` grows as the smallest singular value of
    ``Mat_i(C)`` falls. Values under rounding, those of padded slices among them, count as zero.

    Args:
      kernel: ``W``, with orthonormal factors.
      dense: ``Z``, ``(n_1, ..., n_d)``.

    Returns:
      ``TuckerTensor(dC, (dU_1, ..., dU_d))`` with ``U_i^T dU_i = 0``; ``None`` for whole modes.

    Source: equations (3) and (7).
    """
    check_structure(kernel)
    _check_dense(dense, kernel_shape(kernel))
    factors: list[ModeArray] = []
    for mode, u in enumerate(kernel.factors):
        if u is None:
            factors.append(None)
            continue
        rows = unfold(multi_mode_product(dense, kernel.factors, transpose=True, skip=mode), mode)
        inverse = jnp.linalg.pinv(unfold(kernel.core, mode))
        factors.append(jnp.matmul(outside(rows, u), inverse, precision=HIGHEST))
    return TuckerTensor(multi_mode_product(dense, kernel.factors, transpose=True), tuple(factors))


def tangent_to_dense(kernel: TuckerTensor, tangent: TuckerTensor) -> Array:
    """``dC ×_j U_j + sum_i C ×_{j != i} U_j ×_i dU_i`` (paper, equation (3)) as a full tensor.

    Args:
      kernel: ``W``.
      tangent: ``TuckerTensor(dC, (dU_1, ..., dU_d))``.

    Example:
      >>> import jax, jax.numpy as jnp, tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jax.random.normal(jax.random.key(0), (4, 5, 6)), rank=2)
      >>> direction = jnp.ones((4, 5, 6))
      >>> tangent = tangent_coordinates(kernel, direction)
      >>> bool(jnp.allclose(tangent_to_dense(kernel, tangent), project(kernel, direction), atol=1e-5))
      True
    """
    check_structure(kernel)
    check_kernel(tangent, "tangent")
    dense = multi_mode_product(tangent.core, kernel.factors)
    for mode, du in enumerate(tangent.factors):
        if du is not None:
            moved = [du if j == mode else u for j, u in enumerate(kernel.factors)]
            dense = dense + multi_mode_product(kernel.core, moved)
    return dense
