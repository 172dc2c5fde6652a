"""What the loss has to do with a direction: how much it is expected to rise where the direction is cut.

Singular values say by how much a cut changes a kernel, relative to itself, and not what that does to the loss: in
a trained network the same relative change costs ten and more times as much in one layer as in another. Directions of one mode
are still cut in the order of their singular values; how they compare with those of other modes and kernels is decided here.

Scaling a mode's direction ``u`` by ``1 - t`` changes the loss by ``-t u^T M u`` to first order, with ``M = C_(i) G_(i)^T`` and
``G`` the core's gradient. Near a minimum that averages out over batches, and the second order is what their scatter says: with
the Fisher information in the place of the Hessian the loss rises by ``B/2 E[(u^T M u)^2]``, for batches of ``B`` images. A core's
own coordinates are its principal directions, as truncation leaves them, so these are squares of the diagonal of ``M``.

What may be cut next are the directions with small singular values. One number a mode is measured: the sum of these squares over
the lower half of the directions, relative to their energy. It stays what it is while ranks change and directions turn, so it can
be averaged over batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from tdlrt_jax.tucker import TuckerTensor, active_rank, magnitude

__all__ = ["Sensitivity", "average", "cost_per_rank", "known", "measure", "start"]

# Adaptive steps over which sensitivities are averaged: a single batch's are the squares of a few random numbers.
HORIZON = 20

_LEAST = 1e-10  # of a kernel's energy, below which float32 knows nothing of directions
_MOST = 1e15  # a slope of the loss beyond all meaning, whose square is finite


class Sensitivity(NamedTuple):
    """Running averages, what a budget that asks for the least loss remembers."""

    mean: dict[str, Array]  # float32 (d,) a kernel
    seen: Array  # int32, how many gradients are in it


def measure(kernel: TuckerTensor, gradient: Array) -> Array:
    """What a batch's gradient says of the cost of cutting directions: ``sum_k M_kk^2 / sum_k e_k`` for every mode.

    Sums are over the lower half of the directions (rounded down, but at least one; over all where these are hardly there),
    ``M = C_(i) G_(i)^T``, and ``e_k`` are energies relative to ``||C||^2``. It does not depend on the kernel's scale where a
    normalization follows.

    Args:
      kernel: ``(n_1, ..., n_d)``, at the ranks ``r_i``, as truncation left it: slices of the core in the order of their norms,
        nearly orthogonal to one another.
      gradient: of the core, of its shape.

    Returns:
      float32 ``(d,)``; times the relative energy that is cut, and half the batch size, the rise of the loss (in its units).

    Source: the second-order term of the loss with the empirical Fisher information in the place of its Hessian; Molchanov et
    al. (2019) compare channels so.
    """
    # Scaled to entries of about one, against under- and overflow.
    core, gradient = kernel.core.astype(jnp.float32), gradient.astype(jnp.float32)
    largest = magnitude(core)
    core, gradient = core / largest, gradient * largest
    squares, products = jnp.square(core), core * gradient
    total = jnp.sum(squares)
    found = []
    for mode, rank in enumerate(active_rank(kernel)):
        others = tuple(other for other in range(core.ndim) if other != mode)
        index = jnp.arange(core.shape[mode])
        lower = (index >= jnp.minimum((rank + 1) // 2, rank - 1)) & (index < rank)
        energies = jnp.sum(squares, others)
        slopes = jnp.clip(jnp.sum(products, others), -_MOST, _MOST)
        # Directions that are hardly there say nothing of the others.
        lower = lower | (jnp.sum(jnp.where(lower, energies, 0)) <= _LEAST * total)
        cost, energy = (jnp.sum(jnp.where(lower, part, 0)) for part in (jnp.square(slopes), energies))
        found.append(jnp.where(energy > 0, cost * total / jnp.where(energy > 0, energy, 1), 0))
    return jnp.minimum(jnp.stack(found), _MOST**2)


def start(kernels: Sequence[str], orders: Sequence[int]) -> Sensitivity:
    """Before the first gradient."""
    return Sensitivity({name: jnp.zeros(order, jnp.float32) for name, order in zip(kernels, orders)}, jnp.int32(0))


def average(before: Sensitivity, now: dict[str, Array]) -> Sensitivity:
    """With the gradients of one more batch: the mean of all up to the horizon, and from there on one that forgets."""
    seen = before.seen + 1
    share = 1 / jnp.minimum(seen, HORIZON).astype(jnp.float32)
    return Sensitivity({name: old + share * (now[name] - old) for name, old in before.mean.items()}, seen)


def known(state: Sensitivity) -> dict[str, Array]:
    """The means, and for kernels that no gradient has ever reached (``stop_gradient``) what is usual among the others.

    Zeros would say that nothing of such a kernel matters.
    """
    reached = {name: jnp.any(mean > 0) for name, mean in state.mean.items()}
    total = sum((jnp.where(reached[name], jnp.mean(mean), 0) for name, mean in state.mean.items()), jnp.zeros(()))
    number = sum((of.astype(jnp.float32) for of in reached.values()), jnp.zeros(()))
    usual = jnp.where(number > 0, total / jnp.maximum(number, 1), 1)
    return {name: jnp.where(reached[name], mean, usual) for name, mean in state.mean.items()}


def cost_per_rank(shape: Sequence[int], rank: Array, whole: Sequence[bool]) -> Array:
    """Numbers stored less where a rank falls by one and the others stay: ``n_i + prod_{j != i} r_j``, float32 ``(d,)``.

    Of a matrix, whose two ranks fall together, ``n_1 + n_2 + r``. A whole mode has no rank to fall, its entry says nothing.
    """
    sizes = jnp.array([0 if w else n for n, w in zip(shape, whole)], jnp.float32)
    ranks = jnp.maximum(rank, 1).astype(jnp.float32)
    if len(shape) == 2 and not any(whole):
        return jnp.sum(sizes) + ranks
    return sizes + jnp.prod(ranks) / ranks
