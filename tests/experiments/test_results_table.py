"""The documentation's tables are those of the committed result files."""

import json
from pathlib import Path

import pytest

from experiments import show, step_cost
from experiments.figure2_robustness import curves, steps_to
from experiments.grids import tables
from experiments.methods import METHODS
from experiments.results_table import markdown, rows
from experiments.sealed import write_sealed

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "experiments" / "results" / "mnist_lenet5"
RESULTS_PAGE = ROOT / "docs" / "results.md"


def test_the_results_page_shows_the_committed_results():
    assert markdown(rows(RESULTS)) in RESULTS_PAGE.read_text()


def test_the_results_page_shows_the_runs_on_all_images():
    alexnet = RESULTS.parent / "table1" / "full" / "alexnet"
    found = rows(alexnet / "dense", alexnet / "tdlrt", RESULTS.parent / "protocol")
    assert markdown(found) in RESULTS_PAGE.read_text()


def test_the_results_page_shows_every_method_under_the_whole_schedule():
    results = RESULTS.parent
    dense = results / "width" / "vgg16_quarter_dense.json"
    found = rows(results / "schedule", results / "importance" / "loss_70.json", dense)
    assert markdown(found) in RESULTS_PAGE.read_text()


@pytest.mark.parametrize("name", ["cifar10_vgg16_quarter", "schedule"])
def test_the_results_page_shows_the_committed_step_costs(name):
    cost = json.loads((ROOT / "experiments" / "results" / f"{name}_step_cost.json").read_text())
    assert step_cost.markdown(cost) in RESULTS_PAGE.read_text()


def test_the_step_costs_are_those_of_the_committed_results():
    """Names, accuracy and compression; and the budgets are met to half a point."""
    directory = ROOT / "experiments" / "results" / "cifar10_vgg16_quarter"
    cost = json.loads((directory.parent / f"{directory.name}_step_cost.json").read_text())
    results = {path.stem: json.loads(path.read_text()) for path in directory.glob("*.json")}
    assert set(results) == set(cost["runs"]) >= {"dense", "bug"}
    for name, result in results.items():
        final, options = result["final"], result["options"]
        assert final["test_accuracy"] == cost["runs"][name]["test_accuracy"]
        assert final["compression_conv"] == cost["runs"][name]["compression_conv"]
        if options["method"] == "tdlrt":
            assert abs(final["compression_conv"] - options["budget"]) < 0.005


def test_the_committed_results_reach_what_they_should():
    """At least 98.2% test accuracy at 95% compression of all weights, mean of three seeds, with both integrators."""
    table = {row["method"]: row for row in rows(RESULTS)}
    for integrator in ("bug", "parallel"):
        assert table[integrator]["seeds"] == [0, 1, 2]
        assert table[integrator]["test"].mean >= 98.2 and table[integrator]["all"].mean >= 95.0


def test_files_of_several_places_are_one_table_the_best_first():
    results = RESULTS.parent
    files = [results / "importance" / "loss_70.json", results / "patience" / "dense_10.json"]
    found = rows(*files)
    finals = [json.loads(file.read_text())["final"] for file in reversed(files)]
    assert [row["test"].mean for row in found] == [100 * final["test_accuracy"] for final in finals]
    assert [row["method"] for row in found] == ["dense", "bug every 10 steps, bases between (normalized, least rank 3)"]
    header, _, dense, tucker = [line.split(" | ") for line in markdown(found).splitlines()]
    place = header.index("validation [%]")
    for row, final in ((dense, finals[0]), (tucker, finals[1])):
        assert row[place - 1 : place + 2] == [
            f"{100 * final[f'{name}_accuracy']:.2f}" for name in ("train", "validation", "test")
        ]
    assert "validation" not in markdown(rows(*files, RESULTS))  # these runs held nothing out


def test_files_that_are_no_results_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        rows(tmp_path)
    (tmp_path / "broken.json").write_text(json.dumps({"options": {}}))
    with pytest.raises(ValueError, match=r"broken.json is not a result"):
        rows(tmp_path)


