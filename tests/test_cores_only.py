"""Steps of the cores alone, between adaptations: what they do, what they leave, and where alternating them leads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdlrt_jax.nn
from tdlrt_jax import Budget, TuckerTensor, describe_status, kernel_paths, tdlrt, tdlrt_step, to_dense, value_and_grad
from tdlrt_jax.nn import TuckerConv, TuckerLinear
from tdlrt_jax.status import NONFINITE
from tests.helpers import orthonormality
from tests.test_step import loss_fn, momentum, network, with_statistics
from tests.test_transport import heavy_ball_problem

INNERS = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(0.02, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5, momentum=0.5)),
}


def cores_of(params):
    """The parameters as a loop that knows no bases would have them: arrays alone."""
    return {
        "conv": params["conv"].core,
        "head": {"kernel": params["head"]["kernel"].core, "bias": params["head"]["bias"]},
    }


def with_cores(params, cores):
    conv, head = params["conv"], params["head"]["kernel"]
    return {
        "conv": TuckerTensor(cores["conv"], conv.factors),
        "head": {"kernel": TuckerTensor(cores["head"]["kernel"], head.factors), "bias": cores["head"]["bias"]},
    }


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("integrator", ["bug", "parallel", "fixed_rank"])
def test_cores_move_as_by_the_inner_transformation_alone(x64, inner, integrator):
    """The reference differentiates dense kernels in their cores, with constant bases."""
    params, images, labels = network(dtype=jnp.float64)
    tx, reference = tdlrt(INNERS[inner](), tolerance=0.05, integrator=integrator), INNERS[inner]()
    step, state = tdlrt_step(loss_fn, tx, cores_only=True, donate=False), tx.init(params)

    def of_cores(cores):
        dense = jax.tree.map(to_dense, with_cores(params, cores), is_leaf=lambda node: isinstance(node, TuckerTensor))
        return dense_loss(dense, images, labels)

    cores = cores_of(params)
    reference_state, moved = reference.init(cores), params
    for count in range(1, 6):
        value, grads = jax.value_and_grad(of_cores)(cores)
        moved, state, info = step(moved, state, images, labels)
        np.testing.assert_allclose(info.loss, value, rtol=1e-12)
        updates, reference_state = reference.update(grads, reference_state, cores)
        cores = optax.apply_updates(cores, updates)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), cores_of(moved), cores)
        assert int(state.step) == count and describe_status(info.status) == []
    for name, kernel in kernel_paths(moved).items():
        before = kernel_paths(params)[name]
        jax.tree.map(np.testing.assert_array_equal, kernel.factors, before.factors)
        assert np.any(np.asarray(kernel.core) != np.asarray(before.core))
        np.testing.assert_array_equal(info.rank[name], state.rank[name])
        assert float(info.truncation_error[name]) == 0


def dense_loss(params, images, labels):
    hidden = jax.nn.relu(
        jax.lax.conv_general_dilated(images, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    logits = hidden.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_nothing_is_factorized_and_it_compiles_once():
    params, images, labels = network()
    tx = momentum()
    step, state = tdlrt_step(loss_fn, tx, cores_only=True, donate=False), tx.init(params)
    factorizations = ("lapack", "Qr", "Eigh", "cholesky", "triangular_solve")

    def program(step):
        return step.lower(params, state, images, labels).as_text()

    assert not any(name in program(step) for name in factorizations)
    assert any(name in program(tdlrt_step(loss_fn, tx, donate=False)) for name in factorizations)
    for _ in range(3):
        params, state, _ = step(params, state, images, labels)
    assert step._cache_size() == 1


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_it_alternates_with_whole_steps(integrator):
    params, images, labels = network()
    tx = momentum(integrator, 0.4)
    whole, between = tdlrt_step(loss_fn, tx), tdlrt_step(loss_fn, tx, cores_only=True)
    state, losses, ranks = tx.init(params), [], []
    start = {name: tuple(rank.tolist()) for name, rank in state.rank.items()}
    for number in range(20):
        step = between if number % 5 else whole
        params, state, info = step(params, state, images, labels)
        losses.append(float(info.loss))
        ranks.append({name: tuple(rank.tolist()) for name, rank in info.rank.items()})
        assert describe_status(info.status) == []
    assert losses[-1] < losses[5] < losses[0]
    assert all(ranks[number] == ranks[number - 1] for number in range(20) if number % 5), "ranks move in whole steps"
    assert ranks[-1] != start
    assert all(orthonormality(kernel) < 1e-5 for kernel in kernel_paths(params).values())
    assert whole._cache_size() == between._cache_size() == 1, "each of them finds the other's state as its own"


def test_what_momentum_has_of_the_bases_is_let_go_and_the_cores_stays(x64):
    params, images, labels = network(dtype=jnp.float64)
    tx = momentum(tolerance=0.0)
    params, state, _ = tdlrt_step(loss_fn, tx, donate=False)(params, tx.init(params), images, labels)
    before = kernel_paths(state.inner[0].trace)["conv"]
    assert all(np.any(np.asarray(factor) != 0) for factor in before.factors)
    _, grads = value_and_grad(loss_fn)(params, images, labels)
    _, state, _ = tdlrt_step(loss_fn, tx, cores_only=True, donate=False)(params, state, images, labels)
    after = kernel_paths(state.inner[0].trace)["conv"]
    assert all(np.all(np.asarray(factor) == 0) for factor in after.factors)
    np.testing.assert_allclose(after.core, 0.9 * before.core + grads["conv"].core, atol=1e-12)


def test_second_moments_of_the_bases_are_no_smaller_than_the_average_of_the_cores(x64):
    params, images, labels = network(dtype=jnp.float64)
    tx = tdlrt(optax.adam(0.01), tolerance=0.05)
    state = tx.init(params)
    state = state._replace(
        inner=(state.inner[0]._replace(nu=jax.tree.map(lambda nu: nu + 1.0, state.inner[0].nu)), *state.inner[1:])
    )
    conv = state.inner[0].nu["conv"]
    state.inner[0].nu["conv"] = conv._replace(factors=jax.tree.map(jnp.zeros_like, conv.factors))
    _, after, _ = tdlrt_step(loss_fn, tx, cores_only=True, donate=False)(params, state, images, labels)
    for u, nu in zip(params["conv"].factors, after.inner[0].nu["conv"].factors):
        active = np.any(np.asarray(u) != 0, axis=0)
        np.testing.assert_allclose(nu[:, active], 0.999, rtol=1e-12)  # the average of ones, and a zero gradient
        assert np.all(np.asarray(nu)[:, ~active] == 0)


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_alternating_reaches_a_low_rank_optimum(x64, integrator):
    """As whole steps alone do, where one in five turns the bases."""
    loss, _, kernel, optimum = heavy_ball_problem()
    tx = tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=1e-7, integrator=integrator, max_rank=kernel.core.shape)
    whole = tdlrt_step(lambda params: loss(params), tx, donate=False)
    between = tdlrt_step(lambda params: loss(params), tx, cores_only=True, donate=False)
    params, state = kernel, tx.init(kernel)

    def distance():
        return float(jnp.linalg.norm(to_dense(params) - optimum) / jnp.linalg.norm(optimum))

    start = distance()
    for number in range(600):
        params, state, info = (between if number % 5 else whole)(params, state)
    assert describe_status(info.status) == []
    assert distance() < 1e-6 < start


def test_a_gradient_that_is_not_finite_changes_nothing():
    params, images, labels = network()
    tx = momentum()
    step, state = tdlrt_step(loss_fn, tx, cores_only=True, donate=False), tx.init(params)
    after, after_state, info = step(params, state, images.at[0].set(jnp.nan), labels)
    assert int(info.status) == NONFINITE and int(info.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, after, params)
    jax.tree.map(np.testing.assert_array_equal, after_state.inner, state.inner)


def test_micro_batches_model_state_and_aux(x64):
    params, images, labels = network(dtype=jnp.float64)
    statistics = {"mean": jnp.zeros(4), "count": jnp.zeros((), jnp.int32)}
    tx = momentum()
    options = {"has_aux": True, "has_state": True, "cores_only": True, "donate": False}
    whole = tdlrt_step(with_statistics, tx, **options)
    parts = tdlrt_step(with_statistics, tx, accumulate=4, **options)
    one, _, moved, info = whole(params, tx.init(params), statistics, images, labels)
    two, _, moved_four_times, stacked = parts(params, tx.init(params), statistics, images, labels)
    np.testing.assert_allclose(one["conv"].core, two["conv"].core, atol=1e-13)
    assert int(moved["count"]) == 1 and int(moved_four_times["count"]) == 4
    assert info.aux.shape == (16, 4) and stacked.aux.shape == (4, 4, 4)


def test_within_a_partition():
    params, images, labels = network()
    labels_of = {"conv": "kernels", "head": {"kernel": "kernels", "bias": "others"}}
    tx = optax.partition({"kernels": momentum(), "others": optax.adam(0.1)}, labels_of)
    whole, between = tdlrt_step(loss_fn, tx, donate=False), tdlrt_step(loss_fn, tx, cores_only=True, donate=False)
    params, state, _ = whole(params, tx.init(params), images, labels)
    after, _, info = between(params, state, images, labels)
    assert describe_status(info.status) == []
    jax.tree.map(np.testing.assert_array_equal, after["conv"].factors, params["conv"].factors)
    assert np.any(np.asarray(after["conv"].core) != np.asarray(params["conv"].core))
    assert np.any(np.asarray(after["head"]["bias"]) != np.asarray(params["head"]["bias"]))


def test_a_budget_is_reached():
    params, images, labels = network()
    tx = tdlrt(optax.sgd(0.05), tolerance=Budget(0.6, steps=20, every=5))
    whole, between = tdlrt_step(loss_fn, tx), tdlrt_step(loss_fn, tx, cores_only=True)
    state = tx.init(params)
    for number in range(30):
        params, state, _ = (between if number % 5 else whole)(params, state, images, labels)
    stored = sum(
        np.prod([int(r) for r in rank]) + sum(n * int(r) for n, r in zip(shape, rank))
        for rank, shape in zip(state.rank.values(), ((3, 3, 2, 6), (6, 4)))
    )
    assert stored <= 0.4 * (3 * 3 * 2 * 6 + 6 * 4)


def test_cores_of_sixteen_bits_keep_their_dtype():
    params, images, labels = network()
    params["conv"] = params["conv"]._replace(core=params["conv"].core.astype(jnp.bfloat16))
    tx = momentum()
    after, state, info = tdlrt_step(loss_fn, tx, cores_only=True, donate=False)(params, tx.init(params), images, labels)
    assert after["conv"].core.dtype == jnp.bfloat16 and describe_status(info.status) == []
    assert state.inner[0].trace["conv"].core.dtype == jnp.float32


def test_kernels_that_are_none_are_named():
    params, images, labels = network()
    params["conv"] = params["conv"]._replace(factors=params["conv"].factors[:3])
    tx = momentum()
    with pytest.raises(ValueError, match="'conv'"):
        tdlrt_step(loss_fn, tx, cores_only=True)(params, tx.init(network()[0]), images, labels)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.conv = TuckerConv(2, 6, (3, 3), rank=3, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.head = TuckerLinear(6, 4, rank=2, rngs=rngs)

    def __call__(self, images):
        return self.head(nnx.relu(self.norm(self.conv(images))).mean((1, 2)))


def test_of_an_nnx_model():
    """Beside whole steps, with statistics that move once a step."""
    _, images, labels = network()
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tdlrt_jax.nn.tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.1), wrt=nnx.Param)

    def loss(model, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    whole, between = tdlrt_jax.nn.tdlrt_step(loss), tdlrt_jax.nn.tdlrt_step(loss, cores_only=True)
    first = whole(model, optimizer, images, labels)
    kernel, mean = model.conv.kernel.get_value(), jnp.array(model.norm.mean.get_value())
    value = loss(nnx.clone(model), images, labels)
    info = between(model, optimizer, images, labels)
    np.testing.assert_allclose(info.loss, value, rtol=1e-6)
    after = model.conv.kernel.get_value()
    jax.tree.map(np.testing.assert_array_equal, after.factors, kernel.factors)
    assert np.any(np.asarray(after.core) != np.asarray(kernel.core))
    assert np.any(np.asarray(model.norm.mean.get_value()) != np.asarray(mean))
    for _ in range(5):
        info = between(model, optimizer, images, labels)
    assert float(info.loss) < float(first.loss) and int(info.status) == 0
