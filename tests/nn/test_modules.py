"""Modules exchanged in any containers, shared and cyclic ones included."""

import collections

import pytest
from flax import nnx

from tdlrt_jax.nn.modules import children, replace_modules


class Leaf(nnx.Module):
    def __init__(self, name):
        self.name = name


Pair = collections.namedtuple("Pair", "first second")


@pytest.fixture
def leaves():
    return Leaf("old"), Leaf("new"), Leaf("other")


CONTAINERS = {
    "list": lambda leaf, other: [other, leaf],
    "tuple": lambda leaf, other: (leaf, other),
    "named tuple": lambda leaf, other: Pair(other, leaf),
    "dict": lambda leaf, other: {"a": leaf, "b": other},
    "ordered dict": lambda leaf, other: collections.OrderedDict(b=other, a=leaf),
    "default dict": lambda leaf, other: collections.defaultdict(list, a=leaf, b=other),
    "nested": lambda leaf, other: {"a": [(other, {"b": leaf})], "c": other},
}


def flat(node):
    """The modules' names in plain containers, and the containers' types."""
    below = [flat(child) for _, child in children(node) if not isinstance(child, str)]
    return node.name if isinstance(node, Leaf) else (type(node), below)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_plain_containers_are_made_anew_and_only_where_something_changes(kind, leaves):
    old, new, other = leaves
    container = CONTAINERS[kind](old, other)
    before = flat(container)
    found = replace_modules(container, {id(old): new})
    assert flat(found) == flat(CONTAINERS[kind](new, other))
    assert flat(container) == before != flat(found), "the original container keeps its module"
    assert replace_modules(container, {}) is container
    assert replace_modules(container, {id(new): old}) is container


@pytest.mark.parametrize("kind", CONTAINERS)
def test_in_a_module_the_containers_become_attributes_that_flax_finds(kind, leaves):
    old, new, other = leaves
    model = Leaf("model")
    model.container = nnx.data(CONTAINERS[kind](old, other))
    assert replace_modules(model, {id(old): new}) is model
    names = {node.name for _, node in nnx.iter_modules(model, graph=True)}
    assert names == {"model", "new", "other"}
    graphdef, state = nnx.split(model)
    assert {node.name for _, node in nnx.iter_modules(nnx.merge(graphdef, state))} == names


def test_flax_containers_are_changed_in_place(leaves):
    old, new, other = leaves
    model = Leaf("model")
    model.list, model.dict = nnx.List([other, old]), nnx.Dict(a=old, b=other)
    lists = model.list, model.dict
    replace_modules(model, {id(old): new})
    assert (model.list, model.dict) == lists
    assert list(model.list) == [other, new] and dict(model.dict.items()) == {"a": new, "b": other}


def test_a_shared_module_is_replaced_everywhere_and_a_cycle_ends(leaves):
    old, new, other = leaves
    other.parent, other.again = nnx.data(None), old
    old.own = Leaf("inside")
    root = Leaf("root")
    root.child, root.first = other, old
    other.parent = root
    assert replace_modules(root, {id(old): new}) is root
    assert root.first is root.child.again is new and root.child.parent is root
    assert replace_modules(root, {id(root): new}) is new
    # What takes a place is not searched in its turn.
    replace_modules(root, {id(new): old, id(old.own): other})
    assert root.first is old and old.own.name == "inside"


def test_variables_and_statics_have_no_children():
    assert children(nnx.Param(1.0)) == children("text") == children(None) == []
    assert dict(children(Leaf("a"))) == {"name": "a"}
