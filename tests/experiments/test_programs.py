"""The compiled programs of a run: what one step does, several in one call, models and optimizers."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdlrt_jax
from experiments.options import ModelConfig, OptimizerConfig, TdlrtConfig
from experiments.run import batches, data, metrics, programs
from experiments.run.build import build_descent, build_model, build_optimizer
from tdlrt_jax.nn import TuckerLinear
from tests.experiments.jobs import IN_LOOPS, TUCKER, lines, run


class Small(nnx.Module):
    """One Tucker layer."""

    def __init__(self, rngs, classes=3):
        self.linear = TuckerLinear(16, classes, rank=2, rngs=rngs)

    def __call__(self, x):
        return self.linear(x.reshape(x.shape[0], -1))


@pytest.fixture
def small(rng):
    images = batches.to_device(
        data.Images(rng.integers(0, 256, (12, 4, 4, 1), np.uint8), np.arange(12, dtype=np.int32) % 3)
    )
    return images, batches.Transform((0.5,), (0.3,))


def test_after_a_step_that_is_not_finite_nothing_moves(small):
    images, transform = small
    tx = tdlrt_jax.tdlrt(optax.sgd(lambda step: jnp.where(step == 2, jnp.inf, 0.1)), tolerance=0.01)
    compiled, state = programs.build_programs(Small(nnx.Rngs(0)), tx, transform, seed=0)
    order, finite = jnp.arange(12).reshape(3, 4), []
    for step in range(5):
        state, report = compiled.train(state, images, order, jnp.int32(0), jnp.int32(step % 3))
        finite.append(bool(report.finite))
        kernel = tdlrt_jax.to_dense(state.params["linear"]["kernel"].get_value())
        if step == 1:
            before = np.asarray(kernel)
    assert finite == [True, True, False, False, False]
    np.testing.assert_array_equal(kernel, before)
    assert int(state.opt_state.step) == 2 and not bool(state.healthy)
    assert compiled.compilations == 1


def test_evaluation_is_by_running_averages(rng):
    """So no image's logits depend on those beside it, and what was trained is not changed."""
    images = data.Images(rng.integers(0, 256, (7, 32, 32, 3), np.uint8), np.arange(7, dtype=np.int32))
    dataset = data.Dataset("none", images, None, images, 10, np.full(3, 0.4), np.full(3, 0.2), "none")
    model = build_model(ModelConfig(model="alexnet", width=1 / 16, method="dense"), dataset, 0)
    train, transform = batches.to_device(images), batches.transform_of(dataset, crop=False, flip=False)
    compiled, state = programs.build_programs(
        model, build_descent(OptimizerConfig(), 1), transform, seed=0, adaptive=False
    )
    order = jnp.arange(7)[None]
    for step in range(3):
        state, _ = compiled.train(state, train, order, jnp.int32(step), jnp.int32(0))
    loss, accuracy = compiled.evaluate(state, train)
    nnx.update(model, state.params, state.model_state)
    model.eval()
    x = (images.images / 255 - dataset.mean) / dataset.std
    logits = jnp.concatenate([model(jnp.asarray(x[n : n + 1], jnp.float32)) for n in range(7)])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(images.labels)).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert accuracy == pytest.approx(float((logits.argmax(1) == images.labels).mean()))
    assert compiled.evaluate(state, train) == (loss, accuracy)


def test_programs_of_other_array_sizes_leave_nothing_behind(small):
    """Traces are dropped, the last two programs kept; training and evaluation go on as before."""
    images, transform = small
    tx = tdlrt_jax.tdlrt(optax.sgd(0.1), tolerance=0.01, integrator="fixed_rank")
    compiled, state = programs.build_programs(Small(nnx.Rngs(0), classes=12), tx, transform, seed=0)
    order, traces, losses = jnp.arange(12).reshape(3, 4), [], []
    for capacity in (4, 5, 6, 7, 4, 7, 4, 6):
        sizes = dict.fromkeys(tdlrt_jax.kernel_paths(state.params), (capacity, capacity))
        state = state._replace(
            params=tdlrt_jax.resize(state.params, sizes), opt_state=tdlrt_jax.resize(state.opt_state, sizes)
        )
        losses.append(compiled.evaluate(state, images)[0])
        state, _ = compiled.train(jax.tree.map(jnp.copy, state), images, order, jnp.int32(0), jnp.int32(0))
        gc.collect()
        traces.append(sum(isinstance(found, jax.extend.core.Jaxpr) for found in gc.get_objects()))
    assert compiled.compilations == 6  # not where a size comes back at once
    assert max(traces[1:]) < traces[0] and len(set(traces[1:4])) == 1
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.parametrize("adaptive, name", [(True, "xla_no_such_option"), (False, "xla_nor_this_one")])
def test_steps_are_compiled_with_the_options_for_them(small, monkeypatch, adaptive, name):
    """Adaptive ones, which are long to compile, with all; others with those of programs that run often."""
    images, transform = small
    options = {False: {"xla_no_such_option": True}, True: {"xla_nor_this_one": True}}
    monkeypatch.setattr(tdlrt_jax, "compiler_options", lambda *, runs_often=False: options[runs_often])
    descent = optax.with_extra_args_support(optax.sgd(0.1))
    tx = tdlrt_jax.tdlrt(descent, tolerance=0.01, integrator="parallel") if adaptive else descent
    compiled, state = programs.build_programs(Small(nnx.Rngs(0)), tx, transform, seed=0, adaptive=adaptive)
    step = functools.partial(compiled.train, state, images, jnp.arange(12).reshape(3, 4), jnp.int32(0), jnp.int32(0))
    with pytest.raises(jax.errors.JaxRuntimeError, match=name):
        step()


