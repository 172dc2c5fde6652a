"""One step of all kernels of a network: inner updates, integrators and transport in the order of Algorithm 1.

The mathematics of one kernel is in ``integrators``; here it is mapped over the network between the two gradient evaluations, with
one inner state for all of it, which ``moments`` carries along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tdlrt_jax.batching import map_batched, map_light
from tdlrt_jax.frame import Frame, around, chart_point, core_frame, entries_in_use, lift_all
from tdlrt_jax.inspection import all_finite, look_other
from tdlrt_jax.integrators import Augmented, Galerkin, Integrator, Moved, Truncation, augment_all, turn_all
from tdlrt_jax.integrators import embed as embed_step
from tdlrt_jax.moments import NetworkMoments
from tdlrt_jax.paths import KernelTree, flatten_kernels, path_name
from tdlrt_jax.ranks import RankPolicy, max_capacity, per_mode
from tdlrt_jax.transport import Kind
from tdlrt_jax.tucker import (
    HIGHEST,
    ModeArray,
    TuckerTensor,
    active_columns,
    capacity,
    is_tucker,
    kernel_shape,
    rank_of,
)

__all__ = ["NetworkStep", "StepOutcome", "check_extra"]

ValueAndGrad = Callable[[Any], tuple[Any, Any]]


class StepOutcome(NamedTuple):
    """What a step proposes, before it is accepted."""

    updates: Any  # with the structure of params
    inner: Any
    rank: list[Array]  # int32 (d,) a kernel
    error: list[Array]  # float32 scalars, relative truncation errors
    pressing: Array  # bool, whether a rank is held down by the size of its arrays
    finite: Array  # bool, whether the second gradient is; the first is the caller's
    deviation: (
        Array  # float32, of the next factors from orthonormal ones, before the correction that they have had since
    )
    budget: tuple[Any, Array] | None  # a budget's next state, and the tolerance it found
    other: Array  # bool, whether the second gradient is another one than the first, where they should agree


# What limits the ranks of a step: from the Galerkin points and the cores' increments to one Truncation a kernel, and the
# outcome's ``budget``.
RankBounds = Callable[[list[Galerkin], list[Array]], tuple[list[Truncation], tuple[Any, Array] | None]]


def check_extra(extra: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for functions other than ``value_fn``, which ``inner`` would call with coordinates of its own."""
    for name, value in extra.items():
        if callable(value) and name != "value_fn":
            raise ValueError(
                f"{name}={value!r} is a function, which inner would call with coordinates (C, K_i) in the place of kernels: "
                "expected value_fn(params) -> value alone. What needs gradients elsewhere (sharpness-aware steps) is for the loss"
            )


