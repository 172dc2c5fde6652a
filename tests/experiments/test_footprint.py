"""The footprint over compression: cells are kept, crossings are stated as what was measured, figure and table come from JSON."""

import json

import pytest

from benchmarks.cells import Cell, Results
from experiments import figure2_footprint as footprint
from experiments.figure2_footprint import Crossing, crossing

ENVIRONMENT = {"hardware": "abacus", "commit": None, "versions": {"jax": "1.2"}}
MIB = 2**20


def result(model, compression, dense, plain, *, peak=50, batch=100):
    def form(seconds, peak_bytes):
        return {"seconds": {"median": seconds}, "speedup": {"dense": dense / seconds}, "peak_bytes": peak_bytes}

    forms = {"dense": form(dense, 40 * MIB), "plain": form(plain, peak * MIB), "exported": form(plain, 20 * MIB)}
    return {
        "network": {"model": model, "width": 1.0, "batch": batch},
        "compression": compression,
        "rounds": 5,
        "forms": forms,
    }


def test_crossings():
    assert crossing([(80.0, 0.9), (30.0, 1.2), (60.0, 1.1)]) == Crossing(60.0, 80.0, 70.0)
    assert crossing([(30.0, 0.9), (60.0, 1.1), (80.0, 0.1)]) == Crossing(60.0, 80.0, 62.0)  # for good, not first
    assert crossing([(30.0, 0.9), (60.0, 0.8)]) == Crossing(None, 30.0, None)
    assert crossing([(30.0, 0.9), (60.0, 1.0)]) == Crossing(60.0, None, None)


def test_the_cells_are_those_configured():
    keys = [cell.key for cell in footprint.cells("cpu")]
    assert len(keys) == len(set(keys)) == 2 * 8
    assert {"vgg16-batch128-95%", "alexnet-batch128-30%"} <= set(keys)
    assert [cell.key for cell in footprint.cells("smoke")] == [
        "alexnet-width0.125-batch8-90%",
        "alexnet-width0.125-batch8-50%",
    ]
    assert footprint.batches_of(120_000, 128) == 938 and footprint.batches_of(120_000, 120) == 1000


def test_cells_are_measured_once_and_one_that_fails_takes_no_other_along(tmp_path, capsys):
    measured = []

    def cell(key, fails=False):
        def measure(say):
            measured.append(key)
            say("compiling")
            if fails:
                raise RuntimeError("out of beads")
            return {"key": key}

        return Cell(key, measure)

    results = Results(tmp_path / "figure2_footprint.json")
    cells = [cell("a"), cell("b", fails=True), cell("c")]
    assert footprint.measure(cells, results, lambda: ENVIRONMENT) == (["b"], 0, 0)
    output = capsys.readouterr().out
    assert "[2/3] b failed: RuntimeError: out of beads" in output and "[1/3] a: compiling" in output
    again = Results(tmp_path / "figure2_footprint.json")
    assert footprint.measure(cells, again, lambda: ENVIRONMENT) == (["b"], 0, 0)
    assert measured == ["a", "b", "c", "b"]
    assert again.cells["c"] == {"environment": ENVIRONMENT, "result": {"key": "c"}}
    assert footprint.measure([*cells, cell("d")], again, lambda: ENVIRONMENT, seconds=0.0) == ([], 2, 0)


def test_a_signal_ends_a_cell_between_its_parts(tmp_path):
    import signal

    def measure(say):
        say("one")
        signal.raise_signal(signal.SIGTERM)
        say("two")
        raise AssertionError("not to be reached")

    cells = [Cell("a", lambda say: {}), Cell("b", measure), Cell("c", measure)]
    results = Results(tmp_path / "x.json")
    assert footprint.measure(cells, results, lambda: ENVIRONMENT, say=lambda text: None) == ([], 2, 143)
    assert set(results.cells) == {"a"}


