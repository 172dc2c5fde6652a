"""Networks and optimizers as the options describe them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax
from flax import nnx
from optax import contrib

import tdlrt_jax
from experiments.config import ModelConfig, OptimizerConfig, TdlrtConfig
from experiments.data import Dataset
from tdlrt_jax import models
from tdlrt_jax.nn import TuckerConv, TuckerLinear

__all__ = ["build_model", "build_optimizer", "learning_rate"]

_MODELS = {"lenet5": models.LeNet5}


def build_model(config: ModelConfig, dataset: Dataset, seed: int) -> nnx.Module:
    """A freshly initialized network for the images and classes of a data set.

    Raises:
      ValueError: if the images do not suit the network.
    """
    height, width, channels = dataset.train.images.shape[1:]
    layers: dict[str, Any] = {}
    if config.method == "tdlrt":
        options: dict[str, Any] = {"rank": config.rank, "initialization": config.initialization}
        layers["conv"] = functools.partial(TuckerConv, **options)
        if config.linear:
            layers["linear"] = functools.partial(TuckerLinear, **options)

    # Jitted as a whole: drawing the kernels operation by operation would compile each of them.
    @nnx.jit
    def build() -> nnx.Module:
        return _MODELS[config.model](
            num_classes=dataset.classes,
            input_channels=channels,
            input_shape=(height, width),
            rngs=nnx.Rngs(seed),
            **layers,
        )

    return build()


def build_optimizer(
    optimizer: OptimizerConfig, tdlrt: TdlrtConfig, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """The descent step with clipping, weight decay and schedule inside ``tdlrt``.

    On a network without Tucker kernels ``tdlrt`` is the descent step alone, so dense training takes the same path.
    """
    schedule = _schedule(optimizer, steps_per_epoch)
    parts: list[optax.GradientTransformation] = []
    if optimizer.clip is not None:
        parts.append(optax.clip_by_global_norm(optimizer.clip))
    if optimizer.weight_decay and optimizer.optimizer != "adamw":
        parts.append(optax.add_decayed_weights(optimizer.weight_decay))
    if optimizer.optimizer == "sgd":
        parts.append(optax.sgd(schedule, momentum=optimizer.momentum or None))
    elif optimizer.optimizer == "adam":
        parts.append(optax.adam(schedule, b1=optimizer.momentum))
    else:
        parts.append(optax.adamw(schedule, b1=optimizer.momentum, weight_decay=optimizer.weight_decay))
    if optimizer.schedule == "plateau":
        # Accumulating over an epoch makes it the usual schedule, which looks at the loss of whole epochs.
        plateau = contrib.reduce_on_plateau(factor=0.1, patience=optimizer.patience, accumulation_size=steps_per_epoch)
        parts.append(plateau)
    return tdlrt_jax.tdlrt(
        optax.chain(*parts),
        tolerance=tdlrt.tau,
        integrator=tdlrt.integrator,
        criterion=tdlrt.criterion,
        convention=tdlrt.convention,
        spare=tdlrt.spare,
        warmup=tdlrt.warmup,
        adapt_every=tdlrt.adapt_every,
        min_rank=tdlrt.min_rank,
        max_rank=tdlrt.max_rank,
    )


def _schedule(optimizer: OptimizerConfig, steps_per_epoch: int) -> Any:
    if optimizer.schedule == "cosine":
        return optax.cosine_decay_schedule(optimizer.learning_rate, optimizer.epochs * steps_per_epoch)
    return optimizer.learning_rate


def learning_rate(optimizer: OptimizerConfig, steps_per_epoch: int, opt_state: Any) -> float:
    """The learning rate of the next step."""
    schedule = _schedule(optimizer, steps_per_epoch)
    rate = float(schedule(opt_state.step)) if callable(schedule) else schedule

    def is_plateau(node: Any) -> bool:
        return isinstance(node, contrib.ReduceLROnPlateauState)

    plateaus = [node for node in jax.tree.leaves(opt_state, is_leaf=is_plateau) if is_plateau(node)]
    return rate * float(plateaus[0].scale) if plateaus else rate
