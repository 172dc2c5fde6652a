"""New directions: orthonormal, and holding the range of the step, which orthonormality says nothing about."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdlrt_jax import TuckerTensor, lift, to_dense
from tdlrt_jax.integrators import augment, augmentation, embed, unchanged
from tdlrt_jax.integrators.augmentation import augmented_width
from tdlrt_jax.rotation import principal_rotation
from tdlrt_jax.tucker import active_columns, multi_mode_product
from tests.helpers import orthonormal, random_kernel, tangent_to_dense

# (n, R): the sizes of a 3 x 3 kernel's and a wide layer's modes, and the edges: one row, full capacity, R = n.
SIZES = [(1, 1), (2, 1), (2, 2), (5, 2), (5, 5), (8, 3), (8, 8), (20, 6), (20, 20), (64, 16), (64, 40)]


new_directions = partial(jax.jit, static_argnums=2)(augmentation.new_directions)


@partial(jax.jit, static_argnums=2)
def all_new_directions(steps, bases, width):
    """One program a shape, one case after the other."""
    return jax.lax.map(lambda case: new_directions(*case, width), (steps, bases))


def prescribed(rng, n, rank, spectrum, inside):
    """A float32 basis ``(n, rank)`` and a step whose part outside of it has the given singular values."""
    q = orthonormal(rng, n, n)
    basis, complement = q[:, :rank], q[:, rank:]
    spectrum = np.asarray(spectrum)[: min(rank, n - rank)]
    left, right = orthonormal(rng, n - rank, len(spectrum)), orthonormal(rng, rank, len(spectrum))
    step = (complement @ left * spectrum) @ right.T + inside * basis @ rng.normal(size=(rank, rank)) / rank
    return step.astype(np.float32), basis.astype(np.float32)


def pad(matrix, capacity):
    return np.pad(matrix, ((0, 0), (0, capacity - matrix.shape[1])))


def spectra(rng, count):
    """Singular values: condition numbers 1 to 1e8, evenly spread, scattered, clustered, one large and the rest small."""
    for exponent in range(9):
        yield np.geomspace(1, 10.0**-exponent, count)
    for _ in range(12):
        yield 10 ** -rng.uniform(0, 7, count)
        yield 10 ** -rng.choice(rng.uniform(0, 6, 3), count)
        yield np.r_[1, np.full(count - 1, 10 ** -rng.uniform(2, 7))]
    yield np.r_[1, np.full(count - 1, 5e-4)]  # the small ones vanish in the rounding of the Gram matrix


def cases(rng, n, capacity):
    for rank in sorted({1, (capacity + 1) // 2, capacity}):
        for i, spectrum in enumerate(spectra(rng, rank)):
            spectrum = spectrum * (np.arange(rank) <= rng.integers(rank))  # often dependent columns, too
            yield prescribed(rng, n, rank, spectrum * 10 ** rng.uniform(-10, 3), (0, 0, 0, 1e-3, 1, 100)[i % 6])
        step, basis = prescribed(rng, n, rank, np.geomspace(1, 1e-3, rank), 1)
        repeated, holes = step.copy(), step.copy()
        repeated[:, -1], repeated[:, rank // 2] = -2 * step[:, 0], step[:, 0]
        holes[:, : rank // 2] = 0
        yield from [(repeated, basis), (holes, basis), (np.zeros_like(step), basis)]
        yield prescribed(rng, n, rank, np.zeros(rank), 1)  # fully inside range(U)


def measure(step, basis, new):
    """The deviation of ``[U | Ũ]`` from orthonormal, and the part of the step that its range does not hold, in float64."""
    step, bases = np.float64(step), np.float64(np.concatenate([basis, new], axis=1))
    active = np.any(bases != 0, axis=0)
    deviation = np.abs(bases.T @ bases - np.diag(active)).max()
    q = np.linalg.qr(bases[:, active])[0]
    lost = np.linalg.norm(step - q @ (q.T @ step)) / max(np.linalg.norm(step), np.finfo(np.float64).tiny)
    return deviation, lost


@pytest.mark.parametrize(("n", "capacity"), SIZES)
def test_new_directions_are_orthonormal_and_hold_the_step(rng, n, capacity):
    width = augmented_width(n, capacity)
    steps, bases = zip(*cases(rng, n, capacity))
    new = all_new_directions(
        np.stack([pad(step, capacity) for step in steps]), np.stack([pad(basis, capacity) for basis in bases]), width
    )
    new = np.asarray(new)
    assert new.shape == (len(steps), n, width)
    assert np.isfinite(new).all()
    for step, basis, directions in zip(steps, bases, new):
        deviation, lost = measure(step, basis, directions)
        assert deviation < 2e-6
        assert lost < 1e-5
        # Unused columns are zero exactly and last, and nothing is made up: no more columns than the step's outside has.
        used = np.any(directions != 0, axis=0)
        assert not np.any(np.diff(used.astype(int)) > 0)
        assert used.sum() <= min(basis.shape[1], n - basis.shape[1])


def test_a_small_direction_beside_dependent_columns_breaks_no_factorization():
    """Two directions, 1 and 5e-4, in eight columns: the Gram matrix mixes the small one with those that are not there.

    Normalized at once, such columns are parallel to rounding, and a Cholesky factorization of theirs is not finite, now and then.
    """
    steps, bases = zip(*(prescribed(np.random.default_rng(seed), 20, 8, [1, 5e-4], 0) for seed in range(60)))
    new = np.asarray(all_new_directions(np.stack(steps), np.stack(bases), 8))
    assert np.isfinite(new).all()
    assert (np.any(new != 0, axis=1).sum(axis=1) == 2).all()
    assert max(max(measure(*case)) for case in zip(steps, bases, new)) < 1e-6


@pytest.mark.parametrize(("n", "rank", "dependent"), [(8, 3, 0), (20, 6, 0), (20, 6, 2), (64, 16, 5)])
def test_as_many_columns_as_the_step_has_directions(rng, n, rank, dependent):
    step, basis = prescribed(rng, n, rank, np.geomspace(1, 1e-3, rank), 1)
    step[:, rank - dependent :] = 3 * step[:, :dependent]
    new = new_directions(step, basis, rank)
    assert active_columns(new).sum() == rank - dependent
    assert active_columns(new_directions(0 * step, basis, rank)).sum() == 0
    assert active_columns(new_directions(basis @ step[:rank], basis, rank)).sum() == 0


@pytest.mark.parametrize(("n", "rank", "capacities"), [(8, 3, (3, 8)), (20, 6, (6, 20)), (64, 10, (16, 40))])
def test_the_range_does_not_depend_on_capacity(rng, n, rank, capacities):
    """Whatever the zero columns: weighted by the step, and the projectors themselves where it is well conditioned."""
    for condition in (1, 10, 1e3, 1e6):
        step, basis = prescribed(rng, n, rank, np.geomspace(1, 1 / condition, rank), 1)
        projectors = []
        for capacity in capacities:
            args = np.stack([pad(step, capacity)]), np.stack([pad(basis, capacity)])
            new = np.float64(all_new_directions(*args, augmented_width(n, capacity))[0])
            projectors.append(new @ new.T)
        difference = projectors[0] - projectors[1]
        assert np.linalg.norm(difference @ step) < 1e-5 * np.linalg.norm(step)
        if condition <= 10:
            assert np.abs(difference).max() < 1e-5


def test_a_step_that_is_not_finite_stays_visible(rng):
    """It must not turn into no new directions: the optimizer refuses the step by what it sees here."""
    step, basis = prescribed(rng, 8, 3, np.ones(3), 0)
    for bad in (np.nan, np.inf):
        step[2, 1] = bad
        assert not np.isfinite(new_directions(step, basis, 3)).all()


def test_qr_of_the_joined_bases_fails_on_the_range(rng):
    """Why it is not simply the QR of ``[U | K]`` with the columns of small R_jj zeroed, as the method is often coded.

    For a column that is zero (padding) or depends on those before it, a Householder QR invents a direction ``q_j`` with
    ``R_jj = 0``. Columns after it are then expanded in ``q_j`` as well, so zeroing ``q_j`` takes that part of them away, while
    what remains is orthonormal all the same: only the range shows it.
    """

    def joined_qr(basis, step):
        q, triangular = np.linalg.qr(np.concatenate([basis, step], axis=1))
        diagonal = np.abs(np.diag(triangular))
        return q * (diagonal > 1e-5 * diagonal.max())

    # U = [e_1 | 0], K = e_2 + e_3: for the zero column the QR invents e_2, and with it half of K's energy goes.
    basis = np.float32([[1, 0], [0, 0], [0, 0], [0, 0]])
    step = np.float32([[0, 0], [1, 0], [1, 0], [0, 0]])
    new = joined_qr(basis, step)[:, 2:]
    deviation, lost = measure(step, basis, new)
    assert deviation < 2e-6
    np.testing.assert_allclose(lost, np.sqrt(0.5), atol=1e-6)
    assert measure(step, basis, new_directions(step, basis, 2))[1] < 1e-6

    # The same at a size as in training: rank 6 at capacity 14, n = 20, a well-conditioned step.
    step, basis = prescribed(rng, 20, 6, np.ones(6), 0)
    step, basis = pad(step, 14), pad(basis, 14)
    deviation, lost = measure(step, basis, joined_qr(basis, step)[:, 14:])
    assert deviation < 2e-6
    assert lost > 0.3
    assert measure(step, basis, new_directions(step, basis, 10))[1] < 1e-6


@jax.jit
def augmented_at(kernel, tangent, other):
    """One program a kernel: frame, augmented bases for ``tangent``, its own embedding and another's."""
    frame = lift(kernel)
    augmented = augment(frame, tangent)
    return frame, augmented, embed(tangent, augmented), embed(other, augmented)


