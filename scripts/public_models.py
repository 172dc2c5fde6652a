"""Converts a model that this project did not write, and measures what comes of it: outputs, ranks, training, and the way back.

The model is named on the command line, linen or nnx, and nothing in it is changed::

    python scripts/public_models.py --path examples/imagenet --setup "from models import ResNet18" \\
        --model "ResNet18(num_classes=10)" --axis-name batch --eval '{"train": false}' --train '{"train": true}' \\
        --inputs '[[8, 32, 32, 3]]' --source "google/flax, examples/imagenet" --out result.json

It is initialized at random and gets random inputs: the numbers are about the conversion, not about accuracy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import tdlrt_jax
import tdlrt_jax.nn
from tdlrt_jax import TuckerTensor
from tdlrt_jax.nn.linen import apply, densify_params, tuckerize_params


class Subject(NamedTuple):
    """A model of either kind, behind the few operations that are measured."""

    outputs: Callable[[], Any]  # in evaluation mode, on the inputs
    convert: Callable[[dict], Subject]  # by rules
    densify: Callable[[], Subject]
    train: Callable[[], tuple[Subject, list]]  # some steps -> the trained model and the steps' StepInfo
    params: Any  # without Variables


def main() -> None:
    """Measures one model and writes the numbers as JSON."""
    options = parse()
    sys.path[:0] = options.path
    namespace: dict[str, Any] = {"rngs": nnx.Rngs(options.seed), "jnp": jnp, "jax": jax, "nnx": nnx}
    exec(options.setup, namespace)
    model = eval(options.model, namespace)
    keys = jax.random.split(jax.random.key(options.seed), len(options.inputs))
    inputs = [jax.random.normal(key, shape) for key, shape in zip(keys, options.inputs)]
    subject = (linen_subject if isinstance(model, linen.Module) else nnx_subject)(model, inputs, options)

    start = time.perf_counter()

    def log(what: str) -> None:
        print(f"{time.perf_counter() - start:7.1f} s  {what}", file=sys.stderr, flush=True)

    expected = subject.outputs()
    log("outputs of the original")
    full = subject.convert({**dict.fromkeys(options.dense, "dense"), ".*": None})
    started = time.perf_counter()
    low = subject.convert({**dict.fromkeys(options.dense, "dense"), ".*": options.rule})
    seconds = time.perf_counter() - started
    log("converted at full rank and at low rank")
    trained, infos = low.train()
    log("trained")
    result = {
        "source": options.source,
        "setup": options.setup,
        "model": options.model,
        "kind": "linen" if isinstance(model, linen.Module) else "nnx",
        "inputs": options.inputs,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "tdlrt_jax")},
        "device": jax.devices()[0].device_kind,
        "parameters": numbers(subject.params),
        "tucker_kernels": len(tdlrt_jax.kernel_paths(full.params)),
        "full_rank": {
            "deviation": deviation(full.outputs(), expected),
            "deviation_after_densify": deviation(full.densify().outputs(), expected),
            "same_tree_after_densify": bool(structure(full.densify().params) == structure(subject.params)),
        },
        "low_rank": {
            "rule": options.rule,
            "conversion_seconds": round(seconds, 2),
            "parameters": numbers(low.params),
            "compression_percent": round(100 * (1 - numbers(low.params) / numbers(subject.params)), 2),
            "deviation": deviation(low.outputs(), expected),
            "ranks": ranks(low.params),
        },
        "training": {
            "integrator": options.integrator,
            "tolerance": options.tolerance,
            "learning_rate": options.learning_rate,
            "losses": [float(info.loss) for info in infos],
            "status": [tdlrt_jax.describe_status(info.status) for info in infos],
            "ranks": ranks(trained.params),
            "deviation_of_densified": deviation(trained.densify().outputs(), trained.outputs()),
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("setup", "inputs")}, indent=1))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", required=True, help="statements that import what the model needs")
    parser.add_argument("--model", required=True, help="an expression for the model; nnx models find rngs in scope")
    parser.add_argument("--path", action="append", default=[], help="a folder to import from; may be repeated")
    parser.add_argument("--inputs", type=json.loads, required=True, help="the shapes of the model's arguments, as JSON")
    parser.add_argument("--source", required=True, help="where the model comes from: package and version, or commit")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--dense", action="append", default=[], help="pattern of layers to leave dense; may be repeated"
    )
    parser.add_argument("--rule", type=json.loads, default=0.25, help="what the other layers get, as JSON")
    parser.add_argument("--eval", type=json.loads, default={}, help="a linen model's keyword arguments in evaluation")
    parser.add_argument("--train", type=json.loads, default={}, help="and in training")
    parser.add_argument("--axis-name", help="an axis that a linen model takes means over in training")
    parser.add_argument("--integrator", default="bug")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def transformation(tdlrt: Callable[..., Any], options: argparse.Namespace) -> optax.GradientTransformationExtraArgs:
    """The optimizer of all models."""
    inner = optax.sgd(options.learning_rate, momentum=0.9)
    return tdlrt(inner, tolerance=options.tolerance, integrator=options.integrator)


def task(outputs: Array) -> Array:
    """Cross-entropy with fixed labels for logits, the distance to fixed noise for anything else."""
    if outputs.ndim == 2:
        labels = jnp.arange(outputs.shape[0]) % outputs.shape[1]
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()
    return jnp.mean((outputs - 0.5 * jax.random.normal(jax.random.key(99), outputs.shape)) ** 2)


def linen_subject(model: linen.Module, inputs: list[Array], options: argparse.Namespace) -> Subject:
    """A linen model, initialized at random."""
    variables = jax.jit(lambda *x: model.init(jax.random.key(options.seed), *x, **options.eval))(*inputs)
    state, params = {name: value for name, value in variables.items() if name != "params"}, variables["params"]

    def loss_fn(params: Any, state: Any, *inputs: Array) -> tuple[Array, Any]:
        def run(*inputs: Array) -> Any:
            return apply(model, {"params": params, **state}, *inputs, **options.train, mutable=list(state))

        if options.axis_name is None:
            outputs, state_after = run(*inputs)
        else:  # one group of examples; the statistics over the axis are the same for all
            run = jax.vmap(run, axis_name=options.axis_name, out_axes=(0, None))
            outputs, state_after = run(*(x[None] for x in inputs))
            outputs = outputs[0]
        return task(outputs), state_after

    def subject(params: Any, state: Any) -> Subject:
        def train() -> tuple[Subject, list]:
            tx = transformation(tdlrt_jax.tdlrt, options)
            step = tdlrt_jax.tdlrt_step(loss_fn, tx, has_state=True, donate=False)
            now, opt_state, model_state, infos = params, tx.init(params), state, []
            for _ in range(options.steps):
                now, opt_state, model_state, info = step(now, opt_state, model_state, *inputs)
                infos.append(jax.block_until_ready(info))
            return subject(now, model_state), infos

        run = jax.jit(lambda params, state, *x: apply(model, {"params": params, **state}, *x, **options.eval))
        return Subject(
            outputs=lambda: run(params, state, *inputs),
            convert=lambda rules: subject(tuckerize_params(params, rules), state),
            densify=lambda: subject(densify_params(params), state),
            train=train,
            params=params,
        )

    return subject(params, state)


def nnx_subject(model: nnx.Module, inputs: list[Array], options: argparse.Namespace) -> Subject:
    """An nnx model as its factory made it."""

    def train() -> tuple[Subject, list]:
        trained = nnx.clone(model)
        trained.train()
        tx = transformation(tdlrt_jax.nn.tdlrt, options)
        optimizer = nnx.Optimizer(trained, tx, wrt=nnx.Param)
        step = tdlrt_jax.nn.tdlrt_step(lambda model, *x: task(model(*x)))
        infos = [step(trained, optimizer, *inputs) for _ in range(options.steps)]
        return nnx_subject(trained, inputs, options), infos

    def outputs() -> Any:
        frozen = nnx.clone(model)
        frozen.eval()
        return nnx.jit(lambda model, *x: model(*x))(frozen, *inputs)

    return Subject(
        outputs=outputs,
        convert=lambda rules: nnx_subject(tdlrt_jax.nn.tuckerize(model, rules), inputs, options),
        densify=lambda: nnx_subject(tdlrt_jax.nn.densify(model), inputs, options),
        train=train,
        params=nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    )


def deviation(found: Any, expected: Any) -> float:
    """The largest difference of outputs, relative to the largest of the expected ones."""
    difference = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), found, expected)
    largest = jax.tree.map(lambda b: jnp.max(jnp.abs(b)), expected)
    return float(max(jax.tree.leaves(difference)) / max(jax.tree.leaves(largest)))


def numbers(params: Any) -> int:
    """How many numbers the parameters are at the active ranks."""
    kernels = tdlrt_jax.kernel_paths(params)
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, TuckerTensor))
    dense = sum(leaf.size for leaf in leaves if not isinstance(leaf, TuckerTensor))
    return dense + sum(
        math.prod(rank) + sum(u.shape[0] * r for u, r in zip(kernel.factors, rank) if u is not None)
        for kernel, rank in ((kernel, tdlrt_jax.active_rank(kernel).tolist()) for kernel in kernels.values())
    )


def structure(params: Any) -> Any:
    """The tree without its leaves."""
    return jax.tree.structure(params)


def ranks(params: Any) -> dict[str, list[int]]:
    """The active ranks by path."""
    return {path: tdlrt_jax.active_rank(kernel).tolist() for path, kernel in tdlrt_jax.kernel_paths(params).items()}


if __name__ == "__main__":
    main()
