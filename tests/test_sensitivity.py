"""What cutting a direction is expected to cost the loss: against the loss itself, and what a budget makes of it."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import Budget, TuckerTensor, active_rank, parameter_count, sensitivity, tdlrt, tdlrt_step, to_dense
from tdlrt_jax.budget import fit_ranks, mode_energies, plan_budget
from tdlrt_jax.ranks import RankPolicy
from tdlrt_jax.truncation import truncate
from tdlrt_jax.tucker import unfold
from tests.helpers import orthonormal, random_kernel


def classifier(rng, shape, rank, images):
    """A convolution of four windows an image, the average of its squares as logits: a kernel, and ``logits(kernel)``."""
    kernel = random_kernel(rng, shape, rank)
    windows = jnp.asarray(rng.normal(size=(images, 4, *shape[:3])))

    def logits(kernel):
        return jnp.mean(jnp.einsum("npxyi,xyio->npo", windows, to_dense(kernel)) ** 2, axis=1) / 8

    return kernel, logits


def test_the_fisher_information_is_the_second_derivative_of_the_loss(rng, x64):
    """Where labels are the network's own, ``E[(u^T M u)^2]`` of single images is exactly how the loss curves towards a cut."""
    kernel, logits = classifier(rng, (3, 3, 4, 10), (2, 3, 3, 4), images=12)
    probabilities = jax.nn.softmax(logits(kernel))

    def expected_loss(kernel):
        return -jnp.mean(jnp.sum(probabilities * jax.nn.log_softmax(logits(kernel)), axis=1))

    # The gradient for every image and every label that it may have.
    def log_likelihoods(core):
        return jax.nn.log_softmax(logits(kernel._replace(core=core)))

    gradients = jax.jacobian(log_likelihoods)(kernel.core)
    for mode in (0, 2, 3):
        core = unfold(kernel.core, mode)
        u = jnp.linalg.svd(core, full_matrices=False)[0][:, -1]

        def cut(t, mode=mode, u=u, core=core):
            rows = core - t * jnp.outer(u, u @ core)
            others = [kernel.core.shape[m] for m in range(4) if m != mode]
            return expected_loss(
                kernel._replace(core=jnp.moveaxis(rows.reshape(kernel.core.shape[mode], *others), 0, mode))
            )

        products = jax.vmap(jax.vmap(lambda g, mode=mode, core=core: core @ unfold(g, mode).T))(gradients)
        fisher = jnp.mean(jnp.sum(probabilities * jnp.einsum("i,nkij,j->nk", u, products, u) ** 2, axis=1))
        np.testing.assert_allclose(jax.grad(cut)(0.0), 0, atol=1e-12)
        np.testing.assert_allclose(jax.grad(jax.grad(cut))(0.0), fisher, rtol=1e-9)


