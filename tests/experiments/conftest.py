"""Fixtures of the training job's tests: caches of their own, a tiny data set in tfds' format, a real one if any."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.run import plots
from tests.experiments.jobs import DENSE, run

ROOT = Path(__file__).resolve().parents[2]
# As they were before any job ran.
CACHE_OPTIONS = {
    name: getattr(jax.config, name)
    for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
}


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Caches away from the user's; compiled programs are shared among the processes of a parallel run."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "caches"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base))
        yield base


@pytest.fixture(autouse=True)
def compilation_cache_of_jobs_only():
    """A job turns JAX's compilation cache on for its process; what other tests compile is not written there."""
    yield
    for name, value in CACHE_OPTIONS.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else JAX keeps the cache that it has opened


@pytest.fixture(scope="session")
def real_tfds():
    """A directory with real prepared data sets: ``TFDS_DATA_DIR``, or a tfds directory beside the checkout."""
    for directory in (os.environ.get("TFDS_DATA_DIR"), ROOT.parent / "shared" / "data" / "tfds"):
        if directory and (Path(directory) / "mnist").is_dir():
            return Path(directory)
    pytest.skip("no prepared MNIST: set TFDS_DATA_DIR")


@pytest.fixture(scope="session")
def tiny_images():
    """What the tiny set below holds: 30 training and 10 test images of 10 classes."""
    rng = np.random.default_rng(1)
    return {
        split: (rng.integers(0, 256, (count, 28, 28, 1), np.uint8), np.arange(count) % 10)
        for split, count in (("train", 30), ("test", 10))
    }


@pytest.fixture(scope="session")
def tiny_tfds(tmp_path_factory, tiny_images):
    """A set called mnist, prepared as tfds prepares sets (array_record), with 40 images of noise."""
    import tensorflow_datasets as tfds
    from PIL import Image

    directory = tmp_path_factory.mktemp("tfds")
    pictures = tmp_path_factory.mktemp("pictures")

    class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "mnist"
        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in tiny_images}

        def _generate_examples(self, split):
            for index, (image, label) in enumerate(zip(*tiny_images[split])):
                path = pictures / f"{split}{index}.png"
                Image.fromarray(image[..., 0]).save(path)
                yield index, {"image": str(path), "label": int(label)}

    Mnist(data_dir=str(directory), file_format="array_record").download_and_prepare()
    return directory


@pytest.fixture
def no_plots(monkeypatch):
    """For runs about something else: drawing takes longer than their training."""
    monkeypatch.setattr(plots, "save_figure", lambda figure, directory, name: [])


@pytest.fixture(scope="module")
def finished_dense(tmp_path_factory):
    """The directory of a dense run that went to its end."""
    directory = tmp_path_factory.mktemp("runs") / "dense"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_figure", lambda figure, directory, name: [])
        assert run(*DENSE, "--run-dir", directory) == 0
    return directory
