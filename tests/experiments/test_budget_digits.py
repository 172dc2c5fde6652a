"""A compression budget on a network that learns handwritten digits, by the library's step and through the main job."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import tdlrt_jax
from experiments import train
from experiments.options import TdlrtConfig
from experiments.run import plots
from experiments.run.build import falling_steps
from tdlrt_jax.models.pooling import max_pool
from tdlrt_jax.nn import TuckerConv

STEPS, AFTER, BATCH = 60, 20, 32


class Network(nnx.Module):
    """Three Tucker convolutions for 8x8 pixels, and a dense classifier."""

    def __init__(self, rngs, rank=(None, None, 0.5, 0.5)):
        conv = functools.partial(TuckerConv, kernel_size=(3, 3), rank=rank, rngs=rngs)
        self.first, self.second, self.third = conv(1, 32), conv(32, 64), conv(64, 64)
        self.classifier = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = max_pool(jax.nn.relu(self.first(x)))
        x = max_pool(jax.nn.relu(self.second(x)))
        return self.classifier(jnp.mean(jax.nn.relu(self.third(x)), axis=(1, 2)))


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32), jnp.asarray(labels)


def compression(params, of):
    """``1 - c / f``, counted by hand from the arrays' columns in use."""
    stored = dense = 0
    for leaf in jax.tree.leaves(params, is_leaf=tdlrt_jax.tucker.is_tucker):
        if tdlrt_jax.tucker.is_tucker(leaf):
            ranks = np.asarray(tdlrt_jax.active_rank(leaf)).tolist()
            shape = tdlrt_jax.kernel_shape(leaf)
            whole = [factor is None for factor in leaf.factors]
            stored += int(np.prod(ranks)) + sum(n * r for n, r, w in zip(shape, ranks, whole) if not w)
            dense += int(np.prod(shape))
        elif of == "all":
            stored, dense = stored + leaf.size, dense + leaf.size
    return 1 - stored / dense


@pytest.mark.parametrize("of", ["kernels", "all"])
@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_a_network_ends_where_the_budget_says_and_learns(digits, integrator, of):
    images, labels = digits
    graphdef, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)
    params = nnx.as_pure(params)

    def loss_fn(params, x, y):
        logits = nnx.merge(graphdef, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    budget = tdlrt_jax.Budget(0.9, steps=STEPS, of=of)
    tx = tdlrt_jax.tdlrt(optax.adam(0.005), tolerance=budget, integrator=integrator)
    step, state = tdlrt_jax.tdlrt_step(loss_fn, tx), tx.init(params)
    reached, losses = [], []
    order = np.random.default_rng(0).permutation(len(labels))
    for index in range(STEPS + AFTER):
        batch = order[BATCH * index % (len(order) - BATCH) :][:BATCH]
        params, state, info = step(params, state, images[batch], labels[batch])
        losses.append(float(info.loss))
        reached.append(compression(params, of))
    assert reached[0] < 0.8, "it starts with more numbers"
    assert abs(reached[STEPS - 1] - 0.9) < 0.005
    assert abs(reached[-1] - 0.9) < 0.005
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_a_budget_below_the_least_ranks_names_the_layers():
    params = nnx.as_pure(nnx.split(Network(nnx.Rngs(0)), nnx.Param)[1])
    tx = tdlrt_jax.tdlrt(optax.sgd(0.1), tolerance=tdlrt_jax.Budget(0.999, steps=10))
    # Rank 1 and a whole window need 9 + in + out numbers a layer.
    layers = r"'third/kernel' \(137\), 'second/kernel' \(105\), 'first/kernel' \(42\)"
    with pytest.raises(ValueError, match=f"compression=0.999 .* leaves 56 numbers .* need 284, most of it {layers}"):
        tx.init(params)
    tdlrt_jax.tdlrt(optax.sgd(0.1), tolerance=tdlrt_jax.Budget(0.99, steps=10)).init(params)  # which is possible


@pytest.mark.parametrize("importance", ["error", "loss"])
def test_the_main_job_reaches_its_budget(tmp_path, monkeypatch, importance):
    monkeypatch.setattr(plots, "save_figure", lambda figure, directory, name: [])
    directory = tmp_path / "run"
    options = ["--budget", "0.9", "--budget-epochs", "2", "--epochs", "3", "--limit", "320", "--batch-size", "32"]
    options += ["--budget-importance", importance, "--rank", "60", "--run-dir", str(directory)]
    assert train.main(options) == 0
    result = json.loads((directory / "result.json").read_text())
    tucker = [layer for layer in result["layers"] if layer["rank"] is not None]
    assert [layer["name"] for layer in tucker] == ["conv1", "conv2", "hidden"]
    dense = sum(layer["full"] for layer in tucker)

    def reached(ranks):
        # Modes in the paper's order, out first; the sizes belong to it.
        stored = 0
        for layer in tucker:
            rank, shape = ranks[layer["name"]], layer["shape"]
            stored += int(np.prod(rank)) + int(np.dot(rank, shape))
        return 1 - stored / dense

    compressions = [reached(epoch["ranks"]) for epoch in result["epochs"]]
    assert compressions[-1] == pytest.approx(1 - sum(layer["parameters"] for layer in tucker) / dense)
    assert compressions[0] < compressions[1] - 0.01, "it is reached in the second epoch"
    assert all(abs(compression - 0.9) < 0.005 for compression in compressions[1:])
    assert result["epochs"][-1]["train_loss"] < result["epochs"][0]["train_loss"]


def test_arrays_wait_for_the_budget_where_shrinking_twice_does_not_pay(tmp_path, monkeypatch):
    """After the first epoch they would be good for ten steps, up to where the budget is reached; from there on for fifty."""
    monkeypatch.setattr(plots, "save_figure", lambda figure, directory, name: [])
    directory = tmp_path / "run"
    options = ["--budget", "0.9", "--budget-epochs", "2", "--epochs", "7", "--limit", "320", "--batch-size", "32"]
    options += ["--integrator", "parallel", "--rank", "60", "--compilation-steps", "12", "--run-dir", str(directory)]
    assert train.main(options) == 0
    epochs = json.loads((directory / "result.json").read_text())["epochs"]
    sizes = [max(epoch["capacities"]["hidden"]) for epoch in epochs]
    assert max(epochs[0]["ranks"]["hidden"]) < sizes[0] / 2, "there is something to shrink"
    assert sizes[0] == sizes[1] > sizes[2] == sizes[-1]
    assert [epoch["compilations"] for epoch in epochs] == [1, 0, 1, 0, 0, 0, 0]


def test_ranks_fall_until_a_budget_is_reached_or_they_are_frozen():
    settle = lambda **options: falling_steps(TdlrtConfig(**options), epochs=8, steps_per_epoch=10)  # noqa: E731
    assert settle(budget=0.9) == 40
    assert settle(budget=0.9, budget_epochs=2.5, freeze_epochs=6) == 25
    assert settle(budget=0.9, freeze_epochs=1.5) == 15
    assert settle(freeze_epochs=1.5) is None


@pytest.mark.parametrize("options", [{"budget_epochs": 2.0}, {"budget_importance": "loss"}], ids=str)
def test_options_of_a_budget_without_one(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} .*: give a --budget with it"):
        TdlrtConfig(**options)
