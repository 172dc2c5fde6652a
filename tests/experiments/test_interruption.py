"""Signals: a run that is stopped loses nothing."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np

from experiments.run.display import Display
from experiments.run.interruption import Interruption
from tdlrt_jax import checkpoint
from tests.experiments.jobs import DENSE, IN_LOOPS, ROOT, TUCKER, interrupt_after, lines, numbers, run, saved_arrays


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


def test_a_signal_between_several_steps_of_one_call(tmp_path, monkeypatch, no_plots):
    """The calls under way come to their end, and the run goes on to the same numbers."""
    options = [*TUCKER, *IN_LOOPS, "--method", "dense", "--steps-at-once", "2"]
    assert run(*options, "--run-dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, signal.SIGTERM)
        assert run(*options, "--run-dir", tmp_path / "cut") == 143
    assert checkpoint.all_steps(tmp_path / "cut" / "checkpoints")[-1] in (8, 10, 12)
    assert run(*options, "--run-dir", tmp_path / "cut", "--resume") == 0
    ours, theirs = (saved_arrays(tmp_path / name, 12) for name in ("cut", "whole"))
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_interruption_restores_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert interruption.exit_code == 0
        signal.raise_signal(signal.SIGTERM)
        assert interruption.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
