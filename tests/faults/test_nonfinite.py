"""Numbers that are not finite, wherever they come up: nothing changes in any bit, the status says so, the next step is taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import describe_status, hosvd, tdlrt, tdlrt_step, to_dense, tucker_linear, value_and_grad
from tdlrt_jax.status import NONFINITE, OK, SKIPPED
from tests.faults.problem import SHAPE, batch, is_finite, loss_fn, parameters, same, without_report
from tests.helpers import orthonormality

# Options of tdlrt and tdlrt_step. Two gradients a step and one; bases that stay every second step; micro-batches; sketches.
SETTINGS = {
    "bug": ({"integrator": "bug"}, {}),
    "parallel": ({"integrator": "parallel"}, {}),
    "fixed_rank": ({"integrator": "fixed_rank"}, {}),
    "every_second": ({"integrator": "bug", "adapt_every": 2}, {}),
    "micro_batches": ({"integrator": "bug"}, {"accumulate": 2}),
    "randomized": ({"integrator": "parallel", "route": "randomized"}, {}),
}

# What goes wrong; of gradients beside an Adam whose second moment is their square.
FAULTS = {
    "nan in the batch": {"target": np.stack([np.full(SHAPE, np.nan, np.float32), np.ones(SHAPE, np.float32)])},
    "inf in the batch": {"target": np.stack([np.full(SHAPE, np.inf, np.float32), np.ones(SHAPE, np.float32)])},
    "the loss overflows": {"loss": np.inf},
    "squares in the loss overflow": {"target": np.full((2, *SHAPE), 1e25, np.float32)},
    "nan in a kernel's gradient": {"first": np.nan, "second": np.nan},
    "inf in a kernel's gradient": {"first": np.inf, "second": np.inf},
    "nan in another gradient": {"bias": np.nan},
    "-inf in another gradient": {"bias": -np.inf},
    "a moment of the kernel overflows": {"first": 1e30, "second": 1e30},
    "a moment of the bias overflows": {"bias": 1e30},
}


@functools.cache
def program(setting, inner):
    """The optimizer and the compiled step of a setting, shared by the tests of this module."""
    options, how = SETTINGS[setting]
    inners = {
        "adam": lambda: optax.adam(0.05),
        "sgd": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.5, momentum=0.5),
        "hiding": lambda: optax.chain(optax.zero_nans(), optax.sgd(0.05)),
    }
    tx = tdlrt(inners[inner](), tolerance=0.05, **options)
    return tx, tdlrt_step(loss_fn, tx, donate=False, **how)


def assert_left_out(step, params, state, bad):
    """The step with a bad batch changes nothing, and what it leaves goes on as if it had never been."""
    assert is_finite(params)
    after, after_state, info = step(params, state, bad)
    assert int(info.status) == int(after_state.status) == NONFINITE
    (advice,) = describe_status(info.status)
    assert "was not finite" in advice and "Lower the learning rate" in advice
    assert same(after, params) and same(without_report(after_state), without_report(state))
    assert int(info.skipped) == int(after_state.skipped) == int(state.skipped) + 1
    return after, after_state


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_fault_leaves_a_step_out(setting, fault):
    tx, step = program(setting, "adam")
    params, bad = parameters(), batch(**FAULTS[fault])
    state = tx.init(params)
    for number in range(3):  # with adapt_every: while the bases move, while they stay, and again
        kept, kept_state = assert_left_out(step, params, state, bad)
        kept, kept_state = assert_left_out(step, kept, kept_state, bad)
        taken, state, info = step(params, state, batch(number))
        again, again_state, again_info = step(kept, kept_state, batch(number))
        assert int(info.status) & SKIPPED == OK and int(again_info.skipped) == 0
        assert same(again, taken) and same(without_report(again_state), without_report(state))
        assert not same(taken, params) and is_finite((taken, state)) and orthonormality(taken["kernel"]) < 2e-6
        params = taken


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("setting", ["bug", "fixed_rank", "micro_batches"])
def test_the_second_gradient_alone(setting, value):
    tx, step = program(setting, "adam")
    params = parameters()
    assert_left_out(step, params, tx.init(params), batch(second=value))


def test_an_inner_transformation_may_hide_it():
    """Without the entries that are NaN a step would be finite, but there is no knowing what it stands for."""
    tx, step = program("bug", "hiding")
    params = parameters()
    for wrong in ({"first": np.nan}, {"second": np.nan}, {"bias": np.nan}):
        assert_left_out(step, params, tx.init(params), batch(**wrong))


@pytest.mark.parametrize("setting", ["bug", "parallel", "fixed_rank"])
def test_a_learning_rate_that_explodes(setting):
    """The gradients are finite; the increments are not, or not added to what is there."""
    tx, step = program(setting, "sgd")
    params = parameters()
    state = tx.init(params)
    for rate in (np.inf, np.nan, 3e38):
        hyperparams = {**state.inner.hyperparams, "learning_rate": jnp.float32(rate)}
        assert_left_out(step, params, state._replace(inner=state.inner._replace(hyperparams=hyperparams)), batch())


@pytest.mark.parametrize("setting", ["bug", "parallel", "fixed_rank", "every_second"])
def test_a_sum_that_overflows_although_both_terms_are_finite(setting):
    """``3e38 + 3e38``: the update of the bias is finite, and so is its moment."""
    tx, step = program(setting, "sgd")
    params = parameters() | {"bias": jnp.array([3e38, 0.0, 0.0])}
    bad, state = batch(bias=-3e38), tx.init(params)
    state = state._replace(
        inner=state.inner._replace(hyperparams={"learning_rate": jnp.float32(1), "momentum": jnp.float32(0)})
    )
    assert_left_out(step, params, state, bad)
    alone = params | {"bias": jnp.zeros(3)}
    after, _, info = step(alone, state, bad)
    assert int(info.status) & SKIPPED == OK and np.all(np.asarray(after["bias"]) == np.float32(3e38))


def test_what_was_infinite_from_the_start_is_no_fault():
    """A mask of -inf among the parameters, and the best value that a plateau schedule has seen."""
    inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=2, accumulation_size=2))
    tx = tdlrt(inner, tolerance=0.0, integrator="parallel")
    params = parameters() | {"bias": jnp.array([-jnp.inf, 0.0, 0.0])}

    def loss(params):
        return jnp.sum((to_dense(params["kernel"]) - 1) ** 2) + jnp.sum(jnp.where(params["bias"] > -jnp.inf, 1.0, 0.0))

    @jax.jit
    def step(params, state):
        value, grads = value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    after, state, value = step(params, tx.init(params))
    assert state.inner[1].best_value == np.inf
    assert int(state.status) & SKIPPED == OK and int(state.step) == 1
    assert loss(after) < value and after["bias"][0] == -jnp.inf


@pytest.mark.parametrize("integrator", ["bug", "fixed_rank"])
def test_statistics_that_overflow(integrator):
    """The loss saturates and all gradients are finite, but the squares of what the layer saw are not."""
    params = {"kernel": hosvd(jnp.eye(4, 3), rank=2)}

    def loss(params, statistics, x):
        y = tucker_linear(x, params["kernel"])
        moved = {"square": 0.9 * statistics["square"] + 0.1 * jnp.mean(y**2), "count": statistics["count"] + 1}
        return jnp.mean(jnp.tanh(y - 0.5)), moved

    tx = tdlrt(optax.sgd(0.1), tolerance=0.1, integrator=integrator)
    step = tdlrt_step(loss, tx, has_state=True, donate=False)
    state, statistics = tx.init(params), {"square": jnp.ones(()), "count": jnp.zeros((), jnp.int32)}
    x = jax.random.normal(jax.random.key(0), (5, 4))
    after, after_state, moved, info = step(params, state, statistics, x.at[0].set(1e25))
    assert int(info.status) == NONFINITE and np.isfinite(info.loss)
    assert same(after, params) and same(moved, statistics) and same(without_report(after_state), without_report(state))
    after, after_state, moved, info = step(after, after_state, moved, x)
    assert int(info.status) & SKIPPED == OK and int(moved["count"]) == 1 and not same(after, params)


def test_parameters_without_a_kernel():
    params = {"bias": jnp.ones(3), "scale": jnp.float32(3e38)}
    tx = tdlrt(optax.chain(optax.zero_nans(), optax.sgd(1.0, momentum=0.9)), tolerance=0.1)
    state = tx.init(params)
    for grads in (
        {"bias": jnp.array([1.0, jnp.nan, 1.0]), "scale": jnp.float32(0)},
        {"bias": jnp.ones(3), "scale": jnp.float32(-3e38)},
    ):
        updates, after = tx.update(grads, state, params)
        assert int(after.status) == NONFINITE and int(after.skipped) == 1 and int(after.step) == 0
        assert same(optax.apply_updates(params, updates), params) and same(without_report(after), without_report(state))
    updates, after = tx.update({"bias": jnp.ones(3), "scale": jnp.float32(0)}, state, params)
    assert int(after.status) == OK and int(after.step) == 1
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["bias"], 0)


def test_a_kernel_that_is_not_finite_is_refused_by_name():
    kernel = parameters()["kernel"]
    tx = tdlrt(optax.sgd(0.1), tolerance=0.1)
    for broken in (
        kernel._replace(core=kernel.core.at[0, 0, 0].set(jnp.inf)),
        kernel._replace(factors=(kernel.factors[0].at[0, 0].set(jnp.nan), *kernel.factors[1:])),
    ):
        with pytest.raises(ValueError, match=r"kernel 'w'.*not"):
            tx.init({"w": broken})
