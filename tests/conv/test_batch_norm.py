"""Batch normalization at the kernel's rank is the convolution and the normalization, one after the other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tdlrt_jax import TuckerTensor, lift, to_dense, tucker_conv, value_and_grad
from tdlrt_jax.conv import PLANS, tucker_conv_batch_norm
from tdlrt_jax.frame import Frame, is_kernel
from tdlrt_jax.galerkin import value_and_two_grads
from tests.helpers import random_kernel
from tests.test_galerkin import assert_trees_close, augmented

EPSILON = 1e-3
LAYERS = {
    "conv": {"shape": (3, 3, 4, 6), "rank": (2, None, 3, 4), "options": {}},
    "strided": {"shape": (3, 2, 4, 7), "rank": (2, 2, 2, 3), "options": {"strides": 2, "padding": ((1, 0), (0, 2))}},
    "dilated": {"shape": (2, 3, 4, 6), "rank": (2, 3, 3, 4), "options": {"dilation": 2, "padding": "CIRCULAR"}},
    "pointwise": {"shape": (1, 1, 4, 8), "rank": (1, 1, 3, 3), "options": {"strides": 2}},
    "whole out": {"shape": (3, 3, 4, 5), "rank": (3, 3, 2, None), "options": {}},
    "two groups": {"shape": (3, 3, 2, 6), "rank": (3, 3, 2, 3), "options": {"groups": 2}},
    "linear": {"shape": (4, 6), "rank": (3, 3), "options": {}},
}


def one_after_the_other(x, kernel, scale, bias, **options):
    """The oracle: the output itself, its statistics in two passes, and the textbook's formula."""
    y = tucker_conv(x, kernel, **options)
    every = tuple(range(y.ndim - 1))
    mean = y.mean(every)
    variance = ((y - mean) ** 2).mean(every)
    z = (y - mean) / jnp.sqrt(variance + EPSILON)
    return (z if scale is None else z * scale) + (0 if bias is None else bias), mean, variance


def at_rank(x, kernel, scale, bias, **options):
    return tucker_conv_batch_norm(x, kernel, scale, bias, epsilon=EPSILON, **options)


def problem(rng, layer, dtype=np.float64):
    options = LAYERS[layer]
    kernel = random_kernel(rng, options["shape"], options["rank"], dtype=dtype)
    x = jnp.asarray(rng.normal(size=(3, 7, 6, 4)) + 0.5, dtype)
    n_out = options["shape"][-1]
    scale, bias = (jnp.asarray(rng.normal(size=n_out) + shift, dtype) for shift in (1, 0))
    return x, kernel, scale, bias, options["options"]


def objective(apply, options):
    """A loss in which output, mean and variance all have a cotangent."""

    def loss(params, x):
        z, mean, variance = apply(x, params["kernel"], params["scale"], params["bias"], **options)
        z = z.astype(mean.dtype)
        weights = jnp.cos(jnp.arange(z.size, dtype=z.dtype)).reshape(z.shape)
        return jnp.sum(weights * jnp.sin(z)) + jnp.sum(jnp.sin(3 * mean)) + jnp.sum(jnp.cos(2 * variance))

    return loss


@pytest.mark.parametrize("plan", [None, *PLANS])
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_statistics_and_theorem_1s_gradients_are_those_of_the_two_operations(rng, layer, plan):
    with jax.enable_x64(True):
        x, kernel, scale, bias, options = problem(rng, layer)
        options = {**options, "plan": plan}
        params = {"kernel": kernel, "scale": scale, "bias": bias}
        lifted = {**params, "kernel": lift(kernel)}

        @partial(jax.jit, static_argnums=0)
        def everything(apply, params, lifted, x):
            """Outputs with statistics, Theorem 1's gradients, a TuckerTensor's ordinary ones with the input's, the lifted's."""
            loss = objective(apply, options)
            outputs = apply(x, params["kernel"], params["scale"], params["bias"], **options)
            grads = value_and_grad(loss)(params, x), jax.grad(loss, (0, 1))(params, x), jax.grad(loss, 1)(lifted, x)
            return outputs, grads

        outputs, grads = everything(at_rank, params, lifted, x)
        expected_outputs, expected_grads = everything(one_after_the_other, params, lifted, x)
        for actual, expected in zip(outputs, expected_outputs):
            np.testing.assert_allclose(actual, expected, atol=1e-12)
        assert_trees_close(grads, expected_grads, 1e-11)
        np.testing.assert_allclose(grads[-1], expected_grads[-1], atol=1e-11)