class NetworkStep(NamedTuple):
    """The kernels of a network, and the inner transformation that proposes their steps."""

    tree: KernelTree  # params
    inner: optax.GradientTransformationExtraArgs
    extra: dict[str, Any]  # keyword arguments for the inner transformation
    fields: Mapping[str, Kind] | None  # how unusual moments transform

    @property
    def _moments(self) -> NetworkMoments:
        return NetworkMoments(self.tree, self.fields)

    def align(self, grads: Any) -> list[Any]:
        """The nodes of a gradient tree in the order of the parameters'; raises ``ValueError`` naming one that is missing."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_tucker)
        found = {path_name(path): grad for path, grad in leaves}
        nodes = []
        for name, node in zip(self.tree.node_names, self.tree.nodes):
            if is_tucker(node) != is_tucker(found.get(name)):
                raise ValueError(
                    f"parameter {name!r} is a {type(node).__name__}, its gradient in grads a {type(found.get(name)).__name__}: "
                    "take gradients with tdlrt_jax.value_and_grad, which gives TuckerTensor(dC, (dK_1, ...)) for a kernel"
                )
            if name not in found:
                raise ValueError(
                    f"grads has none for parameter {name!r}: expected the parameters' structure, got {sorted(found)}"
                )
            nodes.append(found[name])
        return nodes

    def adaptive_step(
        self,
        scheme: Integrator,
        frames: list[Frame],
        gradients: list[Any],
        inner_state: Any,
        bounds: RankBounds,
        value_and_grad_fn: ValueAndGrad | None,
    ) -> StepOutcome:
        """One step of Algorithm 1, or of the integrator's variant of it, for all kernels at once."""
        nodes, after_first = self._first_update(frames, gradients, inner_state)
        steps = self.tree.pick(nodes)
        with jax.named_scope("tdlrt.augment"):
            bases = augment_all(frames, steps)
            points = map_batched(scheme.basis_step, bases, steps, apart=self.tree.whole_sizes)
        if scheme.evaluations == 1:
            after_last, finite, other = after_first, jnp.ones((), bool), jnp.zeros((), bool)
            with jax.named_scope("tdlrt.augment"):
                increments = map_batched(embed_step, steps, bases, apart=self.tree.whole_sizes)
        else:
            assert value_and_grad_fn is not None
            if scheme.same_network:  # a pass through the network may then be spared, see galerkin
                value_and_grad_fn = getattr(value_and_grad_fn, "at_same_network", value_and_grad_fn)
            nodes, after_last, finite, other = self._second_update(
                gradients, inner_state, bases, points, value_and_grad_fn, same_network=scheme.same_network
            )
            increments = [update.core for update in self.tree.pick(nodes)]

        kernels = self.tree.kernels
        with jax.named_scope("tdlrt.truncate"):
            truncations, budget = bounds(points, increments)

        def core_step(
            policy: RankPolicy, basis: Augmented, point: Galerkin, increment: Array, cut: Truncation
        ) -> tuple[Moved, TuckerTensor]:
            moved = scheme.core_step(basis, point, increment, cut._replace(policy=policy))
            return moved, jax.tree.map(jnp.subtract, moved.kernel, TuckerTensor(basis.frame.core, basis.frame.U))

        policies = [cut.policy for cut in truncations]
        # The policy is static, and no part of the batch.
        traced = [
            cut._replace(policy=None, room=jnp.array(capacity(kernel), jnp.int32))  # type: ignore[arg-type]
            for cut, kernel in zip(truncations, kernels)
        ]
        # How large a sketch is depends on the sizes, zeros included.
        sketched = any(policy.route == "randomized" for policy in policies)
        apart = None if sketched else self.tree.whole_sizes
        with jax.named_scope("tdlrt.truncate"):
            results = map_batched(core_step, bases, points, increments, traced, static=policies, apart=apart)
        moved, updates = [m for m, _ in results], [update for _, update in results]
        return StepOutcome(
            updates=self.tree.replace(updates, nodes),
            inner=self._moments.transported(
                after_first,
                after_last,
                bases,
                points,
                moved,
                self._frames_after(updates),
                evaluations=scheme.evaluations,
            ),
            rank=[m.rank for m in moved],
            error=[m.error.astype(jnp.float32) for m in moved],
            pressing=_any([_pressing(m.bound, k, p) for m, k, p in zip(moved, kernels, policies)]),
            finite=finite,
            deviation=jnp.max(jnp.stack([m.deviation.astype(jnp.float32) for m in moved])),
            budget=budget,
            other=other,
        )

    def turning_step(self, frames: list[Frame], gradients: list[Any], inner_state: Any) -> StepOutcome:
        """Between adaptations: cores step and bases turn, at ranks that stay, from one gradient."""
        nodes, inner_state = self._first_update(frames, gradients, inner_state)

        with jax.named_scope("tdlrt.turn"):
            results = turn_all(frames, self.tree.pick(nodes), apart=self.tree.whole_sizes)
        updates = [
            jax.tree.map(jnp.subtract, turned, TuckerTensor(frame.core, frame.U))
            for (turned, _), frame in zip(results, frames)
        ]
        inner_state = self._moments.turned(inner_state, frames, self._frames_after(updates))
        deviation = jnp.max(jnp.stack([jnp.zeros(()), *(deviation.astype(jnp.float32) for _, deviation in results)]))
        return self._ranks_stay(updates, nodes, inner_state)._replace(deviation=deviation)

    def core_only_step(self, frames: list[Frame], gradients: list[Any], inner_state: Any) -> StepOutcome:
        """Between adaptations: cores step in the bases as they are, from one gradient."""
        nodes, inner_state = self._first_update(frames, gradients, inner_state)
        updates = self._of_cores(nodes)
        inner_state = self._moments.carried_over(inner_state, frames, self._frames_after(updates))
        return self._ranks_stay(updates, nodes, inner_state)

    def from_anchor(self, inner_state: Any, anchor: list[TuckerTensor], frames: list[Frame]) -> Any:
        """The state after steps of the cores alone that held the moments of the ``K_i``, in the frames of now.

        Args:
          inner_state: with moments of the ``K_i`` in the frames at the anchor.
          anchor: the kernels before those steps, in the same bases.
          frames: at the kernels of now.
        """
        return self._moments.carried_over(inner_state, lift_all(anchor), frames, ("linear",))

    def cores_only_step(self, gradients: list[Any], inner_state: Any, hold: bool = False) -> StepOutcome:
        """A step of the cores alone, in bases that stay, from gradients of nothing else of the kernels.

        As at line 9, zeros stand for the ``K_i`` and for their gradients. See :func:`tdlrt_jax.transport.core_moment`.

        Args:
          gradients, inner_state: as in :meth:`adaptive_step`.
          hold: keep the moments of the ``K_i`` as they are, in the frames in which they are: :meth:`from_anchor` takes them up.
        """
        kernels, before = self.tree.kernels, inner_state
        inner_state = floored = self._moments.of_cores(inner_state)
        frames = [core_frame(kernel) for kernel in kernels]
        points = [_of_core(frame.core, kernel) for frame, kernel in zip(frames, kernels)]
        grads = [
            _of_core(grad.core.astype(point.core.dtype), kernel)
            for grad, point, kernel in zip(self.tree.pick(gradients), points, kernels)
        ]
        nodes, inner_state = self._inner_update(gradients, grads, points, inner_state, frames)
        nodes = self._masked(nodes)
        if hold:
            inner_state = self._moments.with_factors(inner_state, {"linear": before, "squared": floored})
        return self._ranks_stay(self._of_cores(nodes), nodes, inner_state)

    def _of_cores(self, nodes: list[Any]) -> list[TuckerTensor]:
        """The kernels' updates, without those of the factors.

        Negative zeros stand for these, which change nothing at all, and whether the step is accepted or not.
        """
        still = [jax.tree.map(lambda factor: -jnp.zeros_like(factor), kernel.factors) for kernel in self.tree.kernels]
        return [TuckerTensor(update.core, factors) for update, factors in zip(self.tree.pick(nodes), still)]

    def _ranks_stay(self, updates: list[TuckerTensor], nodes: list[Any], inner_state: Any) -> StepOutcome:
        return StepOutcome(
            updates=self.tree.replace(updates, nodes),
            inner=inner_state,
            rank=[
                rank_of(kernel.core.shape, in_use) for kernel, in_use in zip(self.tree.kernels, self._columns_in_use())
            ],
            error=[jnp.zeros((), jnp.float32) for _ in updates],
            pressing=jnp.zeros((), bool),
            finite=jnp.ones((), bool),
            deviation=jnp.zeros((), jnp.float32),  # of factors that stay
            budget=None,
            other=jnp.zeros((), bool),
        )

    def _inner_update(
        self, gradients: list[Any], kernel_grads: list[Any], points: list[Any], state: Any, frames: list[Frame]
    ) -> tuple:
        """The inner update at given points of the frames' charts; the updates come back as nodes."""
        grads, extra = self.tree.replace(kernel_grads, gradients), dict(self.extra)
        if "grad" in extra:  # line searches want the gradient beside what has become of it
            extra["grad"] = grads
        if value_fn := extra.get("value_fn"):

            def value_at(params: Any) -> Any:
                moved = flatten_kernels(params)
                kernels = [around(frame, point) for frame, point in zip(frames, moved.kernels)]
                return value_fn(self.tree.replace(kernels, moved.nodes))

            extra["value_fn"] = value_at
        with jax.named_scope("tdlrt.optimizer"):
            updates, state = self.inner.update(grads, state, self.tree.replace(points), **extra)
        return flatten_kernels(updates).nodes, state

    def _first_update(self, frames: list[Frame], gradients: list[Any], state: Any) -> tuple[list[Any], Any]:
        """Line 4: the inner update of ``(C, K_i)`` and all other leaves, from the first gradient."""
        projected = _projected(self.tree.pick(gradients), frames)
        points = [chart_point(frame) for frame in frames]
        nodes, state = self._inner_update(gradients, projected, points, state, frames)
        return self._masked(nodes), state

    def _columns_in_use(self) -> list[tuple[ModeArray, ...]]:
        return _map_modes(active_columns, [kernel.factors for kernel in self.tree.kernels])

    def _masked(self, nodes: list[Any]) -> list[Any]:
        """Updates with nothing in the kernels' padding, whatever the inner transformation put there (noise, say)."""
        nodes = list(nodes)
        for position, kernel, in_use in zip(self.tree.positions, self.tree.kernels, self._columns_in_use()):
            update = nodes[position]
            factors = [None if exist is None else jnp.where(exist, du, 0) for exist, du in zip(in_use, update.factors)]
            exists = entries_in_use(kernel.core.shape, in_use)
            nodes[position] = TuckerTensor(jnp.where(exists, update.core, 0), tuple(factors))
        return nodes

    def _second_update(
        self,
        gradients: list[Any],
        state: Any,
        bases: list[Augmented],
        points: list[Galerkin],
        value_and_grad_fn: ValueAndGrad,
        *,
        same_network: bool,
    ) -> tuple[list[Any], Any, Array, Array]:
        """Line 9: the inner update of the cores, from the same state as the first, at the Galerkin points.

        Also whether their gradients are finite: an inner transformation may hide it; and whether they are others than the first,
        where both are of the same network. Leaves that are not kernels take the first
        gradient, so they move once. The ``K_i`` take no part: as zeros they add nothing to a norm.
        """
        frames = [Frame(point.core, None, point.bases, None) for point in points]
        at = self.tree.replace(frames)
        with jax.named_scope("tdlrt.second_gradient"):
            _, grads = value_and_grad_fn(at)
        still = [jax.tree.map(jnp.zeros_like, kernel.factors) for kernel in self.tree.kernels]
        core_grads = [
            TuckerTensor(grad.core.astype(point.core.dtype), zeros)
            for grad, point, zeros in zip(self.tree.pick(self.align(grads)), points, still)
        ]
        state = self._moments.at_galerkin_points(state, bases, points)
        at_points = [TuckerTensor(point.core, zeros) for point, zeros in zip(points, still)]
        nodes, state = self._inner_update(gradients, core_grads, at_points, state, frames)
        other = (
            look_other([basis.frame for basis in bases], self.tree.pick(gradients), core_grads)
            if same_network
            else jnp.zeros((), bool)
        )
        return nodes, state, all_finite(core_grads), other

    def _frames_after(self, updates: list[TuckerTensor]) -> list[Frame]:
        """The frames at what ``optax.apply_updates`` will make of the kernels.

        Exactly that, rounding included: the next step lifts it again, and the moments must live in the same frame.
        """
        return lift_all([optax.apply_updates(kernel, update) for kernel, update in zip(self.tree.kernels, updates)])


