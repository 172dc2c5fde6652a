"""The networks that are measured, and the ranks that give them a stated compression."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import tdlrt_jax
from tdlrt_jax import models
from tdlrt_jax.conv import conv_general_dilated
from tdlrt_jax.nn import TuckerConv
from tdlrt_jax.ranks import max_capacity

__all__ = [
    "CLASSES",
    "MODELS",
    "Network",
    "build",
    "compression_of",
    "creating",
    "fraction_for",
    "images",
    "kernels",
    "loss_of",
    "rank_of",
]

MODELS: dict[str, Callable[..., nnx.Module]] = {
    "vgg16": models.VGG16,
    "alexnet": models.AlexNet,
    "resnet18": models.ResNet18,
}
CLASSES = 10
MULTIPLE = 8  # array sizes as tdlrt_jax.fit_capacity makes them


class Network(NamedTuple):
    """A network for images of 32x32 pixels, by what decides its cost."""

    model: str
    width: float = 1.0  # factor of all numbers of filters
    batch: int = 128
    compression: float = 0.95  # of the convolutions' weights, at least
    spatial: str = "tucker"  # "tucker": the spatial modes have factors, at full rank; "whole": they have none

    @property
    def key(self) -> str:
        """A name for files and tables."""
        width = "" if self.width == 1 else f"-width{self.width:g}"
        spatial = "" if self.spatial == "tucker" else "-whole"
        return f"{self.model}{width}-batch{self.batch}-{100 * self.compression:g}%{spatial}"

    @property
    def image(self) -> tuple[int, int, int, int]:
        """The shape of a batch of images."""
        return (self.batch, 32, 32, 3)


def rank_of(
    window: Sequence[int], channels: int, filters: int, fraction: float, spatial: str
) -> tuple[int | None, ...]:
    """Ranks of a fraction of the channels, in multiples of :data:`MULTIPLE` where they are that large.

    Example:
      >>> rank_of((3, 3), 3, 256, 0.13, "whole")
      (None, None, 1, 9)
    """

    def of(n: int) -> int:
        wanted = fraction * n
        rounded = round(wanted) if wanted < MULTIPLE else MULTIPLE * round(wanted / MULTIPLE)
        return min(n, max(1, rounded))

    shape = (*window, channels, filters)
    sizes = max_capacity(shape, (*window, of(channels), of(filters)))
    return (*[None if spatial == "whole" else size for size in sizes[:-2]], *sizes[-2:])


def tucker_conv(
    fraction: float, spatial: str, channels: int, filters: int, kernel_size: Sequence[int], **options: Any
) -> TuckerConv:
    """A layer with the ranks of :func:`rank_of`, called as ``nnx.Conv`` is."""
    return TuckerConv(
        channels, filters, kernel_size, rank=rank_of(kernel_size, channels, filters, fraction, spatial), **options
    )


class OrdinaryNorm(nnx.BatchNorm):
    """Normalizes what the layer before gives; :func:`tdlrt_jax.nn.conv_batch_norm` leaves subclasses to themselves."""


def creating(network: Network, method: str, *, seed: int = 0) -> Callable[[], nnx.Module]:
    """What creates a network: ``method`` is ``"dense"``, ``"dense_xla"``, ``"tucker"`` or ``"tucker_ordinary"``.

    ``"dense"`` has the remedy for XLA's slow convolutions of small images that Tucker layers have, ``"dense_xla"`` is flax as
    it comes; ``"tucker_ordinary"`` normalizes after its layers and not at their ranks.
    """
    layers: dict[str, Any] = {"width": network.width}
    if method == "dense":
        layers["conv"] = functools.partial(nnx.Conv, conv_general_dilated=conv_general_dilated)
    elif method in ("tucker", "tucker_ordinary"):
        layers["conv"] = functools.partial(tucker_conv, fraction_for(network), network.spatial)
        if method == "tucker_ordinary":
            layers["norm"] = OrdinaryNorm
    elif method != "dense_xla":
        raise ValueError(f'method={method!r} is unknown: expected "dense", "dense_xla", "tucker" or "tucker_ordinary"')
    return lambda: MODELS[network.model](num_classes=CLASSES, rngs=nnx.Rngs(seed), **layers)


@functools.lru_cache(maxsize=4)
def build(network: Network, method: str, *, seed: int = 0) -> nnx.Module:
    """A fresh network of :func:`creating` in training mode.

    Jitted as a whole: drawing the kernels operation by operation would compile each of them. The last few are kept
    (nothing here changes them in place).
    """
    create = creating(network, method, seed=seed)
    model = jax.jit(create, compiler_options=tdlrt_jax.compiler_options(runs_once=True))()
    model.train()
    return model


def kernels(network: Network, fraction: float) -> dict[str, tdlrt_jax.TuckerTensor]:
    """The shapes of the network's Tucker kernels by path, nothing computed."""

    def make() -> nnx.Module:
        conv = functools.partial(tucker_conv, fraction, network.spatial)
        return MODELS[network.model](num_classes=CLASSES, rngs=nnx.Rngs(0), width=network.width, conv=conv)

    return tdlrt_jax.kernel_paths(nnx.as_pure(nnx.state(nnx.eval_shape(make), nnx.Param)))


def compression_of(network: Network, fraction: float) -> float:
    """``1 - c / f`` of the convolutions at a rank fraction (paper, section 4.1), counted at the arrays' sizes."""
    tuckers = kernels(network, fraction).values()
    full = sum(math.prod(tdlrt_jax.kernel_shape(kernel)) for kernel in tuckers)
    return 1 - sum(leaf.size for kernel in tuckers for leaf in jax.tree.leaves(kernel)) / full


@functools.cache
def fraction_for(network: Network) -> float:
    """The largest rank fraction, to a thousandth, at which the network has its compression or more.

    Raises:
      ValueError: where not even rank one has it.
    """
    low, high = 0, 1000
    if compression_of(network, 0.001) < network.compression:
        raise ValueError(
            f"compression={network.compression} cannot be reached by {network.model} at width {network.width}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if compression_of(network, middle / 1000) >= network.compression else (low, middle)
    return low / 1000


def loss_of(graphdef: Any) -> Callable[..., Any]:
    """``loss_fn(params, model_state, images, labels) -> (loss, new_model_state)`` of a network taken apart."""

    def loss_fn(params: Any, model_state: Any, images: Array, labels: Array) -> tuple[Array, Any]:
        network = nnx.merge(graphdef, params, model_state, copy=True)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(network(images), labels))
        parts: Any = nnx.split(network, nnx.Param, ...)
        return loss, nnx.as_pure(parts[2])

    return loss_fn


def images(network: Network, seed: int = 1) -> tuple[Array, Array]:
    """A batch of random images and labels: times do not depend on what is seen."""
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], network.image), jax.random.randint(keys[1], (network.batch,), 0, CLASSES)
