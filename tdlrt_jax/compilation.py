"""How XLA is asked to compile steps: fast where that costs nothing later."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["compiler_options"]

# A step is thousands of small fused kernels on the CPU, and compiling them is what counts: most of its time goes into the matrix
# products and factorizations of libraries, whichever way the kernels around them are compiled.
_ON_CPU: dict[str, bool | int | str] = {
    "xla_backend_optimization_level": 1,
    # The emitters by way of MLIR, which are the default, also keep gigabytes of the host's memory.
    "xla_cpu_use_fusion_emitters": False,
}
# What XLA's CPU backend leaves to a library of kernels (YNNPACK). Convolutions of 32 or 64 filters take one core by it, however
# many there are (jaxlib 0.10, benchmarks/results/cpu); sums stay where they are left to it.
_LEFT_TO_A_LIBRARY, _SUMS = "xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_REDUCE"
_MARK = "ynn_fusion"  # of such a part in a compiled program


def compiler_options(*, runs_once: bool = False, runs_often: bool = False) -> dict[str, bool | int | str]:
    """Options with which programs use a CPU's cores, and steps compile faster and in less memory; none for other devices.

    For ``jax.jit(..., compiler_options=...)``, for ``jitted.lower(...).compile(...)`` and for :func:`tdlrt_jax.tdlrt_step`.
    What that changes is in ``benchmarks/results/cpu``, by ``python -m benchmarks.run --sections compiler``.
    They are options of XLA, not of JAX: those that the installed jaxlib does not know are left out, as are those that
    ``XLA_FLAGS`` sets. Results differ by rounding.

    Args:
      runs_once: for a program that is run once and is over in a moment, such as one that draws a network's first weights: it is
        optimized no further than it must be, which makes it slower and compiles it fastest.
      runs_often: for a program that is run so often that its compilation does not count, such as a trained network's: it is
        optimized as usual.

    Returns:
      Names and values; empty where there is nothing to say, and on anything but a CPU.

    Raises:
      ValueError: if a program runs once and often.

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
    if runs_once and runs_often:
        raise ValueError("runs_once and runs_often are both True: expected at most one of them; leave out the other")
    if jax.default_backend() != "cpu":
        return {}
    given = set(re.findall(r"xla_\w+", os.environ.get("XLA_FLAGS", "")))
    options = _with_convolutions_of_its_own() if runs_often else {**_ON_CPU, **_with_convolutions_of_its_own()}
    if runs_once:
        options["xla_backend_optimization_level"] = 0
    return {name: value for name, value in options.items() if name not in given and _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: bool | int | str) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.cache
def _with_convolutions_of_its_own() -> dict[str, bool | int | str]:
    """That XLA takes convolutions by itself, if it leaves them to a library; sums stay where they are."""
    if not _is_left_to_a_library(_convolution, (1, 8, 8, 32), (3, 3, 32, 32)):
        return {}
    return {_LEFT_TO_A_LIBRARY: _SUMS if _is_left_to_a_library(jnp.sum, (512, 512)) else ""}


def _convolution(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _is_left_to_a_library(function: Callable[..., Array], *shapes: tuple[int, ...]) -> bool:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return _MARK in (jax.jit(function).lower(*arguments).compile().as_text() or "")
