"""Tucker tensors, HOSVD, truncation, canonical form, capacities and averages against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from tdlrt_jax import (
    RankPolicy,
    TuckerTensor,
    active_rank,
    average,
    canonicalize,
    fit_capacity,
    full_kernels,
    hosvd,
    kernel_shape,
    parameter_count,
    resize,
    to_dense,
)
from tdlrt_jax.truncation import truncate
from tdlrt_jax.tucker import fold, multi_mode_product, unfold
from tests import references
from tests.properties.strategies import (
    SHAPES,
    TOLERANCE,
    assert_close,
    assert_orthonormal,
    cases,
    dtypes,
    feasible,
    forms,
    kernel_of,
    kernels,
    precision,
    ranks,
    seeds,
)

dense_of = jax.jit(to_dense)
rank_of = jax.jit(active_rank)
canonical = jax.jit(canonicalize)
taus = st.one_of(st.sampled_from([0.0, 0.5]), st.floats(1e-3, 0.9))


def tail(values, rank):
    return np.sqrt(np.sum(values[rank:] ** 2))


def singular_values(tensor):
    return [np.linalg.svd(references.unfold(tensor, mode), compute_uv=False) for mode in range(tensor.ndim)]


@cases(ci=30, nightly=1400)
@given(st.data(), dtypes)
def test_the_full_tensor_and_its_measures(data, dtype):
    with precision(dtype):
        form, kernel = data.draw(kernels(dtype))
        assert_close(dense_of(kernel.tucker), kernel.dense, TOLERANCE[dtype])
        assert rank_of(kernel.tucker).tolist() == list(kernel.core.shape)
        assert kernel_shape(kernel.tucker) == form.shape
        stored = kernel.core.size + sum(u.size for u in kernel.factors if u is not None)
        assert parameter_count(form.shape, kernel.core.shape, form.whole) == stored


@functools.partial(jax.jit, static_argnums=2)
def multilinear(tensor, matrices, modes):
    skip, transpose, mode = modes
    matrices = [m if m is None or not transpose else m.T for m in matrices]
    product = multi_mode_product(tensor, matrices, transpose=transpose, skip=skip)
    unfolded = unfold(tensor, mode)
    return product, unfolded, fold(unfolded, mode, tensor.shape)


@cases(ci=15, nightly=700)
@given(st.data(), dtypes, seeds)
def test_unfoldings_and_mode_products(data, dtype, seed):
    with precision(dtype):
        shape = data.draw(st.sampled_from(SHAPES))
        mode = data.draw(st.integers(0, len(shape) - 1))
        skip = data.draw(st.sampled_from([None, mode]))
        rng = np.random.default_rng(seed)
        tensor = rng.standard_normal(shape).astype(dtype)
        matrices = [None if m == mode else rng.standard_normal((n + 1, n)).astype(dtype) for m, n in enumerate(shape)]
        if skip is not None:
            matrices[skip] = rng.standard_normal((2, shape[skip])).astype(dtype)
        modes = (skip, data.draw(st.booleans()), mode)
        product, unfolded, folded = multilinear(tensor, matrices, modes)
        expected = references.mode_products(tensor.astype(float), matrices, skip)
        norms = [1.0 if m is None else np.linalg.norm(m) for m in matrices]
        assert_close(product, expected, TOLERANCE[dtype], np.linalg.norm(tensor) * np.prod(norms))
        np.testing.assert_array_equal(unfolded, references.unfold(tensor, mode))
        np.testing.assert_array_equal(folded, tensor)


@cases(ci=20, nightly=900)
@given(st.data(), dtypes, seeds)
def test_hosvd_of_given_ranks_is_within_the_bounds_of_the_best_approximation(data, dtype, seed):
    """Every mode's tail is a lower bound of the error, the root of the sum of their squares an upper one."""
    with precision(dtype):
        form, kernel = data.draw(kernels(dtype, highest_decades=5))
        tensor = kernel.dense
        if data.draw(st.booleans()):
            noise = np.random.default_rng(seed).standard_normal(form.shape)
            tensor = tensor + 0.1 * np.linalg.norm(tensor) * noise / np.linalg.norm(noise)
        tensor = tensor.astype(dtype).astype(float)
        asked = tuple(None if w else r for w, r in zip(form.whole, form.capacity))
        found = hosvd(jnp.asarray(tensor, dtype), rank=asked)
        assert found.core.shape == form.capacity and found.core.dtype == dtype
        used = active_rank(found).tolist()
        assert_orthonormal(found.factors, used, 10 * TOLERANCE[dtype])
        error = np.linalg.norm(references.to_dense(np.asarray(found.core, float), as64(found.factors)) - tensor)
        rounding = TOLERANCE[dtype] * np.linalg.norm(tensor)
        tails = [tail(values, r) for values, r in zip(singular_values(tensor), form.capacity)]
        assert max(tails) - rounding <= error <= np.sqrt(np.sum(np.square(tails))) + rounding