def test_theorem_1s_gradients_are_those_of_the_chart(rng):
    """Against the definition of a frame, with no custom rule in it: the dense kernel of the chart."""
    with jax.enable_x64(True):
        x, kernel, scale, bias, options = problem(rng, "conv")
        params = {"kernel": kernel, "scale": scale, "bias": bias}

        def densely(x, kernel, *arrays, **options):
            return one_after_the_other(x, to_dense(kernel), *arrays, **options)

        ours, oracle = objective(at_rank, {"plan": "factored"}), objective(densely, options)
        assert_trees_close(value_and_grad(ours)(params, x), value_and_grad(oracle)(params, x), 1e-11)


@pytest.mark.parametrize("arrays", ["none", "scale", "bias"])
def test_scale_and_bias_may_be_left_out(rng, arrays):
    with jax.enable_x64(True):
        x, kernel, scale, bias, options = problem(rng, "conv")
        scale, bias = scale if arrays == "scale" else None, bias if arrays == "bias" else None
        params = {"kernel": kernel, "scale": scale, "bias": bias}
        ours, oracle = objective(at_rank, options), objective(one_after_the_other, options)
        assert_trees_close(value_and_grad(ours)(params, x), value_and_grad(oracle)(params, x), 1e-11)
        assert_trees_close(jax.grad(ours)(params, x), jax.grad(oracle)(params, x), 1e-11)


@pytest.mark.parametrize("plan", [None, *PLANS])
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "linear"])
def test_the_second_gradient_comes_out_of_the_first_pass(rng, layer, plan):
    with jax.enable_x64(True):
        x, kernel, scale, bias, options = problem(rng, layer)
        params = {"kernel": kernel, "scale": scale, "bias": bias}
        loss = objective(at_rank, {**options, "plan": plan})
        at = augmented(rng, params)

        @jax.jit
        def both(params, at, x):
            first, second = value_and_two_grads(loss)(params, x)
            assert second.at_same_network is not second._anew
            return first, second.at_same_network(at), second(at)

        first, at_same_network, second = both(params, at, x)
        assert_trees_close(first, jax.jit(value_and_grad(loss))(params, x), 1e-12)
        anew = jax.jit(value_and_grad(objective(one_after_the_other, options)))(at, x)
        assert_trees_close(at_same_network, anew, 1e-11)
        assert_trees_close(second, anew, 1e-11)


def test_the_second_gradient_holds_where_the_augmented_kernel_is_merged(rng):
    """At twice the rank the kernel is rebuilt: the output gradient is then needed itself."""
    with jax.enable_x64(True):
        kernel = random_kernel(rng, (1, 1, 6, 6), (1, 1, 3, 3))
        params = {"kernel": kernel, "scale": jnp.ones(6), "bias": jnp.zeros(6)}
        x = jnp.asarray(rng.normal(size=(4, 5, 5, 6)))
        loss = objective(at_rank, {"plan": "factored"})
        at = augmented(rng, params)
        assert at["kernel"].core.shape[-1] == 6
        _, second = value_and_two_grads(loss)(params, x)
        expected = value_and_grad(objective(one_after_the_other, {"plan": "dense"}))(at, x)
        assert_trees_close(second.at_same_network(at), expected, 1e-11)


def test_statistics_are_never_taken_over_all_out_channels(rng):
    """What it is for, counted: no reduction of an array of all out-channels, but that of the bias' gradient."""
    x, *_ = problem(rng, "conv", np.float32)
    kernel = random_kernel(rng, (3, 3, 4, 50), (3, 3, 3, 4), dtype=np.float32)
    params = {"kernel": kernel, "scale": jnp.ones(50), "bias": jnp.zeros(50)}
    weights = jnp.asarray(rng.normal(size=(3, 7, 6, 50)), jnp.float32)

    def reductions(apply):
        def loss(params, x):
            z, *_ = apply(x, params["kernel"], params["scale"], params["bias"], plan="factored")
            return jnp.vdot(z, weights)

        jaxpr = jax.make_jaxpr(value_and_grad(loss))(params, x)
        return sum(
            equation.primitive.name == "reduce_sum" and equation.invars[0].aval.size >= weights.size
            for equation in every_equation(jaxpr.jaxpr)
        )

    assert reductions(at_rank) == 1
    assert reductions(one_after_the_other) > 4


def every_equation(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from every_equation(inner)


def test_a_large_mean_does_not_cancel(rng):
    """In float32, a mean of a thousand deviations: the variance is that of centered features."""
    kernel = random_kernel(rng, (1, 1, 4, 6), (1, 1, 3, 3), dtype=np.float32)
    x = np.asarray(rng.normal(size=(64, 4, 4, 4)) + 1000, np.float32)
    _, _, variance = at_rank(jnp.asarray(x), kernel, None, None, plan="factored")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), kernel)
        _, _, expected = one_after_the_other(jnp.asarray(x, jnp.float64), wide, None, None)
    np.testing.assert_allclose(variance, expected, rtol=2e-3)


