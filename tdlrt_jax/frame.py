"""Theorem 1: the variables ``K_i`` and one chart in which all their gradients come from one backward pass.

With ``Mat_i(C)^T = Q_i S_i^T`` (QR) and ``K_i = U_i S_i``, Theorem 1 asks for the gradients of
``L(Ten_i(Q_i^T) ×_{j != i} U_j ×_i K_i)`` with respect to every ``K_i``, and of ``L(C ×_j U_j)`` with respect to ``C``, all at
the same kernel ``W``. They are the partial derivatives of one function, the affine chart of the tangent space (3) at ``W``::

    W(C, K_1..K_d) = C ×_j U_j + sum_i Ten_i(Q_i^T) ×_{j != i} U_j ×_i (K_i - U_i S_i)

with ``U_j, Q_i, S_i`` held constant. A :class:`Frame` is this chart, so *any* operation on a kernel differentiates correctly.
Where a layer's own derivative is differentiated again (a gradient penalty in the loss), the chart takes the place of its rule
(:func:`in_chart`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from tdlrt_jax import batching
from tdlrt_jax.arguments import check_callable
from tdlrt_jax.batching import map_batched, map_light
from tdlrt_jax.orthonormal import orthonormal_rows
from tdlrt_jax.paths import path_name
from tdlrt_jax.tucker import (
    HIGHEST,
    ModeArray,
    TuckerTensor,
    active_columns,
    check_structure,
    fold,
    is_tucker,
    mode_product,
    multi_mode_product,
    unfold,
)

__all__ = ["Frame", "lift", "value_and_grad"]


class Frame(NamedTuple):
    """The chart of Theorem 1 at a kernel. ``core`` and ``K`` are its variables, ``U`` and ``Q`` its constants.

    A frame without ``K`` and ``Q`` is *core-only*: the Galerkin chart ``C ×_j U_j``, whose one variable is the core
    (line 9 of Algorithm 1).
    """

    core: Array  # (R_1, ..., R_d)
    K: Any  # a tuple of ModeArray, (n_i, R_i) each, K_i = U_i S_i; None in a core-only frame
    U: tuple[ModeArray, ...]  # (n_i, R_i) each
    Q: Any  # a tuple of ModeArray, (R_1, ..., R_d) each: Ten_i(Q_i^T), slices along mode i orthonormal; None likewise
    tap: Any = None  # a tdlrt_jax.conv.onepass.Tap, which a second gradient at the same network is taken from
    # Like K: the U_i S_i, from whoever differentiates core and K alone; gradients can then be differentiated from outside in what
    # U, Q and these depend on (a Hessian of the loss, say). None: nothing but core and K differentiates.
    origin: Any = None

    def bases(self) -> tuple[ModeArray, ...]:
        """``U``, to be used as the constants that they are."""
        return jax.lax.stop_gradient(self.U) if self.origin is None else self.U

    def chart_to_dense(self) -> Array:
        """``W(C, K_1..K_d)`` as an ``(n_1, ..., n_d)`` array."""
        dense = multi_mode_product(self.core, self.bases())
        if self.K is None or self.Q is None:
            return dense
        Q, origin = jax.lax.stop_gradient((self.Q, self.K)) if self.origin is None else (self.Q, self.origin)
        for mode, (k, q) in enumerate(zip(self.K, Q)):
            if k is None or q is None:
                continue
            # K_i - U_i S_i is zero in value; only its derivative matters.
            increment = mode_product(q, k - origin[mode], mode)
            dense = dense + multi_mode_product(increment, self.bases(), skip=mode)
        return dense


def is_kernel(node: Any) -> bool:
    """Whether a pytree node is a TuckerTensor or a Frame; meant for ``is_leaf=``."""
    return isinstance(node, TuckerTensor | Frame)


def _orthonormal_unfolding(unfolding: Array, active: Array, factor: Array) -> tuple[Array, Array]:
    """``Q_i^T`` and ``K_i = U_i S_i`` of ``Mat_i(C)^T = Q_i S_i^T`` (lines 2-3), ``S_i`` triangular.

    Args:
      unfolding: ``Mat_i(C)``, ``(R_i, prod_{j != i} R_j)``.
      active: booleans of its shape, where the core is in use.
      factor: ``U_i``, ``(n_i, R_i)``.

    Returns:
      ``Q_i^T`` of the unfolding's shape, and ``K_i`` of the factor's. Padded rows and inactive columns are masked to zero. No
      column is dropped for a small diagonal entry of the triangular factor: with dependent slices that loses 10% and more of
      the core.
    """
    in_use = active_columns(factor)
    q, triangular = jnp.linalg.qr(unfolding.T)
    s = jnp.where(in_use[:, None] & in_use[None, :], triangular.T, 0)
    return jnp.where(active, q.T, 0), jnp.matmul(factor, s, precision=HIGHEST)


def _with_rows(rows: Array, unfolding: Array, active: Array, factor: Array) -> tuple[Array, Array]:
    """The same from an orthonormal basis of the unfolding's rows; ``S_i`` is not triangular then."""
    rows = jnp.where(active, rows, 0)
    s = jnp.where(active_columns(factor)[:, None], jnp.matmul(unfolding, rows.T, precision=HIGHEST), 0)
    return rows, jnp.matmul(factor, s, precision=HIGHEST)


