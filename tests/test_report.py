"""Numbers of layers and networks against numbers worked out by hand; the table."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax import report
from tdlrt_jax.baselines import CPTensor
from tdlrt_jax.nn import CPConv, MatrixConv, TuckerLinear, summarize
from tests.helpers import random_kernel

GEOMETRY = {"strides": 2, "padding": "VALID"}


@pytest.fixture
def kernel(rng):
    """Shape (3, 3, 4, 8), ranks (3, 2, 2, 5), arrays one larger where they can be."""
    return random_kernel(rng, (3, 3, 4, 8), (3, 2, 2, 5), (3, 3, 3, 6), jnp.float32)


def test_a_tree_of_parameters(kernel, rng):
    params = {
        "conv": {"kernel": kernel, "bias": jnp.ones(8)},
        "blocks": [{"kernel": jnp.ones((20, 10))}, {"scale": jnp.ones(6)}],
        "tucker under any name": random_kernel(rng, (6, 7), (2, 2), dtype=jnp.float32),
    }
    summary = report.summarize_params(params)
    block, conv, other = summary.layers
    assert conv == report.LayerSummary(
        path="conv",
        kind="convolution",
        shape=(3, 3, 4, 8),
        rank=(3, 2, 2, 5),
        capacity=(3, 3, 3, 6),
        parameters=60 + 9 + 6 + 8 + 40,
        dense_parameters=288,
    )
    assert (block.path, block.kind, block.rank, block.capacity) == ("blocks/0", "linear", None, None)
    assert other.kind == "linear" and other.parameters == 4 + 12 + 14
    assert conv.compression == pytest.approx(1 - 123 / 288)
    assert summary.kernels == (200 + 123 + 30, 200 + 288 + 42)
    assert summary.convolutions == (123, 288) and summary.convolutions.compression == conv.compression
    assert summary.weights == (353 + 8 + 6, 530 + 8 + 6)
    assert summary.multiply_adds is None


def test_one_kernel_and_nothing_at_all(kernel):
    (layer,) = report.summarize_params(kernel).layers
    assert layer.parameters == 123
    empty = report.summarize_params({})
    assert empty.layers == () and empty.weights == (0, 0) and empty.kernels.compression == 0


def test_whole_modes_cost_no_factor_and_arrays_without_values_count_at_their_capacity(kernel, rng):
    whole = random_kernel(rng, (3, 3, 4, 8), (None, None, 2, 5), dtype=jnp.float32)
    assert report.summarize_layer("a", "convolution", whole).parameters == 90 + 8 + 40
    abstract = jax.eval_shape(lambda k: k, kernel)
    layer = report.summarize_layer("a", "convolution", abstract)
    assert layer.rank == layer.capacity == (3, 3, 3, 6) and layer.parameters == 162 + 9 + 9 + 12 + 48


def test_multiply_adds_are_those_of_the_forward_pass(kernel):
    calls = [(2, 9, 9, 4), (2, 7, 7, 4)]  # to 4x4 and 3x3 pixels

    def summary(plan):
        return report.summarize_layer("a", "convolution", kernel, inputs=calls, geometry=GEOMETRY, plan=plan)

    before, after = 2 * (81 + 49), 2 * (16 + 9)
    dense = after * 9 * 4 * 8
    expected = {
        "dense": dense,
        "factored": before * 4 * 2 + after * 9 * 2 * 5 + after * 5 * 8,
        "merge_in": after * 9 * 4 * 5 + after * 5 * 8,
        "merge_out": before * 4 * 2 + after * 9 * 2 * 8,
    }
    for plan, work in expected.items():
        layer = summary(plan)
        assert (layer.plan, layer.multiply_adds, layer.dense_multiply_adds) == (plan, work, dense)
        assert layer.inputs == tuple(calls)
    array = report.summarize_layer("a", "convolution", tdlrt_jax.to_dense(kernel), inputs=calls[:1], geometry=GEOMETRY)
    assert array.plan is None and array.multiply_adds == array.dense_multiply_adds == 2 * 16 * 9 * 32
    unknown = report.summarize_layer("a", "convolution", kernel, inputs=calls)
    assert unknown.multiply_adds is None and unknown.inputs == tuple(calls)


def test_a_kernel_used_by_two_layers_is_stored_once(kernel):
    layers = [report.summarize_layer(path, "convolution", kernel, shared=path == "b") for path in "ab"]
    assert [layer.parameters for layer in layers] == [123, 0]
    assert report.total_summary(layers, 0, with_work=False).weights == (123, 288)


def test_as_json_and_as_a_table(kernel, rng):
    layers = [
        report.summarize_layer("blocks/0/conv", "convolution", kernel, inputs=[(1, 9, 9, 4)] * 2, geometry=GEOMETRY),
        report.summarize_layer("last", "linear", jnp.ones((8, 3)), inputs=[(1, 8)], geometry={}),
        report.summarize_layer("odd", "linear", jnp.ones((2, 2)), inputs=[(1, 2)]),
    ]
    summary = report.total_summary(layers, 11, with_work=True)
    data = json.loads(json.dumps(summary.to_json()))
    assert data["layers"][0]["rank"] == [3, 2, 2, 5] and data["layers"][0]["inputs"] == [[1, 9, 9, 4]] * 2
    assert data["layers"][0]["compression"] == layers[0].compression
    assert data["kernels"] == {"stored": 151, "dense": 316, "compression": pytest.approx(1 - 151 / 316)}
    assert data["multiply_adds"]["dense"] == 2 * 16 * 9 * 32 + 24
    text = str(summary)
    (line,) = [line for line in text.splitlines() if "blocks/0/conv" in line]
    for words in (
        "3×3×4×8",
        "3×2×2×5",
        "3×3×3×6",
        "288",
        "123",
        "57.3%",
        "1×9×9×4 (2 calls)",
        layers[0].plan,
        "9.22 k",
    ):
        assert words in line, words
    assert "?" in next(line for line in text.splitlines() if "odd" in line), "work that is not known is not zero"
    for words in ("convolutions", "all kernels", "52.2%", "all weights"):
        assert words in text
    plain = str(report.summarize_params({"last": {"kernel": np.ones((8, 3))}}))
    assert "capacity" not in plain and "plan" not in plain


def test_kernels_in_cp_format_and_convolutions_kept_as_matrices(rng):
    cp = CPTensor(tuple(jnp.ones((n, 5)) for n in (3, 3, 4, 8)))
    params = {"a": {"kernel": cp, "bias": jnp.ones(8)}, "b": {"kernel": random_kernel(rng, (36, 8), (2, 2))}}
    summary = report.summarize_params(params, {"b": "convolution"})
    terms, matrix = summary.layers
    assert terms == report.LayerSummary("a", "convolution", (3, 3, 4, 8), (5,), (5,), 90, 288)
    assert (matrix.kind, matrix.rank, matrix.parameters) == ("convolution", (2, 2), 4 + 72 + 16)
    assert summary.convolutions == (90 + 92, 576) and summary.weights == (182 + 8, 576 + 8)
    assert report.summarize_params(params).convolutions == (90, 288)  # without kinds a matrix is a linear layer


def test_a_model_knows_its_kinds(rng):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = CPConv(3, 8, (3, 3), rank=2, rngs=rngs)
            self.second = MatrixConv(8, 4, (3, 3), rank=2, rngs=rngs)
            self.last = TuckerLinear(4, 2, rank=1, rngs=rngs)

        def __call__(self, x):
            return self.last(self.second(self.first(x)))

    layers = {layer.path: layer for layer in summarize(Model(nnx.Rngs(0)), jnp.ones((1, 6, 6, 3))).layers}
    assert [layer.kind for layer in layers.values()] == ["convolution", "convolution", "linear"]
    assert layers["first"].parameters == 2 * (3 + 3 + 3 + 8) and layers["second"].parameters == 4 + 2 * 72 + 2 * 4
    # How a layer in another format multiplies is not counted, and said to be unknown.
    assert layers["first"].multiply_adds is None and layers["second"].multiply_adds is None
    assert layers["last"].multiply_adds is not None
