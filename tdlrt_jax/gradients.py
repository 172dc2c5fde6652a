"""The gradients that a step takes: of one pass or two, of a batch or its micro-batches, of everything or of the cores alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tdlrt_jax.arguments import check_integer
from tdlrt_jax.frame import core_frame, is_kernel, value_and_grad
from tdlrt_jax.galerkin import SecondGradient, value_and_two_grads
from tdlrt_jax.paths import path_name
from tdlrt_jax.tucker import is_tucker

__all__ = ["Evaluated", "StepGradients"]


class Evaluated(NamedTuple):
    """A loss and its gradients at some parameters."""

    loss: Array  # scalar, the mean over micro-batches
    model_state: Any  # the next one
    aux: Any  # with a leading axis of micro-batches if there are several
    grads: Any  # with the structure of the parameters


class StepGradients:
    """What steps of one kind evaluate, and what they tell :func:`tdlrt_jax.tdlrt` beside it.

    Args:
      accumulate: evaluate so many micro-batches, and take the means.
      second_pass: a second gradient of ``"bug"`` is always one of a pass of its own.
      cores_only: gradients of the cores, and of all leaves that are no kernels; there is no second one.
      ranks_stay: there is no second gradient.

    Raises:
      ValueError: for ``accumulate`` below 1, and for more than one of the others.
    """

    def __init__(
        self,
        *,
        accumulate: int = 1,
        second_pass: bool = False,
        cores_only: bool = False,
        ranks_stay: bool = False,
    ):
        check_integer("accumulate", accumulate, 1, "a number of micro-batches")
        if cores_only and ranks_stay:
            raise ValueError(
                "cores_only=True, ranks_stay=True: expected one of them; with ranks_stay the bases move too, with cores_only "
                "they do not"
            )
        if second_pass and (cores_only or ranks_stay):
            which = "cores_only" if cores_only else "ranks_stay"
            raise ValueError(f"second_pass=True: a step with {which} has no second gradient, leave one of them out")
        self.accumulate, self.second_pass = accumulate, second_pass
        self.cores_only, self.ranks_stay = cores_only, ranks_stay

    def __call__(
        self, loss_fn: Callable[..., Any], params: Any, model_state: Any, batch: tuple
    ) -> tuple[Evaluated, dict[str, Any]]:
        """Evaluates a batch.

        Args:
          loss_fn: ``loss_fn(params, model_state, *batch) -> (loss, (model_state, aux))``.
          params: a pytree with kernels.
          model_state: what ``loss_fn`` is given; any pytree.
          batch: the arguments that are left.

        Returns:
          The first evaluation, and the keyword arguments for the transformation's update.
        """
        if self.cores_only:
            first = self._evaluate(loss_fn, _core_frames(params), model_state, batch)
            return first._replace(grads=_without_factors(first.grads, params)), {"cores_only": True}
        if self.ranks_stay:
            return self._evaluate(loss_fn, params, model_state, batch), {"ranks_stay": True}
        if self.accumulate > 1 or self.second_pass:
            first = self._evaluate(loss_fn, params, model_state, batch)

            def again(at: Any) -> tuple[Array, Any]:
                second = self._evaluate(loss_fn, _fill_masked(at, params), model_state, batch)
                return second.loss, second.grads

            return first, {"value_and_grad_fn": again}
        evaluated, second = value_and_two_grads(loss_fn, has_aux=True)(params, model_state, *batch)

        def anew(at: Any) -> tuple[Array, Any]:
            return _loss_and_grads(second(_fill_masked(at, params)))

        def same(at: Any) -> tuple[Array, Any]:
            return _loss_and_grads(second.at_same_network(_fill_masked(at, params)))

        return _evaluated(evaluated), {"value_and_grad_fn": SecondGradient(anew, same)}

    def _evaluate(self, loss_fn: Callable[..., Any], params: Any, model_state: Any, batch: tuple) -> Evaluated:
        gradient = value_and_grad(loss_fn, has_aux=True)
        if self.accumulate == 1:
            return _evaluated(gradient(params, model_state, *batch))

        def micro_step(carry: tuple, micro_batch: tuple) -> tuple:
            model_state, loss, grads = carry
            (value, (model_state, aux)), grad = gradient(params, model_state, *micro_batch)
            return (model_state, *jax.tree.map(jnp.add, (loss, grads), (value, grad))), aux

        micro_batches = jax.tree.map(_split(self.accumulate), batch)
        shapes = jax.eval_shape(gradient, params, model_state, *jax.tree.map(lambda leaf: leaf[0], micro_batches))
        (mean, _), means = shapes
        # Sums of numbers of 16 bits overflow, and round too much, where their means do not.
        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _wide(leaf.dtype)), (mean, means))
        # XLA's CPU convolutions are 15 to 77 times slower inside of a loop (benchmarks/results/cpu).
        unroll = jax.default_backend() == "cpu"
        aux: Any
        (model_state, *sums), aux = jax.lax.scan(micro_step, (model_state, *sums), micro_batches, unroll=unroll)
        loss, grads = jax.tree.map(
            lambda leaf, like: (leaf / self.accumulate).astype(like.dtype), tuple(sums), (mean, means)
        )
        return Evaluated(loss, model_state, aux, grads)


def _evaluated(value_and_grads: tuple) -> Evaluated:
    (loss, (model_state, aux)), grads = value_and_grads
    return Evaluated(loss, model_state, aux, grads)


def _loss_and_grads(value_and_grads: tuple) -> tuple[Array, Any]:
    (loss, _), grads = value_and_grads
    return loss, grads


def _core_frames(params: Any) -> Any:
    """The parameters with a core-only frame in the place of every kernel."""
    return jax.tree_util.tree_map_with_path(
        lambda path, node: core_frame(node, path_name(path)) if is_tucker(node) else node, params, is_leaf=is_tucker
    )


def _without_factors(grads: Any, params: Any) -> Any:
    """Gradients at :func:`_core_frames` with the parameters' structure: zeros for the factors."""

    def fill(node: Any, grad: Any) -> Any:
        return grad._replace(factors=jax.tree.map(jnp.zeros_like, node.factors)) if is_tucker(node) else grad

    return jax.tree.map(fill, params, grads, is_leaf=is_tucker)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def _split(parts: int) -> Callable[[Array], Array]:
    def split(leaf: Array) -> Array:
        if leaf.ndim == 0 or leaf.shape[0] % parts:
            raise ValueError(
                f"accumulate={parts} does not divide a batch array of shape {leaf.shape} along its first axis"
            )
        return leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:])

    return split


def _fill_masked(params: Any, full: Any) -> Any:
    """Parameters with optax's MaskedNodes, which ``partition`` and ``masked`` put in, filled from the full ones."""

    def stop(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode) or is_kernel(node)

    return jax.tree.map(
        lambda node, subtree: subtree if isinstance(node, optax.MaskedNode) else node, params, full, is_leaf=stop
    )
