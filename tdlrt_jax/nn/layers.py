"""``TuckerConv`` and ``TuckerLinear``: the layers of ``flax.nnx`` with a kernel in Tucker format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array, lax
from jax.nn import initializers
from jax.typing import DTypeLike

from tdlrt_jax.arguments import (
    check_callable,
    check_dtype,
    check_input,
    check_integer,
    check_integers,
    check_rngs,
    shown,
)
from tdlrt_jax.conv import tucker_conv, tucker_linear
from tdlrt_jax.conv.geometry import PaddingLike, resolve, resolve_input
from tdlrt_jax.conv.plans import check_plan
from tdlrt_jax.initialization import Rank, initial_kernel
from tdlrt_jax.tucker import TuckerTensor, to_dense

__all__ = ["TuckerConv", "TuckerLinear"]

default_kernel_init = initializers.lecun_normal()
SHARDING = ("out_sharding", "sharding_names", "sharding")  # names of axes in metadata, as flax calls them
default_bias_init = initializers.zeros
NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class TuckerConv(nnx.Module):
    """A convolution whose kernel is a Tucker tensor; the arguments of ``flax.nnx.Conv``, and the rank's.

    ``kernel`` is an ``nnx.Param`` of a :class:`tdlrt_jax.TuckerTensor` with the dense shape
    ``(spatial..., in / groups, out)``; ``bias`` is as ever. Train it with :func:`tdlrt_jax.nn.value_and_grad` and
    :func:`tdlrt_jax.nn.tdlrt`.

    Args:
      in_features, out_features, kernel_size, strides, padding, input_dilation, kernel_dilation, feature_group_count: the
        geometry, as in ``flax.nnx.Conv``.
      use_bias: whether to add a bias.
      mask: an array of the dense kernel's shape to multiply the kernel with. The dense kernel is then built in every
        call, and nothing is saved but memory.
      dtype: of the computation; inferred from the input and the parameters by default.
      param_dtype: of the parameters. Core and factors are kept in float32 at least, and count as ``param_dtype`` where
        ``dtype`` is inferred.
      precision, preferred_element_type: as in ``jax.lax.conv_general_dilated``.
      kernel_init: a dense initializer ``(key, shape, dtype)``. Its draw gives the kernel its norm, or itself: see
        ``initialization``. It may return a TuckerTensor, which is then the kernel.
      bias_init: initializer of the bias.
      conv_general_dilated: a convolution function to use in the place of :func:`tdlrt_jax.tucker_conv`; it is given the
        dense kernel.
      promote_dtype: a function that takes ``(inputs, kernel, bias)`` to one dtype.
      rngs: random keys; ``params`` is drawn from as in ``flax.nnx.Conv``.
      kernel_metadata, bias_metadata: of the ``nnx.Param``\\ s.
      rank: ``None`` for full ranks; an int (count) or a float (fraction of the size) for both channel modes, while the
        spatial modes start at full rank; or one entry a mode, ``(spatial..., in, out)``, ``None`` for a mode that stays
        whole. Lowered where a Tucker tensor cannot have it. See :func:`tdlrt_jax.initialization.kernel_rank`. Ranks
        never exceed these capacities until ``tdlrt_jax.resize`` grows them.
      initialization: ``"dense"``: random subspaces, entries of the variance that ``kernel_init`` draws; ``"normalized"``:
        the same, smaller, for layers whose output is normalized, see :func:`tdlrt_jax.initialization.tucker_normalized`;
        ``"hosvd"``: its draw, truncated and rescaled to its norm; ``"spectral"``: singular values that decay with powers
        of ten; or a function, see :func:`tdlrt_jax.initialization.initial_kernel`.
      plan: how the kernel is applied, see :func:`tdlrt_jax.tucker_conv`; chosen by counted work by default.

    Raises:
      ValueError: for ranks, groups or names that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = TuckerConv(3, 16, kernel_size=(3, 3), rank=0.5, rngs=nnx.Rngs(0))
      >>> layer.kernel.core.shape
      (3, 3, 2, 8)
      >>> jax.eval_shape(layer, jnp.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 16)

    Source: paper, section 2.1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: PaddingLike = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: Array | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        rank: Rank = None,
        initialization: str | Callable[..., TuckerTensor] = "dense",
        plan: str | None = None,
    ):
        kernel_size = check_layer(
            in_features, out_features, kernel_size, dtype=dtype, param_dtype=param_dtype, bias_init=bias_init, rngs=rngs
        )
        check_plan(plan, or_none=True)
        check_integer("feature_group_count", feature_group_count, 1, "a number of groups")
        check_geometry(
            kernel_size,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            input_dilation=input_dilation,
        )
        if in_features % feature_group_count or out_features % feature_group_count:
            raise ValueError(
                f"feature_group_count={feature_group_count} must divide in_features={in_features} and "
                f"out_features={out_features}"
            )
        self.kernel_shape = (*kernel_size, in_features // feature_group_count, out_features)
        check_mask(mask, self.kernel_shape)
        kernel = initial_kernel(
            rngs.params(),
            self.kernel_shape,
            rank,
            initialization=initialization,
            kernel_init=kernel_init,
            dtype=param_dtype,
        )
        self.kernel = nnx.Param(kernel, **check_metadata(kernel_metadata))
        self.bias = (
            nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata)
            if use_bias
            else nnx.data(None)
        )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = kernel_size
        self.strides = hashable(strides)
        self.padding = hashable(padding)
        self.input_dilation = hashable(input_dilation)
        self.kernel_dilation = hashable(kernel_dilation)
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.mask = nnx.data(mask)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.conv_general_dilated = conv_general_dilated
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.plan = plan

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Applies the convolution.

        Args:
          inputs: ``(batch..., spatial..., in)``, any number of batch dimensions.
          out_sharding: of the output, for meshes with explicit axes; the dense kernel is then built.

        Returns:
          ``(batch..., spatial'..., out)``.
        """
        kernel: Any = self.kernel.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        inputs, bias = compute_inputs(self, inputs, kernel, bias)
        if self.mask is not None:
            kernel = to_dense(kernel) * self.mask
        if self.conv_general_dilated is lax.conv_general_dilated and out_sharding is None:
            y = tucker_conv(
                inputs,
                kernel,
                strides=self.strides,
                padding=self.padding,
                dilation=self.kernel_dilation,
                groups=self.feature_group_count,
                input_dilation=self.input_dilation,
                plan=self.plan,
                precision=self.precision,
                preferred_element_type=self.preferred_element_type,
            )
        else:
            y = self._dense_convolution(inputs, to_dense(kernel).astype(inputs.dtype), out_sharding)
        return y if bias is None else y + bias

    def _dense_convolution(self, inputs: Array, kernel: Array, out_sharding: Any) -> Array:
        """The convolution by the dense kernel, with the function that the user chose."""
        spatial = len(self.kernel_size)
        flat, geometry, lead = resolve_input(
            inputs,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            input_dilation=self.input_dilation,
        )
        last = spatial + 1
        data, weights = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
        # Functions that know nothing of the newer options are not given them needlessly.
        options = {"out_sharding": out_sharding, "preferred_element_type": self.preferred_element_type}
        y = self.conv_general_dilated(
            flat,
            kernel,
            geometry.strides,
            geometry.padding,
            lhs_dilation=geometry.input_dilation,
            rhs_dilation=geometry.dilation,
            dimension_numbers=lax.ConvDimensionNumbers(data, weights, data),
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            **{name: value for name, value in options.items() if value is not None},
        )
        return y.reshape(*lead, *y.shape[1:])


class TuckerLinear(nnx.Module):
    """A linear layer whose weight is a Tucker tensor of two modes, ``U_in C U_out^T``; the arguments of ``nnx.Linear``.

    Trained with :func:`tdlrt_jax.nn.tdlrt` it is a layer of matrix DLRT.

    Args:
      in_features, out_features, use_bias, dtype, param_dtype, precision, preferred_element_type, kernel_init, bias_init,
        promote_dtype, rngs, kernel_metadata, bias_metadata: as in ``flax.nnx.Linear``, with the remarks of
        :class:`TuckerConv`.
      dot_general: a product to use in the place of :func:`tdlrt_jax.tucker_linear`; it is given the dense weight.
      rank: ``None`` for full rank; an int (count) or a float (fraction of the mode's size), the smaller mode decides;
        or ``(in, out)``, ``None`` for a mode that stays whole.
      initialization, plan: as in :class:`TuckerConv`.

    Raises:
      ValueError: for ranks or names that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = TuckerLinear(20, 10, rank=4, rngs=nnx.Rngs(0))
      >>> layer.kernel.core.shape, layer(jnp.ones((2, 20))).shape
      ((4, 4), (2, 10))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        dot_general: Callable[..., Array] = lax.dot_general,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        rank: Rank = None,
        initialization: str | Callable[..., TuckerTensor] = "dense",
        plan: str | None = None,
    ):
        check_layer(in_features, out_features, dtype=dtype, param_dtype=param_dtype, bias_init=bias_init, rngs=rngs)
        check_plan(plan, or_none=True)
        kernel = initial_kernel(
            rngs.params(),
            (in_features, out_features),
            rank,
            initialization=initialization,
            kernel_init=kernel_init,
            dtype=param_dtype,
        )
        self.kernel = nnx.Param(kernel, **check_metadata(kernel_metadata))
        self.bias = (
            nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata)
            if use_bias
            else nnx.data(None)
        )
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.dot_general = dot_general
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.plan = plan

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Applies the layer along the last dimension.

        Args:
          inputs: ``(batch..., in)``.
          out_sharding: of the output, for meshes with explicit axes; the dense weight is then built.

        Returns:
          ``(batch..., out)``.
        """
        kernel: Any = self.kernel.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        inputs, bias = compute_inputs(self, inputs, kernel, bias)
        if self.dot_general is lax.dot_general and out_sharding is None:
            options = {"precision": self.precision, "preferred_element_type": self.preferred_element_type}
            y = tucker_linear(inputs, kernel, plan=self.plan, **options)
        else:
            options = {"out_sharding": out_sharding, "preferred_element_type": self.preferred_element_type}
            y = self.dot_general(
                inputs,
                to_dense(kernel).astype(inputs.dtype),
                (((inputs.ndim - 1,), (0,)), ((), ())),
                precision=self.precision,
                **{name: value for name, value in options.items() if value is not None},
            )
        return y if bias is None else y + bias


def check_layer(
    in_features: Any,
    out_features: Any,
    kernel_size: Any = (),
    *,
    dtype: Any,
    param_dtype: Any,
    bias_init: Any,
    rngs: Any,
) -> tuple[int, ...]:
    """Raises ``ValueError`` for what no layer can be made of, naming the argument; returns the kernel's spatial shape."""
    check_integer("in_features", in_features, 1, "a number of channels")
    check_integer("out_features", out_features, 1, "a number of channels")
    if dtype is not None:
        check_dtype("dtype", dtype)
    check_dtype("param_dtype", param_dtype)
    check_callable("bias_init", bias_init, "bias_init(key, shape, dtype) -> array")
    check_rngs("rngs", rngs)
    if isinstance(kernel_size, int | np.integer):
        kernel_size = (kernel_size,)
    if isinstance(kernel_size, Sequence) and not kernel_size:
        return ()
    return check_integers("kernel_size", kernel_size, 1, what="sizes, one a spatial dimension")