def random_tangent(rng, kernel):
    """In the coordinates of the kernel's frame, zero in its padding."""
    core = jnp.where(kernel.core != 0, rng.normal(size=kernel.core.shape), 0)
    factors = [None if u is None else (u != 0).any(0) * rng.normal(size=u.shape) for u in kernel.factors]
    return TuckerTensor(core, tuple(factors))


@pytest.mark.parametrize(
    ("shape", "rank", "capacity"),
    [
        ((5, 6, 7), (2, 3, 2), (5, 6, 7)),
        ((3, 6, 7), (None, 2, 3), None),
        ((6, 8), (3, 3), (5, 5)),
        ((4, 5, 6), (4, 2, 5), None),  # a full mode, and one without room for as many new directions
        ((4, 5, 6), (2, 2, 3), (4, 4, 6)),  # room for new directions only in the place of unused columns
    ],
)
def test_tangent_vectors_as_cores_in_augmented_bases(x64, rng, shape, rank, capacity):
    kernel = random_kernel(rng, shape, rank, capacity)
    tangent, other = random_tangent(rng, kernel), random_tangent(rng, kernel)
    frame, augmented, core, other_core = augmented_at(kernel, tangent, other)

    # embed(V) ×_i [U_i | Ũ_i] = V, where the augmented bases hold its range.
    assert core.shape == augmented.core.shape
    dense = multi_mode_product(core, augmented.bases)
    np.testing.assert_allclose(dense, tangent_to_dense(tangent, frame), atol=1e-12)
    # Of another vector they see the orthogonal projection.
    dense = tangent_to_dense(other, frame)
    np.testing.assert_allclose(other_core, multi_mode_product(dense, augmented.bases, transpose=True), atol=1e-12)
    # With no new directions, only the core of it.
    np.testing.assert_array_equal(embed(other, unchanged(frame)), other.core)

    # A mode has no more columns than rows.
    new = [(u, t) for u, t in zip(kernel.factors, augmented.new) if u is not None]
    assert [b.shape[1] for b in augmented.bases if b is not None] == [
        min(u.shape[1] + t.shape[1], len(u)) for u, t in new
    ]
    # The network does not change: the columns of U stay bit for bit, the core is padded with zeros.
    widths = [(0, a - r) for a, r in zip(core.shape, kernel.core.shape)]
    np.testing.assert_array_equal(augmented.core, np.pad(kernel.core, widths))
    np.testing.assert_allclose(to_dense(TuckerTensor(augmented.core, augmented.bases)), to_dense(kernel), atol=1e-14)
    for basis, u in zip(augmented.bases, kernel.factors):
        if u is not None:
            used = np.any(u != 0, axis=0)
            np.testing.assert_array_equal(basis[:, : u.shape[1]][:, used], u[:, used])
            np.testing.assert_allclose(basis.T @ basis, np.diag(np.any(basis != 0, axis=0)), atol=1e-14)
    assert unchanged(frame).core.shape == kernel.core.shape


