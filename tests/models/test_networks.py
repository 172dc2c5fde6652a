"""VGG16, AlexNet and ResNet18: the published counts of weights, layers to choose, shapes, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax.models import VGG16, AlexNet, ResNet18
from tdlrt_jax.models.width import scaled
from tdlrt_jax.nn import TuckerConv, TuckerLinear

NETWORKS = (VGG16, AlexNet, ResNet18)
TINY = 1 / 32


def params(network, **options):
    """The parameters by path, as shapes without values: nothing is computed."""
    state = nnx.eval_shape(lambda: nnx.state(network(rngs=nnx.Rngs(0), **options), nnx.Param))
    return dict(nnx.to_flat_state(nnx.as_pure(state)))


def kernels(network, **options):
    """The convolutions' kernels, in the order of their paths."""
    found = params(network, **options).items()
    return {path: leaf for path, leaf in found if path[-1] == "kernel" and path[0] != "classifier"}


def weights(network, **options):
    return sum(math.prod(kernel.shape) for kernel in kernels(network, **options).values())


def forward(model, x):
    return nnx.jit(lambda model, x: model(x))(model, x)


# Weights.


@pytest.mark.parametrize(
    ("network", "convolutions", "count"), [(VGG16, 13, 14_710_464), (AlexNet, 5, 2_468_544), (ResNet18, 20, 11_159_232)]
)
def test_convolutions_have_the_published_numbers_of_weights(network, convolutions, count):
    assert len(kernels(network)) == convolutions
    assert weights(network) == count


def test_alexnet_has_the_papers_16_8_percent_of_vgg16s_weights():
    assert round(100 * weights(AlexNet) / weights(VGG16), 1) == 16.8


def test_alexnet_with_small_windows_differs_in_its_first_two_kernels_alone():
    original, small = kernels(AlexNet), kernels(AlexNet, windows=(3,) * 5)
    assert [kernel.shape for path, kernel in small.items() if kernel.shape != original[path].shape] == [
        (3, 3, 3, 64),
        (3, 3, 64, 192),
    ]
    assert weights(AlexNet, windows=(3,) * 5) == 2_250_432
    model = AlexNet(width=TINY, windows=[3, 3, 3, 3, 3], rngs=nnx.Rngs(0))
    assert forward(model, jnp.zeros((2, 32, 32, 3))).shape == (2, 10)


@pytest.mark.parametrize("windows", [3, (3, 3), (11, 5, 3, 3, 2), (11, 5, 3, 3, 0), (11, 5, 3, 3, 3.0), "33333"])
def test_windows_that_cannot_be_are_refused(windows):
    with pytest.raises(ValueError, match=r"windows=.*: expected 5 odd sides of windows, such as \(11, 5, 3, 3, 3\)"):
        AlexNet(width=TINY, windows=windows, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("network", "others"),
    [
        # Scale and shift of the normalizations, and the classifier.
        (VGG16, 2 * 4224 + 512 * 10 + 10),
        (AlexNet, 2 * 1152 + 4 * 256 * 10 + 10),
        (ResNet18, 2 * 4800 + 512 * 10 + 10),
    ],
)
def test_all_parameters(network, others):
    total = sum(math.prod(leaf.shape) for leaf in params(network).values())
    assert total == weights(network) + others
    assert network is not ResNet18 or total == 11_173_962  # as published for images of 32x32 pixels


