"""Networks and optimizers as the options describe them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from optax import contrib

import tdlrt_jax
from experiments.options import ModelConfig, OptimizerConfig, TdlrtConfig
from experiments.run.data import Dataset
from experiments.run.metrics import layers, totals
from tdlrt_jax import models
from tdlrt_jax.baselines import balance, cp_rank
from tdlrt_jax.conv import conv_general_dilated
from tdlrt_jax.initialization import Rank
from tdlrt_jax.nn import CPConv, MatrixConv, TuckerConv, TuckerLinear
from tdlrt_jax.nn.layers import default_kernel_init
from tdlrt_jax.nn.summary import layer_kind, layers_with_kernels, module_path
from tdlrt_jax.tucker import is_tucker

__all__ = [
    "after_epoch",
    "budget_steps",
    "build_descent",
    "build_model",
    "build_optimizer",
    "falling_steps",
    "is_pruned",
    "kinds_of",
    "learning_rate",
]

_MODELS = {"lenet5": models.LeNet5, "alexnet": models.AlexNet, "vgg16": models.VGG16, "resnet18": models.ResNet18}


def build_model(config: ModelConfig, dataset: Dataset, seed: int) -> nnx.Module:
    """A freshly initialized network for the images and classes of a data set.

    Raises:
      ValueError: if the images do not suit the network, or ``config.compression`` is out of its reach.
    """
    if config.compression is not None and config.parts.layer != "dense":
        config = dataclasses.replace(config, rank=rank_of_compression(config, dataset), compression=None)
    build = functools.partial(_build, config, dataset, seed)
    if config.parts.layer == "cp" and config.initialization == "hosvd":
        return build()  # its alternating least squares are NumPy's
    # Jitted as a whole: drawing the kernels operation by operation would compile each of them.
    return jax.jit(build, compiler_options=tdlrt_jax.compiler_options(runs_once=True))()


def _build(config: ModelConfig, dataset: Dataset, seed: int) -> nnx.Module:
    height, width, channels = dataset.train.images.shape[1:]
    parts: dict[str, Any] = {"conv": _convolution(config)}
    if config.model != "lenet5":
        parts["width"] = config.width
        parts["norm"] = functools.partial(nnx.BatchNorm, momentum=config.norm_momentum)
    if config.windows == "small":
        parts["windows"] = (3,) * 5
    if config.hidden_units:
        parts["hidden"] = (config.hidden_units,) * 2
    if config.dropout:
        parts["dropout"] = config.dropout
    if config.has_hidden and config.parts.layer != "dense" and config.linear:
        parts["linear"] = functools.partial(TuckerLinear, rank=config.rank, initialization=config.initialization)
    model = _MODELS[config.model](
        num_classes=dataset.classes,
        input_channels=channels,
        input_shape=(height, width),
        rngs=nnx.Rngs(seed),
        **parts,
    )
    if config.balanced:
        for layer in layers_with_kernels(model).values():
            if is_tucker(kernel := layer.kernel.get_value()):
                layer.kernel.set_value(balance(kernel))
    return model


def _convolution(config: ModelConfig) -> Any:
    """The layer that convolutions are, called as ``nnx.Conv`` is."""
    draw = functools.partial(_draw, config.gain)
    if config.parts.layer == "tucker":
        return functools.partial(_tucker_conv, config, kernel_init=draw)
    if config.parts.layer == "matrix":
        return functools.partial(_matrix_conv, config, kernel_init=draw)
    if config.parts.layer == "cp":
        names = {"dense": "normal", "hosvd": "als", "spectral": "spectral"}
        return functools.partial(_cp_conv, config, initialization=names[config.initialization], kernel_init=draw)
    # The same fast convolution for small images that Tucker layers have: a dense network is to be a fair match.
    return functools.partial(nnx.Conv, conv_general_dilated=conv_general_dilated, kernel_init=draw)


def _draw(gain: float, key: Array, shape: Sequence[int], dtype: Any, **sharding: Any) -> Array:
    """Kernels of the usual variance times ``gain`` squared."""
    return gain * default_kernel_init(key, shape, dtype, **sharding)


def rank_of_compression(config: ModelConfig, dataset: Dataset) -> float:
    """The largest fraction ``kappa`` of the full ranks, to a thousandth, with which the convolutions have a compression or more.

    Raises:
      ValueError: if no rank has it.
    """
    target = config.compression
    assert target is not None

    def compression(kappa: float) -> float:
        # Shapes alone are wanted, so any initialization will do.
        trial = dataclasses.replace(config, rank=kappa, initialization="dense", compression=None)
        model = nnx.eval_shape(functools.partial(_build, trial, dataset, 0))
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        return totals(layers(params, kinds_of(model))).conv_compression

    low, high = 1, 1001
    if compression(low / 1000) < target:
        raise ValueError(
            f"--compression {target}: {config.model} as {config.method} has at most {compression(low / 1000):.4f}, at its "
            "lowest ranks"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if compression(middle / 1000) >= target else (low, middle)
    return low / 1000


def kinds_of(model: nnx.Module) -> dict[str, str]:
    """The kind of every layer with a kernel, by its path: see :data:`tdlrt_jax.report.KINDS`."""
    return {module_path(path): layer_kind(module) for path, module in layers_with_kernels(model).items()}


def is_pruned(config: ModelConfig, kinds: dict[str, str], name: str) -> bool:
    """Whether a layer's kernel is pruned: convolutions, and hidden linear layers where these are compressed by others too."""
    return kinds.get(name) == "convolution" or (config.linear and kinds.get(name) == "linear" and name != "classifier")


