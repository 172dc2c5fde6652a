"""Kernels, images and options on which convolutions are tried, and the plain convolutions that they are compared with."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tdlrt_jax import frame as frames
from tdlrt_jax.conv import tucker_conv
from tdlrt_jax.tucker import TuckerTensor, multi_mode_product, to_dense, unfold

X, KERNEL, RANK = (2, 6, 5, 4), (3, 3, 4, 6), (2, 2, 3, 4)
GROUPS_X, GROUPS_KERNEL = (1, 5, 5, 6), (3, 3, 3, 8)
# name: (shape of x, shape of the kernel, rank with None for whole modes, options); every plan runs each of these ...
STRUCTURES = {
    "same": (X, KERNEL, (2, 3, 3, 4), {}),
    "rank-one": (X, KERNEL, (1, 1, 1, 1), {}),
    "full-rank": (X, KERNEL, KERNEL, {}),
    "whole-spatial": (X, KERNEL, (None, 2, 3, 4), {}),
    "whole-in": (X, KERNEL, (2, None, None, 4), {}),
    "whole-out": (X, KERNEL, (2, 2, 3, None), {}),
    "tucker-2": (X, KERNEL, (None, None, 3, 4), {}),
    "all-whole": (X, KERNEL, (None, None, None, None), {}),
    "groups": (
        (2, 6, 5, 6),
        GROUPS_KERNEL,
        (2, 3, 2, 3),
        {"groups": 2, "strides": (2, 1), "padding": ((1, 0), (2, 1))},
    ),
    "groups-of-many": ((1, 5, 5, 12), (3, 3, 4, 9), (2, 2, 2, 4), {"groups": 3, "padding": "CIRCULAR"}),
    "groups-whole-in": (GROUPS_X, GROUPS_KERNEL, (2, 2, None, 3), {"groups": 2}),
    "groups-whole-out": (GROUPS_X, GROUPS_KERNEL, (2, 2, 2, None), {"groups": 2}),
    "linear": ((7, 5), (5, 6), (3, 3), {}),
    "linear-whole-in": ((7, 5), (5, 6), (None, 4), {}),
    "pointwise": (X, (1, 1, 4, 6), (1, 1, 3, 3), {"strides": (2, 1)}),
    "pointwise-padded": (X, (1, 1, 4, 6), (None, 1, 3, 3), {"strides": 2, "padding": 1}),
    "pointwise-groups": ((2, 4, 4, 6), (1, 1, 3, 4), (1, None, 2, 2), {"groups": 2}),
    "wide-window-groups": ((3, 2, 2, 6), GROUPS_KERNEL, (2, 3, 2, 3), {"groups": 2}),
}
# ... and these, which differ in nothing but the convolution in the middle, run by the longest plan.
OPTIONS = {
    "valid-stride": ((2, 7, 8, 4), (3, 2, 4, 5), (2, 2, 2, 3), {"padding": "VALID", "strides": (2, 3)}),
    "same-stride": ((2, 7, 8, 4), (3, 2, 4, 5), (2, 2, 2, 3), {"strides": 2}),
    "same-lower": ((1, 6, 6, 3), (2, 4, 3, 4), (2, 3, 2, 3), {"padding": "SAME_LOWER"}),
    "asymmetric": (X, KERNEL, RANK, {"padding": ((0, 2), (3, 1)), "strides": (1, 2)}),
    "integer-padding": (X, KERNEL, RANK, {"padding": 2}),
    "circular": (X, (3, 4, 4, 6), (2, 3, 3, 4), {"padding": "CIRCULAR"}),
    "reflect-stride": (X, (3, 4, 4, 6), (2, 3, 3, 4), {"padding": "REFLECT", "strides": 2}),
    "causal": ((2, 9, 4), (3, 4, 6), (2, 3, 4), {"padding": "CAUSAL", "dilation": 2}),
    "dilation": ((2, 8, 9, 4), (3, 2, 4, 6), (2, 2, 3, 4), {"dilation": (2, 3)}),
    "transposed": ((2, 4, 5, 4), KERNEL, RANK, {"input_dilation": 2, "padding": ((2, 1), (1, 2)), "strides": (1, 2)}),
    "one-d": ((2, 9, 4), (3, 4, 6), (2, 3, 4), {"strides": 2}),
    "three-d": ((1, 4, 5, 4, 3), (2, 3, 2, 3, 4), (2, 2, 2, 2, 3), {"strides": (1, 2, 1)}),
    "wide-window": ((3, 2, 2, 4), KERNEL, RANK, {}),
    "wide-window-stride": ((3, 4, 3, 4), (3, 5, 4, 6), (2, 3, 3, 4), {"strides": 2, "dilation": (2, 1)}),
    "unbatched": ((6, 5, 4), KERNEL, RANK, {}),
    "two-batch-axes": ((2, 3, 5, 4, 4), KERNEL, RANK, {}),
    "depthwise": ((2, 6, 5, 4), (3, 3, 1, 8), (2, 3, 1, 5), {"groups": 4}),
}
CASES = STRUCTURES | OPTIONS
TOLERANCE = 1e-12


def random_kernel(rng, shape, rank, dtype=np.float64):
    """A kernel with orthonormal factors and a random core; ``None`` for a whole mode."""
    size = [n if r is None else r for n, r in zip(shape, rank)]
    bases = [None if r is None else np.linalg.qr(rng.normal(size=(n, r)))[0] for n, r in zip(shape, rank)]
    core = rng.normal(size=size) / np.sqrt(np.prod(size[:-1]))
    return TuckerTensor(jnp.asarray(core, dtype), tuple(None if u is None else jnp.asarray(u, dtype) for u in bases))


def reference_conv(x, weight, *, strides=1, padding="SAME", dilation=1, groups=1, input_dilation=1):
    """``lax.conv_general_dilated`` on one batch axis, and the matrix product where there is no image."""
    spatial = weight.ndim - 2
    if spatial == 0:
        return x @ weight
    lead = x.shape[: x.ndim - 1 - spatial]
    x = x.reshape(-1, *x.shape[x.ndim - 1 - spatial :])

    def many(value):
        return (value,) * spatial if isinstance(value, int) else tuple(value)

    extent = [(k - 1) * d + 1 for k, d in zip(weight.shape, many(dilation))]
    if padding in ("CIRCULAR", "REFLECT"):
        pads = [(0, 0), *(((k - 1) // 2, k // 2) for k in extent), (0, 0)]
        x, padding = jnp.pad(x, pads, mode={"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]), "VALID"
    elif padding == "CAUSAL":
        padding = [(extent[0] - 1, 0)]
    elif not isinstance(padding, str):
        padding = [pad if isinstance(pad, tuple) else (pad, pad) for pad in many(padding)]
    axes = "XYZ"[:spatial]
    y = lax.conv_general_dilated(
        x,
        weight,
        many(strides),
        padding,
        lhs_dilation=many(input_dilation),
        rhs_dilation=many(dilation),
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=groups,
    )
    return y.reshape(*lead, *y.shape[1:])


def compiled(function):
    """``jax.jit`` without LLVM's optimizations: what takes time here is compilation."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=quick if jax.default_backend() == "cpu" else None)


