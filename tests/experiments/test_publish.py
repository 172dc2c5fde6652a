"""Published results say nothing of where a run was; step costs are measured on finished runs only."""

import json

import pytest

from experiments import publish, step_cost
from experiments.config import TrainConfig, from_json
from experiments.results_table import rows

COMMAND = (
    "python -m experiments.train --dataset digits --data-dir=/a/b --run-dir '/x y/z' --resume --seed 3 --cache-dir /c"
)


def result(directory, **changes):
    stored = {"options": {**TrainConfig().to_json(), "run_dir": "/x y/z"}, "command": COMMAND, "final": {"loss": 0.5}}
    directory.mkdir(exist_ok=True)
    (directory / "result.json").write_text(json.dumps({**stored, **changes}))


def test_locations_go_and_nothing_else(tmp_path):
    result(tmp_path / "run")
    assert publish.main([str(tmp_path / "run"), str(tmp_path / "results" / "a.json")]) == 0
    text = (tmp_path / "results" / "a.json").read_text()
    assert "/a/b" not in text and "/x y/z" not in text and "/c" not in text
    published = json.loads(text)
    assert published["command"] == "python -m experiments.train --dataset digits --seed 3"
    assert published["final"] == {"loss": 0.5}
    places = ("data_dir", "cache_dir", "run_dir", "save_every", "devices", "coordinator", "processes", "process")
    unset = dict.fromkeys((*places, "steps_at_once"))
    assert {**published["options"], **unset, "resume": False} == TrainConfig().to_json()


def test_what_cannot_be_published(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert publish.main([str(tmp_path / "empty"), str(tmp_path / "a.json")]) == 2
    assert "no finished run" in capsys.readouterr().err
    result(tmp_path / "run")
    (tmp_path / "there.json").write_text("kept")
    assert publish.main([str(tmp_path / "run"), str(tmp_path / "there.json")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "there.json").read_text() == "kept"
    assert publish.main([]) == 2


def test_where_nothing_can_be_written(tmp_path, capsys):
    result(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert publish.main([str(tmp_path / "run"), str(tmp_path / "file" / "a.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_options_come_back_from_json():
    config = from_json({"dataset": "cifar10", "data_dir": "/d", "model": "vgg16", "width": 0.5, "budget": 0.9})
    assert config.model.width == 0.5 and config.tdlrt.budget == 0.9 and str(config.data.data_dir) == "/d"
    assert from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"budget 1\.5"):
        from_json({"budget": 1.5})


def test_step_costs_need_finished_runs(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert step_cost.main([str(tmp_path / "run")]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_step_costs_of_two_runs_side_by_side(tmp_path, capsys):
    """Through the real entry points on a few digits: the Tucker network's state is the smaller one."""
    from experiments.train import main as train

    common = ["--limit", "64", "--batch-size", "16", "--epochs", "1"]
    runs = [tmp_path / "dense", tmp_path / "tdlrt"]
    assert train([*common, "--method", "dense", "--run-dir", str(runs[0])]) == 0
    assert train([*common, "--rank", "4", "--integrator", "parallel", "--run-dir", str(runs[1])]) == 0
    output = tmp_path / "cost.json"
    assert step_cost.main([*map(str, runs), "--rounds", "2", "--output", str(output)]) == 0
    assert "| tdlrt |" in capsys.readouterr().out
    cost = json.loads(output.read_text())
    dense, tucker = cost["runs"]["dense"], cost["runs"]["tdlrt"]
    assert 0 < tucker["state_bytes"] < 0.2 * dense["state_bytes"]
    assert all(run["seconds"]["lowest"] > 0 and run["compilations"] == 1 for run in (dense, tucker))
    assert all(run["peak_bytes"] > run["state_bytes"] for run in (dense, tucker))


def test_the_table_shows_costs_only_where_they_were_recorded(tmp_path):
    record = {
        "seconds": 10.0,
        "compile_seconds": 4.0,
        "step_memory": {"peak": 2**24, "arguments": 2**23},
        "state_bytes": 2**20,
    }
    final = {"test_accuracy": 0.9, "compression_all": 0.8, "compression_conv": 0.9}
    options = {**TrainConfig().to_json(), "budget": 0.9, "batch_size": 10}
    stored = {
        "options": options,
        "seed": 0,
        "hardware": "h",
        "images": {"train": 30},
        "final": final,
        "epochs": [record],
    }
    (tmp_path / "a.json").write_text(json.dumps(stored))
    (row,) = rows(tmp_path)
    assert (row["tau"], row["seconds"], row["peak"], row["state"]) == ("budget 90%", 2.0, 9.0, 1.0)
