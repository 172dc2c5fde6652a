"""Conversion of whole models: the same function, the original untouched, and everything found and kept."""

import copy
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax import TuckerTensor
from tdlrt_jax.nn import (
    TuckerConv,
    TuckerConvTranspose,
    TuckerLinear,
    densify,
    summarize,
    to_plain,
    tuckerize,
)
from tdlrt_jax.nn.formats import CPConv
from tdlrt_jax.rules import Rule

BIAS = jax.nn.initializers.normal()


class Block(nnx.Module):
    """Layers in every kind of container, a layer in two places, statistics and random states."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 2), bias_init=BIAS, rngs=rngs)
        self.again = nnx.Conv(4, 4, (2, 2), rngs=rngs)
        self.list = nnx.List([nnx.Linear(4, 4, rngs=rngs), jax.nn.relu, self.again])
        self.dict = nnx.Dict(up=nnx.ConvTranspose(4, 3, (2, 2), strides=2, rngs=rngs))
        self.plain = nnx.data({"a": [nnx.Linear(3, 4, rngs=rngs)], "b": (nnx.Linear(4, 4, rngs=rngs), "static")})
        self.sequential = nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), nnx.tanh)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.other = nnx.LinearGeneral(5, 2, rngs=rngs)

    def __call__(self, x):
        x = self.list[1](self.norm(self.conv(x)))
        x = self.list[2](self.again(self.list[0](x)))
        x = self.plain["a"][0](self.dict["up"](x))
        x = self.plain["b"][0](self.dropout(x))
        return self.other(self.sequential(x))


PATHS = ["again", "conv", "dict/up", "list/0", "plain/a/0", "plain/b/0", "sequential/layers/0"]


@pytest.fixture(scope="module")
def block():
    model = Block(nnx.Rngs(0, dropout=1))
    model.norm.mean.set_value(jnp.arange(4.0))
    return model


def images(size=5, channels=3):
    return jax.random.normal(jax.random.key(7), (2, size, size, channels))


def layer_types(model):
    return {
        "/".join(map(str, path)): type(node)
        for path, node in nnx.iter_graph(model, graph=True)
        if isinstance(node, nnx.Module)
    }


def test_layers_are_found_everywhere_and_the_function_is_the_same(block):
    tucker = tuckerize(block, {".*": None})
    types = layer_types(tucker)
    assert [
        path for path, kind in types.items() if issubclass(kind, TuckerConv | TuckerLinear | TuckerConvTranspose)
    ] == PATHS
    assert types["other"] is nnx.LinearGeneral
    assert tucker.list[2] is tucker.again
    assert tucker.plain["b"][1] == "static"
    for training in (True, False):
        models = [copy.deepcopy(model) for model in (block, tucker, densify(tucker))]
        for model in models:
            model.train() if training else model.eval()
        expected, *found = (model(images()) for model in models)
        for result in found:
            np.testing.assert_allclose(result, expected, atol=1e-5)
        for model in models[1:]:  # statistics and random counters moved alike
            np.testing.assert_allclose(model.norm.mean.get_value(), models[0].norm.mean.get_value(), atol=1e-5)
            assert model.dropout.rngs.count.get_value() == models[0].dropout.rngs.count.get_value()


def test_densify_gives_the_original_back(block):
    back = densify(tuckerize(block, {".*": None}))
    assert layer_types(back) == layer_types(block)
    before, after = (nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in (block, back))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), before, after)
    # The same structure, static attributes included: what was compiled for one runs the other.
    assert nnx.graphdef(back) == nnx.graphdef(block)


def test_the_original_stays_and_nothing_is_shared_with_it(block):
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(block, nnx.Not(nnx.RngState))))
    types = layer_types(block)
    variables = {id(node) for _, node in nnx.iter_graph(block, graph=True) if isinstance(node, nnx.Variable)}
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(block, nnx.Not(nnx.RngState)))]
    for converted in (tuckerize(block, {"conv": 0.5}), densify(block)):
        others = [node for _, node in nnx.iter_graph(converted, graph=True) if isinstance(node, nnx.Variable)]
        assert others
        assert variables.isdisjoint(id(variable) for variable in others)
        pointers = [
            leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(converted, nnx.Not(nnx.RngState)))
        ]
        assert set(buffers).isdisjoint(pointers)
        nnx.update(converted, jax.tree.map(lambda leaf: 0 * leaf, nnx.state(converted, nnx.Param)))
    assert layer_types(block) == types
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(block, nnx.Not(nnx.RngState))), before)


def test_the_first_rule_decides_and_the_paths_are_those_of_the_parameters(block):
    tucker = tuckerize(block, {"conv": "dense", r"^plain/b": 2, "^list|again": {"rank": 0.5}, "sequential": (None, 3)})
    kernels = tdlrt_jax.kernel_paths(nnx.to_pure_dict(nnx.state(tucker, nnx.Param)))
    shapes = {path.removesuffix("/kernel"): kernel.core.shape for path, kernel in kernels.items()}
    assert shapes == {"again": (2, 2, 2, 2), "list/0": (2, 2), "plain/b/0": (2, 2), "sequential/layers/0": (4, 3)}
    assert kernels["sequential/layers/0/kernel"].factors[0] is None
    assert type(tucker.conv) is nnx.Conv


def test_tucker_layers_are_left_as_they_are_and_count_as_matching(block):
    once = tuckerize(block, {"conv": 2})
    twice = tuckerize(once, {"conv": 1, "list": 3})
    assert twice.conv.kernel.get_value().core.shape == once.conv.kernel.get_value().core.shape == (3, 2, 2, 2)
    assert type(twice.list[0]) is TuckerLinear
    assert type(twice.list[2]) is nnx.Conv  # its path is "again"
    only_tucker = tuckerize(nnx.List([once.conv]), {"0": 1})
    np.testing.assert_array_equal(only_tucker[0](images()), once.conv(images()))


def test_a_single_layer_and_a_pytree_of_modules(block):
    layer = tuckerize(block.conv, {".*": 2})
    assert type(layer) is TuckerConv
    assert type(densify(layer)) is nnx.Conv
    pair = tuckerize({"x": block.conv, "y": (block.again, block.conv)}, {"x": None})
    assert type(pair["x"]) is TuckerConv
    assert pair["x"] is pair["y"][1]


def test_truncation_is_the_hosvds_and_a_tolerance_sets_or_fills_the_capacity():
    # Singular values 1, 1/10, 1/100, ... in both modes.
    u, v = (np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0] for seed in (0, 1))
    weights = jnp.asarray(u @ np.diag(10.0 ** -np.arange(6)) @ v, jnp.float32)
    layer = nnx.Linear(6, 6, kernel_init=lambda *_: weights, rngs=nnx.Rngs(0))

    def kernel(**options):
        return tuckerize(layer, {".*": Rule(**options)}).kernel.get_value()

    def error(kernel):
        return float(jnp.linalg.norm(tdlrt_jax.to_dense(kernel) - weights) / jnp.linalg.norm(weights))

    assert kernel(rank=2).core.shape == (2, 2)
    assert 0.99e-2 < error(kernel(rank=2)) < 1.02e-2
    for tolerance, rank in ((0.2, 1), (0.02, 2), (2e-3, 3)):
        found = kernel(tolerance=tolerance)
        assert found.core.shape == (rank, rank)
        assert tolerance / 20 < error(found) <= tolerance
    found = kernel(tolerance=0.02, rank=5)
    assert found.core.shape == (5, 5)
    assert tdlrt_jax.active_rank(found).tolist() == [2, 2]
    assert kernel(tolerance=2e-3, rank=2).core.shape == (2, 2)
    assert kernel(tolerance=0.02, spare=1).core.shape == (3, 3)
    assert kernel(tolerance=0.02, min_rank=4).core.shape == (4, 4)
    assert kernel(tolerance=2e-3, max_rank=(2, 6)).core.shape == (2, 2)
    assert kernel(max_rank=3).core.shape == kernel(rank=5, max_rank=(3, 5)).core.shape == (3, 3)
    assert kernel(tolerance=0.02, rank=(None, 6)).core.shape == (6, 6)
    assert kernel(tolerance=5.0, convention="absolute").core.shape == (1, 1)
    assert kernel(tolerance=0.0502, convention="absolute").core.shape == (2, 2)
    assert kernel(tolerance=0.0102, criterion="each").core.shape == (2, 2)


def test_fresh_weights_are_those_of_a_new_layer(block):
    rngs = nnx.Rngs(3)
    tucker = tuckerize(block, {"conv": {"weights": "fresh", "rank": 0.5}, "list": {"weights": "spectral"}}, rngs=rngs)
    kernel = tucker.conv.kernel.get_value()
    assert kernel.core.shape == (3, 2, 2, 2)
    assert 1.0 < float(jnp.linalg.norm(kernel.core)) < 3.0  # about sqrt(4), whatever the present weights are
    values = jnp.linalg.svd(tdlrt_jax.to_dense(tucker.list[0].kernel.get_value()), compute_uv=False)
    np.testing.assert_allclose(values / values[0], 10.0 ** -np.arange(4), rtol=1e-3)
    np.testing.assert_array_equal(tucker.conv.bias.get_value(), block.conv.bias.get_value())
    other = tuckerize(block, {"conv": {"weights": "fresh", "rank": 0.5}}, rngs=nnx.Rngs(4))
    assert not np.allclose(other.conv.kernel.get_value().core, kernel.core)

    def zeros(key, shape, rank, *, norm, dtype):
        return TuckerTensor(jnp.zeros((1, 1), dtype), (jnp.eye(4, 1), jnp.eye(4, 1)))

    drawn = tuckerize(block, {"list": {"weights": zeros}}, rngs=rngs)
    assert not drawn.list[0].kernel.get_value().core.any()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("compute", [None, jnp.float32])
def test_half_precision_weights_keep_the_dtype_of_the_computation(dtype, compute):
    dense = nnx.Conv(4, 4, (2, 2), param_dtype=dtype, dtype=compute, bias_init=BIAS, rngs=nnx.Rngs(0))
    tucker = tuckerize(dense, {".*": None})
    assert tucker.kernel.get_value().core.dtype == jnp.float32
    assert tucker.bias.get_value().dtype == dtype
    back = densify(tucker)
    assert back.kernel.get_value().dtype == back.param_dtype == dtype
    np.testing.assert_array_equal(back.kernel.get_value(), dense.kernel.get_value())
    for x in (images(channels=4), images(channels=4).astype(dtype)):
        assert tucker(x).dtype == dense(x).dtype
        np.testing.assert_allclose(np.float32(tucker(x)), np.float32(dense(x)), atol=5e-2)
    # Weights cast by hand after the layer was made decide as they did.
    dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    dense.kernel.set_value(dense.kernel.get_value().astype(dtype))
    dense.bias.set_value(dense.bias.get_value().astype(dtype))
    assert (
        tuckerize(dense, {".*": None})(jnp.ones((1, 4), dtype)).dtype == dense(jnp.ones((1, 4), dtype)).dtype == dtype
    )


def test_every_argument_and_all_metadata_are_kept():
    calls = []

    def convolution(*args, **kwargs):
        calls.append("convolution")
        return jax.lax.conv_general_dilated(*args, **kwargs)

    def product(*args, **kwargs):
        calls.append("product")
        return jax.lax.dot_general(*args, **kwargs)

    def promote(arrays, *, dtype=None):
        calls.append("promote")
        return nnx.nn.dtypes.promote_dtype(arrays, dtype=dtype)

    class Special(nnx.Param):
        pass

    common = {
        "precision": "highest",
        "preferred_element_type": jnp.float32,
        "promote_dtype": promote,
        "kernel_metadata": {"out_sharding": None, "group": "kernels"},
        "bias_metadata": {"group": "biases"},
        "bias_init": BIAS,
        "rngs": nnx.Rngs(0),
    }
    conv = nnx.Conv(
        4,
        6,
        (3, 2),
        (1, 2),
        padding=[(0, 2), 1],
        kernel_dilation=(2, 1),
        input_dilation=2,
        feature_group_count=2,
        mask=jnp.tril(jnp.ones((3, 2, 2, 6), "float32")),
        conv_general_dilated=convolution,
        **common,
    )
    conv.kernel = Special(conv.kernel.get_value(), **conv.kernel.get_metadata(exclude_required=True))
    conv.note = "hung on by the user"
    linear = nnx.Linear(4, 5, dot_general=product, use_bias=False, **common)
    for layer in (conv, linear):
        tucker = tuckerize(layer, {".*": None})
        back = densify(tucker)
        x = images(channels=4).astype("float32")
        calls.clear()
        expected, found, again = layer(x), tucker(x), back(x)
        assert len(calls) == 6
        assert len(set(calls)) == 2
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(again, expected, atol=1e-5)
        for converted in (tucker, back):
            assert type(converted.kernel) is type(layer.kernel)
            assert converted.kernel.get_metadata() == layer.kernel.get_metadata()
            assert converted.kernel.group == "kernels"
            assert converted.precision == "highest"
    assert tuckerize(conv, {".*": None}).bias.group == "biases"
    assert densify(tuckerize(conv, {".*": None})).note == "hung on by the user"
    assert nnx.graphdef(densify(tuckerize(linear, {".*": None}))) == nnx.graphdef(linear)


def test_a_weight_shared_by_two_layers_stays_shared():
    first, second = (nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    second.kernel = first.kernel
    tied = tuckerize(nnx.List([first, second]), {".*": 2})
    assert tied[0].kernel is tied[1].kernel
    assert tied[0].bias is not tied[1].bias
    assert densify(tied)[0].kernel is not first.kernel
    with pytest.raises(ValueError, match="the weight '1/kernel' is shared with a layer to convert"):
        tuckerize(nnx.List([first, second]), {"0": 2})


def test_a_model_that_contains_itself():
    class Node(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.parent = nnx.data(None)

    child, root = Node(), Node()
    root.child, child.parent = child, root
    tucker = tuckerize(root, {"child/layer": 2})
    assert type(tucker.child.layer) is TuckerLinear
    assert type(tucker.layer) is nnx.Linear
    assert tucker.child.parent is tucker


def test_derived_classes_are_left_alone():
    class Mine(nnx.Linear):
        pass

    model = nnx.List([Mine(3, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 3, rngs=nnx.Rngs(0))])
    assert [type(layer) for layer in tuckerize(model, {".*": 1})] == [Mine, TuckerLinear]


def test_conversion_under_eval_shape_is_abstract():
    abstract = nnx.eval_shape(
        lambda: tuckerize(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), {".*": {"rank": 2, "tolerance": 0.1}})
    )
    assert abstract.kernel.get_value().core == jax.ShapeDtypeStruct((2, 2), jnp.float32)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"conv": (3, 2, 9, 4)}, "layer 'conv': rank=9 for mode 2"),
        ({"conv": (3, 2)}, "layer 'conv': rank=(3, 2) has 2 entries"),
        ({"conv": {"max_rank": (2, 2)}}, "layer 'conv': max_rank=(2, 2) has 2 entries"),
        ({"conv": {"tolerance": 3.0}}, "layer 'conv': tolerance=3.0: a relative tolerance is below 1"),
        ({"conv": {"weights": "fresh"}}, "layer 'conv': weights='fresh' needs random keys: pass rngs"),
        ({"convolution": 2}, "'convolution' is found in no layer's path; the paths are ['again', 'conv',"),
        ({"other": 2}, "'other' is found in no layer's path"),
        ({"conv": {"rnak": 2}}, "did you mean 'rank'"),
    ],
)
def test_mistakes_name_the_layer_or_the_pattern(block, rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tuckerize(block, rules)


def test_models_that_cannot_be_converted():
    with pytest.raises(ValueError, match=r"model has no nnx\.Conv.*got BatchNorm"):
        tuckerize(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), {".*": 1})
    broken = nnx.Linear(2, 2, kernel_init=lambda *_: jnp.array([[1.0, jnp.nan], [1, 1]]), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layer '': its weights are not all finite"):
        tuckerize(broken, {".*": 1})
    whole = nnx.Linear(2, 2, kernel_init=lambda *_: jnp.ones((2, 2), "int32"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layer '': weights of dtype int32"):
        tuckerize(whole, {".*": 1})


def test_stacked_layers_are_refused_clearly():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        return nnx.Linear(3, 4, rngs=nnx.Rngs(key))

    model = nnx.Dict(stack=stack(jax.random.split(jax.random.key(0), 5)), head=nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"layer 'stack': its kernel has the shape \(5, 3, 4\), expected \(3, 4\)"):
        tuckerize(model, {".*": 2})
    assert type(tuckerize(model, {"stack": "dense", ".*": 2}).head) is TuckerLinear


def stacked_layers():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        return TuckerConv(4, 4, (3, 3), rank=2, rngs=nnx.Rngs(key))

    return nnx.Dict(blocks=stack(jax.random.split(jax.random.key(0), 5)))


@pytest.mark.parametrize(
    "convert", [densify, summarize, partial(to_plain, plan="factored"), partial(to_plain, plan="dense")]
)
def test_stacks_of_tucker_layers_are_refused_clearly(convert):
    """Each of them has ranks of its own, in the arrays of one."""
    with pytest.raises(
        ValueError, match=r"layer 'blocks': its core of shape \(5, 3, 3, 2, 2\) with 4 factors is a stack"
    ):
        convert(stacked_layers())


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_layers_whose_weights_are_normalized_are_refused_clearly(wrapper):
    inside = wrapper(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    model = nnx.Dict(body=inside, head=nnx.Linear(6, 2, rngs=nnx.Rngs(2)))
    with pytest.raises(ValueError, match=rf"'body/layer_instance' is in an nnx.{wrapper.__name__}.*'dense'"):
        tuckerize(model, {".*": 2})
    converted = tuckerize(model, {"body/layer_instance": "dense", ".*": None})
    x = jax.random.normal(jax.random.key(0), (3, 8))
    np.testing.assert_allclose(converted["head"](converted["body"](x)), model["head"](model["body"](x)), atol=1e-5)


def test_names_of_a_dense_kernels_axes_do_not_go_over():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        dense = nnx.Linear(4, 8, kernel_init=init, kernel_metadata={"group": "kernels"}, rngs=nnx.Rngs(0))
        assert dense.kernel.get_metadata()["out_sharding"] == (None, "model")
        converted = tuckerize(dense, {"": None})
        assert converted.kernel.get_metadata().get("out_sharding") is None
        assert converted.kernel.get_metadata()["group"] == "kernels"
        x = jnp.arange(12.0).reshape(3, 4)
        np.testing.assert_allclose(converted(x), dense(x), rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(TuckerLinear, ()), (TuckerConv, ((3, 3),)), (TuckerConvTranspose, ((3, 3),)), (CPConv, ((3, 3),))],
)
def test_names_of_a_dense_kernels_axes_are_refused(layer, shape):
    names = (None,) * (2 * len(shape)) + (None, "model")
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
        with pytest.raises(ValueError, match=r"returned a VariableMetadata.*expected an array.*docs/scaling.md"):
            layer(4, 8, *shape, rank=2, kernel_init=init, rngs=nnx.Rngs(0))
        if layer is not CPConv:
            with pytest.raises(ValueError, match=r"kernel_metadata has out_sharding=.*docs/scaling.md"):
                layer(4, 8, *shape, rank=2, kernel_metadata={"out_sharding": names}, rngs=nnx.Rngs(0))
