"""Kernels and gradients at the ends of the range of float32, and kernels that are degenerate: the step is right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import TuckerTensor, active_rank, tdlrt, tdlrt_step
from tdlrt_jax.status import NONFINITE, OK, SKIPPED
from tdlrt_jax.tucker import magnitude
from tests.faults.problem import INTEGRATORS, SHAPE, batch, is_finite, loss_fn, parameters, same, superdiagonal
from tests.helpers import dense64, orthonormality, random_kernel

TINY = float(np.finfo(np.float32).tiny)  # the least normal number; XLA flushes smaller ones on the CPU


@functools.cache
def program(integrator, full):
    """At full ranks and without a tolerance a step is one of dense descent, whatever the kernel; else ranks adapt."""
    options = {"tolerance": 0.0} if full else {"tolerance": 0.02, "min_rank": 2}
    tx = tdlrt(optax.sgd(0.5), integrator=integrator, **options)
    return tx, tdlrt_step(loss_fn, tx, donate=False)


def full_kernel(scale=1.0):
    return random_kernel(np.random.default_rng(1), SHAPE, SHAPE, dtype=jnp.float32), scale


def of_rank_one():
    kernel, _ = full_kernel()
    return kernel._replace(core=jnp.zeros_like(kernel.core).at[0, 0, 0].set(2.0)), 1.0


def with_equal_slices():
    kernel, _ = full_kernel()
    return kernel._replace(core=jnp.broadcast_to(kernel.core[:, :, :1], kernel.core.shape)), 1.0


# A kernel at full ranks, and the scale of kernel and target.
KERNELS = {
    "ordinary": full_kernel,
    "zero": lambda: (full_kernel()[0]._replace(core=jnp.zeros(SHAPE)), 1.0),
    "a core of rank one": of_rank_one,
    "equal slices": with_equal_slices,
    "all singular values equal": lambda: (superdiagonal(SHAPE, SHAPE, (1, 1, 1)), 1.0),
    "two pairs of equal ones": lambda: (superdiagonal(SHAPE, SHAPE, (1, 1, 1e-4)), 1.0),
    "1e-20": lambda: full_kernel(1e-20),  # squares vanish
    "1e-30": lambda: full_kernel(1e-30),
    "1e-38": lambda: full_kernel(1e-38),  # at the end of the normal numbers
    "1e-42": lambda: full_kernel(1e-42),  # below it
    "1e17": lambda: full_kernel(1e17),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_a_step_at_full_ranks_is_dense_descent(integrator, name):
    kernel, scale = KERNELS[name]()
    kernel = kernel._replace(core=kernel.core * np.float32(scale))
    tx, step = program(integrator, True)
    params, this = parameters(kernel), batch()
    this = this._replace(target=this.target * np.float32(scale))
    before, target = dense64(kernel), np.asarray(this.target[0], np.float64)
    after, _, info = step(params, tx.init(params), this)
    assert int(info.status) & SKIPPED == OK and orthonormality(after["kernel"]) < 2e-6
    largest = max(np.abs(before).max(), np.abs(target).max())
    np.testing.assert_allclose(
        dense64(after["kernel"]), before - 0.5 * (before - target), rtol=0, atol=3e-6 * largest + 20 * TINY
    )


@pytest.mark.parametrize("largest", [6e-38, 1e-30, 1.0, 8e37, 1e38, 3e38])
def test_a_division_by_the_magnitude_keeps_squares_in_range(largest):
    array = jnp.float32(largest) * jnp.array([1.0, -0.5, 0.0, 0.25])
    quotient = np.asarray(jax.jit(lambda x: x / magnitude(x))(array), np.float64)
    assert 1 - 1e-6 <= quotient[0] <= 16
    np.testing.assert_allclose(quotient / quotient[0], [1, -0.5, 0, 0.25], atol=1e-6)
    assert magnitude(jnp.zeros(3)) == 1 and magnitude(jnp.array([jnp.nan, 1.0])) == 1


@pytest.mark.parametrize("factor", [1.5e38, 3e38])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_numbers_whose_reciprocal_is_not_normal(integrator, factor):
    """From 8.5e37 on it is flushed to zero; where XLA makes a product with it of a division, the kernel would become zero."""
    tx, step = program(integrator, True)
    kernel = TuckerTensor(jnp.zeros(SHAPE), tuple(jnp.eye(n) for n in SHAPE))
    params = parameters(kernel)
    target = np.zeros((2, *SHAPE), np.float32)
    target[:, 0, 1, 2] = 1
    after, _, info = step(params, tx.init(params), batch(first=factor, second=factor, target=target))
    assert int(info.status) & SKIPPED == OK and orthonormality(after["kernel"]) < 2e-6
    np.testing.assert_allclose(dense64(after["kernel"]), 0.5 * factor * target[0], atol=1e-5 * factor)


# Factors of a gradient of size 1, at which a step is at most the factor.
@pytest.mark.parametrize("factor", [1e15, 1e25, 1e30, 1e37, 1e-20, 1e-38, 1e-42])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_gradients_of_any_finite_size(integrator, factor):
    """Their squares overflow or vanish."""
    tx, step = program(integrator, True)
    kernel, _ = full_kernel()
    params = parameters(kernel)
    this = batch(first=factor, second=factor)
    before, target = dense64(kernel), np.asarray(this.target[0], np.float64)
    after, state, info = step(params, tx.init(params), this)
    assert int(info.status) & SKIPPED == OK and is_finite((after, state)) and orthonormality(after["kernel"]) < 2e-6
    gradient = np.float64(np.float32(factor)) * (before - target)
    largest = max(np.abs(before).max(), np.abs(gradient).max())
    np.testing.assert_allclose(dense64(after["kernel"]), before - 0.5 * gradient, rtol=0, atol=3e-6 * largest)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_gradients_at_the_end_of_the_range(integrator):
    """Where intermediate results overflow although the kernel would not, the step is left out."""
    tx, step = program(integrator, True)
    params = parameters(full_kernel()[0])
    state = tx.init(params)
    for factor in (1e38, 3e38):
        after, after_state, info = step(params, state, batch(first=factor, second=factor))
        if int(info.status) == NONFINITE:
            assert same(after, params) and same(after_state.inner, state.inner)
        else:
            assert is_finite(after) and orthonormality(after["kernel"]) < 2e-6
    assert int(info.status) == NONFINITE


def test_a_global_norm_that_overflows_clips_to_nothing():
    """It is optax's own arithmetic, of squares; the page on faults says so."""
    tx = tdlrt(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5)), tolerance=0.0, integrator="parallel")
    params = parameters(full_kernel()[0])
    after, _, info = tdlrt_step(loss_fn, tx, donate=False)(params, tx.init(params), batch(first=1e25))
    assert int(info.status) & SKIPPED == OK
    np.testing.assert_allclose(dense64(after["kernel"]), dense64(params["kernel"]), atol=3e-6)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_a_kernel_that_becomes_zero_comes_back(integrator):
    """Two steps of the whole length towards zero, some at zero itself, then towards a target."""
    tx, step = program(integrator, True)
    params = parameters(full_kernel()[0])
    state = tx.init(params)
    nowhere = batch(first=2.0, second=2.0)._replace(target=jnp.zeros((2, *SHAPE)))
    for _ in range(4):  # W - (W - 0), of which rounding is left, and of that nothing
        params, state, info = step(params, state, nowhere)
        assert (
            int(info.status) & SKIPPED == OK and is_finite((params, state)) and orthonormality(params["kernel"]) < 2e-6
        )
        assert np.all(np.asarray(info.rank["kernel"]) >= 1)
    assert np.abs(dense64(params["kernel"])).max() < 1e-13
    params = params | {"kernel": params["kernel"]._replace(core=jnp.zeros_like(params["kernel"].core))}
    params, state, info = step(params, state, nowhere)  # a zero kernel, a zero gradient
    assert int(info.status) & SKIPPED == OK and not np.any(dense64(params["kernel"]))
    assert orthonormality(params["kernel"]) < 2e-6
    losses = []
    for _ in range(12):
        params, state, info = step(params, state, batch())
        losses.append(float(info.loss))
        assert int(info.status) & SKIPPED == OK and orthonormality(params["kernel"]) < 2e-6
    assert losses[-1] < (0.9 if integrator == "fixed_rank" else 0.1) * losses[0]


