"""Learning rates: plateaus of the training or the validation loss, and other schedules."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import from_json
from experiments.options import OptimizerConfig, TdlrtConfig
from experiments.run import data
from experiments.run.build import after_epoch, build_descent, build_optimizer, learning_rate
from tests.experiments.jobs import TUCKER, lines, run


def test_plateau_looks_at_whole_epochs():
    """The first epoch sets the best value; after two without a better one the rate is a tenth."""
    config = OptimizerConfig(learning_rate=0.5, schedule="plateau", patience=2)
    tx, params = build_optimizer(config, TdlrtConfig(integrator="parallel"), 3), {"bias": jnp.zeros(2)}
    state, rates = tx.init(params), []
    for _ in range(5):
        for step in range(3):  # alike in every epoch, though it rises and falls within
            _, state = tx.update(params, state, params, value=jnp.float32(1 + step))
        rates.append(learning_rate(config, 3, 0, state))
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.05, 0.05, 0.005], rtol=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_plateau_of_the_validation_loss(adaptive):
    """Losses of steps say nothing, those shown after an epoch do; nothing else of the state moves."""
    config = OptimizerConfig(learning_rate=0.5, momentum=0.0, schedule="plateau", patience=2, plateau_of="validation")
    tx = build_optimizer(config, TdlrtConfig(integrator="parallel"), 3) if adaptive else build_descent(config, 3)
    params, rates, moved = {"bias": jnp.zeros(2)}, [], []
    state = tx.init(params)
    for loss in (1.0, 0.9, 0.9, 0.95, 0.8, 0.8, 0.8):
        for step in range(3):  # falls in every epoch, and in each as in the last
            updates, state = tx.update({"bias": jnp.ones(2)}, state, params, value=jnp.float32(3 - step))
        moved.append(float(updates["bias"][0]))
        rates.append(learning_rate(config, 3, 0, state))
        after = after_epoch(config, state, loss)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        state = after
    rates.append(learning_rate(config, 3, 0, state))
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.5, 0.5, 0.05, 0.05, 0.05, 0.005], rtol=1e-5)
    np.testing.assert_allclose(moved, [-0.5, -0.5, -0.5, -0.5, -0.05, -0.05, -0.05], rtol=1e-5)


@pytest.mark.parametrize("method", ["dense", "tdlrt"])
def test_a_run_lowers_its_rate_by_the_validation_loss(tmp_path, method):
    """Steps too small to change a loss by a ten-thousandth: after the first epoch each is one without a better loss."""
    options = [*TUCKER, "--method", method, "--schedule", "plateau", "--plateau-of", "validation", "--patience", "1"]
    options += ["--learning-rate", "1e-7", "--epochs", "4"]
    assert run(*options, "--run-dir", tmp_path / "run") == 0
    rates = [record["learning_rate"] for record in lines(tmp_path / "run")]
    np.testing.assert_allclose(rates, [1e-7, 1e-7, 1e-8, 1e-9], rtol=1e-5)


def test_a_run_does_not_look_at_test_images(tmp_path, monkeypatch):
    """With other labels their loss rises in every epoch, and the rate stays: the validation loss falls."""
    load = data.load

    def mislabelled(*arguments, **options):
        dataset = load(*arguments, **options)
        test = dataset.test._replace(labels=(dataset.test.labels + 1) % dataset.classes)
        return dataset._replace(test=test)

    monkeypatch.setattr(data, "load", mislabelled)
    options = [*TUCKER, "--method", "dense", "--schedule", "plateau", "--plateau-of", "validation", "--patience", "1"]
    options += ["--learning-rate", "0.005", "--epochs", "4"]
    assert run(*options, "--run-dir", tmp_path / "run") == 0
    records = lines(tmp_path / "run")
    test, validation = ([record[f"{of}_loss"] for record in records] for of in ("test", "validation"))
    assert np.all(np.diff(test) > 0) and np.all(np.diff(validation) < 0), (test, validation)
    assert len({record["learning_rate"] for record in records}) == 1


@pytest.mark.parametrize("plateau_of", ["training", "validation"])
def test_a_plateau_begins_where_ranks_have_fallen(plateau_of):
    """Losses that rise while ranks fall count as neither the best nor without a better one; a rate lowered before stays."""
    config = OptimizerConfig(learning_rate=0.5, momentum=0.0, schedule="plateau", patience=2, plateau_of=plateau_of)
    tx, params, rates = build_descent(config, 2), {"bias": jnp.zeros(2)}, []
    state = tx.init(params)
    losses = [1.0, 1.5, 2.0, 2.5, 2.4, 2.4, 2.4]  # the first four while ranks fall
    for epoch, loss in enumerate(losses):
        for _ in range(2):
            _, state = tx.update({"bias": jnp.ones(2)}, state, params, value=jnp.float32(loss))
        after = after_epoch(config, state, loss, ranks_fall=epoch < 4)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        state = after
        rates.append(learning_rate(config, 2, 0, state))
    np.testing.assert_allclose(rates, [0.5] * 6 + [0.05], rtol=1e-5)
    again = after_epoch(config, state, 1.0, ranks_fall=True)
    assert learning_rate(config, 2, 0, again) == rates[-1]


def test_a_run_keeps_its_rate_while_a_budget_is_not_reached(tmp_path):
    """Nothing is learned in steps so small: the first epoch with the budget sets the best loss, the next one lowers the rate."""
    options = [*TUCKER, "--schedule", "plateau", "--plateau-of", "validation", "--patience", "1"]
    options += ["--learning-rate", "1e-7", "--epochs", "5", "--budget", "0.9", "--budget-epochs", "3"]
    assert run(*options, "--run-dir", tmp_path / "run") == 0
    rates = [record["learning_rate"] for record in lines(tmp_path / "run")]
    np.testing.assert_allclose(rates, [1e-7, 1e-7, 1e-7, 1e-7, 1e-8], rtol=1e-5)


def test_other_losses_leave_the_state_of_other_schedules():
    for config in (OptimizerConfig(), OptimizerConfig(schedule="plateau")):
        state = build_descent(config, 3).init({"bias": jnp.zeros(2)})
        assert after_epoch(config, state, 1.0) is state


def test_plateau_of_validation_needs_images_held_out():
    for options in ({"schedule": "plateau"}, {"validation": 0.1}, {"schedule": "cosine", "validation": 0.1}):
        with pytest.raises(ValueError, match="--plateau-of validation: expected --schedule plateau"):
            from_json({**options, "plateau_of": "validation"})


def test_other_schedules():
    params = {"bias": jnp.zeros(2)}
    for schedule, expected in (("cosine", [0.5, 0.25, 0.0]), ("constant", [0.5, 0.5, 0.5])):
        config = OptimizerConfig(learning_rate=0.5, schedule=schedule, epochs=2)
        state = build_optimizer(config, TdlrtConfig(), 3).init(params)
        rates = [learning_rate(config, 3, step, state) for step in (0, 3, 6)]
        np.testing.assert_allclose(rates, expected, atol=1e-7)