def as64(factors):
    return [None if u is None else np.asarray(u, np.float64) for u in factors]


@cases(ci=20, nightly=900)
@given(st.data(), dtypes, taus, st.sampled_from(["tail", "each"]))
def test_hosvd_to_a_tolerance_has_the_ranks_of_the_definition(data, dtype, tau, criterion):
    with precision(dtype):
        form, kernel = data.draw(kernels(dtype))
        tensor = kernel.dense.astype(dtype)
        asked = tuple(None if w else n for w, n in zip(form.whole, form.shape))
        found = hosvd(jnp.asarray(tensor), rank=asked, tolerance=tau, criterion=criterion)
        exact, norm = tensor.astype(float), np.linalg.norm(tensor)
        used = active_rank(found).tolist()
        assert_orthonormal(found.factors, used, 10 * TOLERANCE[dtype])
        error = np.linalg.norm(references.to_dense(np.asarray(found.core, float), as64(found.factors)) - exact)
        if criterion == "tail":
            assert error <= tau * norm + TOLERANCE[dtype] * norm
        whole = [mode for mode, w in enumerate(form.whole) if w]
        expected = {
            references.truncate(exact, tau * (1 + change), whole, criterion=criterion)[0].shape
            for change in (-1e-3, 0, 1e-3)
        }
        if tau >= 1e-3 and len(expected) == 1:  # else rounding decides
            assert tuple(used) == expected.pop()


@cases(ci=20, nightly=900)
@given(st.data(), dtypes, taus, seeds)
def test_a_truncation_reports_what_it_did(data, dtype, tau, seed):
    with precision(dtype):
        form = data.draw(forms())
        policy = RankPolicy(
            data.draw(st.sampled_from(["tail", "each"])),
            spare=data.draw(st.sampled_from([0, 0, 2])),
            max_rank=data.draw(st.sampled_from([None, None, 2])),
            route=data.draw(st.sampled_from(["gram", "gram", "randomized"])),
        )
        exists = [data.draw(st.integers(1, n)) for n in form.shape]
        floor = [data.draw(st.integers(0, n)) for n in form.shape]
        ceiling = [data.draw(st.integers(1, n)) for n in form.shape]
        bounded = data.draw(st.booleans())
        core = np.random.default_rng(seed).standard_normal(form.shape)
        for mode, (size, w) in enumerate(zip(exists, form.whole)):
            if not w:
                core = references.mode_product(core, np.diag((np.arange(form.shape[mode]) < size) * 1.0), mode)
        core = core.astype(dtype)
        valid = tuple(None if w else jnp.arange(n) < size for n, size, w in zip(form.shape, exists, form.whole))
        result = truncate(
            jnp.asarray(core),
            tau,
            capacity=form.capacity,
            whole=form.whole,
            valid=valid,
            policy=policy,
            floor=jnp.asarray(floor) if bounded else jnp.zeros(len(floor), int),
            ceiling=jnp.asarray(ceiling) if bounded else jnp.full(len(ceiling), 99),
        )
        used, norm = result.rank.tolist(), np.linalg.norm(core)
        for r, size, n, w, top in zip(used, form.capacity, form.shape, form.whole, ceiling):
            assert r == n if w else 1 <= r <= min(size, top if bounded else n, policy.max_rank or n)
        assert feasible(used, form.whole) == tuple(used)
        rotations = [None if p is None else np.asarray(p, float) for p in result.rotations]
        assert_orthonormal(rotations, used, 10 * TOLERANCE[dtype])
        again = references.to_dense(np.asarray(result.core, float), rotations)
        error = np.linalg.norm(again - core) / norm
        assert abs(error - float(result.error)) <= 10 * np.sqrt(np.finfo(dtype).eps) * max(error, 1e-3)
        projected = references.mode_products(core.astype(float), references.transposes(rotations))
        assert_close(result.core, projected, TOLERANCE[dtype], norm)
        # ``bound`` is about what keeps ranks below the ceiling.
        if policy.criterion == "tail" and not bounded and not np.any(result.bound):
            assert error <= tau + 10 * TOLERANCE[dtype]


