"""Losses that change more than the model's parameters: random streams and modules among their arguments, and what they sow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax import nn as tnn
from tests.nn.test_training import assert_trees_close


class Noisy(nnx.Module):
    """A Tucker layer, and dropout by a stream that the caller has."""

    def __init__(self, rngs):
        self.layer = tnn.TuckerLinear(6, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs):
        return self.dropout(self.layer(x), rngs=rngs)


def noisy_loss(model, rngs, x):
    return jnp.mean((model(x, rngs=rngs) - 1) ** 2)


def test_gradients_with_a_random_stream_among_the_arguments():
    """As flax's of the dense model: the same draws, the same gradient of what is not the kernel, and the stream has moved."""
    model, x = Noisy(nnx.Rngs(0)), jnp.ones((7, 6))
    dense = tnn.densify(model)
    ours, theirs, other = nnx.Rngs(7), nnx.Rngs(7), nnx.Rngs(7)
    value, grads = nnx.jit(tnn.value_and_grad(noisy_loss))(model, ours, x)
    expected, expected_grads = nnx.value_and_grad(noisy_loss)(dense, theirs, x)
    again, _ = nnx.jit(lambda model, rngs, x: tnn.value_and_two_grads(noisy_loss)(model, rngs, x=x)[0])(model, other, x)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(
        grads["layer"]["bias"].get_value(), expected_grads["layer"]["bias"].get_value(), rtol=1e-5
    )
    assert int(ours.default.count[...]) == int(theirs.default.count[...]) == int(other.default.count[...]) == 1


@pytest.mark.parametrize("options", [{}, {"compiler_options": {"xla_llvm_disable_expensive_passes": True}}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_moves_the_random_stream_among_its_arguments(options, accumulate):
    model, rngs, x = Noisy(nnx.Rngs(0)), nnx.Rngs(7), jnp.ones((8, 6))
    optimizer = nnx.Optimizer(model, tnn.tdlrt(optax.sgd(0.1), tolerance=0.1), wrt=nnx.Param)
    step = tnn.tdlrt_step(noisy_loss, accumulate=accumulate, **options)
    losses = [float(step(model, optimizer, rngs, x=x).loss) for _ in range(5)]
    assert int(rngs.default.count[...]) == 5 * accumulate, "once an evaluation, the second gradient's being none"
    assert len(set(losses)) == 5 and losses[-1] < losses[0]
    before = jax.tree.map(np.array, nnx.as_pure(nnx.state(model)))
    info = step(model, optimizer, rngs, x=x * jnp.nan)
    assert int(info.status) & tdlrt_jax.status.SKIPPED and int(rngs.default.count[...]) == 5 * accumulate
    assert_trees_close(nnx.as_pure(nnx.state(model)), before, 0)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")  # outside of nnx.capture
def test_a_model_may_sow():
    class Sowing(nnx.Module):
        def __init__(self, rngs):
            self.layer = tnn.TuckerLinear(6, 5, rank=2, rngs=rngs)

        def __call__(self, x):
            y = self.layer(x)
            self.sow(nnx.Intermediate, "features", jnp.sum(y))
            return y

    model, x = Sowing(nnx.Rngs(0)), jnp.ones((3, 6))
    optimizer = nnx.Optimizer(model, tnn.tdlrt(optax.sgd(0.1), tolerance=0.1), wrt=nnx.Param)
    step = tnn.tdlrt_step(lambda model, x: jnp.mean((model(x) - 1) ** 2))
    losses = []
    for _ in range(3):
        expected = float(jnp.sum(model.layer(x)))
        losses.append(float(step(model, optimizer, x).loss))
        (sown,) = nnx.pop(model, nnx.Intermediate)["features"].get_value()
        np.testing.assert_allclose(sown, expected, rtol=1e-5)
    assert losses[-1] < losses[0]
    step(model, optimizer, x)
    step(model, optimizer, x)
    assert len(model.features.get_value()) == 2, "left there, what is sown is added to"