def check_geometry(kernel_size: tuple[int, ...], *, transposed: bool = False, **options: Any) -> None:
    """Raises ``ValueError`` for strides, padding or dilations that no image makes sense of, by the layer's names for them."""
    if transposed and isinstance(options["padding"], str) and options["padding"] not in ("SAME", "VALID", "CIRCULAR"):
        raise ValueError(f"padding={options['padding']!r}: expected SAME, VALID, CIRCULAR, an integer or pairs")
    dilation = options.pop("kernel_dilation")
    try:
        resolve(kernel_size, (1,) * len(kernel_size), dilation=dilation, **options)
    except ValueError as error:
        raise ValueError(re.sub(r"^dilation ", "kernel_dilation ", str(error))) from None


def check_mask(mask: Any, shape: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless a mask is an array of the kernel's shape."""
    if mask is not None and (not hasattr(mask, "dtype") or jnp.shape(mask) != shape):
        raise ValueError(f"mask is {shown(mask)}: expected an array of the kernel's shape, {shape}")


def check_metadata(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata of a Tucker kernel; raises ``ValueError`` for names of a dense kernel's axes."""
    for name in SHARDING:
        if metadata.get(name) is not None:
            raise ValueError(
                f"kernel_metadata has {name}={metadata[name]!r}, which is for the axes of a dense kernel: core and factors have "
                "others. Leave it out, and place the parameters afterwards (docs/scaling.md)"
            )
    return metadata


def compute_inputs(layer: Any, inputs: Array, kernel: Any, bias: Array | None) -> tuple[Array, Array | None]:
    """Input and bias of an nnx layer in the dtype of the computation; kernels are formed in their own and cast after that."""
    inputs = check_input("inputs", inputs)
    if (
        inputs.ndim == 0
        or inputs.shape[-1] != layer.in_features
        or inputs.ndim <= len(getattr(layer, "kernel_size", ()))
    ):
        spatial = "spatial..., " if hasattr(layer, "kernel_size") else ""
        raise ValueError(f"inputs have shape {inputs.shape}: expected (batch..., {spatial}{layer.in_features})")
    inputs, _, bias = layer.promote_dtype((inputs, stand_in(kernel, layer.param_dtype), bias), dtype=layer.dtype)
    return inputs, bias


def stand_in(kernel: Any, param_dtype: DTypeLike) -> Array:
    """A scalar of the dtype that a kernel counts as where dtypes are promoted.

    Where a kernel is wider only because factors are never narrower than float32, that is ``param_dtype``.
    """
    stored = jnp.result_type(*jax.tree.leaves(kernel))
    widened = stored == jnp.promote_types(param_dtype, jnp.float32)
    return jnp.zeros((), param_dtype if widened else stored)


def padding_of_flax(layer: Any) -> Any:
    """A convolution's padding as flax.nnx takes it: names in capitals, and no names where the input is dilated."""
    if not isinstance(layer.padding, str):
        return layer.padding
    dilation = getattr(layer, "input_dilation", 1)
    dilated = any(d not in (1, None) for d in (dilation if isinstance(dilation, tuple | list) else (dilation,)))
    return ((0, 0),) * len(layer.kernel_size) if dilated else layer.padding.upper()


def hashable(value: Any) -> Any:
    """Sequences as tuples, so that the layer's static part can be compared."""
    return tuple(hashable(entry) for entry in value) if isinstance(value, list | tuple) else value
