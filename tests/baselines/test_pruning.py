"""Saliencies against finite differences and explicit Hessians; masks that stay exact; rewinding that is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from tdlrt_jax.baselines import (
    apply_masks,
    density_of,
    grasp_scores,
    iterative_magnitude_pruning,
    magnitude_scores,
    masks_from_scores,
    pruned,
    snip_scores,
)
from tdlrt_jax.conv import tucker_conv


@pytest.fixture
def problem(x64):
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "conv": {"kernel": jax.random.normal(keys[0], (2, 2, 2, 3)), "bias": 0.1 * jnp.ones(3)},
        "out": {"kernel": jax.random.normal(keys[1], (3, 4)), "bias": jnp.zeros(4)},
    }
    x, y = jax.random.normal(keys[2], (5, 4, 4, 2)), jax.random.randint(keys[3], (5,), 0, 4)

    def loss_fn(params, x, y):
        z = jnp.tanh(tucker_conv(x, params["conv"]["kernel"]) + params["conv"]["bias"]).mean(axis=(1, 2))
        logits = z @ params["out"]["kernel"] + params["out"]["bias"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    return loss_fn, params, (x, y)


def kernels(params):
    return {name: {"kernel": layer["kernel"]} for name, layer in params.items()}


def with_kernels(params, weights):
    return {name: {**layer, **weights[name]} for name, layer in params.items()}


def test_snip_is_the_effect_of_switching_a_weight_off_infinitesimally(problem):
    """``dL/dc`` at ``c = 1`` for ``L(c ⊙ θ)``, by central differences in every single weight."""
    loss_fn, params, batch = problem
    flat, unravel = ravel_pytree(kernels(params))
    expected = []
    for j in range(flat.size):
        up, down = (loss_fn(with_kernels(params, unravel(flat.at[j].mul(1 + e))), *batch) for e in (1e-6, -1e-6))
        expected.append(abs(float(up - down)) / 2e-6)
    scores = snip_scores(loss_fn, params, *batch)
    assert scores["conv"]["bias"] is None and scores["out"]["bias"] is None
    found = ravel_pytree(kernels(scores))[0]
    np.testing.assert_allclose(found, np.array(expected) / sum(expected), rtol=1e-5, atol=1e-9)


def test_grasp_is_the_weight_times_an_explicit_hessian_times_the_gradient(problem):
    loss_fn, params, batch = problem
    flat, unravel = ravel_pytree(kernels(params))

    def of(flat):
        return loss_fn(with_kernels(params, unravel(flat)), *batch)

    hessian, gradient = jax.hessian(of)(flat), jax.grad(of)(flat)
    scores = grasp_scores(loss_fn, params, *batch)
    np.testing.assert_allclose(ravel_pytree(kernels(scores))[0], flat * (hessian @ gradient), rtol=1e-9, atol=1e-12)


def test_grasp_predicts_the_change_of_the_gradients_norm(problem):
    """To first order, without a weight's small part ``e`` the squared norm of the gradient falls by ``2 e`` times its score."""
    loss_fn, params, batch = problem
    flat, unravel = ravel_pytree(kernels(params))

    def norm(flat):
        return jnp.sum(jax.grad(lambda w: loss_fn(with_kernels(params, unravel(w)), *batch))(flat) ** 2)

    scores = ravel_pytree(kernels(grasp_scores(loss_fn, params, *batch)))[0]
    e = 1e-6
    changes = np.array([float(norm(flat) - norm(flat.at[j].mul(1 - e))) for j in range(flat.size)])
    np.testing.assert_allclose(changes / (2 * e), scores, atol=1e-5 * float(jnp.abs(scores).max()) + 1e-9)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 1e-9])
def test_masks_keep_exactly_the_number_asked_for_the_highest_first(density, rng):
    scores = {"a": jnp.asarray(rng.normal(size=(4, 5))), "b": None, "c": jnp.zeros((3, 3))}  # ties among them
    masks = masks_from_scores(scores, density)
    kept = max(1, round(density * 29))
    assert masks["b"] is None and sum(int(m.sum()) for m in jax.tree.leaves(masks)) == kept
    flat = np.concatenate([np.ravel(scores["a"]), np.ravel(scores["c"])])
    flags = np.concatenate([np.ravel(masks["a"]), np.ravel(masks["c"])])
    assert flat[flags].min() >= np.sort(flat)[::-1][kept - 1]
    assert density_of(masks) == pytest.approx(kept / 29)


def test_masks_within_masks_and_impossible_densities(rng):
    scores = {"a": jnp.asarray(rng.normal(size=(4, 5)))}
    first = masks_from_scores(scores, 0.5)
    second = masks_from_scores({"a": -scores["a"]}, 0.25, within=first)
    assert not (second["a"] & ~first["a"]).any() and int(second["a"].sum()) == 5
    with pytest.raises(
        ValueError, match=r"density=0\.6 is above that of the masks to stay within: expected at most 0\.5"
    ):
        masks_from_scores(scores, 0.6, within=first)
    with pytest.raises(ValueError, match="density=0: expected the part of the weights to keep"):
        masks_from_scores(scores, 0)


