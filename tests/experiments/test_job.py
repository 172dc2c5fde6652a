"""The training job through its real entry point: files, resuming, signals, errors, numbers that are not finite."""

import gc
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from PIL import Image

import tdlrt_jax
from experiments import batches, data, metrics, plots, programs, train
from experiments.build import after_epoch, build_descent, build_model, build_optimizer, learning_rate
from experiments.config import ModelConfig, OptimizerConfig, TdlrtConfig, from_json
from experiments.display import Display
from experiments.interruption import Interruption
from tdlrt_jax import checkpoint
from tdlrt_jax.nn import TuckerLinear

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--limit", "96", "--batch-size", "32", "--epochs", "2"]
DENSE = [*TINY, "--method", "dense"]
# Small ranks and a tolerance large enough that ranks fall and arrays shrink within two epochs of six steps.
TUCKER = ["--limit", "110", "--validation", "0.1", "--batch-size", "16", "--epochs", "2"]
TUCKER += ["--rank", "12", "--tau", "0.4", "--learning-rate", "0.02", "--compilation-steps", "0"]
CLOCK = ("seconds", "evaluation_seconds", "compilations", "compile_seconds")


def run(*arguments):
    """The exit code of the job."""
    return train.main([str(argument) for argument in arguments])


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def numbers(record):
    """What must be the same in a run that was interrupted and in one that was not."""
    return {name: value for name, value in record.items() if name not in CLOCK}


def fingerprint(directory):
    return {
        path.relative_to(directory): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def saved_arrays(directory, step):
    """All arrays of a checkpoint, by path."""
    with ocp.CheckpointManager(directory / "checkpoints", item_names=("arrays", "description")) as manager:
        return manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))["arrays"]


def interrupt_after(monkeypatch, steps, number):
    """Sends this process a signal once so many steps have been reported."""
    original = Display.step

    def step(self, epoch, done, loss):
        original(self, epoch, done, loss)
        if done == steps:
            signal.raise_signal(number)

    monkeypatch.setattr(Display, "step", step)


