"""Every method of the comparison trains through the main job; what it compresses, it compresses exactly, and to the end."""

import dataclasses
import json
import typing

import numpy as np
import pytest
from flax import nnx

from experiments import train
from experiments.config import TrainConfig, from_json
from experiments.methods import METHODS
from experiments.options import ModelConfig, PruningConfig
from experiments.run import data, plots
from experiments.run.build import build_model, is_pruned, kinds_of
from experiments.run.display import Display
from experiments.run.metrics import layers, totals
from tdlrt_jax.baselines import CPTensor, cp_to_dense, is_cp
from tdlrt_jax.tucker import is_tucker, to_dense
from tests.experiments.jobs import interrupt_after, lines, numbers, saved_arrays

TINY = ["--limit", "96", "--batch-size", "32", "--epochs", "2", "--no-linear", "--learning-rate", "0.05"]
OPTIONS = {
    "dense": [],
    "tdlrt": ["--rank", "6", "--tau", "0.3"],
    "matrix_dlrt": ["--rank", "6", "--tau", "0.3"],
    "tucker": ["--compression", "0.8"],
    "matrix": ["--compression", "0.8"],
    "cp": ["--compression", "0.8"],
    "snip": ["--compression", "0.8"],
    "grasp": ["--compression", "0.8", "--score-images", "32"],
    "imp": ["--compression", "0.8", "--rounds", "2", "--rewind-epochs", "1"],
}


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(plots, "save_figure", lambda figure, directory, name: [])


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", limit=96)


def run(method, directory, *more):
    return train.main([*TINY, "--method", method, *OPTIONS[method], "--run-dir", str(directory), *more])


def result_of(directory):
    return json.loads((directory / "result.json").read_text())


def test_the_methods_are_those_that_the_options_know():
    assert set(METHODS) == set(typing.get_args(typing.get_type_hints(ModelConfig)["method"])) == set(OPTIONS)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_from_the_start_to_a_result(method, tmp_path):
    assert run(method, tmp_path / "run") == 0
    result = result_of(tmp_path / "run")
    epochs = 6 if method == "imp" else 2
    assert [record["epoch"] for record in result["epochs"]] == list(range(1, epochs + 1))
    losses = [record["train_loss"] for record in result["epochs"]]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    final, kinds = result["final"], {layer["name"]: layer["kind"] for layer in result["layers"]}
    assert kinds == {"conv1": "convolution", "conv2": "convolution", "hidden": "linear", "classifier": "linear"}
    stored = {layer["name"]: layer["parameters"] for layer in result["layers"]}
    dense = {layer["name"]: layer["full"] for layer in result["layers"]}
    assert all(stored[name] == dense[name] for name in ("hidden", "classifier"))  # --no-linear
    assert dense["conv1"] == 500 and dense["conv2"] == 25_000
    assert final["compression_conv"] == pytest.approx(1 - (stored["conv1"] + stored["conv2"]) / 25_500)
    if "--compression" in OPTIONS[method]:
        assert final["compression_conv"] >= 0.8 - 1e-4
        assert final["compression_conv"] < 0.86  # not much more than was asked for
    assert ("tolerance" in final) == METHODS[method].adaptive
    assert {path.suffix for path in (tmp_path / "run" / "plots").iterdir()} == {".png", ".svg"}


@pytest.mark.parametrize("method", ["snip", "grasp", "imp"])
def test_pruned_weights_are_exactly_zero_at_the_end(method, tmp_path, no_plots):
    assert run(method, tmp_path / "run") == 0
    last = lines(tmp_path / "run")[-1]["step"]
    arrays = saved_arrays(tmp_path / "run", last)
    kernels = [arrays[f"params/{name}/kernel/value"] for name in ("conv1", "conv2")]
    assert sum(kernel.size for kernel in kernels) == 25_500
    assert sum(int(np.sum(kernel == 0)) for kernel in kernels) == round(0.8 * 25_500)


