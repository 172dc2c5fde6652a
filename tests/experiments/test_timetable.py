"""A run's steps in calls: each step once, of one kind a call, and none goes past where something is due."""

import pytest

from experiments.config import TrainConfig
from experiments.options import ModelConfig, OptimizerConfig, RunConfig, TdlrtConfig
from experiments.run.timetable import Timetable

STEPS_PER_EPOCH = 23
KINDS = {"whole": {}, "amortized": {"adapt_every": 5}, "between": {"adapt_every": 5, "bases_between": True}}


@pytest.mark.parametrize("at_once", [1, 4, 100])
@pytest.mark.parametrize("run", [{}, {"save_every": 7}, {"save_every": 6, "evaluate_every": 4}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_calls_take_every_step_once_and_pass_nothing_that_is_due(kind, run, at_once):
    config = TrainConfig(tdlrt=TdlrtConfig(**KINDS[kind]), run=RunConfig(**run))
    timetable = Timetable(config, STEPS_PER_EPOCH)
    last, done, calls = 3 * STEPS_PER_EPOCH, 0, 0
    due = {step for every in (*run.values(), STEPS_PER_EPOCH) for step in range(0, last + 1, every)}
    while done < last:
        whole, count = timetable.next_steps(done, at_once)
        steps = range(done, done + count)
        assert 1 <= count <= at_once
        assert not due.intersection(steps[1:])
        adapts = [step % config.tdlrt.adapt_every == 0 for step in steps]
        assert whole == adapts[0]
        if kind == "between":
            assert adapts == [whole] * count and (count == 1 or not whole)
        done, calls = done + count, calls + 1
    assert done == last
    if at_once == 100 and kind != "between":
        assert calls == len(due) - 1


def test_what_is_due_and_what_is_not_asked_for():
    run = Timetable(TrainConfig(run=RunConfig(save_every=7, evaluate_every=4)), STEPS_PER_EPOCH)
    assert [step for step in range(1, 30) if run.is_saved(step)] == [7, 14, 21, 28]
    assert [step for step in range(1, 13) if run.is_evaluated(step)] == [4, 8, 12]
    never = Timetable(TrainConfig(), STEPS_PER_EPOCH)
    assert not any(never.is_saved(step) or never.is_evaluated(step) for step in range(1, 100))


@pytest.mark.parametrize(
    "ranks, falls_for",
    [
        ({"budget": 0.9}, 5 * STEPS_PER_EPOCH),
        ({"budget": 0.9, "budget_epochs": 3}, 3 * STEPS_PER_EPOCH),
        ({"budget": 0.9, "budget_epochs": 3, "freeze_epochs": 2}, 2 * STEPS_PER_EPOCH),
        ({}, None),
        ({"freeze_epochs": 2}, None),
    ],
    ids=str,
)
def test_ranks_fall_and_then_have_settled(ranks, falls_for):
    config = TrainConfig(tdlrt=TdlrtConfig(**ranks), optimizer=OptimizerConfig(epochs=10))
    timetable, last = Timetable(config, STEPS_PER_EPOCH), 10 * STEPS_PER_EPOCH
    for done in range(last):
        falls = falls_for is not None and done < falls_for
        assert timetable.ranks_fall(done) == falls
        assert timetable.ranks_have_settled(done) == (falls_for is not None and not falls)
        assert timetable.steps_at_new_sizes(done) == (falls_for if falls else last) - done


def test_without_adaptive_ranks_none_fall():
    dense = Timetable(TrainConfig(model=ModelConfig(method="dense"), tdlrt=TdlrtConfig(budget=0.9)), STEPS_PER_EPOCH)
    assert not dense.ranks_fall(0) and not dense.ranks_have_settled(10**6)
