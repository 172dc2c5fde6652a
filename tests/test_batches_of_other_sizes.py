"""What a GPU does and the CPU does not: kernels of other sizes in one batch, and bases without Householder reflections."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tdlrt_jax
from tdlrt_jax import Budget, batching, tdlrt, tdlrt_step, tucker_conv, tucker_linear
from tdlrt_jax.batching import map_batched
from tdlrt_jax.frame import lift
from tdlrt_jax.orthonormal import _inverse_factor, cholesky_qr, orthonormal_rows
from tests.helpers import dense64, orthonormal, orthonormality, random_kernel, tangent_to_dense


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Batches of other sizes; on the CPU they are still loops, see batching."""
    monkeypatch.setattr(batching, "few_and_large", lambda: True)


def test_rows_of_other_shapes_are_one_batch(as_on_a_gpu, rng):
    matrices = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 3), (2, 5), (4, 3), (1, 1))]
    weights = [jnp.asarray(rng.normal(size=matrix.shape[1]), jnp.float32) for matrix in matrices]
    traced = []

    def function(matrix, weight):
        traced.append(matrix.shape)
        return {"product": matrix @ weight, "gram": matrix @ matrix.T, "norm": jnp.sum(matrix**2)}

    results = map_batched(function, matrices, weights, apart=[None] * 4)
    assert (4, 5) in traced
    for result, matrix, weight in zip(results, matrices, weights):
        np.testing.assert_allclose(result["product"], matrix @ weight, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result["gram"], matrix @ matrix.T, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result["norm"], np.sum(np.asarray(matrix) ** 2), rtol=1e-5)


def test_rows_stay_apart_where_asked_to_and_where_padding_would_be_most_of_it(as_on_a_gpu, monkeypatch):
    def shapes_of(rows, apart):
        seen = []
        map_batched(lambda x: seen.append(x.shape) or x, rows, apart=apart)
        return set(seen)

    rows = [jnp.ones((2, 3)), jnp.ones((3, 2))]
    assert (3, 3) not in shapes_of(rows, ["a", "b"])
    assert (3, 3) in shapes_of(rows, ["a", "a"])
    monkeypatch.setattr(batching, "_BATCH", 100)
    wide, tall = jnp.ones((1, 200)), jnp.ones((200, 1))
    assert shapes_of([wide, tall, jnp.ones((1, 190))], [None] * 3) == {(1, 200), (200, 1), (1, 190)}


def test_on_the_cpu_nothing_is_padded():
    seen = []
    map_batched(lambda x: seen.append(x.shape) or x, [jnp.ones(2), jnp.ones(3)], apart=[None, None])
    assert set(seen) == {(2,), (3,)}


def network(rng, dtype):
    """Kernels of several sizes, some with a whole mode and some with room to grow, a matrix among them."""
    params = {
        "first": random_kernel(rng, (3, 3, 2, 8), (3, 3, 2, 4), (3, 3, 2, 6), dtype),
        "second": random_kernel(rng, (3, 3, 8, 12), (2, 3, 5, 6), (3, 3, 8, 8), dtype),
        "third": random_kernel(rng, (1, 1, 12, 6), (None, None, 4, 4), (1, 1, 6, 6), dtype),
        "head": random_kernel(rng, (6, 4), (3, 3), (4, 4), dtype),
        "bias": jnp.zeros(4, dtype),
    }
    params = {name: _scaled(leaf) if name != "bias" else leaf for name, leaf in params.items()}
    x, y = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((16, 5, 5, 2), (16, 4)))
    return params, x, y


def _scaled(kernel):
    return kernel._replace(core=kernel.core / jnp.linalg.norm(kernel.core))


def loss_fn(params, x, y):
    for name in ("first", "second", "third"):
        x = jnp.tanh(tucker_conv(x, params[name]))
    return jnp.mean((tucker_linear(jnp.mean(x, axis=(1, 2)), params["head"]) + params["bias"] - y) ** 2)


def trained(rng, steps=8, adam=False, turning=False, **options):
    params, x, y = network(rng, jnp.float64)
    inner = optax.adam(0.02) if adam else optax.sgd(0.2, momentum=0.9)
    tx = tdlrt(inner, **{"tolerance": 0.05, **options})
    step, state, losses = tdlrt_step(loss_fn, tx, donate=False), tx.init(params), []
    between = tdlrt_step(loss_fn, tx, donate=False, ranks_stay=True) if turning else step
    for number in range(steps):
        params, state, info = (between if number % 4 else step)(params, state, x, y)
        losses.append(float(info.loss))
        assert int(info.status) & 0b11 == 0
    ranks = {name: rank.tolist() for name, rank in info.rank.items()}
    return params, ranks, losses, int(info.status)


