"""Steps of finished runs, timed in turn: all of them, by names that tell them apart, and of the kinds that a run has."""

import json

import pytest

from experiments import step_cost
from experiments.run import plots
from experiments.run.directory import distinct_names
from experiments.run.programs import Programs
from tests.experiments.jobs import TINY, run


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two runs of one name, the second with steps between."""
    directory = tmp_path_factory.mktemp("runs")
    between = ["--rank", "6", "--adapt-every", "3", "--cores-between"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_figure", lambda figure, directory, name: [])
        for name, options in (("dense", ["--method", "dense"]), ("tdlrt", between)):
            assert run(*TINY, "--epochs", "1", *options, "--run-dir", directory / name / "seed0") == 0
    return [directory / name / "seed0" for name in ("dense", "tdlrt")]


def test_every_run_is_timed_at_all_kinds_of_its_steps(places, tmp_path, monkeypatch, capsys):
    kinds, train = {}, Programs.train

    def noted(self, *arguments, whole=True):
        kinds.setdefault(id(self), []).append(whole)
        return train(self, *arguments, whole=whole)

    monkeypatch.setattr(Programs, "train", noted)
    output = tmp_path / "cost.json"
    assert step_cost.main([*map(str, places), "--rounds", "2", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert list(result["runs"]) == ["dense-seed0", "tdlrt-seed0"]
    dense, tdlrt = kinds.values()
    assert dense == [True] * 4 and tdlrt == [True, False] * 4
    assert step_cost.markdown(result) in capsys.readouterr().out
    for name, place in zip(result["runs"], places):
        final = json.loads((place / "result.json").read_text())["final"]
        assert result["runs"][name]["test_accuracy"] == final["test_accuracy"]
        assert 0 < result["runs"][name]["seconds"]["lowest"] <= result["runs"][name]["seconds"]["median"]


def test_a_period_is_a_whole_step_and_those_between():
    class Recorded(step_cost._Step):
        def __init__(self, every, between):
            self.every, self.between, self.taken = every, between, []

        def _run(self, *, whole):
            self.taken.append(whole)
            return 5.0 if whole else 1.0

    assert Recorded(1, None).period() == 5.0
    assert Recorded(10, "bases").period() == pytest.approx((5 + 9) / 10)
    alike = Recorded(3, None)  # --adapt-every by itself: one program, whose every third step is dear
    assert alike.period() == 5.0 and alike.taken == [True] * 3


def test_names_are_told_apart_by_as_much_as_it_takes(tmp_path):
    paths = [tmp_path / "a" / "b" / "seed0", tmp_path / "c" / "b" / "seed0", tmp_path / "one.json"]
    assert distinct_names(paths) == ["b-seed0 (1)", "b-seed0 (2)", "one (3)"]
    assert distinct_names(paths[1:]) == ["seed0", "one"]
