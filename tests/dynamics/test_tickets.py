"""Teachers of low rank: their ranks are found from an overestimate, at a distance to the full flow that the tolerance governs."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.dynamics import tickets
from tdlrt_jax import active_rank, to_dense


def test_a_lesson_starts_from_an_overestimate(x64):
    task = tickets.lesson(tickets.PROBLEMS["two convolutions"])
    assert float(task.loss(task.teacher)) == pytest.approx(0, abs=1e-20)
    for name, (shape, rank) in tickets.PROBLEMS["two convolutions"].items():
        unfoldings = [
            np.moveaxis(np.asarray(to_dense(task.teacher[name])), i, 0).reshape(shape[i], -1) for i in range(4)
        ]
        assert [np.linalg.matrix_rank(unfolding) for unfolding in unfoldings] == list(rank)
        assert active_rank(task.start[name]).tolist() == list(shape)
    assert float(task.loss({name: to_dense(kernel) for name, kernel in task.start.items()})) > 0.1


def test_the_teachers_ranks_are_found(x64):
    """The larger the tolerance, the sooner; and the kernel is closer to the teacher's than that of the full flow."""
    kernels = {"conv1": ((3, 3, 4, 6), (2, 2, 2, 3))}
    found = tickets.study(tickets.lesson(kernels, images=24), tolerances=(0.2, 0.05), end=8.0, step_size=0.1, looks=40)
    large, small = found["series"]
    assert large["ranks"]["conv1"][0] == [3, 3, 4, 6] and found["teacher"]["conv1"] == [2, 2, 2, 3]
    times = [tickets.found_at(found, series) for series in (large, small)]
    assert None not in times and times[0] < times[1]
    for series in (large, small):
        assert max(series["distance"]) < 2 * series["tolerance"] + 0.05
        assert series["to_teacher"][-1] < found["distance_full"][-1] < 0.2 * found["distance_full"][0]
    # Before anything is dropped only the steps' length separates Algorithm 1 from the flow.
    untouched = [k for k, ranks in enumerate(small["ranks"]["conv1"]) if ranks == [3, 3, 4, 6]]
    assert max(small["distance"][k] for k in untouched) < 0.05


def test_ranks_that_are_not_the_teachers_at_the_end_are_not_found():
    result = {"teacher": {"a": [2, 2]}, "times": [0.0, 1.0, 2.0]}
    assert tickets.found_at(result, {"ranks": {"a": [[3, 3], [2, 2], [2, 2]]}}) == 1.0
    assert tickets.found_at(result, {"ranks": {"a": [[3, 3], [2, 2], [1, 2]]}}) is None
    assert tickets.found_at(result, {"ranks": {"a": [[2, 2], [2, 2], [2, 2]]}}) == 0.0


def test_published_results_are_drawn_from_json(tmp_path):
    published = Path(tickets.__file__).parents[1] / "results" / "dynamics" / "tickets.json"
    result = json.loads(published.read_text())
    assert jnp.isfinite(jnp.asarray(result["problems"]["one convolution"]["distance_full"])).all()
    (tmp_path / "tickets.json").write_text(published.read_text())
    assert tickets.main(["--output", str(tmp_path), "--draw"]) == 0
    assert (tmp_path / "tickets.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<svg" in (tmp_path / "tickets.svg").read_text()
