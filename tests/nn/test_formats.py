"""Layers with matrix and CP kernels: their dense twins, what they store, and how they train."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax import nn
from tdlrt_jax.baselines import cp_to_dense
from tdlrt_jax.nn.formats import CPConv, MatrixConv

OPTIONS = {"strides": 2, "padding": ((1, 0), (0, 2)), "kernel_dilation": (1, 2)}


def twin(layer, kernel, **options):
    """``nnx.Conv`` with the dense kernel of a layer."""
    conv = nnx.Conv(layer.in_features, layer.out_features, layer.kernel_size, rngs=nnx.Rngs(1), **options)
    conv.kernel.set_value(kernel)
    conv.bias.set_value(layer.bias.get_value())
    return conv


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all"])
@pytest.mark.parametrize("kind", ["matrix", "two factors", "cp"])
def test_a_layer_computes_what_its_dense_twin_does(kind, options):
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 4))
    bias = lambda key, shape, dtype: jax.random.normal(key, shape, dtype)  # noqa: E731
    if kind == "two factors":
        layer = MatrixConv(4, 6, (3, 2), rank=3, core=False, bias_init=bias, rngs=nnx.Rngs(0), **options)
        kernel = cp_to_dense(layer.kernel.get_value()).reshape(3, 2, 4, 6)
    elif kind == "matrix":
        layer = MatrixConv(4, 6, (3, 2), rank=3, bias_init=bias, rngs=nnx.Rngs(0), **options)
        kernel = tdlrt_jax.to_dense(layer.kernel.get_value()).reshape(3, 2, 4, 6)
    else:
        layer = CPConv(4, 6, (3, 2), rank=7, bias_init=bias, rngs=nnx.Rngs(0), **options)
        kernel = cp_to_dense(layer.kernel.get_value())
    np.testing.assert_allclose(layer(x), twin(layer, kernel, **options)(x), atol=1e-5)


def test_sizes_and_norms_at_the_start():
    matrix = MatrixConv(16, 32, (3, 3), rank=0.25, use_bias=False, rngs=nnx.Rngs(0))
    kernel = matrix.kernel.get_value()
    assert kernel.core.shape == (8, 8) and kernel.factors[0].shape == (144, 8)
    assert float(jnp.linalg.norm(kernel.core)) == pytest.approx(np.sqrt(32), rel=0.1)
    halves = MatrixConv(16, 32, (3, 3), rank=0.25, core=False, use_bias=False, rngs=nnx.Rngs(0)).kernel.get_value()
    np.testing.assert_allclose(cp_to_dense(halves), tdlrt_jax.to_dense(kernel), atol=1e-6)
    cp = CPConv(16, 32, (3, 3), rank=40, use_bias=False, rngs=nnx.Rngs(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(cp, nnx.Param))) == 40 * (3 + 3 + 16 + 32)
    assert float(jnp.linalg.norm(cp_to_dense(cp.kernel.get_value()))) == pytest.approx(np.sqrt(32), rel=0.5)
    with pytest.raises(ValueError, match="initialization='svd' is unknown"):
        CPConv(3, 4, (3, 3), rank=2, initialization="svd", rngs=nnx.Rngs(0))


def test_matrix_layers_train_by_tdlrt_and_cp_layers_by_their_own_gradients():
    class Net(nnx.Module):
        def __init__(self, conv, rngs):
            self.conv, self.out = conv, nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.conv(x)).mean((1, 2)))

    x = jax.random.normal(jax.random.key(0), (16, 6, 6, 3))
    y = jax.random.randint(jax.random.key(1), (16,), 0, 3)

    def loss_fn(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    for conv in (MatrixConv(3, 8, (3, 3), rank=4, rngs=nnx.Rngs(0)), CPConv(3, 8, (3, 3), rank=6, rngs=nnx.Rngs(0))):
        model = Net(conv, nnx.Rngs(2))
        tx = nn.tdlrt(optax.sgd(1.0), tolerance=0.01, integrator="parallel")
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x, y):
            loss, grads = nn.value_and_grad(loss_fn)(model, x, y)
            optimizer.update(model, grads, value=loss)
            return loss

        losses = [float(step(model, optimizer, x, y)) for _ in range(30)]
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("initialization", ["normal", "spectral"])
def test_cp_layers_of_16_bits_are_not_zero(initialization):
    layer, wide = (
        CPConv(64, 64, (3, 3), rank=27, param_dtype=dtype, initialization=initialization, rngs=nnx.Rngs(0))
        for dtype in (jnp.float16, jnp.float32)
    )
    norms = [
        float(jnp.linalg.norm(cp_to_dense(jax.tree.map(jnp.float32, each.kernel.get_value()))))
        for each in (layer, wide)
    ]
    np.testing.assert_allclose(norms[0], norms[1], rtol=0.1)
