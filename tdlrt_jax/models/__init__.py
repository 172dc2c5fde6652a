"""The networks of the paper's experiments; each takes its layers as arguments."""

from tdlrt_jax.models.lenet5 import LeNet5

__all__ = ["LeNet5"]