def test_unused_columns_change_nothing(rng):
    with jax.enable_x64(True):
        x, _, scale, bias, options = problem(rng, "conv")
        padded = random_kernel(rng, (3, 3, 4, 6), (2, 3, 2, 3), (3, 3, 4, 6))
        params = {"kernel": padded, "scale": scale, "bias": bias}
        ours, oracle = objective(at_rank, {"plan": "factored"}), objective(one_after_the_other, options)
        assert_trees_close(value_and_grad(ours)(params, x), value_and_grad(oracle)(params, x), 1e-11)


def test_sixteen_bits_give_statistics_in_32(rng):
    x, kernel, scale, bias, options = problem(rng, "conv", np.float32)
    expected = at_rank(x, kernel, scale, bias, **options)
    y, mean, variance = at_rank(x.astype(jnp.bfloat16), kernel, scale, bias, preferred_element_type=jnp.float32)
    assert (y.dtype, mean.dtype, variance.dtype) == (jnp.float32,) * 3
    for actual, wanted in zip((y, mean, variance), expected):
        np.testing.assert_allclose(actual, wanted, atol=0.05)
    y, mean, variance = at_rank(x.astype(jnp.bfloat16), kernel, scale, bias)
    assert (y.dtype, mean.dtype, variance.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    params = {"kernel": kernel, "scale": scale, "bias": bias}
    grads = value_and_grad(objective(at_rank, options))(params, x.astype(jnp.bfloat16))[1]
    expected = value_and_grad(objective(one_after_the_other, options))(params, x)[1]
    assert jax.tree.map(jnp.result_type, grads) == jax.tree.map(jnp.result_type, expected)
    assert_trees_close(grads, expected, 0.1)


def test_it_maps_and_batches(rng):
    with jax.enable_x64(True):
        x, kernel, scale, bias, options = problem(rng, "conv")
        params = {"kernel": kernel, "scale": scale, "bias": bias}
        grad = value_and_grad(objective(at_rank, options))
        xs = jnp.stack([x, 2 * x])
        mapped = jax.vmap(grad, (None, 0))(params, xs)
        assert_trees_close(jax.tree.map(lambda leaf: leaf[0], mapped), grad(params, x), 1e-12)
        assert_trees_close(jax.tree.map(lambda leaf: leaf[1], mapped), grad(params, 2 * x), 1e-12)
        batched = at_rank(x.reshape(1, 3, 7, 6, 4), kernel, scale, bias)
        assert_trees_close(batched._replace(y=batched.y[0]), at_rank(x, kernel, scale, bias), 1e-12)


def test_what_does_not_fit_is_said(rng):
    x, kernel, scale, bias, _ = problem(rng, "conv", np.float32)
    with pytest.raises(ValueError, match=r"scale is .* expected an array of the kernel's 6 output channels"):
        tucker_conv_batch_norm(x, kernel, scale[:5], bias)
    with pytest.raises(ValueError, match=r"bias is .* expected an array of the kernel's 6 output channels"):
        tucker_conv_batch_norm(x, kernel, scale, 0.0)
    with pytest.raises(ValueError, match=r"epsilon=-1\.0: expected a small number, 0 or more"):
        tucker_conv_batch_norm(x, kernel, epsilon=-1.0)
    with pytest.raises(ValueError, match="channels"):
        tucker_conv_batch_norm(x[..., :2], kernel)


def test_core_only_frames_have_the_gradient_of_the_core(rng):
    with jax.enable_x64(True):
        x, kernel, scale, bias, options = problem(rng, "conv")
        frame = Frame(kernel.core, None, kernel.factors, None)
        params = {"kernel": frame, "scale": scale, "bias": bias}
        ours, oracle = objective(at_rank, options), objective(one_after_the_other, options)
        (_, grads), expected = value_and_grad(ours)(params, x), value_and_grad(oracle)(params, x)[1]
        assert isinstance(grads["kernel"], TuckerTensor) and is_kernel(frame)
        assert_trees_close(grads, expected, 1e-11)


def test_gradients_at_a_batch_of_any_size(rng):
    """Exported once, with a symbolic batch."""
    x, kernel, scale, bias, _ = problem(rng, "conv", np.float32)
    params = {"kernel": kernel, "scale": scale, "bias": bias}

    def loss(params, x):
        z, mean, variance = at_rank(x, *(params[name] for name in ("kernel", "scale", "bias")), plan="factored")
        return jnp.sum(jnp.sin(z)) + jnp.sum(mean * variance)

    def gradient(leaves, x):
        return jax.tree.leaves(value_and_grad(loss)(jax.tree.unflatten(jax.tree.structure(params), leaves), x))

    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)]
    exported = jax.export.export(jax.jit(gradient))(shapes, jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype))
    for found, expected in zip(exported.call(jax.tree.leaves(params), x), gradient(jax.tree.leaves(params), x)):
        np.testing.assert_allclose(found, expected, atol=1e-4)
