"""The hidden linear layers with which networks made for large images end, and their dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from tdlrt_jax.arguments import check_integers, check_number

__all__ = ["check_rate", "hidden_layers"]


def hidden_layers(
    features: int, hidden: Sequence[int], linear: Callable[..., Any], rngs: nnx.Rngs
) -> tuple[nnx.List, int]:
    """Linear layers one after the other, and the features that the last of them gives: without any, those there are.

    Args:
      features: what the first is given.
      hidden: units of each.
      linear: makes them, called as ``nnx.Linear`` is.
      rngs: random keys.

    Raises:
      ValueError: for units that are not positive.

    Example:
      >>> layers, features = hidden_layers(8, (5, 6), nnx.Linear, nnx.Rngs(0))
      >>> [layer.kernel.shape for layer in layers], features
      ([(8, 5), (5, 6)], 6)
    """
    layers: list[Any] = []
    none = isinstance(hidden, Sequence) and len(hidden) == 0
    for units in () if none else check_integers("hidden", hidden, 1, what="units of hidden layers"):
        layers.append(linear(features, units, rngs=rngs))
        features = units
    return nnx.List(layers), features


def check_rate(name: str, rate: float) -> float:
    """A rate of dropout, in [0, 1).

    Example:
      >>> check_rate("dropout", 0.5)
      0.5
    """
    value = check_number(name, rate, "a rate in [0, 1)")
    if not 0 <= value < 1:
        raise ValueError(f"{name}={rate}: expected a rate in [0, 1)")
    return value
