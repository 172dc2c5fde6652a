"""LeNet5: the published count of weights, layers to choose, and shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax.models import LeNet5
from tdlrt_jax.models.pooling import max_pool
from tdlrt_jax.nn import TuckerConv, TuckerLinear


def shapes(**options):
    """The parameters' shapes by path, without computing any."""
    params = nnx.as_pure(nnx.eval_shape(lambda: nnx.state(LeNet5(rngs=nnx.Rngs(0), **options), nnx.Param)))
    return nnx.to_flat_state(params)


def test_lenet5_has_430500_weights_and_its_biases():
    leaves = dict(shapes())
    weights = [leaf for path, leaf in leaves.items() if path[-1] == "kernel"]
    biases = [leaf for path, leaf in leaves.items() if path[-1] == "bias"]
    assert sum(np.prod(leaf.shape) for leaf in weights) == 430_500
    assert sum(np.prod(leaf.shape) for leaf in biases) == 20 + 50 + 500 + 10


def test_every_layer_can_be_exchanged():
    leaves = dict(
        shapes(
            conv=functools.partial(TuckerConv, rank=0.5),
            linear=functools.partial(TuckerLinear, rank=30),
            classifier=functools.partial(TuckerLinear, rank=None),
        )
    )
    kernels = {path[0]: leaf for path, leaf in leaves.items() if path[-1] == "kernel"}
    assert {name: kernel.core.shape for name, kernel in kernels.items()} == {
        "conv1": (5, 5, 1, 10),
        "conv2": (5, 5, 10, 25),
        "hidden": (30, 30),
        "classifier": (10, 10),
    }
    assert [tdlrt_jax.kernel_shape(kernel) for kernel in kernels.values()] == [
        shape for path, shape in sorted((path, leaf.shape) for path, leaf in shapes() if path[-1] == "kernel")
    ]


def test_a_tucker_lenet5_is_the_dense_one_with_its_kernels():
    """Spectral Tucker convolutions (the robustness experiment's) against nnx.Conv with the same kernels."""
    conv = functools.partial(TuckerConv, rank=(3, 3, None, 4), initialization="spectral")
    tucker = LeNet5(conv=conv, input_shape=(16, 20), input_channels=2, num_classes=3, rngs=nnx.Rngs(0))
    dense = LeNet5(input_shape=(16, 20), input_channels=2, num_classes=3, rngs=nnx.Rngs(0))
    for layer in ("conv1", "conv2"):
        getattr(dense, layer).kernel.set_value(tdlrt_jax.to_dense(getattr(tucker, layer).kernel.get_value()))
    x = jax.random.normal(jax.random.key(0), (2, 16, 20, 2))
    found, expected = (nnx.jit(lambda model, x: model(x))(model, x) for model in (tucker, dense))
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match=r"input_shape=\(28, 15\)"):
        LeNet5(input_shape=(28, 15), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("window", [2, 3])
def test_max_pool_is_nnx_max_pool_and_so_is_its_gradient(window):
    x = jax.random.normal(jax.random.key(0), (2, 7, 8, 3))

    def value_and_grad(pool):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(pool(x) ** 2)))(x)

    ours = value_and_grad(lambda x: max_pool(x, window))
    theirs = value_and_grad(lambda x: nnx.max_pool(x, (window, window), strides=(window, window)))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-6)


def test_the_gradient_at_equal_maxima_goes_to_one_of_them_and_nan_is_not_hidden():
    x = jnp.zeros((1, 2, 2, 1))
    assert jax.grad(lambda x: jnp.sum(max_pool(x)))(x)[0, ..., 0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    for place in np.ndindex(2, 2):
        assert np.isnan(max_pool(jnp.ones((1, 2, 2, 1)).at[0, *place, 0].set(jnp.nan))).all()
    # A reduction's gradient compares its operand with the result; no selection divides by how many are equal.
    text = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(max_pool(x))))(x))
    assert " div " not in text and "reduce_max" not in text
