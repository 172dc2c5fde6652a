"""What states of inner transformations hold of a kernel: starts, second moments, scalars, labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tdlrt_jax
from tdlrt_jax import tdlrt
from tests.helpers import regression, train


@pytest.mark.parametrize("inner", [lambda: optax.adagrad(0.1), lambda: optax.yogi(0.01)], ids=["adagrad", "yogi"])
def test_state_that_starts_above_zero_has_none_of_it_in_the_padding(x64, inner):
    """So the arrays may shrink before the first step, and their sizes change nothing."""
    losses = []
    for capacity, second in (((4, 3, 6), 5), ((3, 3, 5), 4)):
        params, loss = regression(jnp.float64, capacity=capacity)
        params["second"]["kernel"] = tdlrt_jax.resize(params["second"]["kernel"], second)
        tx = tdlrt(inner(), tolerance=0.05, max_rank={"first": (3, 3, 5), "second": 4})
        tdlrt_jax.resize(tx.init(params), tdlrt_jax.fit_capacity(params, multiple=1))
        losses.append(train(params, loss, tx, 20)[2])
    np.testing.assert_allclose(*losses, rtol=1e-9)


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_centered_second_moments_stay_above_the_square_of_the_first(x64, integrator):
    """Or optax takes the root of a negative number, and the step is left out for ever."""
    params, loss = regression(jnp.float64)
    tx = tdlrt(optax.rmsprop(0.01, centered=True), tolerance=0.05, integrator=integrator)
    _, state, losses, _ = train(params, loss, tx, 60)
    assert int(state.skipped) == 0 and int(state.step) == 60
    assert losses[-1] < losses[0]


def test_scalars_of_the_bases_are_of_the_first_gradient():
    """One an array, as novograd has them: in the second update of bug the bases see no gradient."""
    params, loss = regression(jnp.float32)
    grads = tdlrt_jax.value_and_grad(loss)(params)[1]
    for integrator in ("bug", "parallel"):
        tx = tdlrt(optax.novograd(0.01), tolerance=0.0, integrator=integrator)
        state = train(params, loss, tx, 1)[1]
        found = state.inner[0].nu["second"]["kernel"].factors
        u = params["second"]["kernel"].factors
        expected = [float(jnp.sum((dk - v @ (v.T @ dk)) ** 2)) for v, dk in zip(u, grads["second"]["kernel"].factors)]
        np.testing.assert_allclose([float(nu) for nu in found], expected, rtol=1e-4)


def test_labels_leaf_by_leaf_are_those_of_kernels():
    """The parts of the other label's kernels are none of this one's state."""
    params, loss = regression(jnp.float32)

    def label(path, _):
        return "first" if "first" in jax.tree_util.keystr(path) else "rest"

    by_leaf = jax.tree_util.tree_map_with_path(label, params)
    by_node = {"first": "first", "second": "rest"}
    ends = []
    for labels in (by_leaf, by_node):
        inner = optax.partition({"first": optax.adam(0.01), "rest": optax.sgd(0.05, momentum=0.9)}, labels)
        ends.append(train(params, loss, tdlrt(inner, tolerance=0.1), 5)[0])
    jax.tree.map(np.testing.assert_array_equal, *ends)
