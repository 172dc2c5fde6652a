"""Networks and optimizers as the options describe them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import nnx
from optax import contrib

import tdlrt_jax
from experiments.config import ModelConfig, OptimizerConfig, TdlrtConfig
from experiments.data import Dataset
from tdlrt_jax import models
from tdlrt_jax.conv import conv_general_dilated
from tdlrt_jax.initialization import Rank
from tdlrt_jax.nn import TuckerConv, TuckerLinear

__all__ = ["build_model", "build_optimizer", "learning_rate"]

_MODELS = {"lenet5": models.LeNet5, "alexnet": models.AlexNet, "vgg16": models.VGG16, "resnet18": models.ResNet18}


def build_model(config: ModelConfig, dataset: Dataset, seed: int) -> nnx.Module:
    """A freshly initialized network for the images and classes of a data set.

    Raises:
      ValueError: if the images do not suit the network.
    """
    height, width, channels = dataset.train.images.shape[1:]
    # The same fast convolution for small images that Tucker layers have: a dense network is to be a fair match.
    layers: dict[str, Any] = {"conv": functools.partial(nnx.Conv, conv_general_dilated=conv_general_dilated)}
    if config.method == "tdlrt":
        layers["conv"] = functools.partial(_tucker_conv, config)
    if config.model == "lenet5":
        if config.method == "tdlrt" and config.linear:
            layers["linear"] = functools.partial(TuckerLinear, rank=config.rank, initialization=config.initialization)
    else:
        layers["width"] = config.width

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


def _tucker_conv(
    config: ModelConfig, channels: int, filters: int, kernel_size: Sequence[int], **options: Any
) -> TuckerConv:
    rank: Rank = config.rank
    if config.spatial == "whole":
        sizes = (channels, filters)
        entries = [config.rank if isinstance(config.rank, float) else min(config.rank, n) for n in sizes]
        rank = (*[None] * len(kernel_size), *entries)
    return TuckerConv(channels, filters, kernel_size, rank=rank, initialization=config.initialization, **options)


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
        tolerance=_tolerance(tdlrt, optimizer.epochs, steps_per_epoch),
        integrator=tdlrt.integrator,
        criterion=tdlrt.criterion,
        convention=tdlrt.convention,
        spare=tdlrt.spare,
        warmup=tdlrt.warmup,
        adapt_every=tdlrt.adapt_every,
        min_rank=tdlrt.min_rank,
        max_rank=tdlrt.max_rank,
        freeze_after=None if tdlrt.freeze_epochs is None else round(tdlrt.freeze_epochs * steps_per_epoch),
    )


def _tolerance(tdlrt: TdlrtConfig, epochs: int, steps_per_epoch: int) -> float | tdlrt_jax.Budget:
    if tdlrt.budget is None:
        return tdlrt.tau
    by = epochs / 2 if tdlrt.budget_epochs is None else tdlrt.budget_epochs
    return tdlrt_jax.Budget(tdlrt.budget, steps=max(1, round(by * steps_per_epoch)))


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
