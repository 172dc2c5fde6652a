"""Convolution by a Tucker kernel against loops over pixels, for every geometry, plan, rank and capacity."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tdlrt_jax import lift, tucker_linear, value_and_grad
from tdlrt_jax.conv import PLANS, choose_plan, count_work, tucker_conv, tucker_conv_transpose
from tests import references
from tests.properties.convolutions import Window, convolution, kernel_gradient, named_padding, transposed
from tests.properties.strategies import TOLERANCE, cases, forms, kernel_of, precision, ranks, seeds

# (window..., in / groups, out) and the image
LINES = (((1, 2, 3), (4,)), ((2, 3, 2), (5,)), ((3, 2, 4), (4,)))
PLANES = (((1, 1, 3, 4), (3, 4)), ((3, 2, 2, 3), (4, 3)), ((3, 3, 3, 2), (5, 4)), ((2, 3, 1, 4), (2, 2)))
VOLUMES = (((2, 1, 2, 2, 3), (3, 2, 2)), ((2, 2, 3, 1, 2), (2, 3, 3)))
LAYERS = (*LINES, *PLANES, *VOLUMES)
# Relative to the norms of kernel and window: one rounding a product, and one more a stage for bfloat16.
NEAR = {**TOLERANCE, "bfloat16": 0.03}
kinds = st.sampled_from(["float32", "float64", "bfloat16"])


@st.composite
def geometries(draw, window, image, grouped=True):
    """Options as the library takes them, and the same made explicit."""
    spatial = len(window)

    def per_dimension(high):
        value = draw(st.one_of(st.integers(1, high), st.tuples(*[st.integers(1, high)] * spatial)))
        return value, (value,) * spatial if isinstance(value, int) else value

    strides, all_strides = per_dimension(3)
    dilation, all_dilation = per_dimension(2)
    spread, all_spread = per_dimension(2)
    names = ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT"] + ["CAUSAL"] * (spatial == 1)
    pair = st.tuples(st.integers(-1, 3), st.integers(-1, 3))
    entry = st.one_of(st.integers(0, 3), pair)
    padding = draw(st.one_of(st.sampled_from(names), st.integers(0, 2), st.tuples(*[entry] * spatial)))
    border = "constant"
    if isinstance(padding, str):
        if padding != "VALID":
            spread, all_spread = 1, (1,) * spatial
        border = {"CIRCULAR": "wrap", "REFLECT": "reflect"}.get(padding, border)
        pads = named_padding(padding, image, window, all_strides, all_dilation)
    else:
        entries = (padding,) * spatial if isinstance(padding, int) else padding
        pads = tuple((e, e) if isinstance(e, int) else e for e in entries)
    groups = draw(st.sampled_from([1, 1, 2, 3])) if grouped else 1
    options = {"strides": strides, "padding": padding, "dilation": dilation, "input_dilation": spread}
    how = Window(all_strides, pads, all_dilation, all_spread, groups, border)
    return options | ({"groups": groups} if grouped else {}), how


@st.composite
def layers(draw, dtype, shapes=LAYERS, grouped=True, biggest=3):
    """A layer's input and kernel, in the library's arrays and for the loops."""
    shape, image = draw(st.sampled_from(shapes))
    options, how = draw(geometries(shape[:-2], image, grouped))
    shape = (*shape[:-1], shape[-1] * how.groups)
    form = draw(forms([shape]))
    stored = "float32" if dtype == "bfloat16" else dtype
    kernel = kernel_of(form, draw(ranks(form)), draw(seeds), stored)
    rng = np.random.default_rng(draw(seeds))
    x = jnp.asarray(rng.standard_normal((draw(st.integers(1, biggest)), *image, shape[-2] * how.groups)), dtype)
    return kernel, x, np.asarray(x, np.float64), options, how


def scale_of(x, weight, how):
    """No output pixel, and nothing that a plan computes on the way, is larger: ``||W||`` times a window's norm."""
    squares = convolution(x**2, np.ones(weight.shape), how._replace(groups=how.groups))
    return max(np.linalg.norm(weight) * math.sqrt(squares.max(initial=0.0)), 1e-30)


def assert_near(found, expected, tolerance):
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found, np.float64) - expected).max(initial=0.0) <= tolerance


