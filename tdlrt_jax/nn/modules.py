"""Walking through a model and exchanging modules in it, whatever containers they are in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from flax import nnx

__all__ = ["children", "replace_modules"]


def replace_modules(node: Any, replacements: Mapping[int, Any]) -> Any:
    """A model with other modules in the places of some, at any depth; a module in two places is replaced in both.

    The modules that hold replaced ones are changed in place, so give a copy (``nnx.clone``). Plain containers (lists,
    tuples, named tuples, dictionaries of any kind) are made anew where something in them changes. Replacements are
    not searched in their turn.

    Args:
      node: a module, or plain containers of modules. It may contain itself.
      replacements: from the ``id`` of a module to what takes its place.

    Returns:
      The node, or what takes its place.

    Example:
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu)
      >>> wider = nnx.Linear(2, 5, rngs=nnx.Rngs(0))
      >>> replace_modules(model, {id(model.layers[0]): wider}).layers[0] is wider
      True
    """
    return _replaced(node, replacements, set())


def children(node: Any) -> list[tuple[Any, Any]]:
    """The ``(key, child)`` pairs one level below a module or plain container; none below anything else."""
    if isinstance(node, nnx.Variable):
        return []
    if isinstance(node, nnx.Pytree):
        return [(key, child) for key, child in vars(node).items() if not key.startswith("_pytree__")]
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list | tuple) else []


def _replaced(node: Any, replacements: Mapping[int, Any], visited: set[int]) -> Any:
    if id(node) in replacements:
        return replacements[id(node)]
    if isinstance(node, nnx.Pytree):
        if id(node) in visited:
            return node
        visited.add(id(node))
    changed = {}
    for key, child in children(node):
        new = _replaced(child, replacements, visited)
        if new is not child:
            changed[key] = new
    if not changed:
        return node
    if isinstance(node, nnx.Pytree):
        for key, new in changed.items():
            setattr(node, key, nnx.data(new))
        return node
    if isinstance(node, dict):
        copied = copy.copy(node)  # whatever kind of dictionary it is
        copied.update(changed)
        return copied
    entries = [changed.get(index, child) for index, child in enumerate(node)]
    return type(node)(*entries) if hasattr(node, "_fields") else type(node)(entries)
