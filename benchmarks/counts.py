"""What is exact about a compiled program: its convolutions and matrix products with their work, and what a GPU has to launch."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

__all__ = ["Counts", "Launches", "computations", "count", "launches"]


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


class Launches(NamedTuple):
    """What a GPU's host hands to it in one run of a program."""

    always: int  # kernels and library calls, those of loops as often as the loops are known to run
    library: int  # of these, calls of cuBLAS, cuDNN and cuSOLVER
    waits: int  # loops and conditions whose outcome the host has to ask the GPU for, at the least
    in_loops: int  # kernels and library calls within those, for one round; not among the others


# What nothing is launched for: names, views, and what waits for something else.
_NOTHING = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "copy-done",
        "async-done",
        "partition-id",
        "replica-id",
    ]
)


def launches(text: str) -> Launches:
    """Counts what the text of a program compiled for a GPU (``compiled.as_text()``) launches.

    A bound from above: XLA may hand over a sequence of kernels as one graph, whose kernels take less time each.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> wait = lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x + 1, x)
      >>> launches(jax.jit(wait).lower(jnp.ones(2)).compile().as_text()).waits
      1
    """
    bodies, entry = computations(text)

    @functools.cache
    def total(name: str) -> Launches:
        found = Launches(0, 0, 0, 0)
        for line in bodies[name]:
            instruction = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
            kind, rest = instruction.groups() if instruction else ("", "")
            if not kind or kind in _NOTHING:
                continue
            inner = [total(called) for called in _called(kind, rest)]
            times = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            if kind in ("while", "conditional") and not times:
                rare = sum(part.always + part.in_loops for part in inner)
                found = found._replace(waits=found.waits + 1, in_loops=found.in_loops + rare)
            elif inner:
                rounds = int(times.group(1)) if times else 1
                found = Launches(*(a + rounds * sum(parts) for a, parts in zip(found, zip(*inner))))
            else:
                library = (kind == "custom-call" and "__cub" in rest) or "__cudnn" in rest or "cusolver" in rest
                found = found._replace(always=found.always + 1, library=found.library + library)
        return found

    return total(entry)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation of a compiled program's text, by its name, and which is the program's own."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            name = head.group(2)
            bodies[name] = []
            entry = name if head.group(1) else entry
        elif name and "=" in line:
            bodies[name].append(line)
    return bodies, entry


def _called(kind: str, rest: str) -> list[str]:
    """The computations that an instruction runs with launches of their own."""
    attributes = {
        "while": r"body=%?([\w.\-]+)",
        "call": r"to_apply=%?([\w.\-]+)",
        "async-start": r"calls=%?([\w.\-]+)",
        "conditional": r"(?:true_computation=|false_computation=)%?([\w.\-]+)",
    }
    names = re.findall(attributes[kind], rest) if kind in attributes else []
    branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
    return names + ([name.strip().lstrip("%") for name in branches.group(1).split(",")] if branches else [])


def _operands(text: str) -> list[str]:
    return [part.split()[-1].lstrip("%") for part in text.split(",")]


def _window(rest: str) -> int:
    size = re.search(r"window=\{[^}]*size=([\dx]+)", rest)
    return math.prod(map(int, size.group(1).split("x"))) if size else 1


def _contracted_channels(operands: str, rest: str, shapes: dict[str, list[int]]) -> int:
    """The kernel's input channels, of one group."""
    (labels,) = re.findall(r"dim_labels=\w+_(\w+)->", rest)
    return shapes[_operands(operands)[1]][labels.index("i")]
