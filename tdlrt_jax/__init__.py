"""Rank-adaptive training of convolutional networks in Tucker format (TDLRT), in JAX."""

from tdlrt_jax.averaging import average
from tdlrt_jax.budget import Budget
from tdlrt_jax.capacity import array_bytes, canonicalize, fit_capacity, full_kernels, resize
from tdlrt_jax.compilation import compiler_options
from tdlrt_jax.conv import tucker_conv, tucker_linear
from tdlrt_jax.frame import Frame, lift, value_and_grad
from tdlrt_jax.galerkin import value_and_two_grads
from tdlrt_jax.optimizer import TdlrtState, tdlrt
from tdlrt_jax.paths import kernel_paths
from tdlrt_jax.ranks import RankPolicy
from tdlrt_jax.status import describe_status
from tdlrt_jax.step import StepInfo, tdlrt_step
from tdlrt_jax.truncation import hosvd
from tdlrt_jax.tucker import (
    TuckerTensor,
    active_rank,
    kernel_shape,
    parameter_count,
    to_dense,
)

__all__ = [
    "Budget",
    "Frame",
    "RankPolicy",
    "StepInfo",
    "TdlrtState",
    "TuckerTensor",
    "active_rank",
    "array_bytes",
    "average",
    "canonicalize",
    "compiler_options",
    "densify",
    "describe_status",
    "fit_capacity",
    "full_kernels",
    "hosvd",
    "kernel_paths",
    "kernel_shape",
    "lift",
    "parameter_count",
    "resize",
    "summarize",
    "tdlrt",
    "tdlrt_step",
    "to_dense",
    "to_plain",
    "tucker_conv",
    "tucker_linear",
    "tuckerize",
    "value_and_grad",
    "value_and_two_grads",
]
__version__ = "0.1.0"

# Those that need flax, which the core does not import.
_LAZY = {
    "densify": "tdlrt_jax.nn.convert",
    "summarize": "tdlrt_jax.nn.summary",
    "to_plain": "tdlrt_jax.nn.plain",
    "tuckerize": "tdlrt_jax.nn.convert",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
