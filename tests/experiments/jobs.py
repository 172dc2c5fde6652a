"""Runs of the training job as small as they can be, and what tests read of them."""

import hashlib
import json
import signal
from pathlib import Path

import orbax.checkpoint as ocp

from experiments import train
from experiments.run.display import Display

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--limit", "96", "--batch-size", "32", "--epochs", "2"]
DENSE = [*TINY, "--method", "dense"]
# Small ranks and a tolerance large enough that ranks fall and arrays shrink within two epochs of six steps.
TUCKER = ["--limit", "110", "--validation", "0.1", "--batch-size", "16", "--epochs", "2"]
TUCKER += ["--rank", "12", "--tau", "0.4", "--learning-rate", "0.02", "--compilation-steps", "0"]
# Half as many images in as many steps, for several steps a call: within a loop XLA's CPU convolutions take many times as long.
IN_LOOPS = ["--limit", "60", "--validation", "0.2", "--batch-size", "8"]
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
