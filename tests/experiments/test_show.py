"""``experiments.show`` on finished runs, unfinished ones, result files, and what is damaged or none at all."""

import json
import re
import shutil
import xml.etree.ElementTree
from pathlib import Path

import pytest
from PIL import Image

from experiments import show
from experiments.run import plots

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results" / "mnist_lenet5"
FIGURES = ("learning", "ranks", "compression", "truncation", "seconds")


@pytest.fixture(scope="module")
def result():
    return json.loads((RESULTS / "bug_seed0.json").read_text())


@pytest.fixture
def no_plots(monkeypatch):
    """For tests about something else: drawing takes longest."""
    saved = []

    def note(figure, directory, name):
        saved.append(directory / name)
        return [directory / f"{name}.png", directory / f"{name}.svg"]

    monkeypatch.setattr(plots, "save_figure", note)
    return saved


@pytest.fixture
def run_directory(result, tmp_path):
    """A finished run: ``config.json``, ``metrics.jsonl``, ``result.json``."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"options": result["options"]}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in result["epochs"]))
    (directory / "result.json").write_text(json.dumps(result))
    return directory


def shown(capsys, *arguments):
    """The exit code and what was printed."""
    code = show.main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


def test_a_finished_run_with_all_its_plots(run_directory, capsys):
    code, printed = shown(capsys, run_directory)
    assert code == 0
    for words in ("lenet5 (tdlrt) on mnist", "tau 0.25", "50×20×5×5", "10×10×5×5", "96.1%", "98.64%", "154.0"):
        assert words in printed.out, words
    assert "note:" not in printed.out and "Comparison" not in printed.out
    for name in FIGURES:
        with Image.open(run_directory / "plots" / f"{name}.png") as image:
            image.verify()
            assert min(image.size) > 400
        assert xml.etree.ElementTree.parse(run_directory / "plots" / f"{name}.svg").getroot().tag.endswith("svg")


def test_result_files_and_their_comparison(capsys, no_plots, tmp_path):
    files = [RESULTS / "bug_seed0.json", RESULTS / "parallel_seed1.json"]
    code, printed = shown(capsys, *files, "--output", tmp_path)
    assert code == 0 and "Comparison" in printed.out
    table = printed.out[printed.out.index("Comparison") :]
    row = next(line for line in table.splitlines() if "parallel_seed1" in line)
    for words in ("parallel", "0.25", "5/5", "98.71%", "96.1%", "85.3%", "16,587", "39.8"):
        assert words in row
    assert no_plots[:5] == [tmp_path / "bug_seed0" / name for name in FIGURES]
    assert no_plots[-1] == tmp_path / "comparison" and len(no_plots) == 11
    no_plots.clear()
    assert shown(capsys, files[0])[0] == 0 and no_plots[0] == Path("runs/plots/bug_seed0/learning")
    no_plots.clear()
    assert shown(capsys, *files, "--no-plots")[0] == 0 and not no_plots


def test_runs_of_one_name_are_told_apart(run_directory, tmp_path, capsys, no_plots):
    other = tmp_path / "elsewhere" / "run"
    shutil.copytree(run_directory, other)
    code, printed = shown(capsys, run_directory, other, "--output", tmp_path)
    assert code == 0 and "elsewhere-run" in printed.out
    assert len({path.parent for path in no_plots}) == 3, "no plot overwrites another's"
    code, printed = shown(capsys, run_directory, run_directory, "--no-plots")
    assert code == 0 and "(2)" in printed.out


def test_an_unfinished_run(run_directory, capsys, no_plots):
    (run_directory / "result.json").unlink()
    path = run_directory / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    code, printed = shown(capsys, run_directory)
    assert code == 0
    assert "note: not finished: 2 of 5 epochs are done" in printed.out
    assert "98.17%" in printed.out and "98.37%" not in printed.out and len(no_plots) == 5
    path.unlink()
    code, printed = shown(capsys, run_directory)
    assert code == 0
    assert "metrics.jsonl is missing" in printed.out and "no epoch is complete" in printed.out


def test_a_dense_run_has_no_ranks(run_directory, capsys, no_plots):
    (run_directory / "result.json").unlink()
    record = {"epoch": 1, "train_loss": 1.0, "test_accuracy": 0.5, "ranks": {}, "truncation_error": {}, "seconds": 1.0}
    (run_directory / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    code, printed = shown(capsys, run_directory)
    assert code == 0 and "50.00%" in printed.out and "Ranks" not in printed.out
    assert [path.name for path in no_plots] == ["learning", "compression", "seconds"]


@pytest.mark.parametrize(
    "name, content, note",
    [
        ("config.json", "{", ".*config.json is damaged: JSONDecodeError"),
        ("config.json", None, "config.json is missing"),
        ("result.json", '{"layers": ', ".*result.json is damaged: JSONDecodeError"),
        ("result.json", '{"layers": [{"name": "conv1"}]}', "its layers cannot be read: KeyError"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epo', "metrics.jsonl is damaged: line 2 of 2"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl cannot be read: KeyError"),
        ("metrics.jsonl", None, "metrics.jsonl is missing"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl cannot be read: TypeError"),
    ],
)
def test_damaged_runs_say_what_is_missing(run_directory, capsys, no_plots, name, content, note):
    if content is None:
        (run_directory / name).unlink()
    else:
        (run_directory / name).write_text(content)
    code, printed = shown(capsys, run_directory)
    assert code == 0
    assert re.search(f"note: {note}", printed.out), printed.out


def test_what_is_no_run_ends_with_code_two(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"options": {}}')
    (tmp_path / "text.json").write_text("once upon a time")
    (tmp_path / "binary.json").write_bytes(bytes(range(128, 256)))
    for name in ("list.json", "other.json", "text.json", "binary.json"):
        code, printed = shown(capsys, RESULTS / "bug_seed0.json", tmp_path / name)
        assert code == 2 and f"{name} is not a result of experiments.train" in printed.err
        assert not printed.out, "nothing is shown or drawn before all paths are known to be runs"
    code, printed = shown(capsys, tmp_path / "nowhere")
    assert code == 2 and "nowhere does not exist" in printed.err
    code, printed = shown(capsys, RESULTS)
    assert code == 2 and "is not the directory of a run (no config.json)" in printed.err
    assert "name its result files" in printed.err and "*.json" in printed.err


def test_plots_that_cannot_be_written_are_told(run_directory, tmp_path, capsys):
    """Of one run, and of several together; the tables are there."""
    (tmp_path / "file").write_text("")
    shutil.copytree(run_directory, tmp_path / "other")
    for paths in ([run_directory], [run_directory, tmp_path / "other"]):
        code, found = shown(capsys, *paths, "--output", tmp_path / "file")
        assert code == 2
        assert f"plots cannot be written to {tmp_path / 'file'}" in found.err and "--no-plots" in found.err
        assert "Traceback" not in found.err and "whole network" in found.out
