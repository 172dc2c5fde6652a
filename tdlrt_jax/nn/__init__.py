"""Layers and training for ``flax.nnx``; the only room of the package that knows flax."""

from tdlrt_jax.nn import linen
from tdlrt_jax.nn.convert import densify, tuckerize
from tdlrt_jax.nn.formats import CPConv, MatrixConv
from tdlrt_jax.nn.layers import TuckerConv, TuckerLinear
from tdlrt_jax.nn.normalization import conv_batch_norm
from tdlrt_jax.nn.optimizer import purify, resize, tdlrt
from tdlrt_jax.nn.plain import to_plain
from tdlrt_jax.nn.summary import summarize
from tdlrt_jax.nn.training import tdlrt_step, value_and_grad, value_and_grad_fn, value_and_two_grads
from tdlrt_jax.nn.transposed import TuckerConvTranspose

__all__ = [
    "CPConv",
    "MatrixConv",
    "TuckerConv",
    "TuckerConvTranspose",
    "TuckerLinear",
    "conv_batch_norm",
    "densify",
    "linen",
    "purify",
    "resize",
    "summarize",
    "tdlrt",
    "tdlrt_step",
    "to_plain",
    "tuckerize",
    "value_and_grad",
    "value_and_grad_fn",
    "value_and_two_grads",
]
