"""Losses that contain a derivative of the network: gradients of Theorem 1 are those of the kernel's chart there as well."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tdlrt_jax import densify, hosvd, nn, to_dense, value_and_grad
from tdlrt_jax.baselines import matrix_conv
from tdlrt_jax.conv import tucker_conv, tucker_conv_batch_norm, tucker_linear
from tdlrt_jax.frame import core_frame

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


def jitted(layer):
    """The loss's own jit, by which a layer is traced before anything differentiates it."""
    return jax.jit(layer)


def scanned(layer):
    def apply(x):
        return jax.lax.scan(lambda carry, _: (carry, layer(x)), 0.0, length=1)[1][0]

    return apply


@pytest.mark.parametrize("wrap", [jitted, scanned, jax.checkpoint, jax.vmap], ids=["jit", "scan", "checkpoint", "vmap"])
@pytest.mark.parametrize("plan", ["factored", "merge_out"])
def test_of_a_layer_within_a_transformation_of_the_losss_own(case, plan, wrap):
    kernel, x, weights = case

    def loss_of(layer):
        whole = wrap(layer) if wrap is not jax.vmap else lambda x: jax.vmap(lambda z: layer(z[None])[0])(x)
        critic = jax.grad(lambda x: jnp.sum(jnp.tanh(whole(x)) * weights))
        return jnp.sum(critic(x) ** 2) + jnp.sum(whole(x) ** 2)

    assert_same_gradients(loss_of, lambda x, w: tucker_conv(x, w, plan=plan), dense_conv, kernel)


@pytest.mark.parametrize("inner", [False, True], ids=["the kernel closed over", "the kernel an argument"])
def test_of_a_jitted_network(x64, rng, inner):
    """As users write it: the network a jitted function of parameters and input, the loss with its derivative in the input."""
    first, second = (hosvd(jnp.asarray(rng.normal(size=shape)), rank=2) for shape in ((3, 3, 2, 4), (3, 3, 4, 3)))
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 2)))

    def of(conv, convert):
        @jax.jit
        def network(params, x):
            first, second = map(convert, params)
            return jnp.sum(jnp.sin(conv(jnp.tanh(conv(x, first)), second)))

        def loss(params):
            slope = jax.grad(network, argnums=1) if inner else jax.grad(lambda _, x: network(params, x), argnums=1)
            return jnp.sum(jax.jit(slope)(params, x) ** 2)

        return jax.jit(value_and_grad(loss))((first, second))

    found = of(lambda x, w: tucker_conv(x, w, plan="factored"), lambda w: w)
    expected = of(tucker_conv, to_dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), found, expected)


@pytest.mark.parametrize("plan", ["factored", "merge_in"])
def test_second_derivatives_in_the_input(case, plan):
    """A Laplacian, by two derivatives in the input, and then one in the kernel."""
    kernel, x, weights = case

    def loss(layer):
        def energy(x):
            return jnp.sum(jnp.tanh(layer(x)) * weights)

        def along(direction):
            return jnp.sum(jax.jvp(jax.grad(energy), (x,), (direction,))[1] * direction)

        return along(jnp.ones_like(x)) ** 2 + jnp.sum(jax.grad(lambda x: jnp.sum(jax.grad(energy)(x) ** 2))(x) ** 2)

    assert_same_gradients(loss, lambda x, w: tucker_conv(x, w, plan=plan), dense_conv, kernel)


@pytest.mark.parametrize("model", [False, True], ids=["to_dense", "densify"])
def test_forward_mode_of_dense_kernels(x64, rng, model):
    """As ``value_and_grad`` says: a derivative along a direction, of the layer with its kernel made dense in the loss."""
    kernel, x, direction = hosvd(jnp.asarray(rng.normal(size=(3, 3, 4, 5))), rank=3), *rng.normal(size=(2, 2, 6, 6, 4))
    layer = nn.TuckerConv(4, 5, (3, 3), use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graphdef, _ = nnx.split(layer)

    def apply(x, w):
        if model:
            return densify(nnx.merge(graphdef, nnx.State({"kernel": nnx.Param(w)})))(x)
        return tucker_conv(x, to_dense(w))

    def loss_of(layer):
        return jnp.sum(jax.jvp(lambda x: jnp.tanh(layer(x)), (x,), (direction,))[1] ** 2)

    def by_reverse_mode(layer):
        def along(x):
            _, pullback = jax.vjp(lambda x: jnp.tanh(layer(x)), x)
            return jax.vjp(lambda dy: pullback(dy)[0], jnp.zeros((2, 6, 6, 5)))[1](direction)[0]

        return jnp.sum(along(x) ** 2)

    x, direction = jnp.asarray(x), jnp.asarray(direction)
    found = value_and_grad(lambda w: loss_of(lambda x: apply(x, w)))(kernel)
    expected = value_and_grad(lambda w: by_reverse_mode(lambda x: tucker_conv(x, w, plan="factored")))(kernel)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10 * float(jnp.max(jnp.abs(other))))


def test_an_attack_that_is_not_differentiated_is_a_constant(case):
    kernel, x, weights = case

    def loss(layer):
        slope = jax.jit(jax.grad(lambda x: jnp.sum(jnp.tanh(layer(x)) * weights)))
        return jnp.sum(layer(x + 0.1 * jnp.sign(jax.lax.stop_gradient(slope(x)))) ** 2)

    assert_same_gradients(loss, lambda x, w: tucker_conv(x, w, plan="factored"), dense_conv, kernel)


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


def by_rule(x, w):
    return jnp.sum(jnp.sin(tucker_linear(x, w, plan="factored")))


def by_the_dense_kernel(x, w):
    return jnp.sum(jnp.sin(x @ to_dense(w)))


def with_a_penalty(x, w):
    return by_rule(x, w) + jnp.sum(jnp.cos(to_dense(w)))


def with_a_slope(x, w):
    return jnp.sum(jax.grad(by_rule)(x, w) ** 2)


def with_a_jitted_slope(x, w):
    return jnp.sum(jax.jit(jax.grad(by_rule))(x, w) ** 2)


@pytest.mark.parametrize(
    "loss", [by_rule, by_the_dense_kernel, with_a_penalty, with_a_slope, with_a_jitted_slope], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("core_only", [False, True], ids=["all", "core only"])
def test_from_outside_the_gradients_differentiate_bases_and_all(x64, rng, loss, core_only):
    """A directional derivative of Theorem 1's gradients, along a kernel that moves, against a finite difference."""
    dense, direction, x = (jnp.asarray(rng.normal(size=shape)) for shape in ((6, 5), (6, 5), (7, 6)))

    def gradients(t):
        moved = hosvd(dense + t * direction, rank=3)
        point = core_frame(moved) if core_only else moved
        return value_and_grad(partial(loss, x))(point)[1]

    _, slopes = jax.jvp(jax.jit(gradients), (jnp.zeros(()),), (jnp.ones(()),))
    step = 1e-5
    ahead, behind = gradients(step), gradients(-step)
    for slope, one, other in zip(*map(jax.tree.leaves, (slopes, ahead, behind)), strict=True):
        difference = (one - other) / (2 * step)
        np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-7 * float(jnp.max(jnp.abs(difference))))