@pytest.fixture
def no_plots(monkeypatch):
    """For runs about something else: drawing takes longer than their training."""
    monkeypatch.setattr(plots, "save_figure", lambda figure, directory, name: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a Tucker run that went to its end, and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("rich.console.Console.print", lambda self, *objects, **options: printed.extend(objects))
        assert run(*TUCKER, "--run-dir", directory) == 0
    return directory, printed


@pytest.fixture(scope="module")
def finished_dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "dense"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_figure", lambda figure, directory, name: [])
        assert run(*DENSE, "--run-dir", directory) == 0
    return directory


def test_a_run_leaves_all_its_files(finished):
    directory, _ = finished
    names = {path.name for path in directory.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "result.json", "checkpoints", "tensorboard", "plots"}
    config = json.loads((directory / "config.json").read_text())
    assert config["options"]["tau"] == 0.4 and config["options"]["run_dir"] == str(directory)
    assert config["versions"]["jax"] == jax.__version__ and "cores" in config["hardware"]
    assert shlex.split(config["command"])[:3] == ["python", "-m", "experiments.train"]
    assert checkpoint.all_steps(directory / "checkpoints") == [6, 12]


def test_metrics_have_a_line_an_epoch(finished):
    records = lines(finished[0])
    assert [record["epoch"] for record in records] == [1, 2] and [record["step"] for record in records] == [6, 12]
    for record in records:
        for name in ("train", "validation", "test"):
            assert np.isfinite(record[f"{name}_loss"]) and 0 <= record[f"{name}_accuracy"] <= 1
        assert (
            record["learning_rate"] == pytest.approx(0.01 * (2 - record["epoch"]), abs=1e-6) and record["seconds"] > 0
        )
        assert set(record["ranks"]) == {"conv1", "conv2", "hidden"} == set(record["truncation_error"])
        assert all(0 <= error < 0.4 for error in record["truncation_error"].values())


def test_ranks_fall_and_arrays_follow(finished):
    first, second = lines(finished[0])
    assert second["ranks"]["hidden"][0] < 12
    assert np.prod(second["capacities"]["hidden"]) < np.prod(first["capacities"]["hidden"])
    assert second["state_bytes"] < first["state_bytes"] and second["step_memory"]["peak"] < first["step_memory"]["peak"]
    assert first["compilations"] == 1 and second["compilations"] == 1


def test_ranks_that_press_are_reported_in_the_run_and_grow(tmp_path, monkeypatch, no_plots):
    """From small arrays, with a tolerance that asks for more: named in the epoch's record and in words, larger in the next."""
    printed, directory = [], tmp_path / "run"
    monkeypatch.setattr("rich.console.Console.print", lambda self, *objects, **options: printed.extend(objects))
    pressed = ["--rank", "4", "--tau", "0.001", "--integrator", "parallel", "--learning-rate", "0.02"]
    assert run(*TINY, *pressed, "--run-dir", directory) == 0
    first, second = lines(directory)
    assert "hidden" in first["pressing"] and 0 < first["pressing_steps"] <= 3
    notes = [item for item in printed if str(item).startswith("Ranks pressed against the capacity of their arrays in")]
    assert len(notes) == bool(first["pressing"]) + bool(second["pressing"])
    assert ", ".join(first["pressing"]) in notes[0] and "They grow now" in notes[0]
    assert first["capacities"]["hidden"] == [4, 4] and min(second["capacities"]["hidden"]) > 4
    rises = [(r, c) for name in first["pressing"] for r, c in zip(second["ranks"][name], first["capacities"][name])]
    assert any(rank > size for rank, size in rises)
    assert first["compilations"] == second["compilations"] == 1
    assert second["state_bytes"] > first["state_bytes"] and second["step_memory"]["peak"] > first["step_memory"]["peak"]
    (events,) = (directory / "tensorboard").iterdir()
    assert events.read_bytes().count(b"pressing_steps") == 2


def test_compression_is_that_of_the_saved_ranks(finished):
    directory, _ = finished
    record = lines(directory)[-1]
    ranks = checkpoint.ranks(directory / "checkpoints")
    shapes = {"conv1": (5, 5, 1, 20), "conv2": (5, 5, 20, 50), "hidden": (800, 500)}
    count = {
        name: tdlrt_jax.parameter_count(shape, ranks[f"params/{name}/kernel/value"]) for name, shape in shapes.items()
    }
    for name, rank in record["ranks"].items():
        assert tuple(rank) == metrics.paper_order(tuple(ranks[f"params/{name}/kernel/value"]))
    assert record["weights"] == sum(count.values()) + 5000
    assert record["compression_all"] == pytest.approx(1 - record["weights"] / 430_500)
    assert record["compression_conv"] == pytest.approx(1 - (count["conv1"] + count["conv2"]) / 25_500)


def test_result_has_everything(finished):
    result = json.loads((finished[0] / "result.json").read_text())
    assert result["epochs"] == lines(finished[0])
    assert numbers(result["epochs"][-1]).items() <= result["final"].items()
    assert result["seed"] == 0 and result["hardware"] and result["command"]
    assert result["images"] == {"train": 100, "validation": 10, "test": 110}
    assert result["final"]["best_validation"]["epoch"] in (1, 2)
    assert [layer["name"] for layer in result["layers"]] == ["classifier", "conv1", "conv2", "hidden"]


def test_plots_are_pictures(finished):
    for name in ("learning", "ranks", "singular_values"):
        with Image.open(finished[0] / "plots" / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[1] > 800 and np.mean(pixels < 250) > 0.01
        svg = (finished[0] / "plots" / f"{name}.svg").read_text()
        assert svg.count("<path") > 20 and svg.rstrip().endswith("</svg>")


def test_event_files_hold_the_curves(finished):
    (events,) = (finished[0] / "tensorboard").iterdir()
    content = events.read_bytes()
    for tag in (
        "loss/train",
        "accuracy/test",
        "compression_all",
        "ranks/conv2/out",
        "cumulative_truncation_error/hidden",
    ):
        assert content.count(tag.encode()) == 2, tag


def test_it_ends_with_a_table_and_where_things_are(finished):
    directory, printed = finished
    table = next(item for item in printed if hasattr(item, "columns"))
    assert [column.header for column in table.columns] == ["layer", "shape", "rank", "dense", "stored", "compression"]
    assert list(table.columns[0].cells)[-2:] == ["convolutions only", "whole network"]
    assert str(directory) in printed[-1] and "test accuracy" in printed[-1]
    assert sum(str(item).startswith("epoch ") for item in printed) == 2, "plain lines where there is no terminal"


def test_interrupted_and_resumed_is_the_same_run(finished, tmp_path, monkeypatch, no_plots, capsys):
    """Stopped in the middle of the second epoch, after arrays shrank, with a torn line in the metrics."""
    whole, _ = finished
    directory = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, signal.SIGTERM)
        assert run(*TUCKER, "--run-dir", directory) == 143
    assert "SIGTERM: saved in" in capsys.readouterr().out
    assert len(lines(directory)) == 1 and not (directory / "result.json").exists()
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "train_lo')
    assert run(*TUCKER, "--run-dir", directory, "--resume") == 0

    assert [numbers(record) for record in lines(directory)] == [numbers(record) for record in lines(whole)]
    ours, theirs = saved_arrays(directory, 12), saved_arrays(whole, 12)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    result = json.loads((directory / "result.json").read_text())
    assert len(result["epochs"]) == 2 and result["options"]["resume"] is False


def test_a_finished_run_is_never_overwritten(finished_dense, capsys):
    before = fingerprint(finished_dense)
    assert run(*DENSE, "--run-dir", finished_dense) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert run(*DENSE, "--run-dir", finished_dense, "--resume") == 0
    assert "finished already" in capsys.readouterr().out
    assert fingerprint(finished_dense) == before


def test_other_options_are_listed(finished_dense, capsys):
    before = fingerprint(finished_dense)
    assert run(*DENSE, "--tau", "0.25", "--seed", "5", "--run-dir", finished_dense, "--resume") == 2
    message = capsys.readouterr().err
    assert "--tau: 0.2 there, 0.25 given" in message and "--seed: 0 there, 5 given" in message
    assert "--epochs" not in message.split("It was started with")[0]
    assert fingerprint(finished_dense) == before


def test_directories_that_hold_no_run(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("keep me")
    assert run(*DENSE, "--run-dir", tmp_path) == 2
    assert "is not the directory of a run" in capsys.readouterr().err
    assert run(*DENSE, "--run-dir", tmp_path, "--resume") == 2
    assert "there is no run in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_missing_data_leave_no_directory_behind(tmp_path, capsys):
    arguments = ["--dataset", "mnist", "--data-dir", tmp_path / "none", "--run-dir", tmp_path / "run"]
    assert run(*arguments) == 2
    assert "download_and_prepare" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run("--limit", "20", "--batch-size", "32", "--run-dir", tmp_path / "run") == 2
    assert "--batch-size 32: there are only 20 training images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_prepared_set_through_the_job(tiny_tfds, tmp_path, no_plots):
    directory = tmp_path / "run"
    options = [
        "--dataset",
        "mnist",
        "--data-dir",
        tiny_tfds,
        "--batch-size",
        "15",
        "--epochs",
        "1",
        "--method",
        "dense",
    ]
    assert run(*options, "--augment", "crop_flip", "--run-dir", directory) == 0
    result = json.loads((directory / "result.json").read_text())
    assert result["data"] == "tfds mnist 3.0.1" and result["images"] == {"train": 30, "test": 10}
    assert result["final"]["compression_all"] == 0 and result["final"]["ranks"] == {}


def test_sigint_at_the_end_of_an_epoch_loses_nothing(finished_dense, tmp_path, monkeypatch, no_plots):
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, signal.SIGINT)
        assert run(*DENSE, "--run-dir", directory) == 130
    assert checkpoint.all_steps(directory / "checkpoints") == [3]
    assert run(*DENSE, "--run-dir", directory) == 2, "an unfinished run is not overwritten either"
    assert run(*DENSE, "--run-dir", directory, "--resume") == 0
    assert [numbers(r) for r in lines(directory)] == [numbers(r) for r in lines(finished_dense)]


def test_a_second_signal_ends_it_at_once(tmp_path, monkeypatch, capsys):
    original = Display.step

    def step(self, epoch, done, loss):
        original(self, epoch, done, loss)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Display, "step", step)
    assert run(*DENSE, "--run-dir", tmp_path / "run") == 130
    assert "without saving" in capsys.readouterr().err