def _projected(gradients: list[TuckerTensor], frames: list[Frame]) -> list[TuckerTensor]:
    """``(dC, (I - U_i U_i^T) dK_i)``: orthogonal coordinates of the projected gradient, so norms are those of the gradient."""
    factors = _map_modes(_project_out, [frame.U for frame in frames], [grad.factors for grad in gradients])
    return [
        TuckerTensor(grad.core.astype(frame.core.dtype), projected)
        for grad, frame, projected in zip(gradients, frames, factors)
    ]


def _project_out(u: Array, dk: Array) -> Array:
    dk = dk.astype(u.dtype)
    return dk - jnp.matmul(u, jnp.matmul(u.T, dk, precision=HIGHEST), precision=HIGHEST)


def _map_modes(function: Callable[..., Array], *columns: Sequence[Sequence[ModeArray]]) -> list[tuple[ModeArray, ...]]:
    """A function of an operation or two on every mode of every kernel; None where one of its arguments is."""
    rows = [list(zip(*modes)) for modes in zip(*columns)]
    present = [row for modes in rows for row in modes if all(part is not None for part in row)]
    results = iter(map_light(function, *zip(*present)) if present else [])
    return [tuple(None if any(part is None for part in row) else next(results) for row in modes) for modes in rows]


def _of_core(core: Array, kernel: TuckerTensor) -> TuckerTensor:
    """A core beside zeros for everything else of a kernel."""
    return TuckerTensor(core, jax.tree.map(jnp.zeros_like, kernel.factors))


def _pressing(bound: Array, kernel: TuckerTensor, policy: RankPolicy) -> Array:
    """Whether a rank is held down by its arrays' capacity, where neither the kernel's shape nor a bound of the user's does."""
    shape, order = kernel_shape(kernel), len(kernel.factors)
    highest = per_mode(policy.max_rank, order, "max_rank")
    useful = max_capacity(shape, [n if r is None else min(n, r) for n, r in zip(shape, highest)])
    can_grow = jnp.array([size < limit for size, limit in zip(capacity(kernel), useful)])
    return jnp.any(bound & can_grow)


def _any(flags: list[Array]) -> Array:
    return jnp.any(jnp.stack(flags))
