"""Capacities: arrays and optimizer state change size, tensors and trajectories do not."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import (
    TuckerTensor,
    active_rank,
    canonicalize,
    fit_capacity,
    resize,
    tdlrt,
    to_dense,
    value_and_grad,
)
from tdlrt_jax.tucker import active_columns, is_tucker, parameter_count, unfold
from tests import references
from tests.helpers import dense64, orthonormality, random_kernel


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def assert_same(tree, other):
    """Bit for bit, shapes and structure included."""
    assert shapes(tree) == shapes(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def network(rng):
    return {
        "conv": {"kernel": random_kernel(rng, (3, 6, 7), (None, 2, 3)), "bias": jnp.array(rng.normal(size=7))},
        "dense": [random_kernel(rng, (8, 5), (2, 2))],
    }


LARGER = {"conv/kernel": (3, 4, 5), "dense/0": (4, 4)}


def momentum_state(rng, params):
    """A state of tdlrt around momentum whose moments are not zero."""
    state = tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.1).init(params)
    return state._replace(inner=jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape)), state.inner))


def kernel(node):
    return isinstance(node, TuckerTensor)


def moments(state):
    return [node for node in jax.tree.leaves(state, is_leaf=kernel) if kernel(node)]


def test_resizing_there_and_back_changes_nothing(x64, rng):
    params = network(rng)
    larger = resize(params, LARGER)
    assert larger["conv"]["kernel"].core.shape == (3, 4, 5)
    assert larger["conv"]["kernel"].factors[0] is None
    assert larger["dense"][0].factors[0].shape == (8, 4)
    assert larger["conv"]["bias"] is params["conv"]["bias"]
    for before, after in [
        (params["conv"]["kernel"], larger["conv"]["kernel"]),
        (params["dense"][0], larger["dense"][0]),
    ]:
        np.testing.assert_allclose(to_dense(after), to_dense(before), atol=1e-15)
        np.testing.assert_array_equal(active_rank(after), active_rank(before))
    assert_same(resize(larger, {"conv/kernel": (3, 2, 3), "dense/0": (2, 2)}), params)


def test_state_follows_by_the_end_of_its_paths(x64, rng):
    params = network(rng)
    state = momentum_state(rng, params)
    assert min(np.abs(leaf).max() for moment in moments(state) for leaf in jax.tree.leaves(moment)) > 0
    larger = resize(state, LARGER)
    assert [moment.core.shape for moment in moments(larger)] == [(3, 4, 5), (4, 4)]
    assert [shapes(moment) for moment in moments(larger)] == [
        shapes(node) for node in (resize(params, LARGER)["conv"]["kernel"], resize(params, LARGER)["dense"][0])
    ]
    assert_same(larger._replace(inner=None), state._replace(inner=None))  # ranks, errors, step: nothing to resize
    assert_same(resize(larger, {"conv/kernel": (3, 2, 3), "dense/0": (2, 2)}), state)


def test_one_number_or_one_a_mode(rng):
    kernel = random_kernel(rng, (3, 9, 7), (None, 2, 2))
    assert resize(kernel, 4).core.shape == (3, 4, 4)
    assert resize(kernel, 100).core.shape == (3, 9, 7)
    assert resize(kernel, (1, 3, 7)).core.shape == (3, 3, 7)  # the whole mode stays
    assert resize(kernel, {"kernel": (3, 3, 4)}).core.shape == (3, 3, 4)  # a tree that is one kernel
    matrix = random_kernel(rng, (5, 7), (2, 2))
    assert resize(matrix, (2, 7)).core.shape == (2, 2)  # lowered to R_i <= prod_{j != i} R_j
    tree = {"a": matrix, "b": matrix, "scalars": TuckerTensor(jnp.ones(()), (jnp.ones(()), jnp.ones(())))}
    resized = resize(tree, {"b": 4})
    assert (resized["a"].core.shape, resized["b"].core.shape) == ((2, 2), (4, 4))
    assert_same(resized["scalars"], tree["scalars"])


def test_cutting_what_is_not_zero_is_refused(rng):
    params = {"conv1": random_kernel(rng, (5, 6, 7), (2, 3, 3), (4, 4, 4))}
    with pytest.raises(ValueError, match=r"kernel 'conv1': capacity 2 on axis 1 would cut.*ranks \(2, 3, 3\)"):
        resize(params, (2, 2, 3))
    with pytest.raises(ValueError, match="kernel 'conv1'"):
        resize(params, 1)
    # A moment may live beyond the kernel's rank: it is refused as well, under its own path.
    state = {"trace": jax.tree.map(jnp.ones_like, params)}
    with pytest.raises(ValueError, match="kernel 'trace/conv1'"):
        resize(state, {"conv1": 3})


@pytest.mark.parametrize("capacity", [0, (0, 3, 3), (2, 3), (2, 3, 3, 3), (6, 3, 3), (-1, 3, 3)])
def test_impossible_capacities_are_refused(rng, capacity):
    params = {"conv1": random_kernel(rng, (5, 6, 7), (2, 3, 3))}
    with pytest.raises(ValueError, match=r"kernel 'conv1' of shape .*needs one number in 1..n a mode"):
        resize(params, {"conv1": capacity})


def ranked(rng, shape, rank, capacity):
    return {"w": random_kernel(rng, shape, rank, capacity)}


def test_fit_capacity_shrinks_to_what_is_used(rng):
    params = ranked(rng, (3, 64, 64), (None, 4, 6), (3, 40, 40))
    assert fit_capacity(params) == {"w": (3, 8, 16)}  # 1.5 * 4 = 6 and 1.5 * 6 = 9, up to multiples of 8
    assert fit_capacity(params, multiple=1) == {"w": (3, 6, 9)}
    assert fit_capacity(params, multiple=1, headroom=1.0) == {"w": (3, 4, 6)}
    assert fit_capacity(params, multiple=16) == {"w": (3, 16, 16)}
    np.testing.assert_allclose(dense64(resize(params, fit_capacity(params))["w"]), dense64(params["w"]), atol=1e-6)


def test_modes_of_fewer_than_two_multiples_shrink_too(rng):
    params = ranked(rng, (3, 3, 64, 15), (1, 2, 9, 8), (3, 3, 40, 15))
    assert fit_capacity(params) == {"w": (2, 3, 16, 12)}  # 64 channels in eights, the others in ones
    assert fit_capacity(params, headroom=1.0) == {"w": (1, 2, 16, 8)}
    assert fit_capacity(params, multiple=2) == {"w": (2, 3, 14, 12)}


def test_fit_capacity_leaves_alone_what_is_not_worth_a_compilation(rng):
    params = ranked(rng, (20, 20), (6, 6), (10, 10))  # 9 * 9 = 0.81 of what there is
    assert fit_capacity(params, multiple=1) == {"w": (10, 10)}
    assert fit_capacity(params, multiple=1, hysteresis=0.9) == {"w": (9, 9)}
    # Fitted arrays stay: nothing oscillates.
    params = resize(ranked(rng, (3, 64, 64), (None, 4, 6), (3, 40, 40)), {"w": (3, 8, 16)})
    assert fit_capacity(params) == {"w": (3, 8, 16)}


def test_fit_capacity_shrinks_only_where_the_steps_left_pay_for_the_compilation(rng):
    params = ranked(rng, (3, 64, 64), (None, 4, 6), (3, 16, 24))
    before, after = (3, 16, 24), (3, 8, 16)
    stored = [parameter_count((3, 64, 64), sizes, (True, False, False)) for sizes in (before, after)]
    steps = 100 * stored[0] / (stored[0] - stored[1])  # as many are saved as the compilation costs
    assert fit_capacity(params, compilation_steps=100) == {"w": after}
    assert fit_capacity(params, compilation_steps=100, steps_left=math.floor(steps)) == {"w": before}
    assert fit_capacity(params, compilation_steps=100, steps_left=math.floor(steps) + 1) == {"w": after}
    assert fit_capacity(params, compilation_steps=0, steps_left=1) == {"w": after}
    assert fit_capacity(params, compilation_steps=100, steps_left=0) == {"w": after}, "nothing more is compiled"


def test_ranks_that_fill_their_arrays_make_them_grow_whatever_is_left(rng):
    params = ranked(rng, (3, 64, 64), (None, 4, 6), (3, 4, 6))
    assert fit_capacity(params, steps_left=1) == {"w": (3, 8, 16)}


def test_fit_capacity_grows_where_a_rank_fills_its_arrays(rng):
    params = ranked(rng, (64, 64, 5), (8, 8, 5), (8, 24, 5))
    # Mode 0 is full and grows; as that compiles anyway, mode 1 shrinks to what fits it. Mode 2 has its whole size.
    assert fit_capacity(params) == {"w": (16, 16, 5)}
    assert fit_capacity(params, grow=False) == {"w": (8, 16, 5)}  # worth it by itself
    assert fit_capacity(params, grow=False, hysteresis=0.7) == {"w": (8, 24, 5)}
    # Not full: nothing grows, though headroom is not there.
    params = ranked(rng, (64, 64, 5), (7, 8, 5), (8, 16, 5))
    assert fit_capacity(params) == {"w": (8, 16, 5)}
    # Full in every direction there is.
    assert fit_capacity(ranked(rng, (6, 5), (5, 5), None)) == {"w": (5, 5)}


def test_fit_capacity_keeps_to_bounds_and_to_useful_sizes(rng):
    params = ranked(rng, (64, 64, 5), (8, 8, 5), (8, 24, 5))
    assert fit_capacity(params, max_rank={"w": (12, 64, 5)}) == {"w": (12, 16, 5)}
    params = ranked(rng, (64, 64, 5), (8, 8, 5), (8, 16, 5))
    assert fit_capacity(params, max_rank={"w": (8, 64, 5)}) == {"w": (8, 16, 5)}  # full, but it may not rise
    # R_0 <= R_1 R_2: room for 3 * 4 would never be used at 2 x 2.
    params = ranked(rng, (64, 2, 2), (4, 2, 2), None)
    assert fit_capacity(params) == {"w": (4, 2, 2)}
    for proposal in fit_capacity(network(rng), multiple=3).values():
        assert all(size <= np.prod(proposal) // size for size in proposal)


def hand_made(rng):
    """Factors that are not orthonormal, a repeated direction, an unused one in between, a whole mode."""
    first = rng.normal(size=(6, 4))
    first[:, 2] = 0
    second = rng.normal(size=(7, 4))
    second[:, 3] = second[:, 0]
    core = rng.normal(size=(3, 4, 4))
    return TuckerTensor(jnp.array(core), (None, jnp.array(first), jnp.array(second)))


def test_canonicalize_keeps_the_tensor_and_makes_the_kernel_proper(x64, rng):
    kernel = hand_made(rng)
    proper = canonicalize(kernel)
    np.testing.assert_allclose(to_dense(proper), to_dense(kernel), atol=1e-12)
    assert shapes(proper) == shapes(kernel)
    assert active_rank(proper).tolist() == [3, 3, 3]  # the unused and the repeated direction are gone
    assert orthonormality(proper) < 1e-14
    for mode in (1, 2):
        assert active_columns(proper.factors[mode]).tolist() == [True, True, True, False]
        rows = unfold(proper.core, mode)
        gram = np.asarray(rows @ rows.T)
        if mode == 2:  # the last mode to be rotated: all-orthogonal, energies descending
            np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12 * gram.max())
            assert (np.diff(np.diag(gram)) <= 0).all()
        np.testing.assert_array_equal(rows[3], 0)
    tdlrt(optax.sgd(0.1), tolerance=0.1).init({"w": proper})  # accepted by every guard


def test_canonicalize_in_float32_and_of_nothing(rng):
    kernel = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), hand_made(rng))
    proper = canonicalize(kernel)
    assert proper.core.dtype == jnp.float32
    assert orthonormality(proper) < 2e-6
    np.testing.assert_allclose(dense64(proper), dense64(kernel), atol=1e-5 * np.abs(dense64(kernel)).max())
    assert active_rank(proper).tolist() == [3, 3, 3]
    nothing = canonicalize(TuckerTensor(jnp.zeros((2, 2)), (jnp.ones((3, 2)), jnp.ones((4, 2)))))
    assert active_rank(nothing).tolist() == [1, 1]  # at least one direction stays
    np.testing.assert_array_equal(to_dense(nothing), 0)


def test_trajectories_do_not_depend_on_resizing_in_the_middle(x64):
    """Momentum, changing bases and ranks; smaller arrays from one step on, larger ones from a later one."""
    shape, rng = (8, 9, 10), np.random.default_rng(3)
    core, factors = references.tucker_random(shape, (3, 3, 3), seed=1)
    target = jnp.array(references.to_dense(*references.tucker_random(shape, (2, 2, 2), seed=2)))
    weights = jnp.array(rng.uniform(0.5, 1.5, size=shape))

    def loss(params):
        return jnp.sum(weights * (to_dense(params["w"]) + params["shift"] / 30 - target) ** 2)

    gradient = value_and_grad(loss)
    tx = tdlrt(optax.sgd(0.05, momentum=0.9), tolerance=0.1)

    @jax.jit
    def step(params, state):
        _, grads = gradient(params)
        updates, state = tx.update(grads, state, params, value_and_grad_fn=gradient)
        params = optax.apply_updates(params, updates)
        return params, state, to_dense(params["w"])

    def run(resizes):
        start = TuckerTensor(jnp.array(core), tuple(map(jnp.array, factors)))
        params = {"w": resize(start, shape), "shift": jnp.zeros(())}
        state = tx.init(params)
        dense, ranks = [], []
        for k in range(12):
            if k in resizes:
                params, state = resize(params, resizes[k]), resize(state, resizes[k])
                assert params["w"].core.shape == resizes[k]["w"]
            params, state, result = step(params, state)
            dense.append(result)
            ranks.append(state.rank["w"].tolist())
        return np.stack(dense), ranks

    dense, ranks = run({})
    assert len({tuple(rank) for rank in ranks}) > 1
    highest = tuple(np.max(ranks, axis=0).tolist())
    assert all(rank < size for rank, size in zip(highest, shape))
    resized, resized_ranks = run({4: {"w": highest}, 8: {"w": shape}})
    assert resized_ranks == ranks
    np.testing.assert_allclose(resized, dense, atol=1e-9)


def test_a_mapping_that_names_no_kernel_raises(rng):
    params = {"w": random_kernel(rng, (5, 4), (2, 2))}
    with pytest.raises(ValueError, match=r"'v', which ends no kernel's path; the paths are \['w'\]"):
        resize(params, {"v": 3})
    assert resize(params, {"w": 3})["w"].core.shape == (3, 3)
    assert resize(params["w"], {"kernel": 3}).core.shape == (3, 3)


def test_a_key_that_is_a_kernels_path_stands_for_that_kernel_alone(rng):
    """In the parameters, in a state of theirs, and in both together; one that only ends paths stands for all of these."""
    params = {"w": random_kernel(rng, (6, 5), (2, 2), 5), "x": {"w": random_kernel(rng, (6, 5), (2, 2), 5)}}
    state = tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.1).init(params)
    for tree in (params, state, (params, state)):
        for key, expected in (("w", {"w": 2}), ("x/w", {"x": 2})):
            kernels = jax.tree_util.tree_leaves_with_path(resize(tree, {key: 2}), is_leaf=is_tucker)
            for path, kernel in kernels:
                if is_tucker(kernel):
                    nested = "x" if any(getattr(entry, "key", None) == "x" for entry in path) else "w"
                    assert kernel.core.shape == ((2, 2) if nested in expected else (5, 5)), (key, path)
    both = resize({"a": params["x"], "b": params["x"]}, {"w": 2})
    assert [both[name]["w"].core.shape for name in "ab"] == [(2, 2)] * 2


def test_kernels_without_moments_may_be_named(rng):
    """A frozen layer of a partition, by a label a kernel or a leaf; its state follows the parameters all the same."""
    params = {"old": random_kernel(rng, (8, 8), (3, 3), 8), "new": random_kernel(rng, (8, 8), (2, 2), 8)}
    by_kernel = {"old": "frozen", "new": "trained"}
    by_leaf = {name: jax.tree.map(lambda _, label=label: label, params[name]) for name, label in by_kernel.items()}
    for labels in (by_kernel, by_leaf):
        inner = optax.partition({"trained": optax.adam(1e-3), "frozen": optax.set_to_zero()}, labels)
        state = resize(tdlrt(inner, tolerance=0.1).init(params), {"old": 3, "new": 2})
        moments = [
            node for node in jax.tree.leaves(state, is_leaf=is_tucker) if is_tucker(node) and jax.tree.leaves(node)
        ]
        assert [moment.core.shape for moment in moments] == [(2, 2)] * 2
        with pytest.raises(ValueError, match="capacity names 'older', which ends no kernel's path"):
            resize(state, {"older": 3})
