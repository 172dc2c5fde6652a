"""Weights and compression rates against numbers worked out by hand; singular values against NumPy's."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

import tdlrt_jax
from experiments.run import display, metrics, plots


@pytest.fixture
def params():
    """A Tucker convolution of ranks (3, 3, 2, 5), a Tucker matrix with padding, a dense matrix, and biases."""
    keys = jax.random.split(jax.random.key(0), 3)
    linear = tdlrt_jax.hosvd(jax.random.normal(keys[1], (20, 10)), rank=4)
    return {
        "conv": {
            "kernel": tdlrt_jax.hosvd(jax.random.normal(keys[0], (3, 3, 4, 8)), rank=(3, 3, 2, 5)),
            "bias": jnp.ones(8),
        },
        "hidden": {"kernel": tdlrt_jax.resize(linear, 7), "bias": jnp.ones(10)},
        "last": {"kernel": jax.random.normal(keys[2], (10, 6)), "bias": jnp.ones(6)},
        "norm": {"scale": jnp.ones(6)},
    }


def test_layers_count_true_ranks_in_the_papers_order(params):
    conv, hidden, last = metrics.layers(params)
    assert conv == metrics.Layer("conv", "convolution", (8, 4, 3, 3), (5, 2, 3, 3), 90 + 40 + 8 + 9 + 9, 288)
    assert hidden == metrics.Layer("hidden", "linear", (10, 20), (4, 4), 16 + 80 + 40, 200), "padding costs nothing"
    assert last == metrics.Layer("last", "linear", (6, 10), None, 60, 60)
    assert conv.compression == pytest.approx(1 - 156 / 288)


def test_whole_modes_cost_no_factor():
    kernel = tdlrt_jax.hosvd(jax.random.normal(jax.random.key(0), (3, 3, 4, 8)), rank=(None, None, 2, 5))
    (layer,) = metrics.layers({"conv": {"kernel": kernel}})
    assert layer.rank == (5, 2, 3, 3) and layer.parameters == 90 + 8 + 40


def test_both_compression_rates(params):
    total = metrics.totals(metrics.layers(params))
    assert (total.parameters, total.full) == (156 + 136 + 60, 288 + 200 + 60)
    assert total.compression == pytest.approx(1 - 352 / 548)
    assert (total.conv_parameters, total.conv_full) == (156, 288)
    assert total.conv_compression == pytest.approx(1 - 156 / 288)
    assert metrics.totals(metrics.layers({"last": params["last"]})).conv_compression == 0


def test_singular_values_are_those_of_the_dense_unfoldings(params):
    spectra = metrics.singular_values(params)
    for name, order in (("conv", (3, 2, 0, 1)), ("hidden", (1, 0)), ("last", (1, 0))):
        dense = np.asarray(tdlrt_jax.to_dense(params[name]["kernel"]), np.float64)
        for values, mode in zip(spectra[name], order):
            unfolding = np.moveaxis(dense, mode, 0).reshape(dense.shape[mode], -1)
            expected = np.linalg.svd(unfolding, compute_uv=False)[: len(values)]
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4 * expected[0])
    assert [len(values) for values in spectra["conv"]] == [5, 2, 3, 3]


def test_loss_and_hits(rng):
    logits, labels = rng.normal(size=(9, 5)).astype(np.float32), rng.integers(0, 5, 9)
    expected = -np.log(np.exp(logits)[np.arange(9), labels] / np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(metrics.cross_entropy(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-5)
    np.testing.assert_array_equal(
        metrics.correct(jnp.asarray(logits), jnp.asarray(labels)), logits.argmax(axis=1) == labels
    )


def test_table_shows_every_layer_and_both_totals(params):
    console = Console(width=80, record=True, file=io.StringIO())
    summary = metrics.layers(params)
    console.print(display.layer_table(summary, metrics.totals(summary)))
    text = console.export_text()
    for words in ("8×4×3×3", "5×2×3×3", "dense", "45.8%", "convolutions only", "whole network", "35.8%"):
        assert words in text, words


def drawn(figure):
    """Share of pixels that are not white."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return np.mean(np.any(pixels != 255, axis=-1))


