"""Bases that turn at ranks that stay: against dense formulas, at small singular values, and as a step of training."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdlrt_jax.nn
from tdlrt_jax import TuckerTensor, active_rank, describe_status, hosvd, lift, resize, tdlrt, tdlrt_step, to_dense
from tdlrt_jax.integrators import turn
from tdlrt_jax.integrators.turning import TurnedTangent, turned_basis
from tdlrt_jax.transport import transport_turned
from tdlrt_jax.tucker import active_columns
from tests import references
from tests.helpers import orthonormality, random_kernel, tangent_to_dense
from tests.test_step import loss_fn as network_loss
from tests.test_step import network
from tests.test_transport import RANK, heavy_ball_problem


def point_and_step(rng, whole=False, size=0.1):
    """A frame with padding, and a tangent vector in its coordinates."""
    rank = (2, 3, None, 3) if whole else (2, 3, 2, 3)
    kernel = random_kernel(rng, (5, 6, 3, 7), rank)
    frame = lift(kernel)
    step = jax.tree.map(lambda leaf: size * jnp.array(rng.normal(size=leaf.shape)), TuckerTensor(frame.core, frame.K))
    core = jnp.where(frame.core != 0, step.core, 0)
    factors = [None if u is None else active_columns(u) * (k - u @ (u.T @ k)) for u, k in zip(frame.U, step.factors)]
    return kernel, frame, TuckerTensor(core, tuple(factors))


def projections(factors):
    return [None if u is None else np.asarray(u) @ np.asarray(u).T for u in factors]


@pytest.mark.parametrize("whole", [False, True])
def test_the_moved_kernel_is_projected_onto_the_turned_bases(x64, rng, whole):
    kernel, frame, step = point_and_step(rng, whole)
    moved, _ = turn(frame, step)
    for u, k, d, v in zip(frame.U, frame.K, step.factors, moved.factors):
        if u is None:
            assert v is None
            continue
        active = np.asarray(active_columns(u))
        u, k, d = (np.asarray(part)[:, active] for part in (u, k, d))
        s = u.T @ k
        expected, _ = np.linalg.qr(u + d @ np.linalg.solve(s.T @ s + d.T @ d / 16, s.T))
        np.testing.assert_array_equal(active_columns(v), active)
        np.testing.assert_allclose(v[:, active] @ v[:, active].T, expected @ expected.T, atol=1e-11)
    target = np.asarray(to_dense(kernel) + tangent_to_dense(step, frame))
    expected = references.mode_products(target, projections(moved.factors))
    np.testing.assert_allclose(to_dense(moved), expected, atol=1e-12)
    assert orthonormality(moved) < 1e-13


def test_to_first_order_it_is_the_step_and_to_second_its_best_approximation(x64, rng):
    """Halving the step quarters what is lost; and the truncation to the same ranks loses about as much."""
    kernel, frame, step = point_and_step(rng)
    lost, best = [], []
    for scale in (1e-2, 5e-3, 2.5e-3):
        small = jax.tree.map(lambda leaf, scale=scale: scale * leaf, step)
        target = np.asarray(to_dense(kernel) + tangent_to_dense(small, frame))
        lost.append(np.linalg.norm(to_dense(turn(frame, small)[0]) - target))
        best.append(np.linalg.norm(to_dense(hosvd(jnp.array(target), rank=active_rank(kernel).tolist())) - target))
    for coarse, fine in itertools.pairwise(lost):
        assert 3.8 < coarse / fine < 4.2
    assert lost[-1] < 1.25 * best[-1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("smallest", [1e-3, 1e-8, 1e-16, 0.0])
def test_small_singular_values_are_not_inverted(x64, rng, smallest, dtype):
    """Bases stay orthonormal and of full rank, and move by no more than the step that is large beside them asks for."""
    basis, right = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in (9, 4))
    values = np.array([1.0, 0.5, max(smallest, 0.0), smallest])
    step = 1e-2 * rng.normal(size=(9, 4))
    step -= basis @ (basis.T @ step)
    u, k, d = (jnp.array(part, dtype) for part in (basis, basis @ (values[:, None] * right.T), step))
    turned = np.asarray(turned_basis(u, k, d), np.float64)
    np.testing.assert_allclose(turned.T @ turned, np.eye(4), atol=20 * float(jnp.finfo(dtype).eps))
    cosines = np.linalg.svd(basis.T @ turned)[1]
    assert cosines.min() > 0.44  # a turn by 2 has 0.447
    if smallest <= 1e-8:
        assert cosines.min() > 0.99  # nothing to turn


@pytest.mark.parametrize("whole", [False, True])
def test_moments_are_projected_onto_the_next_tangent_space(x64, rng, whole):
    _, frame, step = point_and_step(rng, whole, size=0.5)
    _, _, moment = point_and_step(rng, whole, size=1.0)
    new = lift(turn(frame, step)[0])
    vector = tangent_to_dense(moment, frame)
    # Whatever lies in U_i of an m_{K_i} is no part of the vector.
    marked = [None if u is None else k + u @ (u.T @ u) for u, k in zip(frame.U, moment.factors)]
    carried = transport_turned(moment._replace(factors=tuple(marked)), frame, new, "linear")
    bases = [None if u is None else np.asarray(u) for u in new.U]
    expected = references.projected_gradient(np.asarray(new.core), bases, np.asarray(vector))
    np.testing.assert_allclose(tangent_to_dense(carried, new), expected, atol=1e-11)
    assert np.linalg.norm(expected) < np.linalg.norm(vector)
    for u, k in zip(new.U, carried.factors):
        if u is not None:
            np.testing.assert_allclose(u.T @ k, 0, atol=1e-12)


@pytest.mark.parametrize("whole", [False, True])
def test_second_moments_stay_nonnegative_and_never_grow(x64, rng, whole):
    _, frame, step = point_and_step(rng, whole, size=0.5)
    squares = jax.tree.map(lambda leaf: leaf**2, point_and_step(rng, whole)[2])
    new = lift(turn(frame, step)[0])
    carried = transport_turned(squares, frame, new, "squared")
    largest = max(float(leaf.max()) for leaf in jax.tree.leaves(squares))
    for leaf in jax.tree.leaves(carried):
        assert (leaf >= 0).all() and leaf.max() <= largest * (1 + 1e-12)
    least = float(carried.core[new.core != 0].min())
    for u, k in zip(new.U, carried.factors):
        if u is not None:
            assert (k[:, active_columns(u)] >= least).all() and (k[:, ~active_columns(u)] == 0).all()


# Products of a tensor with a matrix, by the number of modes d; one by one they are d^3 + d^2, 80 of four modes.
TREE = {2: 8, 3: 19, 4: 32, 5: 51}


@pytest.mark.parametrize("order", TREE)
@pytest.mark.parametrize("whole", [None, 0, 1])
def test_a_tangent_vector_in_turned_bases_takes_each_product_once(x64, rng, order, whole):
    shape = (2, 3, 4, 3, 2)[:order]

    def arrays(*shapes):
        return [None if mode == whole else jnp.array(rng.normal(size=of)) for mode, of in enumerate(shapes)]

    core = jnp.array(rng.normal(size=shape))
    Q = arrays(*[shape] * order)
    parts, turns = (arrays(*[(n, n) for n in shape]) for _ in range(2))

    def all_of_it(core, parts, Q, turns):
        tangent = TurnedTangent(core, parts, Q, turns)
        modes = [mode for mode in range(order) if mode != whole]
        within = [tangent.core(tangent.but(mode)) for mode in modes]
        return tangent.core(range(order)), within, [tangent.q(mode, tangent.but(mode)) for mode in modes]

    def directly(modes):
        """The sum over the vector's parts, each by products of its own."""
        turn = [m if mode in modes else None for mode, m in enumerate(references.transposes(turns))]
        total = references.mode_products(np.asarray(core), turn)
        for mode in modes:
            if parts[mode] is not None:
                q = references.mode_products(np.asarray(Q[mode]), turn, skip=mode)
                total = total + references.mode_product(q, np.asarray(parts[mode]), mode)
        return total

    found, within, q = all_of_it(core, parts, Q, turns)
    modes = [mode for mode in range(order) if mode != whole]
    np.testing.assert_allclose(found, directly(range(order)), rtol=1e-11, atol=1e-11)
    for mode, one, its_q in zip(modes, within, q):
        np.testing.assert_allclose(one, directly([m for m in range(order) if m != mode]), rtol=1e-11, atol=1e-11)
        expected = references.mode_products(np.asarray(Q[mode]), references.transposes(turns), skip=mode)
        np.testing.assert_allclose(its_q, expected, rtol=1e-11, atol=1e-11)
    products = str(jax.make_jaxpr(all_of_it)(core, parts, Q, turns)).count("dot_general")
    assert products == TREE[order] if whole is None else products < TREE[order]


