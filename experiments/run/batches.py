"""Batches made on the device, inside the jitted step: shuffling, standardization, random crops and flips.

Every random choice is a function of (seed, epoch, step) alone. So a run continues exactly where it was stopped, and two
methods with one seed see the same images.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.run.data import Dataset, Images

__all__ = [
    "DeviceImages",
    "Transform",
    "epoch_order",
    "evaluation_batches",
    "random_crop",
    "random_flip",
    "standardize",
    "training_batch",
    "transform_of",
]

_ORDER, _AUGMENT = 0, 1


class DeviceImages(NamedTuple):
    """Labelled images on the device."""

    images: Array  # uint8 (N, height, width, channels)
    labels: Array  # int32 (N,)


class Transform(NamedTuple):
    """What happens to a batch on its way to the network. Mean and deviation travel as arrays, the rest is static."""

    mean: tuple[float, ...]  # per channel, of images scaled to [0, 1]
    std: tuple[float, ...]
    pad: int = 0  # random crops of training images reach so far into a black border
    flip: bool = False  # random flips of training images


def transform_of(dataset: Dataset, *, crop: bool, flip: bool) -> Transform:
    """The transform of a data set: standardized by its training images; crops by up to 4 pixels."""
    return Transform(tuple(map(float, dataset.mean)), tuple(map(float, dataset.std)), 4 if crop else 0, flip)


def to_device(data: Images) -> DeviceImages:
    """Images and labels as arrays on the default device; images stay uint8."""
    return DeviceImages(jnp.asarray(data.images), jnp.asarray(data.labels))


def standardize(images: Array, transform: Transform) -> Array:
    """``(x / 255 - mean) / std`` per channel: uint8 images to float32 ones."""
    scale = 1 / (255 * np.asarray(transform.std, np.float32))
    shift = np.asarray(transform.mean, np.float32) / np.asarray(transform.std, np.float32)
    return images.astype(jnp.float32) * scale - shift


def random_crop(key: Array, images: Array, pad: int) -> Array:
    """Each image shifted by up to ``pad`` pixels in both directions; what comes in from outside is black.

    Args:
      key: typed PRNG key.
      images: ``(N, height, width, channels)``.
      pad: pixels.
    """
    count, height, width, _ = images.shape
    shift = jax.random.randint(key, (2, count, 1), 0, 2 * pad + 1)
    rows = shift[0] + jnp.arange(height)
    columns = shift[1] + jnp.arange(width)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return padded[jnp.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def random_flip(key: Array, images: Array) -> Array:
    """Each image mirrored left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def epoch_order(seed: int, epoch: int | Array, count: int, batch_size: int) -> Array:
    """The batches of an epoch as rows of indices, int32 ``(count // batch_size, batch_size)``.

    A permutation of all images; the few left over by the last whole batch are dropped, others in every epoch.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _ORDER), epoch)
    steps = count // batch_size
    return jax.random.permutation(key, count)[: steps * batch_size].reshape(steps, batch_size)


def training_batch(
    data: DeviceImages, order: Array, transform: Transform, seed: int, epoch: int | Array, step: int | Array
) -> tuple[Array, Array]:
    """Batch ``step`` of ``epoch``: float32 images and int32 labels. Meant to run inside the jitted step.

    Args:
      data: the training images.
      order: of :func:`epoch_order`, for this epoch.
      transform: standardization and augmentation.
      seed, epoch, step: what the random crops and flips depend on.
    """
    indices = order[step]
    images = data.images[indices]
    key = jax.random.fold_in(jax.random.key(seed), _AUGMENT)
    crop, flip = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, epoch), step))
    if transform.pad:
        images = random_crop(crop, images, transform.pad)
    if transform.flip:
        images = random_flip(flip, images)
    return standardize(images, transform), data.labels[indices]


def evaluation_batches(count: int, batch_size: int, multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights that visit every one of ``count`` images exactly once in batches of equal size.

    Args:
      count: of all images.
      batch_size: images at a time, or as many as there are.
      multiple: rounded up to a multiple of this, the devices that share a batch.

    Returns:
      int32 indices and float32 weights, both ``(batches, batch_size)``; the last batch is filled up with weight zero.
    """
    batch_size = -(-min(batch_size, count) // multiple) * multiple
    batches = -(-count // batch_size)
    positions = np.arange(batches * batch_size)
    indices = np.minimum(positions, count - 1).astype(np.int32)
    weights = (positions < count).astype(np.float32)
    return indices.reshape(batches, batch_size), weights.reshape(batches, batch_size)
