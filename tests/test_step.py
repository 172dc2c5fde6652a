import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import describe_status, tdlrt, tdlrt_step, to_dense, tucker_conv, tucker_linear
from tdlrt_jax.status import NONFINITE
from tests.helpers import orthonormality, random_kernel


def network(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    params = {
        "conv": random_kernel(rng, (3, 3, 2, 6), (3, 3, 2, 3), (3, 3, 2, 6), dtype),
        "head": {"kernel": random_kernel(rng, (6, 4), (2, 2), 4, dtype), "bias": jnp.zeros(4, dtype)},
    }
    images = jnp.asarray(rng.normal(size=(16, 6, 6, 2)), dtype)
    return params, images, jnp.arange(16) % 4


def logits_of(params, images):
    hidden = jax.nn.relu(tucker_conv(images, params["conv"]))
    return tucker_linear(hidden.mean((1, 2)), params["head"]["kernel"]) + params["head"]["bias"]


def loss_fn(params, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, images), labels).mean()


def with_statistics(params, statistics, images, labels):
    """A running mean as of BatchNorm, and the logits beside the loss."""
    logits = logits_of(params, images)
    statistics = {"mean": 0.9 * statistics["mean"] + 0.1 * logits.mean(0), "count": statistics["count"] + 1}
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (statistics, logits)


def momentum(integrator="bug", tolerance=0.05):
    return tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=tolerance, integrator=integrator)


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_trains_compiles_once_and_reports(integrator):
    params, images, labels = network()
    tx = momentum(integrator)
    step, state, losses = tdlrt_step(loss_fn, tx), tx.init(params), []
    for _ in range(15):
        params, state, info = step(params, state, images, labels)
        losses.append(float(info.loss))
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1
    assert info.aux is None and describe_status(int(info.status)) == []
    assert set(info.rank) == set(info.truncation_error) == {"conv", "head/kernel"}
    assert info.rank["conv"].shape == (4,) and info.rank["conv"].dtype == jnp.int32
    assert float(info.truncation_error["conv"]) <= 0.05
    assert float(info.cumulative_truncation_error["conv"]) >= float(info.truncation_error["conv"])


def test_donation_frees_the_old_buffers():
    params, images, labels = network()
    tx = momentum("parallel")
    state = tx.init(params)
    after, _, _ = tdlrt_step(loss_fn, tx)(params, state, images, labels)
    assert params["conv"].core.is_deleted() and not after["conv"].core.is_deleted()
    params, _, _ = network()
    tdlrt_step(loss_fn, tx, donate=False)(params, tx.init(params), images, labels)
    assert not params["conv"].core.is_deleted()


def test_model_state_moves_once_a_step_from_the_first_evaluation():
    params, images, labels = network()
    statistics = {"mean": jnp.zeros(4), "count": jnp.zeros((), jnp.int32)}
    (_, (expected, logits)) = with_statistics(params, statistics, images, labels)
    tx = momentum()  # two evaluations
    step = tdlrt_step(with_statistics, tx, has_aux=True, has_state=True, donate=False)
    _, _, moved, info = step(params, tx.init(params), statistics, images, labels)
    assert int(moved["count"]) == 1
    np.testing.assert_allclose(moved["mean"], expected["mean"], atol=1e-6)
    np.testing.assert_allclose(info.aux, logits, atol=1e-5)


@pytest.mark.parametrize("integrator", ["bug", "parallel", "fixed_rank"])
def test_accumulated_micro_batches_are_the_full_batch(x64, integrator):
    """Also of the second gradient, which optax.MultiSteps would take from the last micro-batch."""
    params, images, labels = network(dtype=jnp.float64)
    tx = momentum(integrator, 0.0 if integrator == "fixed_rank" else 0.05)
    whole = tdlrt_step(loss_fn, tx, donate=False)
    parts = tdlrt_step(loss_fn, tx, accumulate=4, donate=False)
    one, state_one = params, tx.init(params)
    two, state_two = params, tx.init(params)
    for _ in range(3):
        one, state_one, info_one = whole(one, state_one, images, labels)
        two, state_two, info_two = parts(two, state_two, images, labels)
    np.testing.assert_allclose(info_one.loss, info_two.loss, rtol=1e-12)
    np.testing.assert_allclose(to_dense(one["conv"]), to_dense(two["conv"]), atol=1e-11)


def test_accumulation_threads_the_model_state_and_stacks_aux():
    params, images, labels = network()
    statistics = {"mean": jnp.zeros(4), "count": jnp.zeros((), jnp.int32)}
    tx = momentum("parallel")
    step = tdlrt_step(with_statistics, tx, has_aux=True, has_state=True, accumulate=4, donate=False)
    _, _, moved, info = step(params, tx.init(params), statistics, images, labels)
    assert int(moved["count"]) == 4 and info.aux.shape == (4, 4, 4)


def test_accumulation_explains_a_batch_that_it_does_not_divide():
    params, images, labels = network()
    tx = momentum("parallel")
    with pytest.raises(ValueError, match=r"accumulate=3 does not divide .*\(16, 6, 6, 2\)"):
        tdlrt_step(loss_fn, tx, accumulate=3)(params, tx.init(params), images, labels)
    with pytest.raises(ValueError, match="accumulate=0"):
        tdlrt_step(loss_fn, tx, accumulate=0)


