"""The parts of a training step: of the whole network by a profile, and of every layer taken alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from benchmarks.cells import Cell, Options
from benchmarks.networks import Network, build
from benchmarks.steps import networks
from benchmarks.timing import in_turn, spread

__all__ = ["cells"]

PROFILED = ("dense", "factorized", "factorized_at_rank", "parallel", "bug")


def cells(options: Options) -> list[Cell]:
    """Two cells a model, at its first compression: ``profile`` and ``layers``."""
    found: dict[str, Network] = {}
    for network in networks(options):
        found.setdefault(network.model, network)
    return [
        Cell(f"{network.key} {name}", partial(measure, options, network))
        for network in found.values()
        for name, measure in (("profile", _profile), ("layers", _layers))
    ]


def _profile(options: Options, network: Network, say: Callable[[str], None]) -> dict[str, Any]:
    from benchmarks.methods import TrainingStep
    from benchmarks.profiling import profile

    results = {}
    for method in PROFILED:
        if method not in options.methods:
            continue
        say(f"compiling {method}")
        step = TrainingStep(network, method)
        say(f"profiling {method}")
        seconds = in_turn({method: step.run}, rounds=options.rounds)[method]
        results[method] = {"seconds": spread(seconds), **profile(step.run, step.compiled)}
    return {"network": network._asdict(), "methods": results}


class _Layer(NamedTuple):
    """A convolution of the network, as far as its cost is concerned."""

    shape: tuple[int, ...]
    rank: tuple[int, ...]
    whole: tuple[bool, ...]
    strides: Any
    padding: Any
    x: tuple[int, ...]


def _layers(options: Options, network: Network, say: Callable[[str], None]) -> dict[str, Any]:
    import jax

    import tdlrt_jax
    from tdlrt_jax.conv import choose_plan
    from tdlrt_jax.nn.summary import layers_with_kernels, module_path, record_inputs

    model = build(network, "tucker")
    inputs = record_inputs(model, jax.ShapeDtypeStruct(network.image, "float32"))
    measured: dict[_Layer, dict[str, Any]] = {}
    rows = []
    for path, module in layers_with_kernels(model).items():
        kernel = module.kernel.get_value()
        if not isinstance(kernel, tdlrt_jax.TuckerTensor):
            continue
        layer = _Layer(
            tdlrt_jax.kernel_shape(kernel),
            tuple(kernel.core.shape),
            tuple(factor is None for factor in kernel.factors),
            _hashable(module.strides),
            _hashable(module.padding),
            inputs[path][0],
        )
        if layer not in measured:
            say(f"layer {module_path(path)}")
            programs = _programs(layer, kernel)
            seconds = in_turn(programs, rounds=options.rounds)
            measured[layer] = {part: spread(values) for part, values in seconds.items()}
        rank = [None if whole else size for size, whole in zip(layer.rank, layer.whole)]
        options_of = {"strides": layer.strides, "padding": layer.padding}
        rows.append(
            {
                "layer": module_path(path),
                "shape": layer.shape,
                "rank": rank,
                "input": layer.x,
                "plan": choose_plan(layer.shape, rank, layer.x, **options_of),
                "seconds": measured[layer],
            }
        )
    return {"network": network._asdict(), "layers": rows}


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _programs(layer: _Layer, kernel: Any) -> dict[str, Callable[[], None]]:
    """Forward and backward pass of the dense and the Tucker layer, and everything that ``bug`` does with its gradients."""
    import jax
    import jax.numpy as jnp
    import optax

    import tdlrt_jax
    from benchmarks.methods import TOLERANCE

    x = jax.random.normal(jax.random.key(0), layer.x)
    apply = partial(tdlrt_jax.tucker_conv, strides=layer.strides, padding=layer.padding)
    y = apply(x, kernel)
    weights = jax.random.normal(jax.random.key(1), y.shape)
    needs_input_gradient = layer.x[-1] > 3

    def loss_fn(kernel: Any, x: Any) -> Any:
        return jnp.vdot(apply(x, kernel), weights)

    def forward_backward(kernel: Any, x: Any) -> Any:
        def both(pair: Any) -> Any:
            return loss_fn(pair["kernel"], pair["x"])

        if needs_input_gradient:
            return tdlrt_jax.value_and_grad(both)({"kernel": kernel, "x": x})[1]
        return tdlrt_jax.value_and_grad(loss_fn)(kernel, x)[1]

    tx = tdlrt_jax.tdlrt(optax.sgd(1e-3, momentum=0.9), tolerance=TOLERANCE, integrator="parallel")
    state = jax.jit(tx.init)(kernel)
    dense = jax.jit(tdlrt_jax.to_dense)(kernel)
    grads = jax.jit(tdlrt_jax.value_and_grad(loss_fn))(kernel, x)[1]
    programs: dict[str, Callable[[], Any]] = {
        "dense forward and backward": partial(jax.jit(forward_backward), dense, x),
        "Tucker forward and backward": partial(jax.jit(forward_backward), kernel, x),
        "orthonormalization": partial(jax.jit(tdlrt_jax.lift), kernel),
        "augmentation, truncation, transport, optimizer": partial(jax.jit(tx.update), grads, state, kernel),
    }
    return {name: partial(_run, program) for name, program in programs.items()}


def _run(program: Callable[[], Any]) -> None:
    import jax

    jax.block_until_ready(program())
