"""``nnx.Optimizer``: transformations around ``tdlrt``, and other array sizes for a model and its optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax import nn as tnn


def build(rank=3):
    return nnx.Dict(
        body=tnn.TuckerLinear(12, 10, rank=rank, rngs=nnx.Rngs(0)),
        head=tnn.TuckerLinear(10, 4, rank=2, rngs=nnx.Rngs(1)),
    )


def loss_fn(model, x):
    return jnp.mean((model.head(jax.nn.relu(model.body(x))) - 1) ** 2)


def core(**options):
    return tdlrt_jax.tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.1, **options)


X = jax.random.normal(jax.random.key(0), (6, 12))

AROUND = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "ema": lambda tx: optax.chain(tx, optax.ema(0.9)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_stands_around_tdlrt_takes_the_steps_of_plain_optax(around):
    tx = around(core(integrator="parallel"))
    model = build()
    optimizer = nnx.Optimizer(model, tnn.purify(tx), wrt=nnx.Param)
    graphdef, variables = nnx.split(model)
    params = nnx.as_pure(variables)
    state = tx.init(params)

    @nnx.jit
    def step(model, optimizer):
        _, grads = tnn.value_and_grad(loss_fn)(model, X)
        optimizer.update(model, grads)

    @jax.jit
    def plain(params, state):
        grads = tdlrt_jax.value_and_grad(lambda params: loss_fn(nnx.merge(graphdef, nnx.State(params)), X))(params)[1]
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        step(model, optimizer)
        params, state = plain(params, state)
    found = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
    for one, other in zip(found, jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def pair(rank, momentum=0.9):
    model = build(rank)
    tx = tnn.tdlrt(optax.sgd(0.1, momentum=momentum), tolerance=0.1)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def arrays(*trees):
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.as_pure(trees))]


@pytest.mark.parametrize("momentum", [0.9, None])
def test_training_goes_on_in_arrays_of_another_size(momentum):
    """As it does without, and as that of a functional resize."""
    (model, optimizer), (same, its_optimizer) = pair(3, momentum), pair(3, momentum)
    step = tnn.tdlrt_step(loss_fn)
    for both in ((model, optimizer), (same, its_optimizer)):
        step(*both, X)
    names = tdlrt_jax.fit_capacity(nnx.state(model))
    tnn.resize(model, optimizer, {name: 8 if "body" in name else 4 for name in names})
    assert model.body.kernel.get_value().core.shape == (8, 8)
    assert model.head.kernel.get_value().core.shape == (4, 4)
    moments = tdlrt_jax.kernel_paths(nnx.as_pure(optimizer.opt_state))
    assert {kernel.core.shape for kernel in moments.values()} == (set() if momentum is None else {(8, 8), (4, 4)})
    for _ in range(2):
        ours, theirs = step(model, optimizer, X), step(same, its_optimizer, X)
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)


def test_a_size_that_does_not_fit_changes_neither():
    model, optimizer = pair(3)
    tnn.tdlrt_step(loss_fn)(model, optimizer, X)
    before = arrays(nnx.state(model), optimizer.opt_state)
    with pytest.raises(ValueError, match="would cut entries that are not zero"):
        tnn.resize(model, optimizer, 1)
    zeros = nnx.clone(model)  # which any arrays hold, other than the moments
    nnx.update(zeros, jax.tree.map(jnp.zeros_like, nnx.state(zeros, nnx.Param)))
    with pytest.raises(ValueError, match="would cut entries that are not zero"):
        tnn.resize(zeros, optimizer, 1)
    assert zeros.body.kernel.get_value().core.shape == model.body.kernel.get_value().core.shape
    for one, other in zip(before, arrays(nnx.state(model), optimizer.opt_state), strict=True):
        np.testing.assert_array_equal(one, other)