def test_padding_changes_nothing(x64, rng):
    kernel = random_kernel(rng, (5, 6, 3, 7), (2, 3, 2, 3))
    gradients = jax.tree.map(
        lambda leaf: jnp.array(rng.normal(size=leaf.shape)), TuckerTensor(kernel.core, kernel.factors)
    )
    loss = functools.partial(lambda target, kernel: jnp.sum((to_dense(kernel) - target) ** 2), to_dense(gradients))
    results = []
    for sizes in (active_rank(kernel).tolist(), [4, 5, 3, 6]):
        fitted = resize(kernel, sizes)
        tx = tdlrt(optax.sgd(0.01, momentum=0.9), tolerance=0.1)
        step, state = tdlrt_step(loss, tx, ranks_stay=True, donate=False), tx.init(fitted)
        for _ in range(4):
            fitted, state, info = step(fitted, state)
        assert fitted.core.shape == tuple(sizes) and describe_status(info.status) == []
        results.append(fitted)
    np.testing.assert_allclose(to_dense(results[0]), to_dense(results[1]), atol=1e-12)
    np.testing.assert_array_equal(active_rank(results[1]), active_rank(kernel))


# As a step of training.

SHAPE, LOW, TIME = (6, 5, 4), (2, 3, 2), 0.8


