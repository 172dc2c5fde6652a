"""Data sets: real images from tfds without TensorFlow, and handwritten digits that need no download.

A decoded tfds set is kept as one file of uint8 arrays in the user's cache directory: only the first run decodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from experiments.options import DatasetName

__all__ = ["DATASETS", "Dataset", "Images", "cache_directory", "load", "stratified_split"]

logger = logging.getLogger(__name__)

DATASETS: tuple[str, ...] = get_args(DatasetName)

_CLASSES = {"digits": 10, "mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100}
_DECODE = 1000  # images decoded at a time
_DIGITS_SIZE = 28


class Images(NamedTuple):
    """Labelled images as they are stored."""

    images: np.ndarray  # uint8 (N, height, width, channels)
    labels: np.ndarray  # int32 (N,)


class Dataset(NamedTuple):
    """A data set with the statistics of its training images."""

    name: str
    train: Images
    validation: Images | None
    test: Images
    classes: int
    mean: np.ndarray  # float32 (channels,), of the training images scaled to [0, 1]
    std: np.ndarray  # float32 (channels,)
    source: str  # where it was read from, in words


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    validation: float = 0.0,
    limit: int | None = None,
) -> Dataset:
    """Loads a data set into host memory.

    Args:
      name: ``"digits"`` (scikit-learn's, enlarged to 28x28), ``"mnist"``, ``"fashion_mnist"``, ``"cifar10"`` or
        ``"cifar100"``.
      data_dir: where tfds keeps prepared sets; default ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.
      cache_dir: where decoded sets are kept; default :func:`cache_directory`.
      validation: fraction of the training images set apart, equally from all classes; 0 for none.
      limit: keep only so many training, and so many test images (a quick look).

    Returns:
      A :class:`Dataset`. Mean and standard deviation are those of the training images alone.

    Raises:
      ValueError: for an unknown name, a fraction outside of [0, 1) or a limit under 1.
      FileNotFoundError: if the set is not prepared; the message says where it was looked for and what prepares it.

    Example:
      >>> digits = load("digits")
      >>> digits.train.images.shape, digits.test.images.shape
      ((1442, 28, 28, 1), (355, 28, 28, 1))
    """
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r} is unknown: expected one of {', '.join(DATASETS)}")
    if not 0 <= validation < 1:
        raise ValueError(f"validation={validation} must be a fraction in [0, 1)")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be a number of images, 1 or more")
    train, test, source = _digits() if name == "digits" else _prepared(name, data_dir, cache_dir)
    if limit is not None:
        train, test = _head(train, limit), _head(test, limit)
    held_out = None
    if validation:
        train, held_out = stratified_split(train, validation)
        if not len(held_out.labels) or not len(train.labels):
            raise ValueError(
                f"validation={validation} leaves a part of the split empty: change it or raise limit={limit}"
            )
    mean, std = _statistics(train.images)
    return Dataset(name, train, held_out, test, _CLASSES[name], mean, std, source)


def stratified_split(data: Images, fraction: float) -> tuple[Images, Images]:
    """Sets ``fraction`` of every class apart, evenly spread over the set; without randomness, so alike everywhere.

    Returns:
      The rest and the part set apart, both in the order of ``data``.
    """
    share = Fraction(fraction).limit_denominator(10_000)
    apart = np.zeros(len(data.labels), bool)
    for label in np.unique(data.labels):
        members = np.flatnonzero(data.labels == label)
        quota = [math.floor(share * count) for count in range(len(members) + 1)]
        apart[members] = np.diff(quota) > 0
    return _take(data, ~apart), _take(data, apart)


def cache_directory() -> Path:
    """The user's cache directory of this project: under ``$XDG_CACHE_HOME``, else ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tdlrt_jax"


def _take(data: Images, where: np.ndarray) -> Images:
    return Images(data.images[where], data.labels[where])


def _head(data: Images, count: int) -> Images:
    return Images(data.images[:count], data.labels[:count])


def _statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, exact: from the histogram of the 256 values."""
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 1e-12))
    return mean.astype(np.float32), std.astype(np.float32)


def _digits() -> tuple[Images, Images, str]:
    """scikit-learn's 1797 digits, 8x8 with 17 grey levels, enlarged for LeNet5; a fifth of each class is for testing."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    small = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    size = (_DIGITS_SIZE, _DIGITS_SIZE)
    large = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in small])
    train, test = stratified_split(Images(large[..., None], labels.astype(np.int32)), 0.2)
    return train, test, "scikit-learn's handwritten digits, enlarged to 28x28"


