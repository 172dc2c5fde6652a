"""What the grids plan: every run can be trained, rows are the paper's, and scales change what they say and nothing else."""

import json
from pathlib import Path

import pytest

from experiments import figure1, figure2_robustness, table1
from experiments.config import TrainConfig
from experiments.grids.grid import GridError
from experiments.grids.protocol import CONFIGS, NETWORKS, read_protocol, read_rows

GRIDS = (table1.GRID, figure1.GRID, figure2_robustness.GRID)


@pytest.mark.parametrize("scale", ["smoke", "cpu", "full"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_every_planned_run_can_be_trained(grid, scale):
    """All options are known and go together, names are distinct, and the same options are not trained twice."""
    runs = grid.plan(scale, None, None)
    assert len({run.name for run in runs}) == len(runs)
    configurations = [json.dumps(run.config(), sort_keys=True) for run in runs]
    assert len(set(configurations)) == len(runs)
    assert all(run.config()["seed"] == int(run.name.rpartition("seed")[2]) for run in runs)


def test_flags_say_what_the_options_say():
    """Through the parser of experiments.train, of one run of every method."""
    import tyro

    runs = {run.options["method"]: run for grid in GRIDS for run in grid.plan("cpu", 1, None)}
    assert len(runs) == 9
    for run in runs.values():
        config = tyro.cli(TrainConfig, args=run.flags(), config=(tyro.conf.OmitArgPrefixes,))
        assert run.config().items() <= config.to_json().items()


def test_table1_has_all_rows_and_its_protocol():
    rows = read_rows(CONFIGS / "table1")
    assert len({row.name for row in rows}) == len(rows) == 3 * 9
    assert {row.network for row in rows} == {"vgg16", "alexnet", "resnet18"} == NETWORKS.keys() - {"lenet5"}
    assert {row.name for row in rows if row.accuracy is None} == {
        f"alexnet/{method}" for method in ("snip", "imp", "grasp")
    }
    paper = {row.name: (row.accuracy, row.compression) for row in rows}
    assert paper["vgg16/tdlrt"] == (89.59, 95.34) and paper["resnet18/imp"] == (90.5, 82.5)
    assert paper["alexnet/dense"] == (85.46, 0.0)
    for row in rows:
        asked = row.options.get("budget", row.options.get("compression", 0.0))
        top = next(other for other in rows if other.network == row.network and other.method == "tdlrt").options[
            "budget"
        ]
        assert 100 * asked == pytest.approx(top * 100 if row.compression is None else row.compression, abs=1e-6)
        if row.same is not None:
            assert row.same.get("budget", row.same.get("compression")) == top
        assert f"'{row.network}/{row.method}[/-]*'" in row.command
    cpu = {run.name: run.config() for run in table1.plan("cpu", None, None)}
    normalized = [name for name in cpu if "-normalized/" in name]
    assert len(normalized) == 3 * 4
    for name in normalized:  # another norm, and for one row the rank
        same = cpu.get(name.replace("-normalized", "-same"), cpu.get(name.replace("-normalized", "")))
        differing = {option for option in same if same[option] != cpu[name][option]}
        assert differing == {"initialization"} | ({"rank"} if name.startswith("vgg16/tdlrt") else set())
    full = {run.name: run.config() for run in table1.plan("full", None, None)}
    assert not any("-normalized" in name for name in full)
    assert {name.rsplit("/")[-1] for name in full} == {"seed0", "seed1", "seed2"}
    for config in full.values():
        stated = {
            name: config[name] for name in ("dataset", "batch_size", "epochs", "learning_rate", "momentum", "schedule")
        }
        assert stated == {
            "dataset": "cifar10",
            "batch_size": 128,
            "epochs": 70,
            "learning_rate": 0.05,
            "momentum": 0.1,
            "schedule": "plateau",
        }
        assert config["validation"] == 0.1 and config["plateau_of"] == "validation" and config["limit"] is None
        assert config["norm_momentum"] == 0.9 and config["patience"] == 10 and config["gain"] == 0.25


def test_scales_and_sets_change_options_and_nothing_else(capsys):
    full, small = (table1.plan(scale, 2, None) for scale in ("full", "cpu"))
    small = [run for run in small if "-normalized/" not in run.name]
    assert [run.name for run in full] == [run.name for run in small]
    for one, other in zip(full, small):
        before, after = one.config(), other.config()
        changed = {name for name, value in after.items() if value != before[name]}
        expected = {"width", "limit", "epochs", "plateau_of", "norm_momentum", "patience", "gain"}
        adaptive = {"adapt_every", "bases_between", "initialization", "budget_importance", "budget_epochs", "rank"}
        expected |= {
            "imp": {"rounds"},
            "tdlrt": adaptive | {"least_rank"},
            "matrix_dlrt": adaptive,
            "tucker": {"initialization", "least_rank"},
            "matrix": {"least_rank"},
            "cp": {"least_rank"},
        }.get(one.options["method"], set())
        assert changed == expected
        assert after["width"] == (0.125 if one.options["model"] == "resnet18" else 0.25)
    digits = figure1.plan("smoke", 1, "digits")
    assert {run.options["model"] for run in digits} == {"alexnet", "resnet18"}
    assert "vgg16 is left out" in capsys.readouterr().err
    assert all(run.options["dataset"] == "digits" for run in digits)


def test_rounds_of_iterative_pruning_count_as_epochs():
    runs = {run.name: run for run in table1.plan("cpu", 1, None)}
    assert runs["vgg16/imp/seed0"].epochs == 3 * runs["vgg16/snip/seed0"].epochs == 30


def test_configurations_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "protocol.toml"
    with pytest.raises(GridError, match=r"protocol\.toml cannot be read"):
        read_protocol(path)
    path.write_text("[options]\n[scales.cpu]\nseeds = 1\n")
    with pytest.raises(GridError, match=r"expected \[options\] and \[scales.NAME\] for smoke, cpu, full"):
        read_protocol(path)
    text = 'networks = ["vgg16"]\nmethods = ["tdlrt"]\n'
    path.write_text(text)
    (tmp_path / "vgg16_tdlrt.toml").write_text('[options]\nmodel = "vgg16"\nmethod = "tdlrt"\n[paper]\n')
    with pytest.raises(GridError, match=r"vgg16_tdlrt\.toml lacks 'title'"):
        read_rows(Path(tmp_path))


@pytest.mark.parametrize("scale", ["full", "cpu"])
def test_figure_1_is_trained_as_table_1_is(scale):
    """At every scale a point of a sweep has the options of its method's row, but for what governs its compression."""
    rows = {run.name: run.config() for run in table1.plan(scale, 1, None)}
    compared = 0
    for run in figure1.plan(scale, 1, None):
        network, point, seed = run.name.split("/")
        for method in ("tdlrt", "matrix_dlrt"):
            if point.startswith((f"{method}-budget-", f"{method}-0")):
                ours, theirs = run.config(), rows[f"{network}/{method}/{seed}"]
                free = {"budget"} | ({"rank"} if scale == "cpu" else set())
                assert {name for name in ours if ours[name] != theirs[name]} <= free, run.name
                compared += 1
    assert compared == 3 * 10
