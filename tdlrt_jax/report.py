"""What a network costs, layer by layer: ranks, parameters, multiply-adds, as data and as a table.

Everything is counted at the ranks in use, not at the capacities of the arrays. The walk through a ``flax.nnx`` model is
in :mod:`tdlrt_jax.nn.summary`; here are the numbers, which need no flax.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from tdlrt_jax.arguments import check_mapping, shown
from tdlrt_jax.baselines.cp import is_cp
from tdlrt_jax.conv.plans import count_work, forward_plan
from tdlrt_jax.paths import path_name
from tdlrt_jax.tucker import TuckerTensor, active_rank, capacity, is_tucker, kernel_shape, parameter_count

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerSummary", "Summary", "Total", "layer_name", "summarize_layer", "summarize_params"]

KINDS = ("convolution", "transposed convolution", "linear")


class Total(NamedTuple):
    """Numbers stored, or multiply-adds, of several layers: as they are, and with dense kernels."""

    stored: int
    dense: int

    @property
    def compression(self) -> float:
        """``1 - c / f`` (paper, section 4.1); 0 for nothing, negative where the format costs more than it saves."""
        return 1 - self.stored / self.dense if self.dense else 0.0


class LayerSummary(NamedTuple):
    """One layer with a kernel; modes in the order ``(spatial..., in / groups, out)``."""

    path: str  # of the layer: "conv1", "blocks/0/conv"
    kind: str  # one of KINDS
    shape: tuple[int, ...]  # of the dense kernel
    rank: tuple[int, ...] | None  # in use, one a mode; the number of terms of a CP kernel; None for a dense one
    capacity: tuple[int, ...] | None  # of the arrays
    parameters: int  # core and factors at the ranks in use, without bias; 0 where another layer's kernel is used
    dense_parameters: int
    inputs: tuple[tuple[int, ...], ...] = ()  # the input's shape in every call
    plan: str | None = None  # how a forward pass at the ranks in use applies the kernel; None for a dense one
    multiply_adds: int | None = None  # of a forward pass, all calls; None where unknown
    dense_multiply_adds: int | None = None

    @property
    def compression(self) -> float:
        """``1 - c / f``; see :class:`Total`."""
        return Total(self.parameters, self.dense_parameters).compression


class Summary(NamedTuple):
    """A network's layers and their sums; ``print(summary)`` shows the table."""

    layers: tuple[LayerSummary, ...]  # with an example in the order of their first call, else in that of the tree
    weights: Total  # all parameters: kernels, biases, normalizations
    kernels: Total
    convolutions: Total  # kernels of (transposed) convolutions alone, the paper's c.r.
    multiply_adds: Total | None  # of the layers whose work is known; None without an example input

    def to_json(self) -> dict[str, Any]:
        """Everything as dicts, lists and numbers, with the compression rates worked out.

        Example:
          >>> import json, jax.numpy as jnp
          >>> summary = summarize_params({"last": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}})
          >>> json.loads(json.dumps(summary.to_json()))["weights"]
          {'stored': 15, 'dense': 15, 'compression': 0.0}
        """
        layers = [{**_as_lists(layer._asdict()), "compression": layer.compression} for layer in self.layers]
        totals = {
            name: value and {**value._asdict(), "compression": value.compression}
            for name, value in self._asdict().items()
            if name != "layers"
        }
        return {"layers": layers, **totals}

    def table(self) -> Table:
        """The summary as a ``rich`` table; columns that would be empty are left out."""
        return _table(self)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=200).print(self.table())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def layer_name(path: str) -> str:
    """The layer that a kernel's path belongs to: ``conv1`` for ``conv1/kernel`` and ``conv1/kernel/value``."""
    if not isinstance(path, str):
        raise ValueError(f"path={shown(path)}: expected a string, such as 'conv1/kernel'")
    return path.removesuffix("/value").removesuffix("/kernel")