def test_sigterm_to_the_process(tmp_path, caches):
    """A real process in the midst of a long run: it saves, says how to go on, and exits with 143."""
    directory = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train", *DENSE[:-4], "--epochs", "100000", "--method", "dense"]
    process = subprocess.Popen(
        [*command, "--run-dir", str(directory)],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(caches)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (directory / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert re.search(r"SIGTERM: saved in .* at epoch \d+, \d of 3 steps done", out), out
    advised = shlex.split(out.strip().splitlines()[-1])
    assert advised[-1] == "--resume" and str(directory) in advised
    step = checkpoint.all_steps(directory / "checkpoints")[-1]
    assert step // 3 == len(lines(directory)) >= 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    directory = tmp_path / "run"
    assert run(*DENSE, "--learning-rate", "1e30", "--run-dir", directory) == 1
    message = capsys.readouterr().out
    assert "Stopped in epoch 1, step 2 of 3: the loss" in message and "lower --learning-rate (it was 1e+30)" in message
    assert "--clip 1.0" in message
    assert not (directory / "result.json").exists()
    (step,) = checkpoint.all_steps(directory / "checkpoints")
    arrays = saved_arrays(directory, step)
    assert step == 1 and all(np.all(np.isfinite(array)) for name, array in arrays.items() if name.startswith("params"))
    assert run(*DENSE, "--learning-rate", "1e30", "--run-dir", directory, "--resume") == 1
    assert "Stopped in epoch 1, step 2 of 3" in capsys.readouterr().out


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


@pytest.mark.parametrize("method", ["dense", "tdlrt", "cores between"])
def test_several_steps_of_one_call_are_the_same_steps(tmp_path, method):
    """Up to rounding; calls end where a run evaluates, saves, or moves bases, and a run may go on with other calls."""
    options = [*TUCKER, "--method", "dense"] if method == "dense" else [*TUCKER, "--no-resize"]
    options += ["--evaluate-every", "4", "--save-every", "5"]
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


def test_a_signal_between_several_steps_of_one_call(tmp_path, monkeypatch, no_plots):
    """The calls under way come to their end, and the run goes on to the same numbers."""
    options = [*TUCKER, "--method", "dense", "--steps-at-once", "2"]
    assert run(*options, "--run-dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, signal.SIGTERM)
        assert run(*options, "--run-dir", tmp_path / "cut") == 143
    assert checkpoint.all_steps(tmp_path / "cut" / "checkpoints")[-1] in (8, 10, 12)
    assert run(*options, "--run-dir", tmp_path / "cut", "--resume") == 0
    ours, theirs = (saved_arrays(tmp_path / name, 12) for name in ("cut", "whole"))
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


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


def test_interruption_restores_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert interruption.exit_code == 0
        signal.raise_signal(signal.SIGTERM)
        assert interruption.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_run_ended_while_it_began_left_is_in_nobodys_way(tmp_path, no_plots):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.123").write_text("{")
    assert run(*DENSE, "--run-dir", tmp_path / "run") == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert run(*DENSE, "--run-dir", tmp_path / "mine") == 2
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