def test_the_scatter_of_batches_predicts_what_cuts_cost(rng, x64):
    """``B/2`` times what is measured times the energy that is cut, beside how much the loss rises."""
    kernel, logits = classifier(rng, (3, 3, 6, 10), (3, 3, 6, 6), images=128)
    kernel = truncated(kernel)
    labels = jax.random.categorical(jax.random.key(0), jnp.broadcast_to(logits(kernel), (200, 128, 10)))

    def loss(core, drawn):
        scores = logits(kernel._replace(core=core))
        return optax.softmax_cross_entropy_with_integer_labels(scores, drawn).mean()

    gradients = jax.vmap(jax.grad(loss), (None, 0))(kernel.core, labels)
    measured = jnp.mean(jax.vmap(lambda g: sensitivity.measure(kernel, g))(gradients), axis=0)

    probabilities = jax.nn.softmax(logits(kernel))

    def expected_loss(core):
        return -jnp.mean(jnp.sum(probabilities * jax.nn.log_softmax(logits(kernel._replace(core=core))), axis=1))

    ratios = []
    for mode, size in enumerate(kernel.core.shape):
        lower = size - max(size // 2, 1)
        rises, energies = 0.0, 0.0
        for k in range(lower, size):
            scale = jnp.ones(size).at[k].set(0.99)  # so little that the second order is all, and the first none
            less = jnp.moveaxis(jnp.moveaxis(kernel.core, mode, -1) * scale, -1, mode)
            rises += float(expected_loss(less) - expected_loss(kernel.core)) / 0.01**2
            energies += float(jnp.sum(jnp.take(kernel.core, k, mode) ** 2) / jnp.sum(kernel.core**2))
        ratios.append(float(128 / 2 * measured[mode] * energies / rises))
    assert all(0.75 < ratio < 1.33 for ratio in ratios), ratios


def truncated(kernel):
    """The same kernel with the core in the coordinates in which truncation leaves it."""
    cut = truncate(kernel.core, 0.0)
    factors = tuple(u @ p for u, p in zip(kernel.factors, cut.rotations))
    return TuckerTensor(cut.core, factors)


def test_the_directions_are_those_that_truncation_leaves(rng, x64):
    """The lower half of the principal directions, by singular vectors."""
    kernel = truncated(random_kernel(rng, (7, 9, 8), (1, 5, 5)))
    gradient = jnp.asarray(rng.normal(size=kernel.core.shape))
    for mode, lower in enumerate((0, 3, 3)):
        core, slope = np.asarray(unfold(kernel.core, mode)), np.asarray(unfold(gradient, mode))
        basis, values, _ = np.linalg.svd(core, full_matrices=False)
        squares = np.diag(basis.T @ core @ slope.T @ basis) ** 2
        expected = np.sum(squares[lower:]) / np.sum(values[lower:] ** 2) * np.sum(values**2)
        np.testing.assert_allclose(sensitivity.measure(kernel, gradient)[mode], expected, rtol=1e-5)


def test_scale_and_room_to_spare_make_no_difference(rng, x64):
    kernel = random_kernel(rng, (3, 4, 8), (3, 3, 5))
    gradient = jnp.asarray(rng.normal(size=kernel.core.shape))
    expected = sensitivity.measure(kernel, gradient)
    # Twice a kernel that is normalized afterwards has half the gradient.
    twice = kernel._replace(core=2 * kernel.core)
    np.testing.assert_allclose(sensitivity.measure(twice, gradient / 2), expected, rtol=1e-6)
    for scale in (2.0**-100, 2.0**100):
        other = TuckerTensor(jnp.float32(scale) * kernel.core.astype(jnp.float32), kernel.factors)
        measured = sensitivity.measure(other, (gradient / scale).astype(jnp.float32))
        np.testing.assert_allclose(measured, expected, rtol=1e-5)
    assert np.all(np.isfinite(sensitivity.measure(kernel, gradient * 1e30)))
    room = [(0, 1), (0, 1), (0, 3)]
    padded = TuckerTensor(
        jnp.pad(kernel.core, room), tuple(jnp.pad(u, [(0, 0), r]) for u, r in zip(kernel.factors, room))
    )
    np.testing.assert_allclose(sensitivity.measure(padded, jnp.pad(gradient, room)), expected, rtol=1e-6)
    nothing = sensitivity.measure(kernel._replace(core=0 * kernel.core), gradient)
    assert nothing.tolist() == [0, 0, 0]


def test_directions_that_are_not_there_say_nothing_of_the_others(rng, x64):
    """Half of the directions without energy, as where more is stored than a kernel needs."""
    kernel = random_kernel(rng, (6, 7, 8), (4, 4, 4))
    gradient = jnp.asarray(rng.normal(size=(4, 4, 4)))
    kernel = kernel._replace(core=kernel.core.at[2:].set(0))
    slopes = np.sum(np.asarray(kernel.core * gradient).reshape(4, -1), axis=1)
    np.testing.assert_allclose(sensitivity.measure(kernel, gradient)[0], np.sum(slopes**2), rtol=1e-5)


@pytest.mark.parametrize("whole", [(False,) * 4, (True, True, False, False), (False, True, False, False)])
def test_what_a_rank_costs(whole):
    shape, rank = (3, 3, 20, 30), [3 if w else r for w, r in zip(whole, (2, 3, 9, 11))]
    costs = sensitivity.cost_per_rank(shape, jnp.array(rank), whole)
    for mode, entire in enumerate(whole):
        if not entire:
            less = [r - (m == mode) for m, r in enumerate(rank)]
            assert int(costs[mode]) == parameter_count(shape, rank, whole) - parameter_count(shape, less, whole)


def test_of_a_matrix_both_ranks_fall_together():
    costs = sensitivity.cost_per_rank((40, 30), jnp.array([5, 5]), (False, False))
    # Its core is square: of r^2 numbers 2 r - 1 go, counted as at the middle of the step.
    saved = parameter_count((40, 30), (5, 5)) - parameter_count((40, 30), (4, 4))
    assert costs.tolist() == [saved - 4, saved - 4] == [75, 75]


def test_averages_are_plain_up_to_the_horizon_and_forget_afterwards(rng):
    state = sensitivity.start(["a", "b"], [2, 3])
    values = rng.uniform(size=(3 * sensitivity.HORIZON, 5)).astype(np.float32)
    for number, value in enumerate(values, 1):
        state = sensitivity.average(state, {"b": value[2:], "a": value[:2]})
        if number <= sensitivity.HORIZON:
            expected = values[:number].mean(0)
        else:
            expected = expected + (value - expected) / sensitivity.HORIZON
        np.testing.assert_allclose(np.concatenate([state.mean["a"], state.mean["b"]]), expected, rtol=1e-5)
    assert int(state.seen) == len(values)


def test_the_ranks_are_those_with_the_least_predicted_loss(rng):
    """Against all ranks that fit, with what a rank costs held still as the weights hold it."""
    shapes = [((6, 7), (5, 5)), ((8, 5, 6), (3, 3, 3)), ((6, 5, 4), (3, 2, 3))]
    kernels = [random_kernel(rng, shape, rank, dtype=np.float32) for shape, rank in shapes]
    plans = [plan_budget(kernel, RankPolicy(criterion="tail")) for kernel in kernels]
    sensitive = [jnp.array([0.5, 0.5]), jnp.array([10.0, 20.0, 8.0]), jnp.array([0.1, 0.4, 0.2])]
    costs = [
        sensitivity.cost_per_rank(plan.shape, active_rank(kernel), plan.whole) for plan, kernel in zip(plans, kernels)
    ]
    energies = [mode_energies(kernel.core) for kernel in kernels]
    exists = [tuple(jnp.int32(u.shape[1]) for u in kernel.factors) for kernel in kernels]
    weights = [s / c for s, c in zip(sensitive, costs)]
    total = sum(parameter_count(plan.shape, kernel.core.shape) for plan, kernel in zip(plans, kernels))
    ranks, tau = fit_ranks(energies, exists, plans, jnp.float32(0.6 * total), weights)
    ranks = [np.asarray(rank).tolist() for rank in ranks]
    assert sum(parameter_count(plan.shape, rank) for plan, rank in zip(plans, ranks)) <= 0.6 * total
    assert float(tau) > 0

    def predicted(ranks):
        """Of the modes that are cut by their own; a matrix is cut once."""
        of_mode = [
            float(s[m]) * float(np.sum(e[m][r[m] :]))
            for s, e, r in zip(sensitive, energies, ranks)
            for m in range(1 if len(r) == 2 else len(r))
        ]
        return sum(of_mode)

    def linear_cost(ranks):
        return sum(float(c[m]) * r[m] for c, r in zip(costs, ranks) for m in range(1 if len(r) == 2 else len(r)))

    choices = [
        [rank for rank in itertools.product(*(range(1, r + 1) for r in kernel.core.shape)) if valid(rank)]
        for kernel in kernels
    ]
    best = min(
        predicted(candidate)
        for candidate in itertools.product(*choices)
        if linear_cost(candidate) <= linear_cost(ranks) + 1e-3
    )
    np.testing.assert_allclose(predicted(ranks), best, rtol=1e-5)
    # One tolerance for all, whatever the loss, costs more of it.
    plain, _ = fit_ranks(energies, exists, plans, jnp.float32(0.6 * total))
    assert predicted([np.asarray(rank).tolist() for rank in plain]) > 1.5 * predicted(ranks)


def test_a_matrix_is_cut_once_whatever_its_second_mode_weighs(rng):
    kernel = random_kernel(rng, (9, 8), (6, 6), dtype=np.float32)
    other = random_kernel(rng, (9, 8), (6, 6), dtype=np.float32)
    plans = [plan_budget(kernel, RankPolicy()), plan_budget(other, RankPolicy())]
    exists = [(jnp.int32(6), jnp.int32(6))] * 2
    energies = [mode_energies(k.core) for k in (kernel, other)]
    found = [
        fit_ranks(energies, exists, plans, jnp.float32(150), [jnp.array([1.0, second]), jnp.array([0.5, 1.0])])[0]
        for second in (0.0, 1.0)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0][0].tolist() != [1, 1]


def valid(rank):
    return all(r <= math.prod(rank) // r for r in rank)


def teacher_and_students(rng, importance, adapt_every=1):
    """Two kernels of one spectrum, fitted to noisy targets, one of whose errors count a hundred times those of the other."""
    shape = (4, 12, 12)
    core = rng.normal(size=(4, 8, 8))
    kernels = {
        name: TuckerTensor(
            jnp.asarray(core, jnp.float32),
            tuple(jnp.asarray(orthonormal(rng, n, r), jnp.float32) for n, r in zip(shape, core.shape)),
        )
        for name in ("little", "much")
    }
    targets = {name: to_dense(kernel) for name, kernel in kernels.items()}
    weights = {"little": 0.01, "much": 1.0}

    def loss(params, noise):
        return sum(
            weight * jnp.sum((to_dense(params[name]) - targets[name] - noise[name]) ** 2)
            for name, weight in weights.items()
        )

    budget = Budget(0.6, steps=12, every=2, importance=importance)
    tx = tdlrt(optax.sgd(1e-3), tolerance=budget, adapt_every=adapt_every)
    step, params, state = tdlrt_step(loss, tx, donate=False), kernels, tx.init(kernels)
    for _ in range(16):
        noise = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name in kernels}
        params, state, info = step(params, state, noise)
        assert int(info.skipped) == 0
    ranks = {name: np.asarray(rank).tolist() for name, rank in info.rank.items()}
    return ranks, state, shape


@pytest.mark.parametrize("adapt_every", [1, 2])
def test_a_budget_leaves_more_to_the_kernel_that_the_loss_depends_on(rng, adapt_every):
    ranks, state, shape = teacher_and_students(rng, "loss", adapt_every)
    stored = {name: parameter_count(shape, rank) for name, rank in ranks.items()}
    assert 0.38 < sum(stored.values()) / (2 * math.prod(shape)) <= 0.4
    assert stored["much"] > 3 * stored["little"]
    assert int(state.budget.sensitivity.seen) == 16 // adapt_every
    mean = state.budget.sensitivity.mean
    assert np.all(np.asarray(mean["much"]) > 30 * np.asarray(mean["little"]))


def test_without_it_the_same_spectra_have_the_same_ranks(rng):
    ranks, state, shape = teacher_and_students(rng, "error")
    stored = {name: parameter_count(shape, rank) for name, rank in ranks.items()}
    assert 0.7 < stored["much"] / stored["little"] < 1.4
    assert state.budget.sensitivity == ()


def test_every_kernel_has_its_own_numbers_whatever_the_order_of_the_names(rng):
    """A list of more than ten: as names they are in another order than as parameters."""
    params = [random_kernel(rng, (5, 6), (3, 3), dtype=np.float32) for _ in range(12)]
    loss = lambda params: sum((i + 1) * jnp.sum(to_dense(k) ** 2) for i, k in enumerate(params))  # noqa: E731
    tx = tdlrt(optax.sgd(1e-4), tolerance=Budget(0.2, steps=5, importance="loss"))
    state = tx.init(params)
    _, after, _ = tdlrt_step(loss, tx, donate=False)(params, state)
    for index, kernel in enumerate(params):
        gradient = 2 * (index + 1) * kernel.core
        (mean,) = [v for name, v in after.budget.sensitivity.mean.items() if name.split("/")[0] == str(index)]
        np.testing.assert_allclose(mean, sensitivity.measure(kernel, gradient), rtol=1e-4)


def test_a_gradient_of_zero_leaves_the_choice_to_the_energies(rng):
    """The first gradient of a network may be zero: ranks are found all the same, and the budget is kept."""
    params = {"a": random_kernel(rng, (9, 8), (6, 6), dtype=np.float32)}
    tx = tdlrt(optax.sgd(0.1), tolerance=Budget(0.5, steps=1, every=1, importance="loss"))
    step, state = tdlrt_step(lambda params: 0 * jnp.sum(params["a"].core), tx, donate=False), tx.init(params)
    for _ in range(2):
        params, state, info = step(params, state)
    (rank,) = info.rank.values()
    assert parameter_count((9, 8), rank.tolist()) <= 36
    assert rank.tolist() == [1, 1] or parameter_count((9, 8), (rank + 1).tolist()) > 36
