import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdlrt_jax import TuckerTensor, active_rank, kernel_paths, parameter_count, to_dense
from tdlrt_jax.tucker import fold, kernel_shape, mode_product, multi_mode_product, unfold
from tests.helpers import random_kernel

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)


@given(shapes, st.data())
def test_fold_inverts_unfold(shape, data):
    mode = data.draw(st.integers(0, len(shape) - 1))
    tensor = jnp.arange(float(np.prod(shape))).reshape(shape)
    matrix = unfold(tensor, mode)
    assert matrix.shape == (shape[mode], tensor.size // shape[mode])
    np.testing.assert_array_equal(fold(matrix, mode, shape), tensor)


def test_unfolding_of_a_mode_product_is_a_matrix_product(x64, rng):
    """Mat_i(W ×_i A) = A Mat_i(W)."""
    tensor, matrix = jnp.array(rng.normal(size=(3, 4, 5))), jnp.array(rng.normal(size=(7, 4)))
    product = mode_product(tensor, matrix, 1)
    np.testing.assert_allclose(unfold(product, 1), matrix @ unfold(tensor, 1), rtol=1e-14)


def test_mode_products_commute_and_skip(x64, rng):
    tensor = jnp.array(rng.normal(size=(2, 3, 4)))
    matrices = [jnp.array(rng.normal(size=(5, n))) for n in tensor.shape]
    expected = np.einsum("abc,xa,zc->xbz", tensor, matrices[0], matrices[2])
    np.testing.assert_allclose(multi_mode_product(tensor, matrices, skip=1), expected, rtol=1e-12)
    transposed = [m.T for m in matrices]
    np.testing.assert_allclose(multi_mode_product(tensor, transposed, transpose=True, skip=1), expected, rtol=1e-12)


def test_to_dense_is_equation_2(x64, rng):
    kernel = random_kernel(rng, (3, 4, 5, 6), (2, 3, None, 4))
    c, (u1, u2, _, u4) = kernel
    np.testing.assert_allclose(
        to_dense(kernel), np.einsum("abcd,ia,jb,ld->ijcl", c, u1, u2, u4), rtol=1e-12, atol=1e-14
    )
    assert kernel_shape(kernel) == (3, 4, 5, 6)


def test_rank_is_read_from_exact_zeros_also_under_jit(rng):
    kernel = random_kernel(rng, (6, 5, 3), (2, 4, None), capacity=(5, 5, 3))
    assert kernel.core.shape == (5, 5, 3)
    assert jax.jit(active_rank)(kernel).tolist() == [2, 4, 3]


def test_padding_does_not_change_the_tensor(x64, rng):
    kernel = random_kernel(rng, (6, 5, 4), (2, 3, 2))
    padded = random_kernel(np.random.default_rng(0), (6, 5, 4), (2, 3, 2), capacity=(6, 5, 4))
    np.testing.assert_allclose(to_dense(kernel), to_dense(padded), rtol=1e-13)


def test_tuple_arithmetic_is_refused(rng):
    kernel = random_kernel(rng, (3, 3), (1, 1))
    for attempt in (lambda: 2 * kernel, lambda: kernel * 2, lambda: kernel + kernel, lambda: kernel - kernel):
        with pytest.raises(TypeError, match="no arithmetic"):
            attempt()


def test_parameter_count_of_the_papers_example():
    """Section 2.1: ranks (76, 76, 3, 3) in a (256, 256, 3, 3) kernel; its 5.2e4 is the core alone."""
    assert 76 * 76 * 3 * 3 == 51_984
    assert parameter_count((256, 256, 3, 3), (76, 76, 3, 3)) == 51_984 + 2 * 256 * 76 + 2 * 3 * 3
    assert parameter_count((256, 256, 3, 3), (76, 76, 3, 3), whole=(False, False, True, True)) == 51_984 + 2 * 256 * 76


def test_kernel_is_a_pytree():
    kernel = TuckerTensor(jnp.ones((1, 2)), (jnp.ones((3, 1)), None))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, kernel)
    assert isinstance(doubled, TuckerTensor) and doubled.factors[1] is None
    assert float(doubled.core[0, 0]) == 2.0


def test_two_leaves_with_one_path_are_refused(rng):
    """What is kept by path, ranks and errors, would belong to one of them, and one would get the other's gradient."""
    kernel, bias = random_kernel(rng, (3, 4), (2, 2)), jnp.ones(4)
    for tree in ({"a": {"b": kernel}, "a/b": kernel}, {"": kernel, "kernel": kernel}, {"a": {"b": bias}, "a/b": bias}):
        with pytest.raises(ValueError, match=r"two leaves have the path '(a/b|kernel)': rename one"):
            kernel_paths(tree)
