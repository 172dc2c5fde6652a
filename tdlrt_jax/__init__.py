"""Rank-adaptive training of convolutional networks in Tucker format (TDLRT), in JAX."""

from tdlrt_jax.averaging import average
from tdlrt_jax.capacity import canonicalize, fit_capacity, resize
from tdlrt_jax.conv import tucker_conv, tucker_linear
from tdlrt_jax.frame import Frame, lift, value_and_grad
from tdlrt_jax.optimizer import TdlrtState, tdlrt
from tdlrt_jax.paths import kernel_paths
from tdlrt_jax.status import describe_status
from tdlrt_jax.step import StepInfo, tdlrt_step
from tdlrt_jax.truncation import RankPolicy, hosvd
from tdlrt_jax.tucker import (
    TuckerTensor,
    active_rank,
    kernel_shape,
    parameter_count,
    to_dense,
)

__all__ = [
    "Frame",
    "RankPolicy",
    "StepInfo",
    "TdlrtState",
    "TuckerTensor",
    "active_rank",
    "average",
    "canonicalize",
    "describe_status",
    "fit_capacity",
    "hosvd",
    "kernel_paths",
    "kernel_shape",
    "lift",
    "parameter_count",
    "resize",
    "tdlrt",
    "tdlrt_step",
    "to_dense",
    "tucker_conv",
    "tucker_linear",
    "value_and_grad",
]
__version__ = "0.1.0"
