"""A convolution by another way, matrix products or with one channel more, is the same convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import tdlrt, tdlrt_step, to_dense, tucker_conv
from tdlrt_jax.conv.convolution import convolve, kernel_gradient
from tdlrt_jax.conv.geometry import resolve
from tdlrt_jax.conv.rows import contract_rows
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


@pytest.mark.parametrize("window, channels, options", CASES)
def test_products_are_the_convolution_with_both_its_gradients(window, channels, options, x64, rng):
    image = (7, 6)[: len(window)]
    geometry, _ = resolve(window, image, **options)
    x = jnp.asarray(rng.normal(size=(2, *image, channels * geometry.groups)))
    kernel = jnp.asarray(rng.normal(size=(*window, channels, 6)))

    def of(products):
        return lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, geometry, products=products)))

    found, expected = (jax.value_and_grad(of(p), argnums=(0, 1))(x, kernel) for p in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), found, expected)


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
def test_a_kernels_gradient_is_the_transpose_of_the_convolution(window, channels, options, products, x64, rng):
    image = (7, 6)[: len(window)]
    geometry, _ = resolve(window, image, **options)
    x = jnp.asarray(rng.normal(size=(2, *image, channels * geometry.groups)))
    y, pull = jax.vjp(lambda k: convolve(x, k, geometry), jnp.zeros((*window, channels, 6)))
    dy = jnp.asarray(rng.normal(size=y.shape))
    found = kernel_gradient(x, dy, window, geometry, products=products)
    np.testing.assert_allclose(found, pull(dy)[0], atol=1e-10)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere XLA's convolution is kept")
@pytest.mark.parametrize(
    "channels, n_out, image, products", [(24, 24, 64, True), (8, 8, 64, False), (128, 8, 64, False)]
)
def test_many_pixels_of_several_channels_take_products_for_a_kernels_gradient(channels, n_out, image, products):
    geometry, _ = resolve((3, 3), (image, image), padding="SAME")
    x, dy = (jax.ShapeDtypeStruct((8, image, image, size), jnp.float32) for size in (channels, n_out))
    jaxpr = str(jax.make_jaxpr(lambda x, dy: kernel_gradient(x, dy, (3, 3), geometry))(x, dy))
    assert ("conv_general_dilated" not in jaxpr) == products


@pytest.mark.parametrize("rows", [(1,), (7, 3), (2, 1024), (3, 4096), (8, 32, 32), (4, 64, 64)])
@pytest.mark.parametrize("sizes", [(3, 5), (40, 3), (3, 40), (64, 33)])
def test_rows_are_contracted_in_chunks_or_at_once(rows, sizes, x64, rng):
    a, b = (jnp.asarray(rng.normal(size=(*rows, size))) for size in sizes)
    found = contract_rows(a, b)
    np.testing.assert_allclose(found, a.reshape(-1, sizes[0]).T @ b.reshape(-1, sizes[1]), atol=1e-10)
    short = contract_rows(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), dtype=jnp.float32)
    assert short.dtype == jnp.float32


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere the product is taken whole")
@pytest.mark.parametrize(
    "rows, chunks", [(1024, 1), (4096, 1), (8192, 8), (16384, 8), (131072, 64), (3 * 2**13, 8), (9999, 1)]
)
def test_chunks_are_eight_or_more_of_one_or_two_thousand_rows(rows, chunks):
    a, b = jax.ShapeDtypeStruct((rows, 4), jnp.float32), jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    (product,) = [e for e in jax.make_jaxpr(contract_rows)(a, b).eqns if e.primitive.name == "dot_general"]
    assert product.invars[0].aval.shape[0] == chunks