@cases(ci=25, nightly=1000)
@given(st.data(), kinds)
def test_every_plan_is_the_convolution_of_the_dense_kernel(data, dtype):
    with precision(dtype):
        kernel, x, x64, options, how = data.draw(layers(dtype))
        weight = kernel.dense
        depthwise = how.groups > 1 and weight.shape[-2] == 1
        plan = data.draw(st.sampled_from([None, "dense"] if depthwise else [None, *PLANS]))
        given_kernel = data.draw(st.sampled_from(["tucker", "tucker", "tucker", "array"]))
        applied = jnp.asarray(weight, kernel.tucker.core.dtype) if given_kernel == "array" else kernel.tucker
        y = tucker_conv(x, applied, plan=plan, **options)
        assert y.dtype == dtype
        assert_near(y, convolution(x64, weight, how), NEAR[dtype] * scale_of(x64, weight, how))


@functools.partial(jax.jit, static_argnums=(3, 4))
def gradients(x, kernel, dy, plan, options):
    def loss(both):
        return jnp.sum(tucker_conv(both["x"], both["w"], plan=plan, **dict(options)) * dy)

    return lift(kernel).Q, value_and_grad(loss)({"x": x, "w": kernel})


@cases(ci=8, nightly=500)
@given(st.data(), st.sampled_from(["float32", "float64"]))
def test_gradients_are_the_projections_of_the_dense_one(data, dtype):
    """``dC = G ×_j U_j^T`` and ``dK_i = Mat_i(G ×_{j != i} U_j^T) Q_i`` of the dense gradient ``G``, and ``dx`` its adjoint."""
    with precision(dtype):
        kernel, x, x64, options, how = data.draw(layers(dtype, biggest=2))
        weight = kernel.dense
        depthwise = how.groups > 1 and weight.shape[-2] == 1
        plan = data.draw(st.sampled_from([None, "dense"] if depthwise else [None, *PLANS]))
        y = convolution(x64, weight, how)
        rng = np.random.default_rng(data.draw(seeds))
        dy = rng.standard_normal(y.shape).astype(dtype)
        Q, (value, found) = gradients(x, kernel.tucker, jnp.asarray(dy), plan, tuple(options.items()))

        dense = kernel_gradient(x64, weight.shape, dy.astype(float), how)
        size = np.linalg.norm(x64) * np.linalg.norm(dy) * max(np.linalg.norm(weight), 1.0)
        size *= math.sqrt(math.prod(weight.shape[:-2]))
        near = TOLERANCE[dtype] * max(size, 1e-30)
        assert abs(float(value) - np.sum(y * dy)) <= near
        rank = kernel.core.shape
        dC = np.zeros(kernel.tucker.core.shape)
        dC[tuple(map(slice, rank))] = references.core_gradient(dense, kernel.factors)
        assert_near(found["w"].core, dC, near)
        for mode, (factor, dK) in enumerate(zip(kernel.factors, found["w"].factors)):
            if factor is None:
                assert dK is None
                continue
            q = references.unfold(np.asarray(Q[mode], float)[tuple(map(slice, rank))], mode).T
            assert np.abs(q.T @ q - np.eye(rank[mode])).max() <= 10 * TOLERANCE[dtype]
            expected = np.zeros(dK.shape)
            expected[:, : rank[mode]] = (
                references.unfold(
                    references.mode_products(dense, references.transposes(kernel.factors), skip=mode), mode
                )
                @ q
            )
            assert_near(dK, expected, near)
        # The output is linear in the image: <dx, v> = <conv(v), dy> for every v.
        v = rng.standard_normal(x64.shape)
        moved = np.sum(convolution(v, weight, how) * dy)
        assert abs(np.sum(np.asarray(found["x"], float) * v) - moved) <= near * np.linalg.norm(v)


TRANSPOSED = (*LINES, *PLANES, VOLUMES[0])