def active_entries(shape: tuple[int, ...], bases: Sequence[ModeArray]) -> Array:
    """Which entries of a core of the given shape belong to columns that exist, given the basis of each mode: booleans."""
    return entries_in_use(shape, [None if basis is None else active_columns(basis) for basis in bases])


def entries_in_use(shape: tuple[int, ...], columns: Sequence[ModeArray]) -> Array:
    """The same, given which columns of each mode exist."""
    mask = jnp.ones(shape, bool)
    for mode, exist in enumerate(columns):
        if exist is not None:
            along = [1] * len(shape)
            along[mode] = -1
            mask = mask & exist.reshape(along)
    return mask


def lift(kernel: TuckerTensor) -> Frame:
    """The :class:`Frame` at a kernel: ``K_i = U_i S_i`` and ``Q_i`` for every mode that is not whole (lines 2-3).

    Args:
      kernel: with orthonormal factors, active columns first.

    Returns:
      A frame whose ``K_i`` have the shapes of the factors, zero in padded columns.

    Raises:
      ValueError: naming the mode, for factors that do not fit the core, or ``R_i > prod_{j != i} R_j``.
    """
    check_structure(kernel)
    return lift_all([kernel])[0]


def core_frame(kernel: TuckerTensor, name: str = "") -> Frame:
    """The core-only :class:`Frame` at a kernel, in whose chart the core alone moves; raises as :func:`lift` does."""
    check_structure(kernel, name)
    core = kernel.core.astype(jnp.promote_types(kernel.core.dtype, jnp.float32))
    return Frame(core, None, kernel.factors, None)


def lift_all(kernels: Sequence[TuckerTensor]) -> list[Frame]:
    """:func:`lift` for all kernels of a network, already checked: unfoldings of equal shapes are factorized as one batch.

    Frames are in float32 at least, also where a core is stored in less.
    """
    modes = [(i, mode) for i, k in enumerate(kernels) for mode, factor in enumerate(k.factors) if factor is not None]
    in_use = dict(zip(modes, map_light(active_columns, [kernels[i].factors[mode] for i, mode in modes])))
    masks = [
        entries_in_use(kernel.core.shape, [in_use.get((i, mode)) for mode in range(len(kernel.factors))])
        for i, kernel in enumerate(kernels)
    ]
    cores = [kernel.core.astype(jnp.promote_types(kernel.core.dtype, jnp.float32)) for kernel in kernels]
    with jax.named_scope("tdlrt.lift"):
        unfoldings = [unfold(cores[i], mode) for i, mode in modes]
        active = [unfold(masks[i], mode) for i, mode in modes]
        factors = [kernels[i].factors[mode] for i, mode in modes]
        if batching.few_and_large():
            cleared = [jnp.where(where, unfolding, 0) for where, unfolding in zip(active, unfoldings)]
            parts = orthonormal_rows(cleared, _with_rows, unfoldings, active, factors)
        else:
            parts = map_batched(_orthonormal_unfolding, unfoldings, active, factors)
    Q: list[list[ModeArray]] = [[None] * len(kernel.factors) for kernel in kernels]
    K: list[list[ModeArray]] = [[None] * len(kernel.factors) for kernel in kernels]
    for (i, mode), (q, k) in zip(modes, parts):
        Q[i][mode], K[i][mode] = fold(q, mode, kernels[i].core.shape), k
    return [Frame(core, tuple(k), kernel.factors, tuple(q)) for kernel, core, k, q in zip(kernels, cores, K, Q)]


