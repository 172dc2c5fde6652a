"""A convolution by another way, matrix products or with one channel more, is the same convolution."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import tdlrt, tdlrt_step, to_dense, tucker_conv
from tdlrt_jax.conv import patches
from tdlrt_jax.conv.blocks import in_blocks
from tdlrt_jax.conv.convolution import convolve, kernel_gradient
from tdlrt_jax.conv.geometry import resolve
from tdlrt_jax.conv.patches import convolve_by_patches, product_of_patches
from tdlrt_jax.conv.rows import contract_rows
from tdlrt_jax.frame import chart_point, lift, with_point
from tests.conv.cases import compiled
from tests.helpers import random_kernel

CASES = [
    ((3, 3), 20, {}),
    ((3, 2), 20, {"strides": (2, 1), "padding": ((1, 0), (0, 2))}),
    ((2, 3), 17, {"dilation": 2, "padding": "VALID"}),
    ((3, 3), 3, {"strides": 2}),
    ((3,), 16, {"padding": "CAUSAL"}),
    ((3, 3), 16, {"padding": ((2, 1), (1, 2)), "input_dilation": 2}),
    ((3, 3), 4, {"groups": 2}),
]


def drawn(rng, window, channels, options, images=6, n_out=6):
    """The geometry of a case, with an input and a kernel."""
    image = (7, 6)[: len(window)]
    geometry, _ = resolve(window, image, **options)
    x = jnp.asarray(rng.normal(size=(images, *image, channels * geometry.groups)))
    return geometry, x, jnp.asarray(rng.normal(size=(*window, channels, n_out)))


@pytest.fixture(params=["all at once", "two at a time", "four at a time", "one by one"])
def in_parts(request, monkeypatch):
    """However few images fit at once of the six that a test draws, and whether or not they come out even."""
    images = {"two at a time": 2, "four at a time": 4, "one by one": 1}.get(request.param)
    monkeypatch.setattr(patches, "_images_at_once", lambda x, shape, geometry: images or x.shape[0])


@pytest.mark.parametrize("window, channels, options", CASES)
def test_patches_in_parts_give_the_convolution_with_both_its_gradients(window, channels, options, in_parts, x64, rng):
    geometry, x, kernel = drawn(rng, window, channels, options)

    def of(way):
        return lambda x, kernel: jnp.sum(jnp.sin(way(x, kernel, geometry)))

    found, expected = (
        jax.value_and_grad(of(way), argnums=(0, 1))(x, kernel) for way in (convolve_by_patches, convolve)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), found, expected)


@pytest.fixture
def fast_patches(monkeypatch):
    """A convolution's derivative in its kernel is taken by patches, however little there is to do, two images at a time."""
    monkeypatch.setattr(patches, "_MUCH_WORK", 0)
    monkeypatch.setattr(patches, "_POSITIONS_A_CHANNEL", 100)
    monkeypatch.setattr(patches, "_images_at_once", lambda *_: 2)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize("window, channels, options", CASES)
def test_with_fast_patches_a_convolution_has_the_same_derivatives(window, channels, options, fast_patches, x64, rng):
    """In both modes, to second order, mapped over, and in one argument alone."""
    geometry, x, kernel = drawn(rng, window, channels, options)
    dx, dkernel = (jnp.asarray(rng.normal(size=a.shape)) for a in (x, kernel))
    fast = geometry.groups == 1

    def ours(x, kernel):
        return convolve(x, kernel, geometry)

    def plain(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC") if len(window) == 2 else ("NHC", "HIO", "NHC")
        how = (geometry.strides, geometry.padding, geometry.input_dilation, geometry.dilation, layout)
        return jax.lax.conv_general_dilated(x, kernel, *how, feature_group_count=geometry.groups)

    def derivatives(f):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(f(x, kernel)))

        gradient = jax.grad(loss, argnums=(0, 1))
        return {
            "forward": jax.jvp(f, (x, kernel), (dx, dkernel)),
            "kernel's alone": jax.jvp(lambda kernel: f(x, kernel), (kernel,), (dkernel,)),
            "reverse": gradient(x, kernel),
            "Hessian-vector product": jax.jvp(gradient, (x, kernel), (dx, dkernel))[1],
            "reverse twice": jax.grad(lambda x, k: jnp.vdot(gradient(x, k)[1], dkernel), argnums=(0, 1))(x, kernel),
            "mapped over": jax.vmap(gradient)(jnp.stack([x, dx]), jnp.stack([kernel, dkernel])),
            "transpose in the input": jax.linear_transpose(lambda x: f(x, kernel), x)(f(dx, kernel)),
        }

    found, expected = derivatives(ours), derivatives(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), found, expected)
    assert ("scan" in str(jax.make_jaxpr(jax.grad(lambda k: jnp.sum(ours(x, k))))(kernel))) == fast


