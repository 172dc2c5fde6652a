"""Compares ONNX exports, run by onnxruntime on the CPU, with JAX; run by ``scripts/onnx_check``."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import logging
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnxruntime
from flax import nnx

from tdlrt_jax.export import to_onnx
from tdlrt_jax.models import VGG16, LeNet5, ResNet18
from tdlrt_jax.nn import TuckerConv, TuckerLinear
from tdlrt_jax.nn.transposed import TuckerConvTranspose

onnxruntime.set_default_logger_severity(3)  # errors alone: it warns of every shape that it merges
logging.getLogger("onnx_ir").setLevel(logging.ERROR)
ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5
PACKAGES = ("tdlrt_jax", "jax", "flax", "jax2onnx", "onnx", "onnxruntime", "numpy")


def conv(
    window: tuple[int, ...], rank: Any = 3, *, out: int = 6, kind: Any = TuckerConv, **options: Any
) -> Callable[[], Any]:
    """Makes a layer from 8 channels."""
    return lambda: kind(8, out, window, rank=rank, rngs=nnx.Rngs(0), **options)


def lenet5() -> Any:
    """A LeNet5 with all layers but the last in Tucker format."""
    convolution, linear = functools.partial(TuckerConv, rank=6), functools.partial(TuckerLinear, rank=8)
    return LeNet5(conv=convolution, linear=linear, rngs=nnx.Rngs(0))


def narrow(network: Any) -> Callable[[], Any]:
    """Makes a network of an eighth of its channels, its convolutions in Tucker format."""
    return lambda: network(width=1 / 8, conv=functools.partial(TuckerConv, rank=4), rngs=nnx.Rngs(0))


class Net(nnx.Module):
    """A convolution, BatchNorm, Dropout and a linear layer."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv, self.norm = TuckerConv(8, 6, (3, 3), rank=3, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.dropout, self.linear = nnx.Dropout(0.5, rngs=rngs), TuckerLinear(6, 5, rank=3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Logits of images."""
        return self.linear(self.dropout(nnx.relu(self.norm(self.conv(x)))).mean((1, 2)))


transposed = functools.partial(conv, kind=TuckerConvTranspose)
# Name: what to export, and the input's shape behind the batch.
CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "LeNet5": (lenet5, (28, 28, 1)),
    "VGG16, an eighth as wide": (narrow(VGG16), (32, 32, 3)),
    "ResNet18, an eighth as wide": (narrow(ResNet18), (32, 32, 3)),
    "BatchNorm and Dropout": (Net, (9, 8, 8)),
    "linear": (lambda: TuckerLinear(8, 6, rank=3, rngs=nnx.Rngs(0)), (8,)),
    "1-D": (conv((3,)), (9, 8)),
    "1-D causal": (conv((3,), padding="CAUSAL"), (9, 8)),
    "2-D": (conv((3, 2)), (9, 8, 8)),
    "2-D strided": (conv((3, 3), strides=2, padding="VALID"), (9, 8, 8)),
    "2-D dilated": (conv((3, 3), kernel_dilation=2), (9, 8, 8)),
    "2-D grouped": (conv((3, 3), feature_group_count=2), (9, 8, 8)),
    "2-D depthwise": (conv((3, 3), (3, 3, 1, 3), feature_group_count=8, out=16), (9, 8, 8)),
    "2-D asymmetric padding": (conv((3, 3), padding=((0, 2), (1, 0))), (9, 8, 8)),
    "2-D circular": (conv((3, 3), padding="CIRCULAR"), (9, 8, 8)),
    "2-D reflect": (conv((3, 3), padding="REFLECT"), (9, 8, 8)),
    "2-D whole modes": (conv((3, 3), (None, None, 3, 3)), (9, 8, 8)),
    "2-D pointwise": (conv((1, 1), strides=2), (9, 8, 8)),
    "3-D": (conv((2, 3, 2), strides=(1, 2, 1)), (5, 6, 4, 8)),
    "2-D transposed": (transposed((3, 3), strides=2), (5, 4, 8)),
    "2-D transposed valid": (transposed((3, 2), strides=2, padding="VALID"), (5, 4, 8)),
    "2-D transposed circular": (transposed((3, 3), strides=2, padding="CIRCULAR"), (5, 4, 8)),
}


def check(model: Any, image: tuple[int, ...], plan: str, directory: Path) -> dict[str, Any]:
    """The relative deviation for a batch of three, or what went wrong."""
    if isinstance(model, nnx.Module):
        model.eval()
    x = jax.random.normal(jax.random.key(0), (3, *image))
    try:
        path = to_onnx(model, x[:1], directory / "model.onnx", plan=plan)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    except Exception as error:
        # jax2onnx and onnxruntime raise what they please; the first line says what they do not support.
        first = str(error).replace(f"{directory}/", "").splitlines()[0]
        return {"supported": False, "error": f"{type(error).__name__}: {first[:300]}"}
    expected = np.asarray(model(x), np.float64)
    if found.shape != expected.shape:
        return {"supported": False, "error": f"the shape is {found.shape}, not {expected.shape}"}
    return {"supported": True, "deviation": float(np.linalg.norm(found - expected) / np.linalg.norm(expected))}


def main() -> int:
    """Checks all cases in both forms; 1 if a supported one deviates by more than the tolerance, or LeNet5 is not one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "experiments" / "results" / "onnx_check.json")
    output: Path = parser.parse_args().output
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, (make, image) in CASES.items():
            results[name] = {plan: check(make(), image, plan, Path(directory)) for plan in ("factored", "dense")}
            print(f"{name:30}" + "  ".join(f"{plan}: {_text(found)}" for plan, found in results[name].items()))
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    content = {"versions": versions, "provider": "CPUExecutionProvider", "tolerance": TOLERANCE, "cases": results}
    output.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written to {output.name}")
    every = [(name, found) for name, plans in results.items() for found in plans.values()]
    failed = [name for name, found in every if found.get("deviation", 0) > TOLERANCE]
    failed += [name for name, found in every if not found["supported"] and name == "LeNet5"]
    if failed:
        print(f"failed: {', '.join(sorted(set(failed)))}", file=sys.stderr)
    return 1 if failed else 0


def _text(found: dict[str, Any]) -> str:
    return f"{found['deviation']:.1e}" if found["supported"] else found["error"]


if __name__ == "__main__":
    sys.exit(main())
