"""What is left out, beside optax's own policies: around tdlrt, inside of it and before it; and limits on how often."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tdlrt_jax import TuckerTensor, checkpoint, nn, tdlrt, tdlrt_step, value_and_grad
from tdlrt_jax.status import NONFINITE, OK, SKIPPED
from tests.faults.problem import INTEGRATORS, batch, is_finite, loss_fn, parameters, same, without_report


def core_of(integrator, inner=None):
    return tdlrt(optax.sgd(0.2, momentum=0.5) if inner is None else inner, tolerance=0.05, integrator=integrator)


@functools.cache
def around(integrator):
    tx = optax.apply_if_finite(core_of(integrator), 2)
    return tx, tdlrt_step(loss_fn, tx, donate=False)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_apply_if_finite_around_tdlrt(integrator):
    """It counts, and gives up after two; what it lets through then tdlrt leaves out. The second gradient's function passes."""
    tx, step = around(integrator)
    params = parameters()
    params, state, info = step(params, tx.init(params), batch())
    assert int(info.status) & SKIPPED == OK and int(state.inner_state.step) == 1
    before, seen = state, []
    for _ in range(4):
        after, state, info = step(params, state, batch(first=np.nan))
        assert int(info.status) == NONFINITE and same(after, params)
        seen.append((int(state.notfinite_count), int(state.total_notfinite), int(state.inner_state.skipped)))
    assert seen == [(1, 1, 0), (2, 2, 0), (3, 3, 1), (4, 4, 2)]
    assert same(without_report(state).inner_state, without_report(before).inner_state)
    params, state, info = step(params, state, batch())
    assert int(info.status) & SKIPPED == OK and not same(params, after)
    assert int(state.notfinite_count) == 0 and int(state.inner_state.skipped) == 0 and int(state.inner_state.step) == 2


@pytest.mark.parametrize("integrator", ["bug", "fixed_rank"])
def test_what_apply_if_finite_cannot_see_is_left_out_by_tdlrt(integrator):
    """The second gradient."""
    tx, step = around(integrator)
    params = parameters()
    after, state, info = step(params, tx.init(params), batch(second=np.inf))
    assert int(info.status) == NONFINITE and int(info.skipped) == 1 and same(after, params)
    assert int(state.notfinite_count) == 0


def test_the_models_statistics_stay_where_optax_leaves_a_step_out():
    tx = optax.apply_if_finite(core_of("parallel"), 2)

    def loss(params, statistics, batch):
        value = loss_fn(params, batch)
        return value, {
            "mean": 0.9 * statistics["mean"] + 0.1 * jnp.mean(batch.target),
            "count": statistics["count"] + 1,
        }

    step = tdlrt_step(loss, tx, has_state=True, donate=False)
    params, statistics = parameters(), {"mean": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}
    state = tx.init(params)
    for wrong in ({"first": np.nan}, {"target": np.full((2, 4, 3, 5), np.nan, np.float32)}):
        after, state, moved, info = step(params, state, statistics, batch(**wrong))
        assert int(info.status) == NONFINITE and same(after, params) and same(moved, statistics)
    _, _, moved, info = step(params, state, statistics, batch())
    assert int(info.status) & SKIPPED == OK and int(moved["count"]) == 1


def test_apply_if_finite_inside_tdlrt_has_nothing_left_to_do():
    """A gradient that is not finite ends the step before; what becomes infinite inside is its own to count."""
    inner = optax.chain(
        optax.inject_hyperparams(optax.scale)(step_size=1.0), optax.apply_if_finite(optax.sgd(0.2, momentum=0.5), 1)
    )
    tx = core_of("bug", inner)
    step = tdlrt_step(loss_fn, tx, donate=False)
    params = parameters()
    state = tx.init(params)
    for _ in range(3):
        after, state, info = step(params, state, batch(first=np.nan, second=np.nan))
        assert int(info.status) == NONFINITE and same(after, params) and int(state.inner[1].notfinite_count) == 0
    assert int(info.skipped) == 3
    scale, policy = state.inner
    broken = state._replace(inner=(scale._replace(hyperparams={"step_size": jnp.float32(np.inf)}), policy))
    after, state, info = step(params, broken, batch())
    assert int(info.status) & SKIPPED == OK and int(state.inner[1].notfinite_count) == 1 and is_finite(after)
    for _ in range(2):  # it has given up; tdlrt has not
        kept, state, info = step(after, state, batch())
        assert int(info.status) == NONFINITE and same(kept, after)


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_zero_nans_before_tdlrt(integrator):
    """With one gradient a step goes on without the NaN; a second gradient is tdlrt's own, and is not finite."""
    tx = optax.chain(optax.zero_nans(), core_of(integrator))
    step = tdlrt_step(loss_fn, tx, donate=False)
    params = parameters()
    state = tx.init(params)
    after, _, info = step(params, state, batch(bias=np.nan))
    assert int(info.status) & SKIPPED == OK and not same(after, params), "both gradients of the kernel are finite"
    assert np.all(np.asarray(after["bias"]) == 0)
    after, _, info = step(params, state, batch(first=np.nan, second=np.nan))
    if integrator == "parallel":
        assert int(info.status) & SKIPPED == OK and is_finite(after)
    else:
        assert int(info.status) == NONFINITE and same(after, params)
    after, _, info = step(params, state, batch(loss=np.nan))
    assert int(info.status) == NONFINITE and same(after, params), "a loss that is no number is no step"