def test_derivatives_by_patches_keep_their_dtypes(fast_patches, rng):
    """Sums over parts are in float32; kernels of bfloat16 get a gradient of bfloat16, and results the dtype asked for."""
    geometry, x, kernel = drawn(rng, (3, 3), 8, {})
    exact = jax.grad(lambda kernel: jnp.sum(jnp.sin(convolve(x, kernel, geometry))))(kernel)
    short = [a.astype(jnp.bfloat16) for a in (x, kernel)]
    for result in (None, jnp.float32):

        def loss(x, kernel, result=result):
            y = convolve(x, kernel, geometry, preferred_element_type=result)
            assert y.dtype == (result or jnp.bfloat16)
            return jnp.sum(jnp.sin(y.astype(jnp.float32)))

        dx, dkernel = jax.grad(loss, argnums=(0, 1))(*short)
        assert dx.dtype == dkernel.dtype == jnp.bfloat16
        assert jnp.linalg.norm(dkernel.astype(jnp.float32) - exact) < 0.05 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(
    "channels, n_out, padded", [(3, 20, True), (7, 34, True), (4, 20, False), (3, 16, False), (1, 20, False)]
)
def test_an_odd_number_of_channels_is_made_even_and_changes_nothing(channels, n_out, padded, x64, rng):
    geometry, _ = resolve((3, 3), (7, 6), strides=2)
    x = jnp.asarray(rng.normal(size=(2, 7, 6, channels)))
    kernel = jnp.asarray(rng.normal(size=(3, 3, channels, n_out)))

    def ours(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, geometry)))

    def plain(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, geometry.strides, geometry.padding, dimension_numbers=layout)
        return jnp.sum(jnp.sin(y))

    found, expected = (jax.value_and_grad(f, argnums=(0, 1))(x, kernel) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), found, expected)
    if jax.default_backend() == "cpu":
        assert (f",{channels + 1}]" in str(jax.make_jaxpr(ours)(x, kernel))) == padded


STRIDED = [
    ((11, 11), 3, 8, {"strides": 2}, True),
    ((5, 4), 2, 16, {"strides": (2, 3), "padding": "VALID"}, True),
    ((3, 3), 4, 5, {"strides": 2, "padding": ((2, 0), (1, 4))}, True),
    ((3, 3), 1, 4, {"strides": 2, "padding": ((-1, 2), (0, -1))}, True),
    ((3, 3), 5, 4, {"strides": 2}, False),
    ((3, 3), 3, 18, {"strides": 2}, False),
    ((3, 2), 3, 4, {"strides": 2}, False),
    ((3, 3), 3, 4, {"strides": (2, 1)}, False),
    ((3, 3), 3, 4, {"strides": 2, "dilation": 2}, False),
]
# Without strides rows of the output must be of whole blocks: here of 24 pixels but for one.
OF_A_ROW = [
    ((3, 2), 1, 4, {"padding": "VALID"}, True),
    ((3, 3), 3, 8, {"padding": ((1, 1), (1, 0))}, True),
    ((5, 4), 8, 8, {"padding": ((0, 3), (2, 0))}, True),
    ((3, 2), 2, 3, {"padding": ((-1, 2), (1, -1))}, True),
    ((1, 2), 2, 3, {"padding": "VALID"}, True),
    ((3, 3), 3, 8, {}, False),
    ((3, 2), 8, 9, {"padding": "VALID"}, False),
    ((3, 2), 9, 1, {"padding": "VALID"}, False),
    ((3, 2), 1, 17, {"padding": "VALID"}, False),
    ((3, 3), 1, 4, {"dilation": (1, 2), "padding": ((0, 0), (3, 0))}, False),
    ((3, 3), 1, 4, {"input_dilation": 2, "padding": ((0, 0), (1, 0))}, False),
]


