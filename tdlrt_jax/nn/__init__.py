"""Layers and training for ``flax.nnx``; the only room of the package that knows flax."""

from tdlrt_jax.nn.layers import TuckerConv, TuckerLinear
from tdlrt_jax.nn.training import tdlrt, tdlrt_step, value_and_grad, value_and_grad_fn

__all__ = ["TuckerConv", "TuckerLinear", "tdlrt", "tdlrt_step", "value_and_grad", "value_and_grad_fn"]
