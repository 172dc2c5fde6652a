"""VGG16, AlexNet and ResNet18 take real training steps on real CIFAR-10 images, through the main job's own parts.

Narrow networks and few images: what takes the time is compiling.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tdlrt_jax
from experiments.options import ModelConfig, OptimizerConfig, TdlrtConfig
from experiments.run.batches import epoch_order, to_device, transform_of
from experiments.run.build import build_model, build_optimizer
from experiments.run.data import Dataset, Images
from experiments.run.programs import build_programs
from tests.helpers import orthonormality

ROOT = Path(__file__).resolve().parents[2]
IMAGES, BATCH, STEPS = 64, 32, 20


@pytest.fixture(scope="module")
def cifar():
    """The first training images of a real prepared CIFAR-10, read without decoding the rest."""
    for directory in (os.environ.get("TFDS_DATA_DIR"), ROOT.parent / "shared" / "data" / "tfds"):
        if directory and (Path(directory) / "cifar10").is_dir():
            break
    else:
        pytest.skip("no prepared CIFAR-10: set TFDS_DATA_DIR")
    import tensorflow_datasets as tfds

    source = tfds.data_source("cifar10", split="train", data_dir=str(directory), download=False)
    examples = source.__getitems__(range(IMAGES))
    images = np.stack([example["image"] for example in examples])
    train = Images(images, np.array([example["label"] for example in examples], np.int32))
    scaled = images / np.float32(255)
    return Dataset("cifar10", train, None, train, 10, scaled.mean((0, 1, 2)), scaled.std((0, 1, 2)), "tfds cifar10")


class Case(NamedTuple):
    """A network and an integrator."""

    model: str
    integrator: str
    spatial: str  # "tucker": all four modes, as in the paper
    width: float
    tau: float
    hidden: int = 0  # units of two hidden layers, in Tucker format too
    dropout: float = 0.0


CASES = (
    Case("alexnet", "bug", "tucker", 1 / 8, 0.5),
    Case("alexnet", "parallel", "whole", 1 / 8, 0.4),
    Case("alexnet", "parallel", "whole", 1 / 8, 0.1, hidden=128, dropout=0.1),
    Case("vgg16", "bug", "whole", 1 / 16, 0.2),
    Case("vgg16", "parallel", "whole", 1 / 16, 0.3),
    Case("resnet18", "bug", "whole", 1 / 16, 0.3),
    Case("resnet18", "parallel", "whole", 1 / 16, 0.3),
)
RESIZED = CASES[1]  # the one that compiles fastest


@pytest.fixture(scope="module")
def network(cifar):
    """Builds each network once: nothing that training changes is in it."""
    return functools.cache(lambda config: build_model(config, cifar, 0))


class Training:
    """The main job's loop without its files."""

    def __init__(self, case, network, dataset):
        optimizer = OptimizerConfig(optimizer="adam", learning_rate=0.005, schedule="constant", batch_size=BATCH)
        tdlrt = TdlrtConfig(tau=case.tau, integrator=case.integrator)
        self.per_epoch = IMAGES // BATCH
        hidden = {"hidden_units": case.hidden, "dropout": case.dropout}
        model = network(ModelConfig(model=case.model, width=case.width, rank=0.75, spatial=case.spatial, **hidden))
        tx = build_optimizer(optimizer, tdlrt, self.per_epoch)
        transform = transform_of(dataset, crop=False, flip=False)
        self.programs, self.state = build_programs(model, tx, transform, seed=0)
        self.data = to_device(dataset.train)
        self.taken = 0

    def steps(self, count):
        """The reports of so many more steps."""
        reports = []
        for step in range(self.taken, self.taken + count):
            epoch, index = divmod(step, self.per_epoch)
            order = epoch_order(0, epoch, IMAGES, BATCH)
            self.state, report = self.programs.train(self.state, self.data, order, jnp.int32(epoch), jnp.int32(index))
            reports.append(report)
        self.taken += count
        return jax.device_get(reports)

    def kernels(self):
        return tdlrt_jax.kernel_paths(self.state.params)

    def ranks(self):
        return {name: tuple(np.asarray(tdlrt_jax.active_rank(kernel))) for name, kernel in self.kernels().items()}


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.model}-{case.integrator}-{case.spatial}" + "-hidden" * bool(case.hidden)
)
def test_networks_train_on_cifar10(case, network, cifar):
    training = Training(case, network, cifar)
    before = training.ranks()
    reports = training.steps(STEPS)

    losses = np.array([report.loss for report in reports])
    numbers = [leaf for leaf in jax.tree.leaves(training.state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    assert all(report.finite for report in reports) and np.all(np.isfinite(losses))
    assert all(np.all(np.isfinite(leaf)) for leaf in numbers)
    assert losses[-5:].mean() < 0.75 * losses[:5].mean()
    assert losses[-5:].mean() < 0.9 * np.log(10), "better than knowing nothing of the image"
    assert training.ranks() != before
    for name, kernel in training.kernels().items():
        assert orthonormality(kernel) < 1e-5, name
    hidden = [name.partition("/kernel")[0] for name in training.kernels() if name.startswith("hidden")]
    assert sorted(hidden) == (["hidden/0", "hidden/1"] if case.hidden else [])
    assert training.programs.compilations == 1
    first, second = (training.programs.evaluate(training.state, training.data) for _ in range(2))
    assert first == second, "nothing is dropped in evaluation"
    if case == RESIZED:
        check_resizing(training, losses[0])


def check_resizing(training, first_loss):
    """Arrays that follow the ranks take one more compilation; the network is the same, and training goes on."""
    state = jax.tree.map(jnp.copy, training.state)
    (expected,) = training.steps(1)
    assert training.programs.compilations == 1

    wanted = tdlrt_jax.fit_capacity(state.params, headroom=1, multiple=1, hysteresis=1)
    params, opt_state = (tdlrt_jax.resize(tree, wanted) for tree in (state.params, state.opt_state))
    kernels = tdlrt_jax.kernel_paths(params)
    assert any(kernel.core.size < training.kernels()[name].core.size for name, kernel in kernels.items())
    training.state, training.taken = state._replace(params=params, opt_state=opt_state), STEPS
    reports = training.steps(5)
    np.testing.assert_allclose(reports[0].loss, expected.loss, rtol=1e-4)
    assert all(report.finite for report in reports) and reports[-1].loss < 0.85 * first_loss
    assert training.programs.compilations == 2
    for name, kernel in training.kernels().items():
        assert kernel.core.shape == kernels[name].core.shape
        assert orthonormality(kernel) < 1e-5, name
