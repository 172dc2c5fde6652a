"""What is exact about a compiled program: its convolutions, its matrix products, and their work."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

__all__ = ["Counts", "count"]


class Counts(NamedTuple):
    """Operations of a compiled program, those inside of loops counted once."""

    convolutions: int
    convolution_multiply_adds: int
    products: int
    product_multiply_adds: int


def count(text: str) -> Counts:
    """Counts the convolutions and matrix products in the text of a compiled program (``compiled.as_text()``).

    A convolution's multiply-adds are those of all positions of its window, padding included.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compiled = jax.jit(jnp.matmul).lower(jnp.ones((2, 3)), jnp.ones((3, 4))).compile()
      >>> count(compiled.as_text()).product_multiply_adds
      24
    """
    convolutions = products = convolution_work = product_work = 0
    for body in re.finditer(r"^(?:ENTRY )?%?[\w.\-]+ \(.*?^}", text, re.M | re.S):
        shapes: dict[str, list[int]] = {}
        for line in body.group(0).splitlines():
            found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]\S* ([\w\-]+)\(([^)]*)\)(.*)", line)
            if not found:
                continue
            name, shape, kind, operands, rest = found.groups()
            shapes[name] = [int(n) for n in shape.split(",") if n]
            if kind == "convolution":
                convolutions += 1
                convolution_work += (
                    math.prod(shapes[name]) * _window(rest) * _contracted_channels(operands, rest, shapes)
                )
            elif kind == "dot":
                products += 1
                (dimensions,) = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
                lhs = shapes[_operands(operands)[0]]
                product_work += math.prod(shapes[name]) * math.prod(lhs[int(d)] for d in dimensions.split(",") if d)
    return Counts(convolutions, convolution_work, products, product_work)


def _operands(text: str) -> list[str]:
    return [part.split()[-1].lstrip("%") for part in text.split(",")]


def _window(rest: str) -> int:
    size = re.search(r"window=\{[^}]*size=([\dx]+)", rest)
    return math.prod(map(int, size.group(1).split("x"))) if size else 1


def _contracted_channels(operands: str, rest: str, shapes: dict[str, list[int]]) -> int:
    """The kernel's input channels, of one group."""
    (labels,) = re.findall(r"dim_labels=\w+_(\w+)->", rest)
    return shapes[_operands(operands)[1]][labels.index("i")]
