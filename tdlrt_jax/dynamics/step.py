"""One step of an integrator with its sub-steps solved exactly, as Theorems 2 and 3 assume, or by one Euler step, as in training.

Bases are augmented, carried over and truncated by the library's own integrators (:data:`tdlrt_jax.integrators.INTEGRATORS`); only
the descent steps of lines 4 and 9 of Algorithm 1 differ. With ``inner="exact"`` they are the flows::

    K_i' = -∇_{K_i} L(Ten_i(Q_i^T) ×_{j != i} U_j ×_i K_i)        Q_i, U_j as at the start, each mode for itself
    C'   = -∇_C L(C ×_j U_j)                                      U_j the bases of the core's step

over ``[0, h]``, by an explicit method to a tight tolerance. No inverse is in them, and their Lipschitz constants are the loss's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax.arguments import check_callable
from tdlrt_jax.dynamics.solve import solve
from tdlrt_jax.frame import Frame, lift_all
from tdlrt_jax.integrators import INTEGRATORS, Augmented, Galerkin, Integrator, Truncation, augment_all, embed
from tdlrt_jax.paths import KernelTree, flatten_kernels
from tdlrt_jax.ranks import RankPolicy, check_policy
from tdlrt_jax.tucker import HIGHEST, ModeArray, TuckerTensor, check_structure, fold, multi_mode_product, unfold

__all__ = ["FlowStepInfo", "flow_step"]

Inner = Literal["exact", "euler"]


class FlowStepInfo(NamedTuple):
    """What one step tells; the dictionaries are keyed by the kernels' paths."""

    rank: dict[str, Array]  # int32 (d,) a kernel
    truncation_error: dict[str, Array]  # relative, of this step
    inner_steps: Array  # int32, steps that the solver of the sub-steps took, rejected ones included
    solved: Array  # bool, whether the sub-steps reached their tolerance


