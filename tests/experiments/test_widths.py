"""Accuracy over the number of weights, from results alone: rows, order, what is refused, and the table of the documentation."""

import json

import pytest

from experiments import widths
from experiments.config import TrainConfig
from experiments.results_table import rows
from tests.experiments.test_figures import is_drawn
from tests.experiments.test_results_table import RESULTS, RESULTS_PAGE

PLACES = ["width/*_dense.json", "width/*_loss.json", "importance/loss_70.json"]
PLACES += ["schedule/dense_seed1.json", "schedule/tdlrt_seed1.json"]
MEASURED = [path for place in PLACES for path in RESULTS.parent.glob(place)]


def cells(line):
    """Of a row of a Markdown table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def put(directory, name, accuracy, weights, **options):
    """A result file of a run with validation images."""
    options = {**TrainConfig().to_json(), "model": "vgg16", "dataset": "cifar10", "validation": 0.1, **options}
    final = {f"{part}_accuracy": accuracy for part in ("train", "validation", "test")}
    final |= {"compression_conv": 0.0, "compression_all": 0.0, "weights": weights}
    result = {"options": options, "seed": options["seed"], "hardware": "abacus", "epochs": [], "final": final}
    path = directory / f"{name}.json"
    path.write_text(json.dumps(result))
    return path


@pytest.fixture
def results(tmp_path):
    directory = tmp_path / "results"
    directory.mkdir()
    low_rank = {"method": "tdlrt", "budget": 0.95}
    put(directory, "a", 0.60, 500, width=0.25, method="dense")
    put(directory, "b", 0.80, 9000, width=1.0, method="dense")
    put(directory, "c", 0.84, 9000, width=1.0, method="dense", seed=1)
    put(directory, "d", 0.79, 450, width=1.0, **low_rank)
    put(directory, "e", 0.85, 400, width=1.0, method="snip", compression=0.95)
    put(directory, "f", 0.70, 7000, width=0.5, model="alexnet", **low_rank)
    return directory


def test_every_row_stands_beside_the_dense_network_of_its_width(results):
    lines = [cells(line) for line in widths.markdown(widths.comparable(results)).splitlines()[2:]]
    assert [[line[i] for i in (0, 1, 2, 4, 5, 8, 9)] for line in lines] == [
        ["VGG16", "1", "dense", "0, 1", "9,000", "82.0 ± 2.8", ""],
        ["VGG16", "1", "SNIP, compression 95%", "0", "400", "85.0", "−3.0"],
        ["VGG16", "1", "TDLRT, budget 95%", "0", "450", "79.0", "3.0"],
        ["VGG16", "1/4", "dense", "0", "500", "60.0", ""],
        ["AlexNet", "1/2", "TDLRT, budget 95%", "0", "7,000", "70.0", ""],
    ]


def test_dense_networks_of_one_width_count_by_their_seeds(results):
    """Two rows of dense networks, one of them of two seeds: all three are what others stand beside."""
    put(results, "g", 0.88, 9000, width=1.0, method="dense", skip_nonfinite=1)
    (row,) = [
        line for line in widths.markdown(widths.comparable(results)).splitlines() if "TDLRT" in line and "VGG16" in line
    ]
    assert row.split(" | ")[-1].strip("| ") == "5.0"  # 84 at the mean


def test_points_are_weights_and_test_accuracy(results, tmp_path):
    found = widths.points(widths.comparable(results))
    assert list(found) == ["VGG16", "AlexNet"]
    assert found["VGG16"]["dense"] == [(9000.0, pytest.approx(82.0), "1"), (500.0, 60.0, "1/4")]
    assert found["AlexNet"] == {"TDLRT, budget 95%": [(7000.0, 70.0, "1/2")]}


def test_the_command_prints_and_draws(results, tmp_path, capsys):
    widths.main([str(results), "--figure", str(tmp_path / "drawn" / "weights")])
    assert capsys.readouterr().out.strip() == widths.markdown(widths.comparable(results))
    assert is_drawn(tmp_path / "drawn", "weights")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 640}, r"limit is (640|None) in .* and (640|None) in .*one protocol"),
        ({"patience": 3}, r"patience is .*3"),
        ({"learning_rate": 0.3}, r"learning_rate is .*0\.3"),
        ({"model": "perceptron"}, r"'perceptron'.*expected .*vgg16"),
        ({"method": "magic"}, r"'magic'.*expected .*tdlrt"),
        ({"width": "wide"}, r"width 'wide': expected a width"),
        ({"width": 0}, r"width 0: expected a width"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(changes, message, results, capsys):
    put(results, "other", 0.5, 100, **{"width": 1.0, "method": "dense", **changes})
    with pytest.raises(ValueError, match=message):
        widths.comparable(results)
    with pytest.raises(SystemExit) as ended:
        widths.main([str(results)])
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


def test_results_without_validation_images_are_refused():
    with pytest.raises(ValueError, match=r"train with --validation"):
        widths.comparable(RESULTS)


def test_the_results_page_shows_the_committed_results():
    assert widths.markdown(widths.comparable(*MEASURED)) in RESULTS_PAGE.read_text()


def test_low_rank_kernels_are_ahead_of_smaller_dense_networks():
    """Where a dense network was trained that has no fewer weights than one in Tucker format, it is no better by a point."""
    found = rows(*MEASURED)
    pairs = 0
    for low_rank in found:
        for dense in found:
            models = [row["options"]["model"] for row in (low_rank, dense)]
            methods = [row["options"]["method"] for row in (low_rank, dense)]
            if methods != ["tdlrt", "dense"] or models[0] != models[1]:
                continue
            if 1.0 < dense["weights"].mean / low_rank["weights"].mean < 5.0:
                pairs += 1
                assert low_rank["test"].mean > dense["test"].mean - 1.0
    assert pairs >= 4


def test_a_network_with_hidden_layers_is_another_one():
    """Results of before there were such options are of networks without."""
    places = (
        RESULTS.parent / "width" / "alexnet_full_dense.json",
        RESULTS.parent / "alexnet" / "full_dense_hidden_4096.json",
    )
    with pytest.raises(ValueError, match=r"hidden_units is 0 in .* and 4096 in "):
        widths.comparable(*places)
    quarter = (
        RESULTS.parent / "width" / "alexnet_quarter_dense.json",
        RESULTS.parent / "alexnet" / "quarter_tucker.json",
    )
    assert len(widths.comparable(*quarter)) == 2


def test_networks_of_other_initial_kernels_and_statistics_are_others():
    dense = RESULTS.parent / "width" / "alexnet_quarter_dense.json"
    with pytest.raises(ValueError, match=r"gain is 1.0 in .* and 0.25 in |gain is 0.25 in .* and 1.0 in "):
        widths.comparable(dense, RESULTS.parent / "alexnet" / "quarter_dense_gain_0.25.json")
    with pytest.raises(ValueError, match=r"norm_momentum is 0.99? in .* and 0.99? in "):
        widths.comparable(
            RESULTS.parent / "patience" / "dense_10.json", RESULTS.parent / "schedule" / "dense_seed1.json"
        )
