"""What ``snip``, ``grasp`` and ``imp`` prune in a run, and when; the methods are :mod:`tdlrt_jax.baselines.pruning`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.config import TrainConfig
from experiments.run.batches import DeviceImages, Transform, epoch_order, standardize
from experiments.run.build import is_pruned
from experiments.run.metrics import cross_entropy, layer_name
from tdlrt_jax.baselines import (
    apply_masks,
    grasp_scores,
    magnitude_scores,
    masks_from_scores,
    prune_and_rewind,
    pruned,
    snip_scores,
)

__all__ = ["Pruning"]

TEMPERATURE = 200.0  # of the logits in GraSP's loss, as its authors have it


class Pruning:
    """The part of a job that prunes: the masks that a run starts with, and those of the rounds of ``imp``.

    Args:
      config: the options, with a method that prunes.
      kinds: of the network's layers, see :func:`experiments.run.build.kinds_of`.
      descent: the optimizer of the weights that are left.
    """

    def __init__(self, config: TrainConfig, kinds: dict[str, str], descent: Any):
        compression = config.model.compression
        assert compression is not None
        self.method = config.model.parts.pruning
        self.density = 1 - compression
        self.rounds = config.pruning.rounds if self.method == "imp" else 0
        self.rewind: dict[str, Any] | None = (
            None  # what the rounds of imp start from: parameters and state of the network
        )
        self._config, self._kinds, self._descent = config, kinds, descent

    def optimizer(
        self, model: nnx.Module, data: DeviceImages, transform: Transform, *, masks_follow: bool = False
    ) -> Any:
        """The optimizer of a run's first round, with its masks.

        Args:
          model: in training mode, as initialized.
          data: the training images, of which the first ``score_images`` in the order of the first epoch are looked at.
          transform: standardization; scores see neither crops nor flips.
          masks_follow: whether a checkpoint is going to replace the masks: nothing is pruned then.
        """
        parts: Any = nnx.split(model, nnx.Param, ...)
        graphdef, params, model_state = parts
        if self.method == "imp" or masks_follow:
            scores, density = magnitude_scores(params, prunable=self._prunable), 1.0
        else:
            order = epoch_order(self._config.run.seed, 0, len(data.labels), self._images(data))[0]
            batch = standardize(data.images[order], transform), data.labels[order]
            scores, density = self._scores(graphdef, params, model_state, *batch), self.density
        return pruned(self._descent, masks_from_scores(scores, density))

    def masks(self, opt_state: Any) -> Any:
        """The masks in use."""
        return opt_state.masks

    def start(self, params: Any, opt_state: Any) -> Any:
        """Parameters with zeros where they are pruned."""
        return apply_masks(params, opt_state.masks)

    def remember(self, params: Any, model_state: Any) -> None:
        """Keeps what the rounds of ``imp`` start from."""
        self.rewind = jax.tree.map(jnp.copy, {"params": params, "model_state": model_state})

    def next_round(self, params: Any, opt_state: Any, done: int) -> tuple[Any, Any, Any]:
        """Parameters, optimizer state and state of the network to start from after ``done`` rounds of ``imp``."""
        assert self.rewind is not None
        start = prune_and_rewind(
            params,
            self.rewind["params"],
            opt_state.masks,
            self.density ** (done / self.rounds),
            prunable=self._prunable,
        )
        fresh = pruned(self._descent, start.masks).init(start.params)
        # Every leaf its own buffer: the step donates its state.
        return jax.tree.map(jnp.copy, (start.params, fresh, self.rewind["model_state"]))

    def _images(self, data: DeviceImages) -> int:
        return min(self._config.pruning.score_images, len(data.labels))

    def _prunable(self, path: str, leaf: Array) -> bool:
        return leaf.ndim >= 2 and is_pruned(self._config.model, self._kinds, layer_name(path))

    def _scores(self, graphdef: Any, params: Any, model_state: Any, images: Array, labels: Array) -> Any:
        score, temperature = (grasp_scores, TEMPERATURE) if self.method == "grasp" else (snip_scores, 1.0)

        def loss_fn(params: Any) -> Array:
            network: Any = nnx.merge(graphdef, params, model_state, copy=True)
            return jnp.mean(cross_entropy(network(images) / temperature, labels))

        return jax.jit(lambda params: score(loss_fn, params, prunable=self._prunable))(params)