@pytest.mark.parametrize("window, channels, n_out, options, blocks", STRIDED + OF_A_ROW)
def test_few_channels_become_those_of_blocks_of_pixels(window, channels, n_out, options, blocks, x64, rng):
    """The same values and derivatives, to second order; the derivative in the kernel is taken without blocks."""
    geometry, _ = resolve(window, (26, 25), **options)
    x, kernel = (jnp.asarray(rng.normal(size=s)) for s in ((2, 26, 25, channels), (*window, channels, n_out)))
    direction = tuple(jnp.asarray(rng.normal(size=a.shape)) for a in (x, kernel))

    def derivatives(way):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(way(x, kernel, geometry)))

        gradient = jax.grad(loss, argnums=(0, 1))
        return loss(x, kernel), *jax.jvp(gradient, (x, kernel), direction)

    found, expected = (compiled(lambda w=way: derivatives(w))() for way in (convolve, product_of_patches))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), found, expected)
    if jax.default_backend() == "cpu":
        y, program = convolve(x, kernel, geometry), jax.make_jaxpr(lambda x: convolve(x, kernel, geometry))(x)
        gradient = jax.make_jaxpr(lambda dy: kernel_gradient(x, dy, window, geometry))(y)
        assert ("reshape" in str(program) and "reshape" not in str(gradient)) == blocks


def test_a_row_is_of_whole_blocks():
    geometry, _ = resolve((3, 3), (8, 7))
    with pytest.raises(ValueError, match=r"blocks=\(1, 2\) are of 2 pixels of a row of the output, which has 7"):
        in_blocks(jnp.ones((1, 8, 7, 2)), jnp.ones((3, 3, 2, 3)), geometry, (1, 2))


@pytest.mark.parametrize(
    "padding, other",
    [(p, 0) for p in [(-1, 2), (-2, 1), (0, 5), (-1, -1), (2, -1)]] + [(p, 2) for p in [(4, 0), (3, 1)]],
)
@pytest.mark.parametrize("strides, input_dilation", [(1, 1), (2, 1), (1, 2)])
def test_images_may_be_cut_off_and_padded_beyond_the_window(padding, other, strides, input_dilation, rng):
    """XLA's CPU convolution in float32 takes what lies in memory beyond an image that is cut off before and padded behind."""
    geometry, _ = resolve(
        (3, 3), (9, 8), strides=strides, padding=(padding, (other, other)), input_dilation=input_dilation
    )
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 9, 8, 6), (3, 3, 6, 5)))

    def of(way):
        return compiled(jax.value_and_grad(lambda x, kernel: jnp.sum(jnp.sin(way(x, kernel, geometry))), (0, 1)))

    found, expected = (of(way)(x, kernel) for way in (convolve, product_of_patches))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)


def test_amortized_steps_are_those_of_a_second_pass(x64, rng):
    """With enough channels for a product a position; the adaptation at the first and fourth step lies in a cond."""
    params = {"w": random_kernel(rng, (3, 3, 36, 36), (None, None, 18, 18))}
    x, y = (jnp.asarray(rng.normal(size=(2, 5, 5, 36))) for _ in range(2))
    tx = tdlrt(optax.sgd(1.0, momentum=0.9), tolerance=0.02, adapt_every=3)

    def loss_fn(params, x, y):
        return jnp.mean((tucker_conv(x, params["w"], plan="factored") - y) ** 2)

    ends = []
    for second_pass in (False, True):
        step = tdlrt_step(loss_fn, tx, donate=False, second_pass=second_pass)
        current, state = params, tx.init(params)
        for _ in range(4):
            current, state, _ = step(current, state, x, y)
        ends.append(to_dense(current["w"]))
    np.testing.assert_allclose(*ends, atol=1e-10)


@pytest.mark.parametrize("window, channels, options", CASES)
@pytest.mark.parametrize("products", [False, True])
def test_a_kernels_gradient_is_the_transpose_of_the_convolution(
    window, channels, options, products, in_parts, x64, rng
):
    geometry, x, kernel = drawn(rng, window, channels, options)
    y, pull = jax.vjp(lambda k: convolve(x, k, geometry), kernel)
    dy = jnp.asarray(rng.normal(size=y.shape))
    found = kernel_gradient(x, dy, window, geometry, products=products)
    np.testing.assert_allclose(found, pull(dy)[0], atol=1e-10)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere XLA's convolution is kept")