def flow_step(
    loss_fn: Callable[..., Array],
    *,
    integrator: str = "bug",
    inner: Inner = "exact",
    policy: RankPolicy | None = None,
    rtol: float = 1e-10,
    atol: float = 1e-12,
    max_steps: int = 4096,
) -> Callable[..., tuple[Any, FlowStepInfo]]:
    """A jitted step of the gradient flow by an integrator, for parameters with Tucker kernels among them.

    Every ``K_i`` moves with everything else held still. The cores of all kernels move together, and with them all leaves that are
    not kernels.

    Args:
      loss_fn: ``loss_fn(params, *args)``, a scalar; it uses kernels through ``tdlrt_jax.to_dense``, ``tucker_conv`` or
        ``tucker_linear``. Its factors in the place of ``K_i`` are not orthonormal.
      integrator: ``"bug"``, ``"parallel"`` or ``"fixed_rank"``.
      inner: how sub-steps are done: ``"exact"``, solved to ``rtol``; ``"euler"``, one step of gradient descent.
      policy: of the truncation; default: the paper's, with one spare direction for ``"parallel"``, as in :func:`tdlrt_jax.tdlrt`.
      rtol, atol: of the sub-steps' average velocities; at least 100 roundings.
      max_steps: of the solver in one sub-step.

    Returns:
      ``step(params, step_size, tolerance, *args) -> (params, info)``, ``info`` a :class:`FlowStepInfo`. Step size ``h`` and
      tolerance ``tau`` are traced.

    Raises:
      ValueError: for an unknown integrator or ``inner``; from the step for kernels that do not fit together.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jnp.arange(12.0).reshape(3, 4) / 12, rank=2)
      >>> step = flow_step(lambda kernel: 0.5 * jnp.sum((tdlrt_jax.to_dense(kernel) - 1.0) ** 2))
      >>> new, info = step(kernel, 0.1, 0.01)
      >>> bool(info.solved), info.rank["kernel"].shape
      (True, (2,))

    Source: Algorithm 1; Theorems 2 and 3 for the exact sub-steps.
    """
    check_callable("loss_fn", loss_fn, "loss_fn(params, *args) -> loss")
    if policy is not None:
        check_policy(policy, 2)
    if not isinstance(integrator, str) or integrator not in INTEGRATORS:
        raise ValueError(f"integrator={integrator!r} is unknown: expected one of {sorted(INTEGRATORS)}")
    if inner not in ("exact", "euler"):
        raise ValueError(f"inner={inner!r} is unknown: expected 'exact' or 'euler'")
    scheme = INTEGRATORS[integrator]
    policy = RankPolicy(spare=1 if integrator == "parallel" else 0) if policy is None else policy
    move = _euler if inner == "euler" else _exact(rtol, atol, max_steps)

    @jax.jit
    def step(params: Any, step_size: Array | float, tolerance: Array | float, *args: Any) -> tuple[Any, FlowStepInfo]:
        tree = flatten_kernels(params)
        for name, kernel in zip(tree.names, tree.kernels):
            check_structure(kernel, name)
        network = _Network(tree, lambda params: loss_fn(params, *args))
        frames = lift_all(tree.kernels)
        k_steps, first = move(network.k_velocity(frames), [frame.K for frame in frames], step_size)
        steps = [TuckerTensor(jnp.zeros_like(frame.core), k) for frame, k in zip(frames, k_steps)]
        bases = augment_all(frames, steps)
        points = [galerkin_point(scheme, basis, step) for basis, step in zip(bases, steps)]
        # With one evaluation the cores' steps start where the K_i's did.
        start = points if scheme.evaluations == 2 else [Galerkin(frame.core, frame.U, None) for frame in frames]
        velocity = network.core_velocity([point.bases for point in start])
        (increments, leaf_steps), second = move(velocity, ([p.core for p in start], network.leaves), step_size)
        if scheme.evaluations == 1:
            increments = [embed(s._replace(core=c), basis) for s, c, basis in zip(steps, increments, bases)]
        floor = [jnp.zeros(len(kernel.factors), jnp.int32) for kernel in tree.kernels]
        moved = [
            scheme.core_step(basis, point, increment, Truncation(jnp.asarray(tolerance), policy, low))
            for basis, point, increment, low in zip(bases, points, increments, floor)
        ]
        nodes = network.with_leaves([leaf + change for leaf, change in zip(network.leaves, leaf_steps)])
        return tree.replace([m.kernel for m in moved], nodes), FlowStepInfo(
            rank={name: m.rank for name, m in zip(tree.names, moved)},
            truncation_error={name: m.error for name, m in zip(tree.names, moved)},
            inner_steps=first.steps + second.steps,
            solved=first.solved & second.solved,
        )

    return step


class _Solved(NamedTuple):
    steps: Array
    solved: Array


Velocity = Callable[[Any], Any]
Move = Callable[[Velocity, Any, Any], tuple[Any, _Solved]]  # the increment of a state over one step


def _euler(velocity: Velocity, state: Any, step_size: Any) -> tuple[Any, _Solved]:
    increment = jax.tree.map(lambda v: (step_size * v).astype(v.dtype), velocity(state))
    return increment, _Solved(jnp.ones((), jnp.int32), jnp.ones((), bool))


def _exact(rtol: float, atol: float, max_steps: int) -> Move:
    def move(velocity: Velocity, state: Any, step_size: Any) -> tuple[Any, _Solved]:
        leaves = jax.tree.leaves(state)
        if not leaves:
            return state, _Solved(jnp.zeros((), jnp.int32), jnp.ones((), bool))
        dtype = jnp.result_type(*leaves)
        least = 100 * float(jnp.finfo(dtype).eps)

        def moved(average: Any) -> Any:
            return jax.tree.map(lambda y, v: y + (step_size * v).astype(y.dtype), state, average)

        # The unknown is the average velocity since the start: of the gradient's size for any step size, and an increment is
        # not the difference of two states, in which it would cancel.
        solution = solve(
            lambda average: velocity(moved(average)),
            jax.tree.map(jnp.zeros_like, state),
            jnp.ones((), dtype),
            diffrax.Dopri8(),
            rtol=max(rtol, least),
            atol=max(atol, 1e-2 * least),
            max_steps=max_steps,
        )
        increment = jax.tree.map(lambda v: (step_size * v[-1]).astype(v.dtype), solution.ys)
        steps = jnp.asarray(solution.stats["num_steps"], jnp.int32)
        return increment, _Solved(steps, solution.result == diffrax.RESULTS.successful)

    return move