STARTS = {
    "zero": lambda: superdiagonal((2, 2, 3), (3, 3, 4), ()),
    "a rank below that of the factors": lambda: superdiagonal((2, 2, 3), (3, 3, 4), (1.0,)),
    "all singular values equal": lambda: superdiagonal((3, 3, 3), (3, 3, 4), (1, 1, 1)),
    "no direction left in a mode": lambda: random_kernel(np.random.default_rng(3), SHAPE, (3, 3, 4), dtype=jnp.float32),
    "tiny": lambda: superdiagonal((3, 3, 3), (3, 3, 4), (1e-30, 1e-34, 1e-38)),
    "denormal": lambda: superdiagonal((3, 3, 3), (3, 3, 4), (1e-40, 1e-42, 1e-44)),
    "spread over the range": lambda: superdiagonal((3, 3, 3), (3, 3, 4), (1.0, 1e-12, 1e-35)),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_degenerate_starts_train(integrator, start):
    tx, step = program(integrator, False)
    params = parameters(STARTS[start]())
    state, losses = tx.init(params), []
    for _ in range(15):
        params, state, info = step(params, state, batch())
        losses.append(float(info.loss))
        assert int(info.status) & SKIPPED == OK and is_finite((params, state))
        assert orthonormality(params["kernel"]) < 2e-6
        rank = np.asarray(active_rank(params["kernel"]))
        assert rank.tolist() == info.rank["kernel"].tolist() and np.all(rank >= 2)
    assert losses[-1] < 0.95 * losses[0] and np.all(np.diff(losses) < 1e-3 * losses[0])


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_a_zero_gradient_moves_nothing(integrator):
    tx, step = program(integrator, True)
    params = parameters(full_kernel()[0])
    state, before = tx.init(params), dense64(params["kernel"])
    for _ in range(10):
        params, state, info = step(params, state, batch(first=0.0, second=0.0))
    assert int(info.status) & SKIPPED == OK
    np.testing.assert_allclose(dense64(params["kernel"]), before, atol=1e-5)
    assert info.rank["kernel"].tolist() == list(SHAPE)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_five_hundred_steps_from_zero_stay_orthonormal(integrator):
    tx, step = program(integrator, False)
    params = parameters(STARTS["zero"]())

    @jax.jit
    def run(params, state, target):
        def body(carry, noise):
            params, state, info = step(*carry, batch()._replace(target=target + noise))
            return (params, state), info.status

        noise = 0.3 * jax.random.normal(jax.random.key(0), (500, *target.shape))
        return jax.lax.scan(body, (params, state), noise)

    (params, state), status = run(params, tx.init(params), batch().target)
    assert int(state.step) == 500 and not np.any(np.asarray(status) & SKIPPED)
    assert orthonormality(params["kernel"]) < 2e-6