def test_figure_and_table_from_json(tmp_path, capsys):
    assert footprint.main(["--render", "--results", str(tmp_path)]) == 2
    assert "holds no results yet" in capsys.readouterr().err
    results = Results(tmp_path / "figure2_footprint.json")
    results.add("c", ENVIRONMENT, result("vgg16", 0.9, 1.0, 0.5, peak=30))
    results.add("a", ENVIRONMENT, result("vgg16", 0.3, 1.2, 1.5))
    results.add("b", ENVIRONMENT, result("vgg16", 0.5, 0.8, 1.0))
    results.add("d", ENVIRONMENT, result("alexnet", 0.5, 1.0, 2.0))
    assert footprint.main(["--render", "--results", str(tmp_path)]) == 0
    text = (tmp_path / "figure2_footprint.md").read_text()
    # Ratios to the dense network of the same cell: 1.25, 1.25 and 0.5 at 30, 50 and 90%.
    assert (
        "VGG16, plain: faster than dense from between 50.0% and 90.0% compression on (a line between: 63.3%)." in text
    )
    assert (
        "VGG16, plain: smaller than dense from between 50.0% and 90.0% compression on (a line between: 70.0%)." in text
    )
    assert "AlexNet, plain: not faster than dense at 50.0% compression, the most that was measured." in text
    assert "AlexNet, exported: smaller than dense at all measured compressions, from 50.0%." in text
    assert "| VGG16 | 30.0 | dense | 1440 | 1.00 | 40 | 1.00 |" in text  # 1.2 s a batch of 100
    assert "| VGG16 | 90.0 | plain | 600 | 2.00 | 30 | 0.75 |" in text
    assert "| VGG16 | 90.0 | exported | 600 | 2.00 | 20 | 0.50 |" in text
    assert "times the number of batches" in text and "- a: abacus; no commit, jax 1.2" in text
    for name in ("figure2_footprint.png", "figure2_footprint.svg"):
        assert (tmp_path / name).stat().st_size > 5000


def test_what_is_drawn(tmp_path):
    from experiments.grids.figures import plot_footprint

    points = {"plain": [(90.0, 600.0, 30.0), (30.0, 1500.0, 50.0)], "exported": [(90.0, 610.0, None)]}
    seconds, peak = plot_footprint({"VGG16": points}, {"VGG16": (1000.0, 40.0)}).axes
    assert seconds.lines[0].get_xydata().tolist() == [[30.0, 1500.0], [90.0, 600.0]]
    assert peak.lines[0].get_xydata().tolist() == [[30.0, 50.0], [90.0, 30.0]]
    assert len(seconds.lines) == 3 and len(peak.lines) == 2 and set(peak.lines[1].get_ydata()) == {40.0}


def test_listing_and_files_that_are_no_results(tmp_path, capsys):
    Results(tmp_path / "figure2_footprint.json").add("alexnet-width0.125-batch8-90%", ENVIRONMENT, {})
    assert footprint.main(["--scale", "smoke", "--list", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [
        "done",
        "alexnet-width0.125-batch8-90%",
        "open",
        "alexnet-width0.125-batch8-50%",
    ]
    (tmp_path / "figure2_footprint.json").write_text(json.dumps([]))
    assert footprint.main(["--render", "--results", str(tmp_path)]) == 2
    assert "is no results file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        footprint.main(["--scale", "huge"])


def test_a_network_is_measured_for_real(tmp_path):
    """The smallest one, through the benchmark's own measurement, into figure and table."""
    cell = next(cell for cell in footprint.cells("smoke") if "90%" in cell.key)
    results = Results(tmp_path / "figure2_footprint.json")
    assert footprint.measure([cell], results, lambda: ENVIRONMENT) == ([], 0, 0)
    forms = results.cells[cell.key]["result"]["forms"]
    assert set(forms) == {"dense", "tucker", "plain", "exported"}
    assert all(form["seconds"]["median"] > 0 for form in forms.values())
    footprint.render(tmp_path)
    lines = [
        line for line in (tmp_path / "figure2_footprint.md").read_text().splitlines() if line.startswith("| AlexNet")
    ]
    assert len(lines) == 4 and all(line.split("|")[2].strip().startswith("9") for line in lines)
