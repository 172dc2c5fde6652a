"""Truncation by random sketches: exact errors and orthonormal directions whatever a sketch missed, the Gram route's ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import RankPolicy, active_rank, hosvd, tdlrt, to_dense, value_and_grad
from tdlrt_jax.rotation import khatri_rao, sketch_size
from tdlrt_jax.truncation import truncate
from tests import references
from tests.helpers import dense64, orthonormal, orthonormality, random_kernel

RANDOMIZED = RankPolicy(route="randomized")
CASES = [((64, 64), (8, 8)), ((64, 8, 9), (6, 6, 6)), ((3, 2, 64, 64), (3, 2, 7, 6))]
DECAYS = {
    "fast": lambda n: 0.3 ** np.arange(n),
    "slow": lambda n: 1 / (1 + np.arange(n)),
    "flat": np.ones,
    "rank 3": lambda n: np.where(np.arange(n) < 3, 1.0, 0.0),
    "repeated": lambda n: np.where(np.arange(n) < 4, 1.0, 0.05**2),
}


def tensor_of(shape, decay, seed=0):
    """A tensor of norm 1 whose unfoldings decay; of a matrix these are the singular values, of others nearly."""
    rng = np.random.default_rng(seed)
    if len(shape) == 2:
        k = min(shape)
        tensor = (orthonormal(rng, shape[0], k) * DECAYS[decay](k)) @ orthonormal(rng, shape[1], k).T
    else:
        tensor = rng.normal(size=shape)
        for mode, n in enumerate(shape):
            tensor = references.mode_product(tensor, orthonormal(rng, n, n) * DECAYS[decay](n), mode)
    return tensor / np.linalg.norm(tensor)


def check(cut, tensor, valid=None):
    """The defining equations of a :class:`Truncated`; returns the relative error, in float64."""
    dtype = cut.core.dtype
    rounding = 20 * float(jnp.finfo(dtype).eps)
    rotations = [None if p is None else np.asarray(p, np.float64) for p in cut.rotations]
    for mode, (p, rank) in enumerate(zip(rotations, cut.rank.tolist())):
        if p is not None:
            np.testing.assert_allclose(p.T @ p, np.diag(np.arange(p.shape[1]) < rank), atol=rounding)
            if valid is not None:
                assert not p[~np.asarray(valid[mode])].any()
    core = references.mode_products(tensor, [None if p is None else p.T for p in rotations])
    norm = np.linalg.norm(tensor)
    np.testing.assert_allclose(np.asarray(cut.core, np.float64), core, atol=rounding * norm)
    error = np.linalg.norm(references.mode_products(core, rotations) - tensor) / max(norm, 1e-300)
    np.testing.assert_allclose(float(cut.error), error, rtol=1e-4, atol=rounding)
    return error


def both(tensor, tau, capacity, dtype, **options):
    core = jnp.asarray(tensor, dtype)
    gram = truncate(core, tau, capacity=capacity, **options)
    return gram, truncate(core, tau, capacity=capacity, policy=RANDOMIZED, **options)


def test_these_cases_are_sketched_and_cheap_ones_are_not():
    """A matrix of 64 rows pays at rank 8; an augmented core of a convolution does not."""
    assert sketch_size(64, 64, 8) == 16 and sketch_size(64, 72, 6) and sketch_size(64, 6 * 64, 7)
    assert sketch_size(64, 6 * 7, 6)
    assert sketch_size(4, 1000, 3) is None and sketch_size(128, 9 * 128, 64) is None and sketch_size(64, 64, 60) is None


@pytest.mark.parametrize("x64_too", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("shape", "capacity"), CASES)
def test_error_is_exact_and_within_the_tolerance(shape, capacity, decay, x64_too):
    with jax.enable_x64(x64_too):
        dtype = jnp.float64 if x64_too else jnp.float32
        tensor = tensor_of(shape, decay)
        for tau in (0.2, 1e-3):
            gram, cut = both(tensor, tau, capacity, dtype)
            error = check(cut, tensor)
            assert cut.bound[0] == gram.bound[0]
            if not cut.bound.any():
                assert error <= tau
            # A sketch may lose 1% of the energy that the tolerance drops; beyond that there is a power iteration.
            assert error <= np.hypot(1.05 * check(gram, tensor), 0.1 * tau) + 1e-6


@pytest.mark.parametrize("tau", [0.1, 1e-2, 1e-4])
@pytest.mark.parametrize("criterion", ["tail", "each"])
@pytest.mark.parametrize(("shape", "capacity"), CASES)
def test_ranks_are_those_of_the_gram_route_beside_a_gap(shape, capacity, criterion, tau):
    """Three directions a mode, and far below the threshold as many small ones as there are."""
    tensor = tensor_of(shape, "rank 3", seed=1)
    noise = np.random.default_rng(2).normal(size=shape)
    tensor = tensor + 0.1 * tau * noise / np.linalg.norm(noise)
    gram, cut = both(tensor, tau, capacity, jnp.float32)
    assert cut.rank.tolist() == gram.rank.tolist()
    assert check(cut, tensor) <= tau

    policy = RANDOMIZED._replace(criterion=criterion, spare=1)
    cut = truncate(jnp.asarray(tensor, jnp.float32), tau, capacity=capacity, policy=policy)
    assert (cut.rank >= gram.rank).all()
    check(cut, tensor)


def test_what_the_sketch_loses_counts_against_the_tolerance(x64):
    """Many equal small directions outside of any sketch: dropping them is not allowed, so the capacity holds the rank down."""
    values = np.where(np.arange(64) < 4, 1.0, 0.1)
    rng = np.random.default_rng(0)
    tensor = (orthonormal(rng, 64, 64) * values) @ orthonormal(rng, 64, 64).T
    outside = 0.1 * np.sqrt(60) / np.linalg.norm(tensor)
    cut = truncate(jnp.array(tensor), 0.9 * outside, capacity=(8, 8), policy=RANDOMIZED)
    assert cut.bound[0] and cut.rank[0] == 8
    check(cut, tensor)
    cut = truncate(jnp.array(tensor), 1.1 * outside, capacity=(8, 8), policy=RANDOMIZED)
    assert cut.rank.tolist() == [4, 4] and not cut.bound.any()


def test_a_sketch_finds_columns_that_differ_in_one_mode_only():
    """A kernel with one pixel: a Kronecker product of small test matrices would see a fraction of its rank."""
    tensor = np.zeros((3, 2, 64, 64))
    tensor[1, 0] = tensor_of((64, 64), "flat")[:, :] @ np.diag(np.arange(64) < 7)
    cut = truncate(jnp.asarray(tensor, jnp.float32), 1e-5, capacity=(2, 2, 7, 7), policy=RANDOMIZED)
    assert cut.rank.tolist() == [1, 1, 7, 7]
    assert check(cut, tensor) < 1e-6


@pytest.mark.parametrize("floor", [0, 10])
@pytest.mark.parametrize("exist", [5, 12, 40])
def test_only_directions_that_exist_are_kept(exist, floor):
    """Existing rows anywhere, fewer than the sketch has and more; a floor asks for more than the numerical rank."""
    rng = np.random.default_rng(3)
    valid = [np.isin(np.arange(64), rng.permutation(64)[:exist]) for _ in range(2)]
    tensor = np.zeros((64, 64))
    tensor[np.ix_(*valid)] = tensor_of((exist, exist), "rank 3")
    masks = [jnp.array(mask) for mask in valid]
    cut = truncate(
        jnp.asarray(tensor, jnp.float32), 0.1, capacity=(12, 12), valid=masks, policy=RANDOMIZED, floor=[floor] * 2
    )
    assert cut.rank.tolist() == [max(3, min(floor, exist))] * 2
    assert check(cut, tensor, valid) < 1e-6


def test_a_zero_core_and_dependent_slices():
    cut = truncate(jnp.zeros((64, 64)), 0.1, capacity=(8, 8), policy=RANDOMIZED)
    assert cut.rank.tolist() == [1, 1] and float(cut.error) == 0
    check(cut, np.zeros((64, 64)))
    # Cut to rank 1 in its last mode, the first keeps no more directions than are left.
    tensor = tensor_of((64, 64), "slow")
    policy = RANDOMIZED._replace(max_rank=(6, 1))
    cut = truncate(jnp.asarray(tensor, jnp.float32), 0.0, capacity=(8, 8), policy=policy)
    assert cut.rank.tolist() == [1, 1]
    check(cut, tensor)


def test_numbers_follow_from_the_step_alone():
    core = jnp.asarray(tensor_of((64, 64), "slow"), jnp.float32)
    run = jax.jit(lambda step: truncate(core, 0.0, capacity=(8, 8), policy=RANDOMIZED, step=step).core)
    first, again, other = run(0), run(0), run(1)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, truncate(core, 0.0, capacity=(8, 8), policy=RANDOMIZED).core)
    assert np.abs(np.linalg.norm(first) - np.linalg.norm(other)) > 1e-5


def test_rows_of_the_test_matrix_are_kronecker_products():
    key = jax.random.key(0)
    rows = khatri_rao(key, 5, (2, 3, 4), jnp.float32)
    vectors = jax.random.normal(key, (5, 9))
    for row, v in zip(rows, vectors):
        np.testing.assert_allclose(row, np.kron(np.kron(v[:2], v[2:5]), v[5:]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(96, 80), (3, 3, 40, 64)])
def test_hosvd(shape):
    capacity = tuple(min(n, 7) for n in shape)
    tensor = tensor_of(shape, "rank 3")
    kernel = hosvd(jnp.asarray(tensor, jnp.float32), rank=capacity, tolerance=1e-3, route="randomized")
    assert kernel.core.shape == capacity and active_rank(kernel).tolist() == [3] * len(shape)
    np.testing.assert_allclose(dense64(kernel), tensor, atol=1e-6)
    kernel = hosvd(jnp.asarray(tensor_of(shape, "slow"), jnp.float32), rank=capacity, route="randomized")
    assert tuple(active_rank(kernel).tolist()) == capacity
    assert orthonormality(kernel) < 5e-6


def test_a_route_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="route='gramm'"):
        tdlrt(optax.sgd(0.1), tolerance=0.1, route="gramm")
    with pytest.raises(ValueError, match="route='svd'"):
        hosvd(jnp.ones((4, 5)), route="svd")


def test_bug_descends_and_resumes_exactly():
    """A matrix large enough for its augmented core to be sketched."""
    size, capacity = 224, 112
    assert sketch_size(2 * capacity, 2 * capacity, capacity)
    rng = np.random.default_rng(0)
    kernel = random_kernel(rng, (size, size), (20, 20), (capacity, capacity), jnp.float32)
    target = jnp.asarray(orthonormal(rng, size, 10) @ orthonormal(rng, size, 10).T * 10, jnp.float32)

    def trajectory(route, steps, kernel=kernel, state=None):
        tx = tdlrt(optax.sgd(0.1), tolerance=0.02, route=route)
        gradient = value_and_grad(lambda w: jnp.sum((to_dense(w) - target) ** 2))

        @jax.jit
        def step(kernel, state):
            value, grads = gradient(kernel)
            updates, state = tx.update(grads, state, kernel, value_and_grad_fn=gradient)
            return optax.apply_updates(kernel, updates), state, value

        state, losses = tx.init(kernel) if state is None else state, []
        for _ in range(steps):
            kernel, state, value = step(kernel, state)
            losses.append(float(value))
            assert orthonormality(kernel) < 5e-6
        return kernel, state, losses

    kernel_4, state_4, losses = trajectory("randomized", 4)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.3 * losses[0]
    _, gram_state, gram_losses = trajectory("gram", 4)
    np.testing.assert_allclose(losses, gram_losses, rtol=1e-3)
    assert losses != gram_losses  # by other sketches' rounding: it was sketched
    assert state_4.rank["kernel"].tolist() == gram_state.rank["kernel"].tolist()

    kernel_2, state_2, _ = trajectory("randomized", 2)
    stored = jax.tree.map(np.asarray, (kernel_2, state_2))
    resumed, _, _ = trajectory("randomized", 2, *jax.tree.map(jnp.asarray, stored))
    jax.tree.map(np.testing.assert_array_equal, resumed, kernel_4)