@pytest.mark.parametrize(
    "options",
    [
        {"integrator": "bug"},
        {"integrator": "fixed_rank"},
        {"integrator": "parallel", "adam": True},
        {"integrator": "bug", "tolerance": 1e-6},  # ranks rise until the arrays are full
        {"integrator": "bug", "adapt_every": 3, "warmup": 3},
        {"integrator": "bug", "tolerance": Budget(0.4, steps=6, every=2)},
        {"integrator": "parallel", "tolerance": Budget(0.4, steps=6, every=2, importance="loss")},
        {"integrator": "parallel", "rules": {"second": {"tolerance": 0.3}}},
        {"integrator": "bug", "route": "randomized"},
        {"turning": True},
        {"turning": True, "adam": True},
    ],
    ids=str,
)
def test_training_is_the_same(options, x64, monkeypatch):
    there, ranks_there, losses_there, status_there = trained(np.random.default_rng(3), **options)
    monkeypatch.setattr(batching, "few_and_large", lambda: True)
    here, ranks, losses, status = trained(np.random.default_rng(3), **options)
    assert ranks == ranks_there and status == status_there
    np.testing.assert_allclose(losses, losses_there, rtol=1e-7)
    for name in ("first", "second", "third", "head"):
        np.testing.assert_allclose(dense64(here[name]), dense64(there[name]), atol=1e-7)
        assert here[name].core.shape == there[name].core.shape
        assert orthonormality(here[name]) < 1e-10
    np.testing.assert_allclose(here["bias"], there["bias"], atol=1e-8)


def test_one_batch_a_factorization_whatever_the_sizes(as_on_a_gpu):
    """The eigenproblems of a step: one of all augmentations, and one a mode and kind of kernel of all truncations."""
    params, x, y = network(np.random.default_rng(0), jnp.float32)
    tx = tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.05)
    state = tx.init(params)
    text = jax.jit(tdlrt_step(loss_fn, tx, donate=False)).lower(params, state, x, y).as_text()
    # 4 modes of the 3x3 kernels, 2 of the 1x1 kernel and of the matrix; one for the augmentation; in each lift at most two.
    assert 0 < text.count("@lapack_ssyevd_ffi(") <= 4 + 2 + 2 + 1 + 2 * 2
    assert "geqrf" not in text
    # At ranks that stay there is none but what a lift falls back to.
    text = jax.jit(tdlrt_step(loss_fn, tx, donate=False, ranks_stay=True)).lower(params, state, x, y).as_text()
    assert text.count("@lapack_ssyevd_ffi(") <= 2 * 2
    assert "geqrf" not in text and text.count("@lapack_spotrf_ffi(") > 0


@pytest.mark.parametrize("options", [{"ranks_stay": True}, {}], ids=["ranks_stay", "whole"])
def test_what_a_step_adds_does_not_grow_with_the_kernels(options, as_on_a_gpu, monkeypatch, rng):
    """Matrix products, factorizations and loops beside those of the two passes are as many for five kernels as for two."""
    monkeypatch.setattr(batching, "_run", lambda call, *batch: jax.vmap(call)(*batch))

    def counted(kernels):
        ranks = [(3, 3, 6 + i, 5) for i in range(kernels)]  # no two alike
        params = {
            f"conv{i}": _scaled(random_kernel(rng, (3, 3, 12, 12), r, r, jnp.float32)) for i, r in enumerate(ranks)
        }

        def loss(params, x):
            for kernel in params.values():
                x = tucker_conv(x, kernel)
            return jnp.mean(x**2)

        tx = tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.05, integrator="parallel")
        x = jnp.ones((2, 5, 5, 12))
        step = tdlrt_step(loss, tx, donate=False, **options).lower(params, tx.init(params), x).as_text()
        passes = jax.jit(tdlrt_jax.value_and_grad(loss)).lower(params, x).as_text()
        names = (
            "stablehlo.dot_general",
            "stablehlo.while",
            "@lapack_ssyevd_ffi(",
            "@lapack_spotrf_ffi(",
            "triangular_solve",
        )
        return {name: step.count(name) - passes.count(name) for name in names}

    two, five = counted(2), counted(5)
    assert two == five
    assert two["stablehlo.dot_general"] > 10 and two["@lapack_spotrf_ffi("] > 0


