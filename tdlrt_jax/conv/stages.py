"""The three stages in which a convolution's Tucker kernel is applied, by a plan (:mod:`tdlrt_jax.conv.plans`).

Each is bilinear in its two arrays, so :func:`transpose` gives every line of the backward pass
(:mod:`tdlrt_jax.conv.onepass`), with strides, padding, dilations and groups always right.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tdlrt_jax.conv.convolution import convolve, kernel_gradient
from tdlrt_jax.conv.geometry import Geometry
from tdlrt_jax.frame import Frame
from tdlrt_jax.tucker import multi_mode_product

__all__ = [
    "Application",
    "convolve_merged",
    "correlate",
    "expand",
    "merge",
    "merged_factors",
    "merged_shape",
    "project",
    "reduce",
    "transpose",
]


class Application(NamedTuple):
    """How a kernel is applied; static and hashable."""

    stream_in: bool  # U_in applied to the activations; False where that mode is whole
    stream_out: bool  # likewise U_out
    geometry: Geometry
    precision: Any  # of the products with activations
    preferred_element_type: Any  # of the result
    products: bool = False  # see kernel_gradient


def reduce(how: Application, x: Array, matrix: Array | None) -> Array:
    """``A = Z U_in`` for each group, laid out as the convolution takes it; no product where the mode is merged."""
    groups = how.geometry.groups
    if groups > 1:
        x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    if how.stream_in and matrix is not None:
        x = jnp.matmul(x, matrix.astype(x.dtype), precision=how.precision)
    if groups == 1:
        return x
    if how.stream_out:  # the group becomes a batch axis: all groups share the kernel M[X]
        x = jnp.moveaxis(x, -2, 1)
        return x.reshape(x.shape[0] * groups, *x.shape[2:])
    return x.reshape(*x.shape[:-2], groups * x.shape[-1])


def convolve_merged(how: Application, a: Array, kernel: Array) -> Array:
    """``A * M[X]``."""
    geometry = how.geometry._replace(groups=1) if how.stream_out else how.geometry
    result = None if how.stream_out else how.preferred_element_type
    return convolve(a, kernel.astype(a.dtype), geometry, precision=how.precision, preferred_element_type=result)


def correlate(how: Application, a: Array, p: Array, shape: tuple[int, ...]) -> Array:
    """``corr(A, P)``: the transpose of :func:`convolve_merged` in the kernel, ``M[X]`` of the given shape."""
    geometry = how.geometry._replace(groups=1) if how.stream_out else how.geometry
    return kernel_gradient(a, p, shape[:-2], geometry, precision=how.precision, products=how.products)


def merged_shape(how: Application, frame: Frame) -> tuple[int, ...]:
    """The shape of ``M[X]``."""
    merged = merged_factors(how, frame.U)
    return tuple(size if u is None else u.shape[0] for size, u in zip(frame.core.shape, merged))


def expand(how: Application, b: Array, matrix: Array | None) -> Array:
    """``Y = B K_out^T``, each group with its own rows of the matrix; nothing where the mode is merged."""
    if not how.stream_out or matrix is None:
        return b
    groups = how.geometry.groups
    product = partial(jnp.einsum, precision=how.precision, preferred_element_type=how.preferred_element_type)
    matrix = matrix.astype(b.dtype)
    if groups == 1:
        return product("...r,or->...o", b, matrix)
    n_out, rank = matrix.shape
    b = b.reshape(b.shape[0] // groups, groups, *b.shape[1:])
    y = product("ng...r,gor->n...go", b, matrix.reshape(groups, n_out // groups, rank))
    return y.reshape(*y.shape[:-2], n_out)


def project(how: Application, dy: Array, matrix: Array, b: Array) -> Array:
    """``P = dY U_out``, the transpose of :func:`expand` in an array like ``b``."""
    return transpose(lambda b: expand(how, b, matrix), b, dy)


def merge(how: Application, tensor: Array, factors: tuple[Array | None, ...]) -> Array:
    """``M[X]``, in the dtype of the kernel and at the highest precision."""
    return multi_mode_product(tensor, merged_factors(how, factors))


def merged_factors(how: Application, factors: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
    """Those of the modes that ``M`` multiplies, ``None`` for the others."""
    *spatial, basis_in, basis_out = factors
    return (*spatial, None if how.stream_in else basis_in, None if how.stream_out else basis_out)


def transpose(stage: Any, like: Array, cotangent: Array) -> Array:
    """The transpose of a linear ``stage``, which takes an array ``like`` this one, at a cotangent."""
    (result,) = jax.linear_transpose(stage, like)(cotangent)
    return result