@cases(ci=20, nightly=700)
@given(st.data(), kinds)
def test_the_transposed_convolution_scatters_every_pixel(data, dtype):
    with precision(dtype):
        shape, image = data.draw(st.sampled_from(TRANSPOSED))
        window, spatial = shape[:-2], len(image)
        many = st.one_of(st.integers(1, 3), st.tuples(*[st.integers(1, 3)] * spatial))
        strides, dilation = data.draw(many), data.draw(many)
        every_stride, every_dilation = (
            (value,) * spatial if isinstance(value, int) else value for value in (strides, dilation)
        )
        pair = st.tuples(st.integers(0, 3), st.integers(0, 3))
        padding = data.draw(
            st.one_of(st.sampled_from(["SAME", "VALID"]), st.integers(0, 2), st.tuples(*[pair] * spatial))
        )
        pads = [padding] * spatial if isinstance(padding, str | int) else padding
        extent = [(k - 1) * d + 1 for k, d in zip(window, every_dilation)]
        pads = tuple(transposed_pads(*entry) for entry in zip(pads, extent, every_stride))
        form = data.draw(forms([shape]))
        stored = "float32" if dtype == "bfloat16" else dtype
        kernel = kernel_of(form, data.draw(ranks(form)), data.draw(seeds), stored)
        rng = np.random.default_rng(data.draw(seeds))
        x = jnp.asarray(rng.standard_normal((2, *image, shape[-2])), dtype)
        x64, weight = np.asarray(x, float), kernel.dense
        plan = data.draw(st.sampled_from([None, *PLANS]))
        y = tucker_conv_transpose(x, kernel.tucker, strides=strides, padding=padding, dilation=dilation, plan=plan)
        expected = transposed(x64, weight, every_stride, pads, every_dilation)
        squares = transposed(x64**2, np.ones(weight.shape), every_stride, pads, every_dilation)
        scale = np.linalg.norm(weight) * math.sqrt(squares.max(initial=0.0)) + 1e-30
        assert_near(y, expected, NEAR[dtype] * scale)
        if padding == "SAME":
            assert y.shape[1:-1] == tuple(n * s for n, s in zip(image, every_stride))


def transposed_pads(padding, extent, stride):
    """Pixels around the dilated image. SAME: the output is stride times as large; VALID: nothing is cut off."""
    if padding == "SAME":
        total = extent + stride - 2
        before = extent - 1 if stride > extent - 1 else math.ceil(total / 2)
        return before, total - before
    if padding == "VALID":
        return extent - 1, extent - 1 + max(stride - extent, 0)
    return (padding, padding) if isinstance(padding, int) else padding


@cases(ci=15, nightly=500)
@given(st.data(), kinds)
def test_a_linear_layer_is_a_matrix_product(data, dtype):
    with precision(dtype):
        form = data.draw(forms([(1, 4), (5, 1), (6, 5), (4, 9)]))
        stored = "float32" if dtype == "bfloat16" else dtype
        kernel = kernel_of(form, data.draw(ranks(form)), data.draw(seeds), stored)
        lead = data.draw(st.sampled_from([(), (3,), (2, 3), (0,), (1, 2, 2)]))
        rng = np.random.default_rng(data.draw(seeds))
        x = jnp.asarray(rng.standard_normal((*lead, form.shape[0])), dtype)
        y = tucker_linear(x, kernel.tucker, plan=data.draw(st.sampled_from([None, *PLANS])))
        x64, weight = np.asarray(x, float), kernel.dense
        largest = np.sqrt(np.sum(x64**2, axis=-1)).max(initial=1e-30)
        assert y.dtype == dtype
        assert_near(y, x64 @ weight, NEAR[dtype] * largest * np.linalg.norm(weight))


@cases(ci=30, nightly=600)
@given(st.data())
def test_the_counted_work_and_the_choice(data):
    """A plan that is chosen counts no more than the dense one, whose forward pass is counted by looking at every pixel."""
    shape, image = data.draw(st.sampled_from(LAYERS[1:]))
    options, how = data.draw(geometries(shape[:-2], image))
    shape = (*shape[:-1], shape[-1] * how.groups)
    form = data.draw(forms([shape]))
    rank = tuple(None if w else r for r, w in zip(form.capacity, form.whole))
    x_shape = (data.draw(st.integers(1, 40)), *image, shape[-2] * how.groups)
    work = {plan: count_work(plan, shape, rank, x_shape, **options) for plan in PLANS}
    pixels = convolution(np.ones((1, *image, how.groups)), np.ones((*shape[:-2], 1, how.groups)), how)[..., 0].size
    assert work["dense"].forward == x_shape[0] * pixels * math.prod(shape)
    assert all(entry.backward == 2 * entry.forward for entry in work.values())
    for device in ("cpu", "gpu"):
        chosen = choose_plan(shape, rank, x_shape, device=device, **options)
        assert work[chosen].total <= work["dense"].total
