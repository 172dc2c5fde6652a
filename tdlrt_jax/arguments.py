"""Checks of arguments that many functions share; each raises ``ValueError`` with the argument, its value and what is expected."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = [
    "check_array",
    "check_callable",
    "check_concrete",
    "check_dtype",
    "check_input",
    "check_integer",
    "check_integers",
    "check_key",
    "check_mapping",
    "check_number",
    "check_path",
    "check_precision",
    "check_rngs",
    "check_shape",
    "check_transformation",
    "shown",
]


_MODES = {1: "one mode", 2: "two modes"}


def shown(value: Any) -> str:
    """A value for a message: as it is written where that is short, else its shape or its type."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {value.shape}"
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def check_integer(name: str, value: Any, low: int, what: str = "an integer") -> int:
    """An integer that is ``low`` or more; NumPy's too, booleans not."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool | np.bool_) or number < low:
        raise ValueError(f"{name}={shown(value)} must be {what}, {low} or more")
    return number


def check_integers(
    name: str, value: Any, low: int, length: int | None = None, what: str = "integers"
) -> tuple[int, ...]:
    """A sequence of integers that are ``low`` or more, of the given length."""
    entries: Sequence[Any] = ()
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
        entries = tuple(value)
    try:
        numbers = tuple(check_integer(name, entry, low) for entry in entries)
    except ValueError:
        numbers = ()
    if not entries or len(numbers) != len(entries) or length not in (None, len(entries)):
        count = "" if length is None else f"{length} "
        raise ValueError(f"{name}={shown(value)}: expected {count}{what}, {low} or more")
    return numbers


def check_number(name: str, value: Any, what: str) -> float:
    """A real number, not a boolean; NumPy's and concrete arrays' scalars too. Its range is the caller's affair."""
    try:
        if isinstance(value, str | bool | np.bool_):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={shown(value)}: expected {what}") from None


def check_shape(shape: Any, name: str = "shape") -> tuple[int, ...]:
    """The sizes of a Tucker kernel's modes: two or more."""
    sizes = check_integers(name, shape, 1, what="sizes, one a mode")
    if len(sizes) < 2:
        raise ValueError(f"{name}={sizes}: a Tucker kernel has at least two modes, expected (spatial..., in, out)")
    return sizes


def check_array(name: str, value: Any, what: str = "an array", *, modes: int = 0, floating: bool = False) -> Array:
    """An array of so many dimensions at least, floating if asked for."""
    try:
        if value is None:
            raise TypeError
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {shown(value)}: expected {what}") from None
    if array.ndim < modes:
        raise ValueError(f"{name} has shape {array.shape}: expected {what}, with at least {_MODES[modes]}")
    if floating and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {array.dtype}: a Tucker kernel is floating, convert it first")
    return array


def check_callable(name: str, value: Any, signature: str) -> None:
    """Something that can be called."""
    if not callable(value):
        raise ValueError(f"{name}={shown(value)}: expected a function, {signature}")


def check_mapping(name: str, value: Any, what: str) -> None:
    """A mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={shown(value)}: expected a mapping, {what}")


def check_key(name: str, value: Any) -> Array:
    """A random key of JAX, typed or raw."""
    typed = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    raw = hasattr(value, "dtype") and value.dtype == jnp.uint32 and value.ndim >= 1
    if not (typed or raw):
        raise ValueError(f"{name}={shown(value)}: expected a random key, such as jax.random.key(0)")
    return value


def check_dtype(name: str, value: Any) -> Any:
    """A floating dtype."""
    try:
        if value is None:
            raise TypeError
        dtype = jnp.dtype(value)
    except TypeError:
        raise ValueError(f"{name}={shown(value)}: expected a floating dtype, such as jnp.float32") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}={dtype} is not floating: expected a floating dtype, such as jnp.float32")
    return dtype


def check_input(name: str, value: Any, what: str = "an array (batch..., spatial..., channels)") -> Any:
    """A layer's input: what has a shape and a dtype, or plain numbers that become an array."""
    return value if hasattr(value, "shape") and hasattr(value, "dtype") else check_array(name, value, what)


def check_precision(name: str, value: Any) -> None:
    """A precision of a matrix product, as ``jax.lax`` takes it."""
    for part in value if isinstance(value, tuple) else (value,):
        if part is None or isinstance(part, jax.lax.Precision | jax.lax.DotAlgorithm | jax.lax.DotAlgorithmPreset):
            continue
        try:
            if not isinstance(part, str):
                raise ValueError
            part in jax.lax.DotAlgorithmPreset.__members__ or jax.lax.Precision(part)
        except ValueError:
            raise ValueError(
                f"{name}={shown(value)}: expected None, 'default', 'high', 'highest' or a jax.lax.Precision"
            ) from None


def check_rngs(name: str, value: Any) -> None:
    """Random keys of flax.nnx, with a stream for parameters."""
    if not callable(getattr(value, "params", None)):
        raise ValueError(f"{name}={shown(value)}: expected random keys with a stream params, such as flax.nnx.Rngs(0)")


def check_path(name: str, value: Any) -> None:
    """The path of a file or directory."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}={shown(value)}: expected a path, a string or a pathlib.Path")


def check_concrete(name: str, tree: Any) -> None:
    """Arrays with values: what is decided on the host cannot be traced."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"{name} is traced: shapes are decided from values, so call this outside of jit, vmap and grad"
        )


def check_transformation(name: str, value: Any) -> None:
    """Raises ``ValueError`` for anything but an optax transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise ValueError(f"{name}={shown(value)}: expected an optax transformation, such as optax.sgd(0.1)")
