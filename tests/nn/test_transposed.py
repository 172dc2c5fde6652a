"""The transposed convolution against ``flax.nnx.ConvTranspose``, and its gradients against the dense formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax.conv import tucker_conv_transpose
from tdlrt_jax.conv.transposed import transpose_kernel
from tdlrt_jax.nn import TuckerConvTranspose
from tests.helpers import random_kernel

IN, OUT = 4, 3


def layers(window, rank=None, plan=None, **options):
    """The same weights in ``nnx.ConvTranspose`` and in the Tucker layer."""
    channels = (OUT, IN) if options.get("transpose_kernel") else (IN, OUT)
    shape = (*window, *channels)
    kernel = random_kernel(np.random.default_rng(0), shape, rank or [min(2, n) for n in shape], dtype=jnp.float32)

    def make(layer, weights, **more):
        return layer(
            IN,
            OUT,
            window,
            kernel_init=lambda *_: weights,
            bias_init=jax.nn.initializers.normal(),
            rngs=nnx.Rngs(0),
            **options,
            **more,
        )

    param_dtype = options.get("param_dtype", jnp.float32)
    dense = make(nnx.ConvTranspose, tdlrt_jax.to_dense(kernel).astype(param_dtype))
    return dense, make(TuckerConvTranspose, kernel, plan=plan)


def assert_agree(dense, tucker, x, tolerance=1e-5):
    expected, found = dense(x), tucker(x)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    scale = max(float(np.max(np.abs(expected.astype(jnp.float32)))), 1)
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=tolerance * scale)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("window", "options"),
    [
        ((3,), {}),
        ((2,), {"strides": 3, "padding": "SAME"}),  # the stride exceeds the window
        ((2,), {"strides": (3,), "padding": "VALID"}),
        ((4,), {"strides": (2,), "padding": "VALID"}),
        ((4,), {"strides": (2,), "padding": "CIRCULAR"}),
        ((3, 2), {"strides": (2, 1)}),
        ((3, 2), {"strides": (1, 3), "padding": "CIRCULAR"}),
        ((3, 2), {"strides": (2, 2), "padding": 1}),
        ((3, 2), {"strides": (2, 1), "padding": [(0, 2), 1]}),
        ((3, 2), {"kernel_dilation": (2, 3), "strides": (2, 2)}),
        ((3, 2), {"kernel_dilation": 2, "padding": "VALID", "use_bias": False}),
        ((1, 1), {"strides": (2, 2)}),
        ((2, 1, 3), {"strides": (1, 2, 2)}),
    ],
    ids=str,
)
def test_agrees_with_nnx(window, options, transpose):
    dense, tucker = layers(window, transpose_kernel=transpose, **options)
    x = jax.random.normal(jax.random.key(1), (2, *(5, 4, 3)[: len(window)], IN))
    assert_agree(dense, tucker, x)


@pytest.mark.parametrize("transpose", [False, True])
def test_whole_modes_masks_batches_and_dtypes(transpose):
    shape = (3, 2, OUT, IN) if transpose else (3, 2, IN, OUT)
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 5, IN))
    options = {"transpose_kernel": transpose, "strides": (2, 1)}
    assert_agree(*layers((3, 2), (None, 2, None, 2), **options), x)
    assert_agree(*layers((3, 2), (2, None, 2, None), mask=np.tril(np.ones(shape, np.float32)), **options), x[0])
    assert_agree(*layers((3, 2), **options), x[0, 0])
    for dtypes in ({"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}, {"preferred_element_type": jnp.float32}):
        dense, tucker = layers((3, 2), **options, **dtypes)
        assert_agree(dense, tucker, x[0].astype(jnp.bfloat16), 2e-2)
        assert tucker.kernel.get_value().core.dtype == jnp.float32


@pytest.mark.parametrize("plan", ["factored", "merge_in", "merge_out", "dense"])
def test_all_plans_give_the_same_numbers(plan):
    dense, tucker = layers((3, 2), strides=(2, 2), transpose_kernel=True, plan=plan)
    assert_agree(dense, tucker, jax.random.normal(jax.random.key(1), (2, 4, 3, IN)))


@pytest.mark.parametrize("core_only", [False, True])
@pytest.mark.parametrize("rank", [(2, 2, 2, 2), (None, 2, None, 2), (2, None, 2, None), (None, None, 2, 2)])
def test_a_transposed_frame_is_the_chart_of_the_transposed_kernel(x64, rng, rank, core_only):
    kernel = random_kernel(rng, (3, 2, 4, 5), rank, dtype=jnp.float64)
    frame = tdlrt_jax.lift(kernel)
    if core_only:
        frame = frame._replace(K=None, Q=None)
    weight = jnp.asarray(rng.normal(size=(3, 2, 5, 4)))

    def loss(of, core, K):
        return jnp.sum(weight * of(frame._replace(core=core, K=K)))

    variables = (frame.core, frame.K)
    expected = jax.grad(lambda v: loss(lambda f: jnp.flip(tdlrt_jax.to_dense(f), (0, 1)).swapaxes(-1, -2), *v))(
        variables
    )
    found = jax.grad(lambda v: loss(lambda f: tdlrt_jax.to_dense(transpose_kernel(f)), *v))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)
    turned = transpose_kernel(kernel)
    np.testing.assert_allclose(
        tdlrt_jax.to_dense(turned), jnp.flip(tdlrt_jax.to_dense(kernel), (0, 1)).swapaxes(-1, -2), atol=1e-12
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
@pytest.mark.parametrize("plan", ["factored", "dense"])
def test_gradients_are_those_of_theorem_1(x64, rng, plan, padding, transposed):
    shape = (3, 2, OUT, IN) if transposed else (3, 2, IN, OUT)
    kernel = random_kernel(rng, shape, (2, None, 2, 2), (3, 2, 3, 3), dtype=jnp.float64)
    x = jnp.asarray(rng.normal(size=(2, 4, 3, IN)))
    options = {"strides": (2, 1), "padding": padding}

    def through_factors(params, x):
        y = tucker_conv_transpose(x, params, transposed=transposed, plan=plan, **options)
        return jnp.sum(jnp.sin(y))

    dense_layer = nnx.ConvTranspose(
        IN,
        OUT,
        (3, 2),
        use_bias=False,
        transpose_kernel=transposed,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
        **options,
    )
    graphdef, _ = nnx.split(dense_layer)

    def through_dense(params, x):
        y = nnx.merge(graphdef, nnx.State({"kernel": nnx.Param(tdlrt_jax.to_dense(params))}))(x)
        return jnp.sum(jnp.sin(y))

    (value, found), (expected_value, expected) = (
        tdlrt_jax.value_and_grad(loss)(kernel, x) for loss in (through_factors, through_dense)
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), found, expected)


def test_the_transposed_kernels_layer_is_the_transpose_of_the_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, OUT))
    _, up = layers((3, 2), strides=(2, 1), padding="VALID", transpose_kernel=True, use_bias=False)
    down = tdlrt_jax.nn.TuckerConv(
        OUT,
        IN,
        (3, 2),
        strides=(2, 1),
        padding="VALID",
        use_bias=False,
        kernel_init=lambda *_: up.kernel.get_value(),
        rngs=nnx.Rngs(0),
    )
    y = jax.random.normal(jax.random.key(1), down(x).shape)
    expected = jax.linear_transpose(down, x)(y)[0]
    found = up(y)  # shorter where the stride does not divide what the window leaves over
    np.testing.assert_allclose(found, expected[:, : found.shape[1], : found.shape[2]], atol=1e-5)
    assert not expected[:, found.shape[1] :].any()


def test_wrong_arguments_are_named():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"mask is an array of shape \(3,\): expected .*, \(2, 2, 6, 4\)"):
        TuckerConvTranspose(4, 6, (2, 2), transpose_kernel=True, mask=jnp.ones(3), rngs=rngs)
    with pytest.raises(ValueError, match=r"padding=.* expected SAME, VALID, CIRCULAR"):
        TuckerConvTranspose(4, 6, (2, 2), padding="REFLECT", rngs=rngs)(jnp.ones((1, 3, 3, 4)))
    with pytest.raises(ValueError, match="rank=9 for mode 2"):
        TuckerConvTranspose(4, 6, (2, 2), rank=(2, 2, 9, 6), rngs=rngs)
    with pytest.raises(ValueError, match="strides must be a positive integer or 2"):
        TuckerConvTranspose(4, 6, (2, 2), strides=(2,), rngs=rngs)(jnp.ones((1, 3, 3, 4)))