def summarize_params(params: Any, kinds: Mapping[str, str] | None = None) -> Summary:
    """Summarizes a pytree of parameters: every Tucker or CP kernel, and every array of two or more modes named ``kernel``.

    Nothing is known of inputs, so multiply-adds stay unknown.

    Args:
      params: arrays and kernels in any containers. All leaves count as weights.
      kinds: one of :data:`KINDS` by name of layer, as in the summary of a model. Without it nothing tells a convolution kept as
        a matrix from a linear layer: matrices are linear and the rest are convolutions.

    Returns:
      A :class:`Summary` with the layers in the order of the tree.

    Example:
      >>> import jax, jax.numpy as jnp, tdlrt_jax
      >>> kernel = tdlrt_jax.hosvd(jax.random.normal(jax.random.key(0), (3, 3, 8, 16)), rank=(3, 3, 2, 4))
      >>> summary = summarize_params({"conv": {"kernel": kernel, "bias": jnp.ones(16)}})
      >>> layer = summary.layers[0]
      >>> layer.path, layer.rank, layer.parameters, layer.dense_parameters
      ('conv', (3, 3, 2, 4), 170, 1152)
    """
    check_mapping("kinds", kinds or {}, "from names of layers to kinds")
    strange = [
        leaf for leaf in jax.tree.leaves(params) if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float)
    ]
    if strange:
        raise ValueError(f"params has the leaf {shown(strange[0])}: expected arrays and kernels")
    kernels = kernels_by_layer(params)
    layers = [
        summarize_layer(
            name, (kinds or {}).get(name, "linear" if len(kernel_shape_of(kernel)) == 2 else "convolution"), kernel
        )
        for name, kernel in kernels.items()
    ]
    every = jax.tree.leaves(params, is_leaf=is_compressed)
    others = sum(map(numbers, every)) - sum(map(numbers, kernels.values()))
    return total_summary(layers, others, with_work=False)


def kernels_by_layer(params: Any) -> dict[str, Any]:
    """All kernels of :func:`summarize_params`, Tucker, CP or dense, by the name of their layer."""
    found = {}
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_compressed):
        full = path_name(path)
        name = layer_name(full)
        named_kernel = name != full.removesuffix("/value") or full == "kernel"
        if is_compressed(node) or (named_kernel and np.ndim(node) >= 2):
            found[name] = node
    return found


def is_compressed(node: Any) -> bool:
    """Whether a node of a pytree is a kernel in a low-rank format, Tucker or CP."""
    return is_tucker(node) or is_cp(node)


def kernel_shape_of(kernel: Any) -> tuple[int, ...]:
    """The dense shape of a TuckerTensor, a CPTensor or an array."""
    if is_cp(kernel):
        return tuple(factor.shape[0] for factor in kernel.factors)
    return kernel_shape(kernel) if is_tucker(kernel) else tuple(np.shape(kernel))


def numbers(kernel: Any) -> int:
    """How many numbers a leaf holds, a low-rank kernel as if it were dense."""
    return math.prod(kernel_shape_of(kernel))


def summarize_layer(
    path: str,
    kind: str,
    kernel: Any,
    *,
    inputs: Sequence[Sequence[int]] | None = None,
    geometry: Mapping[str, Any] | None = None,
    plan: str | None = None,
    device: str | None = None,
    shared: bool = False,
) -> LayerSummary:
    """One layer's numbers.

    Args:
      path: name of the layer.
      kind: one of :data:`KINDS`.
      kernel: a TuckerTensor, a CPTensor or an array; arrays without values (``jax.ShapeDtypeStruct``) count at their capacity.
      inputs: the input's shape ``(batch..., spatial..., in)`` in every call; ``None`` if it is not known.
      geometry: ``strides``, ``padding`` and so on, as :func:`tdlrt_jax.conv.count_work` takes them; ``None`` if the
        layer is none whose work can be counted so.
      plan: the one to count; by default that of :func:`tdlrt_jax.conv.forward_plan`.
      device: see :func:`tdlrt_jax.conv.forward_plan`.
      shared: whether the kernel was counted under another path already.

    Returns:
      A :class:`LayerSummary`.
    """
    if not is_compressed(kernel) and not hasattr(kernel, "shape"):
        raise ValueError(f"kernel is {shown(kernel)}: expected a TuckerTensor, a CPTensor or an array")
    calls = tuple(tuple(shape) for shape in inputs or ())
    shape, rank, parameters = kernel_shape_of(kernel), None, numbers(kernel)
    if is_tucker(kernel):
        check_not_stacked(path, kernel)
        rank = concrete_rank(kernel)
        parameters = parameter_count(shape, rank, [factor is None for factor in kernel.factors])
    elif is_cp(kernel):
        rank = (kernel.factors[0].shape[1],)
        parameters = rank[0] * sum(shape)
    summary = LayerSummary(
        path=path,
        kind=kind,
        shape=shape,
        rank=rank,
        capacity=capacity(kernel) if is_tucker(kernel) else rank,
        parameters=0 if shared else parameters,
        dense_parameters=0 if shared else math.prod(shape),
        inputs=calls,
    )
    if inputs is None or geometry is None or is_cp(kernel):
        return summary
    dense = _sum_forward("dense", shape, (None,) * len(shape), calls, geometry)
    if rank is None:
        return summary._replace(multiply_adds=dense, dense_multiply_adds=dense)
    plan = plan or forward_plan(shape, factored_rank(kernel), calls, device=device, **geometry)
    work = _sum_forward(plan, shape, factored_rank(kernel), calls, geometry)
    return summary._replace(plan=plan, multiply_adds=work, dense_multiply_adds=dense)


