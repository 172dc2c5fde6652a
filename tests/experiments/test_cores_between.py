"""The main job with steps of the cores alone, or of bases at ranks that stay, between adaptations."""

import json
import math

import numpy as np
import pytest

from experiments import train
from experiments.options import TdlrtConfig
from experiments.run import plots
from experiments.run.training import Training
from tdlrt_jax import checkpoint

OPTIONS = ["--limit", "110", "--validation", "0.1", "--batch-size", "16", "--epochs", "2", "--learning-rate", "0.02"]
OPTIONS += ["--rank", "40", "--budget", "0.95", "--budget-epochs", "1", "--compilation-steps", "0"]
BETWEEN = ["--adapt-every", "3"]
# What depends on the clock, and on which programs a stretch of training compiles.
APART = ("seconds", "evaluation_seconds", "compilations", "compile_seconds", "step_memory")


def run(directory, *options):
    return train.main([*OPTIONS, *BETWEEN, "--run-dir", str(directory), *options])


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=["--cores-between", "--bases-between"])
def finished(tmp_path_factory, request):
    """A run of two epochs of six steps, which of them were whole, and what the others were."""
    directory, calls, kind = tmp_path_factory.mktemp("between") / "run", [], request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_figure", lambda figure, directory, name: [])
        read = Training._read

        def noted(self, under_way, display):
            calls.append(sorted(key[0] for key in self.programs._compiled))
            read(self, under_way, display)

        patch.setattr(Training, "_read", noted)
        assert run(directory, kind) == 0
    return directory, calls, kind


def test_two_programs_take_turns_and_reach_the_budget(finished):
    directory, calls, _ = finished
    first, second = records(directory)
    assert first["compilations"] == 2, "a whole step and one in between"
    assert second["compilations"] == (2 if first["capacities"] != second["capacities"] else 0)
    assert [False, True] in calls
    # The budget was reached at the end of the first epoch, and arrays have little more room than ranks need.
    assert second["capacities"] != first["capacities"] and second["ranks"].keys() == second["capacities"].keys()
    for layer, ranks in first["ranks"].items():
        assert all(c <= 8 * math.ceil(1.1 * r / 8) for r, c in zip(ranks, second["capacities"][layer], strict=True))
    kernels, dense = 500 * 800 + 5 * 5 * 20 * (1 + 50), 10 * 500
    assert first["weights"] > second["weights"] and second["weights"] <= 0.05 * kernels + dense
    assert np.isfinite(second["train_loss"]) and second["skipped_steps"] == 0


def test_a_run_that_was_cut_off_takes_the_same_steps(finished, tmp_path, monkeypatch):
    """Which steps are whole depends on their numbers alone: four steps of the first epoch, then the rest."""
    directory, save = tmp_path / "run", checkpoint.save
    monkeypatch.setattr(plots, "save_figure", lambda figure, directory, name: [])

    def save_and_die(path, step, *arguments, **options):
        saved = save(path, step, *arguments, **options)
        if step == 4:
            raise KeyboardInterrupt
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        assert run(directory, finished[2], "--save-every", "4") == 130
    assert run(directory, finished[2], "--resume") == 0
    for one, other in zip(records(finished[0]), records(directory), strict=True):
        assert {k: v for k, v in one.items() if k not in APART} == {k: v for k, v in other.items() if k not in APART}


def test_without_steps_in_between_there_is_nothing_to_ask_for():
    with pytest.raises(ValueError, match="--cores-between with --adapt-every 1: there are no steps in between"):
        TdlrtConfig(cores_between=True)
    with pytest.raises(ValueError, match="--bases-between with --adapt-every 1: there are no steps in between"):
        TdlrtConfig(bases_between=True)
    with pytest.raises(ValueError, match="steps in between are of one kind"):
        TdlrtConfig(adapt_every=2, cores_between=True, bases_between=True)
