"""map_batched: the plain loop's results in order, and fewer calls than rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdlrt_jax.batching import map_batched


def test_results_are_those_of_the_loop_in_its_order(rng):
    matrices = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 3), (5, 2), (4, 3), (4, 3), (5, 2))]
    others = [None, jnp.ones(2), None, jnp.ones(3), jnp.ones(2)]

    def function(matrix, other):
        q, r = jnp.linalg.qr(matrix)
        return {"product": q @ r if other is None else q @ r @ other, "other": other}

    results = jax.jit(lambda a, b: map_batched(function, a, b))(matrices, others)
    for result, matrix, other in zip(results, matrices, others):
        expected = function(matrix, other)
        assert (result["other"] is None) == (other is None)
        np.testing.assert_allclose(result["product"], expected["product"], rtol=1e-5, atol=1e-6)


def test_rows_of_equal_shapes_are_traced_once_and_static_values_keep_rows_apart():
    traced = []

    def function(scale, x):
        traced.append((scale, x.shape))
        return scale * x

    columns = [jnp.full((2,), float(i)) for i in range(4)] + [jnp.ones(3)]
    results = map_batched(function, columns, static=[2, 2, 3, 2, 2])
    assert [r.tolist() for r in results] == [[0, 0], [2, 2], [6, 6], [6, 6], [2, 2, 2]]
    assert sorted(set(traced)) == [(2, (2,)), (2, (3,)), (3, (2,))]
    assert len(traced) < 5


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        map_batched(lambda a, b: a, [jnp.ones(2)], [])


def test_no_rows():
    assert map_batched(lambda a: a, []) == []


def test_many_factorizations_at_a_time_do_not_wait_for_one_another(rng):
    """Batched LAPACK calls that run at once, more than there are threads, hung on jaxlib 0.10's CPU."""
    groups = [jnp.asarray(rng.normal(size=(n, 8)), jnp.float32) for n in range(30, 60) for _ in range(3)]

    @jax.jit
    def many(groups):
        return map_batched(lambda matrix: jnp.linalg.qr(matrix)[0], groups)

    for _ in range(5):
        for q in jax.block_until_ready(many(groups)):
            assert abs(float(jnp.sum(q**2)) - 8) < 1e-4
