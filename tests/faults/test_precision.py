"""Cores and other parameters in 16 bits beside factors in 32: a step computes in 32 and rounds once, at its end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import (
    TuckerTensor,
    active_rank,
    canonicalize,
    describe_status,
    hosvd,
    lift,
    tdlrt,
    tdlrt_step,
    to_dense,
    tucker_linear,
    value_and_grad,
)
from tdlrt_jax.status import NONFINITE, OK, SKIPPED
from tests.faults.problem import SHAPE, Batch, batch, is_finite, loss_fn, parameters, same, without_report
from tests.helpers import dense64, orthonormality, random_kernel

HALVES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}
PAIRS = [("bug", "bfloat16"), ("bug", "float16"), ("parallel", "bfloat16"), ("fixed_rank", "float16")]


def narrow(params, dtype):
    """Cores and all that is no kernel in 16 bits; factors stay."""

    def cast(node):
        return node._replace(core=node.core.astype(dtype)) if isinstance(node, TuckerTensor) else node.astype(dtype)

    return jax.tree.map(cast, params, is_leaf=lambda node: isinstance(node, TuckerTensor))


def wide(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


@functools.cache
def program(integrator, **options):
    tx = tdlrt(optax.sgd(0.2, momentum=0.5), tolerance=0.05, integrator=integrator)
    return tx, tdlrt_step(loss_fn, tx, donate=False, **options)


@pytest.mark.parametrize(("integrator", "dtype"), PAIRS)
def test_a_step_is_that_of_float32_rounded_once(integrator, dtype):
    """Momentum included: its moments are float32, and live in the frame at the rounded core."""
    tx, step = program(integrator)
    params = narrow(parameters(), HALVES[dtype])
    state = tx.init(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.inner[0].trace["kernel"]))
    for number in range(3):
        exact = wide(params)
        expected, _, _ = step(exact, jax.tree.map(lambda a, b: a.astype(b.dtype), state, tx.init(exact)), batch(number))
        params, state, info = step(params, state, batch(number))
        assert int(info.status) & SKIPPED == OK and orthonormality(params["kernel"]) < 2e-6
        assert params["kernel"].core.dtype == params["bias"].dtype == HALVES[dtype]
        assert {u.dtype for u in params["kernel"].factors} == {jnp.dtype(jnp.float32)}
        eps = float(jnp.finfo(HALVES[dtype]).eps)
        rounded = np.asarray(expected["kernel"].core, np.float64)
        np.testing.assert_allclose(
            np.asarray(params["kernel"].core, np.float64), rounded, rtol=0.51 * eps, atol=1e-5 * np.abs(rounded).max()
        )
        for u, v in zip(params["kernel"].factors, expected["kernel"].factors):
            np.testing.assert_allclose(u, v, atol=2e-5)


@pytest.mark.parametrize(("integrator", "dtype"), PAIRS)
def test_training_follows_float32_to_the_rounding_of_the_core(integrator, dtype):
    tx, step = program(integrator)
    start = narrow(parameters(), HALVES[dtype])
    ends = []
    for params in (start, wide(start)):
        state, losses = tx.init(params), []
        for _ in range(25):
            params, state, info = step(params, state, batch())
            losses.append(float(info.loss))
        ends.append((dense64(wide(params)["kernel"]), losses[-1]))
        assert losses[-1] < 0.8 * losses[0]
        assert orthonormality(params["kernel"]) < 2e-6 and np.all(active_rank(params["kernel"]) >= 1)
    (low, loss), (high, expected) = ends
    eps = float(jnp.finfo(HALVES[dtype]).eps)
    assert abs(loss - expected) < 4 * eps * expected
    assert np.linalg.norm(low - high) < 10 * eps * np.linalg.norm(high)


@pytest.mark.parametrize("integrator", ["bug", "fixed_rank"])
def test_a_core_that_overflows_in_float16_is_left_as_it_was(integrator):
    """The step is finite in float32, in which it is computed, but not in what the core is stored in; a bias likewise."""
    tx, step = program(integrator)
    params = narrow(parameters(), jnp.float16)
    state = tx.init(params)
    for wrong in ({"first": 1e7, "second": 1e7}, {"bias": 6e4 * 2}):
        after, after_state, info = step(params, state, batch(**wrong))
        assert int(info.status) == NONFINITE and np.isfinite(info.loss)
        assert same(after, params) and same(without_report(after_state), without_report(state))


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_over_micro_batches_are_wide(dtype):
    """Two gradients of 40,000 in float16: their sum is infinite in it, their mean is not."""
    tx, step = program("bug", accumulate=2)
    params = narrow(parameters(), HALVES[dtype])
    this = batch()._replace(bias=jnp.array([4e4, 4e4]), loss=jnp.array([5e4, 5e4]))
    after, _, info = step(params, tx.init(params), this)
    assert int(info.status) & SKIPPED == OK and is_finite(after)
    assert after["bias"].dtype == HALVES[dtype]
    np.testing.assert_allclose(np.asarray(after["bias"], np.float64), -0.2 * 4e4, rtol=1e-2)


def test_loss_scaling_in_float16():
    """A network that computes in float16, with a scale that is halved whenever a step is left out.

    The scale is undone inside of tdlrt, so both gradients of a step pass there.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    y = 1e-5 * jnp.asarray(
        rng.normal(size=(16, 5)), jnp.float32
    )  # gradients of 1e-6 and below, which float16 flushes or rounds
    kernel = random_kernel(rng, (6, 5), (3, 3), dtype=jnp.float32)
    params = {"kernel": kernel._replace(core=1e-5 * kernel.core)}

    def loss(params, scale, dtype):
        error = tucker_linear(x.astype(dtype), params["kernel"]).astype(jnp.float32) - y
        return (scale * jnp.mean((error * 100) ** 2)).astype(dtype)

    def build(dtype):
        inner = optax.chain(optax.inject_hyperparams(optax.scale)(step_size=1.0), optax.sgd(1e-5))
        tx = tdlrt(inner, tolerance=0.01)
        return tx, tdlrt_step(functools.partial(loss, dtype=dtype), tx, donate=False)

    def with_scale(state, scale):
        scaled, *rest = state.inner
        return state._replace(inner=(scaled._replace(hyperparams={"step_size": jnp.float32(1 / scale)}), *rest))

    tx, exact = build(jnp.float32)
    expected, _, _ = exact(params, with_scale(tx.init(params), 1.0), jnp.float32(1.0))
    tx, step = build(jnp.float16)
    scale, state, skipped = 2.0**40, tx.init(params), 0
    for _ in range(40):
        after, state, info = step(params, with_scale(state, scale), jnp.float32(scale))
        if int(info.status) & NONFINITE == 0:
            break
        assert same(after, params) and int(info.skipped) == skipped + 1
        assert "loss scale" in describe_status(info.status)[0]
        scale, skipped = scale / 2, skipped + 1
    assert skipped > 3 and int(info.skipped) == 0
    moved = np.linalg.norm(dense64(expected["kernel"]) - dense64(params["kernel"]))
    error = np.linalg.norm(dense64(after["kernel"]) - dense64(expected["kernel"]))
    assert moved > 0.01 * np.linalg.norm(dense64(params["kernel"])) and error < 0.02 * moved