def _tucker_conv(
    config: ModelConfig, channels: int, filters: int, kernel_size: Sequence[int], **options: Any
) -> TuckerConv:
    spatial = [None if config.spatial == "whole" else size for size in kernel_size]
    rank: Rank = (*spatial, _initial_rank(config, channels), _initial_rank(config, filters))
    return TuckerConv(channels, filters, kernel_size, rank=rank, initialization=config.initialization, **options)


def _matrix_conv(
    config: ModelConfig, channels: int, filters: int, kernel_size: Sequence[int], **options: Any
) -> MatrixConv:
    rank = _initial_rank(config, min(math.prod(kernel_size) * channels, filters))
    core = config.parts.adaptive  # the integrators' charts have one
    return MatrixConv(
        channels, filters, kernel_size, rank=rank, initialization=config.initialization, core=core, **options
    )


def _cp_conv(config: ModelConfig, channels: int, filters: int, kernel_size: Sequence[int], **options: Any) -> CPConv:
    terms = max(cp_rank((*kernel_size, channels, filters), config.rank), config.least_rank)
    return CPConv(channels, filters, kernel_size, rank=terms, **options)


def _initial_rank(config: ModelConfig, size: int) -> int:
    count = round(config.rank * size) if isinstance(config.rank, float) else config.rank
    return min(size, max(count, config.least_rank))


