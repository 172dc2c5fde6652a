import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tdlrt_jax
from tdlrt_jax import RankPolicy, hosvd
from tdlrt_jax.ranks import max_capacity
from tdlrt_jax.truncation import truncate
from tests import references
from tests.helpers import dense64, orthonormality


def decaying(seed, shape, decay):
    """A tensor whose unfoldings have singular values that fall by about ``decay`` each, in float64."""
    rng = np.random.default_rng(seed)
    tensor = rng.normal(size=shape)
    for mode, n in enumerate(shape):
        q = np.linalg.qr(rng.normal(size=(n, n)))[0]
        tensor = references.mode_product(tensor, (q * decay ** np.arange(n)) @ q.T, mode)
    return tensor / np.linalg.norm(tensor)


def rebuild(cut):
    core = np.asarray(cut.core, np.float64)
    return references.mode_products(core, [None if p is None else np.asarray(p, np.float64) for p in cut.rotations])


shapes = st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple)


@settings(max_examples=60)
@given(shapes, st.integers(0, 999), st.sampled_from([1.0, 0.5, 0.1, 0.01]), st.floats(3e-6, 0.9))
def test_error_is_within_the_tolerance_in_float32(shape, seed, decay, tau):
    tensor = decaying(seed, shape, decay).astype(np.float32)
    cut = jax.jit(truncate)(tensor, tau)
    assert np.linalg.norm(rebuild(cut) - tensor) <= tau * np.linalg.norm(tensor) * (1 + 1e-5)
    ranks = cut.rank.tolist()
    assert all(1 <= r <= n for r, n in zip(ranks, shape))
    assert all(r <= np.prod(ranks[:i] + ranks[i + 1 :]) for i, r in enumerate(ranks))


@pytest.mark.parametrize("criterion", ["tail", "each"])
@pytest.mark.parametrize("tau", [0.5, 0.1, 1e-2, 1e-4, 0.0])
@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (6, 7), (5, 4, 6), (8, 1, 3), (9, 2, 2)])
def test_ranks_are_the_smallest_that_the_convention_allows(x64, shape, tau, criterion):
    """Against an SVD of every unfolding, mode after mode."""
    for seed in range(3):
        tensor = decaying(seed, shape, 0.4)
        cut = truncate(jnp.array(tensor), tau, policy=RankPolicy(criterion))
        expected, _ = references.truncate(tensor, tau, criterion=criterion)
        assert tuple(cut.rank.tolist()) == expected.shape
        error = np.linalg.norm(rebuild(cut) - tensor)
        np.testing.assert_allclose(float(cut.error), error, atol=1e-12)


@pytest.mark.parametrize("tau", [1e-5, 1e-6])
def test_small_directions_are_resolved_below_the_square_root_of_the_precision(tau):
    """A Gram matrix alone ends at 3e-4 in float32: its eigenvalues are rounding from there on."""
    tensor = decaying(1, (6, 6, 6), 0.1)
    kernel = hosvd(jnp.array(tensor, jnp.float32), tolerance=tau)
    expected, _ = references.truncate(tensor, tau)
    assert tdlrt_jax.active_rank(kernel).tolist() == list(expected.shape)
    assert np.linalg.norm(dense64(kernel) - tensor) <= tau + 1e-6


def test_conventions(x64):
    tensor = jnp.array(5.0 * decaying(0, (6, 6, 6), 0.3))
    shared = truncate(tensor, 0.1)
    same = truncate(tensor, 0.1 / np.sqrt(3), policy=RankPolicy(convention="per_mode"))
    absolute = truncate(tensor, 0.5, policy=RankPolicy(convention="absolute"))
    assert shared.rank.tolist() == same.rank.tolist() == absolute.rank.tolist()
    whole = truncate(tensor, 0.1, whole=(True, False, False))
    assert whole.rank[0] == 6 and whole.rotations[0] is None


def test_a_matrix_is_truncated_once_with_the_whole_tolerance(x64, rng):
    left, right = np.linalg.qr(rng.normal(size=(6, 6)))[0], np.linalg.qr(rng.normal(size=(5, 5)))[0]
    matrix = left[:, :5] @ np.diag([1, 0.5, 0.1, 0.05, 0.01]) @ right
    # The tail (0.1, 0.05, 0.01) has norm 0.112, (0.05, 0.01) 0.051; ||C|| = 1.12.
    cut = truncate(jnp.array(matrix), 0.1)
    assert cut.rank.tolist() == [2, 2]


