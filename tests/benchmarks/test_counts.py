"""What is exact about the cost of a step: convolutions and their work in the compiled program, bytes of state."""

import functools
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import tdlrt_jax
from benchmarks.counts import count
from benchmarks.methods import tree_bytes
from benchmarks.networks import CLASSES, MODELS, Network, compression_of, fraction_for, kernels, tucker_conv
from benchmarks.paper_step import paper_step

# Ranks at which convolutions are not in blocks of pixels, which is more work.
LAYERS, CHANNELS, RANK, IMAGES, SIDE = 2, 48, 12, 4, 8
# Multiply-adds of one convolution between the channels in use.
CORE = IMAGES * SIDE**2 * 9 * RANK**2
X = (IMAGES, SIDE, SIDE, CHANNELS)


def loss_fn(params, x):
    for kernel in params.values():
        x = jax.nn.relu(tdlrt_jax.tucker_conv(x, kernel))
    return jnp.sum(x**2)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), LAYERS)
    shape = (3, 3, CHANNELS, CHANNELS)
    return {
        str(i): tdlrt_jax.hosvd(jax.random.normal(k, shape), rank=(None, None, RANK, RANK)) for i, k in enumerate(keys)
    }


def convolutions(step, *arguments):
    found = count(jax.jit(step).lower(*arguments).compile().as_text())
    return found.convolutions, found.convolution_multiply_adds


def tdlrt_convolutions(params, integrator, **options):
    tx = tdlrt_jax.tdlrt(optax.sgd(0.1), tolerance=0.01, integrator=integrator)
    step = tdlrt_jax.tdlrt_step(loss_fn, tx, donate=False, **options)
    return convolutions(step, params, tx.init(params), jnp.ones(X))


def test_a_factorized_step_has_three_small_convolutions_a_layer(params):
    """The last input gradient, the network's own, is among them: it is what the in-channels' factor gets its gradient from."""
    assert convolutions(jax.grad(loss_fn), params, jnp.ones(X)) == (3 * LAYERS, 3 * LAYERS * CORE)


def test_a_dense_steps_convolutions_are_as_many_and_larger(params):
    """Without one: nothing needs the gradient of the images."""
    weights = {name: tdlrt_jax.to_dense(kernel) for name, kernel in params.items()}
    work = (3 * LAYERS - 1) * IMAGES * SIDE**2 * 9 * CHANNELS**2
    assert convolutions(jax.grad(loss_fn), weights, jnp.ones(X)) == (3 * LAYERS - 1, work)


def test_parallel_has_the_convolutions_of_the_factorized_step(params):
    assert tdlrt_convolutions(params, "parallel") == (3 * LAYERS, 3 * LAYERS * CORE)


def test_bug_has_one_more_a_layer_at_twice_the_ranks(params):
    """Instead of the whole second pass, which costs three more."""
    assert tdlrt_convolutions(params, "bug") == (4 * LAYERS, (3 + 4) * LAYERS * CORE)


def test_a_second_pass_has_three_more_a_layer_but_for_the_images_gradient(params):
    """Which the cores' gradients do not need."""
    assert tdlrt_convolutions(params, "bug", second_pass=True)[0] == 6 * LAYERS - 1


def test_the_papers_formulation_has_a_pass_for_each_factor_and_one_for_the_core(params):
    """Here one for each channel mode."""

    def stateless(params, _, x):
        return loss_fn(params, x), ()

    tx = tdlrt_jax.tdlrt(optax.sgd(0.1), tolerance=0.01)
    number, _ = convolutions(paper_step(stateless, tx), params, tx.init(params), (), jnp.ones(X))
    bug, _ = tdlrt_convolutions(params, "bug")
    assert number > bug


@pytest.mark.parametrize("model", MODELS)
def test_state_at_95_percent_is_at_most_a_tenth_of_denses(model):
    """Parameters, gradients and momentum, everything that is not a convolution included; from shapes alone."""
    network = Network(model, compression=0.95)

    def bytes_of(tx, **layers):
        def make():
            return MODELS[model](num_classes=CLASSES, rngs=nnx.Rngs(0), **layers)

        params = nnx.as_pure(nnx.state(nnx.eval_shape(make), nnx.Param))
        return 2 * tree_bytes(params) + tree_bytes(jax.eval_shape(tx.init, params))

    inner = optax.sgd(0.1, momentum=0.9)
    conv = functools.partial(tucker_conv, fraction_for(network), "tucker")
    tucker = bytes_of(tdlrt_jax.tdlrt(inner, tolerance=0.1), conv=conv)
    assert tucker <= 0.1 * bytes_of(inner)


@pytest.mark.parametrize("model, compression", list(itertools.product(MODELS, (0.8, 0.95))))
def test_networks_have_the_compression_they_are_asked_for(model, compression):
    network = Network(model, compression=compression)
    found = compression_of(network, fraction_for(network))
    assert compression <= found < compression + 0.3 * (1 - compression)
    for kernel in kernels(network, fraction_for(network)).values():
        if kernel.core.shape[-2] > 3:  # the first layer's few in-channels bound its other ranks
            assert all(r % 8 == 0 or r < 8 for r in kernel.core.shape[-2:])
