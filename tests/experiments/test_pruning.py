"""What runs prune: the scores of the method, and for rounds of imp the weights that they start from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.config import from_json
from experiments.run import batches, data
from experiments.run.build import build_descent, build_model, kinds_of
from experiments.run.pruning import Pruning
from experiments.run.training import Training
from tdlrt_jax.baselines import apply_masks, density_of, grasp_scores, masks_from_scores, snip_scores
from tests.experiments.jobs import TINY, run


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", limit=96)


def job(dataset, **options):
    """Network, images and what prunes, as a run has them."""
    config = from_json({"dataset": "digits", "linear": False, "compression": 0.8, **options})
    model = build_model(config.model, dataset, 0)
    model.train()
    pruning = Pruning(config, kinds_of(model), build_descent(config.optimizer, 3))
    return config, model, pruning, batches.to_device(dataset.train)


def is_convolution(path, leaf):
    return leaf.ndim == 4


@pytest.mark.parametrize(("method", "other"), [("snip", "grasp"), ("grasp", "snip")])
def test_masks_are_those_of_the_methods_scores(digits, method, other):
    """On the first images of the first epoch; of GraSP with logits at its authors' temperature of 200."""
    config, model, pruning, images = job(digits, method=method, score_images=24)
    transform = batches.transform_of(digits, crop=True, flip=False)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    masks = pruning.optimizer(model, images, transform).init(params).masks
    first = batches.epoch_order(config.run.seed, 0, len(digits.train.labels), 24)[0]
    x = (digits.train.images[np.asarray(first)] / 255 - digits.mean) / digits.std
    labels = jnp.asarray(digits.train.labels[np.asarray(first)])

    def loss_fn(params, temperature):
        logits = nnx.merge(graphdef, params, rest, copy=True)(jnp.asarray(x, jnp.float32)) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    expected = {
        "snip": masks_from_scores(
            snip_scores(lambda params: loss_fn(params, 1.0), params, prunable=is_convolution), 0.2
        ),
        "grasp": masks_from_scores(
            grasp_scores(lambda params: loss_fn(params, 200.0), params, prunable=is_convolution), 0.2
        ),
    }
    differing = {
        name: sum(int(np.sum(np.asarray(a) != np.asarray(b))) for a, b in zip(*map(jax.tree.leaves, (masks, found))))
        for name, found in expected.items()
    }
    # Equal but for a few scores that are alike to rounding.
    assert differing[method] <= 0.002 * 25_500 < 0.05 * 25_500 < differing[other]


def test_a_round_starts_from_what_was_remembered_less_what_is_pruned(digits):
    """Averages of normalizations too, and with an optimizer that has seen nothing."""
    images = data.Images(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int32))
    dataset = data.Dataset("none", images, None, images, 10, np.zeros(3), np.ones(3), "none")
    _, model, pruning, train = job(dataset, method="imp", model="alexnet", width=1 / 16, rounds=2, momentum=0.9)
    transform = batches.transform_of(dataset, crop=False, flip=False)
    _, first, rest = nnx.split(model, nnx.Param, ...)
    tx = pruning.optimizer(model, train, transform)
    params, opt_state = first, tx.init(first)
    pruning.remember(params, rest)
    for _ in range(2):
        updates, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    params = jax.tree.map(lambda leaf: leaf * jnp.linspace(0.1, 2, leaf.size).reshape(leaf.shape), params)
    start, fresh, state = pruning.next_round(params, opt_state, 1)
    chex.assert_trees_all_equal(start, apply_masks(first, fresh.masks))
    chex.assert_trees_all_equal(state, rest)
    chex.assert_trees_all_equal(fresh.inner, tx.init(first).inner)
    assert density_of(fresh.masks) == pytest.approx(0.2**0.5, abs=1e-3)
    weights = [np.abs(np.asarray(leaf)).ravel() for leaf in jax.tree.leaves(params) if leaf.ndim == 4]
    masks = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(fresh.masks)]
    kept, cut = (np.concatenate([w[m == on] for w, m in zip(weights, masks)]) for on in (True, False))
    assert kept.min() >= cut.max(), "the largest of the trained weights stay"


def test_a_runs_rounds_start_from_the_epoch_rewound_to(tmp_path, monkeypatch):
    """What is saved where a round begins holds the weights of the epoch's end, or zeros."""
    saved, save = {}, Training._save

    def spy(self, *arguments, **options):
        saved.setdefault(self.epoch, jax.tree.map(np.array, nnx.as_pure(self.state.params)))
        return save(self, *arguments, **options)

    monkeypatch.setattr(Training, "_save", spy)
    options = ["--method", "imp", "--compression", "0.8", "--rounds", "2", "--rewind-epochs", "1", "--no-linear"]
    assert run(*TINY, *options, "--run-dir", tmp_path / "run") == 0
    for epoch, pruned in ((2, 1 - 0.2**0.5), (4, 0.8)):
        for name, layer in saved[epoch].items():
            found, first = layer["kernel"], saved[1][name]["kernel"]
            kept = found != 0 if name.startswith("conv") else np.ones_like(found, bool)
            np.testing.assert_array_equal(found, np.where(kept, first, 0))
            np.testing.assert_array_equal(layer["bias"], saved[1][name]["bias"])
        zeros = sum(int(np.sum(saved[epoch][name]["kernel"] == 0)) for name in ("conv1", "conv2"))
        assert zeros == pytest.approx(pruned * 25_500, abs=1)
    assert np.any(saved[3]["conv1"]["kernel"] != saved[2]["conv1"]["kernel"])