def test_multi_steps_around_parallel():
    """With optax's policy a micro-step that is not finite is as if it had never been. Without, optax's sum never gets rid of it
    (0 times NaN): no further step is taken, and each of them says so."""
    good, bad = batch(), batch(first=np.nan)
    for policy in (None, optax.skip_not_finite):
        steps = optax.MultiSteps(core_of("parallel"), 2, should_skip_update_fn=policy)
        tx = optax.GradientTransformationExtraArgs(steps.init, steps.update)
        step = tdlrt_step(loss_fn, tx, donate=False)
        params = parameters()
        state = tx.init(params)
        statuses, taken = [], []
        for this in (bad, good, good, good, good):
            params, state, info = step(params, state, this)
            statuses.append(int(info.status) & SKIPPED)
            taken.append(int(state.inner_opt_state.step))
            assert is_finite(params)
        if policy is None:
            assert statuses == [NONFINITE, NONFINITE, OK, NONFINITE, OK] and taken == [0, 0, 0, 0, 0]
        else:
            assert statuses == [NONFINITE, OK, OK, OK, OK] and taken == [0, 0, 1, 1, 2]


def test_what_drops_the_second_gradients_function_is_explained():
    """``MultiSteps.gradient_transformation`` takes no further arguments."""
    params = parameters()
    tx = optax.MultiSteps(core_of("bug"), 2).gradient_transformation()
    with pytest.raises(ValueError, match=r'pass value_and_grad_fn=.*MultiSteps.*drop it.*integrator="parallel"'):
        tdlrt_step(loss_fn, tx, donate=False)(params, tx.init(params), batch())


@pytest.mark.parametrize("how", ["alone", "inside apply_if_finite"])
def test_the_other_parts_of_a_partition(how):
    """What is outside of tdlrt would take a NaN: the whole step is undone. Within apply_if_finite it is optax that does it."""

    def labels(params):
        def label(node):
            return "kernel" if isinstance(node, TuckerTensor) else "rest"

        return jax.tree.map(label, params, is_leaf=lambda node: isinstance(node, TuckerTensor))

    tx = optax.partition({"kernel": core_of("bug"), "rest": optax.adam(0.1)}, labels)
    tx = tx if how == "alone" else optax.apply_if_finite(tx, 3)
    step = tdlrt_step(loss_fn, tx, donate=False)
    params = parameters()
    state = tx.init(params)
    for wrong in ({"bias": np.nan}, {"first": np.nan, "bias": np.nan}):
        after, after_state, info = step(params, state, batch(**wrong))
        assert int(info.status) == NONFINITE and same(after, params)
        inside, before = (s if how == "alone" else s.inner_state for s in (after_state, state))
        assert same(without_report(inside), without_report(before))
    after, _, info = step(params, after_state, batch(bias=1.0))
    assert int(info.status) & SKIPPED == OK and not same(after, params)


def test_steps_left_out_in_a_row_are_counted_and_saved(tmp_path):
    """A limit is a comparison in the loop; under jit it needs no look at the device but at one number."""
    tx = core_of("parallel")
    step = tdlrt_step(loss_fn, tx, donate=False)
    params = parameters()
    state = tx.init(params)
    counts = []
    for wrong in (True, True, False, True):
        params, state, info = step(params, state, batch(bias=np.nan) if wrong else batch())
        counts.append(int(info.skipped))
    assert counts == [1, 2, 0, 1]
    checkpoint.save(tmp_path, 1, state)
    restored, _ = checkpoint.restore(tmp_path, tx.init(params))
    assert same(restored, state) and int(restored.skipped) == 1


