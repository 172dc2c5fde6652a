"""Arrays that shrink and grow while a network trains: the same tensors, fewer bytes, few compilations."""

import functools
import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import (
    Budget,
    active_rank,
    describe_status,
    fit_capacity,
    resize,
    tdlrt,
    tdlrt_step,
    to_dense,
    tucker_conv,
    tucker_linear,
)
from tdlrt_jax.capacity import array_bytes, full_kernels
from tdlrt_jax.frame import lift_all
from tdlrt_jax.paths import kernel_paths
from tdlrt_jax.status import RANK_AT_CAPACITY
from tdlrt_jax.tucker import capacity, parameter_count
from tests.helpers import random_kernel, tangent_to_dense

STEPS = 12


def network(rank, size, dtype):
    """A convolution and a linear layer of given ranks and capacities; the images and outputs they are to fit."""
    rng = np.random.default_rng(0)

    def kernel(shape, whole):
        ranks = [None if w else min(n, rank) for n, w in zip(shape, whole)]
        return random_kernel(rng, shape, ranks, tuple(n if w else min(n, size) for n, w in zip(shape, whole)), dtype)

    params = {
        "conv": {"kernel": kernel((3, 3, 4, 10), (True, False, False, False)), "bias": jnp.zeros(10, dtype)},
        "head": kernel((10, 8), (False, False)),
    }
    images = jnp.asarray(rng.normal(size=(24, 4, 4, 4)), dtype)
    teacher = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 10)) / 6, dtype)}
    targets = jax.nn.relu(tucker_conv(images, teacher["kernel"])).mean((1, 2)) @ rng.normal(size=(10, 8))
    return params, images, 4 * targets.astype(dtype)


def loss_fn(params, images, targets):
    hidden = jax.nn.relu(tucker_conv(images, params["conv"]["kernel"]) + params["conv"]["bias"]).mean((1, 2))
    return jnp.mean((tucker_linear(hidden, params["head"]) - targets) ** 2)


@functools.cache
def program(integrator):
    """The optimizer, and one jitted step for all tests of an integrator: the tolerance is part of its state."""
    tx = tdlrt(optax.sgd(0.02, momentum=0.9), tolerance=0.1, integrator=integrator)
    return tx, tdlrt_step(loss_fn, tx, donate=False)


def sizes_of(params):
    return {name: capacity(kernel) for name, kernel in kernel_paths(params).items()}


def snapshot(params, state):
    """Everything a step goes on from, as full tensors: kernels, other parameters, momentum, ranks."""
    kernels = kernel_paths(params)
    moments = kernel_paths(state.inner[0].trace)
    frames = dict(zip(kernels, lift_all(list(kernels.values()))))
    return {
        "kernels": {name: np.asarray(to_dense(kernel)) for name, kernel in kernels.items()},
        "bias": np.asarray(params["conv"]["bias"]),
        "momentum": {name: np.asarray(tangent_to_dense(moments[name], frames[name])) for name in kernels},
        "rank": jax.tree.map(lambda rank: rank.tolist(), state.rank),
    }


def train(integrator, tolerances, *, rank, size, resizes=None, dtype=jnp.float64):
    """Trains with one tolerance a step; ``resizes`` maps a number of steps done to ``params -> capacities``.

    Returns:
      Per step the snapshot, the loss and the status; the capacities of each step; and the last parameters and state.
    """
    tx, step = program(integrator)
    params, images, targets = network(rank, size, dtype)
    state = tx.init(params)
    steps, sizes = [], []
    for index, tolerance in enumerate(tolerances):
        if resizes and index in resizes:
            wanted = resizes[index](params)
            params, state = resize(params, wanted), resize(state, wanted)
        sizes.append(sizes_of(params))
        state = state._replace(tolerance=jnp.asarray(tolerance, jnp.float32))
        params, state, info = step(params, state, images, targets)
        steps.append({**snapshot(params, state), "loss": np.asarray(info.loss), "status": int(info.status)})
    return steps, sizes, (params, state)


def deviation(step, other):
    """The largest difference of tensors, relative to the largest entry."""
    pairs = zip(*[jax.tree.leaves([s["kernels"], s["momentum"], s["bias"], s["loss"]]) for s in (step, other)])
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


def assert_same_training(steps, others, tolerance):
    assert [step["rank"] for step in steps] == [other["rank"] for other in others]
    assert max(deviation(step, other) for step, other in zip(steps, others)) < tolerance


