"""Where a compiled program spends its time, by the scopes that the library names and by operation."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["PARTS", "part_of", "profile"]

# The parts of a step, by the innermost scope named in an operation's path.
PARTS = {
    "tdlrt.lift": "orthonormalization",
    "tdlrt.augment": "augmentation",
    "tdlrt.second_gradient": "second gradient",
    "tdlrt.truncate": "truncation",
    "tdlrt.transport": "transport",
    "tdlrt.optimizer": "optimizer",
}
_CONTAINERS = ("while", "call", "conditional")


def part_of(operation: str, kind: str = "") -> str:
    """The part of a step that an operation belongs to, by its path in the program.

    XLA's CPU backend rewrites convolutions that are gradients of kernels and forgets where they are from: these are a part of
    their own, the second gradient's of ``bug`` among them.

    Example:
      >>> part_of("jit(f)/tdlrt.truncate/while/body/eigh"), part_of("jit(f)/transpose(jvp())/dot_general")
      ('truncation', 'backward')
      >>> part_of("jit(f)/jvp()/conv_general_dilated"), part_of("jit(f)/add")
      ('forward', 'rest')
    """
    scopes = re.findall(r"tdlrt\.[a-z_]+", operation)
    if scopes:
        return PARTS.get(scopes[-1], "rest")
    if "transpose(jvp" in operation:
        return "backward"
    if "jvp(" in operation:
        return "forward"
    return "kernels' gradients" if kind == "convolution" else "rest"


def profile(run: Callable[[], Any], compiled: Any, *, steps: int = 3) -> dict[str, Any]:
    """Times the operations of ``steps`` runs with JAX's profiler.

    Operations run on several threads or streams at a time, so their sum can be larger than the time of a step.

    Args:
      run: runs the program once and waits for it.
      compiled: the compiled program, whose text names the operations.
      steps: how many runs are averaged.

    Returns:
      ``{"milliseconds", "parts": {part: milliseconds}, "kinds": {kind: milliseconds}, "operations": [{"part", "kind", "shape",
      "milliseconds"}, ...]}`` of one run; the operations are the twenty longest.
    """
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(steps):
                run()
        (trace,) = Path(directory).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
        spent: collections.Counter[str] = collections.Counter()
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    name = dict(event.stats).get("hlo_op", event.name)
                    spent[str(name)] += event.duration_ns
    instructions = _instructions(compiled.as_text())
    parts: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    operations: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for name, nanoseconds in spent.items():
        if name in instructions:
            operation, kind, shape = instructions[name]
            if kind not in _CONTAINERS:  # what they contain is listed too
                part = part_of(operation, kind)
                parts[part] += nanoseconds
                kinds[kind] += nanoseconds
                operations[part, kind, shape] += nanoseconds
    scale = 1e-6 / steps
    return {
        "milliseconds": sum(parts.values()) * scale,
        "parts": {part: value * scale for part, value in parts.most_common()},
        "kinds": {kind: value * scale for kind, value in kinds.most_common(12)},
        "operations": [
            {"part": part, "kind": kind, "shape": shape, "milliseconds": value * scale}
            for (part, kind, shape), value in operations.most_common(20)
        ],
    }


def _instructions(text: str) -> dict[str, tuple[str, str, str]]:
    """Every instruction of a compiled program: its path in the source, what it does, the shape of its result."""
    bodies: dict[str, str] = {}
    for match in re.finditer(r"^%?([\w.\-]+) \(.*?^}", text, re.M | re.S):
        bodies[match.group(1)] = match.group(0)
    found = {}
    for match in re.finditer(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", text, re.M):
        name, shape, kind, rest = match.groups()
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        body = bodies.get(called.group(1), "") if called else ""
        if kind == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', rest)
            kind = target.group(1) if target else kind
        elif " convolution(" in body:
            kind = "convolution"
        elif " dot(" in body:
            kind = "dot"
        elif kind == "fusion":
            kind = "elementwise" if " reduce(" not in body else "reduction"
        operation = re.search(r'op_name="([^"]*)"', rest)
        found[name] = (operation.group(1) if operation else "", kind, shape)
    return found
