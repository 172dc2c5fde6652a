"""Unmodified linen models on Tucker kernels: the same function, gradients of Theorem 1, and clear refusals."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze

import tdlrt_jax
from tdlrt_jax.nn import linen

BIAS = nn.initializers.normal()


def images(*shape):
    return jax.random.normal(jax.random.key(7), shape)


def initialized(module, *args, **kwargs):
    return module.init(jax.random.key(0), *args, **kwargs)


def assert_same_function(module, x, tolerance=1e-5, **kwargs):
    """Converted at full rank the model gives the same numbers, and densified the same weights."""
    variables = initialized(module, x, **kwargs)
    expected = module.apply(variables, x, **kwargs)
    converted = {**variables, "params": linen.tuckerize_params(variables["params"], {".*": None})}
    found = linen.apply(module, converted, x, **kwargs)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    scale = max(float(jnp.max(jnp.abs(expected))), 1)
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=tolerance * scale)
    dense = linen.densify_params(converted["params"])
    assert jax.tree.structure(dense) == jax.tree.structure(variables["params"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), atol=2e-6), dense, variables["params"]
    )
    # Dense parameters run exactly as ever.
    np.testing.assert_array_equal(linen.apply(module, variables, x, **kwargs), expected)
    return converted


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv(6, (3, 2), strides=(2, 1), padding="VALID", bias_init=BIAS), (2, 7, 6, 4)),
        (nn.Conv(6, 3, padding="CAUSAL", kernel_dilation=2), (2, 9, 4)),
        (nn.Conv(6, (3, 2), padding="CIRCULAR", use_bias=False), (2, 3, 5, 5, 4)),
        (nn.Conv(6, (3, 3), padding="REFLECT", strides=None), (5, 5, 4)),
        (nn.Conv(6, (3, 2), padding=((1, 2), 0), input_dilation=(2, 1)), (2, 5, 5, 4)),
        (nn.Conv(6, (2, 2), feature_group_count=2), (2, 5, 5, 4)),
        (nn.Conv(8, (2, 2), feature_group_count=4), (2, 5, 5, 4)),
        (nn.Conv(6, (2, 2, 2), precision="highest"), (2, 4, 3, 3, 4)),
        (nn.ConvTranspose(6, (3, 2), strides=(2, 2), bias_init=BIAS), (2, 4, 4, 3)),
        (nn.ConvTranspose(6, (3,), strides=(2,), padding="CIRCULAR", transpose_kernel=True), (2, 5, 3)),
        (nn.Dense(6, bias_init=BIAS), (2, 3, 4)),
        (nn.Dense(6, use_bias=False, precision="highest"), (4,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_layers_compute_the_same_for_all_arguments(module, shape):
    assert_same_function(module, images(*shape))


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_follow_linen(x_dtype, dtype, param_dtype):
    x = images(2, 5, 4).astype(x_dtype)
    options = {"dtype": dtype, "param_dtype": param_dtype, "bias_init": BIAS}
    for module in (nn.Conv(6, (2,), **options), nn.Dense(6, **options), nn.ConvTranspose(6, (2,), **options)):
        converted = assert_same_function(module, x, 2e-2)
        assert converted["params"]["kernel"].core.dtype == jnp.float32
        assert linen.densify_params(converted["params"], dtype=param_dtype)["kernel"].dtype == param_dtype


def test_masks_and_the_authors_own_products_get_the_dense_kernel():
    calls = []

    def convolution(*args, **kwargs):
        calls.append("convolution")
        return jax.lax.conv_general_dilated(*args, **kwargs)

    def product(*args, **kwargs):
        calls.append("product")
        return jax.lax.dot_general(*args, **kwargs)

    mask = jnp.tril(jnp.ones((2, 4, 6)))
    for module in (
        nn.Conv(6, (2,), mask=mask, bias_init=BIAS),
        nn.ConvTranspose(6, (2,), mask=mask, use_bias=False),
        nn.Conv(6, (2,), conv_general_dilated=convolution),
        nn.Conv(6, (2,), conv_general_dilated_cls=lambda: convolution),
    ):
        assert_same_function(module, images(2, 5, 4))
    for module in (nn.Dense(6, dot_general=product), nn.Dense(6, dot_general_cls=lambda: product)):
        assert_same_function(module, images(2, 4))
    assert len(calls) == 4 * 4  # at init, dense twice, and converted


class Net(nn.Module):
    """Submodules by name, by attribute and in a list, BatchNorm, dropout, an embedding, and a layer called twice."""

    def setup(self):
        self.stem = nn.Conv(4, (3, 3), use_bias=False)
        self.norm = nn.BatchNorm(momentum=0.9)
        self.blocks = [nn.remat(nn.Conv)(4, (2, 2)), nn.Dense(4)]
        self.embed = nn.Embed(5, 4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Dense(3)

    def __call__(self, x, training=False):
        x = nn.relu(self.norm(self.stem(x), use_running_average=not training))
        x = self.blocks[0](self.blocks[0](x)) + self.embed(jnp.array(2))
        x = self.dropout(self.blocks[1](x), deterministic=not training)
        return self.head(x.mean((1, 2)))

    def features(self, x):
        return self.stem(x)


def test_a_whole_model_with_state_rngs_and_methods():
    net, x = Net(), images(2, 5, 5, 3)
    variables = initialized(net, x)
    params = linen.tuckerize_params(variables["params"], {"head": "dense", ".*": None})
    assert set(tdlrt_jax.kernel_paths(params)) == {"blocks_0/kernel", "blocks_1/kernel", "stem/kernel"}
    assert params["embed"]["embedding"].shape == (5, 4)
    converted = {**variables, "params": params}
    options = {"training": True, "rngs": {"dropout": jax.random.key(3)}, "mutable": ["batch_stats"]}
    (expected, state), (found, found_state) = (
        net.apply(variables, x, **options),
        linen.apply(net, converted, x, **options),
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found_state, state)
    np.testing.assert_allclose(
        linen.apply(net, converted, x, method="features"), net.apply(variables, x, method=net.features), atol=1e-5
    )
    _, captured = linen.apply(net, converted, x, mutable=["intermediates"], capture_intermediates=True)
    assert set(captured["intermediates"]) >= {"stem", "head", "blocks_0"}
    with nn.intercept_methods(linen.tucker_interceptor):
        np.testing.assert_allclose(net.bind(converted)(x), net.apply(variables, x), atol=1e-5)


def test_gradients_are_those_of_theorem_1(x64):
    """Against the chart's dense formula, through the dense model."""
    net, x = Net(), images(2, 5, 5, 3)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), initialized(net, x))
    params = linen.tuckerize_params(variables["params"], {"stem": (2, None, 2, 3), ".*": 2})

    def loss(params, run):
        return jnp.sum(jnp.sin(run(net, {**variables, "params": params}, x)))

    def through_dense(net, variables, x):
        return net.apply({**variables, "params": linen.densify_params(variables["params"])}, x)

    value, grads = tdlrt_jax.value_and_grad(loss)(params, linen.apply)
    expected_value, expected = tdlrt_jax.value_and_grad(loss)(params, through_dense)
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), grads, expected)
    plain = jax.grad(loss)(params, linen.apply)  # TuckerTensors themselves: the ordinary factor gradients
    expected = jax.grad(loss)(params, through_dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), plain, expected)


