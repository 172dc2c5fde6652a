"""The moments of a network's kernels: found in an optax state, and all of them carried at once.

What becomes of the moments of one kernel is in ``transport``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tdlrt_jax.arguments import check_mapping
from tdlrt_jax.batching import map_batched
from tdlrt_jax.frame import Frame, entries_in_use
from tdlrt_jax.integrators import Augmented, Galerkin, Moved, unchanged
from tdlrt_jax.paths import KernelTree, path_name
from tdlrt_jax.transport import (
    Kind,
    core_moment,
    embed_moment,
    transport_moment,
    transport_turned,
    turn_moment,
)
from tdlrt_jax.tucker import ModeArray, TuckerTensor, active_columns, is_tucker

__all__ = ["Moment", "NetworkMoments", "find_moments", "start_above_zero"]

# The fields in which optax's transformations keep averages of gradients or updates, and of their squares.
KNOWN_FIELDS: Mapping[str, Kind] = {
    **dict.fromkeys(["trace", "mu", "ema", "m", "acc_grads", "momentum", "exp_avg"], "linear"),
    **dict.fromkeys(["nu", "nu_max", "sum_of_squares", "e_g", "e_x", "v", "exp_avg_sq"], "squared"),
}
# Where they have other names: "g" of Adan is the last gradient, "v" an average of differences of gradients.
KNOWN_CLASSES: Mapping[str, Mapping[str, Kind]] = {
    "ScaleByAdanState": {"m": "linear", "v": "linear", "n": "squared", "g": "linear"},
}


# Where an average of squares is compared with the square of the average, and may not be below it.
_CENTERED = {"ScaleByRStdDevState": ("mu", "nu")}


class Moment(NamedTuple):
    """A leaf of the optimizer's state (flattened with kernels as leaves) that mirrors a kernel."""

    position: int
    kernel: int
    kind: Kind
    center: int | None = None  # position of the average whose square this one is not below


def find_moments(
    state: Any,
    kernels: Sequence[tuple[tuple, TuckerTensor]],
    fields: Mapping[str, Kind] | None = None,
    *,
    check_values: bool = False,
    others: Sequence[tuple] | None = None,
) -> list[Moment]:
    """The moments in an optax state: which kernel each belongs to, and how it transforms.

    Args:
      state: any optax state whose ``init`` saw kernels as ``TuckerTensor(C, K)``.
      kernels: key path and kernel, for every kernel.
      fields: how state fields that optax does not have transform, name to ``"linear"`` or ``"squared"``.
      check_values: also raise for moments that do not start constant (copies of the parameters).
      others: key paths of all other parameters; if given, also raise for arrays that are of no parameter.

    Raises:
      ValueError: for state that cannot follow a change of basis, naming the state's class and field.
    """
    check_mapping("moments", fields or {}, "from field names to 'linear' or 'squared'")
    for name, kind in (fields or {}).items():
        if kind not in ("linear", "squared"):
            raise ValueError(f"moments[{name!r}]={kind!r} is unknown: expected 'linear' or 'squared'")
    moments, averages = [], {}
    for position, (path, node) in enumerate(jax.tree_util.tree_flatten_with_path(state, is_leaf=is_tucker)[0]):
        if not is_tucker(node):
            if others is not None:
                _check_mirrors(state, path, node, others)
            continue
        if not jax.tree.leaves(node):  # of another label's parameters, in a partition
            continue
        index = _owner(path, kernels)
        prefix = path[: len(path) - len(kernels[index][0])]
        name = jax.tree_util.keystr(prefix[-1:], simple=True)
        known = {**KNOWN_FIELDS, **KNOWN_CLASSES.get(_state_class(state, prefix), {}), **(fields or {})}
        where = f"{_state_class(state, prefix)}.{name} of kernel {path_name(kernels[index][0])!r}"
        kernel = kernels[index][1]
        shapes, expected = jax.tree.map(jnp.shape, node), jax.tree.map(jnp.shape, kernel)
        if all(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(node)) and jax.tree.leaves(node):
            moments.append(Moment(position, index, "scalar"))
            continue
        if shapes != expected:
            raise ValueError(
                f"{where} has the shapes {shapes}, the kernel {expected}: state that is factored, or that covers only a part "
                "of a kernel, cannot be carried through a change of basis. Use a transformation whose moments have the "
                "shapes of the parameters, and give the core and factors of a kernel one label when partitioning"
            )
        if name not in known:
            raise ValueError(
                f"{where} is not known to be an average of gradients (linear) or of their squares (squared), so tdlrt cannot "
                f'carry it through a change of basis. If it is one, say so: tdlrt(..., moments={{"{name}": "linear"}}); '
                "copies of the parameters (schedule-free, prodigy, lookahead) cannot work"
            )
        if check_values and not all(_constant(leaf) for leaf in jax.tree.leaves(node)):
            raise ValueError(
                f"{where} does not start constant: it looks like a copy of the parameters, which means nothing in other bases"
            )
        first, second = _CENTERED.get(_state_class(state, prefix), (None, None))
        if name == first:
            averages[prefix[:-1], index] = position
        center = averages.get((prefix[:-1], index)) if name == second else None
        moments.append(Moment(position, index, known[name], center))
    return moments