def build_descent(optimizer: OptimizerConfig, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """The descent step with clipping, weight decay and schedule."""
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
        if optimizer.plateau_of == "validation":
            parts.append(_held_plateau(optimizer))
        else:  # accumulating over an epoch makes it the usual schedule, which looks at the loss of whole epochs
            parts.append(_plateau(optimizer, steps_per_epoch))
    return optax.with_extra_args_support(optax.chain(*parts))


def build_optimizer(
    optimizer: OptimizerConfig, tdlrt: TdlrtConfig, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """The descent step inside ``tdlrt``, for the methods that adapt ranks."""
    return tdlrt_jax.tdlrt(
        build_descent(optimizer, steps_per_epoch),
        tolerance=_tolerance(tdlrt, optimizer.epochs, steps_per_epoch),
        integrator=tdlrt.integrator,
        criterion=tdlrt.criterion,
        convention=tdlrt.convention,
        spare=tdlrt.spare,
        warmup=tdlrt.warmup,
        adapt_every=tdlrt.adapt_every if tdlrt.between is None else 1,
        keep_momentum=tdlrt.keep_momentum,
        min_rank=tdlrt.min_rank,
        max_rank=tdlrt.max_rank,
        freeze_after=_freeze_steps(tdlrt, steps_per_epoch),
    )


def budget_steps(tdlrt: TdlrtConfig, epochs: int, steps_per_epoch: int) -> int | None:
    """Steps by which the budget is reached; ``None`` without one."""
    if tdlrt.budget is None:
        return None
    by = epochs / 2 if tdlrt.budget_epochs is None else tdlrt.budget_epochs
    return max(1, round(by * steps_per_epoch))


def falling_steps(tdlrt: TdlrtConfig, epochs: int, steps_per_epoch: int) -> int | None:
    """Steps until a budget has made ranks fall: it is reached, or they are frozen before; ``None`` without a budget."""
    steps, frozen = budget_steps(tdlrt, epochs, steps_per_epoch), _freeze_steps(tdlrt, steps_per_epoch)
    return steps if steps is None or frozen is None else min(steps, frozen)


def _freeze_steps(tdlrt: TdlrtConfig, steps_per_epoch: int) -> int | None:
    return None if tdlrt.freeze_epochs is None else round(tdlrt.freeze_epochs * steps_per_epoch)


def _tolerance(tdlrt: TdlrtConfig, epochs: int, steps_per_epoch: int) -> float | tdlrt_jax.Budget:
    steps = budget_steps(tdlrt, epochs, steps_per_epoch)
    if tdlrt.budget is None or steps is None:
        return tdlrt.tau
    every = 10 if tdlrt.between is None else 1  # whole steps that are few are a look each
    return tdlrt_jax.Budget(tdlrt.budget, steps, every=every, importance=tdlrt.budget_importance)


def _schedule(optimizer: OptimizerConfig, steps_per_epoch: int) -> Any:
    if optimizer.schedule == "cosine":
        return optax.cosine_decay_schedule(optimizer.learning_rate, optimizer.epochs * steps_per_epoch)
    return optimizer.learning_rate


def _plateau(optimizer: OptimizerConfig, losses: int = 1) -> optax.GradientTransformationExtraArgs:
    """The schedule that looks at the mean of so many losses at a time."""
    return contrib.reduce_on_plateau(factor=0.1, patience=optimizer.patience, accumulation_size=losses)


def _held_plateau(optimizer: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """The schedule without its look at a step's loss: :func:`after_epoch` shows it another one."""

    def update(updates: Any, state: contrib.ReduceLROnPlateauState, params: Any = None, **_: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda update: state.scale.astype(update.dtype) * update, updates), state

    return optax.GradientTransformationExtraArgs(_plateau(optimizer).init, update)


def after_epoch(
    optimizer: OptimizerConfig,
    opt_state: Any,
    validation_loss: float | None,
    place: Callable[[Any], Any] = lambda node: node,
    *,
    ranks_fall: bool = False,
) -> Any:
    """The optimizer's state after an epoch; the same one if no schedule wants to know of it.

    Args:
      optimizer: the options.
      opt_state: of :func:`build_descent` or :func:`build_optimizer`.
      validation_loss: mean over the images held out; ``None`` without any.
      place: puts what changed where the state is.
      ranks_fall: whether a budget is yet to be reached. A loss that rises then says that weights went, not that the rate is
        too high, so a plateau begins anew.
    """
    if optimizer.schedule != "plateau" or not (ranks_fall or optimizer.plateau_of == "validation"):
        return opt_state

    def look(node: Any) -> Any:
        if not _is_plateau(node):
            return node
        before, plateau = jax.device_get(node), _plateau(optimizer)
        if ranks_fall:
            after = plateau.init(before.scale)._replace(scale=before.scale)
        else:
            value = jnp.asarray(validation_loss, before.best_value.dtype)
            after = plateau.update({}, before, value=value)[1]
        return place(jax.tree.map(lambda new, old: new.astype(old.dtype), after, before))

    return jax.tree.map(look, opt_state, is_leaf=_is_plateau)


def _is_plateau(node: Any) -> bool:
    return isinstance(node, contrib.ReduceLROnPlateauState)


def learning_rate(optimizer: OptimizerConfig, steps_per_epoch: int, step: int, opt_state: Any) -> float:
    """The learning rate of step ``step`` of a training (a round of ``imp``), from 0 on."""
    schedule = _schedule(optimizer, steps_per_epoch)
    rate = float(schedule(step)) if callable(schedule) else schedule
    plateaus = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_plateau) if _is_plateau(node)]
    return rate * float(plateaus[0].scale) if plateaus else rate
