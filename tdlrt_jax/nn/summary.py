"""``summarize``: the walk through a ``flax.nnx`` model that finds its layers and what each of them is given."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from tdlrt_jax.arguments import shown
from tdlrt_jax.conv.geometry import resolve
from tdlrt_jax.conv.transposed import transposed_padding
from tdlrt_jax.nn.layers import TuckerConv, TuckerLinear
from tdlrt_jax.report import (
    Summary,
    is_compressed,
    kernel_shape_of,
    numbers,
    summarize_layer,
    summarize_params,
    total_summary,
)
from tdlrt_jax.tucker import TuckerTensor, is_tucker

__all__ = ["counted_kernel", "geometry_of", "layers_with_kernels", "module_path", "record_inputs", "summarize"]


def summarize(model: Any, example: Any = None, *, device: str | None = None) -> Summary:
    """What a network costs, layer by layer, at the ranks in use: parameters and, given an input, multiply-adds.

    Args:
      model: an ``nnx.Module``; or parameters alone, in any pytree or ``nnx.State``, for which multiply-adds stay
        unknown.
      example: an input ``(batch..., ...)``, an array or a ``jax.ShapeDtypeStruct``, or a tuple of the model's
        positional arguments. Nothing is computed with it: the model is traced, and a layer called several times counts
        every call. (Inside ``nnx.scan`` and ``nnx.vmap`` a dense layer is traced, and counted, once.) The model, its
        statistics and its random counters stay as they are.
      device: for which the plans are chosen, ``"cpu"`` or ``"gpu"``; ``jax.default_backend()`` by default.

    Returns:
      A :class:`tdlrt_jax.report.Summary`: data, ``.to_json()``, ``.table()`` for ``rich``, and text by ``print``.

    Raises:
      ValueError: for an example with parameters alone, and for stacks of Tucker layers (``nnx.vmap``), naming the layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from tdlrt_jax.nn import TuckerConv
      >>> model = TuckerConv(64, 64, (3, 3), rank=8, rngs=nnx.Rngs(0))
      >>> summary = summarize(model, jax.ShapeDtypeStruct((1, 16, 16, 64), jnp.float32))
      >>> summary.layers[0].plan, summary.multiply_adds
      ('factored', Total(stored=409600, dense=9437184))
    """
    if not isinstance(model, nnx.Module):
        if example is not None:
            raise ValueError(
                f"example is given with a {type(model).__name__}: multiply-adds need the nnx.Module itself, which says "
                "how its layers are called; leave example out to count parameters"
            )
        parameters = _parameters_of(model)
        leaves = jax.tree.leaves(parameters)
        if (
            not leaves
            or any(leaf is parameters for leaf in leaves)
            or not all(hasattr(leaf, "dtype") for leaf in leaves)
        ):
            raise ValueError(f"model is {shown(model)}: expected an nnx.Module, or a pytree of parameters")
        return summarize_params(parameters)
    found = layers_with_kernels(model)
    inputs = None if example is None else record_inputs(model, example)
    order = list(found) if inputs is None else [*inputs, *(path for path in found if path not in inputs)]
    layers, counted, kernel_numbers = [], set[int](), 0
    for path in order:
        module = found[path]
        variable = module.kernel
        kernel = counted_kernel(module)
        calls = None if inputs is None else inputs.get(path, [])
        layer = summarize_layer(
            module_path(path),
            layer_kind(module),
            kernel,
            inputs=calls,
            geometry=geometry_of(module),
            plan=getattr(module, "plan", None) if is_tucker(kernel) else None,
            device=device,
            shared=id(variable) in counted,
        )
        if calls and isinstance(module, nnx.LinearGeneral):
            work = _general_work(module, calls)
            layer = layer._replace(multiply_adds=work, dense_multiply_adds=work)
        if id(variable) not in counted:
            kernel_numbers += numbers(kernel)
        counted.add(id(variable))
        layers.append(layer)
    weights = sum(map(numbers, jax.tree.leaves(nnx.state(model, nnx.Param, graph=True), is_leaf=is_compressed)))
    return total_summary(layers, weights - kernel_numbers, with_work=example is not None)


def layers_with_kernels(model: nnx.Module) -> dict[tuple, Any]:
    """All modules of a model with a kernel of two or more modes, by path; a shared module once, at its first path."""
    found = {}
    for path, module in nnx.iter_modules(model, graph=True):
        variable = getattr(module, "kernel", None)
        if isinstance(variable, nnx.Variable):
            kernel = variable.get_value()
            if is_compressed(kernel) or np.ndim(kernel) >= 2:
                found[path] = module
    return found


def module_path(path: tuple) -> str:
    """A module's path as ``blocks/0/conv``; ``"model"`` for the model itself."""
    return "/".join(map(str, path)) or "model"


def layer_kind(module: Any) -> str:
    """One of :data:`tdlrt_jax.report.KINDS`."""
    if hasattr(module, "transpose_kernel"):
        return "transposed convolution"
    if hasattr(module, "kernel_size"):
        return "convolution"
    kernel = module.kernel.get_value()
    order = len(kernel_shape_of(kernel))
    is_linear = isinstance(module, nnx.Linear | TuckerLinear | nnx.LinearGeneral | nnx.Einsum)
    return "linear" if is_linear or order == 2 else "convolution"


