"""What is written is read again: checkpoints of arbitrary containers, exported layers, converted ones."""

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tdlrt_jax import TuckerTensor, active_rank, checkpoint, densify, export, to_plain, tuckerize
from tdlrt_jax.nn import TuckerConv
from tdlrt_jax.paths import path_name
from tests.properties.containers import containers, names
from tests.properties.convolutions import convolution
from tests.properties.strategies import cases, forms, kernel_of, kernels, precision, ranks, seeds
from tests.properties.test_convolution import geometries

numbers = st.one_of(
    st.integers(-(2**53), 2**53), st.floats(allow_nan=False), st.text(max_size=5), st.booleans(), st.none()
)
metadata = st.dictionaries(st.text(max_size=5), st.one_of(numbers, st.lists(numbers, max_size=3)), max_size=3)
STORED = ("float32", "bfloat16", "float16", "int32", "int8", "uint32", "bool", "complex64")


@st.composite
def leaves(draw):
    kind = draw(st.sampled_from(["kernel", "array", "array", "key", "number"]))
    if kind == "kernel":
        return draw(kernels("float32", [(4, 3), (2, 3, 4)]))[1].tucker
    rng = np.random.default_rng(draw(seeds))
    if kind == "key":
        return jax.random.key(draw(st.integers(0, 2**31)))
    if kind == "number":
        return jnp.asarray(draw(st.one_of(st.floats(width=32), st.integers(-5, 5))))
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 0]), max_size=3))
    values = np.asarray(100 * rng.standard_normal(shape))
    values[rng.random(shape) < 0.1] = draw(st.sampled_from([np.inf, -0.0, 7.0]))
    dtype = draw(st.sampled_from(STORED))
    return jnp.asarray(np.nan_to_num(values) if "int" in dtype else values).astype(dtype)


def bits(leaf):
    array = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return str(leaf.dtype), np.shape(array), np.asarray(array).tobytes()


@cases(ci=15, nightly=500)
@given(st.data(), metadata)
def test_checkpoints_of_arbitrary_containers_come_back_bit_for_bit(data, metadata):
    members = data.draw(st.lists(leaves(), min_size=1, max_size=4))
    tree = data.draw(containers(len(members)))(members)
    step = data.draw(st.integers(0, 10**6))
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    with tempfile.TemporaryDirectory() as directory:
        if len(set(paths)) < len(paths):
            with pytest.raises(ValueError, match="two leaves have the path"):
                checkpoint.save(directory, step, tree)
            return
        checkpoint.save(directory, step, tree, metadata)
        restored, found = checkpoint.restore(directory, tree)
        used = checkpoint.ranks(directory)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert list(map(bits, jax.tree.leaves(restored))) == list(map(bits, jax.tree.leaves(tree)))
    assert found == json.loads(json.dumps(metadata))
    kernels = [leaf for leaf in members if isinstance(leaf, TuckerTensor)]
    assert sorted(used.values()) == sorted(active_rank(kernel).tolist() for kernel in kernels)


@st.composite
def convolutions(draw):
    """A layer of flax.nnx's options, its kernel, and the convolution that it stands for."""
    shape, image = draw(st.sampled_from([((3, 2, 4), (4,)), ((3, 2, 2, 3), (4, 3)), ((1, 1, 3, 4), (3, 3))]))
    options, how = draw(geometries(shape[:-2], image))
    shape = (*shape[:-1], shape[-1] * how.groups)
    form = draw(forms([shape]))
    kernel = kernel_of(form, draw(ranks(form)), draw(seeds), "float32")
    renamed = {"dilation": "kernel_dilation", "groups": "feature_group_count"}
    options = {renamed.get(name, name): value for name, value in options.items()}
    channels = shape[-2] * how.groups
    layer = TuckerConv(channels, shape[-1], shape[:-2], rngs=nnx.Rngs(0), **options)
    layer.kernel.set_value(kernel.tucker)
    layer.bias.set_value(jnp.arange(float(shape[-1])))
    return layer, kernel, (*image, channels), how


def expected_of(kernel, x, how):
    return convolution(np.asarray(x, float), kernel.dense, how) + np.arange(float(kernel.dense.shape[-1]))


def assert_same_layer(found, expected):
    assert np.abs(np.asarray(found, float) - expected).max(initial=0.0) <= 1e-4 * (
        1 + np.abs(expected).max(initial=0.0)
    )


@cases(ci=6, nightly=250)
@given(st.data(), seeds)
def test_exported_layers_predict_the_same(data, seed):
    with precision("float32"):
        layer, kernel, shape, how = data.draw(convolutions())
        x = np.random.default_rng(seed).standard_normal((data.draw(st.integers(1, 4)), *shape)).astype(np.float32)
        example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        program = export.deserialize(export.serialize(layer, example, platforms=("cpu",)))
        assert_same_layer(program(x), expected_of(kernel, x, how))


@cases(ci=8, nightly=300)
@given(st.data(), seeds)
def test_converted_layers_compute_the_same(data, seed):
    """In plain layers; as one dense layer; and as a Tucker layer again."""
    with precision("float32"):
        layer, kernel, shape, how = data.draw(convolutions())
        x = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
        expected = expected_of(kernel, x, how)
        depthwise = how.groups > 1 and kernel.dense.shape[-2] == 1
        plan = data.draw(st.sampled_from([None] if depthwise else [None, "dense", "factored", "merge_in", "merge_out"]))
        assert_same_layer(to_plain(layer, x, plan=plan)(x), expected)
        dense = densify(layer)
        assert_same_layer(dense(x), expected)
        assert_same_layer(tuckerize(dense, {".*": {"rank": None}})(x), expected)


@cases(ci=10, nightly=100)
@given(st.dictionaries(names, st.floats(width=32), min_size=1, max_size=4), st.data())
def test_no_leaf_name_leads_out_of_the_checkpoint(named, data):
    """Names are keys inside of it, not files."""
    with tempfile.TemporaryDirectory() as outer:
        tree = {name: jnp.float32(value) for name, value in named.items()}
        if len({path_name((jax.tree_util.DictKey(name),)) for name in named}) < len(named):
            return
        checkpoint.save(f"{outer}/inner/run", 1, tree)
        assert sorted(path.name for path in Path(outer).iterdir()) == ["inner"]