def start_above_zero(state: Any, moments: Sequence[Moment]) -> bool:
    """Whether any moment of an optimizer's first state may be other than zero; they are constant, see :func:`find_moments`."""
    nodes = jax.tree.leaves(state, is_leaf=is_tucker)
    leaves = [leaf for moment in moments if moment.kind != "scalar" for leaf in jax.tree.leaves(nodes[moment.position])]
    return any(isinstance(leaf, jax.core.Tracer) or (leaf.size and np.asarray(leaf).flat[0] != 0) for leaf in leaves)


def _owner(path: tuple, kernels: Sequence[tuple[tuple, TuckerTensor]]) -> int:
    """The kernel whose key path ends the state's; the longest, when one path ends another."""
    fits = [i for i, (key, _) in enumerate(kernels) if len(key) <= len(path) and path[len(path) - len(key) :] == key]
    if not fits:
        raise ValueError(
            f"the optimizer's state holds a Tucker kernel at {path_name(path)!r} that no parameter path ends: "
            "tdlrt expects state that mirrors the parameters"
        )
    return max(fits, key=lambda i: len(kernels[i][0]))


def _check_mirrors(state: Any, path: tuple, leaf: Any, others: Sequence[tuple]) -> None:
    """Raises ``ValueError`` for an array of numbers that belongs to no parameter: what of it is the kernels' cannot be known."""
    if jnp.ndim(leaf) == 0 or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        return
    if not any(path[len(path) - len(key) :] == key for key in others if len(key) <= len(path)):
        raise ValueError(
            f"{_state_class(state, path)} in the optimizer's state: {path_name(path)!r} is an array of shape {jnp.shape(leaf)}, "
            "which no parameter's path ends: tdlrt expects state that mirrors the parameters, or scalars, since it carries the "
            "kernels' part of it through changes of basis. optax.flatten hides it: leave it out"
        )


def _state_class(state: Any, prefix: tuple) -> str:
    """The innermost NamedTuple on the way to a leaf, which in optax names the transformation."""
    name, node = type(state).__name__, state
    for key in prefix:
        if hasattr(node, "_fields"):
            name = type(node).__name__
        if isinstance(key, jax.tree_util.GetAttrKey):
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        elif isinstance(key, jax.tree_util.DictKey):
            node = node[key.key]
    return name


def _constant(leaf: Any) -> bool:
    return isinstance(leaf, jax.core.Tracer) or leaf.size == 0 or bool(np.ptp(np.asarray(leaf)) == 0)


def _not_below(square: Array, average: Array) -> Array:
    return jnp.maximum(square, jnp.square(average.astype(square.dtype)))