@functools.cache
def descent():
    """A quadratic loss whose directions are not alike, and a kernel that is not near its optimum."""
    keys = jax.random.split(jax.random.key(0), 3)
    target = jax.random.normal(keys[0], SHAPE, jnp.float64)
    weights = jnp.exp(jax.random.normal(keys[1], SHAPE, jnp.float64) / 2)

    def loss_fn(params):
        return 0.5 * jnp.sum(weights * (to_dense(params["w"]) - target) ** 2)

    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    tx = tdlrt(inner, tolerance=1e-9, max_rank=LOW)
    steps = [tdlrt_step(loss_fn, tx, donate=False, ranks_stay=stay) for stay in (False, True)]
    return {"w": hosvd(jax.random.normal(keys[2], SHAPE, jnp.float64), rank=LOW)}, tx, steps


def descend(count, every):
    """The kernel after a time of ``TIME`` in so many steps, of which every ``every``-th is a whole one (0: none)."""
    params, tx, (whole, between) = descent()
    state = tx.init(params)
    state = state._replace(inner=state.inner._replace(hyperparams={"learning_rate": jnp.array(TIME / count)}))
    for number in range(count):
        params, state, info = (whole if every and number % every == 0 else between)(params, state)
        assert describe_status(info.status) == []
    return np.asarray(to_dense(params["w"]))


def test_they_follow_the_projected_gradient_flow(x64):
    """With first order, alone and between whole steps; the reference are small steps of Algorithm 1."""
    flow = descend(2048, every=1)
    for every in (0, 4):
        errors = [np.linalg.norm(descend(count, every) - flow) for count in (32, 64, 128)]
        for coarse, fine in itertools.pairwise(errors):
            assert 0.35 * coarse < fine < 0.65 * coarse
        whole = np.linalg.norm(descend(128, every=1) - flow)
        assert errors[-1] < 1.5 * whole