def check_not_stacked(path: str, kernel: Any) -> None:
    """Raises ``ValueError`` for Tucker kernels of several layers in the arrays of one, naming the layer."""
    if is_tucker(kernel) and np.ndim(kernel.core) != len(kernel.factors):
        raise ValueError(
            f"layer {path!r}: its core of shape {np.shape(kernel.core)} with {len(kernel.factors)} factors is a stack of several "
            "layers' (nnx.vmap, nnx.scan), each with ranks of its own: expected one layer. Unroll the loop, or leave the layers "
            "dense"
        )


def total_summary(layers: Iterable[LayerSummary], other_weights: int, *, with_work: bool) -> Summary:
    """A :class:`Summary` of layers and ``other_weights`` numbers besides their kernels (biases, normalizations)."""
    layers = tuple(layers)
    kernels = total_of(layers)
    convolutions = total_of(layer for layer in layers if layer.kind != "linear")
    known = [layer for layer in layers if layer.multiply_adds is not None]
    work = Total(
        sum(layer.multiply_adds or 0 for layer in known), sum(layer.dense_multiply_adds or 0 for layer in known)
    )
    weights = Total(kernels.stored + other_weights, kernels.dense + other_weights)
    return Summary(layers, weights, kernels, convolutions, work if with_work else None)


def total_of(layers: Iterable[LayerSummary]) -> Total:
    """The kernels' parameters, added up."""
    stored, dense = 0, 0
    for layer in layers:
        stored, dense = stored + layer.parameters, dense + layer.dense_parameters
    return Total(stored, dense)


def concrete_rank(kernel: TuckerTensor) -> tuple[int, ...]:
    """The ranks in use as numbers; capacities where the kernel's arrays have no values."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(kernel)):
        return capacity(kernel)
    return tuple(np.asarray(active_rank(kernel)).tolist())


def factored_rank(kernel: TuckerTensor) -> tuple[int | None, ...]:
    """The ranks in use, ``None`` for whole modes, as :func:`tdlrt_jax.conv.count_work` takes them."""
    ranks = concrete_rank(kernel)
    return tuple(None if factor is None else max(rank, 1) for rank, factor in zip(ranks, kernel.factors))


def _sum_forward(
    plan: str,
    shape: Sequence[int],
    rank: Sequence[int | None],
    calls: Iterable[Sequence[int]],
    geometry: Mapping[str, Any],
) -> int:
    return sum(count_work(plan, shape, rank, call, **geometry).forward for call in calls)


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(entry) for key, entry in value.items()}
    return [_as_lists(entry) for entry in value] if isinstance(value, tuple | list) else value


def _table(summary: Summary) -> Table:
    from rich.table import Table

    layers, work = summary.layers, summary.multiply_adds
    padded = any(layer.capacity != layer.rank for layer in layers)
    table = Table(
        title="Kernels, modes as (spatial..., in, out); biases count in the last line only", title_justify="left"
    )
    table.add_column("layer", no_wrap=True)
    headers = ["kernel", "rank", *(["capacity"] if padded else []), "dense", "stored", "compression"]
    headers += ["input", "plan", "dense mult-adds", "mult-adds"] if work else []
    for header in headers:
        table.add_column(header, justify="right", no_wrap=header not in ("input",))

    def row(name: str, total: Total, cells: Sequence[str] = (), ends: Sequence[str] = ()) -> None:
        blanks = [""] * ((3 if padded else 2) - len(cells))
        numbers = [f"{total.dense:,}", f"{total.stored:,}", f"{total.compression:.1%}"]
        table.add_row(name, *cells, *blanks, *numbers, *ends)

    for layer in layers:
        cells = [_product(layer.shape), "dense" if layer.rank is None else _product(layer.rank)]
        if padded:
            cells.append("" if layer.capacity is None else _product(layer.capacity))
        called = dict.fromkeys(map(_product, layer.inputs))  # every shape once, in order
        times = f" ({len(layer.inputs)} calls)" if len(layer.inputs) > 1 else ""
        ends = [", ".join(called) + times, layer.plan or "", _short(layer.dense_multiply_adds)]
        ends.append(_short(layer.multiply_adds))
        row(layer.path, Total(layer.parameters, layer.dense_parameters), cells, ends if work else ())
    table.add_section()
    row("convolutions", summary.convolutions)
    row("all kernels", summary.kernels)
    row("all weights", summary.weights, (), ["", "", _short(work.dense), _short(work.stored)] if work else ())
    return table


def _product(numbers: Iterable[int]) -> str:
    return "×".join(map(str, numbers))


def _short(number: int | None) -> str:
    """Three digits and a unit: ``1.23 M``."""
    if number is None:
        return "?"
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
