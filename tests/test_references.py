"""The references are themselves checked: against dense training, against definitions, and against each other."""

import numpy as np
import pytest

from tests import references as ref

SHAPES = [((6, 5), (2, 2)), ((4, 5, 6), (2, 3, 3)), ((3, 3, 4, 5), (2, 3, 2, 3))]


def quadratic(shape, seed=1):
    """A loss ``0.5 <W - T, A (W - T)>`` with a diagonal A, and its gradient."""
    rng = np.random.default_rng(seed)
    target, weight = rng.standard_normal(shape), rng.uniform(0.5, 2.0, shape)
    return (lambda w: 0.5 * np.sum(weight * (w - target) ** 2)), (lambda w: weight * (w - target))


def assert_orthonormal(factors):
    for factor in factors:
        if factor is not None:
            np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (4, 5), (3, 4, 5)])
def test_fold_inverts_unfold_and_mode_products_match_einsum(shape, rng):
    tensor = rng.standard_normal(shape)
    for mode, size in enumerate(shape):
        assert np.array_equal(ref.fold(ref.unfold(tensor, mode), mode, shape), tensor)
        matrix = rng.standard_normal((2, size))
        expected = np.moveaxis(np.tensordot(matrix, tensor, (1, mode)), 0, mode)
        np.testing.assert_allclose(ref.mode_product(tensor, matrix, mode), expected)


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_tucker_random_has_the_prescribed_singular_values(shape, rank):
    values = 10.0 ** -np.arange(max(rank))
    core, factors = ref.tucker_random(shape, rank, values)
    assert_orthonormal(factors)
    for mode, r in enumerate(rank):
        found = np.linalg.svd(ref.unfold(ref.to_dense(core, factors), mode), compute_uv=False)[:r]
        np.testing.assert_allclose(found, values[:r] / np.linalg.norm(values[:r]), rtol=1e-8)


@pytest.mark.parametrize("whole", [(), (0,)])
@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_the_projector_is_an_orthogonal_projection_onto_the_tangent_space(shape, rank, whole, rng):
    rank = tuple(n if i in whole else r for i, (n, r) in enumerate(zip(shape, rank)))
    core, factors = ref.tucker_random(shape, rank, whole=whole)
    X, Y = rng.standard_normal((2, *shape))
    PX, PY = ref.projected_gradient(core, factors, X), ref.projected_gradient(core, factors, Y)
    np.testing.assert_allclose(ref.projected_gradient(core, factors, PX), PX, atol=1e-12)
    np.testing.assert_allclose(np.sum(PX * Y), np.sum(X * PY), atol=1e-12)
    # It keeps every tangent vector: C' ×_i U_i, and C ×_i dU_i ×_{j != i} U_j.
    tangents = [ref.to_dense(rng.standard_normal(rank), factors)]
    for mode, factor in enumerate(factors):
        if factor is not None:
            moved = list(factors)
            moved[mode] = rng.standard_normal(factor.shape)
            tangents.append(ref.to_dense(core, moved))
    for tangent in tangents:
        np.testing.assert_allclose(ref.projected_gradient(core, factors, tangent), tangent, atol=1e-12)


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_k_gradients_are_the_derivatives_of_theorem_1(shape, rank):
    core, factors = ref.tucker_random(shape, rank)
    loss, grad = quadratic(shape)
    Q, K = ref.frame(core, factors)
    for mode in range(len(shape)):

        def of_k(k, mode=mode):
            moved = [k if j == mode else u for j, u in enumerate(factors)]
            return loss(ref.to_dense(ref.fold(Q[mode].T, mode, core.shape), moved))

        direction = np.random.default_rng(mode).standard_normal(K[mode].shape)
        difference = (of_k(K[mode] + 1e-5 * direction) - of_k(K[mode] - 1e-5 * direction)) / 2e-5
        gradient = ref.k_gradient(grad(ref.to_dense(core, factors)), factors, Q, mode)
        np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=1e-7)


@pytest.mark.parametrize("tau", [0.0, 0.03, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(7, 5), (4, 5, 6), (3, 3, 4, 5)])
def test_truncation_keeps_to_tau_and_is_the_smallest(shape, tau, rng):
    tensor = ref.mode_products(rng.standard_normal(shape), [np.diag(0.5 ** np.arange(n)) for n in shape])
    core, bases = ref.truncate(tensor, tau)
    assert_orthonormal(bases)
    error, norm = np.linalg.norm(tensor - ref.to_dense(core, bases)), np.linalg.norm(tensor)
    assert error <= tau * norm + 1e-12
    if tau == 0.9:
        assert core.size < tensor.size
    if len(shape) == 2:
        values = np.linalg.svd(tensor, compute_uv=False)
        assert np.linalg.norm(values[core.shape[0] - 1 :]) > tau * norm