def test_rounding_errors_do_not_pass_for_directions_where_the_complement_is_exhausted():
    """A step of LeNet5 on MNIST: 29 columns beside a basis of 29 in 50 dimensions, which leave 21 to be new."""
    case = np.load(Path(__file__).parent / "exhausted_complement.npz")
    step, basis = case["step"], case["basis"]
    assert np.sum(np.any(basis != 0, axis=0)) == np.sum(np.any(step != 0, axis=0)) == 29
    # Optimized, as it is where it trains: the error that is as large as a direction depends on how sums are rounded.
    optimized = jax.jit(
        augmentation.new_directions, static_argnums=2, compiler_options={"xla_backend_optimization_level": 2}
    )
    new = np.asarray(optimized(step, basis, augmented_width(50, 50)), np.float64)
    active = np.any(new != 0, axis=0)
    assert np.isfinite(new).all() and active.sum() == 21
    np.testing.assert_allclose(new.T @ new, np.diag(active), atol=1e-6)
    np.testing.assert_allclose(basis.T @ new, 0, atol=1e-6)
    outside = step - basis @ (basis.T @ step)
    assert np.linalg.norm(outside - new @ (new.T @ outside)) < 1e-6 * np.linalg.norm(outside)


def test_a_direction_that_is_a_copy_of_a_larger_one_is_dropped(monkeypatch, rng):
    """As rounding can leave it: a small row that is parallel to the largest, and one within the basis."""
    step, basis = prescribed(rng, 20, 6, [1, 0.5, 0.25], 0)

    def leaky(matrix, valid, rounds):
        vectors, rows, _ = principal_rotation(matrix, valid, rounds)
        rows = rows.at[3].set(1e-4 * rows[0]).at[4].set(1e-4 * basis[:, 0])
        return vectors, rows, jnp.sum(rows**2, axis=1)

    monkeypatch.setattr(augmentation, "principal_rotation", leaky)
    new = np.asarray(augmentation.new_directions(jnp.asarray(step), jnp.asarray(basis), 6), np.float64)
    assert np.array_equal(np.any(new != 0, axis=0), [True, True, True, False, False, False])
    np.testing.assert_allclose(new.T @ new, np.diag([1, 1, 1, 0, 0, 0]), atol=1e-6)
