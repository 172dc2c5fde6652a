"""LeNet5 as in the robustness experiment (section 4.3): 430,500 weights on MNIST."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array

from tdlrt_jax.arguments import check_integer, check_rngs
from tdlrt_jax.models.pooling import max_pool

__all__ = ["LeNet5"]


class LeNet5(nnx.Module):
    """Two convolutions of 20 and 50 filters of 5x5 with ReLU and 2x2 max pooling, 500 hidden units, and a classifier.

    Args:
      num_classes: outputs.
      input_channels: channels of the images.
      input_shape: height and width of the images, at least 16 each.
      conv: makes the convolutions, called as ``nnx.Conv`` is; ``functools.partial(nn.TuckerConv, rank=0.5)`` for Tucker
        kernels.
      linear: makes the hidden layer, called as ``nnx.Linear`` is. The paper leaves it dense.
      classifier: makes the last layer, in the same way.
      rngs: random keys.

    Raises:
      ValueError: for images too small for two convolutions and two poolings.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = LeNet5(rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 28, 28, 1))).shape
      (2, 10)

    Source: section 4.3. The layer sizes are those of the matrix DLRT experiments of Schotthöfer et al. (2022), whose
    count of 430,500 weights for 28x28x1 images is without biases.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        input_channels: int = 1,
        input_shape: tuple[int, int] = (28, 28),
        conv: Callable[..., Any] = nnx.Conv,
        linear: Callable[..., Any] = nnx.Linear,
        classifier: Callable[..., Any] = nnx.Linear,
        rngs: nnx.Rngs,
    ):
        check_rngs("rngs", rngs)
        check_integer("num_classes", num_classes, 1, "a number of outputs")
        height, width = (((size - 4) // 2 - 4) // 2 for size in input_shape)
        if height < 1 or width < 1:
            raise ValueError(
                f"input_shape={tuple(input_shape)} is too small for LeNet5: expected 16 pixels or more a side"
            )
        self.conv1 = conv(input_channels, 20, kernel_size=(5, 5), padding="VALID", rngs=rngs)
        self.conv2 = conv(20, 50, kernel_size=(5, 5), padding="VALID", rngs=rngs)
        self.hidden = linear(50 * height * width, 500, rngs=rngs)
        self.classifier = classifier(500, num_classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """``(batch, height, width, channels)`` to logits ``(batch, num_classes)``."""
        x = max_pool(jax.nn.relu(self.conv1(x)))
        x = max_pool(jax.nn.relu(self.conv2(x)))
        x = jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.classifier(x)
