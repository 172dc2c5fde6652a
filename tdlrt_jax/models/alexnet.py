"""AlexNet for images of 32x32 pixels: five convolutions, 2,468,544 weights, 16.8% of VGG16's (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax import Array

from tdlrt_jax.arguments import check_integer, check_integers, check_rngs
from tdlrt_jax.models.hidden import check_rate, hidden_layers
from tdlrt_jax.models.pooling import max_pool
from tdlrt_jax.models.width import scaled
from tdlrt_jax.nn.normalization import conv_batch_norm

__all__ = ["AlexNet"]

# (filters, stride, whether a pooling follows); the one-tower stack.
LAYERS = ((64, 2, True), (192, 1, True), (384, 1, False), (256, 1, False), (256, 1, True))
WINDOWS = (11, 5, 3, 3, 3)
_DOWNSAMPLING = 16


class AlexNet(nnx.Module):
    """Convolutions of 11x11, 5x5 and three of 3x3 with batch normalization and ReLU, three poolings, a linear classifier.

    The convolutions are those of the one-tower network. Fitted to small images: the first stride is 2 instead of 4 and the
    poolings are 2x2 without overlap, so that 32x32 pixels become 16, 8 (pooled), 4 (pooled) and 2 (pooled); and the two hidden
    linear layers of 4096 units, made for 224x224 pixels, are left out unless asked for. The paper's statement that AlexNet has
    16.8% of VGG16's parameters is exactly the ratio of the convolutions' weights.

    Args:
      num_classes: outputs.
      input_channels: channels of the images.
      input_shape: height and width of the images, multiples of 16 for nothing to be cut off.
      width: factor of all numbers of filters.
      windows: odd sides of the five convolutions' windows. ``(3, 3, 3, 3, 3)`` suits 32x32 pixels better, of which 11x11 are
        a third: 2,250,432 weights.
      hidden: units of linear layers with ReLU before the classifier, ``(4096, 4096)`` in the original.
      dropout: rate before each of those, or before the classifier where there are none; the original has 0.5.
      conv: makes the convolutions, called as ``nnx.Conv`` is.
      linear: makes the hidden layers, called as ``nnx.Linear`` is.
      classifier: makes the last layer, called as ``nnx.Linear`` is.
      norm: makes the normalizations, called as ``nnx.BatchNorm`` is; ``None`` for none, as in the original, and biases in
        their place.
      rngs: random keys.

    Raises:
      ValueError: for images smaller than 16 pixels a side, a width or units that are not positive, windows that are not five
        odd numbers, or a rate out of [0, 1).

    Example:
      >>> from flax import nnx
      >>> model = nnx.eval_shape(lambda: AlexNet(rngs=nnx.Rngs(0)))
      >>> [conv.kernel.shape for conv in model.convs][:2]
      [(11, 11, 3, 64), (5, 5, 64, 192)]

    Source: paper, section 4.1. Layer sizes: Krizhevsky (2014), the one-tower network.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        input_channels: int = 3,
        input_shape: tuple[int, int] = (32, 32),
        width: float = 1.0,
        windows: Sequence[int] = WINDOWS,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        conv: Callable[..., Any] = nnx.Conv,
        linear: Callable[..., Any] = nnx.Linear,
        classifier: Callable[..., Any] = nnx.Linear,
        norm: Callable[..., Any] | None = nnx.BatchNorm,
        rngs: nnx.Rngs,
    ):
        check_rngs("rngs", rngs)
        check_integer("num_classes", num_classes, 1, "a number of outputs")
        if min(input_shape) < _DOWNSAMPLING:
            raise ValueError(
                f"input_shape={tuple(input_shape)} is too small for AlexNet: expected {_DOWNSAMPLING} pixels or more"
            )
        channels, convs, norms = input_channels, [], []
        for (filters, stride, _), window in zip(LAYERS, _check_windows(windows)):
            filters = scaled(filters, width)
            convs.append(
                conv(
                    channels,
                    filters,
                    kernel_size=(window, window),
                    strides=(stride, stride),
                    padding=window // 2,
                    use_bias=norm is None,
                    rngs=rngs,
                )
            )
            norms.append(norm(filters, rngs=rngs) if norm is not None else _identity)
            channels = filters
        self.convs = nnx.List(convs)
        self.norms = nnx.List(norms)
        self.dropout = nnx.Dropout(check_rate("dropout", dropout), rngs=rngs)
        pixels = (input_shape[0] + 1) // 2 // 8 * ((input_shape[1] + 1) // 2 // 8)
        self.hidden, features = hidden_layers(channels * pixels, hidden, linear, rngs)
        self.classifier = classifier(features, num_classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``(batch, height, width, channels)`` to logits ``(batch, num_classes)``."""
        for (_, _, pooled), conv, norm in zip(LAYERS, self.convs, self.norms):
            x = jax.nn.relu(conv_batch_norm(conv, norm, x))
            x = max_pool(x) if pooled else x
        x = x.reshape(x.shape[0], -1)
        for layer in self.hidden:
            x = jax.nn.relu(layer(self.dropout(x)))
        return self.classifier(x if self.hidden else self.dropout(x))


def _check_windows(windows: Sequence[int]) -> Sequence[int]:
    what = f"odd sides of windows, such as {WINDOWS}"
    sides = check_integers("windows", windows, 1, len(LAYERS), what)
    if any(side % 2 == 0 for side in sides):
        raise ValueError(f"windows={sides}: expected {len(LAYERS)} {what}")
    return sides


def _identity(x: Array) -> Array:
    return x
