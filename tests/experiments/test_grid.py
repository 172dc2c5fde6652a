"""Grids run what is missing, resume what was cut off, tell what fails, and lose nothing; with a stand-in for the training."""

import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import figure2_robustness
from experiments.grids.grid import Grid, GridError, Places, Run, main, state_of
from experiments.grids.pace import Pace
from experiments.run.process import interpreter

# Takes the options of experiments.train and leaves a run's files behind. What it does beyond is told by files in --data-dir:
# "fail" names a run that does, "hang" an epoch (a number) after which every run waits for a signal; with "stubborn" for ever.
STAND_IN = """
import json, os, pathlib, signal, sys, time

options, words = {}, sys.argv[1:]
while words:
    word = words.pop(0)[2:].replace("-", "_")
    if word in ("resume", "linear", "no_linear"):
        options[word.removeprefix("no_")] = not word.startswith("no_")
        continue
    value = words.pop(0)
    try:
        options[word] = json.loads(value)
    except json.JSONDecodeError:
        options[word] = value
run, control = pathlib.Path(options.pop("run_dir")), pathlib.Path(options.pop("data_dir"))
resume = options.pop("resume", False)
name = "/".join(run.parts[-2:])
with (control / "calls").open("a") as calls:
    calls.write(f"{name} {'resume' if resume else 'start'}\\n")
(control / "preallocate").write_text(str(os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")))

def told(what):
    return (control / what).read_text() if (control / what).exists() else ""

if resume != (run / "config.json").exists():
    sys.exit(f"--resume is wrong for {run}")
run.mkdir(parents=True, exist_ok=True)
(run / "config.json").write_text(json.dumps({"options": options, "command": "python -m x", "hardware": "abacus"}))
if told("fail") == name:
    print("a first line", "the reason", sep="\\n")
    sys.exit(3)
received = []
signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
metrics = run / "metrics.jsonl"
lines = metrics.read_text().splitlines() if metrics.exists() else []
for epoch in range(len(lines) + 1, options["epochs"] + 1):
    numbers = {"test_accuracy": 0.5 + 0.01 * epoch, "compression_conv": 0.9, "seconds": 2.0, "evaluation_seconds": 1.0}
    lines.append(json.dumps({"epoch": epoch, **numbers}))
    metrics.write_text("".join(line + "\\n" for line in lines))
    if told("hang") == str(epoch):
        (control / "waiting").write_text(str(os.getpid()))
        while not received or told("stubborn"):
            time.sleep(0.01)
        sys.exit(128 + received[0])
records = [json.loads(line) for line in lines]
result = {"options": {**options, "run_dir": str(run)}, "command": f"python -m x --run-dir {run}", "hardware": "abacus"}
(run / "result.json").write_text(json.dumps({**result, "epochs": records, "final": records[-1]}))
"""
COMMAND = (sys.executable, "-c", STAND_IN)
EPOCHS = 3


@pytest.fixture
def control(tmp_path):
    path = tmp_path / "control"
    path.mkdir()
    return path


@pytest.fixture
def run_grid(tmp_path, control):
    """Runs the grid of three runs; returns its exit code."""

    def run(*arguments, epochs=EPOCHS):
        def plan(scale, seeds, dataset):
            names = ("net/one/seed0", "net/one/seed1", "net/two/seed0")
            rows = {name: {"width": 0.5 if "two" in name else 1.0, "linear": False} for name in names}
            return [
                Run(name, {"model": "vgg16", "epochs": epochs, "seed": int(name[-1]), **row})
                for name, row in rows.items()
            ]

        def render(directory):
            found = sorted(directory.rglob("*.json"))
            (directory / "table.md").write_text(f"{len(found)} results")
            return [directory / "table.md"]

        places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--data-dir", str(control)]
        return main(Grid("some", "doc", plan, render), [*places, *arguments], command=COMMAND, poll=0.02)

    return run


def calls(control):
    return (control / "calls").read_text().split("\n")[:-1] if (control / "calls").exists() else []


