"""The conformance table: every integrator with every kind of inner transformation, in float32 and float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tdlrt_jax
from tdlrt_jax import (
    TuckerTensor,
    active_rank,
    describe_status,
    hosvd,
    resize,
    tdlrt,
    to_dense,
    tucker_linear,
    value_and_grad,
)
from tdlrt_jax.status import NONFINITE, OK, OTHER_GRADIENT, PLAIN_GRADIENTS, RANK_AT_CAPACITY
from tdlrt_jax.step import find_states
from tests.helpers import kernels_of, orthonormality, regression, train

INTEGRATORS = ["bug", "parallel", "fixed_rank"]


INNER = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(0.01, weight_decay=1e-3),
    "rmsprop": lambda: optax.rmsprop(0.005),
    "lion": lambda: optax.lion(0.01),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.05, 60), momentum=0.5),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.05, momentum=0.9)),
    "inject": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.05, momentum=0.9),
    "finite": lambda: optax.apply_if_finite(optax.adam(0.01), 3),
    "plateau": lambda: optax.chain(optax.sgd(0.05), optax.contrib.reduce_on_plateau(patience=10)),
    "partition": lambda: optax.partition(
        {"kernel": optax.sgd(0.02, momentum=0.9), "rest": optax.adam(0.01)},
        lambda params: jax.tree.map(
            lambda leaf: "kernel" if isinstance(leaf, TuckerTensor) else "rest",
            params,
            is_leaf=lambda leaf: isinstance(leaf, TuckerTensor),
        ),
    ),
    "masked": lambda: optax.chain(
        optax.masked(optax.add_decayed_weights(1e-3), {"first": {"kernel": True, "bias": False}, "second": True}),
        optax.sgd(0.05),
    ),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_conformance(integrator, inner):
    """Descent, orthonormality, clean padding, dtypes kept, all steps in one trace, a good status."""
    params, loss = regression(jnp.float32)
    tx = tdlrt(INNER[inner](), tolerance=0.05, integrator=integrator)
    after, state, losses, status = train(params, loss, tx, 60)
    assert losses[-1] < 0.9 * losses[0]
    assert (status & (NONFINITE | PLAIN_GRADIENTS) == OK).all()
    for kernel, before in zip(kernels_of(after), kernels_of(params)):
        assert orthonormality(kernel) < 2e-6
        assert jax.tree.map(jnp.shape, kernel) == jax.tree.map(jnp.shape, before)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(kernel))
        padding = resize(kernel, tuple(active_rank(kernel).tolist()))  # raises if anything but zeros were cut
        np.testing.assert_allclose(to_dense(padding), to_dense(kernel), atol=1e-6)
    assert jax.tree.map(jnp.shape, tx.init(after)) == jax.tree.map(jnp.shape, state)
    assert int(state.step) == 60


@pytest.mark.parametrize("inner", ["momentum", "adam", "clipped"])
def test_conformance_of_fixed_rank(inner):
    params, loss = regression(jnp.float32)
    ranks = [active_rank(kernel).tolist() for kernel in kernels_of(params)]
    tx = tdlrt(INNER[inner](), tolerance=0.0, integrator="fixed_rank")
    after, _, losses, _ = train(params, loss, tx, 60)
    assert losses[-1] < 0.9 * losses[0]
    assert [active_rank(kernel).tolist() for kernel in kernels_of(after)] == ranks
    assert max(map(orthonormality, kernels_of(after))) < 2e-6


DENSE_TWINS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "clipping": lambda: optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.3, momentum=0.9)),
    "decay": lambda: optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9)),
    "schedule": lambda: optax.sgd(optax.exponential_decay(0.1, 5, 0.7), momentum=0.9),
}


@pytest.mark.parametrize("twin", DENSE_TWINS)
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_full_rank_without_tolerance_is_dense_training(x64, integrator, twin):
    params, loss = regression(
        jnp.float64, outputs=6
    )  # r_i = n_i in every mode: fixed_rank turns a basis that is not complete
    rng = np.random.default_rng(3)
    params["first"]["kernel"] = hosvd(jnp.array(rng.normal(size=(4, 3, 6))), rank=(4, None, 6))
    params["second"]["kernel"] = hosvd(jnp.array(rng.normal(size=(6, 6))))
    dense = jax.tree.map(to_dense, params, is_leaf=lambda leaf: isinstance(leaf, TuckerTensor))
    after, _, losses, _ = train(params, loss, tdlrt(DENSE_TWINS[twin](), tolerance=0.0, integrator=integrator), 25)
    tx = DENSE_TWINS[twin]()

    @jax.jit
    def run(dense, state):
        def body(carry, _):
            dense, state = carry
            value, grads = jax.value_and_grad(loss)(dense)
            updates, state = tx.update(grads, state, dense)
            return (optax.apply_updates(dense, updates), state), value

        return jax.lax.scan(body, (dense, state), None, length=25)

    (expected, _), expected_losses = run(dense, tx.init(dense))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-11)
    for kernel, weights in zip(kernels_of(after), kernels_of(expected)):
        np.testing.assert_allclose(to_dense(kernel), weights, atol=1e-12)
    np.testing.assert_allclose(after["first"]["bias"], expected["first"]["bias"], atol=1e-12)


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_two_capacities_give_the_same_run(x64, integrator):
    outcomes = []
    for capacity, second in (((4, 3, 6), 5), ((3, 3, 5), 4)):
        params, loss = regression(jnp.float64, capacity=capacity)
        params["second"]["kernel"] = resize(params["second"]["kernel"], second)
        tx = tdlrt(optax.sgd(0.05, momentum=0.9), tolerance=0.3, integrator=integrator, max_rank=3)
        after, state, losses, _ = train(params, loss, tx, 40)
        outcomes.append((losses, state.rank, [to_dense(kernel) for kernel in kernels_of(after)]))
    (losses, rank, kernels), (other_losses, other_rank, other_kernels) = outcomes
    np.testing.assert_allclose(losses, other_losses, rtol=1e-9)
    assert jax.tree.map(lambda r: r.tolist(), rank) == jax.tree.map(lambda r: r.tolist(), other_rank)
    for kernel, other in zip(kernels, other_kernels):
        np.testing.assert_allclose(kernel, other, atol=1e-9)


def test_counts_and_schedules_advance_once_a_step_although_bug_updates_twice():
    params, loss = regression(jnp.float32)
    seen = tdlrt(optax.adam(optax.linear_schedule(0.01, 0.0, 7)), tolerance=0.1)
    after, state, _, _ = train(params, loss, seen, 7)
    counts = [leaf for leaf in jax.tree.leaves(state.inner) if jnp.issubdtype(leaf.dtype, jnp.integer)]
    assert counts and all(int(count) == 7 for count in counts)
    again, _, _, _ = train(after, loss, seen, 1, state)  # the learning rate is zero now
    np.testing.assert_array_equal(again["first"]["bias"], after["first"]["bias"])


def test_adam_steps_stay_bounded_while_bases_move(rng):
    """No entry of a core moves by many learning rates when second moments are carried to other bases."""
    params, loss = regression(jnp.float32, rank=(1, None, 1))
    rate = 1e-3
    tx = tdlrt(optax.adam(rate), tolerance=1e-3, integrator="parallel")
    gradient, state = value_and_grad(loss), tx.init(params)

    @jax.jit
    def step(params, state):
        _, grads = gradient(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        new, state = step(params, state)
        for kernel, old in zip(kernels_of(new), kernels_of(params)):
            moved = np.abs(np.asarray(to_dense(kernel) - to_dense(old))).max()
            assert moved < 30 * rate
        params = new


def test_amortized_adaptation_moves_bases_every_few_steps():
    params, loss = regression(jnp.float32)
    tx = tdlrt(optax.sgd(0.02, momentum=0.9), tolerance=0.05, adapt_every=4)
    state, spans = tx.init(params), []
    current = params
    for _ in range(9):
        current, state, _, _ = train(current, loss, tx, 1, state)
        u = np.asarray(current["first"]["kernel"].factors[2])
        spans.append(u @ u.T)
    moved = [np.abs(b - a).max() > 1e-6 for a, b in itertools.pairwise(spans)]
    assert moved == [False, False, False, True, False, False, False, True]
    _, _, losses, _ = train(params, loss, tx, 60)
    assert losses[-1] < 0.8 * losses[0]


def test_warmup_holds_ranks_up_and_bounds_hold():
    params, loss = regression(jnp.float32)
    tx = tdlrt(optax.sgd(0.01), tolerance=0.9, warmup=5)
    _, state, _, _ = train(params, loss, tx, 5)
    assert (state.rank["first/kernel"] >= jnp.array([2, 3, 3])).all()
    _, state, _, _ = train(params, loss, tx, 10)
    assert state.rank["first/kernel"].tolist() == [1, 3, 1]
    bounded = tdlrt(
        optax.sgd(0.01), tolerance=0.9, min_rank={"first": (2, 1, 2), "second": 2}, max_rank={"second": (3, 3)}
    )
    _, state, _, _ = train(params, loss, bounded, 10)
    assert state.rank["first/kernel"].tolist() == [2, 3, 2] and state.rank["second/kernel"].tolist() == [2, 2]
    loose = tdlrt(optax.sgd(0.05), tolerance=0.0, max_rank={"second": (3, 3)})
    _, state, _, status = train(params, loss, loose, 10)
    assert state.rank["second/kernel"].tolist() == [3, 3] and not (status & RANK_AT_CAPACITY).any()


def test_a_rank_at_its_capacity_is_reported():
    params, loss = regression(jnp.float32, capacity=(2, 3, 3))
    _, _, _, status = train(params, loss, tdlrt(optax.sgd(0.05), tolerance=1e-4), 3)
    assert (status & RANK_AT_CAPACITY).all()
    assert "capacity" in describe_status(int(status[-1]))[0]


def test_tolerance_follows_a_schedule_and_may_be_replaced_without_recompilation():
    params, loss = regression(jnp.float32)
    rising = tdlrt(optax.sgd(0.01), tolerance=lambda step: jnp.where(step < 5, 0.0, 0.8))
    _, state, _, _ = train(params, loss, rising, 5)
    assert state.rank["first/kernel"].tolist() == [4, 3, 6]
    _, state, _, _ = train(params, loss, rising, 8)
    assert state.rank["first/kernel"].tolist() != [4, 3, 6]

    tx, gradient = tdlrt(optax.sgd(0.01), tolerance=0.0), value_and_grad(loss)

    @jax.jit
    def step(params, state):
        _, grads = gradient(params)
        updates, state = tx.update(grads, state, params, value_and_grad_fn=gradient)
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params))
    params, state = step(params, state._replace(tolerance=jnp.float32(0.8)))
    assert state.rank["first/kernel"].tolist() != [4, 3, 6]
    assert step._cache_size() == 1


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_a_gradient_that_is_not_finite_changes_nothing(integrator):
    params, loss = regression(jnp.float32)
    tx = tdlrt(optax.adam(0.01), tolerance=0.1, integrator=integrator)
    params, state, _, _ = train(params, loss, tx, 2)

    def poisoned(params):
        return loss(params) * jnp.where(params["first"]["bias"][0] > -jnp.inf, jnp.nan, 1.0)

    after, after_state, _, status = train(params, poisoned, tx, 3, state)
    assert (status == NONFINITE).all() and "not finite" in describe_status(int(status[0]))[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after, params))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after_state.inner, state.inner))
    assert int(after_state.step) == 2
    _, _, losses, status = train(after, loss, tx, 2, after_state)  # and it goes on
    assert np.isfinite(losses).all() and not (status & NONFINITE).any()


def test_plain_gradients_are_recognized():
    params, loss = regression(jnp.float32)
    tx = tdlrt(optax.sgd(0.01), tolerance=0.1, integrator="parallel")
    _, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
    assert int(state.status) & PLAIN_GRADIENTS
    assert "value_and_grad" in describe_status(int(state.status))[0]
    _, _, _, status = train(params, loss, tx, 40)
    assert not (status & PLAIN_GRADIENTS).any()


def test_noise_never_enters_the_padding():
    params, loss = regression(jnp.float32)
    tx = tdlrt(optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.01)), tolerance=0.1)
    after, _, _, _ = train(params, loss, tx, 10)
    for kernel in kernels_of(after):
        resize(kernel, tuple(active_rank(kernel).tolist()))


@pytest.mark.parametrize("partitioned", [True, False])
def test_partition_and_masked_outside_when_the_kernels_are_alone(partitioned):
    """tdlrt sees MaskedNodes for the rest; the second gradient needs the full parameters, which tdlrt_step fills in."""
    from tdlrt_jax import tdlrt_step

    params, loss = regression(jnp.float32)
    labels = {"first": {"kernel": "tucker", "bias": "rest"}, "second": {"kernel": "tucker"}}
    inner = tdlrt(optax.sgd(0.05), tolerance=0.1)
    if partitioned:
        tx = optax.partition({"tucker": inner, "rest": optax.adam(0.01)}, labels)
    else:
        tx = optax.chain(
            optax.masked(inner, jax.tree.map(lambda label: label == "tucker", labels)),
            optax.masked(optax.scale(-0.05), jax.tree.map(lambda label: label == "rest", labels)),
        )
    step = tdlrt_step(lambda params, *_: loss(params), tx, donate=False)
    state, losses = tx.init(params), []
    for _ in range(20):
        params, state, info = step(params, state)
        losses.append(float(info.loss))
    assert losses[-1] < losses[0] and step._cache_size() == 1
    assert set(info.rank) == {"first/kernel", "second/kernel"}
    assert float(jnp.abs(params["first"]["bias"]).max()) > 0


def test_apply_if_finite_outside():
    params, loss = regression(jnp.float32)
    _, _, losses, _ = train(params, loss, optax.apply_if_finite(tdlrt(optax.sgd(0.05), tolerance=0.1), 3), 20)
    assert losses[-1] < losses[0]


def test_init_keeps_no_buffer_of_the_parameters():
    params, _ = regression(jnp.float32)
    state = tdlrt(optax.adam(0.1), tolerance=0.1).init(params)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    assert not pointers & {
        leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)
    }


def test_without_kernels_it_is_the_inner_transformation():
    params = {"w": jnp.ones(3)}
    tx = tdlrt(optax.sgd(0.1), tolerance=0.1)
    updates, state = tx.update({"w": jnp.ones(3)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1)
    assert int(state.step) == 1


def steps_apart(tx, *, by_hand=False):
    """The status of a step of a kernel of full rank, and how far it is from a step of the dense kernel's descent, relative."""
    rng = np.random.default_rng(0)
    dense = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    batches = [tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((8, 6), (8, 5))) for _ in range(2)]

    def loss_fn(params, x, y):
        return jnp.mean((tucker_linear(x, params["w"]) - y) ** 2)

    params = {"w": hosvd(dense)}
    state = tx.init(params)
    for x, y in batches if by_hand else batches[:1]:
        (_, grads), second = tdlrt_jax.value_and_two_grads(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, value_and_grad_fn=second)
        params = optax.apply_updates(params, updates)

    def mean(w):
        used = batches if by_hand else batches[:1]
        return sum(jnp.mean((x @ w - y) ** 2) for x, y in used) / len(used)

    step = -0.1 * jax.grad(mean)(dense)
    (found,) = find_states(state)
    return int(found.status), float(jnp.linalg.norm(to_dense(params["w"]) - dense - step) / jnp.linalg.norm(step))


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_a_second_gradient_of_something_else_is_reported(integrator):
    """Micro-batches added up, and gradients clipped, before tdlrt: the kernels of bug move by the second gradient alone."""
    kernels = tdlrt(optax.sgd(0.1), tolerance=0.0, integrator=integrator)
    status, apart = steps_apart(kernels)
    assert status & OTHER_GRADIENT == OK and apart < 1e-4
    for tx, by_hand in (
        (optax.MultiSteps(kernels, 2), True),
        (optax.chain(optax.clip_by_global_norm(1e-3), kernels), False),
    ):
        status, apart = steps_apart(tx, by_hand=by_hand)
        assert bool(status & OTHER_GRADIENT) == (integrator == "bug")
        if by_hand:
            assert apart > 0.1 if integrator == "bug" else apart < 1e-4
    status, _ = steps_apart(tdlrt(optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.1)), tolerance=0.0))
    assert status & OTHER_GRADIENT == OK, "inside it is in order"