def test_training_steps_of_an_unmodified_model_with_batch_statistics():
    net, x = Net(), images(8, 5, 5, 3)
    labels = jnp.arange(8) % 3
    variables = initialized(net, x)
    params = linen.tuckerize_params(variables["params"], {"stem|blocks": 0.75})
    original = jax.tree.map(np.array, variables["params"])

    def loss_fn(params, batch_stats, key, x, labels):
        logits, state = linen.apply(
            net,
            {"params": params, "batch_stats": batch_stats},
            x,
            training=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, state["batch_stats"]

    tx = tdlrt_jax.tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.05)
    step = tdlrt_jax.tdlrt_step(loss_fn, tx, has_state=True)
    opt_state, batch_stats, losses = tx.init(params), variables["batch_stats"], []
    before = np.array(batch_stats["norm"]["mean"])
    for _ in range(20):
        params, opt_state, batch_stats, info = step(params, opt_state, batch_stats, jax.random.key(1), x, labels)
        losses.append(float(info.loss))
    assert losses[-1] < 0.7 * losses[0]
    assert info.status == 0
    assert set(info.rank) == {"stem/kernel", "blocks_0/kernel", "blocks_1/kernel"}
    assert not np.allclose(batch_stats["norm"]["mean"], before)
    # The step donated the converted parameters; the original ones are alive.
    jax.tree.map(np.testing.assert_array_equal, variables["params"], original)


def test_kinds_of_trees_are_kept_and_conversion_is_idempotent():
    params = initialized(nn.Dense(4), images(2, 5))["params"]
    frozen = linen.tuckerize_params(freeze(params), {".*": 2})
    assert isinstance(frozen, FrozenDict)
    again = linen.tuckerize_params(frozen, {".*": 1})
    assert again["kernel"].core.shape == (2, 2)
    assert isinstance(linen.densify_params(again), FrozenDict)
    np.testing.assert_allclose(linen.apply(nn.Dense(4), {"params": frozen}, images(2, 5)).shape, (2, 4))
    with_rest = linen.tuckerize_params({"params": {"a": params}}, {"^params/a$": 1})
    assert with_rest["params"]["a"]["kernel"].core.shape == (1, 1)


