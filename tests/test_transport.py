"""Moments are one tangent vector; transport is its orthogonal projection onto the next tangent space."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import TuckerTensor, lift, resize, tdlrt, to_dense, value_and_grad
from tdlrt_jax.integrators import augment, embed
from tdlrt_jax.transport import embed_moment, transport, transport_squares
from tdlrt_jax.truncation import truncate
from tdlrt_jax.tucker import active_columns
from tests import references
from tests.helpers import random_kernel, tangent_to_dense


def change_of_bases(rng, whole=False):
    """A frame, augmented bases from some step, and the kernel after a truncation that drops and adds directions."""
    rank = (2, 3, None, 3) if whole else (2, 3, 2, 3)
    kernel = random_kernel(rng, (5, 6, 3, 7), rank)
    frame = lift(kernel)

    def noise(leaf):
        return jnp.array(rng.normal(size=leaf.shape))

    step = jax.tree.map(noise, TuckerTensor(frame.core, frame.K))
    step = step._replace(
        factors=tuple(None if u is None else active_columns(u) * k for u, k in zip(frame.U, step.factors))
    )
    augmented = augment(frame, step)
    core = augmented.core + 0.3 * embed(step, augmented)
    cut = truncate(core, 0.3, capacity=kernel.core.shape, whole=tuple(u is None for u in frame.U))
    factors = tuple(None if p is None else b @ p for b, p in zip(augmented.bases, cut.rotations))
    moment = jax.tree.map(noise, TuckerTensor(frame.core, frame.K))
    mask = lift(kernel).core != 0
    active = tuple(None if u is None else active_columns(u) * k for u, k in zip(frame.U, moment.factors))
    return (
        frame,
        augmented,
        cut.rotations,
        lift(TuckerTensor(cut.core, factors)),
        TuckerTensor(moment.core * mask, active),
    )


@pytest.mark.parametrize("whole", [False, True])
def test_transport_is_the_orthogonal_projection(x64, rng, whole):
    """Also of the part that the augmented bases do not hold."""
    frame, augmented, rotations, new, moment = change_of_bases(rng, whole=whole)
    vector = tangent_to_dense(moment, frame)
    carried = transport(embed(moment, augmented), moment.factors, augmented, rotations, new)
    expected = references.projected_gradient(
        np.asarray(new.core), [None if u is None else np.asarray(u) for u in new.U], np.asarray(vector)
    )
    np.testing.assert_allclose(tangent_to_dense(carried, new), expected, atol=1e-11)
    assert np.linalg.norm(expected) < np.linalg.norm(vector)
    for u, k in zip(new.U, carried.factors):
        if u is not None:
            np.testing.assert_allclose(u.T @ k, 0, atol=1e-12)


def test_squares_stay_nonnegative_and_never_grow(x64, rng):
    _, augmented, rotations, new, moment = change_of_bases(rng)
    squares = jax.tree.map(lambda leaf: leaf**2, moment)
    core = embed_moment(squares, augmented, "squared")
    carried = transport_squares(core, squares.factors, augmented, rotations, new)
    largest = max(float(leaf.max()) for leaf in jax.tree.leaves(squares))
    for leaf in jax.tree.leaves(carried):
        assert (leaf >= 0).all() and leaf.max() <= largest * (1 + 1e-12)


def test_second_moments_of_what_is_new_are_the_average_of_the_core(x64, rng):
    """Also where averages over other bases left less; the padding stays zero."""
    frame, augmented, rotations, new, moment = change_of_bases(rng)
    squares = jax.tree.map(lambda leaf: leaf**2, moment)
    core = np.asarray(embed_moment(squares, augmented, "squared"))
    average = np.asarray(squares.core)[np.asarray(frame.core) != 0].mean()
    old = tuple(slice(n) for n in frame.core.shape)
    for mode, basis in enumerate(augmented.bases):
        exists = np.asarray(active_columns(basis))
        assert (np.take(core, np.flatnonzero(~exists), axis=mode) == 0).all()
    mixed = core[-1, -1]
    assert np.isclose(mixed[mixed > 0], average).all() and (mixed > 0).any()
    assert (core[old][np.asarray(frame.core) != 0] >= average).all()
    carried = transport_squares(core, squares.factors, augmented, rotations, new)
    least = float(carried.core[new.core != 0].min())
    assert least > 0 and (carried.core[new.core == 0] == 0).all()
    for u, k in zip(new.U, carried.factors):
        assert (k[:, active_columns(u)] >= least).all() and (k[:, ~active_columns(u)] == 0).all()


# Heavy ball on a loss with a known optimum of low rank


SHAPE, RANK = (4, 5, 6, 7), (2, 2, 3, 3)


def heavy_ball_problem():
    rng = np.random.default_rng(0)
    optimum = references.to_dense(*references.tucker_random(SHAPE, RANK, seed=1))
    weights = rng.uniform(0.5, 2, size=SHAPE)
    start = optimum + 0.3 * rng.normal(size=SHAPE)
    core, bases = references.truncate(start, 0.0)
    core, bases = core[tuple(slice(r) for r in RANK)], [u[:, :r] for u, r in zip(bases, RANK)]
    kernel = TuckerTensor(jnp.array(core), tuple(map(jnp.array, bases)))

    def loss(kernel):
        return jnp.sum(jnp.asarray(weights) * jnp.log(jnp.cosh(to_dense(kernel) - optimum)))

    return loss, lambda dense: weights * np.tanh(dense - optimum), kernel, optimum


def distance_after(tx, loss, kernel, optimum, steps, move=None):
    gradient = value_and_grad(loss)

    @jax.jit
    def run(kernel, state):
        def body(carry, _):
            kernel, state = carry
            _, grads = gradient(kernel)
            updates, state = tx.update(grads, state, kernel, value_and_grad_fn=gradient)
            state = state if move is None else move(state)
            return (optax.apply_updates(kernel, updates), state), None

        (kernel, state), _ = jax.lax.scan(body, (kernel, state), None, length=steps)
        return jnp.linalg.norm(to_dense(kernel) - optimum) / jnp.linalg.norm(optimum)

    return float(run(kernel, tx.init(kernel)))


@pytest.mark.parametrize("integrator", ["bug", "parallel", "fixed_rank"])
def test_heavy_ball_reaches_a_low_rank_optimum_as_dense_heavy_ball_does(x64, integrator):
    loss, grad, kernel, optimum = heavy_ball_problem()
    dense = references.heavy_ball(np.asarray(to_dense(kernel)), grad, 0.02, 0.9, 300)
    reached = np.linalg.norm(dense - optimum) / np.linalg.norm(optimum)
    bound = None if integrator == "fixed_rank" else RANK
    tx = tdlrt(optax.sgd(0.02, momentum=0.9), tolerance=1e-8, integrator=integrator, max_rank=bound)
    distance = distance_after(tx, loss, kernel, optimum, 300)
    assert reached < 5e-7
    assert distance < 2 * reached


def test_without_transport_of_the_k_moments_heavy_ball_lags(x64):
    """What the transport is for: with the moments of the bases forgotten each step, descent is as slow as plain descent there."""
    loss, _, kernel, optimum = heavy_ball_problem()
    tx = tdlrt(optax.sgd(0.02, momentum=0.9), tolerance=1e-8, max_rank=RANK)

    def forget(state):
        trace = state.inner[0].trace
        trace = trace._replace(factors=jax.tree.map(jnp.zeros_like, trace.factors))
        return state._replace(inner=(state.inner[0]._replace(trace=trace), *state.inner[1:]))

    carried = distance_after(tx, loss, kernel, optimum, 200)
    forgotten = distance_after(tx, loss, kernel, optimum, 200, forget)
    assert forgotten > 5 * carried


@pytest.mark.parametrize("integrator", ["bug", "parallel", "fixed_rank"])
@pytest.mark.parametrize("spare", [0, 2])
def test_adam_reaches_a_low_rank_optimum(x64, integrator, spare):
    """Also with more ranks than the optimum has; without a floor under second moments it stalls or diverges."""
    loss, _, kernel, optimum = heavy_ball_problem()
    if spare:
        kernel = resize(kernel, tuple(min(n, r + spare) for n, r in zip(SHAPE, RANK)))
    tx = tdlrt(optax.adam(0.01), tolerance=1e-3, integrator=integrator)
    assert distance_after(tx, loss, kernel, optimum, 300) < 0.02
