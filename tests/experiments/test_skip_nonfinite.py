"""``--skip-nonfinite``: the main job leaves out steps that are not finite, so many in a row, and says how many."""

import json

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.options import OptimizerConfig
from experiments.run import batches, programs
from experiments.run.records import Sums
from experiments.sealed import read_sealed
from experiments.train import main
from tests.experiments.jobs import numbers

# Three steps an epoch.
TINY = ["--limit", "48", "--batch-size", "16", "--epochs", "3", "--rank", "4", "--no-resize"]


def run(*options):
    return main([*TINY, *map(str, options)])


@pytest.fixture
def bad_steps(monkeypatch):
    """Makes the images of given steps, ``(epoch, step)`` from 0, numbers that are none."""
    bad = []

    def training_batch(data, order, transform, seed, epoch, index):
        images, labels = batches.training_batch(data, order, transform, seed, epoch, index)
        wrong = jnp.zeros((), bool)
        for at in bad:
            wrong = wrong | ((epoch == at[0]) & (index == at[1]))
        return jnp.where(wrong, jnp.nan, images), labels

    monkeypatch.setattr(programs, "training_batch", training_batch)
    return bad


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("method", "at_once"), [("tdlrt", 1), ("dense", 1), ("dense", 2), ("dense", 3)])
def test_the_run_goes_on_without_them(tmp_path, bad_steps, method, at_once):
    bad_steps += [(0, 1), (0, 2), (1, 0), (2, 2)]  # three in a row, over the end of an epoch, and the very last
    directory = tmp_path / "run"
    options = ["--method", method, "--steps-at-once", at_once, "--skip-nonfinite", 3, "--evaluate-every", 3]
    assert run(*options, "--run-dir", directory) == 0
    found = records(directory)
    assert [record["skipped_steps"] for record in found] == [2, 1, 1]
    assert all(np.isfinite(record["train_loss"]) and 0 < record["train_accuracy"] < 1 for record in found)
    assert [point["step"] for record in found for point in record["curve"]] == [3, 6, 9]
    stored, _ = checkpoint_arrays(directory)
    assert all(np.all(np.isfinite(array)) for name, array in stored.items() if array.dtype.kind == "f")
    counts = [array for name, array in stored.items() if name.endswith(("count", "opt_state/step"))]
    assert counts and all(count == 5 for count in counts), "nine steps but four"


def test_at_one_more_it_stops_with_the_last_good_state(tmp_path, bad_steps, capsys):
    bad_steps += [(0, 1), (0, 2)]
    directory = tmp_path / "run"
    options = ["--method", "dense", "--skip-nonfinite", 1, "--run-dir", directory]
    assert run(*options) == 1
    message = capsys.readouterr().out
    assert "Stopped in epoch 1, step 3 of 3: the loss (nan)" in message and "--skip-nonfinite (it was 1)" in message
    stored, metadata = checkpoint_arrays(directory)
    assert all(np.all(np.isfinite(array)) for array in stored.values() if array.dtype.kind == "f") and stored["healthy"]
    assert metadata["sums"]["steps"] == 2
    assert metadata["sums"]["skipped"] == metadata["sums"]["skipped_in_a_row"] == 1
    assert run(*options, "--resume") == 1, "it meets the same step again"
    assert "Stopped in epoch 1, step 3 of 3" in capsys.readouterr().out


def test_a_run_that_stopped_may_go_on_without_such_steps(tmp_path, bad_steps):
    """It then is the run that had left them out from the start, and notes from where on it did."""
    bad_steps += [(0, 1), (1, 2)]
    dense = ["--method", "dense"]
    assert run(*dense, "--skip-nonfinite", 1, "--run-dir", tmp_path / "whole") == 0
    assert run(*dense, "--run-dir", tmp_path / "cut") == 1
    assert run(*dense, "--run-dir", tmp_path / "cut", "--skip-nonfinite", 1, "--resume") == 0
    whole, cut = (records(tmp_path / name) for name in ("whole", "cut"))
    assert [numbers(record) for record in cut] == [numbers(record) for record in whole]
    stored = read_sealed(tmp_path / "cut" / "config.json")
    assert stored["options"]["skip_nonfinite"] == 1
    (note,) = stored["continued"]
    assert note["options"] == {"skip_nonfinite": 1} and note["step"] == 1


def checkpoint_arrays(directory):
    """Arrays of the last checkpoint by path, and its metadata."""
    what = ocp.args.Composite(arrays=ocp.args.StandardRestore(), description=ocp.args.JsonRestore())
    with ocp.CheckpointManager(directory / "checkpoints", item_names=("arrays", "description")) as manager:
        restored = manager.restore(manager.latest_step(), args=what)
    return restored["arrays"], restored["description"]["metadata"]


def test_means_are_over_the_steps_that_were_taken():
    sums = Sums(steps=4, skipped=1, loss=6.0, correct=6)
    sums.add_point(4, 3, 0.5, 0.5)
    assert sums.points[0]["train_loss"] == 2.0 and sums.points[0]["train_accuracy"] == 6 / 9
    sums.steps, sums.skipped = 5, 2
    sums.add_point(5, 3, 0.5, 0.5)
    assert sums.points[1]["train_loss"] == 0


def test_the_option_is_checked():
    with pytest.raises(ValueError, match="skip-nonfinite"):
        OptimizerConfig(skip_nonfinite=-1)


def test_the_advice_is_about_what_decides_the_ranks(tmp_path, bad_steps, capsys):
    bad_steps += [(0, 1)]
    assert run("--budget", 0.5, "--run-dir", tmp_path / "budget") == 1
    advice = capsys.readouterr().out
    assert "a smaller --budget (it was 0.5)" in advice and "--tau" not in advice
    assert run("--run-dir", tmp_path / "tau") == 1
    assert "a smaller --tau (it was 0.2)" in capsys.readouterr().out