def test_spare_directions_and_each_criterion(rng):
    values = np.array([1.0, 0.5, 0.1, 0.01])
    core = ref.random_orthonormal(rng, 4, 4) @ np.diag(values) @ ref.random_orthonormal(rng, 4, 4).T
    assert ref.truncate(core, 0.05)[0].shape == (3, 3)
    assert ref.truncate(core, 0.05, spare=1)[0].shape == (4, 4)
    assert ref.truncate(core, 0.05, spare=9)[0].shape == (4, 4)
    repeated = np.diag([1.0, 0.1, 0.1, 0.1])  # three small values: together above 0.12, each below
    assert ref.truncate(repeated, 0.12)[0].shape == (3, 3)
    assert ref.truncate(repeated, 0.12, criterion="each")[0].shape == (1, 1)
    assert ref.truncate(np.zeros((3, 4)), 0.1)[0].shape == (1, 1)


@pytest.mark.parametrize("whole", [(), (0,)])
@pytest.mark.parametrize("step", [ref.algorithm1_step, ref.parallel_step])
@pytest.mark.parametrize("shape", [(5, 5), (4, 5, 6), (3, 3, 4, 5)])
def test_full_rank_and_zero_tau_is_dense_gradient_descent(shape, step, whole):
    core, factors = ref.tucker_random(shape, shape, whole=whole)
    _, grad = quadratic(shape)
    expected = ref.gradient_descent(ref.to_dense(core, factors), grad, 0.1, 5)
    for _ in range(5):
        core, factors = step(core, factors, grad, 0.1, 0.0)
    assert_orthonormal(factors)
    np.testing.assert_allclose(ref.to_dense(core, factors), expected, atol=1e-12)


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_the_parallel_step_is_the_projected_gradient_step(shape, rank):
    core, factors = ref.tucker_random(shape, rank)
    _, grad = quadratic(shape)
    start = ref.to_dense(core, factors)
    expected = start - 0.1 * ref.projected_gradient(core, factors, grad(start))
    np.testing.assert_allclose(ref.to_dense(*ref.parallel_step(core, factors, grad, 0.1, 0.0)), expected, atol=1e-12)


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_algorithm_1_at_fixed_rank_follows_the_projected_gradient_to_second_order(shape, rank):
    core, factors = ref.tucker_random(shape, rank)
    _, grad = quadratic(shape)
    start = ref.to_dense(core, factors)
    tangent = ref.projected_gradient(core, factors, grad(start))
    errors = []
    for h in (1e-3, 1e-4):
        new = ref.to_dense(*ref.algorithm1_step(core, factors, grad, h, 0.0, adaptive=False))
        errors.append(np.linalg.norm(new - (start - h * tangent)))
    assert 80 < errors[0] / errors[1] < 120


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_adaptive_steps_double_the_ranks_and_descend(shape, rank):
    core, factors = ref.tucker_random(shape, rank)
    loss, grad = quadratic(shape)
    before = loss(ref.to_dense(core, factors))
    new_core, new_factors = ref.algorithm1_step(core, factors, grad, 0.1, 0.0)
    assert new_core.shape == tuple(min(n, 2 * r) for n, r in zip(shape, rank))
    assert loss(ref.to_dense(new_core, new_factors)) < before
    fixed, fixed_factors = ref.algorithm1_step(core, factors, grad, 0.1, 0.0, adaptive=False)
    assert fixed.shape == rank
    assert_orthonormal(fixed_factors)
    assert loss(ref.to_dense(fixed, fixed_factors)) < before


@pytest.mark.parametrize(
    ("step", "spare"), [(ref.algorithm1_step, 0), (ref.parallel_step, 1)], ids=["algorithm1", "parallel"]
)
def test_a_low_rank_target_is_found_from_too_small_a_rank(step, spare):
    target = ref.to_dense(*ref.tucker_random((6, 7, 8), (3, 3, 3), [1.0, 0.5, 0.2], seed=3))
    core, factors = ref.tucker_random((6, 7, 8), (1, 1, 1), seed=4)
    for _ in range(200):
        core, factors = step(core, factors, lambda w: w - target, 0.3, 1e-3, spare=spare)
    assert np.linalg.norm(ref.to_dense(core, factors) - target) < 5e-3
    assert all(3 <= r <= 3 + spare for r in core.shape)


def test_heavy_ball_finds_the_minimum_of_a_quadratic():
    loss, grad = quadratic((3, 4))
    start = np.zeros((3, 4))
    assert loss(ref.heavy_ball(start, grad, 0.1, 0.9, 300)) < 1e-10
    np.testing.assert_allclose(ref.heavy_ball(start, grad, 0.1, 0.0, 7), ref.gradient_descent(start, grad, 0.1, 7))