# Twelve steps an epoch; the signal comes in the midst of one, of the second round of imp.
@pytest.mark.parametrize(("method", "steps"), [("snip", 3), ("imp", 27), ("cp", 3), ("matrix_dlrt", 15)])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(method, steps, tmp_path, monkeypatch, no_plots):
    small = ("--batch-size", "8")
    assert run(method, tmp_path / "whole", *small) == 0
    interrupt_after(monkeypatch, steps, 15)
    assert run(method, tmp_path / "cut", *small) == 143
    monkeypatch.undo()
    monkeypatch.setattr(plots, "save_figure", lambda figure, directory, name: [])
    assert run(method, tmp_path / "cut", *small, "--resume") == 0
    whole, cut = lines(tmp_path / "whole"), lines(tmp_path / "cut")
    assert [numbers(record) for record in cut] == [numbers(record) for record in whole]


def test_a_curve_over_steps_is_kept_through_an_interruption(tmp_path, monkeypatch, no_plots):
    every = ("--batch-size", "8", "--evaluate-every", "5")
    assert run("tucker", tmp_path / "whole", *every) == 0
    curves = [record["curve"] for record in lines(tmp_path / "whole")]
    assert [[point["step"] for point in curve] for curve in curves] == [[5, 10], [15, 20]]
    every_step = ("--batch-size", "8", "--evaluate-every", "1")
    assert run("tucker", tmp_path / "steps", *every_step) == 0
    steps = [point for record in lines(tmp_path / "steps") for point in record["curve"]]
    assert [point["step"] for point in steps] == list(range(1, 25))
    # Points are of the training images since the last one of their epoch, and of the test images at their step.
    for curve, start in zip(curves, (0, 12)):
        for point, first in zip(curve, (start, curve[0]["step"])):
            seen = [step["train_loss"] for step in steps[first : point["step"]]]
            assert point["train_loss"] == pytest.approx(np.mean(seen), rel=1e-6)
            assert point["test_accuracy"] == steps[point["step"] - 1]["test_accuracy"]
    interrupt_after(monkeypatch, 7, 15)
    assert run("tucker", tmp_path / "cut", *every) == 143
    monkeypatch.setattr(Display, "step", lambda *_: None)
    assert run("tucker", tmp_path / "cut", *every, "--resume") == 0
    assert [record["curve"] for record in lines(tmp_path / "cut")] == curves


def test_rounds_start_from_the_rewound_weights(tmp_path, no_plots):
    assert run("imp", tmp_path / "run") == 0
    records = lines(tmp_path / "run")
    assert [record["round"] for record in records] == [1, 1, 2, 2, 3, 3]
    assert [round(record["compression_conv"], 3) for record in records] == [0, 0, 0.553, 0.553, 0.8, 0.8]
    assert (
        records[2]["learning_rate"] == records[0]["learning_rate"] > records[1]["learning_rate"]
    )  # a schedule a round


@pytest.mark.parametrize("method", ["tucker", "matrix", "cp"])
@pytest.mark.parametrize("compression", [0.5, 0.9])
def test_fixed_ranks_have_the_compression_asked_for_and_hardly_more(digits, method, compression):
    config = ModelConfig(method=method, compression=compression, linear=False)
    model = build_model(config, digits, 0)
    found = totals(layers(nnx.as_pure(nnx.state(model, nnx.Param)), kinds_of(model))).conv_compression
    assert compression <= found < compression + 0.03


@pytest.mark.parametrize("spatial", ["tucker", "whole"])
def test_no_mode_starts_below_the_least_rank(digits, spatial):
    usual, bounded = (
        build_model(ModelConfig(method="tucker", rank=0.1, least_rank=least, spatial=spatial), digits, 0)
        for least in (1, 4)
    )
    ranks = [
        [layer.kernel.get_value().core.shape[2:] for layer in (model.conv1, model.conv2)] for model in (usual, bounded)
    ]
    assert ranks == [[(1, 2), (2, 5)], [(1, 4), (4, 5)]]
    sized = ModelConfig(method="tucker", compression=0.9, least_rank=4, spatial=spatial)
    model = build_model(sized, digits, 0)
    found = totals(layers(nnx.as_pure(nnx.state(model, nnx.Param)), kinds_of(model))).conv_compression
    assert 0.9 <= found < 0.93 and min(model.conv2.kernel.get_value().core.shape[2:]) >= 4