@pytest.mark.parametrize("method", ["dense", "tdlrt", "cores between"])
def test_several_steps_of_one_call_are_the_same_steps(tmp_path, method):
    """Up to rounding; calls end where a run evaluates, saves, or moves bases, and a run may go on with other calls."""
    options = [*TUCKER, "--method", "dense"] if method == "dense" else [*TUCKER, "--no-resize"]
    options += [*IN_LOOPS, "--evaluate-every", "4", "--save-every", "5"]
    if method == "cores between":
        options += ["--adapt-every", "3", "--cores-between"]
    for name, at_once in (("one", 1), ("four", 4)):
        assert run(*options, "--steps-at-once", at_once, "--run-dir", tmp_path / name) == 0
    one, four = lines(tmp_path / "one"), lines(tmp_path / "four")
    for record, other in zip(one, four, strict=True):
        assert [point["step"] for point in record["curve"]] == [point["step"] for point in other["curve"]]
        assert record.get("ranks") == other.get("ranks")
        for name in ("train_loss", "test_loss", "validation_loss"):  # rounding grows from 1e-7 to 1e-4 in twelve steps
            np.testing.assert_allclose(record[name], other[name], rtol=1e-3)
    np.testing.assert_allclose(*(run[0]["curve"][0]["test_loss"] for run in (one, four)), rtol=1e-4)
    assert [record["step"] for record in four] == [6, 12]
    # The checkpoints in an epoch's midst were made by both after the same steps.
    assert {path.name for path in (tmp_path / "one" / "checkpoints").iterdir()} == {
        path.name for path in (tmp_path / "four" / "checkpoints").iterdir()
    }


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_other_optimizers_lower_the_loss(small, optimizer):
    images, transform = small
    config = OptimizerConfig(optimizer=optimizer, learning_rate=0.02, weight_decay=1e-4, clip=1.0)
    compiled, state = programs.build_programs(
        Small(nnx.Rngs(0)), build_optimizer(config, TdlrtConfig(tau=0.01), 1), transform, seed=0
    )
    before, _ = compiled.evaluate(state, images)
    for _ in range(20):
        state, _ = compiled.train(state, images, jnp.arange(12)[None], jnp.int32(0), jnp.int32(0))
    assert compiled.evaluate(state, images)[0] < 0.8 * before


def test_dense_training_is_plain_optax(small):
    """The step of methods that do not adapt ranks is the textbook's."""
    images, transform = small

    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            return self.linear(x.reshape(x.shape[0], -1))

    model, config = Plain(nnx.Rngs(0)), OptimizerConfig(learning_rate=0.1, momentum=0.5, schedule="constant")
    kernel, bias = np.asarray(model.linear.kernel[...], np.float64), np.zeros(3)
    tx = build_descent(config, 1)
    compiled, state = programs.build_programs(model, tx, transform, seed=0, adaptive=False)
    x = (np.asarray(images.images, np.float64).reshape(12, -1) / 255 - 0.5) / 0.3
    targets = np.eye(3)[np.asarray(images.labels)]
    velocity = [np.zeros_like(kernel), np.zeros_like(bias)]
    for _ in range(3):
        state, _ = compiled.train(state, images, jnp.arange(12)[None], jnp.int32(0), jnp.int32(0))
        logits = x @ kernel + bias
        error = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - targets) / 12
        velocity = [x.T @ error + 0.5 * velocity[0], error.sum(axis=0) + 0.5 * velocity[1]]
        kernel, bias = kernel - 0.1 * velocity[0], bias - 0.1 * velocity[1]
    np.testing.assert_allclose(state.params["linear"]["kernel"].get_value(), kernel, atol=1e-5)
    np.testing.assert_allclose(state.params["linear"]["bias"].get_value(), bias, atol=1e-5)


def test_models_follow_the_options():
    digits = data.load("digits", limit=10)
    shapes = {
        tuple(options.items()): {
            layer.name: layer.rank
            for layer in metrics.layers(nnx.state(build_model(ModelConfig(**options), digits, 0), nnx.Param))
        }
        for options in ({"rank": 4}, {"rank": 0.5, "linear": False})
    }
    assert list(shapes.values()) == [
        {"classifier": None, "conv1": (4, 1, 5, 5), "conv2": (4, 4, 5, 5), "hidden": (4, 4)},
        {"classifier": None, "conv1": (10, 1, 5, 5), "conv2": (25, 10, 5, 5), "hidden": None},
    ]
