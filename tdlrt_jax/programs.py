"""What a program that was read from a file may call: arithmetic, and what JAX itself calls for it.

StableHLO is data, and XLA compiles it: it computes, it does not open files or run Python. The exceptions are custom calls, which
name a function of the process by a string. ``jax.export`` refuses to *write* targets that it does not guarantee to be stable, but
reads any, such as one that calls a Python function by an index. So they are looked at before a program runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax.export
from jax.extend.mlir import deserialize_portable_artifact
from jax.interpreters import mlir

__all__ = ["called_targets", "check_program"]

# Calls within the program that are no functions of the process: placement, checked shapes, what StableHLO lacks.
_ANNOTATIONS = frozenset(
    (
        *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement", "shape_assertion"),
        *("stablehlo.dynamic_reduce_window", "stablehlo.dynamic_rng_bit_generator", "stablehlo.dynamic_top_k"),
        *("ApproxTopK", "stablehlo.dynamic_approx_top_k", "mhlo.topk", "AllocateBuffer"),
        *("Eigh", "Qr", "LuDecomposition", "ProductOfElementaryHouseholderReflectors"),  # of TPUs
    )
)
# Linear algebra and random numbers, by their names in jaxlib; none of them takes code or addresses from the program.
_KERNELS = re.compile(
    r"(lapack|cusolver|hipsolver|cublas|hipblas|cusparse|hipsparse)_[a-z0-9_]+_ffi|(cu|hip)_threefry2x32_ffi"
)
# What exchanges data with the host or other programs.
_EXCHANGES = ("stablehlo.infeed", "stablehlo.outfeed", "stablehlo.send", "stablehlo.recv")


def called_targets(exported: jax.export.Exported) -> set[str]:
    """The functions of the process that a program names, and its exchanges with the host.

    Raises:
      ValueError: for a program that cannot be read.
    """
    with mlir.make_ir_context():
        module = deserialize_portable_artifact(bytes(exported.mlir_module_serialized))
        targets = set()
        for operation in _operations(module.operation):
            if operation.name in _EXCHANGES:
                targets.add(operation.name)
            elif "call_target_name" in operation.attributes:
                targets.add(operation.attributes["call_target_name"].value)
            elif operation.name.split(".")[0] not in _DIALECTS:
                targets.add(operation.name)
    return targets


# Operations that are read, compiled or left out as they are; an operation of another dialect could stand for anything.
_DIALECTS = ("builtin", "func", "stablehlo", "chlo", "vhlo", "sdy", "shape", "arith", "tensor")


def _operations(operation: Any) -> Iterator[Any]:
    """An operation and all within it; a list of what is open, since a file decides how deep they are nested."""
    open_ones = [operation]
    while open_ones:
        present = open_ones.pop()
        yield present
        for region in present.regions:
            for block in region:
                open_ones += [inner.operation for inner in block]


def check_program(exported: jax.export.Exported, where: str) -> None:
    """Raises ``ValueError`` for a program that calls what it should not, naming it, or that cannot be read.

    Args:
      exported: as ``jax.export.deserialize`` gives it; nothing of it has run.
      where: the file, for the message.
    """
    try:
        targets = called_targets(exported)
    except Exception as error:
        raise ValueError(
            f"{where} holds a program that cannot be read ({type(error).__name__}: {str(error)[:300]}): export the model again"
        ) from error
    refused = sorted(target for target in targets if target not in _ANNOTATIONS and not _KERNELS.fullmatch(target))
    if refused:
        raise ValueError(
            f"{where} holds a program that calls {', '.join(map(repr, refused))}: a network needs none of these functions of the "
            "process, and through some of them a file could run code. It was not run; ask whoever wrote the file what it is "
            "for, or export the model again without callbacks and kernels of your own"
        )