def test_matrices_have_two_factors_and_no_rank_below_the_least(digits):
    model = build_model(ModelConfig(method="matrix", rank=0.1, least_rank=4), digits, 0)
    kernels = [layer.kernel.get_value() for layer in (model.conv1, model.conv2)]
    assert all(map(is_cp, kernels))
    assert [[factor.shape for factor in kernel.factors] for kernel in kernels] == [
        [(25, 4), (20, 4)],
        [(500, 5), (50, 5)],
    ]


def test_cp_has_no_fewer_terms_than_the_least(digits):
    terms = [
        [layer.kernel.get_value().factors[0].shape[1] for layer in (model.conv1, model.conv2)]
        for model in (build_model(ModelConfig(method="cp", rank=0.01, least_rank=n), digits, 0) for n in (1, 3))
    ]
    assert terms[0][0] == 1 < terms[0][1] and terms[1] == [3, max(3, terms[0][1])]


def test_a_compression_out_of_reach_is_told(digits):
    with pytest.raises(ValueError, match=r"--compression 0\.9999: lenet5 as tucker has at most 0\.9"):
        build_model(ModelConfig(method="tucker", compression=0.9999), digits, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "snip"}, "--method snip: say how much to prune with --compression"),
        ({"method": "tdlrt", "compression": 0.9}, "no effect on --method tdlrt: reach it with --budget"),
        ({"method": "dense", "compression": 0.9}, "no effect on --method dense$"),
        ({"method": "cp", "compression": 1.0}, "expected a number between 0 and 1"),
        ({"method": "cp", "balanced": True}, "--balanced is for --method tucker, not cp"),
        ({"method": "cp", "initialization": "normalized"}, "--initialization normalized is not for --method cp"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**options)


def test_balanced_kernels_are_the_same_network_whose_factors_are_not_orthonormal(digits):
    plain, balanced = (
        build_model(ModelConfig(method="tucker", rank=1.0, initialization="spectral", balanced=on), digits, 0)
        for on in (False, True)
    )
    images = digits.train.images[:8].astype(np.float32) / 255
    np.testing.assert_allclose(balanced(images), plain(images), rtol=1e-3, atol=1e-4)
    sizes = [np.linalg.norm(model.conv2.kernel.get_value().factors[3], axis=0) for model in (plain, balanced)]
    np.testing.assert_allclose(sizes[0], 1, rtol=1e-5)
    np.testing.assert_allclose(sizes[1][1:9] / sizes[1][:8], 10**-0.2, rtol=1e-3)  # a fifth of every decade


@pytest.mark.parametrize(
    ("method", "initialization"),
    [("dense", "dense"), ("tdlrt", "dense"), ("tdlrt", "hosvd"), ("matrix", "dense"), ("cp", "dense"), ("cp", "hosvd")],
)
def test_a_gain_scales_the_initial_convolutions_alone(digits, method, initialization):
    usual, small = (
        build_model(ModelConfig(method=method, rank=0.5, initialization=initialization, gain=gain), digits, 0)
        for gain in (1.0, 0.25)
    )
    for one, other in ((usual.conv1, small.conv1), (usual.conv2, small.conv2)):
        kernels = [whole(layer.kernel.get_value()) for layer in (one, other)]
        np.testing.assert_allclose(0.25 * kernels[0], kernels[1], rtol=2e-3, atol=1e-6)
    np.testing.assert_array_equal(usual.classifier.kernel.get_value(), small.classifier.kernel.get_value())