def _prepared(
    name: str, data_dir: str | os.PathLike[str] | None, cache_dir: str | os.PathLike[str] | None
) -> tuple[Images, Images, str]:
    """A set that tfds has prepared, from the cache of decoded arrays if that is sound."""
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()
    folder = _find_prepared(name, root)
    cache = (Path(cache_dir).expanduser() if cache_dir else cache_directory()) / f"{name}-{_fingerprint(folder)}.npz"
    source = f"tfds {name} {folder.name}{_compression(folder)}"
    parts = _read_cache(cache, name)
    if parts is None:
        parts = _decode(name, folder.name, root, "train"), _decode(name, folder.name, root, "test")
        _write_cache(cache, *parts)
    return *parts, source


def _find_prepared(name: str, root: Path) -> Path:
    """The folder of the newest version of a set under ``root`` that can be read without TensorFlow."""
    versions: dict[tuple[int, ...], Path] = {}
    formats: set[str] = set()
    for info in sorted((root / name).glob("*/dataset_info.json")):
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name):
            try:
                file_format = json.loads(info.read_text()).get("fileFormat", "tfrecord")
            except (OSError, ValueError) as error:
                raise ValueError(f"data set {name!r}: {info} cannot be read ({error}): prepare the set again") from None
            formats.add(file_format)
            if file_format == "array_record":
                versions[tuple(map(int, info.parent.name.split(".")))] = info.parent
    if versions:
        return versions[max(versions)]
    found = f"is there as {', '.join(sorted(formats))} only" if formats else "is not there"
    raise FileNotFoundError(
        f"data set {name!r} {found}: looked for {root / name}/VERSION/dataset_info.json with fileFormat array_record. "
        f"Name another directory with --data-dir or TFDS_DATA_DIR, or prepare the set there, which downloads it and needs "
        f"TensorFlow (reading it does not):\n"
        f"  pip install tensorflow\n"
        f"  python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{root}', "
        f"file_format='array_record').download_and_prepare()\"\n"
        f"Without any download: --dataset digits"
    )


def _compression(folder: Path) -> str:
    """Of images that are not the original pixels: by what they were compressed, for whoever compares accuracies."""
    try:
        image = json.loads((folder / "features.json").read_text())["featuresDict"]["features"]["image"]["image"]
        encoding = image.get("encodingFormat", "png")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # reading the images says what is wrong with the set
    return ", images compressed as JPEG" if encoding == "jpeg" else ""


def _fingerprint(folder: Path) -> str:
    """Tells copies of a set apart: its version, and a hash over its description and the sizes of its files."""
    digest = hashlib.sha256((folder / "dataset_info.json").read_bytes())
    for path in sorted(folder.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return f"{folder.name}-{digest.hexdigest()[:12]}"


def _decode(name: str, version: str, root: Path, split: str) -> Images:
    """Reads one split through ``tfds.data_source``, which neither needs nor imports TensorFlow."""
    with _quiet("absl"):
        import tensorflow_datasets as tfds

        # Never let tfds fetch anything by itself: the folder was found, and a typo must not start a download.
        source: Any = tfds.data_source(f"{name}:{version}", split=split, data_dir=str(root), download=False)
        images: list[np.ndarray] = []
        labels: list[int] = []
        for start in range(0, len(source), _DECODE):
            for example in source.__getitems__(range(start, min(start + _DECODE, len(source)))):
                images.append(example["image"])
                labels.append(int(example["label"]))
    return Images(np.stack(images), np.asarray(labels, np.int32))


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _read_cache(path: Path, name: str) -> tuple[Images, Images] | None:
    """The cached arrays; ``None`` if there are none or they are not what was written (zip members carry checksums)."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = tuple(
                Images(file[f"{split}_images"], file[f"{split}_labels"].astype(np.int32)) for split in ("train", "test")
            )
        for images, labels in parts:
            if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
                raise ValueError(f"arrays of shapes {images.shape} and {labels.shape}, dtype {images.dtype}")
            if labels.min() < 0 or labels.max() >= _CLASSES[name]:
                raise ValueError(f"labels from {labels.min()} to {labels.max()}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("the cache %s is damaged (%s): decoding the set again", path, error)
        return None
    return parts[0], parts[1]


def _write_cache(path: Path, train: Images, test: Images) -> None:
    """Writes beside the target and renames: a reader sees all or nothing. Without room or rights, says so and goes on."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", suffix=".npz", delete=False) as file:
            temporary = Path(file.name)
            arrays = {
                f"{split}_{field}": array
                for split, part in (("train", train), ("test", test))
                for field, array in (("images", part.images), ("labels", part.labels.astype(np.uint8)))
            }
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        logger.warning("the decoded set could not be cached in %s (%s): the next run decodes it again", path, error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
