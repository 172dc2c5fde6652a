"""``tuckerize`` and ``densify``: an existing ``flax.nnx`` model with Tucker layers in the place of dense ones, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tdlrt_jax.arguments import shown
from tdlrt_jax.capacity import resize
from tdlrt_jax.initialization import compiled_hosvd, initial_kernel, kernel_rank
from tdlrt_jax.nn.layers import SHARDING, TuckerConv, TuckerLinear, default_kernel_init, padding_of_flax
from tdlrt_jax.nn.modules import children, replace_modules
from tdlrt_jax.nn.transposed import TuckerConvTranspose
from tdlrt_jax.ranks import RankPolicy, check_tolerance
from tdlrt_jax.report import check_not_stacked
from tdlrt_jax.rules import Rule, check_rules_match, parse_rules, rule_for
from tdlrt_jax.truncation import hosvd, truncate
from tdlrt_jax.tucker import TuckerTensor, active_rank, mode_product, to_dense

__all__ = ["densify", "kernel_from_rule", "tuckerize"]

# What a layer and its counterpart have in common: the arguments with which either is made from the other.
COMMON = (
    "in_features",
    "out_features",
    "use_bias",
    "dtype",
    "param_dtype",
    "precision",
    "promote_dtype",
    "preferred_element_type",
)
WINDOW = ("kernel_size", "strides", "padding", "kernel_dilation", "mask")


class Counterpart(NamedTuple):
    """A dense layer, its Tucker layer, and their common arguments."""

    dense: type
    tucker: type
    arguments: tuple[str, ...]


COUNTERPARTS = (
    Counterpart(
        nnx.Conv,
        TuckerConv,
        (*COMMON, *WINDOW, "input_dilation", "feature_group_count", "conv_general_dilated"),
    ),
    Counterpart(nnx.ConvTranspose, TuckerConvTranspose, (*COMMON, *WINDOW, "transpose_kernel")),
    Counterpart(nnx.Linear, TuckerLinear, (*COMMON, "dot_general")),
)
OF_DENSE = {entry.dense: entry for entry in COUNTERPARTS}
OF_TUCKER = {entry.tucker: entry for entry in COUNTERPARTS}


def tuckerize(model: Any, rules: Mapping[str, Any], *, rngs: nnx.Rngs | None = None) -> Any:
    """A copy of a model in which the layers that rules name are Tucker layers of the same function.

    ``nnx.Conv``, ``nnx.ConvTranspose`` and ``nnx.Linear`` (not classes derived from them) become
    :class:`~tdlrt_jax.nn.TuckerConv`, :class:`~tdlrt_jax.nn.TuckerConvTranspose` and
    :class:`~tdlrt_jax.nn.TuckerLinear` with the same arguments, bias, mask and metadata, wherever in the model they are.
    Everything else is copied: other layers, statistics, random states, modes. What is shared (a module in two places, a
    weight in two layers) stays shared. Layers that are Tucker layers already are copied as they are. Names of a dense kernel's
    axes (``out_sharding``) do not go over to the Tucker kernel.

    Args:
      model: an nnx module, a single layer, or a pytree of modules; it stays as it is and shares no array with the copy.
      rules: from regular expressions on layers' paths to ranks or options, see :class:`tdlrt_jax.rules.Rule`; the first
        pattern found decides, layers in which none is found stay dense. A path is what stands before ``/kernel`` in the
        path of the parameter, ``blocks/0/conv1``; that of a model which is one layer is empty. The same rules can be
        given to :func:`tdlrt_jax.tdlrt`.
      rngs: random keys (``params``), where a rule asks for fresh weights. Biases stay.

    Returns:
      A new model. Cores and factors are float32 at least, also where the weights are narrower.

    Raises:
      ValueError: naming the layer or the pattern, for rules that cannot work or are found nowhere, a model without
        layers to convert, fresh weights without ``rngs``, weights that are not finite, stacks of layers (``nnx.vmap``),
        layers in ``nnx.WeightNorm`` or ``SpectralNorm``, or a weight shared with a layer that stays dense.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
      >>> tucker = tuckerize(model, {"layers/0": {"rank": (3, 3, 3, 8)}})
      >>> tucker.layers[0].kernel.core.shape
      (3, 3, 3, 8)
      >>> x = jnp.ones((1, 5, 5, 3))
      >>> bool(jnp.allclose(tucker(x), model(x), atol=1e-5)), type(densify(tucker).layers[0]).__name__
      (True, 'Conv')
    """
    parsed = parse_rules(rules)
    paths = _layer_paths(model)
    if not paths:
        raise ValueError(
            "model has no nnx.Conv, nnx.ConvTranspose or nnx.Linear to convert (classes derived from them are left alone, "
            f"and a linen model is converted by tdlrt_jax.nn.linen.tuckerize_params), got {type(model).__name__}"
        )
    check_rules_match(parsed, paths)
    normalized = _normalized_paths(model)

    def convert(path: str, layer: Any) -> Callable[[], Any] | None:
        rule = rule_for(parsed, path)
        if type(layer) not in OF_DENSE or rule is None or rule.dense:
            return None
        if path in normalized:
            raise ValueError(
                f"layer {path!r} is in an nnx.{normalized[path]}, which works on the kernel as an array: leave it dense by a "
                f"rule, {{{path!r}: 'dense', ...}}"
            )

        def kernel() -> TuckerTensor:
            if rule.weights != "hosvd" and rngs is None:
                raise ValueError(
                    f"layer {path!r}: weights={rule.weights!r} needs random keys: pass rngs=nnx.Rngs(seed)"
                )
            weights = layer.kernel.get_value()
            expected = getattr(layer, "kernel_shape", (layer.in_features, layer.out_features))
            if jnp.shape(weights) != expected:
                raise ValueError(
                    f"layer {path!r}: its kernel has the shape {jnp.shape(weights)}, expected {expected}. Stacks of layers "
                    "(nnx.vmap, nnx.scan) cannot be Tucker layers: leave it dense by a rule, or unroll the loop"
                )
            key = None if rule.weights == "hosvd" or rngs is None else rngs.params()
            return kernel_from_rule(weights, rule, path, key=key)

        return kernel

    return _with_counterparts(model, convert)


def densify(model: Any) -> Any:
    """A copy of a model in which every Tucker layer is the dense layer of the same function; undoes :func:`tuckerize`.

    Args:
      model: as in :func:`tuckerize`; it stays as it is.

    Returns:
      A new model with ``nnx.Conv``, ``nnx.ConvTranspose`` and ``nnx.Linear``, with weights of the layers' ``param_dtype``.
      A copy, if there are no Tucker layers.

    Raises:
      ValueError: for what is no model, and for stacks of Tucker layers (``nnx.vmap``), naming the layer.

    Example:
      >>> from flax import nnx
      >>> import tdlrt_jax.nn
      >>> layer = tdlrt_jax.nn.TuckerLinear(6, 4, rank=2, rngs=nnx.Rngs(0))
      >>> densify(layer).kernel.shape
      (6, 4)
    """

    if not _layer_paths(model) and not list(nnx.iter_graph(model, graph=True))[1:]:
        raise ValueError(f"model is {shown(model)}: expected an nnx.Module, or a pytree of modules")

    def convert(path: str, layer: Any) -> Callable[[], Any] | None:
        if type(layer) not in OF_TUCKER:
            return None
        check_not_stacked(path, layer.kernel.get_value())
        return lambda: to_dense(layer.kernel.get_value()).astype(layer.param_dtype)

    return _with_counterparts(model, convert)


def kernel_from_rule(weights: Array, rule: Rule, path: str, *, key: Array | None = None) -> TuckerTensor:
    """The Tucker kernel that a rule makes of a dense one.

    Args:
      weights: ``(spatial..., in, out)``, of any floating dtype.
      rule: of the layer; not a dense one.
      path: the layer's, for messages.
      key: a random key for fresh weights.

    Returns:
      A kernel in float32 at least. Its capacities are those that ``rank`` gives, lowered to ``max_rank``; with a tolerance
      and no rank they are the ranks found.

    Raises:
      ValueError: naming the layer.
    """
    try:
        weights = jnp.asarray(weights)
        if not jnp.issubdtype(weights.dtype, jnp.floating):
            raise ValueError(f"weights of dtype {weights.dtype} have no Tucker kernel: expected a floating dtype")
        order, shape = weights.ndim, weights.shape
        policy = rule.policy(order)
        bounds = (None,) * order if policy.max_rank is None else tuple(policy.max_rank)  # type: ignore[arg-type]
        rank = kernel_rank(shape, rule.rank)
        bounded = [r if r is None or bound is None else min(r, bound) for r, bound in zip(rank, bounds)]
        rank = kernel_rank(shape, bounded)
        if rule.weights != "hosvd":
            assert key is not None
            scheme = "dense" if rule.weights == "fresh" else rule.weights
            return initial_kernel(
                key, shape, rank, initialization=scheme, kernel_init=default_kernel_init, dtype=weights.dtype
            )
        weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
        if not isinstance(weights, jax.core.Tracer) and not jnp.all(jnp.isfinite(weights)):
            raise ValueError("its weights are not all finite: expected a trained or newly initialized model")
        if rule.tolerance is None:
            return compiled_hosvd(weights, rank=rank)
        check_tolerance(rule.tolerance, policy.convention)
        kernel = truncated_hosvd(weights, rule.tolerance, rank=rank, policy=policy)
        return kernel if rule.rank is not None else resize(kernel, active_rank(kernel).tolist())
    except ValueError as error:
        raise ValueError(f"layer {path!r}: {error}") from error


@partial(jax.jit, static_argnames=("rank", "policy"))
def truncated_hosvd(
    weights: Array, tolerance: Array | float, *, rank: tuple[int | None, ...], policy: RankPolicy
) -> TuckerTensor:
    """:func:`tdlrt_jax.hosvd` to a tolerance, with all that a policy says: spare directions and bounds as well."""
    exact = hosvd(weights, rank=[None if r is None else n for r, n in zip(rank, weights.shape)])
    sizes = tuple(n if r is None else r for r, n in zip(rank, weights.shape))
    whole = tuple(r is None for r in rank)
    cut = truncate(exact.core, tolerance, capacity=sizes, whole=whole, policy=policy)
    factors = [u if u is None else mode_product(p, u, 0) for u, p in zip(exact.factors, cut.rotations)]
    return TuckerTensor(cut.core, tuple(factors))


def _layer_paths(model: Any) -> list[str]:
    """The paths of all layers that could be, or are, Tucker layers."""
    known = (*OF_DENSE, *OF_TUCKER)
    return [_name(path) for path, node in nnx.iter_graph(model, graph=True) if type(node) in known]


def _normalized_paths(model: Any) -> dict[str, str]:
    """The paths of layers whose weights another module normalizes, and the name of its class."""
    found: dict[str, str] = {}
    for path, node in nnx.iter_graph(model, graph=True):
        if isinstance(node, nnx.WeightNorm | nnx.SpectralNorm):
            inside = _layer_paths(node.layer_instance)
            names = [_name((*path, "layer_instance", *([name] if name else []))) for name in inside]
            found |= dict.fromkeys(names, type(node).__name__)
    return found


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _with_counterparts(model: Any, convert: Callable[[str, Any], Callable[[], Any] | None]) -> Any:
    """A deep copy in which layers are replaced by their counterparts.

    Args:
      model: the original.
      convert: from a layer's path and the layer to a function that makes the counterpart's weights, ``None`` to leave it.
    """
    # The buffers are copied too: a training step that donates those of the copy must leave the original alive.
    copied = nnx.clone(model, graph=True, arrays=True)
    replacements: dict[int, Any] = {}
    kernels: dict[int, nnx.Variable] = {}  # by the Variable replaced, so that layers which share one still do
    for path, layer in list(nnx.iter_graph(copied, graph=True)):
        make_weights = convert(_name(path), layer) if type(layer) in (*OF_DENSE, *OF_TUCKER) else None
        if make_weights is not None:
            variable = layer.kernel
            if id(variable) not in kernels:
                kernels[id(variable)] = _without_sharding(variable.copy(make_weights()))
            replacements[id(layer)] = _counterpart(layer, kernels[id(variable)], variable.get_value())
    _check_sharing(copied, replacements, kernels)
    return replace_modules(copied, replacements)


def _without_sharding(variable: nnx.Variable) -> nnx.Variable:
    """A Variable without names for the axes of the array that it held."""
    for name in SHARDING:
        if variable.has_metadata(name) and variable.get_metadata(name) is not None:
            variable.del_metadata(name)
    return variable


def _counterpart(layer: Any, kernel: nnx.Variable, weights: Any) -> Any:
    """The layer of the other format with the same arguments and attributes, and this kernel."""
    to_tucker = type(layer) in OF_DENSE
    entry = OF_DENSE[type(layer)] if to_tucker else OF_TUCKER[type(layer)]
    arguments = {name: getattr(layer, name) for name in entry.arguments}
    if to_tucker:
        arguments["param_dtype"] = weights.dtype  # that of the weights decides the dtype of the computation, as it did
    elif "padding" in arguments:
        arguments["padding"] = padding_of_flax(layer)
    value = kernel.get_value()
    # Nothing is drawn: the weights are there, and the bias is the copy's own Variable.
    new = (entry.tucker if to_tucker else entry.dense)(**arguments, kernel_init=lambda *_: value, rngs=nnx.Rngs(0))
    new.kernel = kernel
    new.bias = nnx.data(layer.bias)
    for name, attribute in vars(layer).items():
        if not name.startswith("_pytree__") and name != "plan" and not hasattr(new, name):
            setattr(new, name, attribute)  # what a user has hung on the layer
    return new


def _check_sharing(model: Any, replacements: Mapping[int, Any], kernels: Mapping[int, Any]) -> None:
    """Raises ``ValueError`` if a kernel that is replaced is held by something that is not."""
    for path, holder, child in _edges(model, (), set()):
        if id(child) in kernels and id(holder) not in replacements:
            raise ValueError(
                f"the weight {_name(path)!r} is shared with a layer to convert: convert both layers or neither, or unshare it"
            )


def _edges(node: Any, path: tuple, visited: set[int]) -> Iterator[tuple[tuple, Any, Any]]:
    """Every ``(path, holder, child)`` of a model, each holder visited once."""
    if isinstance(node, nnx.Pytree):
        if id(node) in visited:
            return
        visited.add(id(node))
    for key, child in children(node):
        yield (*path, key), node, child
        yield from _edges(child, (*path, key), visited)
