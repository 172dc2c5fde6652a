"""The layers against ``flax.nnx``'s with the same weights, for all of their arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax import TuckerTensor
from tdlrt_jax.nn import TuckerConv, TuckerLinear
from tests import references as ref

BIAS = jax.nn.initializers.normal()


def fixed_kernel(shape, rank, seed=0):
    """The same weights in both formats, as initializers for both layers."""
    core, factors = ref.tucker_random(shape, rank, seed=seed)
    dense = jnp.asarray(ref.to_dense(core, factors), jnp.float32)
    tucker = TuckerTensor(jnp.asarray(core, jnp.float32), tuple(jnp.asarray(f, jnp.float32) for f in factors))

    def as_dense(key, shape, dtype):
        return dense.astype(dtype)

    def as_tucker(key, shape, dtype):
        return tucker

    return as_dense, as_tucker


def conv_pair(kernel_size, channels=(4, 6), rank=None, **options):
    shape = (*kernel_size, channels[0] // options.get("feature_group_count", 1), channels[1])
    as_dense, as_tucker = fixed_kernel(shape, rank or [min(2, n) for n in shape])
    make = functools.partial(nnx.Conv, *channels, kernel_size, bias_init=BIAS, **options)
    tucker = functools.partial(TuckerConv, *channels, kernel_size, bias_init=BIAS, **options)
    return make(kernel_init=as_dense, rngs=nnx.Rngs(0)), tucker(kernel_init=as_tucker, rngs=nnx.Rngs(0))


def assert_agree(dense, tucker, x, tolerance=1e-5):
    expected, found = dense(x), tucker(x)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    scale = float(np.max(np.abs(expected.astype(jnp.float32))))
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=tolerance * max(scale, 1)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": (2, 1), "padding": "VALID"},
        {"strides": None, "padding": "CIRCULAR"},
        {"padding": "REFLECT", "kernel_dilation": (2, 1)},
        {"padding": 2, "strides": 2},
        {"padding": [(0, 2), 1]},
        {"padding": ((1, 2), (0, 1)), "input_dilation": (2, 1)},
        {"feature_group_count": 2, "use_bias": False},
        {"feature_group_count": 4, "channels": (4, 8), "padding": "VALID"},
        {"mask": np.tril(np.ones((3, 2, 4, 6)))},
        {"precision": "highest", "preferred_element_type": jnp.float32, "dtype": jnp.bfloat16, "tolerance": 2e-2},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_conv_agrees_with_nnx_for_all_arguments(options):
    options = dict(options)
    tolerance = options.pop("tolerance", 1e-5)
    dense, tucker = conv_pair((3, 2), **options)
    assert_agree(dense, tucker, jax.random.normal(jax.random.key(1), (2, 7, 6, 4)), tolerance)


@pytest.mark.parametrize("padding", ["CAUSAL", "SAME"])
def test_one_and_three_dimensional_convolutions(padding):
    dense, tucker = conv_pair((3,), padding=padding, kernel_dilation=2)
    assert_agree(dense, tucker, jax.random.normal(jax.random.key(1), (2, 9, 4)))
    if padding == "SAME":
        dense, tucker = conv_pair((2, 1, 2), strides=(1, 2, 1))
        assert_agree(dense, tucker, jax.random.normal(jax.random.key(1), (2, 4, 5, 3, 4)))


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_number_of_batch_dimensions(batch):
    dense, tucker = conv_pair((3, 3))
    assert_agree(dense, tucker, jax.random.normal(jax.random.key(1), (*batch, 5, 5, 4)))


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_follow_nnx(x_dtype, dtype, param_dtype):
    dense, tucker = conv_pair((2,), dtype=dtype, param_dtype=param_dtype)
    x = jnp.linspace(-1, 1, 24, dtype=x_dtype).reshape(2, 3, 4)
    assert_agree(dense, tucker, x, 2e-2)
    assert tucker.kernel.get_value().core.dtype == jnp.float32  # whatever the parameters count as
    assert tucker.bias.get_value().dtype == param_dtype
    linear = TuckerLinear(4, 3, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    assert linear(x).dtype == nnx.Linear(4, 3, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))(x).dtype


def test_user_supplied_convolution_and_promotion_are_called():
    calls = []

    def convolution(lhs, rhs, *args, **kwargs):
        calls.append(kwargs.keys())
        return jax.lax.conv_general_dilated(lhs, rhs, *args, **kwargs)

    def promote(arrays, *, dtype=None):
        calls.append("promote")
        return tuple(None if a is None else jnp.asarray(a, jnp.bfloat16) for a in arrays)

    options = {"conv_general_dilated": convolution, "promote_dtype": promote, "strides": 2}
    dense, tucker = conv_pair((3, 3), **options)
    assert_agree(dense, tucker, jax.random.normal(jax.random.key(1), (2, 5, 5, 4)), 2e-2)
    assert calls.count("promote") == 2
    assert len(calls) == 4
    assert "out_sharding" not in calls[-1]  # functions that do not know it are not given it


def test_linear_agrees_with_nnx():
    as_dense, as_tucker = fixed_kernel((5, 7), (3, 3))
    x = jax.random.normal(jax.random.key(1), (2, 3, 5))
    calls = []

    def dot_general(*args, **kwargs):
        calls.append(kwargs)
        return jax.lax.dot_general(*args, **kwargs)

    for options in (
        {"bias_init": jax.nn.initializers.normal()},
        {"use_bias": False, "precision": "highest"},
        {"dot_general": dot_general, "preferred_element_type": jnp.float32},
    ):
        dense = nnx.Linear(5, 7, kernel_init=as_dense, rngs=nnx.Rngs(0), **options)
        tucker = TuckerLinear(5, 7, kernel_init=as_tucker, rngs=nnx.Rngs(0), **options)
        assert_agree(dense, tucker, x)
        assert (tucker.bias is None) == (not options.get("use_bias", True))
    assert len(calls) == 2


def test_hosvd_at_full_rank_is_the_dense_layer_from_the_same_keys():
    dense = nnx.Conv(3, 4, (2, 2), bias_init=BIAS, rngs=nnx.Rngs(5))
    tucker = TuckerConv(3, 4, (2, 2), bias_init=BIAS, initialization="hosvd", rngs=nnx.Rngs(5))
    assert_agree(dense, tucker, jax.random.normal(jax.random.key(1), (2, 4, 4, 3)))


def test_rank_options_reach_the_kernel():
    def make(**options):
        return jax.eval_shape(lambda: TuckerConv(8, 16, (3, 3), rngs=nnx.Rngs(0), **options).kernel.get_value())

    shapes = {
        None: (3, 3, 8, 16),
        0.5: (3, 3, 4, 8),
        6: (3, 3, 6, 6),
        (2, 3, 4, 0.25): (2, 3, 4, 4),
        (None, None, 4, 4): (3, 3, 4, 4),
    }
    for rank, expected in shapes.items():
        kernel = make(rank=rank)
        assert kernel.core.shape == expected
        assert [f is None for f in kernel.factors] == [rank == (None, None, 4, 4)] * 2 + [False] * 2
    grouped = make(feature_group_count=4, rank=0.5)
    assert tdlrt_jax.kernel_shape(grouped) == (3, 3, 2, 16)
    assert grouped.core.shape == (3, 3, 1, 8)


def test_wrong_arguments_are_named():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="feature_group_count=3"):
        TuckerConv(4, 6, (3, 3), feature_group_count=3, rngs=rngs)
    with pytest.raises(ValueError, match=r"mask is an array of shape \(3,\): expected .*, \(3, 3, 4, 6\)"):
        TuckerConv(4, 6, (3, 3), mask=jnp.ones(3), rngs=rngs)
    with pytest.raises(ValueError, match="rank=9 for mode 2"):
        TuckerConv(4, 6, (3, 3), rank=(3, 3, 9, 6), rngs=rngs)
    with pytest.raises(ValueError, match="initialization='kaiming'"):
        TuckerLinear(4, 6, initialization="kaiming", rngs=rngs)
    with pytest.raises(ValueError, match=r"inputs have shape \(1, 5, 5, 3\): expected .*, 4\)"):
        TuckerConv(4, 6, (3, 3), rngs=rngs)(jnp.ones((1, 5, 5, 3)))


def test_a_layer_applies_a_frame_and_a_dense_array_in_the_place_of_its_kernel():
    _, tucker = conv_pair((3, 3))
    _, masked = conv_pair((3, 3), mask=jnp.ones((3, 3, 4, 6)))
    x = jax.random.normal(jax.random.key(1), (1, 5, 5, 4))
    kernel = tucker.kernel.get_value()
    expected = tucker(x)
    for stand_in in (tdlrt_jax.lift(kernel), tdlrt_jax.to_dense(kernel)):
        tucker.kernel.set_value(stand_in)
        np.testing.assert_allclose(tucker(x), expected, atol=1e-5)
    masked.kernel.set_value(tdlrt_jax.lift(kernel))
    np.testing.assert_allclose(masked(x), expected, atol=1e-5)


def test_split_merge_and_jit_keep_the_kernel_a_pytree():
    _, tucker = conv_pair((3, 3), padding=[(1, 1), (0, 0)])
    x = jnp.ones((1, 5, 5, 4))
    graphdef, state = nnx.split(tucker)
    assert len(jax.tree.leaves(state)) == 1 + 4 + 1
    assert hash(graphdef) == hash(nnx.split(tucker)[0])
    merged = nnx.merge(graphdef, jax.tree.map(lambda leaf: 2 * leaf, state))
    assert isinstance(merged.kernel.get_value(), TuckerTensor)
    traces = []

    @nnx.jit
    def apply(model, x):
        traces.append(None)
        return model(x)

    np.testing.assert_allclose(apply(tucker, x), tucker(x), atol=1e-5)
    apply(merged, x)
    assert len(traces) == 1