@cases(ci=20, nightly=700)
@given(st.data(), dtypes, seeds)
def test_the_canonical_form_is_the_same_tensor(data, dtype, seed):
    """Of factors that are not orthonormal, repeat directions and skip some."""
    with precision(dtype):
        form, rng = data.draw(forms()), np.random.default_rng(seed)
        core = rng.standard_normal(form.capacity).astype(dtype)
        factors = [
            None if w else rng.standard_normal((n, size)).astype(dtype)
            for n, size, w in zip(form.shape, form.capacity, form.whole)
        ]
        for factor in factors:
            if factor is not None and data.draw(st.booleans()):
                factor[:, data.draw(st.integers(0, factor.shape[1] - 1))] = data.draw(st.sampled_from([0.0, 1.0]))
        expected = references.to_dense(core.astype(float), as64(factors))
        scale = np.linalg.norm(core) * np.prod([1.0 if u is None else np.linalg.norm(u, 2) for u in as64(factors)])
        found = canonical(TuckerTensor(jnp.asarray(core), tuple(map(as_jax, factors))))
        assert [np.shape(part) for part in jax.tree.leaves(found)] == [
            part.shape for part in (core, *[u for u in factors if u is not None])
        ]
        assert_orthonormal(found.factors, rank_of(found).tolist(), 10 * TOLERANCE[dtype])
        assert_close(dense_of(found), expected, TOLERANCE[dtype], scale)


def as_jax(array):
    return None if array is None else jnp.asarray(array)


@cases(ci=20, nightly=900)
@given(st.data(), dtypes)
def test_capacities_change_arrays_and_not_tensors(data, dtype):
    with precision(dtype):
        form, kernel = data.draw(kernels(dtype))
        rank = kernel.core.shape
        sizes = [n if w else data.draw(st.integers(r, n)) for r, n, w in zip(rank, form.shape, form.whole)]
        resized = resize({"w": kernel.tucker}, {"w": sizes})["w"]
        assert all(r <= have <= size for r, have, size in zip(rank, resized.core.shape, sizes))
        assert rank_of(resized).tolist() == list(rank)
        np.testing.assert_array_equal(dense64(resized), dense64(kernel.tucker))
        back = resize(resized, form.capacity)
        jax.tree.map(np.testing.assert_array_equal, back, kernel.tucker)
        fitted = fit_capacity({"w": kernel.tucker}, multiple=data.draw(st.integers(1, 4)))
        roomy = resize({"w": kernel.tucker}, fitted)
        np.testing.assert_array_equal(dense64(roomy["w"]), dense64(kernel.tucker))
        useful = [min(n, np.prod(form.shape) // n) for n in form.shape]
        full = any(
            r == size < limit for r, size, limit, w in zip(rank, roomy["w"].core.shape, useful, form.whole) if not w
        )
        assert full or not full_kernels(roomy)


def dense64(kernel):
    return references.to_dense(np.asarray(kernel.core, float), as64(kernel.factors))


@cases(ci=15, nightly=500)
@given(st.data(), dtypes, st.lists(st.floats(-2, 2), min_size=1, max_size=3))
def test_averages_are_those_of_the_tensors(data, dtype, weights):
    with precision(dtype):
        form = data.draw(forms(SHAPES[:10]))
        members = [kernel_of(form, data.draw(ranks(form)), data.draw(seeds), dtype) for _ in weights]
        expected = sum(weight * member.dense for weight, member in zip(weights, members))
        scale = sum(abs(weight) * np.linalg.norm(member.dense) for weight, member in zip(weights, members))
        assume(scale > 0.1)
        found = average_of([member.tucker for member in members], weights)
        assert_orthonormal(found.factors, rank_of(found).tolist(), 10 * TOLERANCE[dtype])
        assert_close(dense64(found), expected, TOLERANCE[dtype], scale)


@jax.jit
def average_of(members, weights):
    return average(members, weights)
