"""VGG16 for images of 32x32 pixels: thirteen convolutions of 3x3 with batch normalization, 14,710,464 weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tdlrt_jax.arguments import check_integer, check_rngs
from tdlrt_jax.models.hidden import check_rate, hidden_layers
from tdlrt_jax.models.pooling import max_pool
from tdlrt_jax.models.width import scaled
from tdlrt_jax.nn.normalization import conv_batch_norm

__all__ = ["VGG16"]

# Filters of the convolutions of each stage; a pooling ends a stage (configuration D).
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nnx.Module):
    """Five stages of 3x3 convolutions, batch normalization and ReLU, each ended by 2x2 max pooling; one linear classifier.

    The hidden linear layers of the original, made for images of 224x224 pixels, are left out unless asked for, as is usual for
    small images: after five poolings of 32x32 pixels one pixel of 512 channels is left.

    Args:
      num_classes: outputs.
      input_channels: channels of the images.
      input_shape: height and width of the images, at least 32 each; what is left after the poolings is averaged.
      width: factor of all numbers of filters; ``0.25`` gives 16 to 128.
      hidden: units of linear layers with ReLU before the classifier, ``(4096, 4096)`` in the original.
      dropout: rate after each of those, or before the classifier where there are none; the original has 0.5.
      conv: makes the convolutions, called as ``nnx.Conv`` is; ``functools.partial(nn.TuckerConv, rank=0.25)`` for Tucker
        kernels.
      linear: makes the hidden layers, called as ``nnx.Linear`` is.
      classifier: makes the last layer, called as ``nnx.Linear`` is.
      norm: makes the normalizations, called as ``nnx.BatchNorm`` is.
      rngs: random keys.

    Raises:
      ValueError: for images that five poolings leave nothing of, a width or units that are not positive, or a rate out of
        [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.eval_shape(lambda: VGG16(width=0.25, rngs=nnx.Rngs(0)))
      >>> len(model.convs), model.convs[-1].kernel.shape
      (13, (3, 3, 128, 128))

    Source: paper, section 4.1. Layer sizes: Simonyan and Zisserman (2015), configuration D.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        input_channels: int = 3,
        input_shape: tuple[int, int] = (32, 32),
        width: float = 1.0,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        conv: Callable[..., Any] = nnx.Conv,
        linear: Callable[..., Any] = nnx.Linear,
        classifier: Callable[..., Any] = nnx.Linear,
        norm: Callable[..., Any] = nnx.BatchNorm,
        rngs: nnx.Rngs,
    ):
        check_rngs("rngs", rngs)
        check_integer("num_classes", num_classes, 1, "a number of outputs")
        smallest = 2 ** len(STAGES)
        if min(input_shape) < smallest:
            raise ValueError(
                f"input_shape={tuple(input_shape)} is too small for VGG16: expected {smallest} pixels or more"
            )
        channels, convs, norms = input_channels, [], []
        for filters in (filters for stage in STAGES for filters in stage):
            filters = scaled(filters, width)
            convs.append(conv(channels, filters, kernel_size=(3, 3), padding="SAME", use_bias=False, rngs=rngs))
            norms.append(norm(filters, rngs=rngs))
            channels = filters
        self.convs = nnx.List(convs)
        self.norms = nnx.List(norms)
        self.hidden, features = hidden_layers(channels, hidden, linear, rngs)
        self.classifier = classifier(features, num_classes, rngs=rngs)
        # Without dropout the network has no random state.
        self.dropout = nnx.Dropout(check_rate("dropout", dropout), rngs=rngs if dropout else None)

    def __call__(self, x: Array) -> Array:
        """``(batch, height, width, channels)`` to logits ``(batch, num_classes)``."""
        layers = iter(zip(self.convs, self.norms))
        for stage in STAGES:
            for _ in stage:
                conv, norm = next(layers)
                x = jax.nn.relu(conv_batch_norm(conv, norm, x))
            x = max_pool(x)
        x = jnp.mean(x, axis=(-3, -2))
        for layer in self.hidden:
            x = self.dropout(jax.nn.relu(layer(x)))
        return self.classifier(x if self.hidden else self.dropout(x))
