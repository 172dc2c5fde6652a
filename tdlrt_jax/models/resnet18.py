"""ResNet18 for images of 32x32 pixels: a 3x3 stem and eight basic blocks, 11.2 million weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tdlrt_jax.arguments import check_integer, check_rngs
from tdlrt_jax.models.width import scaled
from tdlrt_jax.nn.normalization import conv_batch_norm

__all__ = ["BasicBlock", "ResNet18"]

# (filters, stride) of the blocks.
BLOCKS = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))


class BasicBlock(nnx.Module):
    """Two convolutions of 3x3 with batch normalization, added to their input.

    Args:
      in_features, out_features: channels. Where they differ, or the stride is not 1, the input passes a strided convolution
        of 1x1 with batch normalization.
      stride: of the first convolution.
      conv: makes the convolutions, called as ``nnx.Conv`` is.
      norm: makes the normalizations, called as ``nnx.BatchNorm`` is.
      rngs: random keys.

    Source: He et al. (2016), section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int = 1,
        *,
        conv: Callable[..., Any] = nnx.Conv,
        norm: Callable[..., Any] = nnx.BatchNorm,
        rngs: nnx.Rngs,
    ):
        check_rngs("rngs", rngs)
        check_integer("stride", stride, 1)
        strides = (stride, stride)
        window: dict[str, Any] = {"kernel_size": (3, 3), "padding": 1, "use_bias": False, "rngs": rngs}
        self.conv1 = conv(in_features, out_features, strides=strides, **window)
        self.norm1 = norm(out_features, rngs=rngs)
        self.conv2 = conv(out_features, out_features, **window)
        self.norm2 = norm(out_features, rngs=rngs)
        self.has_shortcut = stride != 1 or in_features != out_features
        if self.has_shortcut:
            self.shortcut = conv(
                in_features, out_features, kernel_size=(1, 1), strides=strides, padding=0, use_bias=False, rngs=rngs
            )
            self.shortcut_norm = norm(out_features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``(batch, height, width, in)`` to ``(batch, height / stride, width / stride, out)``."""
        y = jax.nn.relu(conv_batch_norm(self.conv1, self.norm1, x))
        y = conv_batch_norm(self.conv2, self.norm2, y)
        return jax.nn.relu(y + (conv_batch_norm(self.shortcut, self.shortcut_norm, x) if self.has_shortcut else x))


class ResNet18(nnx.Module):
    """A 3x3 convolution, eight basic blocks of 64 to 512 filters, global average pooling, a linear classifier.

    The stem of the original, a strided 7x7 convolution and a pooling made for 224x224 pixels, is a 3x3 convolution without
    stride here, as is usual for small images. 11,159,232 of the weights are those of the 20 convolutions.

    Args:
      num_classes: outputs.
      input_channels: channels of the images.
      input_shape: height and width of the images; any are possible.
      width: factor of all numbers of filters.
      conv: makes the convolutions, the shortcuts' of 1x1 included, called as ``nnx.Conv`` is.
      classifier: makes the last layer, called as ``nnx.Linear`` is.
      norm: makes the normalizations, called as ``nnx.BatchNorm`` is.
      rngs: random keys.

    Raises:
      ValueError: for a width that is not positive.

    Example:
      >>> from flax import nnx
      >>> model = nnx.eval_shape(lambda: ResNet18(width=0.5, rngs=nnx.Rngs(0)))
      >>> model.blocks[2].shortcut.kernel.shape
      (1, 1, 32, 64)

    Source: paper, section 4.1. Layer sizes: He et al. (2016), with the stem of their networks for 32x32 pixels.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        input_channels: int = 3,
        input_shape: tuple[int, int] = (32, 32),
        width: float = 1.0,
        conv: Callable[..., Any] = nnx.Conv,
        classifier: Callable[..., Any] = nnx.Linear,
        norm: Callable[..., Any] = nnx.BatchNorm,
        rngs: nnx.Rngs,
    ):
        check_rngs("rngs", rngs)
        check_integer("num_classes", num_classes, 1, "a number of outputs")
        del input_shape  # global pooling takes any
        channels = scaled(BLOCKS[0][0], width)
        self.stem = conv(input_channels, channels, kernel_size=(3, 3), padding=1, use_bias=False, rngs=rngs)
        self.stem_norm = norm(channels, rngs=rngs)
        blocks = []
        for filters, stride in BLOCKS:
            filters = scaled(filters, width)
            blocks.append(BasicBlock(channels, filters, stride, conv=conv, norm=norm, rngs=rngs))
            channels = filters
        self.blocks = nnx.List(blocks)
        self.classifier = classifier(channels, num_classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``(batch, height, width, channels)`` to logits ``(batch, num_classes)``."""
        x = jax.nn.relu(conv_batch_norm(self.stem, self.stem_norm, x))
        for block in self.blocks:
            x = block(x)
        return self.classifier(jnp.mean(x, axis=(-3, -2)))
