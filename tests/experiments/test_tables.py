"""Tables of grids from JSON alone: hand-made results whose numbers can be checked by hand."""

import json
import statistics

import pytest

from experiments import table1
from experiments.config import TrainConfig
from experiments.grids.grid import main
from experiments.grids.protocol import CONFIGS, read_protocol, read_rows
from experiments.grids.tables import Sources, Statistic, costs, final, latex_table, options_of, read_results, shrunk
from experiments.methods import METHODS

PROTOCOL = read_protocol(CONFIGS / "table1" / "protocol.toml").options
ROWS = {row.name: row for row in read_rows(CONFIGS / "table1")}
MIB = 2**20


def record(epoch, seconds, *, compiling=0.0, accuracy=0.5, peak=30 * MIB, state=2 * MIB, validation=None):
    numbers = {"test_accuracy": accuracy, "compression_conv": 0.9534, "compression_all": 0.94, "weights": 1000}
    if validation is not None:
        numbers["validation_accuracy"] = validation
    memory = {"peak": peak, "arguments": 20 * MIB}
    costs = {"seconds": seconds, "compile_seconds": compiling, "step_memory": memory, "state_bytes": state}
    return {"epoch": epoch, **numbers, **costs}


TFDS = "tfds cifar10 3.0.2"


def put(directory, name, accuracy, *, seed=0, hardware="abacus", records=None, same=False, data=TFDS, **options):
    """A result file of a row of Table 1, at the scale that ``options`` say."""
    row = ROWS[name.removesuffix("-same").removesuffix("-normalized")]
    stored = {**TrainConfig().to_json(), **PROTOCOL, **row.options, **(row.same or {} if same else {}), **options}
    records = records or [record(1, 40.0, compiling=30.0, accuracy=0.99), record(2, 10.0, accuracy=accuracy)]
    result = {
        "options": {**stored, "seed": seed},
        "commit": "0123456789abcdef with changes",
        "versions": {"jax": "1.2"},
        "hardware": hardware,
        "data": data,
        "images": {"train": 1280, "test": 100},
        "epochs": records,
        "final": records[-1],
    }
    path = directory / name / f"seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return path