def test_the_results_page_shows_what_the_norm_of_initial_kernels_changes():
    """Three networks at a quarter of their width, of gain 1 and others; every line is one run."""
    found = sorted((RESULTS.parent / "width").glob("*_quarter_*.json"))
    found += [RESULTS.parent / "importance" / "loss_70.json", *sorted((RESULTS.parent / "gain").glob("*.json"))]
    found += sorted((RESULTS.parent / "alexnet").glob("quarter_*_gain_*.json"))
    assert len(found) >= 14
    networks = {"alexnet": "AlexNet", "vgg16": "VGG16", "resnet18": "ResNet18"}
    for path in found:
        result = json.loads(path.read_text())
        options, last = result["options"], result["epochs"][-1]
        name = "dense" if options["method"] == "dense" else f"TDLRT, {options['budget']:.0%} saved"
        rates = [epoch["learning_rate"] for epoch in result["epochs"]]
        lowered = [str(number) for number in range(1, len(rates)) if rates[number] < rates[number - 1]]
        accuracies = [f"{100 * last[f'{of}_accuracy']:.1f}" for of in ("train", "validation", "test")]
        line = f"| {networks[options['model']]} | {name} | {options['gain']:.3g} | {', '.join(lowered) or 'never'} | "
        assert line + f"{', '.join(accuracies)} |" in RESULTS_PAGE.read_text(), line


def test_the_results_page_shows_how_figure_2_was_chosen():
    found = sorted((RESULTS.parent / "figure2_choice").glob("*.json"))
    assert len(found) == 14
    for path in found:
        result = json.loads(path.read_text())
        options, last = result["options"], result["epochs"][-1]
        tau = f"{options['tau']:g}" if options["method"] == "tdlrt" else ""
        accuracies = ", ".join(f"{100 * last[f'{of}_accuracy']:.1f}" for of in ("train", "validation", "test"))
        cells = [METHODS[options["method"]].title, tau, f"{options['learning_rate']:g}", accuracies]
        line = f"| {' | '.join(cells)} | {100 * last['compression_conv']:.1f} |"
        assert line in RESULTS_PAGE.read_text(), line


@pytest.mark.parametrize(
    "method, title", [("tdlrt", "TDLRT"), ("tucker", "Tucker factors at once, orthonormal")], ids=["tdlrt", "tucker"]
)
def test_the_results_page_shows_figure_2_from_half_of_the_ranks(method, title):
    found = sorted((RESULTS.parent / "figure2_half_rank").glob(f"{method}_seed*.json"))
    results = [json.loads(path.read_text()) for path in found]
    assert {result["options"]["seed"] for result in results} == set(range(5))
    assert all(result["options"]["rank"] == 0.5 for result in results)
    steps, reached = steps_to(curves(results), 95)
    assert reached == 5
    accuracy, compression = (tables.final(results, f) for f in ("test_accuracy", "compression_conv"))
    line = f"| {title} | {steps.text(0)} | {accuracy.text()} | {compression.text(1)} |"
    assert line in RESULTS_PAGE.read_text(), line


def test_options_younger_than_a_result_make_no_other_row(tmp_path):
    """A seed of now stands beside those of before there was an option that it has at its default."""
    before = json.loads((RESULTS.parent / "schedule" / "tdlrt_seed1.json").read_text())
    assert "dropout" not in before["options"]
    options = {**before["options"], "hidden_units": 0, "dropout": 0.0, "seed": 2}
    write_sealed(tmp_path / "now.json", {**before, "options": options, "seed": 2})
    write_sealed(tmp_path / "other.json", {**before, "options": {**options, "dropout": 0.5}})
    found = rows(RESULTS.parent / "schedule" / "tdlrt_seed1.json", tmp_path)
    assert sorted(len(row["seeds"]) for row in found) == [1, 2]
    assert max((row["seeds"] for row in found), key=len) == [1, 2]


def test_epochs_are_those_that_were_trained():
    """The rounds of imp are as many times --epochs."""
    imp = next((RESULTS.parent / "table1" / "cpu").rglob("imp/seed0.json"))
    result = json.loads(imp.read_text())
    (row,) = rows(imp)
    assert row["epochs"] == len(result["epochs"]) > result["options"]["epochs"]
    assert f"{row['epochs']}/{row['epochs']}" in [
        next(iter(column.cells)) for column in show.comparison_table([show.load(imp)]).columns
    ]
