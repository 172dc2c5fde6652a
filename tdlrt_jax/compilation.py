"""How XLA is asked to compile steps: fast where that costs nothing later."""

from __future__ import annotations

import functools
import os
import re

import jax

__all__ = ["compiler_options"]

# A step is thousands of small fused kernels on the CPU, and compiling them is what counts: most of its time goes into the matrix
# products and factorizations of libraries, whichever way the kernels around them are compiled.
_ON_CPU: dict[str, bool | int] = {
    "xla_backend_optimization_level": 1,
    # The emitters by way of MLIR, which are the default, also keep gigabytes of the host's memory.
    "xla_cpu_use_fusion_emitters": False,
}


def compiler_options(*, runs_once: bool = False) -> dict[str, bool | int]:
    """Options with which steps compile faster on a CPU, in a fraction of the memory; none for other devices.

    For ``jax.jit(..., compiler_options=...)``, for ``jitted.lower(...).compile(...)`` and for :func:`tdlrt_jax.tdlrt_step`.
    Compiling takes about half the time for AlexNet and half to nine tenths for VGG16; their steps take up to 4% longer (medians
    in ``benchmarks/results/cpu``, by ``python -m benchmarks.run --sections compiler``) and differ by rounding. They are options
    of XLA, not of JAX: those that the installed jaxlib does not know are left out, as are those that ``XLA_FLAGS`` sets.

    Args:
      runs_once: for a program that is run once and is over in a moment, such as one that draws a network's first weights: it is
        optimized no further than it must be, which makes it slower and compiles it fastest.

    Returns:
      Names and values; empty where there is nothing to say, and on anything but a CPU.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> double = jax.jit(lambda x: 2 * x, compiler_options=tdlrt_jax.compiler_options())
      >>> double(jnp.ones(2)).tolist()
      [2.0, 2.0]
      >>> from flax import nnx
      >>> from tdlrt_jax.models import LeNet5
      >>> create = lambda: LeNet5(num_classes=10, rngs=nnx.Rngs(0))
      >>> model = jax.jit(create, compiler_options=tdlrt_jax.compiler_options(runs_once=True))()
    """
    if jax.default_backend() != "cpu":
        return {}
    given = set(re.findall(r"xla_\w+", os.environ.get("XLA_FLAGS", "")))
    options = {**_ON_CPU, "xla_backend_optimization_level": 0} if runs_once else _ON_CPU
    return {name: value for name, value in options.items() if name not in given and _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: bool | int) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
