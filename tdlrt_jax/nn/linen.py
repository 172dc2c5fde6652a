"""``flax.linen`` models on Tucker kernels, unmodified: their parameters are converted, their layers' calls intercepted.

A linen layer reads its kernel from the tree of parameters. Where a Tucker kernel (or its Frame) stands there, the
computation of ``Conv``, ``ConvTranspose`` and ``Dense`` is replaced by :func:`tdlrt_jax.tucker_conv`'s; everything else runs
as the model's author wrote it.
"""

from __future__ import annotations

import dataclasses
import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.core.meta import AxisMetadata
from jax import Array
from jax.typing import DTypeLike

from tdlrt_jax.arguments import check_mapping, shown
from tdlrt_jax.conv import tucker_conv, tucker_conv_transpose, tucker_linear
from tdlrt_jax.frame import is_kernel
from tdlrt_jax.nn.convert import kernel_from_rule
from tdlrt_jax.nn.layers import stand_in
from tdlrt_jax.paths import path_name
from tdlrt_jax.rules import Rule, check_rules_match, parse_rules, rule_for
from tdlrt_jax.tucker import is_tucker, kernel_shape, to_dense

__all__ = ["apply", "densify_params", "tucker_interceptor", "tuckerize_params"]

KERNEL = "kernel"


def tuckerize_params(params: Mapping[str, Any], rules: Mapping[str, Any], *, key: Array | None = None) -> Any:
    """A copy of a linen model's parameters in which the kernels that rules name are Tucker kernels.

    Kernels are the leaves named ``kernel`` with two dimensions or more, beside a bias that is a vector of their outputs, or
    none: those of ``nn.Conv``, ``nn.ConvTranspose`` and ``nn.Dense``. Run the model with :func:`apply`, which refuses
    a Tucker kernel in any other of linen's layers (``nn.DenseGeneral`` without a bias looks the same here): leave such a layer
    dense by a rule.

    Args:
      params: ``variables["params"]`` of a linen model, a dict or FrozenDict. (All of ``variables`` will do; paths then
        start with ``params/``.)
      rules: from regular expressions on layers' paths (``Conv_0``, ``ResNetBlock_3/Conv_1``) to ranks or options, see
        :func:`tdlrt_jax.nn.tuckerize`.
      key: a random key, where a rule asks for fresh weights.

    Returns:
      A new tree of the same kind, with :class:`tdlrt_jax.TuckerTensor`\\ s of float32 at least. Kernels that are Tucker
      kernels already stay.

    Raises:
      ValueError: naming the layer or the pattern, for rules that cannot work or are found nowhere, parameters without
        kernels, fresh weights without a key, and kernels that ``nn.scan`` or ``nn.vmap`` has stacked.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Dense(2)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 6, 6, 3)))
      >>> params = tuckerize_params(variables["params"], {"layers_0": 0.5})
      >>> params["layers_0"]["kernel"].core.shape
      (3, 3, 2, 4)
      >>> apply(model, {"params": params}, jnp.ones((1, 6, 6, 3))).shape
      (1, 6, 6, 2)
    """
    check_mapping("params", params, "variables['params'] of a linen model")
    parsed = parse_rules(rules)
    layers: list[str] = []
    _map_layers(params, lambda path, layer: layers.append(path))
    if not layers:
        raise ValueError(
            "params has no kernels to convert: expected a linen model's variables['params'], with leaves named 'kernel' "
            f"of two dimensions or more, got the keys {list(params)}"
        )
    check_rules_match(parsed, layers)
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}

    def convert(path: str, layer: Mapping[str, Any]) -> Any:
        rule = rule_for(parsed, path)
        kernel = layer[KERNEL]
        if rule is None or rule.dense or is_tucker(kernel):
            return None
        if f"{path}/{KERNEL}/scale" in names:
            raise ValueError(
                f"layer {path!r} is in an nn.WeightNorm, which works on the kernel as an array: leave it dense by a rule, "
                f"{{{path!r}: 'dense', ...}}"
            )
        if _is_stacked(layer):
            raise ValueError(
                f"layer {path!r}: its kernel of shape {kernel.shape} and bias of shape {layer['bias'].shape} are stacks of "
                "several layers' (nn.scan, nn.vmap), which cannot be Tucker kernels: leave the layer dense, or unroll the loop"
            )
        return kernel_from_rule(kernel, rule, path, key=_key(rule, path, key))

    return _map_layers(params, convert)