def objective(apply, x, kernel):
    """A scalar whose cotangent depends on the layer's output."""
    y = apply(x, kernel)
    wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    weights = jnp.cos(jnp.arange(y.size, dtype=wide.dtype)).reshape(y.shape)
    return jnp.sum(weights * jnp.sin(wide)), y


def applied(plan, options):
    return lambda x, kernel: tucker_conv(x, kernel, plan=plan, **options)


def densely(options):
    return lambda x, kernel: reference_conv(x, to_dense(kernel), **options)


def chart_gradients(apply, x, frame):
    """``(value, y, dx, dC, (dK_i))`` of a layer at a frame."""

    def loss(x, point):
        return objective(apply, x, frames.with_point(frame, point))

    (value, y), (dx, point) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, frames.chart_point(frame))
    return value, y, dx, point.core, point.factors


def formula_gradients(apply_dense, x, frame):
    """The same by the formula of Theorem 1, from the gradient in the dense kernel."""
    (value, y), (dx, gradient) = jax.value_and_grad(lambda x, w: objective(apply_dense, x, w), (0, 1), has_aux=True)(
        x, multi_mode_product(frame.core, frame.U)
    )
    dK = [
        None
        if u is None
        else unfold(multi_mode_product(gradient, frame.U, transpose=True, skip=i), i) @ unfold(frame.Q[i], i).T
        for i, u in enumerate(frame.U)
    ]
    return value, y, dx, multi_mode_product(gradient, frame.U, transpose=True), tuple(dK)


def assert_close(actual, expected, tolerance, label=""):
    actual, expected = jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for (path, a), e in zip(actual, expected):
        scale = max(1.0, float(jnp.max(jnp.abs(e), initial=0)))
        name = f"{label} {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=0, atol=tolerance * scale, err_msg=name)
