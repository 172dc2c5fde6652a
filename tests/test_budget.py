"""Budgets: the ranks of one common tolerance, the schedule, what is counted, and the errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tdlrt_jax
from tdlrt_jax import Budget, active_rank, kernel_paths, kernel_shape, parameter_count, tdlrt, to_dense
from tdlrt_jax.budget import allowed, fit_ranks, initial_state, mode_energies, plan_budget
from tdlrt_jax.ranks import RankPolicy, choose_rank, per_mode, thresholds
from tdlrt_jax.truncation import hosvd
from tests.helpers import random_kernel

SHAPES = [((3, 3, 12, 16), (3, None, 9, 10)), ((40, 30), (20, 20)), ((5, 14, 9), (5, 9, 9))]


def decaying(rng, shape, rank, rate):
    """A kernel whose singular values fall by ``rate``."""
    kernel = random_kernel(rng, shape, rank, dtype=np.float32)
    core = np.asarray(kernel.core)
    for axis, size in enumerate(core.shape):
        core = core * np.expand_dims(rate ** np.arange(size), [a for a in range(core.ndim) if a != axis])
    return kernel._replace(core=jnp.asarray(core))


def network(rng):
    kernels = [decaying(rng, shape, rank, rate) for (shape, rank), rate in zip(SHAPES, (0.8, 0.9, 0.7))]
    plans = [plan_budget(kernel, RankPolicy()) for kernel in kernels]
    return kernels, plans


def count(plan, ranks):
    return parameter_count(plan.shape, np.asarray(ranks).tolist(), plan.whole)


def existing(kernel):
    return tuple(None if u is None else jnp.int32(u.shape[1]) for u in kernel.factors)


def test_mode_energies_are_squared_singular_values(rng):
    core = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    for mode, energies in enumerate(mode_energies(core)):
        matrix = np.moveaxis(np.asarray(core, np.float64), mode, 0).reshape(core.shape[mode], -1)
        values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(energies, values**2 / np.sum(values**2), rtol=1e-4, atol=1e-6)
    assert all(np.all(np.asarray(e) == 0) for e in mode_energies(jnp.zeros((2, 3))))


def tail_rank(values, threshold):
    """The paper's rule, slowly: the smallest rank whose tail is within the threshold."""
    return next(r for r in range(len(values) + 1) if np.sum(values[r:]) <= threshold**2)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_the_ranks_are_those_of_one_tolerance_and_fill_the_budget(rng, share):
    kernels, plans = network(rng)
    limit = share * sum(count(plan, kernel.core.shape) for plan, kernel in zip(plans, kernels))
    energies = [mode_energies(kernel.core) for kernel in kernels]
    ranks, tau = jax.jit(lambda e: fit_ranks(e, [existing(k) for k in kernels], plans, limit))(energies)
    stored = sum(count(plan, r) for plan, r in zip(plans, ranks))
    assert stored <= limit

    def by_hand(tau):
        chosen = []
        for plan, modes in zip(plans, energies):
            compressed = [mode for mode, whole in enumerate(plan.whole) if not whole]
            thresholds = {mode: tau / np.sqrt(len(compressed)) for mode in compressed}
            if len(plan.shape) == 2:
                thresholds = {0: tau, 1: 0.0}
            rank = [
                max(1, tail_rank(np.asarray(modes[mode], np.float64), thresholds[mode])) if mode in thresholds else n
                for mode, n in enumerate(plan.shape)
            ]
            for _ in range(3):
                rank = [r if plan.whole[mode] else min(r, int(np.prod(rank)) // r) for mode, r in enumerate(rank)]
            chosen.append(rank)
        return chosen

    found = by_hand(float(tau) * 1.001)
    assert [np.asarray(r).tolist() for r in ranks] == found
    # A tolerance a little smaller would not have fitted.
    assert sum(count(plan, r) for plan, r in zip(plans, by_hand(float(tau) * 0.999))) > limit


def test_everything_stays_where_everything_fits(rng):
    kernels, plans = network(rng)
    energies = [mode_energies(kernel.core) for kernel in kernels]
    ranks, tau = fit_ranks(energies, [existing(k) for k in kernels], plans, jnp.float32(1e9))
    assert float(tau) == 0
    assert [np.asarray(r).tolist() for r in ranks] == [np.asarray(active_rank(k)).tolist() for k in kernels]


def test_down_to_the_least_ranks_every_budget_can_be_met(rng):
    """Where singular values hardly fall, modes that share a tolerance of one keep half of them and more."""
    kernel = random_kernel(rng, (3, 3, 2, 6), (3, 3, 2, 6), dtype=np.float32)
    plan = plan_budget(kernel, RankPolicy())
    least = count(plan, [1, 1, 1, 1])
    for limit in (least, least + 3, 2 * least):
        (ranks,), _ = fit_ranks([mode_energies(kernel.core)], [existing(kernel)], [plan], jnp.float32(limit))
        assert count(plan, ranks) <= limit


def test_bounds_and_own_tolerances_hold_and_the_rest_makes_up_for_them(rng):
    kernels, _ = network(rng)
    plans = [
        plan_budget(kernels[0], RankPolicy(min_rank=(3, 1, 8, 8))),
        plan_budget(kernels[1], RankPolicy(max_rank=4)),
        plan_budget(kernels[2], RankPolicy(), tolerance=1e-3),
    ]
    most = [kernels[0].core.shape, (4, 4), kernels[2].core.shape]
    limit = 0.9 * sum(count(plan, rank) for plan, rank in zip(plans, most))
    energies = [mode_energies(kernel.core) for kernel in kernels]
    ranks, tau = fit_ranks(energies, [existing(k) for k in kernels], plans, limit)
    assert min(np.asarray(ranks[0])[2:]) >= 8
    assert max(np.asarray(ranks[1])) <= 4
    alone = active_rank(hosvd(kernels[2].core, tolerance=1e-3))
    assert np.all(np.asarray(ranks[2]) >= np.asarray(alone))
    assert float(tau) > 1e-2
    assert sum(count(plan, r) for plan, r in zip(plans, ranks)) <= limit


def test_a_ceiling_above_the_capacity_says_so(rng):
    kernels, plans = network(rng)
    plans[1] = plans[1]._replace(capacity=(5, 5))
    energies = [mode_energies(kernel.core) for kernel in kernels]
    ranks, _ = fit_ranks(energies, [existing(k) for k in kernels], plans, jnp.float32(1e9))
    assert np.asarray(ranks[1]).tolist() == [20, 20]


POLICIES = [
    RankPolicy(criterion="each", spare=2),
    RankPolicy(convention="per_mode", max_rank=7),
    RankPolicy(convention="absolute", min_rank=2, spare=1),
    RankPolicy(min_rank=(1, 1, 4, 4), max_rank=(2, 3, 8, 8)),
]


@pytest.mark.parametrize("limit", [1000, 1500, 3000, 1e9])
def test_kernels_side_by_side_have_the_ranks_that_each_has_alone(rng, limit):
    """Of any order, with whole modes, policies, capacities and tolerances of their own."""
    shapes = [((3, 3, 12, 16), (None, 3, 9, 10)), *SHAPES[1:], ((3, 3, 12, 16), (3, 3, 9, 10))]
    kernels = [decaying(rng, shape, rank, rate) for (shape, rank), rate in zip(shapes, (0.8, 0.9, 0.7, 0.6))]
    plans = [plan_budget(kernel, policy) for kernel, policy in zip(kernels, POLICIES)]
    plans[0] = plans[0]._replace(capacity=(3, 3, 5, 6))
    plans[2] = plans[2]._replace(tolerance=0.05)
    energies = [mode_energies(kernel.core) for kernel in kernels]
    exists = [existing(kernel) for kernel in kernels]
    ranks, tau = fit_ranks(energies, exists, plans, jnp.float32(limit))
    bounded = []
    for plan, modes, there, ceiling in zip(plans, energies, exists, ranks):
        within, free = ranks_alone(plan, modes, there, tau)
        bounded.append(within)
        expected = [f if w == c and f > w else w for w, f, c in zip(within, free, plan.capacity)]
        assert np.asarray(ceiling).tolist() == expected
    assert sum(count(plan, rank) for plan, rank in zip(plans, bounded)) <= limit


def ranks_alone(plan, energies, exists, tau):
    """A kernel's ranks at a tolerance, within its capacity and without one; mode by mode."""
    limits = thresholds(tau if plan.tolerance is None else jnp.float32(plan.tolerance), 1.0, plan.whole, plan.policy)
    lows, highs = (per_mode(bound, len(plan.shape), "") for bound in (plan.policy.min_rank, plan.policy.max_rank))
    free = []
    for mode, n in enumerate(plan.shape):
        if plan.whole[mode]:
            free.append(n)
            continue
        most = min(int(exists[mode]), n if highs[mode] is None else highs[mode])
        wanted = int(choose_rank(energies[mode], limits[mode], plan.policy))
        free.append(min(max(wanted, min(lows[mode], most)), most))
    within = [f if whole else min(f, c) for f, c, whole in zip(free, plan.capacity, plan.whole)]
    return possible(within, plan), possible(free, plan)


def possible(ranks, plan):
    """Lowered to ``r_i <= prod_{j != i} r_j``."""
    for _ in ranks:
        ranks = [r if whole else min(r, math.prod(ranks) // r) for r, whole in zip(ranks, plan.whole)]
    return ranks


def test_the_schedule_falls_from_the_start_to_the_target_and_stays(rng):
    kernels, plans = network(rng)
    named = {str(i): kernel for i, kernel in enumerate(kernels)}
    budget = Budget(0.8, steps=100, start=20)
    state = initial_state(budget, named, named, plans)
    first = sum(count(plan, kernel.core.shape) for plan, kernel in zip(plans, kernels))
    target = 0.2 * sum(np.prod(plan.shape) for plan in plans)
    values = [float(allowed(budget, state, named, plans, jnp.int32(step))) for step in range(0, 141, 20)]
    assert values[0] == values[1] == first
    assert values == sorted(values, reverse=True)
    np.testing.assert_allclose(values[5:], target, rtol=1e-6)
    np.testing.assert_allclose(values[3], target + (first - target) * 0.5**3, rtol=1e-6)


def test_budget_of_all_counts_the_other_parameters(rng):
    kernels, plans = network(rng)
    params = {**{str(i): kernel for i, kernel in enumerate(kernels)}, "bias": jnp.zeros(100)}
    named = kernel_paths(params)
    full = sum(np.prod(plan.shape) for plan in plans)
    state = initial_state(Budget(0.5, steps=10), params, named, plans)
    for of, expected in (("kernels", 0.5 * full), ("all", 0.5 * (full + 100) - 100)):
        value = allowed(Budget(0.5, steps=10, of=of), state, params, plans, jnp.int32(10))
        np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": 1.0, "steps": 10}, "compression=1.0"),
        ({"compression": 95, "steps": 10}, "0.95"),
        ({"compression": 0.9, "steps": 0}, "steps=0"),
        ({"compression": 0.9, "steps": 10, "start": 10}, "start=10"),
        ({"compression": 0.9, "steps": 10, "of": "convs"}, "of='convs'"),
        ({"compression": 0.9, "steps": 10, "every": 0}, "every=0"),
        ({"compression": 0.9, "steps": 10, "power": 0}, "power=0"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(**options)


def test_an_impossible_budget_names_the_kernels(rng):
    params = {
        "small": random_kernel(rng, (4, 6), (2, 2), dtype=np.float32),
        "large": random_kernel(rng, (30, 40), (5, 5)),
    }
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    tx = tdlrt(optax.sgd(0.1), tolerance=Budget(0.99, steps=10))
    with pytest.raises(ValueError, match=r"compression=0.99.*'large' \(71\).*'small' \(11\)"):
        tx.init(params)
    tx = tdlrt(optax.sgd(0.1), tolerance=Budget(0.5, steps=10, of="all"))
    with pytest.raises(ValueError, match="leaves 0 numbers"):
        tx.init({**params, "bias": jnp.zeros(5000)})


def test_budgets_that_cannot_be_combined():
    with pytest.raises(ValueError, match="fixed_rank"):
        tdlrt(optax.sgd(0.1), tolerance=Budget(0.9, steps=10), integrator="fixed_rank")
    with pytest.raises(ValueError, match="absolute"):
        tdlrt(optax.sgd(0.1), tolerance=Budget(0.9, steps=10), convention="absolute")


@functools.cache
def fit(integrator, adapt_every=1, freeze_after=None):
    """Three kernels fitted to dense targets under a budget: compression and ranks after every step."""
    rng = np.random.default_rng(0)
    targets = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape, _ in SHAPES]
    params = [decaying(rng, shape, rank, 0.9) for shape, rank in SHAPES]
    loss = lambda params: sum(jnp.mean((to_dense(k) - t) ** 2) for k, t in zip(params, targets))  # noqa: E731
    tx = tdlrt(
        optax.sgd(3.0, momentum=0.5),
        tolerance=Budget(0.7, steps=30, every=3),
        integrator=integrator,
        adapt_every=adapt_every,
        freeze_after=freeze_after,
    )
    step, state = tdlrt_jax.tdlrt_step(loss, tx, donate=False), tx.init(params)
    full = sum(np.prod(shape) for shape, _ in SHAPES)
    history = []
    for _ in range(45):
        params, state, info = step(params, state)
        ranks = [np.asarray(info.rank[name]).tolist() for name in info.rank]
        whole = [[u is None for u in kernel.factors] for kernel in params]
        stored = sum(parameter_count(kernel_shape(k), r, w) for k, r, w in zip(params, ranks, whole))
        history.append((1 - stored / full, ranks, float(info.loss), float(state.tolerance)))
    return history


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
@pytest.mark.parametrize("adapt_every", [1, 2])
def test_the_request_is_met_in_time_and_from_then_on(integrator, adapt_every):
    history = fit(integrator, adapt_every)
    compressions = [compression for compression, *_ in history]
    # One rank of the largest kernel's modes is 3% of this small network: never too much is stored, and hardly too little.
    assert all(0.7 <= compression <= 0.75 for compression in compressions[29:])
    assert compressions[0] < 0.6
    assert history[-1][2] < history[0][2]
    assert history[-1][3] > 0


def test_frozen_ranks_stay():
    history = fit("bug", 1, 10)
    ranks = [ranks for _, ranks, *_ in history]
    assert ranks[9] != ranks[0]
    assert all(later == ranks[9] for later in ranks[10:])
    assert history[-1][2] < history[10][2]


def regression(rank=12):
    rng = np.random.default_rng(0)
    params = {"w": tdlrt_jax.initialization.tucker_normal(jax.random.key(0), (16, 12), rank=rank), "b": jnp.zeros(12)}
    x, y = jnp.asarray(rng.normal(size=(16, 16)), jnp.float32), jnp.asarray(rng.normal(size=(16, 12)), jnp.float32)

    def loss(params, x, y):
        return jnp.mean((tdlrt_jax.tucker_linear(x, params["w"]) + params["b"] - y) ** 2)

    return params, loss, x, y


@pytest.mark.parametrize("bad", [None, 3, 10])
def test_a_step_that_is_left_out_does_not_end_a_budget(bad):
    """One whole step in ten, by the caller's count, which the state's does not follow where a step is left out."""
    params, loss, x, y = regression()
    tx = tdlrt(optax.sgd(0.01), tolerance=Budget(0.6, steps=60, every=10))
    steps = {whole: tdlrt_jax.tdlrt_step(loss, tx, cores_only=not whole, donate=False) for whole in (True, False)}
    state = tx.init(params)
    for number in range(100):
        params, state, info = steps[number % 10 == 0](params, state, x * jnp.nan if number == bad else x, y)
    assert int(state.step) == 100 - (bad is not None)
    assert parameter_count((16, 12), info.rank["w"].tolist()) <= 0.4 * 16 * 12


@pytest.mark.parametrize("adapt_every", [1, 2])
def test_the_looks_are_so_many_adaptive_steps_apart(adapt_every):
    params, loss, x, y = regression()
    tx = tdlrt(optax.sgd(0.01), tolerance=Budget(0.6, steps=60, every=3), adapt_every=adapt_every)
    step = tdlrt_jax.tdlrt_step(loss, tx, donate=False)
    state, looks = tx.init(params), []
    for _ in range(14):
        params, state, _ = step(params, state, x, y)
        looks.append(int(state.budget.look))
    period = 3 * adapt_every
    assert looks == [number // period * period for number in range(14)]


def test_ranks_do_not_fall_while_a_budget_warms_up():
    params, loss, x, y = regression()
    tx = tdlrt(optax.sgd(0.01), tolerance=Budget(0.8, steps=20, every=1), warmup=15)
    step = tdlrt_jax.tdlrt_step(loss, tx, donate=False)
    state, ranks = tx.init(params), []
    for _ in range(30):
        params, state, info = step(params, state, x, y)
        ranks.append(info.rank["w"].tolist())
    assert ranks[:15] == [[12, 12]] * 15 and ranks[15] < [12, 12]
    assert parameter_count((16, 12), ranks[-1]) <= 0.2 * 16 * 12


def test_an_absolute_rule_is_refused():
    params, *_ = regression()
    for rule in ({"tolerance": 5.0, "convention": "absolute"}, {"convention": "absolute"}):
        tx = tdlrt(optax.sgd(0.1), tolerance=Budget(0.5, steps=9), rules={"w": rule})
        with pytest.raises(
            ValueError, match=r"kernel 'w': a Budget compares relative tolerances.*'absolute'.*relative to"
        ):
            tx.init(params)


def test_in_a_part_of_a_partition_all_parameters_cannot_be_counted():
    params, *_ = regression()
    inner = tdlrt(optax.sgd(0.1), tolerance=Budget(0.5, steps=9, of="all"))
    tx = optax.partition({"kernel": inner, "rest": optax.sgd(0.1)}, {"w": "kernel", "b": "rest"})
    with pytest.raises(ValueError, match=r"of='all'.*\['b'\] are hidden by optax.partition.*put these inside"):
        tx.init(params)


def test_spare_directions_are_part_of_the_least_ranks():
    params, *_ = regression()
    with pytest.raises(ValueError, match=r"least ranks need .*lower min_rank or spare"):
        tdlrt(optax.sgd(0.1), tolerance=Budget(0.8, steps=6), spare=6).init(params)
