"""Training ``flax.nnx`` models with Tucker kernels: gradients of Theorem 1, and ``tdlrt`` for ``nnx.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import tdlrt_jax.frame
import tdlrt_jax.optimizer
from tdlrt_jax import status as flags
from tdlrt_jax.frame import is_kernel
from tdlrt_jax.step import StepInfo, step_info

__all__ = ["tdlrt", "tdlrt_step", "value_and_grad", "value_and_grad_fn"]
