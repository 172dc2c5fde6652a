"""Batches: every image once an epoch, random choices keyed, augmentation against NumPy, all test images counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.options import OptimizerConfig, TdlrtConfig
from experiments.run import batches
from experiments.run.build import build_optimizer
from experiments.run.data import Images
from experiments.run.programs import build_programs

PLAIN = batches.Transform(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
AUGMENTED = PLAIN._replace(pad=4, flip=True)


@pytest.fixture
def images(rng):
    return batches.to_device(Images(rng.integers(0, 256, (50, 9, 7, 3), np.uint8), np.arange(50, dtype=np.int32)))


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (10, 10), (11, 10), (299, 64), (300, 7)])
def test_an_epoch_takes_images_at_most_once(count, batch_size):
    order = np.asarray(batches.epoch_order(3, 2, count, batch_size))
    assert order.shape == (count // batch_size, batch_size)
    assert len(np.unique(order)) == order.size and order.min() >= 0 and order.max() < count


def test_order_depends_on_seed_and_epoch_alone():
    order = batches.epoch_order(0, 0, 100, 10)
    np.testing.assert_array_equal(order, batches.epoch_order(0, 0, 100, 10))
    np.testing.assert_array_equal(order, jax.jit(lambda epoch: batches.epoch_order(0, epoch, 100, 10))(0))
    assert not np.array_equal(order, batches.epoch_order(0, 1, 100, 10))
    assert not np.array_equal(order, batches.epoch_order(1, 0, 100, 10))


def test_left_over_images_differ_between_epochs():
    left_over = [set(range(25)) - set(np.asarray(batches.epoch_order(0, epoch, 25, 10)).ravel()) for epoch in range(4)]
    assert all(len(some) == 5 for some in left_over) and len(set.union(*left_over)) > 5


def test_standardize_is_the_textbook_formula(images):
    expected = (np.asarray(images.images, np.float64) / 255 - PLAIN.mean) / PLAIN.std
    result = batches.standardize(images.images, PLAIN)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=2e-6)


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_random_crop_is_a_shift_of_the_padded_image(images, pad):
    key = jax.random.key(5)
    cropped = np.asarray(batches.random_crop(key, images.images, pad))
    padded = np.pad(np.asarray(images.images), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    shifts = np.asarray(jax.random.randint(key, (2, 50, 1), 0, 2 * pad + 1))[:, :, 0]
    for image, (down, right) in enumerate(shifts.T):
        np.testing.assert_array_equal(cropped[image], padded[image, down : down + 9, right : right + 7])
    assert cropped.dtype == np.uint8


def test_random_crops_reach_every_shift():
    centre = np.zeros((2000, 3, 3, 1), np.uint8)
    centre[:, 1, 1] = 1
    cropped = np.asarray(batches.random_crop(jax.random.key(0), jnp.asarray(centre), 1))
    seen = cropped.reshape(2000, 9).mean(axis=0)
    np.testing.assert_allclose(seen, 1 / 9, atol=0.02)


def test_random_flip_mirrors_half_of_the_images(images):
    flipped = np.asarray(batches.random_flip(jax.random.key(2), images.images))
    original = np.asarray(images.images)
    mirrored = np.array([np.array_equal(f, o[:, ::-1]) for f, o in zip(flipped, original)])
    kept = np.array([np.array_equal(f, o) for f, o in zip(flipped, original)])
    assert np.all(mirrored ^ kept) and 10 < mirrored.sum() < 40


def test_batch_without_augmentation_is_what_the_order_says(images):
    order = batches.epoch_order(0, 0, 50, 8)
    x, y = jax.jit(lambda step: batches.training_batch(images, order, PLAIN, 0, 0, step))(2)
    np.testing.assert_array_equal(y, order[2])
    np.testing.assert_allclose(x, batches.standardize(images.images[order[2]], PLAIN), atol=1e-6)


def test_augmentation_is_keyed_by_seed_epoch_and_step(images):
    order = jnp.tile(jnp.arange(8), (3, 1))  # the same images in every step

    @jax.jit
    def batch(seed, epoch, step):
        return batches.training_batch(images, order, AUGMENTED, seed, epoch, step)[0]

    first = batch(0, 0, 0)
    np.testing.assert_array_equal(first, batch(0, 0, 0))
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not np.array_equal(first, batch(*other)), other


def test_augmented_batch_is_crop_then_flip_then_standardization(images):
    order = batches.epoch_order(7, 2, 50, 8)
    x, y = batches.training_batch(images, order, AUGMENTED, 7, 2, 1)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 1), 2), 1)
    crop, flip = jax.random.split(key)
    down, right = np.asarray(jax.random.randint(crop, (2, 8, 1), 0, 9))[:, :, 0]
    mirror = np.asarray(jax.random.bernoulli(flip, 0.5, (8, 1, 1, 1))).ravel()
    padded = np.pad(np.asarray(images.images), ((0, 0), (4, 4), (4, 4), (0, 0)))
    for row, index in enumerate(np.asarray(order[1])):
        expected = padded[index, down[row] : down[row] + 9, right[row] : right[row] + 7]
        expected = expected[:, ::-1] if mirror[row] else expected
        expected = (expected / 255 - np.array(PLAIN.mean)) / np.array(PLAIN.std)
        np.testing.assert_allclose(x[row], expected, atol=2e-6)
        assert y[row] == index


@pytest.mark.parametrize(("count", "batch_size"), [(1, 500), (7, 7), (50, 7), (49, 7), (48, 7), (1000, 500)])
def test_evaluation_visits_every_image_once(count, batch_size):
    indices, weights = batches.evaluation_batches(count, batch_size)
    assert indices.shape == weights.shape and weights.sum() == count
    np.testing.assert_array_equal(np.sort(indices[weights > 0]), np.arange(count))


class Scores(nnx.Module):
    """A classifier whose answers are easy to work out: a linear map of the pixels."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(9 * 7 * 3, 50, rngs=rngs)

    def __call__(self, x):
        return self.linear(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("evaluation_batch", [7, 50, 500])
def test_evaluation_is_exact_on_a_last_batch_that_is_not_full(images, evaluation_batch):
    model = Scores(nnx.Rngs(0))
    tx = build_optimizer(OptimizerConfig(), TdlrtConfig(), 1)
    programs, state = build_programs(model, tx, PLAIN, seed=0, evaluation_batch=evaluation_batch)
    loss, accuracy = programs.evaluate(state, images)

    pixels = (np.asarray(images.images, np.float64) / 255 - PLAIN.mean) / PLAIN.std
    logits = pixels.reshape(50, -1) @ np.asarray(model.linear.kernel[...], np.float64)
    labels = np.arange(50)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[labels, labels]
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    assert accuracy == np.mean(logits.argmax(axis=1) == labels)