class _Network(NamedTuple):
    """Velocities of the parts of a network that move together."""

    tree: KernelTree
    loss: Callable[[Any], Array]

    @property
    def positions(self) -> list[int]:
        """Of the leaves that are not kernels, among the nodes; only floating ones move."""
        kernels = set(self.tree.positions)
        return [
            position
            for position, node in enumerate(self.tree.nodes)
            if position not in kernels and jnp.issubdtype(jnp.result_type(node), jnp.floating)
        ]

    @property
    def leaves(self) -> list[Array]:
        return [jnp.asarray(self.tree.nodes[position]) for position in self.positions]

    def with_leaves(self, leaves: list[Array]) -> list[Any]:
        """The nodes with other leaves."""
        nodes = list(self.tree.nodes)
        for position, leaf in zip(self.positions, leaves):
            nodes[position] = leaf
        return nodes

    def k_velocity(self, frames: list[Frame]) -> Velocity:
        """``-∇_{K_i} L(Ten_i(Q_i^T) ×_{j != i} U_j ×_i K_i)`` for every kernel and mode, all other kernels as they are."""

        def gradient(index: int, mode: int, k: Array) -> Array:
            frame, kernels = frames[index], list(self.tree.kernels)

            def loss(k: Array) -> Array:
                kernels[index] = TuckerTensor(
                    frame.Q[mode], tuple(k if j == mode else u for j, u in enumerate(frame.U))
                )
                return self.loss(self.tree.replace(kernels))

            return -jax.grad(loss)(k)

        def velocity(state: list[tuple[ModeArray, ...]]) -> list[tuple[ModeArray, ...]]:
            return [
                tuple(None if k is None else gradient(index, mode, k) for mode, k in enumerate(entries))
                for index, entries in enumerate(state)
            ]

        return velocity

    def core_velocity(self, bases: list[tuple[ModeArray, ...]]) -> Velocity:
        """``-∇L`` with respect to the cores in given bases and the leaves that are not kernels."""

        def loss(state: tuple[list[Array], list[Array]]) -> Array:
            cores, leaves = state
            kernels = [TuckerTensor(core, basis) for core, basis in zip(cores, bases)]
            return self.loss(self.tree.replace(kernels, self.with_leaves(leaves)))

        gradient = jax.grad(loss)
        return lambda state: jax.tree.map(jnp.negative, gradient(state))


def galerkin_point(scheme: Integrator, augmented: Augmented, step: TuckerTensor) -> Galerkin:
    """Lines 5-8 for steps of the ``K_i`` alone, as exact ones are.

    Where new bases are those of ``K_i + step_{K_i}``, the part within ``range(U_i)`` is read from the step of a core. A descent
    step's is the same for all modes; solved steps differ in second order, so that every mode is given its own.
    """
    if scheme.same_network:
        return scheme.basis_step(augmented, step)
    frame = augmented.frame
    turns: list[ModeArray] = []
    bases: list[ModeArray] = []
    deviations: list[Array] = []
    for mode, (u, dk, q) in enumerate(zip(frame.U, step.factors, frame.Q)):
        if u is None:
            turns.append(None)
            bases.append(None)
            continue
        rows = jnp.matmul(jnp.matmul(u.T, dk, precision=HIGHEST), unfold(q, mode), precision=HIGHEST)
        own = scheme.basis_step(augmented, step._replace(core=fold(rows, mode, frame.core.shape)))
        assert own.turns is not None and own.deviation is not None
        turns.append(own.turns[mode])
        bases.append(own.bases[mode])
        deviations.append(own.deviation)
    carried = [None if turn is None else turn[: u.shape[1]] for turn, u in zip(turns, frame.U)]
    core = multi_mode_product(frame.core, carried, transpose=True)
    return Galerkin(core, tuple(bases), tuple(turns), jnp.max(jnp.stack(deviations)))