def signal_when_waiting(control, number):
    """Sends this process a signal once a run waits for it; the grid's handler is in place then."""

    def send():
        deadline = time.monotonic() + 20
        while not (control / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if (control / "waiting").exists():
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.fixture(autouse=True)
def no_preallocation_set(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)


def test_all_runs_are_made_published_and_drawn_once(run_grid, control, tmp_path, capsys):
    assert run_grid() == 0
    output = capsys.readouterr().out
    assert calls(control) == ["one/seed0 start", "one/seed1 start", "two/seed0 start"]
    assert (control / "preallocate").read_text() == "None"
    assert "[1/3] net/one/seed0 epoch 3/3: test accuracy 53.00%, compression 90.0%, 2.0 s; all: 18 s left" in output
    assert (tmp_path / "results" / "table.md").read_text() == "3 results"
    text = (tmp_path / "results" / "net" / "two" / "seed0.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["options"]["width"] == 0.5
    assert [record["epoch"] for record in json.loads(text)["epochs"]] == [1, 2, 3]

    assert run_grid() == 0
    assert len(calls(control)) == 3 and "3 done, 0 to do" in capsys.readouterr().out


def test_only_matching_runs_several_at_a_time(run_grid, control, capsys):
    assert run_grid("--only", "net/one/*", "--jobs", "2") == 0
    assert sorted(calls(control)) == ["one/seed0 start", "one/seed1 start"]
    assert (control / "preallocate").read_text() == "false"  # else the first process takes most of a GPU's memory
    capsys.readouterr()
    assert run_grid("--list") == 0
    assert capsys.readouterr().out.split() == [
        "done",
        "net/one/seed0",
        "done",
        "net/one/seed1",
        "open",
        "net/two/seed0",
    ]
    assert run_grid("--only", "three") == 2
    assert "--only three: matches none of 3 runs (net/one/seed0, " in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_waited_for_and_nothing_is_lost(run_grid, control, tmp_path, capsys, number, code):
    (control / "hang").write_text("2")
    thread = signal_when_waiting(control, number)
    assert run_grid() == code
    thread.join()
    output = capsys.readouterr().out
    assert "net/one/seed0 has stopped after epoch 2" in output
    assert f"3 of 3 runs left; continue with\n  {interpreter()} -m experiments.some --runs" in output
    assert not (tmp_path / "results").exists()

    (control / "hang").unlink()
    run_grid("--list")
    assert "cut off   net/one/seed0\nopen      net/one/seed1" in capsys.readouterr().out
    assert run_grid() == 0
    assert calls(control) == ["one/seed0 start", "one/seed0 resume", "one/seed1 start", "two/seed0 start"]
    assert "net/one/seed0 continues after epoch 2" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "results" / "net" / "one" / "seed0.json").read_text())["epochs"]) == EPOCHS


def test_a_second_signal_ends_everything_at_once(run_grid, control, capsys):
    """And until then a run is in a process group of its own, which no Ctrl-C of a terminal reaches, and holds the lock."""
    (control / "hang").write_text("1")
    (control / "stubborn").write_text("yes")
    seen = {}

    def look_and_send():
        signal_when_waiting(control, signal.SIGINT).join()
        pid = seen["pid"] = int((control / "waiting").read_text())
        seen["group"] = os.getpgid(pid)
        seen["files"] = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=look_and_send)
    thread.start()
    assert run_grid() == 130
    thread.join()
    assert "stopped at once" in capsys.readouterr().err
    assert seen["group"] == seen["pid"] and any(name.endswith(".lock") for name in seen["files"])
    with pytest.raises(ProcessLookupError):
        os.kill(seen["pid"], 0)


def test_the_time_given_is_kept(run_grid, control, capsys):
    (control / "hang").write_text("1")
    assert run_grid("--minutes", "0.005", "--jobs", "2") == 0
    output = capsys.readouterr().out
    assert "the time is over: waiting for 2 runs" in output and "3 of 3 runs left" in output
    assert run_grid("--minutes", "0") == 2
    assert "--minutes 0.0: expected a number above 0" in capsys.readouterr().err


def test_a_run_that_fails_is_told_and_the_others_go_on(run_grid, control, tmp_path, capsys):
    (control / "fail").write_text("one/seed1")
    assert run_grid() == 1
    output = capsys.readouterr().out
    assert "[2/3] net/one/seed1 failed with exit code 3; the others go on" in output and "    the reason\n" in output
    assert "failed: net/one/seed1" in output
    assert sorted(path.parent.name for path in (tmp_path / "results").rglob("*.json")) == ["one", "two"]

    (control / "fail").unlink()
    assert run_grid() == 0
    assert calls(control)[3:] == ["one/seed1 resume"]


