"""What cuts cost, measured on a small run: numbers that can be found another way, the files, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cut_costs
from experiments.grids.figures import plot_cut_costs
from tests.experiments.jobs import TINY, run
from tests.experiments.test_figures import is_drawn
from tests.helpers import dense64

TUCKER = [
    "--limit",
    "640",
    "--batch-size",
    "32",
    "--epochs",
    "3",
    "--rank",
    "6",
    "--tau",
    "0.1",
    "--learning-rate",
    "0.05",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cuts") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.run.plots.save_figure", lambda figure, directory, name: [])
        assert run(*TUCKER, "--run-dir", directory) == 0
    return directory


@pytest.fixture(scope="module")
def measured(trained):
    return cut_costs.measure(trained, batches=8)


def test_every_mode_is_cut_by_what_its_spectrum_says(trained, measured):
    """Ranks are those of the run, energies those of the smallest singular values of the whole kernels."""
    network = cut_costs._Network(trained, None)
    stored = json.loads((trained / "result.json").read_text())
    ranks = {layer["name"]: layer["rank"] for layer in stored["layers"] if layer["rank"] is not None}
    modes = ("out", "in", "height", "width")
    assert {cut["layer"] for cut in measured["cuts"]} == set(ranks)
    for cut in measured["cuts"]:
        mode = modes.index(cut["mode"])
        assert cut["rank"] == ranks[cut["layer"]][mode] and cut["cut"] == max(1, cut["rank"] // 4)
        (kernel,) = [k for name, k in network.kernels.items() if name.startswith(cut["layer"])]

        dense = dense64(kernel)
        axis = dense.ndim + {"out": -1, "in": -2, "height": -4, "width": -3}[cut["mode"]]
        values = np.linalg.svd(np.moveaxis(dense, axis, 0).reshape(dense.shape[axis], -1), compute_uv=False)
        energy = np.sum(values[cut["rank"] - cut["cut"] : cut["rank"]] ** 2) / np.sum(values**2)
        np.testing.assert_allclose(cut["energy"], energy, rtol=1e-3)


def test_losses_rise_where_much_is_expected(measured):
    """Not by hand, but on the whole: cuts cost something, in the order in which they were expected to."""
    rises = [cut["rise"] for cut in measured["cuts"]]
    assert np.mean(rises) > 0
    assert all(cut["expected"] > 0 and cut["expected_by_direction"] > 0 for cut in measured["cuts"])
    assert measured["rank_correlation"]["expected_by_direction"] > 0.5


def test_the_loss_is_that_of_the_network(trained, measured):
    network = cut_costs._Network(trained, None)
    losses = [network.loss(network.params, *network.batch(1, index)) for index in range(2)]
    np.testing.assert_allclose(measured["loss"], np.mean(losses), rtol=1e-5)
    name, kernel = next(iter(network.kernels.items()))
    without = network.replaced(name, kernel._replace(core=jnp.zeros_like(kernel.core)))
    assert float(network.loss(without, *network.batch(1, 0))) > float(losses[0])


def test_files_and_table(trained, tmp_path, capsys):
    output = tmp_path / "there" / "cuts.json"
    assert cut_costs.main([str(trained), "--batches", "4", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert "run_dir" not in result["run"] and result["batches"] == 4
    assert is_drawn(output.parent, "cuts")
    shown = capsys.readouterr().out
    assert cut_costs.markdown(result) in shown
    assert shown.count("| conv2 |") == len([cut for cut in result["cuts"] if cut["layer"] == "conv2"]) > 1


def test_the_figure_shows_every_cut(measured):
    figure = plot_cut_costs(measured["cuts"])
    for axes, part in zip(figure.axes, ("energy", "expected")):
        shown = np.concatenate([np.asarray(dots.get_offsets()) for dots in axes.collections])
        assert sorted(shown[:, 0]) == pytest.approx(sorted(cut[part] for cut in measured["cuts"]))


def test_what_is_refused(tmp_path, capsys):
    assert cut_costs.main([str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    for method in ("dense", "tucker"):
        directory = tmp_path / method
        assert run(*TINY, "--method", method, "--epochs", "1", "--run-dir", directory) == 0
        capsys.readouterr()
        assert cut_costs.main([str(directory)]) == 2
        message = "without Tucker kernels of orthonormal factors: expected one of --method tdlrt"
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="batches=3 must be 4 or more"):
        cut_costs.measure(directory, batches=3)
