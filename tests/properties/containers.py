"""Trees of every kind of container around given leaves."""

import collections
from typing import NamedTuple

import jax
from flax import nnx, struct
from flax.core import FrozenDict
from hypothesis import strategies as st


class Pair(NamedTuple):
    """As optax and this package keep their states."""

    first: object
    second: object


@struct.dataclass
class Fields:
    """A dataclass that flax has registered."""

    weights: object
    rest: object


NAMES = (
    "kernel",
    "bias",
    "conv1",
    "a.b",
    "a/b",
    "..",
    "../../x",
    "/etc/x",
    "",
    "0",
    "naïve ☂",
    "x" * 80,
    "tab\t",
    "%2e",
)
names = st.one_of(st.sampled_from(NAMES), st.text(st.characters(codec="utf-8"), max_size=6))


def _mapping(kind):
    return lambda keys, children: kind(dict(zip(keys, children)))


def _variables(keys, children):
    """An ``nnx.State``; its leaves are Variables, as ``nnx.state(model)`` has them."""
    return nnx.State({k: c if isinstance(c, dict | nnx.State) else nnx.Param(c) for k, c in zip(keys, children)})


KINDS = {
    "dict": _mapping(dict),
    "OrderedDict": _mapping(collections.OrderedDict),
    "FrozenDict": _mapping(FrozenDict),
    "State": _variables,
    "list": lambda keys, children: list(children),
    "tuple": lambda keys, children: tuple(children),
    "NamedTuple": lambda keys, children: Pair(*children) if len(children) == 2 else tuple(children),
    "dataclass": lambda keys, children: Fields(*children) if len(children) == 2 else list(children),
}


@st.composite
def containers(draw, count, depth=3):
    """A function that puts ``count`` leaves into containers, the same ones every time; how the tree is nested in words.

    With it comes in which order ``jax.tree`` finds the leaves: dictionaries are sorted.
    """

    def build(numbers, depth):
        if len(numbers) == 1 and (depth == 0 or draw(st.booleans())):
            return lambda leaves: leaves[numbers[0]]
        kind = draw(st.sampled_from(sorted(KINDS)))
        parts = 1 if len(numbers) == 1 else draw(st.integers(1, min(3, len(numbers))))
        if depth == 0:
            parts = len(numbers)
        size = -(-len(numbers) // parts)
        groups = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        keys = draw(st.lists(names, min_size=len(groups), max_size=len(groups), unique=True))
        inner = [build(group, depth - 1) if depth else (lambda leaves, n=group[0]: leaves[n]) for group in groups]
        return lambda leaves: KINDS[kind](keys, [make(leaves) for make in inner])

    return build(list(range(count)), depth)


def order_of(make, count):
    """The numbers of the leaves in the order in which ``jax.tree`` finds them."""
    return jax.tree.leaves(make(list(range(count))))