FALLING = np.linspace(0.1, 0.9, STEPS)
RISING = np.geomspace(0.1, 0.0001, STEPS)
HYSTERESIS = 0.9
fit_closely = functools.partial(fit_capacity, multiple=1, headroom=1.25, hysteresis=HYSTERESIS)
FULL = {"conv/kernel": (3, 3, 4, 10), "head": (8, 8)}


def ahead(params):
    """Room for ranks three times as high, before any of them fills its arrays."""
    ranks = {name: np.asarray(active_rank(kernel)).tolist() for name, kernel in kernel_paths(params).items()}
    return {name: [min(3 * r, n) for r, n in zip(rank, FULL[name])] for name, rank in ranks.items()}


def distinct(sizes):
    return len({tuple(size.items()) for size in sizes})


def stored(sizes):
    """Numbers in the arrays of the network's kernels."""
    whole = {"conv/kernel": (True, False, False, False), "head": (False, False)}
    shapes = {"conv/kernel": (3, 3, 4, 10), "head": (10, 8)}
    return sum(parameter_count(shape, sizes[name], whole[name]) for name, shape in shapes.items())


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_when_arrays_shrink_does_not_matter(integrator, x64):
    """Every two steps, at the end, never: one trajectory, momentum included; and a bounded number of programs."""
    run = functools.partial(train, integrator, FALLING, rank=8, size=10)
    never, whole, _ = run()
    before = program(integrator)[1]._cache_size()
    often, sizes, _ = run(resizes=dict.fromkeys(range(2, STEPS, 2), fit_closely))
    compiled = program(integrator)[1]._cache_size() - before
    late, late_sizes, _ = run(resizes={STEPS - 2: fit_closely})

    assert all(step["status"] == 0 for run in (never, often, late) for step in run), "no capacity binds"
    assert_ranks_fell(never)
    assert distinct(whole) == 1 and distinct(sizes) >= 3 and distinct(late_sizes) == 2
    assert_same_training(often, never, 1e-10)
    assert_same_training(late, never, 1e-10)

    assert compiled == distinct(sizes) - 1, "one program for each set of sizes, the first of them compiled before"
    least = {"conv/kernel": (3, 2, 2, 2), "head": (2, 2)}  # what fits ranks of 1
    assert compiled <= math.log(stored(whole[0]) / stored(least)) / math.log(1 / HYSTERESIS)


def test_when_arrays_shrink_does_not_matter_in_float32():
    """To 1e-4 of the largest entry after twelve steps; 6e-6 was measured."""
    run = functools.partial(train, "bug", FALLING, rank=8, size=10, dtype=jnp.float32)
    never, shrunk = run()[0], run(resizes={6: fit_closely})[0]
    assert_ranks_fell(never)
    assert_same_training(shrunk, never, 1e-4)


def assert_ranks_fell(steps):
    first, last = steps[0]["rank"], steps[-1]["rank"]
    assert all(sum(first[name]) >= sum(last[name]) + 4 for name in first), "of both kernels"


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_when_arrays_grow_does_not_matter_before_they_bind(integrator, x64):
    """From small arrays, with room made in time: every two steps, once, or all of it from the start."""
    run = functools.partial(train, integrator, RISING, rank=2)
    wide, _, _ = run(size=10)
    often, sizes, _ = run(size=4, resizes=dict.fromkeys(range(2, STEPS, 2), ahead))
    once, _, _ = run(size=4, resizes={2: lambda params: FULL})

    assert all(step["status"] == 0 for run in (wide, often, once) for step in run), "no capacity binds"
    assert distinct(sizes) >= 3 and stored(sizes[-1]) > stored(sizes[0])
    assert any(r > c for name in sizes[0] for r, c in zip(wide[-1]["rank"][name], sizes[0][name]))
    assert_same_training(often, wide, 1e-10)
    assert_same_training(once, wide, 1e-10)


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_a_rank_that_presses_is_reported_then_grows(integrator, x64):
    """Small arrays hold ranks down: that is said at once, in words too, and they rise after the next fit.

    Such a run is another one than with room from the start, from the step that says so on; but from the fit on, how much room is
    made does not matter.
    """
    grown_at = 9
    run = functools.partial(train, integrator, np.maximum(RISING, 0.002), rank=2)
    wide, _, _ = run(size=10)
    # Room for as much as they rise until the end.
    pressed, sizes, _ = run(size=3, resizes={grown_at: functools.partial(fit_capacity, headroom=2.5)})
    bound = [bool(step["status"] & RANK_AT_CAPACITY) for step in pressed]

    first = bound.index(True)
    assert 0 < first < grown_at - 1
    assert_same_training(pressed[:first], wide[:first], 1e-10)
    assert deviation(pressed[first], wide[first]) > 1e-7, "the report is not a false one"
    (advice,) = describe_status(pressed[first]["status"])
    assert "presses against the capacity" in advice and "tdlrt_jax.resize" in advice

    small, larger = sizes[grown_at - 1], sizes[grown_at]
    assert all(r <= c for name in small for r, c in zip(pressed[grown_at - 1]["rank"][name], small[name]))
    assert stored(larger) > stored(small)
    assert any(r > c for name in small for r, c in zip(pressed[-1]["rank"][name], small[name])), "ranks rise above"
    assert not any(bound[grown_at + 1 :])
    full, _, _ = run(size=3, resizes={grown_at: lambda params: FULL})
    assert_same_training(pressed, full, 1e-10)


