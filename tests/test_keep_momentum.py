"""What steps of the cores alone hold for the bases, and the next step that moves them takes up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import fit_capacity, kernel_paths, lift, resize, tdlrt, tdlrt_step, to_dense
from tdlrt_jax.network import NetworkStep
from tdlrt_jax.paths import flatten_kernels
from tests import references
from tests.helpers import tangent_to_dense
from tests.test_step import loss_fn, momentum, network
from tests.test_transport import heavy_ball_problem


def alternated(inner, wholes, betweens, **options):
    """Parameters and state after whole steps and then some of the cores alone."""
    params, images, labels = network(dtype=jnp.float64)
    tx = tdlrt(inner, tolerance=0.05, keep_momentum=True, **options)
    state = tx.init(params)
    for steps, alone in ((wholes, False), (betweens, True)):
        step = tdlrt_step(loss_fn, tx, donate=False, cores_only=alone)
        for _ in range(steps):
            params, state, _ = step(params, state, images, labels)
    return params, state


def of_bases(moment):
    return moment._replace(core=jnp.zeros_like(moment.core))


def test_a_tangent_vector_stays_what_it_is_while_the_cores_move(x64):
    """Taken up, it is its own orthogonal projection onto the tangent space by then, formed densely."""
    inner = optax.sgd(0.3, momentum=0.9)
    before, held = alternated(inner, 3, 0)
    after, state = alternated(inner, 3, 4)
    tree = flatten_kernels(after)
    network_step = NetworkStep(tree, optax.with_extra_args_support(inner), {}, None)
    carried = network_step.from_anchor(
        state.inner, [state.anchor[name] for name in tree.names], [lift(kernel) for kernel in tree.kernels]
    )
    traces = (kernel_paths(inner_state[0].trace) for inner_state in (held.inner, state.inner, carried))
    old, same, new = (trace["conv"] for trace in traces)
    jax.tree.map(np.testing.assert_array_equal, old.factors, same.factors)
    jax.tree.map(np.testing.assert_array_equal, before["conv"], state.anchor["conv"])
    assert np.linalg.norm(np.asarray(before["conv"].core - after["conv"].core)) > 1e-3
    vector = np.asarray(tangent_to_dense(of_bases(old), lift(before["conv"])))
    kernel = _active(after["conv"])
    expected = references.projected_gradient(np.asarray(kernel.core), list(map(np.asarray, kernel.factors)), vector)
    found = np.asarray(tangent_to_dense(of_bases(new), lift(after["conv"])))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.linalg.norm(found - vector) > 1e-6 * np.linalg.norm(vector)
    np.testing.assert_array_equal(new.core, same.core)


def _active(kernel):
    ranks = [int(np.any(np.asarray(u) != 0, axis=0).sum()) for u in kernel.factors]
    return resize(kernel, ranks)


@pytest.mark.parametrize(
    ("integrator", "inner"),
    [
        ("bug", optax.sgd(0.1, momentum=0.9)),
        ("parallel", optax.adam(0.02)),
        ("fixed_rank", optax.sgd(0.1, momentum=0.9)),
    ],
    ids=["bug", "parallel", "fixed_rank"],
)
def test_where_there_is_nothing_in_between_it_changes_nothing(x64, integrator, inner):
    params, _ = alternated(inner, 4, 0, integrator=integrator)
    other, images, labels = network(dtype=jnp.float64)
    tx = tdlrt(inner, tolerance=0.05, integrator=integrator)
    step, state = tdlrt_step(loss_fn, tx, donate=False), tx.init(other)
    for _ in range(4):
        other, state, _ = step(other, state, images, labels)
    for name, kernel in kernel_paths(params).items():
        np.testing.assert_allclose(to_dense(kernel), to_dense(kernel_paths(other)[name]), atol=1e-11)


def test_steps_at_ranks_that_stay_take_it_up(x64):
    """After a step of the cores they step with the momentum that was held; where there was none they do as without holding."""
    inner = optax.sgd(0.1, momentum=0.9)

    def run(kinds, **options):
        params, images, labels = network(dtype=jnp.float64)
        tx = tdlrt(inner, tolerance=0.05, **options)
        state = tx.init(params)
        for kind in kinds:
            params, state, _ = tdlrt_step(loss_fn, tx, donate=False, **kind)(params, state, images, labels)
        return to_dense(params["conv"])

    turning, cores = {"ranks_stay": True}, {"cores_only": True}
    kinds = [{}, turning, turning, turning]
    np.testing.assert_allclose(run(kinds, keep_momentum=True), run(kinds), atol=1e-11)
    kinds = [{}, turning, cores, turning]
    assert np.abs(run(kinds, keep_momentum=True) - run(kinds)).max() > 1e-5


def test_second_moments_stay_but_for_what_is_below_the_average(x64):
    """Neither do they decay while nothing is seen of the bases, nor do steps in other frames mix them."""
    _, held = alternated(optax.adam(0.02), 3, 0)
    _, state = alternated(optax.adam(0.02), 3, 1)
    old, new = (kernel_paths(s.inner[0].nu)["conv"] for s in (held, state))
    average = float(np.asarray(old.core)[np.asarray(old.core) != 0].mean())
    for u, before, after in zip(_bases(held), old.factors, new.factors):
        np.testing.assert_allclose(after[:, u], np.maximum(np.asarray(before), average)[:, u], rtol=1e-12)


def _bases(state):
    return [np.any(np.asarray(u) != 0, axis=0) for u in state.anchor["conv"].factors]


def test_heavy_ball_gets_on_faster(x64):
    """Where one step in five moves the bases: to the optimum, and nearer to it than without after as many steps."""
    loss, _, kernel, optimum = heavy_ball_problem()

    def distance(steps, **options):
        tx = tdlrt(
            optax.sgd(0.02, momentum=0.9),
            tolerance=1e-7,
            max_rank=kernel.core.shape,
            **options,
        )
        whole, between = (
            tdlrt_step(lambda params: loss(params), tx, donate=False, cores_only=alone) for alone in (False, True)
        )
        params, state = kernel, tx.init(kernel)
        for number in range(steps):
            params, state, _ = (between if number % 5 else whole)(params, state)
        return float(jnp.linalg.norm(to_dense(params) - optimum) / jnp.linalg.norm(optimum))

    assert distance(300, keep_momentum=True) < 0.1 * distance(300)
    assert distance(1500, keep_momentum=True) < 1e-6


def test_arrays_change_sizes_and_steps_in_between_factorize_nothing():
    params, images, labels = network()
    tx = tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.05, keep_momentum=True)
    whole, between = (tdlrt_step(loss_fn, tx, donate=False, cores_only=alone) for alone in (False, True))
    params, state, _ = whole(params, tx.init(params), images, labels)
    params, state, _ = between(params, state, images, labels)
    sizes = fit_capacity(params, multiple=1, hysteresis=1.0)
    smaller, smaller_state = resize(params, sizes), resize(state, sizes)
    assert smaller["conv"].core.shape != params["conv"].core.shape
    losses = []
    for tree, its_state in ((params, state), (smaller, smaller_state)):
        for step in (between, whole, between):
            tree, its_state, info = step(tree, its_state, images, labels)
            assert int(info.status) & 0b11 == 0
        losses.append(float(info.loss))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    text = between.lower(params, state, images, labels).as_text()
    assert not any(name in text for name in ("lapack", "Qr", "Eigh", "cholesky", "triangular_solve"))


def test_without_it_the_state_is_as_before():
    params, _, _ = network()
    assert momentum().init(params).anchor == ()
