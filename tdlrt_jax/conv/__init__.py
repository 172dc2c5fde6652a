"""Convolution by a Tucker kernel: contraction plans, counted work, and the one-pass gradients of Theorem 1."""

from tdlrt_jax.conv.apply import tucker_conv, tucker_conv_batch_norm, tucker_linear
from tdlrt_jax.conv.convolution import conv_general_dilated
from tdlrt_jax.conv.plans import PLANS, Work, choose_plan, count_work, forward_plan
from tdlrt_jax.conv.transposed import tucker_conv_transpose

__all__ = [
    "PLANS",
    "Work",
    "choose_plan",
    "conv_general_dilated",
    "count_work",
    "forward_plan",
    "tucker_conv",
    "tucker_conv_batch_norm",
    "tucker_conv_transpose",
    "tucker_linear",
]
