"""Data sets: the embedded digits, tfds sets without TensorFlow, the cache of decoded arrays."""

import json
import shutil
import sys

import numpy as np
import pytest

from experiments.run import data


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def order_of(images):
    """Images of the shuffled storage order, sorted by content, for comparing sets."""
    return np.sort(images.reshape(len(images), -1).astype(np.int64) @ np.arange(images[0].size))


def test_digits_are_whole_and_stratified(digits):
    assert digits.train.images.shape[1:] == (28, 28, 1)
    assert digits.train.images.dtype == np.uint8 and digits.train.labels.dtype == np.int32
    assert len(digits.train.labels) + len(digits.test.labels) == 1797
    assert digits.train.images.max() == 255 and digits.train.images.min() == 0
    share = np.bincount(digits.test.labels) / (np.bincount(digits.train.labels) + np.bincount(digits.test.labels))
    np.testing.assert_allclose(share, 0.2, atol=0.006)


def test_digits_are_the_same_every_time(digits):
    again = data.load("digits")
    np.testing.assert_array_equal(again.train.images, digits.train.images)
    np.testing.assert_array_equal(again.test.labels, digits.test.labels)


def test_statistics_are_those_of_the_training_images(digits):
    scaled = digits.train.images.astype(np.float64) / 255
    np.testing.assert_allclose(digits.mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(digits.std, scaled.std(axis=(0, 1, 2)), rtol=1e-6)


def test_validation_is_taken_from_the_training_images(digits):
    split = data.load("digits", validation=0.1)
    assert len(split.train.labels) + len(split.validation.labels) == len(digits.train.labels)
    counts = np.bincount(split.validation.labels, minlength=10)
    np.testing.assert_allclose(counts, np.bincount(digits.train.labels) * 0.1, atol=1)
    np.testing.assert_array_equal(split.test.images, digits.test.images)
    together = np.concatenate([split.train.images, split.validation.images])
    np.testing.assert_array_equal(order_of(together), order_of(digits.train.images))
    assert not np.array_equal(split.mean, digits.mean), "statistics must not see the validation images"


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1 / 3, 0.5, 0.9])
def test_stratified_split_gives_every_class_its_share(rng, fraction):
    labels = rng.integers(0, 4, 200)
    images = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1)
    rest, apart = data.stratified_split(data.Images(images, labels), fraction)
    for label in range(4):
        assert np.sum(apart.labels == label) == int(np.sum(labels == label) * fraction + 1e-9)
    np.testing.assert_array_equal(np.sort(np.concatenate([rest.images, apart.images]).ravel()), np.arange(200))


def test_limit_keeps_the_first_images(digits):
    few = data.load("digits", limit=50)
    np.testing.assert_array_equal(few.train.images, digits.train.images[:50])
    assert len(few.test.labels) == 50


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "imagenet"}, "digits, mnist, fashion_mnist, cifar10, cifar100"),
        ({"name": "digits", "validation": 1.0}, "validation=1.0"),
        ({"name": "digits", "limit": 0}, "limit=0"),
        ({"name": "digits", "limit": 3, "validation": 0.1}, "leaves a part of the split empty"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        data.load(**options)


def test_prepared_set_is_read_without_tensorflow(tiny_tfds, tiny_images, tmp_path):
    loaded = data.load("mnist", data_dir=tiny_tfds, cache_dir=tmp_path)
    for part, split in ((loaded.train, "train"), (loaded.test, "test")):
        images, labels = tiny_images[split]
        np.testing.assert_array_equal(order_of(part.images), order_of(images))
        of_image = {image.tobytes(): label for image, label in zip(images, labels)}
        assert [of_image[image.tobytes()] for image in part.images] == part.labels.tolist()
    assert "tensorflow" not in sys.modules
    assert loaded.source == "tfds mnist 3.0.1"


def test_images_that_are_not_the_original_pixels_are_called_so(tiny_tfds, tmp_path):
    directory = tmp_path / "tfds"
    shutil.copytree(tiny_tfds, directory)
    (features,) = directory.glob("mnist/*/features.json")
    tree = json.loads(features.read_text())
    tree["featuresDict"]["features"]["image"]["image"]["encodingFormat"] = "jpeg"
    features.write_text(json.dumps(tree))
    assert (
        data.load("mnist", data_dir=directory, cache_dir=tmp_path).source
        == "tfds mnist 3.0.1, images compressed as JPEG"
    )


def test_environment_names_the_directory(tiny_tfds, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_tfds))
    assert len(data.load("mnist", cache_dir=tmp_path).train.labels) == 30


def test_second_load_reads_the_cache(tiny_tfds, tmp_path, monkeypatch):
    first = data.load("mnist", data_dir=tiny_tfds, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "one file, and nothing temporary left beside it"
    monkeypatch.setattr(data, "_decode", lambda *_: pytest.fail("decoded again"))
    second = data.load("mnist", data_dir=tiny_tfds, cache_dir=tmp_path)
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)
    assert second.test.labels.dtype == np.int32


def damage_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def damage_labels(path):
    with np.load(path) as file:
        arrays = dict(file)
    arrays["test_labels"] = arrays["test_labels"] + 10
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "damage",
    [
        damage_byte,
        damage_labels,
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(b""),
        lambda path: np.savez(path, train_images=np.zeros(3)),
    ],
    ids=["flipped byte", "impossible labels", "cut off", "empty", "other content"],
)
def test_damaged_cache_is_rebuilt(tiny_tfds, tmp_path, caplog, damage):
    first = data.load("mnist", data_dir=tiny_tfds, cache_dir=tmp_path)
    (cache,) = tmp_path.iterdir()
    sound = cache.read_bytes()
    damage(cache)
    second = data.load("mnist", data_dir=tiny_tfds, cache_dir=tmp_path)
    assert "damaged" in caplog.text
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert len(cache.read_bytes()) == len(sound)


def test_other_copy_has_its_own_cache(tiny_tfds, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_tfds / "mnist", copy / "mnist")
    info = copy / "mnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text() + "\n")
    for directory in (tiny_tfds, copy):
        data.load("mnist", data_dir=directory, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_without_a_writable_cache_it_goes_on(tiny_tfds, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    assert len(data.load("mnist", data_dir=tiny_tfds, cache_dir=blocked).train.labels) == 30
    assert "could not be cached" in caplog.text


def test_missing_set_says_where_and_how(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar10", data_dir=tmp_path)
    message = str(error.value)
    assert str(tmp_path / "cifar10") in message
    assert "download_and_prepare" in message and "file_format='array_record'" in message and "TensorFlow" in message
    assert list(tmp_path.iterdir()) == [], "looking must not create or fetch anything"


def test_set_in_another_format_is_named(tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"name": "mnist", "fileFormat": "tfrecord"}))
    with pytest.raises(FileNotFoundError, match="is there as tfrecord only"):
        data.load("mnist", data_dir=tmp_path)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        data.load("mnist", data_dir=tmp_path)


def test_real_mnist_test_images(real_tfds):
    """One split only, since decoding all 70,000 images takes a while."""
    folder = data._find_prepared("mnist", real_tfds)
    images, labels = data._decode("mnist", folder.name, real_tfds, "test")
    assert images.shape == (10000, 28, 28, 1) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_allclose([images.mean() / 255, images.std() / 255], [0.1325, 0.3105], atol=1e-4)
    assert "tensorflow" not in sys.modules
