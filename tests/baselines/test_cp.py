"""CP kernels: the convolution of their dense counterpart, what they store, and how they start."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdlrt_jax.baselines import CPTensor, cp_als, cp_conv, cp_normal, cp_rank, cp_spectral, cp_to_dense
from tdlrt_jax.conv import tucker_conv

CASES = [
    ((3, 3), {}),
    ((3, 2), {"strides": (2, 1), "padding": ((1, 0), (0, 2))}),
    ((2, 3), {"dilation": 2, "padding": "VALID"}),
    ((3, 3), {"padding": "CIRCULAR", "strides": 2}),
    ((1, 1), {"strides": 2}),
    ((3,), {"padding": "CAUSAL"}),
]


@pytest.mark.parametrize("window, options", CASES)
def test_it_is_the_convolution_by_the_dense_kernel_and_so_are_its_gradients(window, options, x64, rng):
    kernel = CPTensor(tuple(jnp.asarray(rng.normal(size=(n, 5))) for n in (*window, 4, 6)))
    x = jnp.asarray(rng.normal(size=(2, *(7, 6)[: len(window)], 4)))

    def ours(kernel, x):
        return jnp.sum(jnp.sin(cp_conv(x, kernel, **options)))

    def oracle(kernel, x):
        return jnp.sum(jnp.sin(tucker_conv(x, cp_to_dense(kernel), **options)))

    np.testing.assert_allclose(
        cp_conv(x, kernel, **options), tucker_conv(x, cp_to_dense(kernel), **options), atol=1e-11
    )
    found, expected = (jax.grad(f, argnums=(0, 1))(kernel, x) for f in (ours, oracle))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), found, expected)


def test_the_dense_tensor_is_a_sum_of_outer_products(x64, rng):
    a, b, c = (rng.normal(size=(n, 2)) for n in (2, 3, 4))
    expected = sum(np.multiply.outer(np.multiply.outer(a[:, r], b[:, r]), c[:, r]) for r in range(2))
    np.testing.assert_allclose(cp_to_dense(CPTensor((jnp.array(a), jnp.array(b), jnp.array(c)))), expected, atol=1e-14)


def test_random_factors_have_the_norm_asked_for_on_average():
    shape, norm = (3, 3, 8, 16), 2.5
    kernels = jax.vmap(lambda key: cp_to_dense(cp_normal(key, shape, 64, norm=norm)))(
        jax.random.split(jax.random.key(0), 200)
    )
    squares = np.sum(np.asarray(kernels, np.float64) ** 2, axis=(1, 2, 3, 4))
    assert np.mean(squares) == pytest.approx(norm**2, rel=0.1)
    kernel = cp_normal(jax.random.key(1), shape, 64, norm=norm)
    assert sum(leaf.size for leaf in jax.tree.leaves(kernel)) == 64 * (3 + 3 + 8 + 16)


def test_factors_that_do_not_fit_are_refused():
    kernel = CPTensor(tuple(jnp.ones((n, 5)) for n in (3, 3, 4, 6)))
    with pytest.raises(ValueError, match=r"for x of shape \(1, 5, 5, 3\): expected .* with one R, and in = 3"):
        cp_conv(jnp.ones((1, 5, 5, 3)), kernel)
    with pytest.raises(ValueError, match="rank=0 must be a number of terms, 1 or more"):
        cp_normal(jax.random.key(0), (3, 3), 0, norm=1.0)


@pytest.mark.skipif(importlib.util.find_spec("tensorly") is None, reason="needs tensorly")
def test_alternating_least_squares_recover_a_low_rank_kernel(rng):
    exact = cp_to_dense(CPTensor(tuple(jnp.asarray(rng.normal(size=(n, 2)), jnp.float32) for n in (3, 3, 8, 6))))
    found = cp_als(exact, 2, iterations=500)
    assert jax.config.jax_enable_x64 is False
    assert float(jnp.linalg.norm(cp_to_dense(found) - exact) / jnp.linalg.norm(exact)) < 1e-2
    norms = np.array([np.linalg.norm(factor, axis=0) for factor in found.factors])
    np.testing.assert_allclose(norms, np.broadcast_to(norms[0], norms.shape), rtol=1e-4)


@pytest.mark.parametrize(("shape", "rank"), [((3, 3, 8, 6), 3), ((3, 3, 8, 6), 7)])
def test_spectral_terms_have_the_singular_values_asked_for(x64, shape, rank):
    kernel = cp_spectral(jax.random.key(0), shape, rank, norm=2.0, dtype=jnp.float64)
    dense = np.asarray(cp_to_dense(kernel))
    assert [factor.shape for factor in kernel.factors] == [(n, rank) for n in shape]
    norms = np.prod([np.linalg.norm(factor, axis=0) for factor in kernel.factors], axis=0)
    np.testing.assert_allclose(norms[1:] / norms[:-1], 0.1, rtol=1e-10)
    assert np.linalg.norm(dense) == pytest.approx(2.0, rel=1e-6 if rank == 3 else 1e-3)
    for mode, n in enumerate(shape):
        values = np.linalg.svd(np.moveaxis(dense, mode, 0).reshape(n, -1), compute_uv=False)
        known = min(n, rank, *shape)  # as many terms as are orthogonal in every mode
        np.testing.assert_allclose(values[:known] / values[0], 0.1 ** np.arange(known), rtol=0.02)


def test_ranks_as_fractions():
    assert cp_rank((3, 3, 64, 64), 1.0) == 275 and 275 * 134 <= 3 * 3 * 64 * 64 < 276 * 134
    assert cp_rank((3, 3, 4, 4), 0.001) == 1 and cp_rank((3, 3, 4, 4), 12) == 12
    for wrong in (0, 1.5, 0.0, -3):
        with pytest.raises(ValueError, match=f"rank={wrong}: expected a number of terms, 1 or more, or a fraction"):
            cp_rank((3, 3), wrong)


def test_a_decay_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"decay=1\.5: the ratio of successive norms"):
        cp_spectral(jax.random.key(0), (3, 3), 2, decay=1.5, norm=1.0)


def test_memory_does_not_grow_with_the_window():
    """What the entries of a window look at is not there at once, for gradients neither."""

    def temporaries(window):
        kernel = CPTensor(tuple(jnp.ones((n, 16)) for n in (window, window, 4, 8)))
        grad = jax.jit(jax.grad(lambda x, kernel: jnp.sum(cp_conv(x, kernel) ** 2), argnums=(0, 1)))
        compiled = grad.lower(jnp.ones((8, 32, 32, 4)), kernel).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(11) < 2 * temporaries(3)


def test_a_window_that_lies_outside_of_the_image():
    kernel = cp_normal(jax.random.key(0), (3, 3, 4, 5), 2, norm=1.0)
    assert cp_conv(jnp.ones((2, 2, 3, 4)), kernel, padding="VALID", dilation=2).shape == (2, 0, 0, 5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_factors_of_16_bits(dtype):
    """Counts of entries that overflow them, and a factorization that is not there for them."""
    shape, key = (3, 3, 64, 64), jax.random.key(0)
    for draw in (cp_normal, cp_spectral):
        wide, narrow = (draw(key, shape, 27, norm=8.0, dtype=kind) for kind in (jnp.float32, dtype))
        for expected, factor in zip(wide.factors, narrow.factors):
            assert factor.dtype == dtype
            np.testing.assert_allclose(factor.astype(jnp.float32), expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_images_of_integers_are_taken_to_the_kernel_s_dtype(dtype):
    x = jax.random.randint(jax.random.key(0), (2, 6, 6, 4), 0, 255).astype(dtype)
    kernel = cp_normal(jax.random.key(1), (3, 3, 4, 5), 3, norm=1.0)
    found = cp_conv(x, kernel)
    np.testing.assert_array_equal(found, cp_conv(x.astype(jnp.float32), kernel))
    assert found.dtype == jnp.float32 and float(jnp.max(jnp.abs(found))) > 1
