"""Unstructured pruning: SNIP and GraSP before training, iterative magnitude pruning with rewinding around it.

Each method is a score for every weight, high where it is to stay. The weights with the highest scores in the whole network are
kept, and a mask, a pytree of booleans with ``None`` where nothing is pruned, stays what it is for the rest of a training:
:func:`pruned` lets an optimizer see masked gradients and makes masked updates, so pruned weights are exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tdlrt_jax.arguments import check_callable, check_integer, check_number, check_transformation, shown
from tdlrt_jax.paths import path_name

__all__ = [
    "PrunedState",
    "PruningRound",
    "apply_masks",
    "density_of",
    "grasp_scores",
    "iterative_magnitude_pruning",
    "magnitude_scores",
    "masks_from_scores",
    "prune_and_rewind",
    "pruned",
    "snip_scores",
    "weights_of_layers",
]

Prunable = Callable[[str, Array], bool]


def weights_of_layers(path: str, leaf: Array) -> bool:
    """The usual choice of what is pruned: kernels, not biases and normalizations."""
    return leaf.ndim >= 2


def _split(params: Any, prunable: Prunable) -> tuple[Any, Callable[[Any], Any]]:
    """The leaves that are pruned (``None`` elsewhere), and a function that puts others in their place."""

    check_callable("prunable", prunable, "prunable(path, leaf) -> bool")

    def select(path: tuple, leaf: Any) -> Any:
        return leaf if prunable(path_name(path), leaf) else None

    chosen = jax.tree_util.tree_map_with_path(select, params)
    if not jax.tree.leaves(chosen):
        raise ValueError(
            "prunable selects no leaf of params: it must be true of some, called with a path such as 'conv1/kernel' and the leaf"
        )

    def merge(weights: Any) -> Any:
        return jax.tree.map(
            lambda weight, leaf: leaf if weight is None else weight, weights, params, is_leaf=lambda node: node is None
        )

    return chosen, merge


def snip_scores(loss_fn: Callable[..., Array], params: Any, *batch: Any, prunable: Prunable = weights_of_layers) -> Any:
    """Connection sensitivity ``|g ⊙ θ| / sum |g ⊙ θ|``: how much the loss changes as a weight is switched off.

    Args:
      loss_fn: ``loss_fn(params, *batch)``, a scalar.
      params: at initialization.
      *batch: of the training set.
      prunable: ``prunable(path, leaf)``, which leaves are pruned.

    Returns:
      A pytree of ``params``' structure, scores of the leaves' shapes that sum to 1, ``None`` for leaves that are not pruned.

    Raises:
      ValueError: if ``prunable`` selects nothing.

    Source: Lee, Ajanthan & Torr (2019).
    """
    check_callable("loss_fn", loss_fn, "loss_fn(params, *batch) -> loss")
    weights, merge = _split(params, prunable)
    grads = jax.grad(lambda weights: loss_fn(merge(weights), *batch))(weights)
    scores = jax.tree.map(lambda g, w: jnp.abs(g * w), grads, weights)
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(scores))
    return jax.tree.map(lambda leaf: leaf / jnp.where(total > 0, total, 1), scores)


def grasp_scores(
    loss_fn: Callable[..., Array], params: Any, *batch: Any, prunable: Prunable = weights_of_layers
) -> Any:
    """``θ ⊙ H g``: how much the squared norm of the gradient would fall, to first order and up to the factor 2, without a weight.

    The Hessian is that of the pruned leaves, and its product with their gradient needs no Hessian. The authors divide the
    network's logits by a temperature of 200 in this loss.

    Args:
      loss_fn, params, batch, prunable: as in :func:`snip_scores`; the loss is differentiated twice.

    Returns:
      Scores as those of :func:`snip_scores`, not normalized; of either sign.

    Source: Wang, Zhang & Grosse (2020); their score to prune by is its negative.
    """
    check_callable("loss_fn", loss_fn, "loss_fn(params, *batch) -> loss")
    weights, merge = _split(params, prunable)
    gradient = jax.grad(lambda weights: loss_fn(merge(weights), *batch))
    _, hessian_gradient = jax.jvp(gradient, (weights,), (gradient(weights),))
    return jax.tree.map(jnp.multiply, weights, hessian_gradient)


def magnitude_scores(params: Any, *, prunable: Prunable = weights_of_layers) -> Any:
    """``|θ|``; scores as those of :func:`snip_scores`, not normalized."""
    weights, _ = _split(params, prunable)
    return jax.tree.map(jnp.abs, weights)


def masks_from_scores(scores: Any, density: float, *, within: Any = None) -> Any:
    """Masks of the weights with the highest scores in the whole network.

    Args:
      scores: a pytree of arrays, ``None`` for leaves that are not pruned.
      density: the part of the weights to keep, in (0, 1]; exactly ``round(density * number)`` stay, the first ones of equals.
      within: masks to stay within; weights pruned already do not come back.

    Returns:
      Booleans of the scores' structure and shapes.

    Raises:
      ValueError: for a density outside of (0, 1], or one above that of ``within``, and for scores that are not finite where a
        weight may stay (under ``jax.jit`` they cannot be looked at).

    Example:
      >>> import jax.numpy as jnp
      >>> masks_from_scores({"w": jnp.array([3.0, 1.0, 2.0, 0.0]), "b": None}, 0.5)["w"].tolist()
      [True, False, True, False]
    """
    if not 0 < check_number("density", density, "the part of the weights to keep, above 0 and at most 1") <= 1:
        raise ValueError(f"density={density}: expected the part of the weights to keep, above 0 and at most 1")
    leaves, treedef = jax.tree.flatten(scores)
    if not leaves:
        raise ValueError("scores has no arrays: expected one for every leaf that is pruned")
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
    count = max(1, round(density * flat.size))
    if within is not None:
        if [jnp.shape(leaf) for leaf in jax.tree.leaves(within)] != [leaf.shape for leaf in leaves]:
            raise ValueError("within has other shapes than scores: expected masks that were made of such scores")
        allowed = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(within)])
        if count > int(jnp.sum(allowed)):
            raise ValueError(
                f"density={density} is above that of the masks to stay within: expected at most {float(jnp.mean(allowed)):.6f}"
            )
    else:
        allowed = jnp.ones(flat.size, bool)
    _check_finite(scores, allowed)
    flat = jnp.where(allowed, flat, -jnp.inf)
    kept = jnp.argsort(-flat, stable=True)[:count]
    flags = jnp.zeros(flat.size, bool).at[kept].set(True)
    masks, start = [], 0
    for leaf in leaves:
        masks.append(flags[start : start + leaf.size].reshape(leaf.shape))
        start += leaf.size
    return jax.tree.unflatten(treedef, masks)


def _check_finite(scores: Any, allowed: Array) -> None:
    """Raises ``ValueError``, naming the leaves, for scores that have no order."""
    named = jax.tree_util.tree_leaves_with_path(scores)
    if any(isinstance(leaf, jax.core.Tracer) for _, leaf in named):
        return
    wrong, start = {}, 0
    for path, leaf in named:
        bad = ~jnp.isfinite(jnp.ravel(leaf)) & allowed[start : start + leaf.size]
        start += leaf.size
        if count := int(jnp.sum(bad)):
            wrong[path_name(path)] = count
    if wrong:
        listed = ", ".join(f"{count:,} of {name!r}" for name, count in wrong.items())
        raise ValueError(
            f"scores are not finite: {listed}. Expected finite ones: lower the learning rate of the training before, or the "
            "scale of the loss that they are gradients of"
        )


def density_of(masks: Any) -> float:
    """The part of the weights that masks keep; ``1 - density_of(masks)`` is the compression of the pruned leaves."""
    leaves = jax.tree.leaves(masks)
    if not leaves:
        raise ValueError(f"masks={shown(masks)} has no arrays: expected those of masks_from_scores")
    return float(sum(jnp.sum(leaf) for leaf in leaves)) / sum(leaf.size for leaf in leaves)


def apply_masks(tree: Any, masks: Any) -> Any:
    """``tree`` with zeros where the masks are False; leaves without a mask as they are."""

    def is_none(node: Any) -> bool:
        return node is None

    given: Any = jax.tree.structure(masks, is_leaf=is_none)
    if given != jax.tree.structure(tree, is_leaf=is_none):
        raise ValueError(
            "masks has another structure than the tree: expected a mask, or None, for every leaf of the parameters"
        )
    return jax.tree.map(
        lambda mask, leaf: leaf if mask is None else jnp.where(mask, leaf, 0).astype(leaf.dtype),
        masks,
        tree,
        is_leaf=is_none,
    )


class PrunedState(NamedTuple):
    """State of :func:`pruned`. The masks are a part of it: a checkpoint of the optimizer has them."""

    masks: Any  # booleans, None for leaves that are not pruned
    inner: Any


def pruned(inner: optax.GradientTransformation, masks: Any) -> optax.GradientTransformationExtraArgs:
    """An optax transformation under which pruned weights stay exactly zero.

    Gradients are masked before ``inner`` (momentum and norms see the pruned network) and updates after it (weight decay and noise
    cannot bring a weight back). Start from ``apply_masks(params, masks)``. The state has a copy of the masks, so that a step may
    donate it.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params, masks = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([True, False])}
      >>> tx = pruned(optax.sgd(0.1, momentum=0.9), masks)
      >>> updates, _ = tx.update({"w": jnp.array([1.0, 5.0])}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [0.8999999761581421, 0.0]
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> PrunedState:
        return PrunedState(jax.tree.map(jnp.copy, masks), inner.init(params))

    def update(grads: Any, state: PrunedState, params: Any = None, **extra: Any) -> tuple[Any, PrunedState]:
        updates, inner_state = inner.update(apply_masks(grads, state.masks), state.inner, params, **extra)
        return apply_masks(updates, state.masks), PrunedState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class PruningRound(NamedTuple):
    """What a round of iterative magnitude pruning starts with."""

    params: Any  # rewound and masked
    masks: Any
    density: float


def iterative_magnitude_pruning(
    train: Callable[[PruningRound], Any],
    rewind: Any,
    *,
    density: float,
    rounds: int,
    prunable: Prunable = weights_of_layers,
) -> Iterator[PruningRound]:
    """Trains, removes the smallest weights, rewinds those that are left, and so on.

    Args:
      train: trains the network of a round (with :func:`pruned`) and returns its parameters.
      rewind: parameters of the network at initialization, or early in a training, that every round starts from.
      density: the part of the weights that is left in the end, in (0, 1].
      rounds: how often weights are removed, 1 or more; each time the same part of those left.
      prunable: as in :func:`snip_scores`.

    Yields:
      ``rounds + 1`` rounds: the dense one first, the last one with the final density, to be trained by the caller as the others
      have been: ``train`` is called for each but the last.

    Raises:
      ValueError: for a density or number of rounds that cannot be.

    Source: Frankle & Carbin (2019); with rewinding to an early iteration Frankle et al. (2020).
    """
    check_callable("train", train, "train(round) -> parameters")
    check_integer("rounds", rounds, 1, "a number of removals")
    if not 0 < check_number("density", density, "the part of the weights that is left, in (0, 1]") <= 1:
        raise ValueError(f"density={density}: expected the part of the weights that is left, in (0, 1]")
    masks = masks_from_scores(magnitude_scores(rewind, prunable=prunable), 1.0)
    current = PruningRound(rewind, masks, 1.0)
    yield current
    for index in range(1, rounds + 1):
        target = density ** (index / rounds)
        current = prune_and_rewind(train(current), rewind, current.masks, target, prunable=prunable)
        yield current


def prune_and_rewind(
    trained: Any, rewind: Any, masks: Any, density: float, *, prunable: Prunable = weights_of_layers
) -> PruningRound:
    """One removal: the largest of the trained weights stay, with the values they had.

    Args:
      trained: parameters at the end of a round.
      rewind: those to go back to.
      masks: of the round.
      density: the part of the weights that is left.
      prunable: as in :func:`snip_scores`.
    """
    masks = masks_from_scores(magnitude_scores(trained, prunable=prunable), density, within=masks)
    return PruningRound(apply_masks(rewind, masks), masks, density_of(masks))