def geometry_of(module: Any) -> dict[str, Any] | None:
    """What :func:`tdlrt_jax.conv.count_work` has to know of a layer; ``None`` for one that it cannot count."""
    if isinstance(module, nnx.Linear | TuckerLinear):
        return {}
    if hasattr(module, "transpose_kernel"):
        return transposed_geometry(module)
    if isinstance(module, nnx.Conv | TuckerConv):
        return {
            "strides": module.strides or 1,
            "padding": module.padding,
            "dilation": module.kernel_dilation or 1,
            "groups": module.feature_group_count,
            "input_dilation": module.input_dilation or 1,
        }
    return None


def record_inputs(model: nnx.Module, example: Any) -> dict[tuple, list[tuple[int, ...]]]:
    """The shape of the input of every call of every layer with a kernel, by path, in the order of the first calls.

    Args:
      model: traced as a copy, so that nothing of it changes.
      example: as in :func:`summarize`.
    """
    arguments = example if isinstance(example, tuple) else (example,)
    for leaf in jax.tree.leaves(arguments):
        if not hasattr(leaf, "shape") and not isinstance(leaf, int | float | complex):
            raise ValueError(
                f"example has the part {shown(leaf)}: expected arrays or jax.ShapeDtypeStructs, the model's inputs"
            )
    graphdef, state = nnx.split(model, graph=True)
    calls: dict[tuple, list[tuple[int, ...]]] = {}

    def trace(state: Any, arguments: tuple) -> Any:
        copied = nnx.merge(graphdef, state, copy=True)
        for path, module in layers_with_kernels(copied).items():
            # As its class, since Python looks calls up there and models may ask for isinstance; the class and this
            # attribute survive the splits of flax's own transformations.
            module.__class__ = _recording(module.__class__)
            module._recorder = _Recorder(path, calls)
        return _arrays(copied(*arguments))

    try:
        jax.eval_shape(trace, state, arguments)
    except ValueError as error:
        raise ValueError(f"the model does not take the example that was given: {error}") from error
    return calls


class _Recorder:
    """Notes a call. Compared by identity, so that no compiled function of an earlier walk is taken for this one's."""

    def __init__(self, path: tuple, calls: dict[tuple, list[tuple[int, ...]]]):
        self.path, self.calls = path, calls

    def __call__(self, inputs: Any) -> None:
        self.calls.setdefault(self.path, []).append(tuple(np.shape(inputs)))


@functools.cache  # classes of modules are registered with JAX for good
def _recording(layer_class: type) -> type:
    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._recorder(inputs)
        return layer_class.__call__(self, inputs, *args, **kwargs)

    body = {"__call__": call, "__module__": layer_class.__module__, "__qualname__": layer_class.__qualname__}
    return type(layer_class.__name__, (layer_class,), body)


def _arrays(outputs: Any) -> Any:
    """The arrays among a model's outputs, which may hold anything."""
    return [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]


def transposed_geometry(module: Any) -> dict[str, Any]:
    """A transposed convolution as the convolution of its dilated input; the zeros between its pixels count as work."""
    window = module.kernel_size
    geometry, _ = resolve(window, window, strides=module.strides, dilation=module.kernel_dilation)
    padding = module.padding
    if isinstance(padding, str):
        extent = [(k - 1) * d + 1 for k, d in zip(window, geometry.dilation)]
        padding = [transposed_padding(e, s, padding == "SAME") for e, s in zip(extent, geometry.strides)]
    return {"padding": padding, "dilation": geometry.dilation, "input_dilation": geometry.strides}


def counted_kernel(module: Any) -> Any:
    """A layer's kernel as ``(spatial..., in, out)``, also where a transposed layer stores the channels swapped."""
    kernel = module.kernel.get_value()
    if not getattr(module, "transpose_kernel", False):
        return kernel
    if is_tucker(kernel):
        *spatial, last, first = kernel.factors
        return TuckerTensor(kernel.core.swapaxes(-1, -2), (*spatial, first, last))
    return kernel.swapaxes(-1, -2)


def _general_work(module: nnx.LinearGeneral, calls: list[tuple[int, ...]]) -> int:
    """Multiply-adds of a linear layer over several axes."""
    kernel = module.kernel.get_value()
    features = module.in_features if isinstance(module.in_features, tuple) else (module.in_features,)
    # Batch axes are in the kernel's shape and the input's alike.
    batch = math.prod(module.batch_axis.values()) if module.batch_axis else 1
    rows = sum(math.prod(shape) // math.prod(features) // batch for shape in calls)
    return rows * math.prod(kernel.shape)


def _parameters_of(tree: Any) -> Any:
    """The parameters of a state of Variables; other pytrees as they are."""
    if isinstance(tree, nnx.State):
        leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
        if leaves and all(isinstance(leaf, nnx.Variable) for leaf in leaves):
            return nnx.filter_state(tree, nnx.Param)
    return tree
