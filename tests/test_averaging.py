import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdlrt_jax import active_rank, average, to_dense
from tests.helpers import dense64, orthonormality, random_kernel


@pytest.mark.parametrize("rank", [(2, 3, 2), (2, None, 3), (4, 5, 6)])
def test_the_average_is_that_of_the_tensors(x64, rng, rank):
    kernels = [random_kernel(rng, (4, 5, 6), rank) for _ in range(3)]
    weights = (0.5, 0.3, 0.2)
    expected = sum(weight * to_dense(kernel) for weight, kernel in zip(weights, kernels))
    mean = jax.jit(lambda kernels: average(kernels, weights))(kernels)
    np.testing.assert_allclose(to_dense(mean), expected, atol=1e-12)
    assert orthonormality(mean) < 1e-12
    factors = [
        None if r is None else sum(w * k.factors[i] for w, k in zip(weights, kernels)) for i, r in enumerate(rank)
    ]
    by_factors = to_dense(
        kernels[0]._replace(core=sum(w * k.core for w, k in zip(weights, kernels)), factors=tuple(factors))
    )
    assert np.linalg.norm(by_factors - expected) > 0.3 * np.linalg.norm(expected)  # what this is for


def test_equal_kernels_keep_their_rank_whatever_their_padding():
    kernel = random_kernel(np.random.default_rng(0), (5, 6, 7), (2, 3, 2), dtype=jnp.float32)
    padded = random_kernel(np.random.default_rng(0), (5, 6, 7), (2, 3, 2), (4, 4, 4), jnp.float32)
    mean = average([kernel, padded])
    assert active_rank(mean).tolist() == [2, 3, 2]
    np.testing.assert_allclose(dense64(mean), dense64(kernel), atol=1e-5)
    assert average([kernel, padded], capacity=(2, 3, 2)).core.shape == (2, 3, 2)


def test_kernels_that_do_not_fit_together_are_refused(rng):
    kernel = random_kernel(rng, (4, 5), (2, 2))
    for others in ([], [kernel, random_kernel(rng, (4, 6), (2, 2))], [kernel, random_kernel(rng, (4, 5), (2, None))]):
        with pytest.raises(ValueError, match="one shape"):
            average(others)
    with pytest.raises(ValueError, match=r"weights=\[1.0\]: expected 2 numbers, one a kernel"):
        average([kernel, kernel], [1.0])
