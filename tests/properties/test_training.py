"""Gradients, steps and capacities against Algorithm 1 in NumPy, and one update whatever the containers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tdlrt_jax import kernel_paths, resize, tdlrt, to_dense, value_and_grad
from tdlrt_jax.frame import is_kernel, lift
from tdlrt_jax.paths import path_name
from tests import references
from tests.helpers import tangent_to_dense
from tests.properties.containers import containers, order_of
from tests.properties.strategies import (
    TOLERANCE,
    Form,
    assert_close,
    assert_orthonormal,
    cases,
    dtypes,
    forms,
    kernel_of,
    kernels,
    precision,
    ranks,
    seeds,
)

# Fewer forms: a step takes long to compile.
SMALL = ((4, 3), (6, 5), (2, 3, 4), (3, 1, 2, 4))


def loss_of(params, weights, target):
    return jnp.sum(weights * (to_dense(params["w"]) - target) ** 2) / 2


def problem(shape, seed, dtype):
    """A loss with another curvature for every entry, and its dense gradient."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1.5, shape).astype(dtype)
    target = rng.standard_normal(shape).astype(dtype)
    return weights, target, lambda dense: weights.astype(float) * (dense - target.astype(float))


@jax.jit
def projected(kernel, weights, target):
    value, grads = value_and_grad(loss_of)({"w": kernel}, weights, target)
    return value, tangent_to_dense(grads["w"], lift(kernel)), to_dense(lift(kernel))


@cases(ci=20, nightly=900)
@given(st.data(), dtypes, seeds)
def test_gradients_are_the_projection_onto_the_tangent_space(data, dtype, seed):
    with precision(dtype):
        form, kernel = data.draw(kernels(dtype, highest_decades=2))
        weights, target, dense_gradient = problem(form.shape, seed, dtype)
        value, tangent, chart = projected(kernel.tucker, weights, target)
        dense = dense_gradient(kernel.dense)
        assert_close(chart, kernel.dense, TOLERANCE[dtype])
        assert_close(value, np.sum(dense**2 / weights) / 2, TOLERANCE[dtype])
        # Slices that depend on each other up to rounding have no tangent space.
        spectra = [np.linalg.svd(references.unfold(kernel.core, m), compute_uv=False) for m in range(kernel.core.ndim)]
        assume(min(values[-1] / values[0] for values in spectra) > 1e-3)
        expected = references.projected_gradient(kernel.core, kernel.factors, dense)
        # Q of a spectrum that falls to 1e-3 is accurate to a thousand roundings.
        assert_close(tangent, expected, 100 * TOLERANCE[dtype], np.linalg.norm(dense))


@functools.partial(jax.jit, static_argnums=(0, 1))
def one_step(integrator, criterion, kernel, weights, target, learning_rate, tau):
    gradient = functools.partial(value_and_grad(loss_of), weights=weights, target=target)
    options = {} if integrator == "fixed_rank" else {"criterion": criterion}
    transformation = tdlrt(
        optax.sgd(learning_rate), tolerance=lambda step: tau, integrator=integrator, spare=0, **options
    )
    params = {"w": kernel}
    state = transformation.init(params)
    _, grads = gradient(params)
    updates, state = transformation.update(grads, state, params, value_and_grad_fn=gradient)
    return optax.apply_updates(params, updates)["w"], state


@cases(ci=8, nightly=500)
@given(
    st.data(),
    st.sampled_from(["bug", "parallel", "fixed_rank"]),
    st.sampled_from(["tail", "each"]),
    seeds,
    st.floats(1e-3, 0.5),
    st.floats(0.01, 0.6),
)
def test_a_step_is_that_of_the_algorithm(data, integrator, criterion, seed, learning_rate, tau):
    with precision("float64"):
        form = data.draw(forms(SMALL))
        assume(not all(form.whole))
        kernel = kernel_of(form, data.draw(ranks(form)), data.draw(seeds), "float64")
        weights, target, gradient = problem(form.shape, seed, "float64")
        tau = np.float32(tau)
        found, state = one_step(integrator, criterion, kernel.tucker, weights, target, learning_rate, tau)

        def reference(tau):
            if integrator == "parallel":
                return references.parallel_step(
                    kernel.core, kernel.factors, gradient, learning_rate, tau, criterion=criterion
                )
            adaptive = integrator == "bug"
            return references.algorithm1_step(
                kernel.core, kernel.factors, gradient, learning_rate, tau, adaptive, criterion=criterion
            )

        core, factors = reference(float(tau))
        # Where the capacity leaves room for the ranks and these do not hang on rounding.
        assume(all(r <= size for r, size in zip(core.shape, form.capacity)))
        assume(len({reference(float(tau) * (1 + change))[0].shape for change in (-1e-6, 1e-6)}) == 1)
        expected = references.to_dense(core, factors)
        assert_close(to_dense(found), expected, 1e-9, np.linalg.norm(kernel.dense) + np.linalg.norm(expected))
        assert state.rank["w"].tolist() == list(core.shape) and int(state.status) & 3 == 0
        assert_orthonormal(found.factors, core.shape, 1e-12)


