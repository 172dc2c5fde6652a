"""Theorems 1 to 3 at a small size: slopes and constants, down to singular values of 1e-12; and the figures from JSON alone."""

import json

import pytest

from experiments.dynamics import curvature, theorem1, theorem2, theorem3, theorems

TINY = (1e-1, 1e-12)


def is_drawn(directory, name):
    png, svg = directory / f"{name}.png", directory / f"{name}.svg"
    return png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 5000 and "<svg" in svg.read_text()


def test_theorem_1_flows_agree(x64):
    found = theorem1.measure(shape=(4, 5, 6), rank=2, smallest=(1e-1,), points=3, steps=(0.1, 0.05, 0.025))
    (series,) = found["series"]
    assert min(series["moved"]) > 0.1
    for pair, distances in series["distance"].items():
        assert max(distances) < 1e-8, pair
    assert min(series["defect_qr"]) > 1e-3 > 1e-10 > max(series["defect_corrected"])
    assert all(step["order"] > 1.8 for step in series["frozen"].values())


def test_theorem_2_descent(x64):
    found = theorem2.measure(
        shape=(5, 6, 7),
        rank=2,
        smallest=TINY,
        integrators=("bug",),
        inners=("exact",),
    )
    for series in found["series"]:
        assert series["alpha"] > 0
        assert series["rates"][0] == pytest.approx(series["rate"], rel=0.02)
        assert 0 < series["beta"] < series["beta_bound"]
        assert series["violations"] == 0


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [(("bug", "euler"), 0.8, 1.2), (("parallel", "exact"), 0.8, 2.1), (("bug", "exact"), 1.8, 2.2)],
)
def test_theorem_3_in_the_step_size(x64, method, low, high):
    """First order at least, with a constant that small singular values do not raise; exact steps of ``bug`` have second order."""
    first, tiny = theorem3.step_term(TINY, (4, 8, 16, 32), (method,), shape=(5, 6, 7), rank=3)
    for series in (first, tiny):
        assert low < series["order"] < high
    assert tiny["c2"] < 1.1 * first["c2"]


def test_theorem_3_in_the_normal_part(x64):
    found = theorem3.normal_term(TINY, (1e-3, 1e-2, 1e-1), steps=32, shape=(5, 6, 7), rank=2, integrators=("bug",))
    for series in found:
        assert series["order"] == pytest.approx(1, abs=0.15)
        assert series["c1"] < 2
        assert series["error_without"] < series["error"][0]


def test_theorem_3_in_the_tolerance(x64):
    found = theorem3.truncation_term(TINY, (1e-3, 2e-3, 4e-3), (16, 32), shape=(10, 10, 10))
    for series in found:
        assert 0.8 < series["order"] < 1.5
        assert 0.1 < series["c3"] < 0.7


def test_curvature_is_that_of_the_factors(x64):
    found = curvature.measure(
        smallest=(1e-1, 1e-3, 1e-5), shape=(4, 5, 6), rank=2, steps=5, solvers=("tsit5",), integrators=("bug",)
    )
    assert found["order"]["euler on (7)"] > 0.7
    for method in ("bug", "bug, ranks free"):
        assert abs(found["order"][method]) < 0.1
        assert min(found["largest_step"][method]) > 0.1
    costs = [f["accepted"] + f["rejected"] for f in found["adaptive"]["tsit5"]]
    assert costs[-1] > costs[0]
    assert max(found["inner_steps"]) <= min(found["inner_steps"]) + 1


def test_published_results_are_drawn_from_json(tmp_path):
    """The committed files, through the real entry points."""
    published = theorems.__file__.rsplit("dynamics", 1)[0] + "results/dynamics"
    for module, name, figures in (
        (theorems, "theorems", ("theorem1", "theorem2", "theorem3")),
        (curvature, "curvature", ("curvature",)),
    ):
        with open(f"{published}/{name}.json") as file:
            result = json.load(file)
        assert result["dtype"] == "float64"
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
        assert module.main(["--output", str(tmp_path), "--draw"]) == 0
        assert all(is_drawn(tmp_path, figure) for figure in figures)


def test_nothing_to_draw_is_said(tmp_path, capsys):
    assert theorems.main(["--output", str(tmp_path), "--draw"]) == 2
    assert "measure first" in capsys.readouterr().err
