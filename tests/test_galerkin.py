"""The second gradient out of the first pass is that of a second pass; where it cannot be had, it is evaluated anew."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import lift, tdlrt, tdlrt_step, to_dense, tucker_conv, tucker_linear, value_and_grad
from tdlrt_jax.frame import Frame, is_kernel
from tdlrt_jax.galerkin import value_and_two_grads
from tdlrt_jax.integrators import augment
from tests.helpers import random_kernel

LAYERS = {
    "conv": {"shape": (3, 3, 4, 6), "rank": (2, None, 3, 4), "options": {}},
    "strided": {"shape": (3, 2, 6, 5), "rank": (2, 2, 4, 3), "options": {"strides": 2, "padding": ((1, 0), (0, 2))}},
    "circular": {"shape": (2, 3, 5, 6), "rank": (2, 3, 3, 4), "options": {"padding": "CIRCULAR"}},
    "pointwise": {"shape": (1, 1, 6, 8), "rank": (1, 1, 3, 3), "options": {"strides": 2}},
    "two groups": {"shape": (3, 3, 4, 6), "rank": (3, 3, 2, 3), "options": {"groups": 2, "dilation": 2}},
}


def network(rng, dtype, layers=tuple(LAYERS)):
    chosen = {name: LAYERS[name] for name in layers}
    params = {name: random_kernel(rng, layer["shape"], layer["rank"], dtype=dtype) for name, layer in chosen.items()}
    params["linear"] = random_kernel(rng, (6, 5), (3, 3), (4, 4), dtype)
    params["bias"] = jnp.zeros(5, dtype)
    x = jnp.asarray(rng.normal(size=(3, 9, 8, 4)), dtype)

    def loss(params, x):
        for name, layer in chosen.items():
            x = jnp.tanh(tucker_conv(x, params[name], **layer["options"]))
        return jnp.sum(jnp.sin(tucker_linear(x.mean((1, 2)), params["linear"]) + params["bias"]))

    return params, loss, x


def augmented(rng, params):
    """Core-only frames at ``[U | Ũ]`` for random steps, in the place of the kernels."""

    def at(node):
        if not is_kernel(node):
            return node
        frame = jax.jit(lift)(node)
        step = jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape), leaf.dtype), node)
        step = step._replace(
            factors=tuple(
                None if u is None else du * np.any(u != 0, axis=0) for u, du in zip(node.factors, step.factors)
            )
        )
        basis = jax.jit(augment)(frame, step)
        return Frame(basis.core, None, basis.bases, None)

    return jax.tree.map(at, params, is_leaf=is_kernel)


def both(loss, params, at, *args):
    """The first evaluation, and the second one out of it and anew."""
    first, second = value_and_two_grads(loss)(params, *args)
    return first, second.at_same_network(at), second(at)


def assert_trees_close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        scale = max(float(np.max(np.abs(b), initial=0)), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-12), (False, 2e-5)])
def test_the_second_gradient_is_that_of_a_second_pass(rng, x64, tolerance):
    with jax.enable_x64(x64):
        params, loss, x = network(rng, np.float64 if x64 else np.float32)
        at = augmented(rng, params)
        first, same, anew = jax.jit(lambda p, a, x: both(loss, p, a, x))(params, at, x)
        assert_trees_close(first, jax.jit(value_and_grad(loss))(params, x), tolerance)
        assert_trees_close(same, anew, tolerance)


def test_it_costs_one_convolution_a_layer_and_no_forward_pass(rng):
    params = {"conv": random_kernel(rng, (3, 3, 8, 8), (3, 3, 3, 3), dtype=np.float32)}
    x = jnp.ones((2, 12, 12, 8))

    def loss(params, x):
        return jnp.sum(jnp.tanh(tucker_conv(x, params["conv"], plan="factored")))

    def compiled(second):
        at = augmented(np.random.default_rng(0), params)

        def run(params, at, x):
            first, gradient = value_and_two_grads(loss)(params, x)
            return first, gradient.at_same_network(at) if second == "same" else gradient(at)

        return jax.jit(run).lower(params, at, x).compile().as_text().count(" convolution(")

    # Forward, input gradient (not needed for the first layer), kernel gradient; then one more, or two of a pass of its own.
    assert compiled("anew") - compiled("same") == 1


def shared(params, x):
    return tucker_linear(jnp.tanh(tucker_linear(x, params["w"])), params["w"])


def dense(params, x):
    return x @ to_dense(params["w"])


def unused(params, x):
    return x


def scanned(params, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(tucker_linear(x, params["w"])), None), x, None, length=3)[0]


def jitted(params, x):
    return jax.jit(lambda w, x: tucker_linear(x, w))(params["w"], x)


def rematerialized(params, x):
    return jax.checkpoint(lambda w, x: tucker_linear(x, w))(params["w"], x)


def mapped(params, x):
    return jax.vmap(lambda row: tucker_linear(row, params["w"]))(x)


def penalized(params, x):
    return tucker_linear(x, params["w"]) + jnp.sum(to_dense(params["w"]) ** 2)


def penalized_core(params, x):
    return tucker_linear(x, params["w"]) + jnp.sum(params["w"].core ** 2)


def scaled(params, x):
    return tucker_linear(x, params["w"]._replace(core=2 * params["w"].core))


OTHER_USES = [shared, dense, unused, scanned, jitted, rematerialized, mapped, penalized, penalized_core, scaled]


@pytest.mark.parametrize("apply", OTHER_USES)
def test_other_uses_of_a_kernel_are_evaluated_anew(rng, apply):
    """Several uses of one kernel, in one way or another, would add up their inputs: no tap may be trusted there."""
    with jax.enable_x64(True):
        params = {"w": random_kernel(rng, (5, 5), (2, 2)), "other": random_kernel(rng, (5, 4), (2, 2))}
        x = jnp.asarray(rng.normal(size=(7, 5)))

        def loss(params, x):
            return jnp.sum(jnp.sin(tucker_linear(apply(params, x), params["other"])))

        at = augmented(rng, params)

        @jax.jit
        def both(params, at, x):
            first, second = value_and_two_grads(loss)(params, x)
            assert second.at_same_network == second._anew
            return first, second.at_same_network(at)

        expected = jax.jit(lambda params, at, x: (value_and_grad(loss)(params, x), value_and_grad(loss)(at, x)))
        assert_trees_close(both(params, at, x), expected(params, at, x), 1e-12)


def test_what_the_loss_does_not_depend_on_costs_no_second_pass(rng):
    """A kernel that is looked at for the records alone, and one that is cast on its way to the layer."""
    params = {"w": random_kernel(rng, (5, 4), (2, 2), dtype=np.float32)}

    def loss(params, x):
        narrow = params["w"]._replace(core=params["w"].core.astype(jnp.bfloat16))
        return jnp.sum(tucker_linear(x, narrow)), jnp.linalg.norm(to_dense(params["w"]))

    _, second = value_and_two_grads(loss, has_aux=True)(params, jnp.ones((3, 5)))
    assert second.at_same_network != second._anew


@pytest.mark.parametrize("inner", [optax.sgd(0.05, momentum=0.9), optax.adam(0.01)], ids=["momentum", "adam"])
def test_training_is_the_same_with_and_without_a_second_pass(rng, inner):
    with jax.enable_x64(True):
        start, loss, x = network(rng, np.float64, ("conv",))
        ends = []
        for second_pass in (False, True):
            tx = tdlrt(inner, tolerance=0.05)
            step, params, state = tdlrt_step(loss, tx, second_pass=second_pass, donate=False), start, tx.init(start)
            for _ in range(3):
                params, state, info = step(params, state, x)
            ends.append(({name: to_dense(node) for name, node in params.items()}, info))
        assert_trees_close(ends[0], ends[1], 1e-9)


def test_fixed_rank_always_takes_a_second_pass(rng):
    """Its Galerkin point is another network."""
    with jax.enable_x64(True):
        start, loss, x = network(rng, np.float64, ("conv",))
        ends = []
        for second_pass in (False, True):
            tx = tdlrt(optax.sgd(0.05), tolerance=0.05, integrator="fixed_rank")
            step, state = tdlrt_step(loss, tx, second_pass=second_pass, donate=False), tx.init(start)
            ends.append(step(start, state, x)[0])
        assert_trees_close(*ends, 1e-12)