def test_tolerances_and_fresh_weights():
    params = {name: {"kernel": jax.random.normal(jax.random.key(i), (6, 6)) / 6} for i, name in enumerate("ab")}
    found = linen.tuckerize_params(params, {"a": {"tolerance": 0.3}})["a"]["kernel"]
    error = jnp.linalg.norm(tdlrt_jax.to_dense(found) - params["a"]["kernel"]) / jnp.linalg.norm(params["a"]["kernel"])
    assert found.core.shape[0] < 6
    assert 0 < error <= 0.3
    rules = {".*": {"weights": "fresh", "rank": 2}}
    fresh = linen.tuckerize_params(params, rules, key=jax.random.key(0))
    assert not np.allclose(fresh["a"]["kernel"].core, fresh["b"]["kernel"].core)
    alone = linen.tuckerize_params({"b": params["b"]}, rules, key=jax.random.key(0))
    np.testing.assert_array_equal(alone["b"]["kernel"].core, fresh["b"]["kernel"].core)
    with pytest.raises(ValueError, match="layer 'a': weights='fresh' needs a random key: pass key="):
        linen.tuckerize_params(params, rules)


class Derived(nn.Conv):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x) + 1


def test_derived_layers_keep_what_they_add():
    assert_same_function(Derived(6, (2,), bias_init=BIAS), images(2, 5, 4))
    assert_same_function(Derived(6, (2,), mask=jnp.tril(jnp.ones((2, 4, 6)))), images(2, 5, 4))


def scanned(use_bias, **options):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(4, use_bias=use_bias)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(Block, length=5, **options)()(x, None)[0]

    return Stack()


def test_stacked_kernels_are_refused_clearly():
    x = images(2, 4)
    stacking = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    params = initialized(scanned(True, **stacking), x)["params"]
    with pytest.raises(
        ValueError, match=r"Dense_0': its kernel of shape \(5, 4, 4\) and bias of shape \(5, 4\) are stacks"
    ):
        linen.tuckerize_params(params, {".*": 2})
    linen.tuckerize_params({**params, "head": {"kernel": jnp.ones((3, 2))}}, {"head": 1, ".*": "dense"})
    without_bias = scanned(False, **stacking)
    params = linen.tuckerize_params(initialized(without_bias, x)["params"], {".*": (4, 4, 4)})
    with pytest.raises(
        ValueError, match=r"Dense_0' has a Tucker kernel.* expected a kernel of shape \(4, 4\)\. .*nn\.scan"
    ):
        linen.apply(without_bias, {"params": params}, x)
    ensemble = nn.vmap(nn.Dense, axis_size=5, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True})(
        4, use_bias=False
    )
    params = linen.tuckerize_params(initialized(ensemble, x)["params"], {".*": (4, 4, 4)})
    with pytest.raises(ValueError, match=r"VmapDense runs layers whose parameters nn\.scan or nn\.vmap has stacked"):
        linen.apply(ensemble, {"params": params}, x)


def test_a_loop_over_one_layers_weights_is_no_stack():
    shared = scanned(True, variable_broadcast="params", split_rngs={"params": False})
    assert_same_function(shared, images(2, 4))


def test_layers_that_cannot_use_a_tucker_kernel_are_named():
    x = images(2, 3, 4)
    general = nn.DenseGeneral(5, axis=(1, 2), use_bias=False)
    params = linen.tuckerize_params(initialized(general, x)["params"], {".*": 2})
    with pytest.raises(ValueError, match=r"layer '' is an nn\.DenseGeneral, which cannot use a Tucker kernel"):
        linen.apply(general, {"params": params}, x)
    local = nn.ConvLocal(5, (2,), use_bias=False)
    params = linen.tuckerize_params(initialized(local, x)["params"], {".*": 2})
    with pytest.raises(ValueError, match=r"nn\.ConvLocal, which cannot"):
        linen.apply(local, {"params": params}, x)
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    params = initialized(attention, x)["params"]
    with pytest.raises(ValueError, match=r"'query' is found in no layer's path; the paths are \['out'\]"):
        linen.tuckerize_params(params, {"query": 2})  # its bias shows that it is no convolution


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"Conv": 1}, "'Conv' is found in no layer's path; the paths are ['a/Dense_0']"),
        ({"Dense": (2, 9)}, "layer 'a/Dense_0': rank=9 for mode 1"),
        ({"Dense": "sparse"}, "rules['Dense']"),
    ],
)
def test_mistakes_name_the_layer_or_the_pattern(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        linen.tuckerize_params({"a": {"Dense_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}}, rules)


def test_parameters_that_cannot_be_converted():
    with pytest.raises(ValueError, match=r"params has no kernels.*got the keys \['scale'\]"):
        linen.tuckerize_params({"scale": jnp.ones(3)}, {".*": 1})
    boxed = {"a": {"kernel": nn.Partitioned(jnp.ones((2, 2)), names=("x", "y"))}}
    with pytest.raises(ValueError, match=r"layer 'a': its kernel is boxed"):
        linen.tuckerize_params(boxed, {".*": 1})
    params = linen.tuckerize_params({"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, {".*": 1})
    with pytest.raises(ValueError, match=r"expected a kernel of shape \(5, 4\)"):
        linen.apply(nn.Dense(4), {"params": params}, images(2, 5))


def test_layers_whose_weights_are_normalized_are_refused_clearly():
    params = nn.WeightNorm(nn.Dense(3)).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    with pytest.raises(ValueError, match=r"'layer_instance' is in an nn.WeightNorm.*'dense'"):
        linen.tuckerize_params(params, {".*": 2})