def test_full_ranks_follow_dense_momentum(x64):
    loss, grad, kernel, _ = heavy_ball_problem()
    kernel = hosvd(to_dense(kernel) + 0.1)
    tx = tdlrt(optax.sgd(0.02, momentum=0.9), tolerance=1e-9)
    step, state = tdlrt_step(loss, tx, ranks_stay=True, donate=False), tx.init(kernel)
    dense = references.heavy_ball(np.asarray(to_dense(kernel)), grad, 0.02, 0.9, 20)
    for _ in range(20):
        kernel, state, _ = step(kernel, state)
    np.testing.assert_allclose(to_dense(kernel), dense, atol=1e-10)


@pytest.mark.parametrize("inner", ["momentum", "adam"])
def test_low_rank_optima_are_reached(x64, inner):
    loss, _, kernel, optimum = heavy_ball_problem()
    optimizer = {"momentum": optax.sgd(0.02, momentum=0.9), "adam": optax.adam(optax.exponential_decay(0.03, 50, 0.5))}
    tx = tdlrt(optimizer[inner], tolerance=1e-8, max_rank=RANK)
    step, state = tdlrt_step(loss, tx, ranks_stay=True, donate=False), tx.init(kernel)
    for _ in range(400):
        kernel, state, _ = step(kernel, state)
    distance = float(jnp.linalg.norm(to_dense(kernel) - optimum) / jnp.linalg.norm(optimum))
    assert distance < {"momentum": 1e-7, "adam": 1e-2}[inner]


def test_networks_train_in_both_faces(rng):
    """Functional and flax.nnx; micro-batches too, whose gradients are the batch's."""
    params, images, labels = network()
    tx = tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.05)
    whole, split = (tdlrt_step(network_loss, tx, ranks_stay=True, accumulate=n, donate=False) for n in (1, 2))
    moved, state, first = whole(params, tx.init(params), images, labels)
    other, _, _ = split(params, tx.init(params), images, labels)
    for one, two in zip(jax.tree.leaves(moved), jax.tree.leaves(other)):
        np.testing.assert_allclose(one, two, atol=2e-5)
    for _ in range(20):
        moved, state, info = whole(moved, state, images, labels)
    assert info.loss < 0.9 * first.loss
    for name, rank in info.rank.items():
        np.testing.assert_array_equal(rank, first.rank[name])

    model = tdlrt_jax.nn.TuckerLinear(6, 5, rank=2, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel.get_value().factors[0])
    optimizer = nnx.Optimizer(model, tdlrt_jax.nn.tdlrt(optax.sgd(0.1), tolerance=0.1), wrt=nnx.Param)
    step = tdlrt_jax.nn.tdlrt_step(lambda model, x: jnp.mean((model(x) - 1) ** 2), ranks_stay=True)
    x = jnp.array(rng.normal(size=(8, 6)), jnp.float32)
    losses = [float(step(model, optimizer, x).loss) for _ in range(10)]
    assert losses[-1] < losses[0] and np.abs(model.kernel.get_value().factors[0] - before).max() > 1e-3


def test_nothing_moves_where_a_gradient_is_not_finite():
    params, images, labels = network()
    tx = tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.05)
    step = tdlrt_step(network_loss, tx, ranks_stay=True, donate=False)
    moved, _, info = step(params, tx.init(params), images.at[0, 0, 0, 0].set(jnp.nan), labels)
    assert "not finite" in " ".join(describe_status(info.status)) and int(info.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, moved, params)


def test_there_is_no_eigenproblem(rng):
    frame = lift(random_kernel(rng, (8, 8, 3, 3), (4, 4, 3, 3)))
    text = str(jax.make_jaxpr(turn)(frame, TuckerTensor(frame.core, frame.K)))
    assert "cholesky" in text and "eigh" not in text and "svd" not in text
