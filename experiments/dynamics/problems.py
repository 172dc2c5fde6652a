"""Losses of one kernel with known constants and solutions, and kernels to start from."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tdlrt_jax import TuckerTensor, to_dense
from tdlrt_jax.initialization import tucker_spectral
from tdlrt_jax.tucker import multi_mode_product

__all__ = ["Quadratic", "Smooth", "graded_kernel", "quadratic", "quadratic_loss", "smooth", "smooth_loss"]


class Quadratic(NamedTuple):
    """``L(W) = 1/2 sum_i <W, W ×_i H_i> + eps <B, W>`` with symmetric ``H_i``.

    Without the last term the gradient at any kernel is in its tangent space (``dU_i = H_i U_i``), so the full flow keeps all
    ranks while their subspaces turn. With it the gradient is ``eps``-close to the tangent space, for ``||B|| = 1``.
    """

    curvature: tuple[Array, ...]  # H_i, (n_i, n_i)
    normal: Array  # B, (n_1, ..., n_d)
    eps: Array | float

    def solution(self, start: Array, time: float) -> np.ndarray:
        """The solution of the full flow (4) at a time, in the eigenvectors of the ``H_i``, in which it is diagonal."""
        values, vectors = zip(*(np.linalg.eigh(np.asarray(h)) for h in self.curvature))
        rates = sum(np.expand_dims(v, [j for j in range(len(values)) if j != i]) for i, v in enumerate(values))
        w, b = (np.asarray(multi_mode_product(jnp.asarray(x), vectors, transpose=True)) for x in (start, self.normal))
        still = np.abs(rates) < 1e-12
        pushed = np.where(still, -time, np.expm1(-rates * time) / np.where(still, 1, rates))
        moved = np.exp(-rates * time) * w + float(self.eps) * b * pushed
        return np.asarray(multi_mode_product(jnp.asarray(moved), vectors))


def quadratic(shape: tuple[int, ...], *, eps: float = 0.0, decay: float | None = None, seed: int = 0) -> Quadratic:
    """A :class:`Quadratic` with eigenvalues of every ``H_i`` spread evenly over [-1, 1].

    Args:
      shape: of the kernel.
      eps: the distance of the gradient from the tangent space, at most.
      decay: of the singular values of every unfolding of ``B``; default: a random tensor's, nearly flat.
      seed: of the random subspaces.
    """
    rng = np.random.default_rng(seed)
    curvature = []
    for n in shape:
        vectors = np.linalg.qr(rng.standard_normal((n, n)))[0]
        curvature.append(jnp.asarray(vectors @ np.diag(np.linspace(-1, 1, n)) @ vectors.T))
    if decay is None:
        normal = jnp.asarray(rng.standard_normal(shape))
    else:
        normal = to_dense(tucker_spectral(jax.random.key(seed + 1), shape, decay=decay, norm=1.0, dtype=jnp.float64))
    return Quadratic(tuple(curvature), normal / jnp.linalg.norm(normal), eps)


def quadratic_loss(kernel: Any, problem: Quadratic) -> Array:
    """``L(W)`` of a :class:`Quadratic`; the kernel in any form."""
    dense = to_dense(kernel)
    bent = sum(
        jnp.vdot(dense, jnp.moveaxis(jnp.tensordot(h, dense, (1, i)), 0, i)) for i, h in enumerate(problem.curvature)
    )
    return 0.5 * bent + problem.eps * jnp.vdot(problem.normal, dense)


class Smooth(NamedTuple):
    """``L(W) = sum_j w_j log cosh(W_j - T_j)``: ``||∇L|| <= ||w||``, and ``∇L`` has the Lipschitz constant ``max w_j``."""

    weights: Array
    target: Array


def smooth(shape: tuple[int, ...], rank: int, *, norm: float = 1.0, seed: int = 0) -> Smooth:
    """Weights between 1/2 and 3/2, and a random target of the given Tucker rank and norm."""
    rng = np.random.default_rng(seed)
    factors = [np.linalg.qr(rng.standard_normal((n, min(rank, n))))[0] for n in shape]
    core = jnp.asarray(rng.standard_normal([u.shape[1] for u in factors]))
    target = to_dense(TuckerTensor(core / jnp.linalg.norm(core) * norm, tuple(map(jnp.asarray, factors))))
    return Smooth(jnp.asarray(rng.uniform(0.5, 1.5, shape)), target)


def smooth_loss(kernel: Any, problem: Smooth) -> Array:
    """``L(W)`` of a :class:`Smooth`; the kernel in any form."""
    x = jnp.abs(to_dense(kernel) - problem.target)
    return jnp.sum(problem.weights * (x + jnp.log1p(jnp.exp(-2 * x)) - jnp.log(2.0)))


def graded_kernel(shape: tuple[int, ...], rank: int, smallest: float, *, seed: int = 0) -> TuckerTensor:
    """A kernel of norm 1 whose unfoldings have singular values from 1 to 1/10 (relatively), and a last one ``smallest``."""
    values = [*np.geomspace(1.0, 0.1, max(rank - 1, 1))[: rank - 1].tolist(), smallest]
    key = jax.random.key(seed, impl="threefry2x32")
    ranks = (rank,) * len(shape)
    return tucker_spectral(key, shape, ranks, singular_values=values, norm=1.0, dtype=jnp.float64)