@pytest.mark.parametrize(
    "inner",
    [
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.adamw(0.1, weight_decay=0.1),
        optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1)),
    ],
    ids=["momentum", "adamw", "noise"],
)
def test_pruned_weights_stay_exactly_zero_and_the_others_move(problem, inner):
    loss_fn, params, batch = problem
    masks = masks_from_scores(snip_scores(loss_fn, params, *batch), 0.3)
    tx = pruned(inner, masks)
    current = apply_masks(params, masks)
    state = tx.init(current)
    step = jax.jit(lambda params, state: tx.update(jax.grad(loss_fn)(params, *batch), state, params))
    for _ in range(5):
        updates, state = step(current, state)
        current = optax.apply_updates(current, updates)
    for name in ("conv", "out"):
        weights, mask = np.asarray(current[name]["kernel"]), np.asarray(masks[name]["kernel"])
        assert (weights[~mask] == 0).all() and (weights[mask] != np.asarray(params[name]["kernel"])[mask]).all()
        assert not np.array_equal(current[name]["bias"], params[name]["bias"])


def test_norms_are_those_of_the_pruned_network():
    params, masks = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([True, False])}
    tx = pruned(optax.clip_by_global_norm(1.0), masks)
    updates, _ = tx.update({"w": jnp.array([0.5, 100.0])}, tx.init(params), params)
    assert updates["w"].tolist() == [0.5, 0.0]


def test_iterative_pruning_rewinds_exactly_and_removes_the_same_part_in_every_round(problem):
    loss_fn, params, batch = problem
    seen = []

    def train(round_):
        seen.append(round_)
        tx = pruned(optax.sgd(0.5), round_.masks)
        current, state = round_.params, tx.init(round_.params)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss_fn)(current, *batch), state, current)
            current = optax.apply_updates(current, updates)
        seen.append(current)
        return current

    rounds = list(iterative_magnitude_pruning(train, params, density=0.125, rounds=3))
    assert [r.density for r in rounds] == [1.0, pytest.approx(18 / 36), pytest.approx(9 / 36), pytest.approx(4 / 36)]
    assert len(seen) == 6  # trained before each removal, not after the last
    for before, after, trained in zip(rounds, rounds[1:], seen[1::2]):
        for name in ("conv", "out"):
            mask, old = np.asarray(after.masks[name]["kernel"]), np.asarray(before.masks[name]["kernel"])
            start, now = np.asarray(params[name]["kernel"]), np.asarray(after.params[name]["kernel"])
            assert not (mask & ~old).any()
            assert np.array_equal(now, np.where(mask, start, 0))
            np.testing.assert_array_equal(after.params[name]["bias"], params[name]["bias"])
        scores, masks = kernels(magnitude_scores(trained)), kernels(after.masks)
        kept = ravel_pytree(masks)[0].astype(bool)
        magnitudes = np.asarray(ravel_pytree(scores)[0])
        alive = np.asarray(ravel_pytree(kernels(before.masks))[0]).astype(bool)
        assert magnitudes[kept].min() >= magnitudes[alive & ~kept].max()


def test_nothing_to_prune_and_no_rounds_are_refused(problem):
    loss_fn, params, batch = problem
    with pytest.raises(ValueError, match="prunable selects no leaf of params"):
        snip_scores(loss_fn, params, *batch, prunable=lambda path, leaf: False)
    with pytest.raises(ValueError, match="rounds=0 must be a number of removals, 1 or more"):
        next(iterative_magnitude_pruning(lambda r: r.params, params, density=0.5, rounds=0))


def test_scores_that_are_not_finite_are_named():
    """Sorted, a score that is no number would come after the weights that are pruned already, and bring them back."""
    within = {"a": jnp.array([True, True]), "b": jnp.array([False, False])}
    scores = {"a": jnp.array([jnp.nan, jnp.inf]), "b": jnp.array([9.0, 9.0])}
    with pytest.raises(
        ValueError, match=r"scores are not finite: 2 of 'a'\. Expected finite ones: lower the learning rate"
    ):
        masks_from_scores(scores, 0.25, within=within)
    with pytest.raises(ValueError, match="1 of 'w'"):
        masks_from_scores({"w": jnp.array([1.0, -jnp.inf])}, 0.5)
    masks = masks_from_scores({"a": jnp.array([1.0, 2.0]), "b": jnp.array([jnp.nan, 9.0])}, 0.25, within=within)
    assert masks["a"].tolist() == [False, True] and not any(masks["b"].tolist())


def test_a_step_may_donate_the_state():
    params, masks = {"w": jnp.ones(4)}, {"w": jnp.array([True, False, True, True])}
    tx = pruned(optax.sgd(0.1), masks)
    step = jax.jit(lambda params, state: tx.update(params, state, params), donate_argnums=1)
    step(params, tx.init(params))
    assert density_of(masks) == 0.75
    step(params, tx.init(params))
