"""Where the kernels of a network are: pytrees with Tucker kernels as leaves, addressed by path."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from tdlrt_jax.tucker import TuckerTensor, is_tucker, whole_sizes

__all__ = ["KernelTree", "flatten_kernels", "kernel_paths", "kernels_in_parts", "masked_paths", "path_name"]


def path_name(path: tuple) -> str:
    """A key path as ``conv1/kernel``; ``"kernel"`` where the tree is one kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "kernel"


def kernel_paths(params: Any) -> dict[str, TuckerTensor]:
    """Every Tucker kernel in a pytree by its path, in the order of the tree.

    Raises:
      ValueError: for two leaves with one path, ``{"a": {"b": ...}, "a/b": ...}``: ranks, bounds and gradients go by path.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> params = {"conv": {"kernel": tdlrt_jax.hosvd(jnp.ones((3, 4))), "bias": jnp.ones(4)}}
      >>> list(kernel_paths(params))
      ['conv/kernel']
    """
    tree = flatten_kernels(params)
    return dict(zip(tree.names, tree.kernels))


def masked_paths(params: Any) -> list[str]:
    """Paths of what ``optax.partition`` and ``masked`` hide."""

    def is_leaf(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf)
    return [path_name(path) for path, node in leaves if is_leaf(node)]


def kernels_in_parts(tree: Any) -> dict[str, tuple[str, Any, dict[str, Any]]]:
    """Cores and factors that are in a tree by themselves and not in a TuckerTensor, as ``nnx.state`` of an optimizer has them.

    Returns:
      By the path of each such kernel the path of the core, the core, and the factors by their paths, in the order of the modes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_tucker)
    named = {path_name(path): node for path, node in leaves if not is_tucker(node)}
    found = {}
    for name, core in named.items():
        prefix, _, last = name.removesuffix("/value").rpartition("/")
        if last == "core":
            start = f"{prefix}/factors/" if prefix else "factors/"
            factors = {other: leaf for other, leaf in named.items() if other.startswith(start)}
            if factors:
                found[prefix or "kernel"] = (name, core, factors)
    return found


class KernelTree(NamedTuple):
    """A pytree flattened with kernels as leaves."""

    nodes: list[Any]
    treedef: Any
    node_names: list[str]
    node_paths: list[tuple]
    positions: list[int]  # of the kernels among the nodes

    @property
    def paths(self) -> list[tuple]:
        """Key paths of the kernels."""
        return self.pick(self.node_paths)

    @property
    def paths_of_others(self) -> list[tuple]:
        """Key paths of the nodes that are no kernels."""
        return [path for position, path in enumerate(self.node_paths) if position not in self.positions]

    @property
    def names(self) -> list[str]:
        """The kernels' paths as strings."""
        return [self.node_names[position] for position in self.positions]

    @property
    def kernels(self) -> list[TuckerTensor]:
        """The kernels, in the order of the tree."""
        return self.pick(self.nodes)

    @property
    def whole_sizes(self) -> list[tuple]:
        """What :func:`tdlrt_jax.batching.map_batched` has to leave as it is of each, see :func:`tdlrt_jax.tucker.whole_sizes`."""
        return [whole_sizes(kernel) for kernel in self.kernels]

    def pick(self, nodes: list[Any]) -> list[Any]:
        """The entries of ``nodes`` that stand where the kernels do."""
        return [nodes[position] for position in self.positions]

    def replace(self, kernels: list[Any], nodes: list[Any] | None = None) -> Any:
        """The pytree with other kernels, and other leaves where ``nodes`` are given."""
        nodes = list(self.nodes if nodes is None else nodes)
        for position, kernel in zip(self.positions, kernels):
            nodes[position] = kernel
        return self.treedef.unflatten(nodes)


def flatten_kernels(tree: Any) -> KernelTree:
    """Flattens a pytree with its Tucker kernels as leaves.

    Raises:
      ValueError: for two leaves with one path.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_tucker)
    positions = [i for i, (_, node) in enumerate(leaves) if is_tucker(node)]
    names = [path_name(path) for path, _ in leaves]
    if len(set(names)) < len(names):
        name = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"two leaves have the path {name!r}: rename one of the containers' keys")
    return KernelTree(
        nodes=[node for _, node in leaves],
        treedef=treedef,
        node_names=names,
        node_paths=[path for path, _ in leaves],
        positions=positions,
    )