def test_runs_with_other_options_are_told_and_left_alone(run_grid, control, tmp_path, capsys):
    (control / "hang").write_text("1")
    assert run_grid("--minutes", "0.005") == 0
    before = calls(control)
    assert run_grid(epochs=5) == 2
    error = capsys.readouterr().err
    assert "other options than net/one/seed0 has now:\n  epochs: 3 there, 5 planned" in error
    assert "Move it away" in error and "--runs" in error and "Nothing was changed" in error
    assert calls(control) == before

    (control / "hang").unlink()
    assert run_grid() == 0
    assert run_grid(epochs=5) == 2  # of published results too
    assert "with --results" in capsys.readouterr().err


def test_a_finished_run_that_was_not_published_is_not_made_again(run_grid, control, tmp_path):
    assert run_grid() == 0
    published = tmp_path / "results" / "net" / "one" / "seed1.json"
    content = published.read_text()
    published.unlink()
    assert run_grid() == 0
    assert published.read_text() == content and len(calls(control)) == 3


def test_two_commands_do_not_share_runs(run_grid, control, tmp_path, capsys):
    directory = tmp_path / "runs" / "some" / "cpu"
    directory.mkdir(parents=True)
    with (directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_grid() == 2
    assert "is at work in" in capsys.readouterr().err and not calls(control)
    assert run_grid() == 0


def test_a_damaged_result_is_named(run_grid, tmp_path, capsys):
    assert run_grid() == 0
    path = tmp_path / "results" / "net" / "one" / "seed0.json"
    path.write_text(path.read_text()[:-10])
    assert run_grid() == 2
    assert f"{path} is no result" in capsys.readouterr().err


def test_results_older_than_an_option_had_its_default(tmp_path):
    run, places = Run("a/seed0", {"epochs": 2}), Places(tmp_path, tmp_path)
    assert state_of(run, places) == "open"
    options = run.config()
    del options["patience"]
    (tmp_path / "a").mkdir()
    places.published(run).write_text(json.dumps({"options": options}))
    assert state_of(run, places) == "done"
    with pytest.raises(GridError, match="patience: 5 there, 6 planned"):
        state_of(run._replace(options={"epochs": 2, "patience": 6}), places)


def test_options_that_the_training_does_not_have():
    with pytest.raises(GridError, match=r"a/seed0: experiments.train has no option colour"):
        Run("a/seed0", {"colour": "red"}).config()
    with pytest.raises(GridError, match=r"a/seed0: --epochs 0: expected"):
        Run("a/seed0", {"epochs": 0}).config()


def test_time_left_follows_the_runs_most_alike():
    def history(seconds):
        return [{"seconds": seconds - 1, "evaluation_seconds": 1.0}]

    pace = Pace()
    assert pace.left([("vgg16/a/seed0", 1)]) is None
    pace.learn("vgg16/a/seed0", "here", history(10.0))
    pace.learn("vgg16/b/seed0", "here", history(20.0))
    pace.learn("alexnet/a/seed0", "here", history(3.0))
    assert pace.of("vgg16/a/seed0") == pace.of("vgg16/a/seed1") == 10
    assert pace.of("vgg16/c/seed0") == 15 and pace.of("resnet18/a/seed0") == 11
    assert pace.left([("vgg16/a/seed1", 4), ("alexnet/b/seed0", 2)], jobs=2) == (4 * 10 + 2 * 3) / 2
    pace.learn(
        "vgg16/b/seed1", "elsewhere", history(1.0), here=True
    )  # from now on only what ran on this machine counts
    assert pace.of("vgg16/a/seed0") == 1


def test_a_grid_trains_for_real(tmp_path, capsys):
    """Figure 2's robustness through the training's own command, on few digits."""
    arguments = ["--scale", "smoke", "--dataset", "digits", "--seeds", "1", "--only", "tdlrt/*"]
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert main(figure2_robustness.GRID, [*arguments, *places]) == 0, capsys.readouterr().out
    result = json.loads((tmp_path / "results" / "tdlrt" / "seed0.json").read_text())
    assert result["options"]["dataset"] == "digits" and result["hardware"] and "run_dir" not in result["options"]
    assert [point["step"] for point in result["epochs"][0]["curve"]] == [1, 2, 3, 4]
    assert (tmp_path / "results" / "figure2_robustness.svg").exists()
    assert "dataset digits instead of mnist" in (tmp_path / "results" / "figure2_robustness.md").read_text()
