"""Options, kernels and inner transformations that cannot work are refused, with the reason and the kernel's name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import TuckerTensor, tdlrt, to_dense, value_and_grad
from tests.helpers import random_kernel, regression


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"tolerance": 1.5}, "below 1"),
        ({"tolerance": 0.1, "integrator": "euler"}, "integrator='euler' is unknown"),
        ({"tolerance": 0.1, "criterion": "all"}, "criterion='all' is unknown"),
        ({"tolerance": 0.1, "convention": "none"}, "convention='none' is unknown"),
        ({"tolerance": 0.1, "spare": -1}, "spare=-1"),
        ({"tolerance": 0.1, "warmup": -1}, "warmup=-1"),
        ({"tolerance": 0.1, "adapt_every": 0}, "adapt_every=0"),
    ],
)
def test_bad_options_raise_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        tdlrt(optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_rank": 0}, "first/kernel.*min_rank=0"),
        ({"max_rank": (2, 2)}, "max_rank.*2 entries"),
        ({"min_rank": 3, "max_rank": 2}, "max_rank=2.*below its min_rank=3"),
        ({"max_rank": {"third": 2}}, "'third' is found in no kernel's path"),
    ],
)
def test_bad_bounds_raise_at_init_naming_the_kernel(options, message):
    params, _ = regression()
    with pytest.raises(ValueError, match=message):
        tdlrt(optax.sgd(0.1), tolerance=0.1, **options).init(params)


def corrupt(kernel, name):
    core, factors = kernel
    return {
        "order": TuckerTensor(core, factors[:1]),
        "shape": TuckerTensor(core, (factors[0][:, :1], factors[1])),
        "integer": TuckerTensor(core.astype(int), factors),
        "half": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), kernel),
        "skewed": TuckerTensor(core, (2 * factors[0], factors[1])),
        "gap": TuckerTensor(core, (factors[0].at[:, 0].set(0), factors[1])),
        "wide": TuckerTensor(jnp.zeros((1, 2)), (factors[0][:, :1], factors[1])),
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("order", "2 modes and 1 factors"),
        ("shape", "factor 0 has shape"),
        ("integer", "dtype int32"),
        ("half", "dtype bfloat16"),
        ("skewed", "not orthonormal"),
        ("gap", "they come first"),
        ("wide", "exceeds the product 1 of the others"),
    ],
)
def test_bad_kernels_raise_at_init_naming_the_kernel(rng, name, message):
    kernel = random_kernel(rng, (6, 5), (2, 2))
    with pytest.raises(ValueError, match=f"kernel 'w'.*{message}"):
        tdlrt(optax.sgd(0.1), tolerance=0.1).init({"w": corrupt(kernel, name)})


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (optax.adafactor(0.1, min_dim_size_to_factor=2), "FactoredState"),
        (optax.contrib.schedule_free_sgd(0.1), "ScheduleFreeState"),
        (optax.contrib.prodigy(), "ProdigyState"),
    ],
)
def test_inner_states_that_cannot_follow_a_change_of_basis_raise_at_init(rng, inner, message):
    with pytest.raises(ValueError, match=message):
        tdlrt(inner, tolerance=0.1).init({"w": random_kernel(rng, (6, 5, 4), (2, 2, 2))})


def test_labels_that_split_a_kernel_raise_at_init(rng):
    split = optax.partition(
        {"matrix": optax.adam(0.1), "other": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "other", params),
    )
    with pytest.raises(ValueError, match="one label"):
        tdlrt(split, tolerance=0.1).init({"w": random_kernel(rng, (6, 5, 4), (2, 2, 2))})


def test_missing_arguments_are_explained(rng):
    params, loss = regression()
    tx = tdlrt(optax.sgd(0.1), tolerance=0.1)
    _, grads = value_and_grad(loss)(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(grads, tx.init(params))
    with pytest.raises(ValueError, match="value_and_grad_fn="):
        tx.update(grads, tx.init(params), params)
    dense = jax.grad(lambda w: jnp.sum(w**2))(to_dense(params["second"]["kernel"]))
    with pytest.raises(ValueError, match="'second/kernel' is a TuckerTensor"):
        tx.update({**grads, "second": {"kernel": dense}}, tx.init(params), params, value_and_grad_fn=lambda p: (0, p))


def test_a_kernel_masked_in_parts_is_explained(rng):
    tx = optax.masked(
        tdlrt(optax.sgd(0.1), tolerance=0.1), lambda params: jax.tree.map(lambda leaf: leaf.ndim == 3, params)
    )
    with pytest.raises(ValueError, match="MaskedNode where an array belongs"):
        tx.init({"w": random_kernel(rng, (6, 5, 4), (2, 2, 2))})


def test_a_state_of_other_kernels_is_explained(rng):
    params = {"a": random_kernel(rng, (5, 4), (2, 2), dtype=np.float32)}
    tx = tdlrt(optax.sgd(0.1), tolerance=0.1, integrator="parallel")
    state = tx.init({"b": params["a"]})
    with pytest.raises(ValueError, match=r"state is of the kernels \['b'\], params has \['a'\].*tdlrt_jax.nn.tdlrt"):
        tx.update(params, state, params)
