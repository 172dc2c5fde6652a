"""Balanced Tucker kernels: the same kernel, its singular values in all parts alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdlrt_jax import TuckerTensor, hosvd, to_dense
from tdlrt_jax.baselines import balance
from tdlrt_jax.initialization import tucker_spectral


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (3, 3, 5, 4)])
def test_the_kernel_stays(shape, x64, rng):
    kernel = hosvd(jnp.asarray(rng.normal(size=shape)))
    np.testing.assert_allclose(to_dense(balance(kernel)), to_dense(kernel), atol=1e-13)


def test_every_part_gets_the_same_power_of_a_singular_value(x64):
    values = np.array([9.0, 1.0, 1e-3])
    core = jnp.zeros((3, 3, 3, 3)).at[(jnp.arange(3),) * 4].set(values)
    balanced = balance(TuckerTensor(core, tuple(jnp.eye(n, 3) for n in (4, 5, 6, 3))))
    for factor in balanced.factors:
        np.testing.assert_allclose(np.linalg.norm(factor, axis=0), values**0.2, rtol=1e-13)
    np.testing.assert_allclose(balanced.core[(jnp.arange(3),) * 4], values**0.2, rtol=1e-13)


def test_whole_modes_and_columns_beyond_the_rank_stay_as_they_are():
    core = jnp.zeros((2, 3)).at[0, 0].set(4.0)
    balanced = balance(TuckerTensor(core, (None, jnp.eye(5, 3).at[1:].set(0))))
    assert balanced.factors[0] is None
    np.testing.assert_allclose(balanced.core[0, 0] * balanced.factors[1][0, 0], 4.0, rtol=1e-6)
    assert balanced.core[0, 0] == pytest.approx(2.0)
    assert np.all(np.isfinite(balanced.core)) and not np.any(balanced.factors[1][:, 1:])


def test_singular_values_whose_squares_vanish_in_float32_are_shared_too():
    kernel = tucker_spectral(jax.random.key(0), (3, 3, 30, 30))
    sizes = np.linalg.norm(np.asarray(balance(kernel).factors[3], np.float64), axis=0)
    norms = np.sqrt(np.sum(np.asarray(kernel.core, np.float64) ** 2, axis=(0, 1, 2)))
    assert norms[-1] < 1e-25
    np.testing.assert_allclose(sizes, norms**0.2, rtol=1e-3)
