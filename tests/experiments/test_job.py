"""The training job through its real entry point: files, resuming, signals, errors, numbers that are not finite."""

import json
import shlex
import signal

import chex
import jax
import numpy as np
import pytest
import tyro
from PIL import Image

import tdlrt_jax
from experiments.config import TrainConfig
from experiments.run import metrics
from experiments.run.directory import RunDirectory, environment
from experiments.sealed import read_sealed
from tdlrt_jax import checkpoint
from tests.experiments.jobs import DENSE, TINY, TUCKER, fingerprint, interrupt_after, lines, numbers, run, saved_arrays


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a Tucker run that went to its end, and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("rich.console.Console.print", lambda self, *objects, **options: printed.extend(objects))
        assert run(*TUCKER, "--run-dir", directory) == 0
    return directory, printed


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


def test_a_run_of_more_epochs_goes_through_those_of_the_shorter_one(tmp_path, no_plots, capsys):
    """Where only their number differs, and nothing depends on it, a run goes on, finished or not, to the same end."""
    options = [*TUCKER, "--schedule", "plateau"]
    assert run(*options, "--run-dir", tmp_path / "long") == 0
    extended = tmp_path / "extended"
    shorter = [word if word != "2" else "1" for word in options]
    assert run(*shorter, "--run-dir", extended) == 0
    first = (extended / "result.json").read_bytes()
    assert run(*options, "--run-dir", extended, "--resume") == 0

    assert [numbers(line) for line in lines(extended)] == [numbers(line) for line in lines(tmp_path / "long")]
    chex.assert_trees_all_equal(saved_arrays(extended, 12), saved_arrays(tmp_path / "long", 12))
    assert (extended / "result-1-epochs.json").read_bytes() == first
    result = read_sealed(extended / "result.json")
    assert result["options"]["epochs"] == 2 and [entry["epochs"] for entry in result["extended"]] == [1]
    assert "--epochs 2" in result["command"] and "--resume" not in result["command"]
    capsys.readouterr()
    assert run(*options, "--run-dir", extended, "--resume") == 0
    assert "finished already" in capsys.readouterr().out


def test_a_run_of_fewer_epochs_ends_after_the_one_it_is_in(tmp_path, no_plots, monkeypatch, capsys):
    """At the numbers of one that was begun so, whether it was stopped within an epoch or after one."""
    shorter = [*TUCKER, "--schedule", "plateau"]
    longer = [word if word != "2" else "5" for word in shorter]
    assert run(*shorter, "--run-dir", tmp_path / "short") == 0
    for name, steps in (("within", 8), ("after", 12)):
        cut = tmp_path / name
        with monkeypatch.context() as patch:
            interrupt_after(patch, steps, signal.SIGTERM)
            assert run(*longer, "--run-dir", cut) == 143
        before = fingerprint(cut)
        one = [word if word != "2" else "1" for word in shorter]
        assert run(*one, "--run-dir", cut, "--resume") == 2
        assert "is in epoch 2, which cannot be made one of 1: expected --epochs 2 or more" in capsys.readouterr().err
        assert fingerprint(cut) == before

        assert run(*shorter, "--run-dir", cut, "--resume") == 0
        assert [numbers(line) for line in lines(cut)] == [numbers(line) for line in lines(tmp_path / "short")]
        chex.assert_trees_all_equal(saved_arrays(cut, 12), saved_arrays(tmp_path / "short", 12))
        result, expected = (read_sealed(tmp_path / place / "result.json") for place in (name, "short"))
        assert result["options"]["epochs"] == 2 and [entry["epochs"] for entry in result["extended"]] == [5]
        assert "--epochs 2" in result["command"] and "--resume" not in result["command"]
        assert result["layers"] == expected["layers"] and numbers(result["final"]) == numbers(expected["final"])
    assert run(*one, "--run-dir", tmp_path / "short", "--resume") == 2
    assert "which cannot be made one of 1: it is finished" in capsys.readouterr().err


def test_a_run_that_goes_on_elsewhere_says_so(tmp_path):
    directory, options = RunDirectory(tmp_path / "run"), TrainConfig().to_json()
    here = environment([])
    there = {**here, "hardware": "another machine", "started": "later"}
    directory.begin(options, here)
    begun = directory.config()
    directory.go_on(options, {**here, "started": "later"}, 3)
    assert directory.config() == begun
    for step, place in ((5, there), (7, there), (9, here)):
        directory.go_on(options, place, step)
    stored = directory.config()
    assert {**stored, "continued": []} == {**begun, "continued": []}
    assert [(place["step"], place["hardware"]) for place in stored["continued"]] == [
        (5, "another machine"),
        (9, here["hardware"]),
    ]
    assert stored["continued"][0]["commit"] == here["commit"] and stored["continued"][0]["started"] == "later"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "--schedule cosine lowers the learning rate over all of them"),
        (["--schedule", "constant", "--method", "tdlrt", "--budget", "0.5"], "a budget is reached after half of them"),
        (["--schedule", "constant", "--method", "imp", "--compression", "0.5"], "in every round"),
    ],
)
def test_more_epochs_that_would_change_those_before_are_refused(options, reason, tmp_path, capsys):
    given = [*TINY, *options, "--run-dir", str(tmp_path / "run")]
    config = tyro.cli(TrainConfig, args=given, config=(tyro.conf.OmitArgPrefixes,))
    RunDirectory(tmp_path / "run").begin(config.to_json(), environment([]))
    before = fingerprint(tmp_path)
    more = [word if word != "2" else "3" for word in TINY]
    assert run(*more, *options, "--run-dir", tmp_path / "run", "--resume") == 2
    message = capsys.readouterr().err
    assert "holds a run of 2 epochs, which cannot be made one of 3" in message and reason in message
    fewer = [word if word != "2" else "1" for word in TINY]
    assert run(*fewer, *options, "--run-dir", tmp_path / "run", "--resume") == 2
    message = capsys.readouterr().err
    assert "holds a run of 2 epochs, which cannot be made one of 1" in message and reason in message
    assert fingerprint(tmp_path) == before


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


def test_what_a_run_ended_while_it_began_left_is_in_nobodys_way(tmp_path, no_plots):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.123").write_text("{")
    assert run(*DENSE, "--run-dir", tmp_path / "run") == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert run(*DENSE, "--run-dir", tmp_path / "mine") == 2
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_a_budget_that_is_not_reached_is_noted(tmp_path, no_plots, capsys):
    short = [*TINY, "--rank", "0.5", "--budget", "0.95", "--schedule", "constant", "--budget-epochs"]
    assert run(*short, "20", "--run-dir", tmp_path / "late") == 0
    assert "Note: --budget 0.95 was not reached, " in capsys.readouterr().out
    assert run(*short, "1", "--run-dir", tmp_path / "early") == 0
    saved = read_sealed(tmp_path / "early" / "result.json")["final"]["compression_all"]
    assert "was not reached" not in capsys.readouterr().out and saved > 0.9