def test_under_scan(x64):
    params, images, labels = network(dtype=jnp.float64)
    tx = momentum("parallel")
    step = tdlrt_step(loss_fn, tx, donate=False)

    def body(carry, _):
        params, state, info = step(*carry, images, labels)
        return (params, state), info.loss

    (scanned, _), losses = jax.jit(lambda carry: jax.lax.scan(body, carry, None, length=4))((params, tx.init(params)))
    state = tx.init(params)
    for k in range(4):
        params, state, info = step(params, state, images, labels)
        np.testing.assert_allclose(losses[k], info.loss, rtol=1e-10)
    np.testing.assert_allclose(to_dense(scanned["conv"]), to_dense(params["conv"]), atol=1e-10)


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_under_vmap_over_seeds(x64, integrator):
    runs = [network(seed, jnp.float64) for seed in (0, 1)]
    images, labels = runs[0][1:]
    tx = momentum(integrator)
    step = tdlrt_step(loss_fn, tx, donate=False)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[params for params, _, _ in runs])
    together, states = stacked, jax.vmap(tx.init)(stacked)
    together_step = jax.jit(jax.vmap(step, in_axes=(0, 0, None, None)))
    for _ in range(3):
        together, states, info = together_step(together, states, images, labels)
    for seed, (params, _, _) in enumerate(runs):
        state = tx.init(params)
        for _ in range(3):
            params, state, alone = step(params, state, images, labels)
        np.testing.assert_allclose(info.loss[seed], alone.loss, rtol=1e-9)
        assert info.rank["conv"][seed].tolist() == alone.rank["conv"].tolist()
        core = jax.tree.map(lambda leaf, s=seed: leaf[s], together["conv"])
        np.testing.assert_allclose(to_dense(core), to_dense(params["conv"]), atol=1e-9)


def test_a_bad_batch_leaves_everything_as_it_was():
    params, images, labels = network()
    statistics = {"mean": jnp.zeros(4), "count": jnp.zeros((), jnp.int32)}
    tx = momentum()
    step = tdlrt_step(with_statistics, tx, has_aux=True, has_state=True, donate=False)
    state = tx.init(params)
    after, after_state, moved, info = step(params, state, statistics, images.at[0, 0, 0, 0].set(jnp.nan), labels)
    assert int(info.status) == NONFINITE and np.isnan(info.loss)
    same = functools.partial(jax.tree.map, lambda a, b: bool((a == b).all()))
    assert jax.tree.all(same(after, params)) and jax.tree.all(same(moved, statistics))
    assert jax.tree.all(same(after_state.inner, state.inner))


def test_an_optimizer_without_tdlrt_is_explained():
    params, images, labels = network()
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="holds no TdlrtState"):
        tdlrt_step(loss_fn, tx, donate=False)(params, tx.init(params), images, labels)


def test_bug_costs_at_most_two_passes_and_parallel_one():
    """Convolutions in the compiled step: bug takes its second gradient for the cores alone."""
    params, images, labels = network()
    counts = {}
    for integrator in ("parallel", "bug"):
        tx = momentum(integrator)
        lowered = tdlrt_step(loss_fn, tx, donate=False).lower(params, tx.init(params), images, labels)
        counts[integrator] = lowered.as_text().count("stablehlo.convolution")
    assert 0 < counts["parallel"] < counts["bug"] <= 2 * counts["parallel"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts LAPACK calls")
@pytest.mark.parametrize(("inner", "lifts"), [(optax.sgd(0.1), 1), (optax.sgd(0.1, momentum=0.9), 2)])
def test_a_kernel_is_factorized_once_at_each_of_its_points(inner, lifts):
    """The gradient, the integrator and the report share the frame; only moments need the next one as well."""
    kernel = random_kernel(np.random.default_rng(0), (3, 4, 5), (2, 3, 3), dtype=jnp.float32)
    tx = tdlrt(inner, tolerance=0.1)
    step = tdlrt_step(lambda kernel: jnp.sum(jnp.sin(to_dense(kernel))), tx, donate=False)
    compiled = step.lower(kernel, tx.init(kernel)).compile().as_text()
    assert compiled.count('custom_call_target="lapack_sgeqrf_ffi"') == 3 * lifts


@pytest.mark.parametrize("integrator", ["bug", "parallel"])
def test_ten_thousand_steps_keep_the_factors_orthonormal_in_float32(integrator):
    rng = np.random.default_rng(0)
    kernel = random_kernel(rng, (6, 8, 7), (3, 3, 3), (5, 5, 5), jnp.float32)
    target = jnp.asarray(rng.normal(size=(6, 8, 7)), jnp.float32)
    tx = tdlrt(optax.sgd(0.05, momentum=0.5), tolerance=0.1, integrator=integrator)

    def noisy_loss(kernel, key):
        return 0.5 * jnp.sum((to_dense(kernel) - target - 0.3 * jax.random.normal(key, target.shape)) ** 2)

    step = tdlrt_step(noisy_loss, tx, donate=False)

    @jax.jit
    def run(kernel, state):
        def body(carry, key):
            kernel, state, info = step(*carry, key)
            return (kernel, state), info.loss

        return jax.lax.scan(body, (kernel, state), jax.random.split(jax.random.key(0), 10_000))

    (kernel, state), losses = run(kernel, tx.init(kernel))
    assert orthonormality(kernel) < 1e-5
    assert int(state.step) == 10_000 and losses[-1] < losses[0]
