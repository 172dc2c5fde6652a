"""Figures of grids from JSON alone: what is drawn are the numbers of hand-made results."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments import figure1, figure2_robustness
from experiments.config import TrainConfig
from experiments.figure2_robustness import curves, steps_to
from experiments.grids.figures import Curves, Point, plot_rank_paths, plot_robustness, plot_tolerance, plot_tradeoff
from experiments.grids.tables import Statistic
from experiments.run.plots import plot_learning, save_figure


def put(directory, run, accuracy, compression, *, epochs=None, layers=()):
    """A result file of a planned run."""
    epochs = epochs or [{"epoch": 1, "seconds": 1.0, "ranks": {}}]
    final = {**epochs[-1], "test_accuracy": accuracy, "compression_conv": compression, "compression_all": compression}
    result = {
        "options": {**TrainConfig().to_json(), **run.config()},
        "hardware": "abacus",
        "images": {"train": 256, "test": 100},
        "layers": list(layers),
        "epochs": epochs,
        "final": final,
    }
    path = directory / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))


def is_drawn(directory, name):
    """Both files are there, are what they are called, and are no empty sheet."""
    png, svg = directory / f"{name}.png", directory / f"{name}.svg"
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 5000
    return ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_figure1_from_results(tmp_path):
    runs = {run.name: run for run in figure1.plan("cpu", 2, None)}
    layers = [{"name": "convs/0", "shape": [20, 10, 3, 3], "rank": [10, 5, 3, 3]}]
    epochs = [{"epoch": n, "seconds": 1.0, "ranks": {"convs/0": [20 // n, 10 // n, 3, 3]}} for n in (1, 2)]
    for seed in (0, 1):
        put(tmp_path, runs[f"vgg16/dense/seed{seed}"], 0.8 + 0.02 * seed, 0.0)
        for tau, compression in ((0.03, 0.7), (0.1, 0.9)):
            run = runs[f"vgg16/tdlrt-tau-{tau}/seed{seed}"]
            put(tmp_path, run, 0.9 - compression / 10 + 0.02 * seed, compression, epochs=epochs, layers=layers)
        put(tmp_path, runs[f"vgg16/cp-0.5/seed{seed}"], 0.5, 0.51)
    paths = figure1.render(tmp_path)
    assert {path.stem for path in paths} == {"figure1", "tolerance", "ranks_vgg16"}
    assert all(is_drawn(tmp_path, name) for name in ("figure1", "tolerance", "ranks_vgg16"))
    text = (tmp_path / "figure1.md").read_text()
    assert "| VGG16 | TDLRT | τ 0.1 | 82.00 ± 1.41 | 90.00 ± 0.00 | 2 | a |" in text
    assert "| VGG16 | Baseline |  | 81.00 ± 1.41 | 0.00 ± 0.00 | 2 | a |" in text
    assert "| VGG16 | CP-factorized | compression 0.5 | 50.00" in text
    assert "limit 10000 instead of none" in text and "AlexNet" not in text


def test_figure1_without_the_sweep_over_tolerances(tmp_path):
    run = next(run for run in figure1.plan("cpu", 1, None) if run.name == "alexnet/tucker-0.9/seed0")
    put(tmp_path, run, 0.5, 0.9)
    assert {path.stem for path in figure1.render(tmp_path)} == {"figure1"}
    other = tmp_path / "other"
    put(other, run._replace(name="somewhere/else/seed0"), 0.5, 0.9)
    with pytest.raises(ValueError, match="holds no results of Figure 1"):
        figure1.render(other)


def test_the_tradeoff_is_drawn_where_it_is():
    point = Point(Statistic(90.0, 1.0, 3), Statistic(80.0, 2.0, 3), 0.1)
    lower = Point(Statistic(50.0, None, 1), Statistic(85.0, None, 1), 0.01)
    dense = {"VGG16": Statistic(88.0, 0.5, 3)}
    figure = plot_tradeoff({"VGG16": {"TDLRT": [point, lower]}}, dense, {"VGG16": {"TDLRT": (95.34, 89.59)}})
    (axes,) = figure.axes
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert [[50.0, 85.0], [90.0, 80.0]] in lines and [[95.34, 89.59]] in lines
    assert any(set(line.get_ydata()) == {88.0} for line in axes.lines)
    bars = [path.vertices.tolist() for bar in axes.collections for path in bar.get_paths()]
    assert [[90.0, 78.0], [90.0, 82.0]] in bars and [[89.0, 80.0], [91.0, 80.0]] in bars
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Baseline", "hollow: the paper's", "TDLRT"]

    left, right = plot_tolerance({"VGG16": [point, lower]}).axes
    assert left.lines[0].get_xydata().tolist() == [[0.01, 50.0], [0.1, 90.0]]
    assert right.lines[0].get_xydata().tolist() == [[0.01, 85.0], [0.1, 80.0]]


def test_rank_paths_are_relative_to_the_layers_sizes():
    layers = [
        {"name": "a", "shape": [20, 10, 3, 3], "rank": [1, 1, 1, 1]},
        {"name": "b", "shape": [8, 4], "rank": [1, 1]},
        {"name": "dense", "shape": [8, 4], "rank": None},
    ]
    epochs = [
        {"epoch": 1, "ranks": {"a": [10, 10, 3, 3], "b": [4, 1]}},
        {"epoch": 2, "ranks": {"a": [2, 2, 1, 1], "b": [8, 4]}},
    ]
    axes = plot_rank_paths({"τ = 0.1": {"layers": layers, "epochs": epochs}}).axes[0]
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert np.allclose(axes.lines[0].get_ydata(), [75, 15]) and np.allclose(axes.lines[1].get_ydata(), [37.5, 100])


def curve_result(seed, accuracies, *, every=20, epochs=1):
    points = [{"step": every * (n + 1), "test_accuracy": accuracy} for n, accuracy in enumerate(accuracies)]
    size = len(points) // epochs
    records = [{"epoch": n + 1, "curve": points[n * size : (n + 1) * size]} for n in range(epochs)]
    return {"options": {"seed": seed}, "epochs": records}


def test_curves_go_through_all_epochs_and_have_the_same_steps():
    found = curves([curve_result(0, [0.1, 0.5, 0.9, 0.95], epochs=2), curve_result(1, [0.3, 0.5, 0.7, 0.96], epochs=2)])
    assert found.steps.tolist() == [20, 40, 60, 80]
    assert np.allclose(found.values, [[10, 50, 90, 95], [30, 50, 70, 96]])
    assert steps_to(found, 90) == (Statistic.of([60.0, 80.0]), 2)
    assert steps_to(found, 96) == (Statistic.of([80.0]), 1) and steps_to(found, 97) == (None, 0)
    with pytest.raises(ValueError, match="seed 1 has no curve at steps"):
        curves([curve_result(0, [0.1, 0.2]), curve_result(1, [0.1, 0.2], every=10)])
    with pytest.raises(ValueError, match="seed 0 has no curve"):
        curves([{"options": {"seed": 0}, "epochs": [{"epoch": 1}]}])


def test_the_band_is_the_deviation_within_0_and_100():
    curve = Curves(np.array([1, 2]), np.array([[10.0, 90.0], [30.0, 110.0]]))
    (axes,) = plot_robustness({"TDLRT": curve, "CP": curve._replace(values=curve.values[:1])}).axes
    (band,) = axes.collections  # a single run has none
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(20 - 200**0.5) and heights.max() == 100
    assert axes.lines[0].get_ydata().tolist() == [20, 100]


def test_figure2_robustness_from_results(tmp_path):
    accuracies = {"tdlrt": ((0.5, 0.92, 0.96), (0.5, 0.8, 0.98)), "cp": ((0.1, 0.1, 0.1), (0.1, 0.2, 0.3))}
    for run in figure2_robustness.plan("full", 2, None):
        method, seed = run.name.split("/")[0], int(run.name[-1])
        if method in accuracies:
            values = accuracies[method][seed]
            epochs = curve_result(seed, values)["epochs"]
            put(tmp_path, run, values[-1], -0.1, epochs=epochs)
    paths = figure2_robustness.render(tmp_path)
    assert is_drawn(tmp_path, "figure2_robustness") and paths[-1].name == "figure2_robustness.md"
    text = paths[-1].read_text()
    assert "| TDLRT | 2 | 50 ± 14 (2 of 2) | 60 ± 0 (2 of 2) | 60 (1 of 2) | 97.00 ± 1.41 | -10.0 ± 0.0 | a |" in text
    assert "| CP-factorized | 2 | — (0 of 2) |" in text and "Tucker" not in text
    assert "one every 20 steps. All as the protocol says." in text


def test_the_same_figure_is_the_same_file(tmp_path):
    for name in ("first", "second"):
        save_figure(
            plot_learning([{"epoch": n, "test_accuracy": 0.5, "train_loss": 1.0} for n in (1, 2)]), tmp_path / name, "a"
        )
    for suffix in ("png", "svg"):
        assert (tmp_path / "first" / f"a.{suffix}").read_bytes() == (tmp_path / "second" / f"a.{suffix}").read_bytes()