def test_by_hand_without_the_loss():
    """Only what update is given can be judged: the gradients, and the loss where it is given."""
    params = parameters()
    tx = core_of("parallel")
    state = tx.init(params)

    @jax.jit
    def update(state, batch, value=None):
        _, grads = value_and_grad(loss_fn)(params, batch)
        return tx.update(grads, state, params, **({} if value is None else {"value": value}))[1]

    assert int(update(state, batch(loss=np.nan)).status) & SKIPPED == OK
    assert int(update(state, batch(), jnp.float32(np.nan)).status) == NONFINITE
    assert int(update(state, batch(bias=np.nan)).status) == NONFINITE


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ("partition", {"first": np.nan}),
        ("partition", {"loss": np.inf}),
        ("masked", {"first": np.nan}),
        ("within MultiSteps", {"first": np.nan}),  # the loss it does not hand on
    ],
)
def test_what_tdlrt_leaves_out_the_other_parts_do_not_take(how, wrong):
    """A step is taken as a whole or not at all: here nothing that the other parts are given is out of order."""

    def is_kernel(node):
        return isinstance(node, TuckerTensor)

    def labels(params):
        return jax.tree.map(lambda node: "kernel" if is_kernel(node) else "rest", params, is_leaf=is_kernel)

    def mask(of):
        return lambda params: jax.tree.map(lambda label: label == of, labels(params))

    kernels, rest = core_of("parallel"), optax.adam(0.1)
    if how == "masked":
        tx = optax.chain(optax.masked(kernels, mask("kernel")), optax.masked(rest, mask("rest")))
    else:
        tx = optax.partition({"kernel": kernels, "rest": rest}, labels)
    if how == "within MultiSteps":
        tx = optax.MultiSteps(tx, 1)
    step = tdlrt_step(loss_fn, tx, donate=False)
    params = parameters()
    params, state, info = step(params, tx.init(params), batch(bias=1.0))
    assert int(info.status) & SKIPPED == OK
    after, after_state, info = step(params, state, batch(bias=1.0, **wrong))
    assert int(info.status) == NONFINITE and int(info.skipped) == 1 and same(after, params)
    if how == "within MultiSteps":  # its own counts go on
        assert int(after_state.gradient_step) == 2
        after_state, state = after_state.inner_opt_state, state.inner_opt_state
    assert same(without_report(after_state), without_report(state))
    again, _, info = step(after, after_state if how != "within MultiSteps" else tx.init(params), batch(bias=1.0))
    assert int(info.status) & SKIPPED == OK and not np.array_equal(again["bias"], after["bias"])


@pytest.mark.parametrize("wrong", [{}, {"first": np.nan}, {"bias": np.nan}])
def test_parts_of_an_nnx_optimizer_move_together_or_not_at_all(wrong):
    class Model(nnx.Module):
        def __init__(self):
            start = parameters()
            self.kernel, self.bias = nnx.Param(start["kernel"]), nnx.Param(start["bias"])

    def labels(params):
        def label(path, _):
            return "rest" if "bias" in jax.tree_util.keystr(path) else "kernel"

        return jax.tree_util.tree_map_with_path(label, params)

    model = Model()
    tx = optax.partition({"kernel": nn.tdlrt(optax.sgd(0.1), tolerance=0.1), "rest": optax.adam(0.1)}, labels)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model, batch):
        return loss_fn({"kernel": model.kernel.get_value(), "bias": model.bias.get_value()}, batch)

    step = nn.tdlrt_step(loss)
    assert int(step(model, optimizer, batch(bias=1.0)).status) & SKIPPED == OK
    before = jax.tree.map(np.array, nnx.as_pure((nnx.state(model), optimizer.opt_state)))
    info = step(model, optimizer, batch(**{"bias": 1.0, **wrong}))
    after = nnx.as_pure((nnx.state(model), optimizer.opt_state))
    if wrong:
        assert int(info.status) == NONFINITE and same(after[0], before[0])
        assert same(without_report(after[1]), without_report(before[1]))
    else:
        assert int(info.status) & SKIPPED == OK
        assert not np.array_equal(after[0]["bias"], before[0]["bias"])
        assert not np.array_equal(after[0]["kernel"].core, before[0]["kernel"].core)
