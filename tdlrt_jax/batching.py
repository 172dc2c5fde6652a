"""One function on many kernels: those of equal shapes as one batch.

The factorizations of a step are small and many, a handful for every mode of every kernel. Done one by one each of them is
compiled by itself, and on a GPU each waits for the one before; layers of one shape, and the modes of one size in all layers,
share them.

On a GPU arrays of other sizes share them as well, padded with zeros: what a step costs there is the number of its operations, to
compile and to launch, and hardly their size. On the CPU it is the other way round.

On the CPU a batch is a loop and not a ``vmap``. There, jaxlib (0.10) spreads a batched LAPACK call over the same threads that
execute the program and waits for them, so as many such calls at a time as there are threads wait for ever; two cores are enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Batches", "few_and_large", "map_batched", "map_light"]

# What the operations of a batch cost beside their work, in entries of arrays: a row joins one where it adds no more than this.
_BATCH = 2**21


def few_and_large() -> bool:
    """Whether few large operations are cheaper than many small ones: on anything but a CPU."""
    return jax.default_backend() != "cpu"


def map_batched(
    function: Callable[..., Any],
    *columns: Sequence[Any],
    static: Sequence[Hashable] | None = None,
    apart: Sequence[Hashable] | None = None,
) -> list:
    """``[function(*row) for row in zip(*columns)]``, with rows of equal structure, shapes and dtypes as one batch.

    Args:
      function: of one row; pure, any pytrees in and out. Arrays that it closes over are shared by the batch.
      *columns: equally long sequences of pytrees of arrays.
      static: a further column of hashable values, given first; only rows with equal ones are batched.
      apart: given, says that zeros may be appended to all arrays of a row along any axis: the results are the same but for zeros
        appended to them. Rows of equal entries may then be one batch whatever their shapes, see :func:`few_and_large`; an entry
        names the sizes of the axes that must stay as they are.

    Returns:
      The results in the order of the rows; equal to those of the plain loop up to rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> [y.tolist() for y in map_batched(jnp.sum, [jnp.ones(2), jnp.ones(3), jnp.zeros(2)])]
      [2.0, 3.0, 0.0]
    """
    batches = Batches(columns, static, apart)
    return batches.split(function, batches.run(function))


class Batches:
    """The rows of :func:`map_batched` sorted into batches, for several functions one after the other."""

    def __init__(
        self,
        columns: Sequence[Sequence[Any]],
        static: Sequence[Hashable] | None = None,
        apart: Sequence[Hashable] | None = None,
    ):
        """Arguments as those of :func:`map_batched`."""
        self._rows = list(zip(*columns, strict=True))
        self._extras = [()] * len(self._rows) if static is None else [(extra,) for extra in static]
        self._pad = apart is not None and few_and_large()
        groups: dict[Hashable, list[int]] = {}
        for index, (row, extra) in enumerate(zip(self._rows, self._extras, strict=True)):
            leaves, treedef = jax.tree.flatten(row)
            sizes = [jnp.ndim(leaf) if self._pad else jnp.shape(leaf) for leaf in leaves]
            key = (treedef, extra, apart[index] if self._pad and apart else None)
            groups.setdefault((*key, *zip(sizes, map(jnp.result_type, leaves))), []).append(index)
        self._members = [
            members
            for group in groups.values()
            for members in (_padded_together(self._rows, group) if self._pad else [group])
        ]
        self._stacked = [
            jax.tree.map(_stack, *[self._rows[index] for index in members]) if len(members) > 1 else None
            for members in self._members
        ]

    def run(self, function: Callable[..., Any], *results: Sequence[Any]) -> list[Any]:
        """``function(*row, *results)`` for all rows, the results of earlier runs being those of the row: a list to be split."""
        found = []
        for members, stacked, *more in zip(self._members, self._stacked, *results):
            call = self._call(function, members[0])
            found.append(call(self._rows[members[0]], *more) if stacked is None else _run(call, stacked, *more))
        return found

    def split(self, function: Callable[..., Any], results: Sequence[Any]) -> list:
        """What a run of ``function`` found, row by row in their order."""
        single: list[Any] = [None] * len(self._rows)
        for members, stacked, result in zip(self._members, self._stacked, results):
            for position, index in enumerate(members):
                if stacked is None:
                    single[index] = result
                    continue
                single[index] = jax.tree.map(lambda leaf, position=position: leaf[position], result)
                if self._pad:
                    shapes = jax.eval_shape(self._call(function, index), self._rows[index])
                    single[index] = jax.tree.map(_cut, single[index], shapes)
        return single

    def _call(self, function: Callable[..., Any], index: int) -> Callable[..., Any]:
        return lambda row, *results: function(*self._extras[index], *row, *results)


def map_light(function: Callable[..., Any], *columns: Sequence[Any]) -> list:
    """:func:`map_batched` of an operation or two, which may append zeros: on the CPU, where a loop is dearer, one by one."""
    if few_and_large():
        return map_batched(function, *columns, apart=[None] * len(columns[0]))
    return [function(*row) for row in zip(*columns, strict=True)]


def _run(call: Callable[..., Any], *batch: Any) -> Any:
    """A function of one row on all rows of a batch, stacked along the first axes."""
    on_the_host = jax.default_backend() == "cpu"
    return jax.lax.map(lambda rows: call(*rows), batch) if on_the_host else jax.vmap(call)(*batch)


def _padded_together(rows: Sequence[tuple], group: Sequence[int]) -> list[list[int]]:
    """Which rows of a group, alike but for their shapes, are padded to one another; the largest come first.

    Each joins the batch whose arrays become the least larger by it, or begins one of its own if that is still much.
    """
    shapes = {index: [jnp.shape(leaf) for leaf in jax.tree.leaves(rows[index])] for index in group}
    batches: list[tuple[list[int], list[tuple[int, ...]]]] = []

    def entries(sizes: list[tuple[int, ...]]) -> int:
        return sum(map(math.prod, sizes))

    for index in sorted(group, key=lambda index: -entries(shapes[index])):
        joint = [[tuple(map(max, *pair)) for pair in zip(common, shapes[index])] for _, common in batches]
        more = [
            entries(sizes) * (len(members) + 1) - entries(common) * len(members)
            for sizes, (members, common) in zip(joint, batches)
        ]
        best = min(range(len(more)), key=more.__getitem__, default=None)
        if best is None or (more[best] > _BATCH and more[best] > entries(shapes[index])):
            batches.append(([index], shapes[index]))
        else:
            batches[best] = ([*batches[best][0], index], joint[best])
    return [sorted(members) for members, _ in batches]


def _stack(*leaves: Any) -> jax.Array:
    shape = tuple(max(sizes) for sizes in zip(*map(jnp.shape, leaves)))

    def padded(leaf: Any) -> jax.Array:
        own = jnp.shape(leaf)
        return jnp.asarray(leaf) if own == shape else jnp.pad(leaf, [(0, m - n) for m, n in zip(shape, own)])

    return jnp.stack([padded(leaf) for leaf in leaves])


def _cut(leaf: jax.Array, like: Any) -> jax.Array:
    return leaf[tuple(map(slice, like.shape))]
