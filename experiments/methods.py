"""The methods that are compared, rows of the paper's Table 1: what each is made of.

All of them train through one entry point, :mod:`experiments.train`. They differ in the layer that a convolution is, in whether
its kernel is moved by an integrator or by plain gradients, and in what is pruned.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["METHODS", "Method"]


class Method(NamedTuple):
    """What a method is made of."""

    title: str  # as in Table 1
    layer: Literal["dense", "tucker", "matrix", "cp"] = "dense"
    adaptive: bool = (
        False  # moved by an integrator of Algorithm 1, which adapts the ranks; otherwise by plain gradients
    )
    pruning: Literal["snip", "grasp", "imp"] | None = None


METHODS = {
    "dense": Method("Baseline"),
    "tdlrt": Method("TDLRT", "tucker", adaptive=True),
    "matrix_dlrt": Method("Matrix DLRT", "matrix", adaptive=True),
    "tucker": Method("Tucker-factorized", "tucker"),
    "matrix": Method("Matrix-factorized", "matrix"),  # without a core
    "cp": Method("CP-factorized", "cp"),
    "snip": Method("SNIP", pruning="snip"),
    "grasp": Method("GraSP", pruning="grasp"),
    "imp": Method("IMP", pruning="imp"),
}
