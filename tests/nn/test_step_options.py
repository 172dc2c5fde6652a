"""Options of the jitted step of nnx models: micro-batches, a second pass, and those of the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax import nn as tnn
from tests.nn.test_training import (
    Network,
    assert_trees_close,
    check_state,
    images_and_labels,
    kernels,
    loss_fn,
    loss_with_aux,
    make_optimizer,
    statistics,
)


@pytest.fixture(scope="module")
def batch():
    return images_and_labels()


class Plain(nnx.Module):
    """Without normalization, so that a batch's gradient is the mean of its parts'."""

    def __init__(self, rngs):
        self.conv = tnn.TuckerConv(2, 6, (2, 2), rank=(None, None, 2, 5), padding="VALID", rngs=rngs)
        self.linear = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.linear(jnp.mean(jax.nn.relu(self.conv(x)), axis=(1, 2)))


def taken(network, batch, steps=3, integrator="bug", loss_fn=loss_fn, **options):
    """A model and an optimizer after some steps, and what the last one told."""
    model = network(nnx.Rngs(0))
    optimizer = make_optimizer(model, integrator)
    step = tnn.tdlrt_step(loss_fn, **options)
    for _ in range(steps):
        info = step(model, optimizer, *batch)
    check_state(model, optimizer, steps)
    return model, optimizer, info


def assert_same(one, other, tolerance=1e-5):
    """Kernels as the tensors that they are, everything else as it is."""
    for name, kernel in kernels(one).items():
        np.testing.assert_allclose(tdlrt_jax.to_dense(kernel), tdlrt_jax.to_dense(kernels(other)[name]), atol=tolerance)
    assert_trees_close(*(nnx.as_pure(nnx.split(model, nnx.Param, ...)[2]) for model in (one, other)), tolerance)
    np.testing.assert_allclose(one.linear.kernel.get_value(), other.linear.kernel.get_value(), atol=tolerance)


@pytest.mark.parametrize("integrator", ["bug", "parallel", "fixed_rank"])
def test_micro_batches_are_the_full_batch(batch, integrator):
    whole, _, info = taken(Plain, batch, integrator=integrator)
    parts, _, mean = taken(Plain, batch, integrator=integrator, accumulate=4)
    assert_same(whole, parts)
    np.testing.assert_allclose(info.loss, mean.loss, rtol=1e-5)


@pytest.mark.parametrize("kind", ["cores_only", "ranks_stay"])
def test_micro_batches_between_adaptations(batch, kind):
    whole, *_ = taken(Plain, batch, **{kind: True})
    parts, *_ = taken(Plain, batch, accumulate=2, **{kind: True})
    assert_same(whole, parts)


def test_micro_batches_move_statistics_one_after_the_other_and_stack_aux(batch):
    model, _, info = taken(Network, batch, 1, loss_fn=loss_with_aux, has_aux=True, accumulate=3)
    assert info.aux.shape == (3, 8, 3)
    expected = Network(nnx.Rngs(0))
    for part in range(3):
        expected(batch[0][8 * part : 8 * (part + 1)])
    assert_trees_close(statistics(model), statistics(expected))
    with pytest.raises(ValueError, match=r"accumulate=5 does not divide .*\(24, 4, 4, 2\)"):
        taken(Network, batch, 1, accumulate=5)


def test_a_second_pass_gives_what_the_first_one_does(batch):
    one, *_ = taken(Network, batch)
    two, *_ = taken(Network, batch, second_pass=True)
    assert_same(one, two)


@pytest.mark.parametrize("graph_mode", [True, False])
def test_with_compiler_options_a_step_is_the_same(batch, graph_mode):
    with nnx.set_graph_mode(graph_mode):
        usual, usual_optimizer, info = taken(Network, batch)
        model, optimizer, with_them = taken(Network, batch, compiler_options={"xla_embed_ir_in_executable": True})
        assert_same(usual, model)
        assert_trees_close(
            *(nnx.as_pure(o.opt_state).cumulative_truncation_error for o in (usual_optimizer, optimizer)), 1e-5
        )
        np.testing.assert_allclose(info.loss, with_them.loss, rtol=1e-5)


def test_compiler_options_reach_the_compiler(batch):
    with pytest.raises(Exception, match="xla_no_such_option"):
        taken(Network, batch, 1, compiler_options={"xla_no_such_option": True})


def test_steps_with_compiler_options_compile_once_and_follow_other_shapes(batch):
    traced = []

    def counted(model, x, y):
        traced.append(x.shape)
        return loss_fn(model, x, y)

    model = Network(nnx.Rngs(0))
    optimizer = make_optimizer(model)
    step = tnn.tdlrt_step(
        counted, compiler_options=tdlrt_jax.compiler_options() or {"xla_embed_ir_in_executable": True}
    )
    step(model, optimizer, *batch)
    once = len(traced)
    step(model, optimizer, *batch)
    assert len(traced) == once
    step(model, optimizer, batch[0][:8], batch[1][:8])
    assert len(traced) == 2 * once
    check_state(model, optimizer, 3)


def test_in_a_jitted_function_of_the_users(batch):
    model = Network(nnx.Rngs(0))
    optimizer, step = make_optimizer(model), tnn.tdlrt_step(loss_fn, second_pass=True)
    nnx.jit(lambda model, optimizer: [step(model, optimizer, *batch).loss for _ in range(2)])(model, optimizer)
    assert_same(model, taken(Network, batch, 2)[0])