@functools.partial(jax.jit, static_argnums=0)
def momentum_step(integrator, params, state, weights, target):
    transformation = optimizer(integrator)
    gradient = functools.partial(value_and_grad(loss_of), weights=weights, target=target)
    _, grads = gradient(params)
    updates, state = transformation.update(grads, state, params, value_and_grad_fn=gradient)
    return optax.apply_updates(params, updates), state


def optimizer(integrator):
    return tdlrt(optax.sgd(0.05, momentum=0.9), tolerance=0.05, integrator=integrator, max_rank=2)


@cases(ci=5, nightly=200)
@given(st.data(), st.sampled_from(["bug", "parallel"]), seeds)
def test_training_goes_on_the_same_in_larger_arrays(data, integrator, seed):
    """Two steps with momentum, in arrays of the bound's size and in the largest, changed over in their midst or not."""
    with precision("float64"):
        shape = data.draw(st.sampled_from([(4, 3), (5, 6), (2, 3, 4)]))
        form = data.draw(forms([shape]))._replace(capacity=(2,) * len(shape), whole=(False,) * len(shape))
        kernel = kernel_of(form, data.draw(ranks(form)), data.draw(seeds), "float64")
        weights, target, _ = problem(shape, seed, "float64")
        step = functools.partial(momentum_step, integrator, weights=weights, target=target)
        small = {"w": kernel.tucker}
        small_state = optimizer(integrator).init(small)
        large, large_state = resize(small, shape), resize(small_state, shape)
        first = step(small, small_state)
        between = step(large, large_state)
        expected, found = step(*first), step(*resize(between, 2) if data.draw(st.booleans()) else between)
        assert expected[1].rank["w"].tolist() == found[1].rank["w"].tolist()
        dense = np.asarray(to_dense(expected[0]["w"]))
        assert_close(to_dense(found[0]["w"]), dense, 1e-9, np.linalg.norm(dense) + np.linalg.norm(kernel.dense))


def network_loss(leaves):
    """Of two kernels and a bias, each used once."""
    first, bias, second, scale = leaves
    hidden = jnp.tanh(jnp.einsum("ab,bc->ac", jnp.linspace(-1, 1, 12).reshape(3, 4), to_dense(first)) + bias)
    return jnp.mean((scale * hidden @ to_dense(second) - 1) ** 2)


@functools.lru_cache
def expected_update():
    """The four leaves after an update, in a plain list."""
    return updated(lambda leaves: list(leaves), leaves_of(), [0, 1, 2, 3])


def leaves_of():
    first = kernel_of(Form((4, 3), (2, 2), (False, False)), (2, 2), 1, "float32").tucker
    second = kernel_of(Form((3, 2), (2, 2), (False, False)), (1, 1), 2, "float32").tucker
    return [first, jnp.arange(3.0), second, jnp.float32(0.7)]


def updated(make, leaves, order):
    def listed(tree):
        found = dict(zip(order, jax.tree.leaves(tree, is_leaf=is_kernel)))
        return [found[number] for number in range(4)]

    transformation = tdlrt(optax.adam(0.05), tolerance=0.1)
    gradient = value_and_grad(lambda params: network_loss(listed(params)))
    params = make(leaves)
    state = transformation.init(params)
    # Not compiled: XLA would compile anew for every tree.
    with jax.disable_jit():
        value, grads = gradient(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    with jax.disable_jit():
        updates, state = transformation.update(grads, state, params, value_and_grad_fn=gradient)
    params = optax.apply_updates(params, updates)
    assert jax.tree.structure(params) == jax.tree.structure(make(leaves))
    return float(value), [np.asarray(to_dense(leaf)) for leaf in listed(params)], list(state.rank)


@cases(ci=5, nightly=150)
@given(st.data())
def test_an_update_is_the_same_in_any_containers(data):
    make = data.draw(containers(4))
    leaves, order = leaves_of(), order_of(make, 4)
    tree = make(leaves)
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_kernel)]
    if len(set(paths)) < len(paths):
        with pytest.raises(ValueError, match="two leaves have the path"):
            tdlrt(optax.adam(0.05), tolerance=0.1).init(tree)
        return
    value, found, _ = updated(make, leaves, order)
    expected_value, expected, _ = expected_update()
    assert value == pytest.approx(expected_value, rel=1e-6)
    for a, b in zip(found, expected):
        assert_close(a, b, 1e-5)
    assert len(kernel_paths(tree)) == 2
