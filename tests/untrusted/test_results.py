"""Results and runs from strangers: nothing is executed or written elsewhere, and what is wrong is said with the file's name."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments import results_table, show, step_cost
from experiments.config import TrainConfig
from experiments.grids import grid, tables
from experiments.run import plots
from experiments.run.directory import RunDirectory, RunDirectoryError
from experiments.sealed import DamagedFileError, read_sealed

RESULT = Path(__file__).resolve().parents[2] / "experiments" / "results" / "mnist_lenet5" / "bug_seed0.json"


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing takes long; where it would go is what matters."""
    saved = []
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, directory, name: saved.append(directory / name) or [directory] * 2
    )
    return saved


@pytest.fixture
def result():
    return json.loads(RESULT.read_text())


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A directory to look at, and around it nothing may change."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    monkeypatch.chdir(home)
    yield home
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "secret.json"]
    assert (tmp_path / "secret.json").read_text() == '{"secret": 1}'


def run_of(home, result):
    """A finished run's directory."""
    run = home / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"options": result["options"], "command": result["command"]}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in result["epochs"]))
    (run / "result.json").write_text(json.dumps(result))
    return run


TEXTS = {
    "deep": "[" * 50_000 + "]" * 50_000,
    "nested": '{"a":' * 200 + "1" + "}" * 200,
    "digits": '{"epochs": ' + "9" * 10_000 + "}",
    "number": '{"final": {"weights": ' + "9" * 400 + "}}",
    "list": "[1, 2]",
    "nothing": "",
    "binary": "\x00\x01",
    "escape": json.dumps({"options": {"model": "\x1b]0;title\x07"}}),
    "long": json.dumps({"options": {"model": "m" * 20_000}}),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_files_that_are_no_result_are_named_by_everything_that_reads_them(text, stranger, capsys):
    path = stranger / "net" / "row" / "seed0.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(DamagedFileError, match=r"seed0\.json is damaged"):
        read_sealed(path)
    with pytest.raises(ValueError, match=r"seed0\.json is no result"):
        tables.read_results(stranger / "net")
    with pytest.raises(ValueError, match=r"seed0\.json is not a result"):
        results_table.rows(path.parent)
    assert show.main([str(path), "--no-plots"]) == 2
    assert "seed0.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("options", ["tau"]),
        ("options", {"model": {"__class__": "os.system"}}),
        ("command", "python -m experiments.train; touch executed"),
        ("command", "touch executed"),
        ("command", "python -m experiments.train $(touch executed)"),
        ("final", {"test_accuracy": "0.9"}),
        ("final", {"test_accuracy": True}),
        ("final", {"weights": 1.5}),
        ("epochs", {"0": {}}),
        ("epochs", [{"epoch": "1"}]),
        ("epochs", [{"epoch": 1, "seconds": [1]}]),
        ("epochs", [{"epoch": 1, "ranks": {"conv1": "../../x"}}]),
        ("epochs", [{"epoch": 1, "ranks": {"conv1": [-1]}}]),
        ("epochs", [{"epoch": 1, "truncation_error": {"conv1": "1"}}]),
        ("epochs", [[1, 2]]),
        ("seed", "0"),
        ("hardware", ["../../x"]),
        ("images", 3),
    ],
    ids=str,
)
def test_fields_of_wrong_types_are_named(field, value, result, stranger, capsys):
    path = stranger / "row" / "seed0.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**result, field: value}))
    assert show.main([str(path), "--no-plots"]) == 2
    printed = capsys.readouterr()
    assert "seed0.json" in printed.err and field in printed.err and "Traceback" not in printed.err
    with pytest.raises(ValueError, match=rf"seed0\.json is no result.*{field}"):
        tables.read_results(stranger)
    assert not (stranger / "executed").exists()


def test_names_from_files_are_shown_as_they_are_and_lead_nowhere(result, stranger, capsys, no_plots):
    """Markup of the console, formulas, and paths: in layers' names, they are names."""
    strange = ["[/bold]", "[link=file:///etc/passwd]x[/link]", "$\\frac{", "../../../secret", "/etc/passwd", "_hidden"]
    for record in result["epochs"]:
        for field in ("ranks", "truncation_error", "cumulative_truncation_error"):
            entry = next(iter(record[field].values()))
            record[field] = dict.fromkeys(strange, entry)
    for layer, name in zip(result["layers"], strange):
        layer["name"] = name
    path = stranger / "seed0.json"
    path.write_text(json.dumps(result))
    assert show.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in strange)
    assert {place.parent for place in no_plots} == {Path("runs/plots/seed0")}
    history = show.load(path).history
    for figure in (plots.plot_ranks(history), plots.plot_truncation(history)):
        figure.canvas.draw()  # a formula that is none would raise


@pytest.mark.parametrize("name", ["plots", "checkpoints", "metrics.jsonl", "result.json"])
def test_a_run_with_links_that_lead_outside_is_not_shown_or_continued(name, result, stranger, tmp_path, capsys):
    run = run_of(stranger, result)
    path = run / name
    if path.exists():
        path.unlink()
    path.symlink_to(tmp_path / "secret.json" if path.suffix else tmp_path)
    assert show.main([str(run)]) == 2
    assert f"{path} is a link to" in capsys.readouterr().err
    resumed = dataclasses.replace(TrainConfig().run, run_dir=run, resume=True)
    with pytest.raises(RunDirectoryError, match=f"{name} is a link to .*outside of"):
        RunDirectory.open(dataclasses.replace(TrainConfig(), run=resumed))


def test_a_link_within_a_run_is_followed(result, stranger, no_plots):
    run = run_of(stranger, result)
    (run / "figures").mkdir()
    (run / "plots").symlink_to("figures")
    assert show.main([str(run)]) == 0


def test_paths_in_a_configuration_are_not_followed(result, stranger, tmp_path, monkeypatch):
    """Where the data is and where it is cached is said by the user, not by the run's file."""
    run = run_of(stranger, result)
    for name in ("config.json", "result.json"):
        content = json.loads((run / name).read_text())
        content["options"].update(data_dir=str(tmp_path), cache_dir=str(tmp_path), run_dir="../../elsewhere")
        (run / name).write_text(json.dumps(content))
    asked = {}

    def load(name, **options):
        asked.update(options)
        raise FileNotFoundError("enough")

    monkeypatch.setattr("experiments.run.data.load", load)
    assert step_cost.main([str(run)]) == 2
    assert asked["data_dir"] is None and "cache_dir" not in asked


def test_a_grids_results_are_where_its_runs_names_say(stranger, result):
    """Names come from the plan, never from a file; a result of something else is refused."""
    places = grid.Places(stranger / "runs", stranger / "results")
    run = grid.Run("net/row/seed0", {"seed": 0})
    path = places.published(run)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**result, "name": "../../../secret", "options": {"run_dir": "../../x", "seed": 0}}))
    assert grid.state_of(run, places) == "done"
    path.write_text(json.dumps({**result, "options": "../../x"}))
    with pytest.raises(grid.GridError, match=r"seed0\.json is no result .*options"):
        grid.state_of(run, places)


@pytest.mark.parametrize("line", ['{"epoch": ' + "9" * 5000 + "}", "[" * 50_000, '{"epoch": 1, "x": "\\u001b[2J"}'])
def test_lines_that_cannot_be_read_end_the_history(line, result, stranger):
    run = run_of(stranger, result)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n" + json.dumps(result["epochs"][0]) + "\n")
    assert RunDirectory(run).history() == result["epochs"]