@pytest.mark.parametrize("method", ["dense", "tdlrt"])
def test_normalizations_keep_the_share_of_their_averages_that_was_asked_for(digits, method):
    config = ModelConfig(model="resnet18", width=0.0625, method=method, rank=0.5, norm_momentum=0.75)
    model = build_model(config, digits, 0)
    images = digits.train.images[:16].astype(np.float32) / 255
    model.train()
    seen = model.stem_norm.mean.get_value()  # zeros: a step puts in a quarter of the batch's
    model(images)
    once = np.asarray(model.stem_norm.mean.get_value() - seen)
    model(images)
    np.testing.assert_allclose(model.stem_norm.mean.get_value() - seen, 1.75 * once, rtol=1e-4, atol=1e-6)
    assert np.abs(once).max() > 0


def whole(kernel):
    """A kernel of any format as one array."""
    if isinstance(kernel, CPTensor):
        return cp_to_dense(kernel)
    return to_dense(kernel) if is_tucker(kernel) else kernel


def test_rewinding_is_to_an_epoch_of_the_first_round():
    config = TrainConfig(model=ModelConfig(method="imp", compression=0.5))
    assert config.epochs == 4 * config.optimizer.epochs
    with pytest.raises(ValueError, match="--rewind-epochs 20: expected fewer than the 20 of --epochs"):
        dataclasses.replace(config, pruning=PruningConfig(rewind_epochs=20))
    assert from_json(config.to_json()) == config


def test_hidden_layers_are_pruned_where_others_compress_them_and_the_classifier_never():
    kinds = {"conv1": "convolution", "hidden": "linear", "classifier": "linear"}
    for linear, expected in ((True, ["conv1", "hidden"]), (False, ["conv1"])):
        config = ModelConfig(method="snip", compression=0.5, linear=linear)
        assert [name for name in kinds if is_pruned(config, kinds, name)] == expected


@pytest.mark.parametrize("model", ["alexnet", "vgg16"])
def test_hidden_layers_are_built_as_the_method_says(model):
    """Their units and dropout as asked for, in Tucker format unless --no-linear."""
    images = data.Images(np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int32))
    dataset = data.Dataset("none", images, None, images, 10, np.zeros(3), np.ones(3), "none")
    for method, linear, low_rank in (("tdlrt", True, True), ("tdlrt", False, False), ("dense", True, False)):
        config = ModelConfig(
            model=model, width=1 / 32, method=method, linear=linear, rank=2, hidden_units=12, dropout=0.25
        )
        network = build_model(config, dataset, 0)
        kernels = [layer.kernel.get_value() for layer in network.hidden]
        assert [(to_dense(kernel) if low_rank else kernel).shape[-1] for kernel in kernels] == [12, 12]
        assert [is_tucker(kernel) for kernel in kernels] == [low_rank] * 2
        assert network.dropout.rate == 0.25 and network.classifier.in_features == 12


def test_alexnets_windows_are_built_as_asked_for():
    images = data.Images(np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int32))
    dataset = data.Dataset("none", images, None, images, 10, np.zeros(3), np.ones(3), "none")
    for options, expected in (({}, (11, 5)), ({"windows": "small"}, (3, 3))):
        network = build_model(ModelConfig(model="alexnet", width=1 / 32, method="dense", **options), dataset, 0)
        assert tuple(conv.kernel_size[0] for conv in network.convs) == (*expected, 3, 3, 3)


@pytest.mark.parametrize(("method", "between"), [("dense", "cores"), ("tucker", "bases"), ("snip", "cores")])
def test_steps_between_whole_ones_are_nothing_to_methods_without_them(method, between, tmp_path, no_plots):
    """So a run's dense twin has the same options but the method."""
    assert run(method, tmp_path / "with", "--adapt-every", "2", f"--{between}-between") == 0
    assert run(method, tmp_path / "without") == 0
    found, expected = (lines(tmp_path / name) for name in ("with", "without"))
    assert [numbers(record) for record in found] == [numbers(record) for record in expected]
