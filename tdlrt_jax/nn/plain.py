"""``to_plain``: a trained model as one of plain flax layers, for inference without this package.

A Tucker layer is at most three plain layers in a row: ``1x1`` in -> r_in, the core (its spatial factors merged) at the
ranks in use, ``1x1`` r_out -> out. A channel mode that is whole, or cheaper merged, drops its layer; with both merged
one dense layer is left. Groups: the first and the last layer are grouped with ``U_in`` and the rows of ``U_out`` of
each group, and the middle one repeats the core for each group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from tdlrt_jax.conv import conv_general_dilated
from tdlrt_jax.conv.plans import check_plan, forward_plan, streamed_modes
from tdlrt_jax.frame import Frame
from tdlrt_jax.nn.layers import TuckerConv, TuckerLinear, padding_of_flax
from tdlrt_jax.nn.modules import replace_modules
from tdlrt_jax.nn.summary import counted_kernel, geometry_of, module_path, record_inputs
from tdlrt_jax.nn.transposed import TuckerConvTranspose
from tdlrt_jax.report import check_not_stacked, factored_rank
from tdlrt_jax.tucker import TuckerTensor

__all__ = ["check_inference", "check_parameters", "inference_function", "to_plain"]

_LAYERS = (TuckerConv, TuckerConvTranspose, TuckerLinear)


def to_plain(model: Any, example: Any = None, *, plan: str | None = None, device: str | None = None) -> Any:
    """A new model in which plain flax layers stand for the Tucker layers; it computes the same to rounding.

    Each becomes one ``nnx.Conv``, ``nnx.ConvTranspose`` or ``nnx.Linear``, or an ``nnx.Sequential`` of two or three,
    with arrays cut to the ranks in use: whichever form has the cheapest forward pass for the example. Everything else,
    BatchNorm statistics included, is copied. A kernel with a mask is always merged, since it has no low rank.

    Args:
      model: an ``nnx.Module``. It stays as it is.
      example: an input ``(batch..., ...)``, an array or a ``jax.ShapeDtypeStruct``, or a tuple of the model's
        positional arguments; only shapes matter. It may be left out with a ``plan``.
      plan: ``"factored"`` (three layers each), ``"dense"`` (one), ``"merge_in"`` or ``"merge_out"`` (two) for all
        layers, instead of the cheapest.
      device: for which the cheapest is chosen, ``"cpu"`` or ``"gpu"``; ``jax.default_backend()`` by default.

    Returns:
      The new model, of the model's class; a layer where the model is a single Tucker layer.

    Raises:
      ValueError: for an unknown plan, no example and no plan, a model in the midst of training (an optimizer or lifted
        kernels inside), weights that are not finite, stacks of Tucker layers (``nnx.vmap``), or a subclass of a Tucker layer
        with a call of its own; the message names the layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from tdlrt_jax.nn import TuckerConv
      >>> layer = TuckerConv(64, 64, (3, 3), strides=2, rank=16, rngs=nnx.Rngs(0))
      >>> plain = to_plain(layer, jax.ShapeDtypeStruct((1, 16, 16, 64), jnp.float32))
      >>> [stage.kernel.shape for stage in plain.layers]
      [(1, 1, 64, 16), (3, 3, 16, 16), (1, 1, 16, 64)]
    """
    check_plan(plan, or_none=True)
    check_parameters(model)
    copied = nnx.clone(model, graph=True)
    found = {path: module for path, module in nnx.iter_modules(copied, graph=True) if isinstance(module, _LAYERS)}
    for path, module in found.items():
        if not any(type(module).__call__ is known.__call__ for known in _LAYERS):
            raise ValueError(
                f"layer {module_path(path)!r} is a {type(module).__name__}, which has a __call__ of its own: what it "
                "computes cannot be known; write its plain form by hand"
            )
        check_not_stacked(module_path(path), module.kernel.get_value())
    if found and plan is None and example is None:
        raise ValueError(
            "example is needed to choose the cheapest form of every layer: give an input (a jax.ShapeDtypeStruct will "
            "do), or plan='factored' or plan='dense' for all layers"
        )
    inputs = record_inputs(model, example) if found and plan is None else {}
    swap = {
        id(module): _plain_layer(module, plan or _cheapest(module, inputs.get(path, []), device))
        for path, module in found.items()
    }
    result = replace_modules(copied, swap)
    for _, layer in nnx.iter_modules(result, graph=True):
        # This package's replacement of a convolution is only another way to compute it.
        if isinstance(layer, nnx.Conv):
            layer.conv_general_dilated = _foreign(layer.conv_general_dilated, lax.conv_general_dilated)
    return result


def check_parameters(model: Any) -> None:
    """Raises ``ValueError``, naming the place, unless a model holds finite parameters and nothing of a training.

    Args:
      model: what should be an ``nnx.Module``.
    """
    if isinstance(model, nnx.Optimizer) or not isinstance(model, nnx.Module):
        hint = ": pass the model that it trains" if isinstance(model, nnx.Optimizer) else ""
        raise ValueError(f"model must be an nnx.Module that was trained, got a {type(model).__name__}{hint}")
    for path, node in nnx.iter_graph(model, graph=True):
        where = module_path(path)
        if isinstance(node, nnx.Optimizer | nnx.OptState):
            raise ValueError(
                f"{where!r} is the state of an optimizer ({type(node).__name__}), which belongs to training: deploy "
                "the model alone"
            )
        if isinstance(node, nnx.Variable):
            _check_values(where, node.get_value())


def _check_values(where: str, value: Any) -> None:
    if isinstance(value, Frame):
        raise ValueError(
            f"{where!r} is a Frame, a kernel lifted for the gradients of a training step: deploy the model that holds "
            "the TuckerTensor itself"
        )
    for leaf in jax.tree.leaves(value):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not bool(jnp.all(jnp.isfinite(leaf))):
            raise ValueError(
                f"{where!r} has entries that are not finite: restore an earlier checkpoint, from before the training "
                "diverged"
            )


def check_inference(model: nnx.Module) -> None:
    """Raises ``ValueError``, naming the layer, if one of a model's layers would behave as in training.

    Args:
      model: whose BatchNorm layers must use their statistics, and whose Dropout layers must let everything through.
    """
    for path, module in nnx.iter_modules(model, graph=True):
        where = f"layer {module_path(path)!r} ({type(module).__name__})"
        if hasattr(module, "use_running_average") and not module.use_running_average:
            raise ValueError(
                f"{where} normalizes by the batch's own statistics (use_running_average is "
                f"{module.use_running_average}): call model.eval() first"
            )
        rate = getattr(module, "rate", getattr(module, "dropout_rate", 0))
        if hasattr(module, "deterministic") and not module.deterministic and rate:
            raise ValueError(
                f"{where} drops activations at random (deterministic is {module.deterministic}): call model.eval() "
                "first"
            )


def inference_function(model: nnx.Module, *, fast: bool = False) -> Callable[..., Any]:
    """A model as a pure function of its inputs, its Variables constants.

    It works on a copy, so that a model that notes something in a Variable may be traced all the same.

    Args:
      model: stays as it is.
      fast: let :func:`tdlrt_jax.conv.conv_general_dilated` compute the convolutions, which on the CPU avoids XLA's slow
        one for windows wider than their image (512 channels at 2x2 pixels: a hundred times).
    """
    if fast:
        model = nnx.clone(model, graph=True)
        for _, module in nnx.iter_modules(model, graph=True):
            if isinstance(module, nnx.Conv) and module.conv_general_dilated is lax.conv_general_dilated:
                module.conv_general_dilated = conv_general_dilated
    graphdef, state = nnx.split(model, graph=True)

    def infer(*inputs: Any) -> Any:
        return nnx.merge(graphdef, state, copy=True)(*inputs)

    return infer


def _cheapest(module: Any, calls: list[tuple[int, ...]], device: str | None) -> str:
    kernel = counted_kernel(module)
    geometry = geometry_of(module) or {}
    shape = tuple(r if u is None else u.shape[0] for r, u in zip(kernel.core.shape, kernel.factors))
    return forward_plan(shape, factored_rank(kernel), calls, device=device, **geometry)


class _Stages(NamedTuple):
    """The kernels of the layers in a row, without spatial axes at the ends."""

    reduce: np.ndarray | None  # (in / groups, groups r_in); None where the in-channels are merged
    middle: np.ndarray  # (window..., in', out')
    expand: np.ndarray | None  # (r_out, out); None where the out-channels are merged


def _stages(kernel: TuckerTensor, plan: str, groups: int) -> _Stages:
    """The kernels of a plan at the ranks in use, formed in float64."""
    core, factors = np.asarray(kernel.core, np.float64), []
    for mode, factor in enumerate(kernel.factors):
        if factor is not None:
            factor = np.asarray(factor, np.float64)
            active = np.flatnonzero(np.any(factor != 0, axis=0))
            active = active if active.size else np.arange(1)  # a kernel of zeros keeps one direction
            core, factor = np.take(core, active, axis=mode), factor[:, active]
        factors.append(factor)
    *window, basis_in, basis_out = factors
    stream_in, stream_out = streamed_modes(plan)
    stream_in, stream_out = stream_in and basis_in is not None, stream_out and basis_out is not None
    merged = [*window, None if stream_in else basis_in, None if stream_out else basis_out]
    for mode, factor in enumerate(merged):
        if factor is not None:
            core = np.moveaxis(np.tensordot(factor, core, axes=(1, mode)), 0, mode)
    if stream_out:  # out-channels that have not been merged are those of one group
        core = np.tile(core, groups)
    return _Stages(np.tile(basis_in, groups) if stream_in else None, core, basis_out.T if stream_out else None)


def _plain_layer(layer: Any, plan: str) -> Any:
    """The plain form of one Tucker layer."""
    kernel: TuckerTensor = layer.kernel.get_value()
    dtype = _kernel_dtype(layer, kernel)
    if isinstance(layer, TuckerLinear):
        function = _foreign(layer.dot_general, lax.dot_general)
        stages = _stages(kernel, "dense" if function is not lax.dot_general else plan, 1)
        matrices = [matrix for matrix in stages if matrix is not None]
        return _in_a_row([(nnx.Linear, matrix, {"dot_general": function}) for matrix in matrices], layer, dtype)
    if layer.mask is not None:
        masked = np.asarray(_stages(kernel, "dense", 1).middle) * np.asarray(layer.mask)
        kernel, plan = TuckerTensor(masked, (None,) * masked.ndim), "dense"
    if isinstance(layer, TuckerConvTranspose):
        return _plain_transposed(layer, kernel, plan, dtype)
    function, groups = _foreign(layer.conv_general_dilated, lax.conv_general_dilated), layer.feature_group_count
    stages = _stages(kernel, plan if function is lax.conv_general_dilated else "dense", groups)
    grouped = {"feature_group_count": groups, "conv_general_dilated": function}
    geometry = {
        "strides": layer.strides,
        "padding": padding_of_flax(layer),
        "input_dilation": layer.input_dilation,
        "kernel_dilation": layer.kernel_dilation,
    }
    ends = (1,) * len(layer.kernel_size)
    # A pointwise window sees only the pixels that it samples: sample before the first product.
    first = stages.reduce is not None and math.prod(layer.kernel_size) == 1
    rows: list[tuple] = []
    if stages.reduce is not None:
        rows.append((nnx.Conv, _pointwise(stages.reduce, ends), {**grouped, **(geometry if first else {})}))
    rows.append((nnx.Conv, stages.middle, {**grouped, **({} if first else geometry)}))
    if stages.expand is not None:
        rows.append((nnx.Conv, _pointwise(stages.expand, ends), grouped))
    return _in_a_row(rows, layer, dtype)


def _plain_transposed(layer: TuckerConvTranspose, kernel: TuckerTensor, plan: str, dtype: Any) -> Any:
    """The plain form of a transposed convolution: its geometry in the middle, ordinary pointwise layers at the ends."""
    flipped = layer.transpose_kernel  # then the kernel is (spatial..., out, in)
    if flipped:
        plan = {"merge_in": "merge_out", "merge_out": "merge_in"}.get(plan, plan)
    stages = _stages(kernel, plan, 1)
    before, after = (stages.expand, stages.reduce) if flipped else (stages.reduce, stages.expand)
    geometry = {
        "strides": layer.strides,
        "padding": layer.padding,
        "kernel_dilation": layer.kernel_dilation,
        "transpose_kernel": flipped,
    }
    ends = (1,) * len(layer.kernel_size)
    rows: list[tuple] = [(nnx.ConvTranspose, stages.middle, geometry)]
    if before is not None:
        rows.insert(0, (nnx.Conv, _pointwise(before.T if flipped else before, ends), {}))
    if after is not None:
        rows.append((nnx.Conv, _pointwise(after.T if flipped else after, ends), {}))
    return _in_a_row(rows, layer, dtype)


def _in_a_row(rows: list[tuple[Any, np.ndarray, Mapping[str, Any]]], layer: Any, dtype: Any) -> Any:
    """Plain layers of these classes, kernels and options, one after the other; the bias belongs to the last."""
    made = []
    for number, (plain, kernel, options) in enumerate(rows):
        last = number == len(rows) - 1
        bias = layer.bias.get_value() if last and layer.bias is not None else None
        groups = options.get("feature_group_count", 1)
        n_in, n_out = kernel.shape[-2] * groups, kernel.shape[-1]
        if options.get("transpose_kernel"):
            n_in, n_out = n_out, n_in
        size = () if plain is nnx.Linear else (kernel.shape[:-2],)
        made.append(
            plain(
                n_in,
                n_out,
                *size,
                use_bias=bias is not None,
                dtype=layer.dtype,
                param_dtype=dtype,
                precision=layer.precision,
                promote_dtype=layer.promote_dtype,
                preferred_element_type=layer.preferred_element_type,
                kernel_init=_constant(jnp.asarray(kernel, dtype)),
                bias_init=_constant(bias),
                rngs=nnx.Rngs(0),
                **options,
            )
        )
    return made[0] if len(made) == 1 else nnx.Sequential(*made)


def _constant(value: Any) -> Any:
    return lambda key, shape, dtype: value


def _pointwise(matrix: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
    return matrix.reshape(*ends, *matrix.shape)


def _kernel_dtype(layer: Any, kernel: TuckerTensor) -> Any:
    """The dtype that a layer's kernel counts as: that of its parameters where it is wider only for accuracy."""
    stored = kernel.core.dtype
    return layer.param_dtype if stored == jnp.promote_types(layer.param_dtype, jnp.float32) else stored


def _foreign(function: Any, default: Any) -> Any:
    """A function of the user's; the default in the place of one of this package's, which computes the same."""
    ours = (getattr(function, "__module__", None) or "").split(".")[0] == __name__.split(".")[0]
    return default if ours else function