def chart_point(frame: Frame) -> TuckerTensor:
    """The chart's coordinates of the kernel itself, ``TuckerTensor(C, K)``: what is differentiated, and what descends."""
    return TuckerTensor(frame.core, (None,) * len(frame.U) if frame.K is None else frame.K)


def with_point(frame: Frame, point: TuckerTensor) -> Frame:
    """The frame with the variables of ``point``, which are to be differentiated, and the constants of ``frame``."""
    K = None if frame.K is None else point.factors
    return frame._replace(core=point.core, K=K, origin=chart_point(frame).factors)


def around(frame: Frame, point: TuckerTensor) -> TuckerTensor:
    """The kernel ``W(C, K_1..K_d)`` at any point of the chart, as a Tucker tensor: the rules for frames hold at their own alone.

    Args:
      frame: as :func:`lift` made it, or core-only.
      point: ``(C, K)``, of which what lies in the ranges of the ``U_i`` is left out of ``K_i - U_i S_i``.

    Returns:
      A TuckerTensor of twice the ranks, ``[U_i, K_i - U_i S_i]``, whose factors are not orthonormal; of the same ranks for a
      core-only frame.
    """
    if frame.K is None or frame.Q is None:
        return TuckerTensor(point.core, frame.U)
    core = point.core
    factors: list[ModeArray] = []
    for u, k, start in zip(frame.U, point.factors, frame.K):
        if u is None:
            factors.append(None)
            continue
        step = k - start
        outside = step - jnp.matmul(u, jnp.matmul(u.T, step, precision=HIGHEST), precision=HIGHEST)
        factors.append(jnp.concatenate([u.astype(outside.dtype), outside], axis=1))
    wide = jnp.pad(core, [(0, 0 if u is None else u.shape[1]) for u in frame.U])
    for mode, q in enumerate(frame.Q):
        if q is not None:
            sides = [(0, 0 if u is None else u.shape[1]) for u in frame.U]
            sides[mode] = (q.shape[mode], 0)
            wide = wide + jnp.pad(q, sides)
    return TuckerTensor(wide, tuple(factors))