@pytest.mark.parametrize("dtype", HALVES)
def test_the_pieces(dtype, rng):
    half, shape = HALVES[dtype], (6, 5)
    weights = jnp.asarray(rng.normal(size=shape), half)
    kernel = hosvd(weights, rank=3)
    assert kernel.core.dtype == half and {u.dtype for u in kernel.factors} == {jnp.dtype(jnp.float32)}
    assert orthonormality(kernel) < 1e-5
    frame = lift(kernel)
    assert {leaf.dtype for leaf in jax.tree.leaves(frame)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(to_dense(frame), to_dense(kernel), atol=1e-5)
    value, grads = value_and_grad(lambda kernel: jnp.sum(to_dense(kernel) ** 2))(kernel)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(grads.core, 2 * np.asarray(kernel.core, np.float32), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, np.sum(dense64(kernel) ** 2), rtol=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
def test_factors_in_16_bits_are_refused_with_the_remedy(dtype, rng):
    kernel = random_kernel(rng, (6, 5), (3, 3), dtype=jnp.float32)
    half = jax.tree.map(lambda leaf: leaf.astype(HALVES[dtype]), kernel)
    tx = tdlrt(optax.sgd(0.1), tolerance=0.1)
    with pytest.raises(ValueError, match=f"kernel 'w': factor 0 has dtype {dtype}: .*canonicalize"):
        tx.init({"w": half})
    repaired = canonicalize(half)
    assert repaired.core.dtype == HALVES[dtype] and orthonormality(repaired) < 2e-6
    np.testing.assert_allclose(dense64(wide(repaired)), dense64(wide(half)), atol=0.02)
    tx.init({"w": repaired})
    with pytest.raises(
        ValueError, match="kernel 'w': its core has dtype float8_e5m2, expected a floating one of 16 bits"
    ):
        tx.init({"w": kernel._replace(core=kernel.core.astype(jnp.float8_e5m2))})


def test_a_layer_counts_a_narrow_core_as_its_parameters():
    """In training and without it the dtype of the computation is the same."""
    from flax import nnx

    from tdlrt_jax.nn import TuckerLinear

    layer = TuckerLinear(6, 5, rank=2, use_bias=False, rngs=nnx.Rngs(0))
    kernel = layer.kernel.get_value()
    x = jnp.ones((2, 6), jnp.bfloat16)
    before = layer(x)
    layer.kernel.set_value(kernel._replace(core=kernel.core.astype(jnp.bfloat16)))
    assert before.dtype == layer(x).dtype == jnp.float32
    np.testing.assert_allclose(layer(x), before, atol=0.02)


def test_batches_are_what_they_seem():
    """The factors of a batch multiply to one but for what is wrong, and its loss is the plain one."""
    params, this = parameters(), batch()
    assert isinstance(this, Batch) and this.target.shape == (2, *SHAPE)
    expected = 0.5 * np.sum((dense64(params["kernel"]) - np.asarray(this.target[0])) ** 2)
    np.testing.assert_allclose(loss_fn(params, this), expected, rtol=1e-5)
    _, grads = value_and_grad(loss_fn)(params, batch(first=3.0, bias=2.0))
    _, plain = value_and_grad(loss_fn)(params, this)
    np.testing.assert_allclose(grads["kernel"].core, 3 * plain["kernel"].core, rtol=1e-5, atol=1e-5)
    assert grads["bias"].tolist() == [2.0, 2.0, 2.0]