def test_under_a_budget_ranks_press_and_grow_too():
    """A budget that allows more than the arrays hold: its ceilings stand above them, the step says so, and ranks follow."""
    params, images, targets = network(3, 3, jnp.float32)
    tx = tdlrt(optax.sgd(0.02, momentum=0.9), tolerance=Budget(0.02, steps=20, every=2), integrator="parallel")
    step, state = tdlrt_step(loss_fn, tx, donate=False), tx.init(params)
    small, statuses = sizes_of(params), []
    for index in range(8):
        if index == 4:
            assert statuses[-1] & RANK_AT_CAPACITY and full_kernels(params)
            ceilings = {name: np.asarray(ceiling).tolist() for name, ceiling in state.budget.ceiling.items()}
            assert any(ceilings[name][mode] > small[name][mode] for name in small for mode in range(len(small[name])))
            wanted = fit_capacity(params, multiple=1)
            params, state = resize(params, wanted), resize(state, wanted)
        params, state, info = step(params, state, images, targets)
        statuses.append(int(info.status))
    ranks = {name: np.asarray(active_rank(kernel)).tolist() for name, kernel in kernel_paths(params).items()}
    assert any(r > c for name in small for r, c in zip(ranks[name], small[name]))
    assert step._cache_size() == 2


def test_memory_falls_with_the_arrays():
    """Bytes of parameters and optimizer state, what is alive on the device, and what the compiler plans for a step."""
    rng = np.random.default_rng(0)
    kernel = random_kernel(rng, (3, 3, 32, 32), (3, 3, 5, 6), (3, 3, 32, 32), jnp.float32)
    params = {"conv": kernel, "bias": jnp.zeros(32)}
    images = jnp.asarray(rng.normal(size=(2, 4, 4, 32)), jnp.float32)
    tx = tdlrt(optax.sgd(0.02, momentum=0.9), tolerance=0.3, integrator="parallel")

    def loss(params, images):
        return jnp.mean((tucker_conv(images, params["conv"]) + params["bias"]) ** 2)

    step = tdlrt_step(loss, tx, donate=True)
    state = tx.init(params)

    def compiled(params, state):
        program = step.lower(params, state, images).compile()
        plan = program.memory_analysis()
        new = plan.output_size_in_bytes - plan.alias_size_in_bytes
        return program, plan.argument_size_in_bytes + plan.temp_size_in_bytes + new

    def alive():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    program, peak = compiled(params, state)
    params, state, info = jax.block_until_ready(program(params, state, images))
    wanted = fit_capacity(params, multiple=1)
    assert all(2 * size <= 32 for size in wanted["conv"][2:])
    bytes_before, alive_before = array_bytes((params, state)), alive()
    params, state = jax.block_until_ready((resize(params, wanted), resize(state, wanted)))
    bytes_after, alive_after = array_bytes((params, state)), alive()

    assert bytes_after == sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
    assert bytes_after < bytes_before / 4
    assert alive_before - alive_after == bytes_before - bytes_after, "nothing holds on to the larger arrays"
    program, smaller_peak = compiled(params, state)
    assert smaller_peak < peak / 4
    params, state, info = program(params, state, images)
    assert np.isfinite(info.loss)


def test_bytes_of_arrays():
    tree = {
        "float": jnp.zeros((3, 4), jnp.bfloat16),
        "numpy": np.zeros(5, np.int8),
        "abstract": jax.ShapeDtypeStruct((2,), jnp.float32),
        "key": jax.random.key(0),
        "nothing": None,
    }
    assert array_bytes(tree) == 24 + 5 + 8 + 8
    assert array_bytes(jax.eval_shape(lambda: {"x": jnp.ones((7, 2))})) == 56