@pytest.fixture
def history():
    return [
        {
            "epoch": epoch,
            **{f"{part}_{kind}": 1 / epoch for part in ("train", "test") for kind in ("loss", "accuracy")},
            "compression_conv": 0.1 * epoch,
            "compression_all": 0.2 * epoch,
            "ranks": {"conv": (5 - epoch, 2, 3, 3), "hidden": (4, 4)},
            "truncation_error": {"conv": 0.01 / epoch, "hidden": 0.0},
            "cumulative_truncation_error": {"conv": 0.01 * epoch, "hidden": 1e-7},
            "seconds": 10.0 * epoch,
            "evaluation_seconds": 1.0,
            "compilations": int(epoch == 2),
        }
        for epoch in (1, 2, 3)
    ]


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_plots_draw_the_numbers_they_are_given(params, history):
    learning = plots.plot_learning(history)
    loss, accuracy, _ = learning.axes
    assert [line.get_label() for line in loss.lines] == ["training", "test"]
    np.testing.assert_allclose(accuracy.lines[1].get_ydata(), [1, 1 / 2, 1 / 3])
    ranks = plots.plot_ranks(history)
    assert [axes.get_title() for axes in ranks.axes] == ["conv", "hidden"]
    assert [line.get_label() for line in ranks.axes[0].lines] == legend_of(ranks) == ["out", "in", "height", "width"]
    np.testing.assert_array_equal(ranks.axes[0].lines[0].get_ydata(), [4, 3, 2])
    spectra = plots.plot_spectra(metrics.singular_values(params))
    assert len(spectra.axes) == 3 and spectra.axes[1].lines[0].get_ydata()[0] == 1
    compression = plots.plot_compression(history)
    over_time, trade, _ = compression.axes
    np.testing.assert_allclose(over_time.lines[1].get_ydata(), [0.2, 0.4, 0.6])
    np.testing.assert_allclose(trade.lines[0].get_xydata(), [[0.2, 1], [0.4, 1 / 2], [0.6, 1 / 3]])
    truncation = plots.plot_truncation(history)
    assert legend_of(truncation) == ["conv", "hidden"]
    np.testing.assert_allclose(truncation.axes[0].lines[0].get_ydata(), [0.01, 0.005, 0.01 / 3])
    assert np.isnan(truncation.axes[0].lines[1].get_ydata()).all(), "nothing cut is no point on a logarithmic axis"
    seconds = plots.plot_seconds(history)
    heights = [patch.get_height() for patch in seconds.axes[0].patches]
    np.testing.assert_allclose(heights, [10, 20, 30, 1, 1, 1])
    np.testing.assert_allclose(seconds.axes[0].lines[0].get_xdata(), [2])
    for figure in (learning, ranks, spectra, compression, truncation, seconds):
        assert drawn(figure) > 0.02
    assert plots.plot_ranks([{"epoch": 1, "ranks": {}}]) is None
    assert plots.plot_truncation([{"epoch": 1, "truncation_error": {}}]) is None


def test_runs_are_compared_in_one_plot(history):
    figure = plots.plot_comparison({"long": history, "short": history[:1], "bare": [{"epoch": 1}]})
    accuracy, compression, ends = figure.axes
    assert legend_of(figure) == ["long", "short", "bare"]
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [1, 1 / 2, 1 / 3])
    np.testing.assert_allclose(compression.lines[1].get_ydata(), [0.2])
    np.testing.assert_allclose([line.get_xydata()[0] for line in ends.lines], [[0.6, 1 / 3], [0.2, 1]])
    assert drawn(figure) > 0.02


def test_many_layers_are_a_grid():
    names = [f"convolutions/{number}" for number in range(13)]
    history = [
        {"epoch": epoch, "ranks": dict.fromkeys(names, (4, 3, 2, 1)), "truncation_error": dict.fromkeys(names, 0.1)}
        for epoch in (1, 2)
    ]
    figure = plots.plot_ranks(history)
    assert [axes.get_title() for axes in figure.axes] == names
    rows, columns = {round(axes.get_position().y0, 3) for axes in figure.axes}, figure.axes[0].get_gridspec().ncols
    assert columns == 5 and len(rows) == 3
    lines = plots.plot_truncation(history).axes[0].lines
    assert len({(tuple(line.get_color()), line.get_linestyle()) for line in lines}) == 13


def test_epochs_and_ranks_as_tables(history):
    def text(table):
        console = Console(width=150, file=io.StringIO(), record=True)
        console.print(table)
        return console.export_text()

    epochs = text(display.history_table(history))
    for words in ("50.00%", "0.3333", "c.r. all", "60.0%", "30.0", "compiled"):
        assert words in epochs
    assert "validation" not in epochs, "nothing is shown that no epoch has"
    ranks = text(display.rank_table(history))
    assert "4×2×3×3" in ranks and "2×2×3×3" in ranks and "4×4" in ranks
    long = [{**history[0], "epoch": epoch} for epoch in range(1, 101)]
    epochs, ranks = text(display.history_table(long)), text(display.rank_table(long))
    assert "of 100 epochs, 30 are shown" in epochs
    for table in (epochs, ranks):
        assert "100" in table and " 1 " in table