@pytest.mark.parametrize(
    "window, channels, n_out, image, by_patches",
    [
        ((3, 3), 24, 24, 64, True),
        ((3, 3), 3, 64, 128, True),
        ((3, 3), 128, 128, 16, True),
        ((3, 3), 8, 8, 64, False),  # little work
        ((7, 7), 3, 64, 64, False),  # many positions of few channels
        ((1, 1), 128, 128, 64, False),
        ((3, 3), 64, 64, 512, False),  # patches of one image do not fit
    ],
)
def test_with_much_to_do_a_kernels_gradient_is_a_product_of_patches(window, channels, n_out, image, by_patches):
    geometry, _ = resolve(window, (image, image), padding="SAME")
    x, dy = (jax.ShapeDtypeStruct((8, image, image, size), jnp.float32) for size in (channels, n_out))
    jaxpr = str(jax.make_jaxpr(lambda x, dy: kernel_gradient(x, dy, window, geometry))(x, dy))
    assert ("concatenate" in jaxpr) == by_patches
    (batch,) = jax.export.symbolic_shape("batch")
    kernel = jax.ShapeDtypeStruct((*window, channels, n_out), jnp.float32)
    assert not patches.has_fast_patches(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), kernel, geometry)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere XLA's convolution is kept")
@pytest.mark.parametrize("images, at_once", [(128, 2), (127, 3), (126, 3), (2, 2), (1, 1), (0, 0)])
def test_patches_are_taken_of_as_many_images_as_fit_and_evenly_if_that_can_be(images, at_once):
    geometry, _ = resolve((3, 3), (32, 32))
    x = jax.ShapeDtypeStruct((images, 32, 32, 32), jnp.float32)  # 1.1 MiB of patches an image
    assert patches._images_at_once(x, (3, 3, 32, 32), geometry) == at_once


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere XLA's convolution is kept")
@pytest.mark.parametrize("layer", ["frame", "factors", "array"])
def test_a_convolutions_gradients_need_a_few_images_patches_at_once(layer, rng):
    """Not all images' at once, 72 MiB in each layer."""
    x = jax.ShapeDtypeStruct((64, 32, 32, 32), jnp.float32)
    kernel = random_kernel(rng, (3, 3, 32, 32), (None, None, None, None), dtype=np.float32)
    kernel = {"frame": lift(kernel), "factors": kernel, "array": to_dense(kernel)}[layer]

    def gradient(kernel, x):
        def loss(point, x):
            current = with_point(kernel, point) if layer == "frame" else point
            return jnp.sum(jnp.sin(tucker_conv(jnp.sin(tucker_conv(x, current)), current)))

        return jax.grad(loss)(chart_point(kernel) if layer == "frame" else kernel, x)

    temporary = compiled(gradient).lower(kernel, x).compile().memory_analysis().temp_size_in_bytes
    # Five of the activations' arrays of 8 MiB; with XLA's own gradients six, with all patches side by side fourteen or more.
    assert temporary < 44 * 2**20


@pytest.mark.parametrize("rows", [(1,), (7, 3), (2, 1024), (3, 4096), (8, 32, 32), (4, 64, 64)])
@pytest.mark.parametrize("sizes", [(3, 5), (40, 3), (3, 40), (64, 33)])
def test_rows_are_contracted(rows, sizes, x64, rng):
    a, b = (jnp.asarray(rng.normal(size=(*rows, size))) for size in sizes)
    found = contract_rows(a, b)
    np.testing.assert_allclose(found, a.reshape(-1, sizes[0]).T @ b.reshape(-1, sizes[1]), atol=1e-10)
    short = contract_rows(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), dtype=jnp.float32)
    assert short.dtype == jnp.float32


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="as it comes elsewhere")
@pytest.mark.parametrize("sizes", [(64, 4), (4, 64)])
def test_the_product_is_compiled_with_few_rows(sizes):
    a, b = (jax.ShapeDtypeStruct((4096, size), jnp.float32) for size in sizes)
    products = re.findall(r"= f32\[([\d,]*)\]\S* dot\(", compiled(contract_rows).lower(a, b).compile().as_text())
    assert products == ["4,64"]