def test_each_is_idempotent_and_tail_is_not(x64):
    tensor = jnp.array(decaying(3, (8, 8, 8), 0.7))
    ranks = {}
    for criterion in ("each", "tail"):
        core, ranks[criterion] = tensor, []
        for _ in range(6):
            cut = truncate(core, 0.3, policy=RankPolicy(criterion))
            core = cut.core
            ranks[criterion].append(int(cut.rank.sum()))
    assert len(set(ranks["each"])) == 1
    assert ranks["tail"][-1] < ranks["tail"][0]


def test_bounds_spare_and_floor(x64):
    tensor = jnp.array(decaying(0, (6, 6, 6), 0.3))
    base = truncate(tensor, 0.1).rank
    assert (truncate(tensor, 0.1, policy=RankPolicy(spare=1)).rank == base + 1).all()
    assert truncate(tensor, 0.9, policy=RankPolicy(min_rank=(2, 3, 4))).rank.tolist() == [2, 3, 4]
    held = truncate(tensor, 0.0, policy=RankPolicy(max_rank=2))
    assert held.rank.tolist() == [2, 2, 2] and held.bound.all()
    assert not truncate(tensor, 0.1).bound.any()
    assert truncate(tensor, 0.9, floor=jnp.array([5, 4, 3])).rank.tolist() == [5, 4, 3]


def test_only_directions_that_exist_are_kept():
    """A zero core keeps one direction a mode, and one that has a basis vector."""
    cut = truncate(jnp.zeros((3, 3)), 0.1, valid=[jnp.array([False, True, False])] * 2)
    assert cut.rank.tolist() == [1, 1]
    np.testing.assert_array_equal(np.abs(cut.rotations[0][:, 0]), [0, 1, 0])


def test_tiny_and_huge_cores_do_not_under_or_overflow():
    tensor = decaying(0, (5, 5, 5), 0.3)
    ranks = truncate(jnp.array(tensor, jnp.float32), 0.05).rank.tolist()
    for scale in (1e-25, 1e25):
        cut = truncate(jnp.array(tensor * scale, jnp.float32), 0.05)
        assert cut.rank.tolist() == ranks
        np.testing.assert_allclose(rebuild(cut), tensor * scale, atol=0.05 * scale)


@given(shapes, st.integers(0, 99))
def test_hosvd_without_tolerance_is_lossless(shape, seed):
    tensor = np.random.default_rng(seed).normal(size=shape)
    kernel = hosvd(jnp.array(tensor, jnp.float32))
    assert kernel.core.shape == max_capacity(shape)
    np.testing.assert_allclose(dense64(kernel), tensor, atol=3e-5 * np.abs(tensor).max())
    assert orthonormality(kernel) < 5e-6


def test_hosvd_of_a_tall_matrix_and_with_whole_modes(x64, rng):
    tall = jnp.array(rng.normal(size=(300, 4)))
    np.testing.assert_allclose(tdlrt_jax.to_dense(hosvd(tall)), tall, atol=1e-12)
    tensor = jnp.array(rng.normal(size=(3, 3, 6, 7)))
    kernel = hosvd(tensor, rank=(None, None, 4, 5))
    assert kernel.factors[0] is None and kernel.core.shape == (3, 3, 4, 5)
    expected = references.truncate(np.asarray(tensor), 0.0, whole=(0, 1))
    assert expected[0].shape == (3, 3, 6, 7)
    best = np.linalg.norm(tensor - tdlrt_jax.to_dense(kernel))
    assert best < np.linalg.norm(tensor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": (7, 1, 1)}, "rank=7 of mode 0: expected a count in 1..4"),
        ({"rank": (0, 1, 1)}, "rank=0 of mode 0"),
        ({"rank": 0}, "rank=0"),
        ({"rank": (1, 1)}, "2 entries"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"tolerance": 1.0}, "below 1"),
        ({"tolerance": float("nan")}, "finite"),
    ],
)
def test_bad_requests_name_what_was_given(options, message):
    with pytest.raises(ValueError, match=message):
        hosvd(jnp.ones((4, 5, 6)), **options)


def test_hosvd_refuses_integers_and_vectors():
    with pytest.raises(ValueError, match="floating"):
        hosvd(jnp.ones((4, 5), int))
    with pytest.raises(ValueError, match="two modes"):
        hosvd(jnp.ones(4))


@pytest.mark.parametrize("size", [64, 128])
def test_rounding_in_a_matrixs_second_mode_holds_no_rank_down(size):
    """What leaks from the first mode's cut into the second is no direction that the arrays have no room for."""
    rng = np.random.default_rng(size)
    u, v = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    matrix = jnp.asarray((u * 10.0 ** (-6 * np.arange(size) / size)) @ v.T, jnp.float32)
    for capacity in ((size, size), (size // 2, size // 2)):
        cut = truncate(matrix, 0.03, capacity=capacity)
        assert not cut.bound.any() and cut.rank[0] == cut.rank[1]