def in_chart(rule: Callable[..., Any], definition: Callable[..., Any]) -> Callable[..., Any]:
    """``rule``, an identity of first order at one point of the chart, which is differentiated once more as ``definition`` is.

    The rules for layers use products that are equal at the kernel itself, not around it, and bases that stand still. So where a
    frame's point or another argument moves alone, as by a gradient penalty in a loss, what the rule gives is differentiated as
    the chart's own is, to any order. Where the constants move as well, :func:`value_and_grad` is differentiated from outside:
    the rule holds wherever these go, and is differentiated itself.

    Args:
      rule: ``rule(static, frame, *arrays)``, ``static`` hashable and the frame without a tap.
      definition: the same function of the same arguments, in JAX's own operations on the chart.

    Returns:
      A function like ``rule``.
    """
    apply = jax.custom_jvp(rule, nondiff_argnums=(0,))

    def differentiate(static: Any, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        (leaves, treedef), directions = jax.tree.flatten(primals), jax.tree.leaves(tangents)
        moving = [position for position, direction in enumerate(directions) if not isinstance(direction, SymbolicZero)]

        def of(*moved: Array) -> Any:
            arguments = dict(enumerate(leaves)) | dict(zip(moving, moved))
            return function(static, *jax.tree.unflatten(treedef, arguments.values()))

        constants = jax.tree.leaves((tangents[0].U, tangents[0].Q, tangents[0].origin))
        function = definition if all(isinstance(constant, SymbolicZero) for constant in constants) else rule
        return jax.jvp(of, [leaves[i] for i in moving], [directions[i] for i in moving])

    apply.defjvp(differentiate, symbolic_zeros=True)
    return apply


def value_and_grad(loss_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """``jax.value_and_grad`` in the first argument, with the gradients of Theorem 1 for every Tucker kernel in it.

    Every :class:`TuckerTensor` anywhere in ``params`` is lifted to a :class:`Frame` before ``loss_fn`` sees it; its gradient is
    ``TuckerTensor(dC, (dK_1, ..., dK_d))`` and has the structure and shapes of the kernel. All other leaves get their ordinary
    gradients. One forward and one backward pass in all. A Frame in ``params`` is differentiated as it is (a core-only one gives
    ``TuckerTensor(dC, (None, ...))``).

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, a scalar, or ``(scalar, aux)`` with ``has_aux``. It uses kernels through
        :func:`tdlrt_jax.tucker_conv`, :func:`tdlrt_jax.tucker_linear` or :func:`tdlrt_jax.to_dense`. It sees frames, whose
        arrays (``jax.tree.leaves``) are not those of the parameters: a penalty is one of ``to_dense(kernel)``, or, cheaper,
        ``optax.add_decayed_weights`` inside of :func:`tdlrt_jax.tdlrt`.
        The loss may contain derivatives of the network, such as a gradient penalty by ``jax.grad``; those in forward mode
        (``jax.jvp``, ``jax.jacfwd``) of layers with the dense kernels, ``to_dense(kernel)``.
      has_aux: as in ``jax.value_and_grad``.

    Returns:
      ``f(params, *args, **kwargs) -> (value, grads)``. It raises ``ValueError``, naming kernel and mode, for kernels that
      :func:`lift` cannot work on.

    Example:
      >>> import jax, jax.numpy as jnp, tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jnp.arange(12.0).reshape(3, 4), rank=(2, 2))
      >>> loss = lambda params, x: jnp.sum(tdlrt_jax.tucker_linear(x, params["w"]) ** 2)
      >>> value, grads = tdlrt_jax.value_and_grad(loss)({"w": kernel}, jnp.ones((5, 3)))
      >>> jax.tree.map(jnp.shape, grads["w"])
      TuckerTensor(core=(2, 2), factors=((3, 2), (4, 2)))

    Source: Theorem 1, equation (8).
    """

    check_callable("loss_fn", loss_fn, "loss_fn(params, *batch) -> loss")

    def evaluate(params: Any, *args: Any, **kwargs: Any) -> Any:
        nodes, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_kernel)
        frames = lift_nodes(nodes)
        points = [chart_point(node) if isinstance(node, Frame) else node for node in frames]

        def of_points(points: list[Any], *args: Any, **kwargs: Any) -> Any:
            lifted = [
                with_point(frame, point) if isinstance(frame, Frame) else point for frame, point in zip(frames, points)
            ]
            return loss_fn(jax.tree.unflatten(treedef, lifted), *args, **kwargs)

        value, grads = jax.value_and_grad(of_points, has_aux=has_aux)(points, *args, **kwargs)
        return value, jax.tree.unflatten(treedef, grads)

    return evaluate


def lift_nodes(nodes: list[tuple[tuple, Any]]) -> list[Any]:
    """The nodes of a flattened tree, the kernels among them lifted."""
    positions = [position for position, (_, node) in enumerate(nodes) if is_tucker(node)]
    for position in positions:
        check_structure(nodes[position][1], path_name(nodes[position][0]))
    lifted = [node for _, node in nodes]
    for position, frame in zip(positions, lift_all([lifted[position] for position in positions])):
        lifted[position] = frame
    return lifted
