"""Losses that contain a derivative of the network: gradients of Theorem 1 are those of the kernel's chart there as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdlrt_jax import hosvd, to_dense, value_and_grad
from tdlrt_jax.baselines import matrix_conv
from tdlrt_jax.conv import tucker_conv, tucker_conv_batch_norm, tucker_linear

PLANS = ("dense", "merge_in", "merge_out", "factored")


@pytest.fixture
def case(x64, rng):
    kernel = hosvd(jnp.asarray(rng.normal(size=(3, 3, 4, 5))), rank=(2, None, 3, 3))
    return kernel, jnp.asarray(rng.normal(size=(2, 6, 6, 4))), jnp.asarray(rng.normal(size=(2, 6, 6, 5)))


def assert_same_gradients(loss_of, layer, dense_layer, kernel):
    """Value and gradients of a loss with a layer, and with the dense kernel in an ordinary operation."""
    value, grads = jax.jit(value_and_grad(lambda w: loss_of(lambda x: layer(x, w))))(kernel)
    expected, expected_grads = value_and_grad(lambda w: loss_of(lambda x: dense_layer(x, to_dense(w))))(kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert float(jnp.max(jnp.abs(wanted))) > 1e-3
        np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-10 * float(jnp.max(jnp.abs(wanted))))


def dense_conv(x, w):
    return tucker_conv(x, w)


@pytest.mark.parametrize("plan", PLANS)
def test_a_gradient_penalty(case, plan):
    kernel, x, weights = case

    def loss(layer):
        critic = jax.grad(lambda x: jnp.sum(jnp.tanh(layer(x)) * weights))
        return jnp.sum(critic(x) ** 2) + jnp.sum(layer(x) ** 2)

    assert_same_gradients(loss, lambda x, w: tucker_conv(x, w, plan=plan), dense_conv, kernel)


@pytest.mark.parametrize("plan", ["factored", "dense"])
def test_a_gradient_penalty_of_every_image(case, plan):
    kernel, x, weights = case

    def loss(layer):
        critic = jax.grad(lambda x, weights: jnp.sum(jnp.tanh(layer(x[None])[0]) * weights))
        norms = jax.vmap(lambda x, weights: jnp.linalg.norm(critic(x, weights)))(x, weights)
        return jnp.sum((norms - 1) ** 2)

    assert_same_gradients(loss, lambda x, w: tucker_conv(x, w, plan=plan), dense_conv, kernel)


def test_a_step_of_descent_within_the_loss(case):
    """As in meta-learning: the inner gradient is one of another parameter, which the kernel's layer stands before."""
    kernel, x, weights = case

    def loss(layer):
        def inner(shift):
            return jnp.mean((jnp.tanh(layer(x + shift)) - weights) ** 2)

        shift = jnp.zeros(4)
        return inner(shift - 0.1 * jax.grad(inner)(shift))

    assert_same_gradients(loss, tucker_conv, dense_conv, kernel)


def test_with_groups(x64, rng):
    kernel = hosvd(jnp.asarray(rng.normal(size=(3, 3, 2, 6))), rank=(2, 2, 2, 3))
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 4)))

    def loss(layer):
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(layer(x))))(x) ** 2)

    def grouped(x, w):
        return tucker_conv(x, w, groups=2)

    assert_same_gradients(loss, lambda x, w: tucker_conv(x, w, groups=2, plan="factored"), grouped, kernel)


def test_with_batch_normalization(case):
    kernel, x, weights = case

    def loss(layer):
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.tanh(layer(x)) * weights))(x) ** 2)

    def normalized(x, w, plan=None):
        result = tucker_conv_batch_norm(x, w, jnp.arange(1.0, 6.0), jnp.ones(5), plan=plan)
        return result.y + result.mean + result.variance

    assert_same_gradients(loss, lambda x, w: normalized(x, w, "factored"), normalized, kernel)


def test_of_a_matricized_kernel(case, rng):
    _, x, weights = case
    kernel = hosvd(jnp.asarray(rng.normal(size=(36, 5))), rank=3)

    def loss(layer):
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.tanh(layer(x)) * weights))(x) ** 2)

    assert_same_gradients(
        loss, lambda x, w: matrix_conv(x, w, (3, 3)), lambda x, w: tucker_conv(x, w.reshape(3, 3, 4, 5)), kernel
    )


def test_from_outside_the_gradients_differentiate_bases_and_all(x64, rng):
    """A directional derivative of Theorem 1's gradient of the core, along the core, against a finite difference."""
    kernel = hosvd(jnp.asarray(rng.normal(size=(6, 5))), rank=3)
    direction, x = jnp.asarray(rng.normal(size=(3, 3))), jnp.asarray(rng.normal(size=(7, 6)))

    def of_core(t):
        moved = kernel._replace(core=kernel.core + t * direction)
        return value_and_grad(lambda w: jnp.sum(jnp.sin(tucker_linear(x, w, plan="factored"))))(moved)[1].core

    _, slope = jax.jvp(of_core, (jnp.zeros(()),), (jnp.ones(()),))
    step = 1e-5
    np.testing.assert_allclose(slope, (of_core(step) - of_core(-step)) / (2 * step), rtol=1e-6, atol=1e-7)