def line_of(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table1_shows_the_last_epoch_beside_the_paper(tmp_path):
    """Not the best one: every first epoch here has 99% test accuracy."""
    for seed, accuracy in enumerate((0.88, 0.90, 0.92)):
        put(tmp_path, "vgg16/tdlrt", accuracy, seed=seed)
    put(tmp_path, "alexnet/cp", 0.7)
    paths = table1.render(tmp_path)
    assert [path.name for path in paths] == ["table1.md", "table1.tex"]
    text = paths[0].read_text()
    cells = line_of(text, "| TDLRT |")
    assert cells[:5] == ["TDLRT", "90.00 ± 2.00", "95.34 ± 0.00", "89.59", "95.34"]
    assert cells[5:] == ["—", "—", "82.39", "83.12", "—", "—", "92.72", "78.73"]
    cells = line_of(text, "| CP-factorized |")
    assert cells[5:9] == ["70.00 (n=1)", "95.34", "76.14", "71.46"] and cells[1] == "—"
    assert line_of(text, "| SNIP |")[7:9] == ["—", "—"]  # the paper has none
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 1 + 9 + 1 + 2
    assert "99" not in "".join(line for line in text.splitlines() if line.startswith("|"))
    assert "All as the protocol says." in text and "seeds 0, 1, 2" in text
    latex = paths[1].read_text()
    row = next(line for line in latex.splitlines() if line.startswith("TDLRT"))
    assert row.startswith("TDLRT & 90.00 $\\pm$ 2.00 & 95.34 $\\pm$ 0.00 & 89.59 & 95.34 & -- & --") and row.endswith(
        "\\\\"
    )
    body = [line for line in latex.splitlines() if line.endswith("\\\\")][1:]
    assert {line.count("&") for line in body} == {12} and "[%]" not in latex and "±" not in latex


def test_what_was_shrunk_is_said_from_the_options(tmp_path):
    small = {"width": 0.25, "limit": 10000, "epochs": 10}
    put(tmp_path, "vgg16/dense", 0.8, **small)
    put(tmp_path, "vgg16/imp", 0.8, **small, rounds=2)
    text = table1.render(tmp_path)[0].read_text()
    assert (
        "Other than the protocol: limit 10000 instead of none, epochs 10 instead of 70, width 0.25 instead of 1.0; "
        "rounds 2 instead of 4 (IMP)." in text
    )
    assert "1,280 training and 100 test images; seed 0." in text


def test_a_data_set_of_which_newer_results_say_more_is_named_once(tmp_path):
    put(tmp_path, "vgg16/dense", 0.8)
    assert "\ntfds cifar10 3.0.2: 1,280" in table1.render(tmp_path)[0].read_text()
    put(tmp_path, "vgg16/imp", 0.8, data="tfds cifar10 3.0.2, images compressed as JPEG")
    text = table1.render(tmp_path)[0].read_text()
    assert "\ntfds cifar10 3.0.2, images compressed as JPEG (as newer results say): 1,280" in text
    put(tmp_path, "vgg16/cp", 0.8, data="digits")
    text = table1.render(tmp_path)[0].read_text()
    assert "\ndigits; tfds cifar10 3.0.2, images compressed as JPEG (as newer results say): 1,280" in text


def test_the_table_at_one_compression(tmp_path):
    put(tmp_path, "vgg16/tdlrt", 0.9)
    put(tmp_path, "vgg16/cp", 0.8)
    assert "All methods at" not in table1.render(tmp_path)[0].read_text()
    put(tmp_path, "vgg16/cp-same", 0.6, same=True)
    text = table1.render(tmp_path)[0].read_text()
    second = text[text.index("## All methods at") : text.index("## What it took")]
    assert line_of(second, "| TDLRT |")[1] == "90.00"  # one run for both tables
    assert line_of(second, "| CP-factorized |")[1] == "60.00"
    assert "| VGG16 | CP-factorized (same c.r.) |" in text and "All as the protocol says." in text


def test_normalized_kernels_have_a_table_of_their_own(tmp_path):
    put(tmp_path, "vgg16/tucker-same", 0.5, same=True)
    assert "normalized" not in table1.render(tmp_path)[0].read_text()
    put(tmp_path, "vgg16/tucker-normalized", 0.6, same=True, initialization="normalized")
    put(tmp_path, "vgg16/tdlrt-normalized", 0.7, initialization="normalized", rank=16)
    text = table1.render(tmp_path)[0].read_text()
    third = text[text.index("## The same from normalized kernels") : text.index("## What it took")]
    assert line_of(third, "| TDLRT |")[1] == "70.00" and line_of(third, "| Tucker-factorized |")[1] == "60.00"
    assert "CP-factorized" not in third
    assert "| VGG16 | Tucker-factorized (normalized) |" in text
    assert "Other than the protocol: rank 16 instead of 0.5 (TDLRT normalized)." in text


def test_costs(tmp_path):
    epochs = [
        record(1, 40.0, compiling=30.0, peak=50 * MIB, state=4 * MIB, validation=0.6),
        record(2, 20.0, validation=0.7),
        record(3, 30.0, compiling=10.0, validation=0.8),
    ]
    put(tmp_path, "vgg16/tdlrt", 0.9, records=epochs)
    results = read_results(tmp_path)
    found = costs(results["vgg16/tdlrt"])
    # 10 steps an epoch: 10, 20 and 20 seconds without compiling; 30 MiB beside the data set's arguments, and 4 of state.
    assert found == (2.0, 50.0, 40.0, 34.0, 12.0, 2.0)
    put(tmp_path, "vgg16/dense", 0.9, hardware="slide rule", records=[{**record(1, 5.0), "step_memory": {}}])
    text = table1.render(tmp_path)[0].read_text()
    cells = line_of(text, "| VGG16 | TDLRT |")
    assert cells == ["VGG16", "TDLRT", "94.00", "80.00", "1", "2", "50", "40", "34 / 12", "2.00", "b"]
    assert line_of(text, "| VGG16 | Baseline |")[8:] == ["—", "2.00", "a"]
    assert "- a: slide rule; commit 0123456789ab with changes, jax 1.2" in text and "- b: abacus;" in text
    assert "set apart for whatever is to be chosen" in text


def test_results_that_do_not_belong_together_are_told(tmp_path):
    with pytest.raises(ValueError, match="holds no results yet"):
        read_results(tmp_path)
    put(tmp_path, "vgg16/cp", 0.5, seed=1)
    put(tmp_path, "vgg16/cp", 0.5, seed=0)
    assert [result["options"]["seed"] for result in read_results(tmp_path)["vgg16/cp"]] == [0, 1]
    old = put(tmp_path, "vgg16/cp", 0.5, seed=2, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"seed2\.json has other options than the results beside it"):
        read_results(tmp_path)
    old.write_text('{"options": {}}')
    with pytest.raises(ValueError, match=r"seed2\.json is no result of experiments.train .*: move it away"):
        read_results(tmp_path)


def test_rendering_needs_results(tmp_path, capsys):
    from experiments.grids.grid import main

    assert main(table1.GRID, ["--render", "--results", str(tmp_path)]) == 2
    assert "holds no results yet" in capsys.readouterr().err
    put(tmp_path, "vgg16/cp", 0.5)
    assert main(table1.GRID, ["--render", "--results", str(tmp_path)]) == 0
    assert "table1.tex" in capsys.readouterr().out
    assert main(table1.GRID, ["--render", "--results", str(tmp_path), "--dataset", "digits"]) == 2
    assert "--dataset digits with --render, which shows all results that there are" in capsys.readouterr().err


def test_statistics():
    assert Statistic.of([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)
    assert Statistic.of([1.0]).text() == "1.00" and Statistic.of([1.0, 3.0]).text(0, of=3) == "2 ± 1 (n=2)"
    results = [{"final": {"test_accuracy": 0.5, "other": 1.0}}, {"final": {"test_accuracy": 0.7}}]
    assert final(results, "test_accuracy").text() == "60.00 ± 14.14"
    assert final(results, "other") is None and final([], "test_accuracy") is None


def test_small_parts():
    places = (
        "data_dir",
        "cache_dir",
        "run_dir",
        "resume",
        "save_every",
        "devices",
        "coordinator",
        "processes",
        "process",
        "steps_at_once",
    )
    assert options_of({"options": {"epochs": 3, "run_dir": "/a"}}) == {
        name: 3 if name == "epochs" else value for name, value in TrainConfig().to_json().items() if name not in places
    }
    assert shrunk({("a", "net"): ({"x": 1}, {"x": 1})}) == "All as the protocol says."
    assert shrunk({("a", "net"): ({"x": 1}, {"x": 2}), ("b", "net"): ({"x": 2}, {"x": 2})}).endswith(
        "x 1 instead of 2 (a)."
    )
    sources = Sources()
    assert sources.of([{}, {}]) == "a" and sources.of([{"commit": "c"}, {}]) == "b, a"
    assert sources.text() == "- a: unknown hardware; no commit, jax ?\n- b: unknown hardware; commit c, jax ?"
    elsewhere = {"hardware": "abacus", "continued": [{"hardware": "slide rule"}, {"hardware": "abacus"}]}
    assert Sources().of([elsewhere]) == "a, b"
    many = Sources()
    assert [many.of([{"hardware": str(number)}]) for number in range(54)][24:54:14] == ["y", "am", "ba"]
    latex = latex_table([("A & B", ["x", "y"])], [["m_1", "1%", "τ"]])
    assert "\\multicolumn{2}{c}{A \\& B}" in latex and "m\\_1 & 1\\% & $\\tau$ \\\\" in latex and "{lrr}" in latex


def test_every_row_trains_at_the_smallest_scale(tmp_path, capsys):
    """Table 1 through its own command: all methods on AlexNet, of few digits (runs ending in -same left out)."""
    arguments = ["--scale", "smoke", "--dataset", "digits", "--jobs", "2", "--runs", str(tmp_path / "runs")]
    arguments += ["--results", str(tmp_path / "results")]
    for only in ("alexnet/dense/*", "alexnet/*[!e]/*"):
        assert main(table1.GRID, [*arguments, "--only", only]) == 0, capsys.readouterr().out
    methods = [row.method for row in read_rows(CONFIGS / "table1") if row.network == "alexnet"]
    assert {path.parent.name for path in (tmp_path / "results").rglob("seed0.json")} == set(methods) == set(METHODS)
    text = (tmp_path / "results" / "table1.md").read_text()
    for method in METHODS.values():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {method.title} |")]
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert cells[:2] == cells[8:10] == ["—", "—"]  # VGG16 and ResNet18 were not run
        assert all(float(cell) >= 0 for cell in cells[4:6]), line
    assert "dataset digits instead of cifar10" in text and "width 0.125 instead of 1.0" in text


def minutes(result):
    """What a run takes by its median epoch, so without pauses of the machine."""
    median = {
        part: statistics.median(
            epoch[part] - (epoch["compile_seconds"] if part == "seconds" else 0) for epoch in result["epochs"]
        )
        for part in ("seconds", "evaluation_seconds")
    }
    compiling = sum(epoch["compile_seconds"] for epoch in result["epochs"])
    return (sum(median.values()) * len(result["epochs"]) + compiling) / 60


def hardware_of(result):
    """The machines that a run was on, one after the other."""
    return dict.fromkeys(place["hardware"] for place in (result, *result.get("continued", [])))


def test_what_a_row_is_expected_to_take_is_what_its_runs_took():
    told = 0
    for row in read_rows(CONFIGS / "table1"):
        for scale, text in row.expected.items():
            files = sorted((CONFIGS.parent / "results" / "table1" / scale / row.name).glob("*.json"))
            runs = [json.loads(path.read_text()) for path in files]
            took = statistics.fmean(map(minutes, runs))
            places = dict.fromkeys(", then ".join(hardware_of(result)) for result in runs)
            assert text == f"{took:.1f} minutes a run on {' or '.join(places)}"
            told += 1
    assert told >= 27
