"""A run's directory is one process's: others are refused while it is at work, and runs without a name get one each."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from experiments.config import from_json
from experiments.run import directory
from experiments.run.directory import RunDirectory, RunDirectoryError
from tests.experiments.jobs import DENSE, ROOT, lines, numbers, run

COMMAND = [sys.executable, "-m", "experiments.train", *DENSE]


def test_another_process_is_refused_until_the_first_has_ended(tmp_path):
    """The first is stopped in the midst of it; it goes on as if there had not been another, and a killed one holds nothing."""
    where = ["--run-dir", str(tmp_path / "run")]
    long = [*COMMAND, *where, "--epochs", "400", "--schedule", "constant"]
    first = subprocess.Popen(long, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGSTOP)
        before = (tmp_path / "run" / "config.json").read_bytes()
        for more in ([], ["--resume"]):
            other = subprocess.run([*long, *more], cwd=ROOT, capture_output=True, text=True)
            message = f"another process is at work there (process {first.pid} on "
            found = "holds a run that is not finished" in other.stderr if not more else message in other.stderr
            assert other.returncode == 2 and found, other.stderr
        assert (tmp_path / "run" / "config.json").read_bytes() == before
        os.kill(first.pid, signal.SIGCONT)
    finally:
        first.kill()
        first.wait()
    epochs = len(lines(tmp_path / "run")) + 1
    assert run(*DENSE, *where, "--schedule", "constant", "--epochs", epochs, "--resume") == 0
    assert [record["epoch"] for record in lines(tmp_path / "run")] == list(range(1, epochs + 1))
    assert not (tmp_path / "run" / ".lock").exists()


def test_runs_of_one_second_have_a_directory_each(tmp_path, monkeypatch, no_plots):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(directory, "default_path", lambda config: tmp_path / "runs" / "digits-now")
    for seed in (0, 1, 2):
        assert run(*DENSE, "--seed", seed) == 0
    seeds = {
        path.parent.name: json.loads(path.read_text())["seed"] for path in (tmp_path / "runs").glob("*/result.json")
    }
    assert seeds == {"digits-now": 0, "digits-now_2": 1, "digits-now_3": 2}


def test_a_run_that_does_not_begin_leaves_nothing(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    missing = ["--dataset", "mnist", "--data-dir", tmp_path / "none", "--epochs", "1"]
    for where in (tmp_path / "new" / "run", tmp_path / "mine"):
        assert run(*missing, "--run-dir", where) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"] and not list((tmp_path / "mine").iterdir())


def test_who_held_it_and_has_gone_holds_it_no_more(tmp_path):
    """A lock is the process's, not the file's; and who waits for one that is removed takes the one in its place."""
    config = from_json({"run_dir": str(tmp_path / "run")})
    first, second = RunDirectory.of(config), RunDirectory.of(config)
    first.hold()
    with pytest.raises(RunDirectoryError, match=re.escape("another process is at work there (process ")):
        second.hold()
    first.release()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on another machine")
    second.hold()
    with pytest.raises(RunDirectoryError, match=f"process {os.getpid()} on "):
        first.hold()
    second.release()
    assert not (tmp_path / "run" / ".lock").exists()


def test_where_there_are_no_locks_it_goes_on_without(tmp_path, monkeypatch, no_plots):
    fcntl = pytest.importorskip("fcntl")

    def refuse(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run(*DENSE, "--run-dir", tmp_path / "run") == 0
    assert numbers(lines(tmp_path / "run")[-1])["epoch"] == 2


def test_a_run_that_ended_while_this_one_began_is_not_begun_anew(tmp_path, monkeypatch, no_plots, capsys):
    """Between looking at the directory and holding it."""
    hold = RunDirectory.hold

    def late(self):
        monkeypatch.setattr(RunDirectory, "hold", hold)
        assert run(*DENSE, "--run-dir", tmp_path / "run") == 0
        hold(self)

    monkeypatch.setattr(RunDirectory, "hold", late)
    assert run(*DENSE, "--run-dir", tmp_path / "run") == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert run(*DENSE, "--run-dir", tmp_path / "run", "--resume") == 0
