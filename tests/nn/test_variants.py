"""Every kind of convolution through everything that a layer goes through: application, conversion, training, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdlrt_jax
import tdlrt_jax.nn
from tdlrt_jax.nn import TuckerConv, TuckerConvTranspose, TuckerLinear, densify, tuckerize

CONV, TRANSPOSED, LINEAR = nnx.Conv, nnx.ConvTranspose, nnx.Linear
COUNTERPART = {CONV: TuckerConv, TRANSPOSED: TuckerConvTranspose, LINEAR: TuckerLinear}

# A name to (layer, channels, arguments, spatial shape of the input).
VARIANTS = {
    "1-D": (CONV, (4, 6), {"kernel_size": (3,)}, (7,)),
    "1-D causal": (CONV, (4, 6), {"kernel_size": (3,), "padding": "CAUSAL", "kernel_dilation": 2}, (7,)),
    "2-D": (CONV, (4, 6), {"kernel_size": (3, 2)}, (6, 5)),
    "2-D strided": (CONV, (4, 6), {"kernel_size": (3, 2), "strides": (2, 1), "padding": "VALID"}, (6, 5)),
    "2-D dilated": (CONV, (4, 6), {"kernel_size": (3, 2), "kernel_dilation": (1, 2)}, (6, 5)),
    "2-D asymmetric": (CONV, (4, 6), {"kernel_size": (3, 2), "padding": ((0, 2), (1, 0)), "strides": 2}, (6, 5)),
    "2-D circular": (CONV, (4, 6), {"kernel_size": (3, 2), "padding": "CIRCULAR"}, (6, 5)),
    "2-D reflected": (CONV, (4, 6), {"kernel_size": (3, 3), "padding": "REFLECT", "strides": (1, 2)}, (6, 5)),
    "2-D grouped": (CONV, (4, 6), {"kernel_size": (3, 2), "feature_group_count": 2}, (6, 5)),
    "2-D depthwise": (CONV, (4, 8), {"kernel_size": (3, 3), "feature_group_count": 4}, (6, 5)),
    "2-D pointwise": (CONV, (4, 6), {"kernel_size": (1, 1), "strides": 2, "use_bias": False}, (6, 5)),
    "2-D masked": (CONV, (4, 6), {"kernel_size": (3, 2), "mask": np.tril(np.ones((3, 2, 4, 6), np.float32))}, (6, 5)),
    "3-D": (CONV, (4, 6), {"kernel_size": (2, 3, 2), "strides": (1, 2, 1)}, (4, 5, 3)),
    "1-D transposed": (TRANSPOSED, (4, 6), {"kernel_size": (3,), "strides": (2,)}, (5,)),
    "2-D transposed": (TRANSPOSED, (4, 6), {"kernel_size": (3, 2), "strides": (2, 2), "padding": "VALID"}, (4, 3)),
    "2-D transposed, flipped": (
        TRANSPOSED,
        (4, 6),
        {"kernel_size": (2, 2), "strides": 2, "transpose_kernel": True},
        (4, 3),
    ),
    "2-D transposed, circular": (
        TRANSPOSED,
        (4, 6),
        {"kernel_size": (4, 3), "strides": (2, 1), "padding": "CIRCULAR"},
        (4, 3),
    ),
    "3-D transposed": (TRANSPOSED, (4, 6), {"kernel_size": (2, 2, 2), "kernel_dilation": (1, 2, 1)}, (3, 3, 2)),
    "linear": (LINEAR, (4, 6), {}, ()),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    """A dense layer and a batch for it."""
    kind, channels, options, spatial = VARIANTS[request.param]
    layer = kind(*channels, **options, bias_init=jax.nn.initializers.normal(), rngs=nnx.Rngs(0))
    return layer, jax.random.normal(jax.random.key(1), (8, *spatial, channels[0]))


def assert_close(found, expected):
    scale = max(float(jnp.max(jnp.abs(expected))), 1)
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)


def test_conversion_at_full_rank_changes_nothing_and_goes_back(variant):
    layer, x = variant
    tucker = tuckerize(layer, {".*": None})
    assert type(tucker) is COUNTERPART[type(layer)]
    assert_close(tucker(x), layer(x))
    back = densify(tucker)
    assert nnx.graphdef(back) == nnx.graphdef(layer)
    np.testing.assert_allclose(back.kernel.get_value(), layer.kernel.get_value(), atol=2e-6)
    assert_close(back(x), layer(x))


def test_a_truncated_layer_is_the_dense_layer_of_its_kernel(variant):
    layer, x = variant
    tucker = tuckerize(layer, {".*": 2})
    kernel = tucker.kernel.get_value()
    assert max(kernel.core.shape[-2:]) <= 2
    dense = densify(tucker)
    np.testing.assert_allclose(dense.kernel.get_value(), tdlrt_jax.to_dense(kernel), atol=1e-6)
    assert_close(tucker(x), dense(x))
    assert not np.allclose(tucker(x), layer(x), atol=1e-3)
    tucker.kernel.set_value(tdlrt_jax.lift(kernel))
    assert_close(tucker(x), dense(x))


def test_training_steps_of_algorithm_1_lower_the_loss(variant):
    layer, x = variant
    target = layer(x)
    tucker = tuckerize(layer, {".*": {"weights": "fresh"}}, rngs=nnx.Rngs(2))
    optimizer = nnx.Optimizer(tucker, tdlrt_jax.nn.tdlrt(optax.sgd(1.0), tolerance=0.02), wrt=nnx.Param)
    step = tdlrt_jax.nn.tdlrt_step(lambda model, x, y: jnp.mean((model(x) - y) ** 2))
    first = step(tucker, optimizer, x, target)
    (rank,) = first.rank.values()
    assert rank.shape == (layer.kernel.get_value().ndim,)
    assert jnp.all((rank >= 1) & (rank <= jnp.array(layer.kernel.shape)))
    infos = [first, *(step(tucker, optimizer, x, target) for _ in range(4))]
    losses = [float(info.loss) for info in infos]
    assert np.all(np.isfinite(losses))
    assert losses[0] > 0.01
    assert losses[-1] < 0.5 * losses[0]
    assert all(int(info.status) == 0 for info in infos)