@pytest.mark.parametrize(
    ("network", "image"),
    [
        (VGG16, (32, 32)),
        (VGG16, (64, 40)),
        (AlexNet, (32, 32)),
        (AlexNet, (48, 16)),
        (ResNet18, (32, 32)),
        (ResNet18, (9, 5)),
    ],
)
def test_every_layer_is_as_large_as_the_published_one(network, image):
    """Sizes of the activations after every convolution, traced and not computed."""
    seen = []

    class Spy(nnx.Conv):
        def __call__(self, x):
            seen.append(super().__call__(x).shape)
            return super().__call__(x)

    def run(x):
        return network(conv=Spy, input_shape=image, num_classes=7, rngs=nnx.Rngs(0))(x)

    assert nnx.eval_shape(run, jax.ShapeDtypeStruct((2, *image, 3), jnp.float32)).shape == (2, 7)
    filters, reductions = {
        VGG16: ([64] * 2 + [128] * 2 + [256] * 3 + [512] * 6, [1] * 2 + [2] * 2 + [4] * 3 + [8] * 3 + [16] * 3),
        AlexNet: ([64, 192, 384, 256, 256], [2, 4, 8, 8, 8]),
        ResNet18: (
            [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5,
            [1] * 5 + [2] * 5 + [4] * 5 + [8] * 5,
        ),
    }[network]
    up = -1 if network is ResNet18 else 1  # its strides round sizes up, poolings round them down
    expected = [(2, *(up * (up * n // r) for n in image), f) for f, r in zip(filters, reductions)]
    assert seen == expected


@pytest.mark.parametrize("network", NETWORKS)
def test_the_width_scales_all_filters_and_nothing_else(network):
    full, half = kernels(network), kernels(network, width=0.5)
    for path, kernel in full.items():
        *window, channels, filters = kernel.shape
        assert half[path].shape == (*window, channels if channels == 3 else channels // 2, filters // 2)
    narrowest = kernels(network, width=0.001).values()
    assert {kernel.shape[-1] for kernel in narrowest} == {1}, "one filter at least"
    with pytest.raises(ValueError, match="width=0: expected a positive factor"):
        network(width=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"width=-0\.5"):
        network(width=-0.5, rngs=nnx.Rngs(0))


def test_widths_round_to_the_nearest_number_of_filters():
    assert [scaled(64, width) for width in (1, 0.3, 1 / 48, 1e-9, 2.0)] == [64, 19, 1, 1, 128]
    with pytest.raises(ValueError, match="width=nan"):
        scaled(64, math.nan)


@pytest.mark.parametrize(
    ("network", "image"), [(VGG16, (31, 32)), (VGG16, (64, 16)), (AlexNet, (15, 32)), (AlexNet, (32, 8))]
)
def test_images_that_are_too_small_are_refused(network, image):
    with pytest.raises(
        ValueError, match=rf"input_shape=\({image[0]}, {image[1]}\) is too small for {network.__name__}"
    ):
        network(input_shape=image, rngs=nnx.Rngs(0))


# Layers to choose.


class Norm(nnx.Module):
    """A normalization of another kind, called as ``nnx.BatchNorm`` is."""

    def __init__(self, features, *, rngs):
        self.marked = nnx.Param(jnp.ones(features))

    def __call__(self, x):
        return x * self.marked.get_value()


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_can_be_exchanged(network):
    dense = params(network, width=TINY)
    found = params(
        network,
        width=TINY,
        conv=functools.partial(TuckerConv, rank=1),
        classifier=functools.partial(TuckerLinear, rank=2),
        norm=Norm,
    )
    tucker = {path: leaf for path, leaf in found.items() if path[-1] == "kernel"}
    assert {path: tdlrt_jax.kernel_shape(kernel) for path, kernel in tucker.items()} == {
        path: leaf.shape for path, leaf in dense.items() if path[-1] == "kernel"
    }
    assert tucker.pop(("classifier", "kernel")).core.shape == (2, 2)
    assert {kernel.core.shape[-2:] for kernel in tucker.values()} == {(1, 1)}
    norms = {path for path in dense if path[-1] == "scale"}
    assert len(norms) == len(tucker) and {(*path[:-1], "marked") for path in norms} == {
        path for path in found if path[-1] == "marked"
    }
    assert {path[-1] for path in found} == {"kernel", "bias", "marked"}
    assert [path for path in found if path[-1] == "bias"] == [("classifier", "bias")], "a normalization has the bias"


@pytest.mark.parametrize("network", NETWORKS)
def test_a_tucker_network_is_the_dense_one_with_its_kernels(network):
    """In training and in evaluation mode, statistics included; every other parameter is drawn alike."""
    options = {"width": TINY, "input_channels": 2, "num_classes": 3, "rngs": nnx.Rngs(0)}
    tucker = network(conv=functools.partial(TuckerConv, rank=(0.7, None, None, 0.6)), **options)
    dense = network(**options | {"rngs": nnx.Rngs(1)})
    state, other = nnx.state(tucker, nnx.Param), nnx.state(dense, nnx.Param)
    is_tucker = lambda node: isinstance(node, tdlrt_jax.TuckerTensor)  # noqa: E731
    as_dense = jax.tree.map(
        lambda leaf: tdlrt_jax.to_dense(leaf) if is_tucker(leaf) else leaf, nnx.as_pure(state), is_leaf=is_tucker
    )
    nnx.update(dense, jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(as_dense)))
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 2))
    for mode in ("train", "eval"):
        for model in (tucker, dense):
            getattr(model, mode)()
        expected = forward(dense, x)
        spread = np.std(expected)
        assert expected.shape == (4, 3) and spread > 1e-3
        np.testing.assert_allclose(forward(tucker, x), expected, atol=1e-3 * spread)
        statistics = [jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.BatchStat))) for model in (tucker, dense)]
        for a, b in zip(*statistics, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_alexnet_without_normalization_has_biases_in_their_place():
    found = params(AlexNet, norm=None, width=TINY)
    convs = {path[:-1] for path in found if path[0] == "convs"}
    assert {path[-1] for path in found} == {"kernel", "bias"}
    assert all((*path, "bias") in found for path in convs) and len(convs) == 5
    assert not any(path[0] == "norms" for path in found)
    model = AlexNet(norm=None, width=TINY, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    x = jax.random.normal(jax.random.key(0), (3, 32, 32, 3))
    # Without batch statistics an image's logits do not depend on the others of its batch.
    np.testing.assert_allclose(forward(model, x)[:1], forward(model, x[:1]), atol=1e-6)


def test_alexnets_dropout_drops_half_of_the_features_in_training_alone():
    options = {"width": TINY, "classifier": lambda *sizes, rngs: lambda features: features}
    plain, dropping = (AlexNet(dropout=rate, rngs=nnx.Rngs(0), **options) for rate in (0.0, 0.5))
    x = jax.random.normal(jax.random.key(0), (16, 32, 32, 3))
    features, first, second = forward(plain, x), forward(dropping, x), forward(dropping, x)
    assert features.shape == (16, 4 * 8)
    kept = first != 0
    np.testing.assert_allclose(first, 2 * features * kept, rtol=1e-5)
    assert 0.4 < np.mean(kept[features != 0]) < 0.6
    assert np.any(first != second), "every call draws anew"
    for model in (plain, dropping):
        model.eval()
    nnx.update(dropping, nnx.state(plain, nnx.BatchStat))
    np.testing.assert_array_equal(forward(dropping, x), forward(plain, x))


# Hidden layers.


@pytest.mark.parametrize(("network", "features"), [(VGG16, 512), (AlexNet, 1024)])
def test_the_originals_hidden_layers_can_be_asked_for(network, features):
    plain, found = params(network), params(network, hidden=(4096, 4096))
    hidden = {path: leaf.shape for path, leaf in found.items() if path[0] == "hidden"}
    assert hidden == {
        ("hidden", 0, "kernel"): (features, 4096),
        ("hidden", 0, "bias"): (4096,),
        ("hidden", 1, "kernel"): (4096, 4096),
        ("hidden", 1, "bias"): (4096,),
    }
    assert found["classifier", "kernel"].shape == (4096, 10)
    assert {path for path in found if path[0] not in ("hidden", "classifier")} == {
        path for path in plain if path[0] != "classifier"
    }


def dropped(network, layer, **options):
    """What share of the inputs of ``layer``, "hidden" or "classifier", is dropped in training; these are all positive."""
    shares = {}

    def spy(name):
        def build(inputs, outputs, *, rngs):
            def call(x):
                shares[name] = np.mean(np.asarray(x) == 0)
                return jnp.ones((x.shape[0], outputs))

            return call

        return build

    norm = lambda features, rngs: lambda x: jnp.ones_like(x)  # noqa: E731
    model = network(
        width=1.0, linear=spy("hidden"), classifier=spy("classifier"), norm=norm, rngs=nnx.Rngs(0), **options
    )
    model(jnp.ones((4, 32, 32, 3)))
    return shares.get(layer)


@pytest.mark.parametrize("network", [VGG16, AlexNet])
def test_dropout_is_where_the_original_has_it(network):
    """Of AlexNet before hidden layers, of VGG16 after them; without any, before the classifier."""
    cheap = {"conv": lambda channels, filters, *, rngs, strides=(1, 1), **_: _strided(filters, strides)}
    rate = functools.partial(dropped, network, dropout=0.25, **cheap)
    assert rate("hidden") is None
    assert 0.2 < rate("classifier") < 0.3
    for layer, drops in (("hidden", network is AlexNet), ("classifier", network is VGG16)):
        share = rate(layer, hidden=(1000,))
        assert 0.2 < share < 0.3 if drops else share == 0, layer
    assert dropped(network, "classifier", **cheap) == 0


def _strided(filters, strides):
    """Stands for a convolution where only shapes matter."""
    return lambda x: jnp.ones((*x[:, :: strides[0], :: strides[1]].shape[:3], filters))


@pytest.mark.parametrize("network", [VGG16, AlexNet])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 4096}, r"hidden=4096: expected units of hidden layers, 1 or more"),
        ({"hidden": (64, 0)}, r"hidden=\(64, 0\): expected units of hidden layers, 1 or more"),
        ({"dropout": 1.0}, r"dropout=1\.0: expected a rate in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0\.1: expected a rate in \[0, 1\)"),
        ({"dropout": "half"}, r"dropout='half': expected a rate in \[0, 1\)"),
    ],
)
def test_hidden_layers_and_rates_that_cannot_be_are_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        network(width=TINY, rngs=nnx.Rngs(0), **options)


def test_networks_without_dropout_have_no_random_state():
    model = VGG16(width=TINY, hidden=(8,), rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