def rows_of(matrix):
    return orthonormal_rows([matrix])[0]


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("shape", [(6, 40), (24, 24), (1, 9), (3, 500), (4, 7), (5, 200)])
def test_orthonormal_rows_of_any_conditioning(decay, shape, rng, as_on_a_gpu):
    """In float32: as orthonormal as Householder's, and the matrix is kept to rounding, its smallest directions too."""
    left, right = orthonormal(rng, shape[0], shape[0]), orthonormal(rng, shape[1], shape[0])
    values = 10.0 ** -np.linspace(0, decay, shape[0])
    matrix = (left * values) @ right.T
    rows = np.asarray(jax.jit(rows_of)(jnp.asarray(matrix, jnp.float32)), np.float64)
    exist = np.any(rows != 0, axis=1)
    assert np.abs(rows @ rows.T - np.diag(exist)).max() < 3e-6
    assert np.linalg.norm(matrix - (matrix @ rows.T) @ rows) < 55 * 2**-23 * np.linalg.norm(matrix)  # it may lose 50
    assert exist.sum() >= np.sum(values > 2e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_small_columns_are_orthonormalized_as_large_ones(size, x64, rng, monkeypatch):
    columns = orthonormal(rng, 20, size) + 0.1 * rng.normal(size=(20, size))
    active = jnp.arange(size) < max(size - 1, 1)
    columns = jnp.where(active, columns, 0)
    expected = cholesky_qr(columns, active)
    monkeypatch.setattr(batching, "few_and_large", lambda: True)
    text = jax.jit(cholesky_qr).lower(columns, active).as_text()
    np.testing.assert_allclose(cholesky_qr(columns, active), expected, atol=1e-14)
    assert "potrf" not in text and "triangular_solve" not in text
    indefinite = jnp.eye(size).at[size - 1, size - 1].set(-1)
    assert not np.all(np.isfinite(_inverse_factor(indefinite))), "as of a factorization that failed"


def test_orthonormal_rows_of_dependent_rows_and_of_none(rng):
    row = rng.normal(size=(1, 12))
    matrix = jnp.asarray(np.concatenate([row, 2 * row, row + 1e-4 * rng.normal(size=(1, 12)), 0 * row]), jnp.float32)
    rows = np.asarray(rows_of(matrix), np.float64)
    exist = np.any(rows != 0, axis=1)
    assert exist.sum() == 2 and np.abs(rows @ rows.T - np.diag(exist)).max() < 3e-6
    kept = np.asarray(matrix, np.float64)
    assert np.linalg.norm(kept - (kept @ rows.T) @ rows) < 5e-6 * np.linalg.norm(kept)
    assert not np.any(np.asarray(rows_of(jnp.zeros((3, 5)))))
    assert not np.all(np.isfinite(np.asarray(rows_of(matrix.at[0, 0].set(jnp.nan)))))


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_a_frame_is_the_chart_at_the_kernel(scale, as_on_a_gpu, rng):
    kernel = random_kernel(rng, (4, 5, 9), (2, None, 4), (3, 5, 6), jnp.float32)
    kernel = kernel._replace(core=kernel.core * scale)
    frame = lift(kernel)
    for mode, (k, q) in enumerate(zip(frame.K, frame.Q)):
        if k is None:
            continue
        point = frame._replace(core=0 * frame.core)
        zeros = tuple(None if other is None else jnp.zeros_like(other) for other in frame.K)
        moved = tuple(k / scale if j == mode else other for j, other in enumerate(zeros))
        tangent = kernel._replace(core=jnp.zeros_like(frame.core), factors=moved)
        assert np.abs(np.asarray(tangent_to_dense(tangent, point))).max() < 1e-5  # K_i lies in the range of U_i
        rebuilt = np.moveaxis(np.tensordot(np.asarray(k, np.float64), np.asarray(q, np.float64), (1, mode)), 0, mode)
        for j, u in enumerate(kernel.factors):
            if j != mode and u is not None:
                rebuilt = np.moveaxis(np.tensordot(np.asarray(u, np.float64), rebuilt, (1, j)), 0, j)
        np.testing.assert_allclose(
            rebuilt / scale, dense64(kernel) / scale, atol=2e-6 * np.abs(dense64(kernel) / scale).max()
        )
