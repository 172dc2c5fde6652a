"""Matricized kernels: the convolution of their dense counterpart, and the gradients of Theorem 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tdlrt_jax
from tdlrt_jax.baselines import CPTensor, matrix_conv, two_factors
from tdlrt_jax.conv import tucker_conv
from tests.helpers import random_kernel

CASES = {
    "plain": {"window": (3, 3), "options": {}},
    "strided": {"window": (3, 2), "options": {"strides": (2, 1), "padding": ((1, 0), (0, 2))}},
    "dilated": {"window": (2, 3), "options": {"dilation": 2, "padding": "VALID"}},
    "circular": {"window": (3, 3), "options": {"padding": "CIRCULAR"}},
    "one dimension": {"window": (3,), "options": {"padding": "CAUSAL"}},
}


@pytest.fixture(params=CASES)
def case(request, x64, rng):
    window, options = CASES[request.param]["window"], CASES[request.param]["options"]
    kernel = random_kernel(rng, (int(np.prod(window)) * 4, 6), (3, 3), (4, 5))
    x = jnp.asarray(rng.normal(size=(2, *(7, 6)[: len(window)], 4)))
    return kernel, window, options, x


def dense(matrix, x, window, options):
    return tucker_conv(x, matrix.reshape(*window, x.shape[-1], -1), **options)


def test_it_is_the_convolution_by_the_dense_kernel(case):
    kernel, window, options, x = case
    expected = dense(tdlrt_jax.to_dense(kernel), x, window, options)
    np.testing.assert_allclose(matrix_conv(x, kernel, window, **options), expected, atol=1e-12)
    np.testing.assert_allclose(matrix_conv(x, tdlrt_jax.lift(kernel), window, **options), expected, atol=1e-12)


def test_two_factors_are_the_same_matrix_with_evenly_shared_singular_values(case):
    """As a convolution too, whose gradients are those through the dense kernel."""
    kernel, window, options, x = case
    first, last = two_factors(kernel).factors
    matrix = tdlrt_jax.to_dense(kernel)
    np.testing.assert_allclose(first @ last.T, matrix, atol=1e-12)
    values = np.linalg.svd(matrix, compute_uv=False)[: first.shape[1]]
    for factor in (first, last):
        np.testing.assert_allclose(factor.T @ factor, np.diag(values), atol=1e-12)

    def ours(x, factors):
        return jnp.sum(jnp.sin(matrix_conv(x, CPTensor(factors), window, **options)))

    def oracle(x, factors):
        return jnp.sum(jnp.sin(dense(factors[0] @ factors[1].T, x, window, options)))

    found, expected = (jax.value_and_grad(f, argnums=(0, 1))(x, (first, last)) for f in (ours, oracle))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), found, expected)


def test_one_pass_gives_the_gradients_of_theorem_1(case):
    """Those of the chart, through the dense kernel; the input's too, and both also as ordinary factor gradients."""
    kernel, window, options, x = case

    def ours(pair):
        return jnp.sum(jnp.sin(matrix_conv(pair["x"], pair["w"], window, **options)))

    def oracle(pair):
        return jnp.sum(jnp.sin(dense(tdlrt_jax.to_dense(pair["w"]), pair["x"], window, options)))

    pair = {"x": x, "w": kernel}
    for gradient in (tdlrt_jax.value_and_grad, jax.value_and_grad):
        (value, grads), (expected_value, expected) = gradient(ours)(pair), gradient(oracle)(pair)
        assert float(value) == pytest.approx(float(expected_value), rel=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), grads, expected)


def test_forward_mode_and_hessian_vector_products_work_on_the_tucker_tensor(case):
    kernel, window, options, x = case

    def loss(kernel):
        return jnp.sum(jnp.sin(matrix_conv(x, kernel, window, **options)))

    ones = jax.tree.map(jnp.ones_like, kernel)
    _, product = jax.jvp(jax.grad(loss), (kernel,), (ones,))
    e = 1e-5
    up, down = (jax.grad(loss)(jax.tree.map(lambda k, s=s: k + s * e, kernel)) for s in (1, -1))
    jax.tree.map(lambda p, a, b: np.testing.assert_allclose(p, (a - b) / (2 * e), atol=1e-5), product, up, down)


@pytest.mark.parametrize("integrator", ["bug", "parallel", "fixed_rank"])
def test_matrix_dlrt_descends_with_orthonormal_factors(integrator, rng):
    kernel = random_kernel(rng, (9 * 3, 8), (2, 2), (6, 6), jnp.float32)
    x = jnp.asarray(rng.normal(size=(4, 5, 5, 3)), jnp.float32)
    y = matrix_conv(x, random_kernel(rng, (9 * 3, 8), (2, 2), dtype=jnp.float32), (3, 3))
    tx = tdlrt_jax.tdlrt(optax.sgd(1.0, momentum=0.5), tolerance=0.05, integrator=integrator)
    step = tdlrt_jax.tdlrt_step(lambda p, x, y: jnp.mean((matrix_conv(x, p["w"], (3, 3)) - y) ** 2), tx, donate=False)
    params = {"w": kernel}
    state, losses = tx.init(params), []
    for _ in range(15):
        params, state, info = step(params, state, x, y)
        losses.append(float(info.loss))
    assert losses[-1] < 0.5 * losses[0]
    for factor in params["w"].factors:
        u = np.asarray(factor, np.float64)
        assert np.abs(u.T @ u - np.diag(u.any(0))).max() < 1e-5


def test_kernels_that_do_not_fit_are_refused(rng):
    x = jnp.ones((1, 5, 5, 4))
    with pytest.raises(ValueError, match=r"two modes .*, got 4 modes, of which 0 are whole"):
        matrix_conv(x, random_kernel(rng, (3, 3, 4, 6), (2, 2, 2, 2)), (3, 3))
    with pytest.raises(ValueError, match=r"of which 1 are whole"):
        matrix_conv(x, random_kernel(rng, (36, 6), (None, 2)), (3, 3))
    with pytest.raises(ValueError, match=r"kernel has 35 rows: expected prod\(window\) \* in for window=\(3, 3\)"):
        matrix_conv(x, random_kernel(rng, (35, 6), (2, 2)), (3, 3))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_images_of_integers_are_taken_to_the_kernel_s_dtype(dtype):
    x = jax.random.randint(jax.random.key(0), (2, 6, 6, 4), 0, 255).astype(dtype)
    kernel = tdlrt_jax.hosvd(jax.random.normal(jax.random.key(1), (36, 5)), rank=3)
    found = matrix_conv(x, kernel, (3, 3))
    np.testing.assert_array_equal(found, matrix_conv(x.astype(jnp.float32), kernel, (3, 3)))
    assert found.dtype == jnp.float32 and float(jnp.max(jnp.abs(found))) > 1
