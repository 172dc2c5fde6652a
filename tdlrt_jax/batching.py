"""One function on many kernels: those of equal shapes as one batch.

The factorizations of a step are small and many, a handful for every mode of every kernel. Done one by one each of them is
compiled by itself, and on a GPU each waits for the one before; layers of one shape, and the modes of one size in all layers,
share them.

On the CPU a batch is a loop and not a ``vmap``. There, jaxlib (0.10) spreads a batched LAPACK call over the same threads that
execute the program and waits for them, so as many such calls at a time as there are threads wait for ever; two cores are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["map_batched"]


def map_batched(
    function: Callable[..., Any], *columns: Sequence[Any], static: Sequence[Hashable] | None = None
) -> list:
    """``[function(*row) for row in zip(*columns)]``, with rows of equal structure, shapes and dtypes as one batch.

    Args:
      function: of one row; pure, any pytrees in and out. Arrays that it closes over are shared by the batch.
      *columns: equally long sequences of pytrees of arrays.
      static: a further column of hashable values, given first; only rows with equal ones are batched.

    Returns:
      The results in the order of the rows; equal to those of the plain loop up to rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> [y.tolist() for y in map_batched(jnp.sum, [jnp.ones(2), jnp.ones(3), jnp.zeros(2)])]
      [2.0, 3.0, 0.0]
    """
    rows = list(zip(*columns, strict=True))
    extras: Sequence[Hashable] = [None] * len(rows) if static is None else static
    groups: dict[Hashable, list[int]] = {}
    for index, (row, extra) in enumerate(zip(rows, extras, strict=True)):
        leaves, treedef = jax.tree.flatten(row)
        key = (treedef, extra, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
        groups.setdefault(key, []).append(index)

    results: list[Any] = [None] * len(rows)
    for members in groups.values():

        def call(row: tuple, extra: Hashable = extras[members[0]]) -> Any:
            return function(*row) if static is None else function(extra, *row)

        if len(members) == 1:
            results[members[0]] = call(rows[members[0]])
            continue
        batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[rows[index] for index in members])
        out = _run(call, batch)
        for position, index in enumerate(members):
            results[index] = jax.tree.map(lambda leaf, position=position: leaf[position], out)
    return results


def _run(call: Callable[[Any], Any], batch: Any) -> Any:
    """A function of one row on all rows of a batch, stacked along the first axes."""
    return jax.lax.map(call, batch) if jax.default_backend() == "cpu" else jax.vmap(call)(batch)