class NetworkMoments(NamedTuple):
    """The moments of all kernels of a network.

    Every method takes inner states of the optimizer, and returns one; everything in it but the moments is as it was.
    """

    tree: KernelTree  # params
    fields: Mapping[str, Kind] | None  # how unusual moments transform

    def at_galerkin_points(self, state: Any, bases: list[Augmented], points: list[Galerkin]) -> Any:
        """Those of the cores in the bases of the Galerkin points, where line 9 takes them up; zeros for those of the ``K_i``."""
        still = [jax.tree.map(jnp.zeros_like, kernel.factors) for kernel in self.tree.kernels]

        def turn(kind: Kind, moment: TuckerTensor, basis: Augmented, point: Galerkin, still: tuple) -> TuckerTensor:
            return TuckerTensor(turn_moment(moment, basis, point.turns, kind), still)

        return self._map(state, turn, bases, points, still)

    def transported(
        self,
        after_first: Any,
        after_last: Any,
        bases: list[Augmented],
        points: list[Galerkin],
        moved: list[Moved],
        frames: list[Frame],
        *,
        evaluations: int,
    ) -> Any:
        """After a step of Algorithm 1: those of the ``K_i`` from the first update, the cores' from the last, in new frames.

        Args:
          after_first: the state after the first update, in the frames of before.
          after_last: after the last one, with cores' moments at the Galerkin points; the first, where there is one only.
          bases: augmented ones.
          points: of the Galerkin step.
          moved: by the core's step.
          frames: at the next kernels.
          evaluations: of the gradient in a step.
        """

        def carry(
            kind: Kind,
            last: TuckerTensor,
            first: TuckerTensor,
            basis: Augmented,
            point: Galerkin,
            rotations: tuple[ModeArray, ...],
            frame: Frame,
        ) -> TuckerTensor:
            embedded = evaluations == 1 or point.turns is not None
            within = embed_moment(first, basis, kind) if embedded else last.core
            carried = transport_moment(within, first.factors, basis, rotations, frame, kind)
            # Where the bases turned before the core's step, its moment is in the new ones already.
            return carried if point.turns is None else carried._replace(core=last.core)

        state = self._map(after_last, carry, bases, points, [m.rotations for m in moved], frames, beside=after_first)
        return state if evaluations == 1 else self._with_scalars_of_factors(state, after_first)

    def turned(self, state: Any, frames: list[Frame], new_frames: list[Frame]) -> Any:
        """After a step in which bases turned at ranks that stay."""

        def turn(kind: Kind, moment: TuckerTensor, frame: Frame, new_frame: Frame) -> TuckerTensor:
            return transport_turned(moment, frame, new_frame, kind)

        return self._map(state, turn, frames, new_frames)

    def carried_over(
        self,
        state: Any,
        frames: list[Frame],
        new_frames: list[Frame],
        kinds: tuple[Kind, ...] = ("linear", "squared"),
    ) -> Any:
        """In other frames of the same bases, those of some kinds."""

        def carry(kind: Kind, moment: TuckerTensor, frame: Frame, new_frame: Frame) -> TuckerTensor:
            if kind not in kinds:
                return moment
            same = tuple(None if u is None else jnp.diag(active_columns(u).astype(u.dtype)) for u in frame.U)
            return transport_moment(moment.core, moment.factors, unchanged(frame), same, new_frame, kind)

        return self._map(state, carry, frames, new_frames)

    def of_cores(self, state: Any) -> Any:
        """Before a step of the cores alone, see :func:`tdlrt_jax.transport.core_moment`."""
        return self._map(state, lambda kind, moment, kernel: core_moment(moment, kernel, kind), self.tree.kernels)

    def with_factors(self, state: Any, of: Mapping[Kind, Any]) -> Any:
        """With those of the ``K_i`` that other states have, chosen by kind."""
        nodes, treedef = jax.tree.flatten(state, is_leaf=is_tucker)
        others = {kind: jax.tree.leaves(other, is_leaf=is_tucker) for kind, other in of.items()}
        for moment in self._found(state):
            if moment.kind in others:
                factors = others[moment.kind][moment.position].factors
                nodes[moment.position] = nodes[moment.position]._replace(factors=factors)
        return jax.tree.unflatten(treedef, nodes)

    def in_use(self, state: Any) -> Any:
        """Zeros in the kernels' padding."""

        def clear(kind: Kind, moment: TuckerTensor, kernel: TuckerTensor) -> TuckerTensor:
            columns = [None if factor is None else active_columns(factor) for factor in kernel.factors]
            factors = [None if exist is None else jnp.where(exist, f, 0) for exist, f in zip(columns, moment.factors)]
            return TuckerTensor(jnp.where(entries_in_use(kernel.core.shape, columns), moment.core, 0), tuple(factors))

        return self._map(state, clear, self.tree.kernels)

    def _with_scalars_of_factors(self, state: Any, after_first: Any) -> Any:
        """With the ``K_i``'s scalars, one an array, from the first update: in the second they see no gradient."""
        nodes, treedef = jax.tree.flatten(state, is_leaf=is_tucker)
        first = jax.tree.leaves(after_first, is_leaf=is_tucker)
        for moment in find_moments(after_first, list(zip(self.tree.paths, self.tree.kernels)), self.fields):
            if moment.kind == "scalar":
                nodes[moment.position] = nodes[moment.position]._replace(factors=first[moment.position].factors)
        return jax.tree.unflatten(treedef, nodes)

    def _found(self, state: Any) -> list[Moment]:
        """Those that a change of basis changes."""
        moments = find_moments(state, list(zip(self.tree.paths, self.tree.kernels)), self.fields)
        return [moment for moment in moments if moment.kind != "scalar"]

    def _map(
        self, state: Any, function: Callable[..., TuckerTensor], *columns: Sequence[Any], beside: Any = None
    ) -> Any:
        """Replaces every moment by ``function(kind, moment, *entries)``, the columns' entries being those of its kernel.

        With another state ``beside`` it is ``function(kind, moment, the other's, *entries)``.
        """
        nodes, treedef = jax.tree.flatten(state, is_leaf=is_tucker)
        # At Galerkin points cores have other shapes than the kernels; the state beside them has not.
        moments = self._found(state if beside is None else beside)
        states = [nodes] if beside is None else [nodes, jax.tree.leaves(beside, is_leaf=is_tucker)]
        apart = self.tree.whole_sizes
        with jax.named_scope("tdlrt.transport"):
            results = map_batched(
                function,
                *[[leaves[moment.position] for moment in moments] for leaves in states],
                *[[column[moment.kernel] for moment in moments] for column in columns],
                static=[moment.kind for moment in moments],
                apart=[apart[moment.kernel] for moment in moments],
            )
        for moment, result in zip(moments, results):
            # Averages may be kept in fewer bits than gradients (mu_dtype of optax.adam).
            kept = nodes[moment.position]
            nodes[moment.position] = jax.tree.map(lambda new, old: new.astype(old.dtype), result, kept)
        for moment in moments:
            if moment.center is not None:
                nodes[moment.position] = jax.tree.map(_not_below, nodes[moment.position], nodes[moment.center])
        return jax.tree.unflatten(treedef, nodes)