def densify_params(params: Mapping[str, Any], *, dtype: DTypeLike | None = None) -> Any:
    """A copy of parameters with dense kernels in the place of Tucker kernels; undoes :func:`tuckerize_params`.

    Args:
      params: a dict or FrozenDict with Tucker kernels.
      dtype: of the new kernels; that of the cores, float32 at least, by default.

    Returns:
      A new tree of the same kind.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"Dense_0": {"kernel": jnp.ones((3, 4))}}
      >>> densify_params(tuckerize_params(params, {".*": 1}))["Dense_0"]["kernel"].shape
      (3, 4)
    """

    check_mapping("params", params, "variables['params'] of a linen model")

    def convert(path: str, layer: Mapping[str, Any]) -> Any:
        if not is_kernel(layer[KERNEL]):
            return None
        dense = to_dense(layer[KERNEL])
        return dense if dtype is None else dense.astype(dtype)

    return _map_layers(params, convert)


def apply(module: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """``module.apply(variables, ...)`` where any kernel may be a Tucker kernel.

    Differentiated by :func:`tdlrt_jax.value_and_grad` it gives the gradients of Theorem 1. Where all kernels are dense it is
    ``module.apply`` exactly.

    Args:
      module: a linen module.
      variables: its variables, ``variables["params"]`` of :func:`tuckerize_params`.
      *args, **kwargs: as in ``flax.linen.Module.apply``, ``rngs``, ``method`` and ``mutable`` among them.

    Returns:
      What ``module.apply`` returns.

    Raises:
      ValueError: naming the layer, for a Tucker kernel in a layer that cannot use one, or of another shape.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tdlrt_jax
      >>> model = nn.Dense(4)
      >>> x = jnp.ones((2, 3))
      >>> params = tuckerize_params(model.init(jax.random.key(0), x)["params"], {".*": 2})
      >>> loss_fn = lambda params: jnp.sum(apply(model, {"params": params}, x) ** 2)
      >>> value, grads = tdlrt_jax.value_and_grad(loss_fn)(params)
      >>> grads["kernel"].core.shape
      (2, 2)
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module is {shown(module)}: expected a linen module")
    check_mapping("variables", variables, "of collections, params among them")
    try:
        with nn.intercept_methods(tucker_interceptor):
            return module.apply(variables, *args, **kwargs)
    except ValueError as error:
        # A loop over stacked layers fails before any of them is called, and does not know why.
        if "leading axis sizes" in str(error) or "inconsistent sizes" in str(error):
            raise ValueError(
                f"{type(module).__name__} runs layers whose parameters nn.scan or nn.vmap has stacked along an axis, which "
                "Tucker kernels do not have: leave these layers dense by a rule, or unroll the loop"
            ) from error
        raise


def tucker_interceptor(
    next_fun: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
) -> Any:
    """For ``flax.linen.intercept_methods``: linen's layers compute with the Tucker kernels that they find.

    :func:`apply` installs it for one call; install it yourself around ``module.bind`` or ``nn.tabulate``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model = nn.Dense(4)
      >>> params = tuckerize_params(model.init(jax.random.key(0), jnp.ones((1, 3)))["params"], {".*": 2})
      >>> with nn.intercept_methods(tucker_interceptor):
      ...     model.bind({"params": params})(jnp.ones((2, 3))).shape
      (2, 4)
    """
    module = context.module
    if context.method_name != "__call__" or module.scope is None or not module.has_variable("params", KERNEL):
        return next_fun(*args, **kwargs)
    kernel: Any = module.get_variable("params", KERNEL)
    if not is_kernel(kernel):
        return next_fun(*args, **kwargs)
    # The method that is about to run, not the class: a derived class may do more before and after it calls its parent's.
    method = context.orig_method.func  # type: ignore[attr-defined]
    if method in LAYERS and getattr(module, "shared_weights", True):
        layer, compute = LAYERS[method]
        return _compute(layer, compute, module, kernel, *args, **kwargs)
    if type(module).__module__.startswith("flax.linen"):
        raise ValueError(
            f"layer {_path(module)!r} is an nn.{type(module).__name__}, which cannot use a Tucker kernel (nn.Conv, "
            "nn.ConvTranspose and nn.Dense can): leave it dense by a rule"
        )
    return next_fun(*args, **kwargs)


def _compute(layer: type, compute: Callable[..., Array], module: Any, kernel: Any, inputs: Array) -> Array:
    """The layer's computation by a Tucker kernel."""
    expected = _expected_shape(module, inputs)
    if any(basis is not None and basis.ndim != 2 for basis in _bases(kernel)) or kernel_shape(kernel) != expected:
        raise ValueError(
            f"layer {_path(module)!r} has a Tucker kernel of core shape {kernel.core.shape} and factors of shapes "
            f"{[None if basis is None else basis.shape for basis in _bases(kernel)]}: expected a kernel of shape {expected}. "
            "(A loop over stacked layers, nn.scan or nn.vmap, takes Tucker kernels apart: leave such layers dense)"
        )
    bias = None
    if module.use_bias:
        bias = module.param("bias", module.bias_init, (module.features,), module.param_dtype)
    if _needs_dense(module):
        # The author's own convolution or product, or a mask: the layer as it is, with the kernel rebuilt.
        names = [
            field.name for field in dataclasses.fields(layer) if field.init and field.name not in ("parent", "name")
        ]
        plain = layer(**{name: getattr(module, name) for name in names}, parent=None)
        dense = to_dense(kernel).astype(stand_in(kernel, module.param_dtype).dtype)
        return plain.apply({"params": {KERNEL: dense, **({} if bias is None else {"bias": bias})}}, inputs)
    inputs, _, bias = module.promote_dtype(inputs, stand_in(kernel, module.param_dtype), bias, dtype=module.dtype)
    y = compute(module, inputs, kernel)
    return y if bias is None else y + bias


def _conv(module: Any, inputs: Array, kernel: Any) -> Array:
    return tucker_conv(
        inputs,
        kernel,
        strides=module.strides,
        padding=module.padding,
        dilation=module.kernel_dilation,
        groups=module.feature_group_count,
        input_dilation=module.input_dilation,
        precision=module.precision,
    )


def _conv_transpose(module: Any, inputs: Array, kernel: Any) -> Array:
    return tucker_conv_transpose(
        inputs,
        kernel,
        strides=module.strides,
        padding=module.padding,
        dilation=module.kernel_dilation,
        transposed=module.transpose_kernel,
        precision=module.precision,
        preferred_element_type=module.preferred_element_type,
    )


def _dense(module: Any, inputs: Array, kernel: Any) -> Array:
    return tucker_linear(inputs, kernel, precision=module.precision)


# By the function behind a layer's __call__.
LAYERS: dict[Any, tuple[type, Callable[..., Array]]] = {
    inspect.unwrap(nn.Conv.__call__): (nn.Conv, _conv),
    inspect.unwrap(nn.ConvTranspose.__call__): (nn.ConvTranspose, _conv_transpose),
    inspect.unwrap(nn.Dense.__call__): (nn.Dense, _dense),
}


def _needs_dense(module: Any) -> bool:
    own = ("mask", "conv_general_dilated", "conv_general_dilated_cls", "dot_general", "dot_general_cls")
    return any(getattr(module, name, None) is not None for name in own)


def _expected_shape(module: Any, inputs: Array) -> tuple[int, ...]:
    size = getattr(module, "kernel_size", ())
    window = (size,) if isinstance(size, int) else tuple(size)
    channels = (inputs.shape[-1] // getattr(module, "feature_group_count", 1), module.features)
    return (*window, *(channels[::-1] if getattr(module, "transpose_kernel", False) else channels))


def _bases(kernel: Any) -> tuple:
    return kernel.factors if is_tucker(kernel) else kernel.U


def _path(module: nn.Module) -> str:
    return "/".join(module.path)


def _key(rule: Rule, path: str, key: Array | None) -> Array | None:
    """A key of the layer's own; the same for every order of layers."""
    if rule.weights == "hosvd":
        return None
    if key is None:
        raise ValueError(f"layer {path!r}: weights={rule.weights!r} needs a random key: pass key=jax.random.key(seed)")
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _map_layers(tree: Any, convert: Callable[[str, Mapping[str, Any]], Any], path: tuple[str, ...] = ()) -> Any:
    """A copy of a tree in which ``convert(path, layer)`` has replaced kernels, where it returns one.

    ``layer`` is the mapping in which the kernel stands, ``path`` its path.
    """
    if not isinstance(tree, Mapping):
        # Copied, since a training step donates its parameters.
        return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, tree)
    kernel = convert("/".join(path), tree) if _is_layer(tree, path) else None
    new = {
        name: kernel if name == KERNEL and kernel is not None else _map_layers(child, convert, (*path, name))
        for name, child in tree.items()
    }
    return FrozenDict(new) if isinstance(tree, FrozenDict) else type(tree)(new)  # type: ignore[call-arg]


def _is_layer(tree: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    kernel: Any = tree.get(KERNEL)
    bias: Any = tree.get("bias")
    if is_kernel(kernel):
        return True
    if isinstance(kernel, AxisMetadata):
        raise ValueError(
            f"layer {'/'.join(path)!r}: its kernel is boxed for partitioning: pass flax.core.meta.unbox(params)"
        )
    if not hasattr(kernel, "ndim") or kernel.ndim < 2 or isinstance(kernel, Mapping):
        return False
    fits = bias is None or (jnp.ndim(bias) == 1 and jnp.size(bias) in kernel.shape[-2:])
    return fits or _is_stacked(tree)


def _is_stacked(layer: Mapping[str, Any]) -> bool:
    """Whether kernel and bias look like those of several layers along a new first axis."""
    kernel: Any = layer[KERNEL]
    bias: Any = layer.get("bias")
    return hasattr(bias, "shape") and kernel.ndim > 2 and bias.shape == (kernel.shape[0], kernel.shape[-1])
