"""What a step looks at before it is accepted: finite numbers, orthonormal factors, gradients of the right kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tdlrt_jax.batching import map_batched, map_light
from tdlrt_jax.frame import Frame, active_entries
from tdlrt_jax.tucker import HIGHEST, ModeArray, TuckerTensor, active_columns, unfold

__all__ = [
    "ORTHONORMAL",
    "adds_up",
    "all_finite",
    "deviation",
    "largest_deviation",
    "look_other",
    "look_plain",
    "stays_finite",
]

# Largest entry of |U^T U - I| that a step accepts. Its Newton-Schulz correction (see orthonormal_factors) takes a deviation E to
# 3/4 E^2, so what is accepted is orthonormal to 1e-6 afterwards, and to rounding one step later.
ORTHONORMAL = 1e-3
# Leaves of up to so many entries are looked at together: a copy costs less than operations for each, to compile above all.
_SMALL = 2**16


def deviation(factor: Array, gram: Array | None = None) -> Array:
    """The largest entry of ``|U^T U - I|`` on the active columns, which come first: a scalar; 1 if there is none.

    Args:
      factor: ``U``, ``(n, R)``.
      gram: ``U^T U`` where it is at hand.
    """
    if gram is None:
        gram = jnp.matmul(factor.T, factor, precision=HIGHEST)
    rank, index = jnp.maximum(jnp.sum(active_columns(factor)), 1), jnp.arange(gram.shape[0])
    identity = (index[:, None] == index) & (index < rank)
    return jnp.max(jnp.abs(gram - identity))


def largest_deviation(factors: Sequence[ModeArray]) -> Array:
    """:func:`deviation` of the worst of many factors, a float32 scalar; not a number where one of them is not finite."""
    present = [factor for factor in factors if factor is not None]
    found = map_batched(deviation, present, apart=[None] * len(present))
    return jnp.max(jnp.stack([jnp.zeros((), jnp.float32), *(value.astype(jnp.float32) for value in found)]))


def all_finite(tree: Any) -> Array:
    """Whether all floating numbers in a pytree are finite: a boolean scalar."""
    return _hold(jnp.isfinite, [(leaf,) for leaf in jax.tree.leaves(tree) if _is_inexact(leaf)])


def stays_finite(before: Any, after: Any) -> Array:
    """Whether all floating numbers of ``after`` are finite where their counterparts in ``before`` were: a boolean scalar.

    What was infinite from the start (the best value that a plateau schedule has seen, a mask of -inf) may stay so.
    """
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return _hold(
        lambda old, new: jnp.isfinite(new) | ~jnp.isfinite(old), [(old, new) for old, new in pairs if _is_inexact(new)]
    )


def adds_up(params: Any, updates: Any) -> Array:
    """Whether updates are finite, and the parameters with them added where they were before: a boolean scalar.

    A sum may overflow where both of its terms are finite, and rounding to the parameters' dtype as well.
    """
    after = jax.tree.leaves(optax.apply_updates(params, updates))
    rows = zip(jax.tree.leaves(updates), jax.tree.leaves(params), after, strict=True)
    return _hold(
        lambda update, old, new: jnp.isfinite(update) & (jnp.isfinite(new) | ~jnp.isfinite(old)),
        [row for row in rows if _is_inexact(row[-1])],
    )


def look_plain(frames: Sequence[Frame], grads: Sequence[TuckerTensor]) -> Array:
    """Whether gradients look like plain factor gradients: those of Theorem 1 satisfy ``U_i^T dK_i = Mat_i(dC) Q_i``.

    One mode of each kernel tells, the last that has a factor.
    """
    rows: list[tuple[Array, ...]] = []
    for frame, grad in zip(frames, grads):
        modes = enumerate(zip(frame.U, grad.factors, frame.Q or ()))
        told = [mode for mode, parts in modes if all(part is not None for part in parts)]
        if told:
            mode = told[-1]
            rows.append((frame.U[mode], grad.factors[mode], unfold(grad.core, mode), unfold(frame.Q[mode], mode)))
    if not rows:
        return jnp.zeros((), bool)
    # At a stationary point both sides are rounding; only a mismatch that matters beside the whole gradient counts.
    apart, agreement, total = sum(map_light(_beside_plain, *zip(*rows)), start=jnp.zeros(3))
    return (apart > 0.25 * agreement) & (apart > 1e-4 * total)


def _beside_plain(u: Array, dk: Array, core: Array, q: Array) -> Array:
    """The energies of ``U^T dK - Mat(dC) Q``, of both together, and of the gradient."""
    inside = jnp.matmul(u.T, dk, precision=HIGHEST)
    core_part = jnp.matmul(core, q.T, precision=HIGHEST)
    pairs = [(inside - core_part,), (inside, core_part), (dk, core)]
    return jnp.stack([sum(jnp.sum(part.astype(jnp.float32) ** 2) for part in parts) for parts in pairs])


def look_other(frames: Sequence[Frame], first: Sequence[TuckerTensor], second: Sequence[TuckerTensor]) -> Array:
    """Whether gradients in augmented bases are others than those before, which they contain: their first block is ``dC``.

    Args:
      frames: before the step. Where a rank is below the capacity, new directions stand in its padding.
      first: ``(dC, dK_i)``.
      second: ``dC̃``, of the same network.
    """
    if not first:
        return jnp.zeros((), bool)
    blocks = [
        jnp.where(active_entries(frame.core.shape, frame.U), there.core[tuple(map(slice, frame.core.shape))], 0)
        for frame, there in zip(frames, second)
    ]
    apart, agreement = sum(map_light(_beside_other, [here.core for here in first], blocks), start=jnp.zeros(2))
    total = sum(jnp.sum(there.core.astype(jnp.float32) ** 2) for there in second)
    # A seventh of the gradient is more than what is rounded in 16 bits.
    return (apart > 0.01 * agreement) & (apart > 1e-4 * total)


def _beside_other(here: Array, there: Array) -> Array:
    """The energies of the difference of two gradients, and of both."""
    here, there = here.astype(jnp.float32), there.astype(jnp.float32)
    return jnp.stack([jnp.sum((here - there) ** 2), jnp.sum(here**2) + jnp.sum(there**2)])


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)


def _hold(check: Callable[..., Array], rows: Sequence[tuple]) -> Array:
    """Whether ``check(*row)`` holds for all entries of all rows of leaves, those of a row being equally shaped."""
    found, small = [], dict[tuple, list[tuple]]()
    for row in rows:
        if jnp.size(row[0]) > _SMALL:
            found.append(jnp.all(check(*row)))
        else:
            small.setdefault(tuple(jnp.result_type(leaf) for leaf in row), []).append(row)
    for together in small.values():
        columns = (jnp.concatenate([jnp.ravel(leaf) for leaf in column]) for column in zip(*together))
        found.append(jnp.all(check(*columns)))
    return jnp.all(jnp.stack(found)) if found else jnp.ones((), bool)
