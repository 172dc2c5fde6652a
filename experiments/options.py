"""The options of the main job by sections, each with what it allows; checked before anything slow is imported."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.methods import METHODS, Method

__all__ = [
    "DataConfig",
    "DatasetName",
    "DeviceConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PruningConfig",
    "RunConfig",
    "TdlrtConfig",
]

# Networks made for large images, whose hidden linear layers are left out by default.
_WITH_HIDDEN = ("alexnet", "vgg16")
_MOST = 2**31 - 1  # what JAX counts with
DatasetName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100"]


def _at_least(section: Any, name: str, low: float, *, strict: bool = False, high: float = math.inf) -> None:
    value = getattr(section, name)
    if value is None:
        return
    if isinstance(value, int) and math.isinf(high):
        high = _MOST
    if not (value > low if strict else value >= low) or not value <= high or math.isinf(value):
        bound = f"above {low:g}" if strict else f"at least {low:g}"
        top = "" if math.isinf(high) else f" and at most {high:g}" if high != _MOST else f" and at most {high}"
        raise ValueError(f"--{name.replace('_', '-')} {value}: expected a number {bound}{top}")


def _is_one_of(section: Any) -> None:
    """Checks every field annotated with a ``Literal``; the command line does so too, this is for other callers."""
    for name, annotation in typing.get_type_hints(type(section)).items():
        if typing.get_origin(annotation) is Literal:
            value, choices = getattr(section, name), typing.get_args(annotation)
            if value not in choices:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected one of {', '.join(map(str, choices))}")


@dataclass(frozen=True)
class DataConfig:
    """Data: what is learned."""

    dataset: DatasetName = "digits"
    """Digits come with scikit-learn; the others are read from a directory of tfds data sets."""
    data_dir: Path | None = None
    """Directory of prepared tfds data sets. Default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    cache_dir: Path | None = None
    """Directory for decoded data sets and compiled programs, of which those not used for long go when there are more than 2 GiB.
    Default: tdlrt_jax in $XDG_CACHE_HOME, else in ~/.cache."""
    augment: Literal["auto", "crop_flip", "crop", "off"] = "auto"
    """Random crops (by up to 4 pixels) and left-right flips of training images. auto: both for cifar, crops for digits."""
    validation: float = 0.0
    """Fraction of the training images set apart for validation."""
    limit: int | None = None
    """Use only so many training and so many test images, for a quick look."""

    def __post_init__(self) -> None:
        _is_one_of(self)
        _at_least(self, "validation", 0.0, high=0.9)
        _at_least(self, "limit", 1)

    @property
    def crop(self) -> bool:
        """Whether training images are shifted."""
        by_default = self.dataset == "digits" or self.flip
        return by_default if self.augment == "auto" else self.augment.startswith("crop")

    @property
    def flip(self) -> bool:
        """Whether training images are mirrored; not digits, which then are others."""
        return self.dataset.startswith("cifar") if self.augment == "auto" else self.augment == "crop_flip"


@dataclass(frozen=True)
class ModelConfig:
    """Model: what learns."""

    model: Literal["lenet5", "alexnet", "vgg16", "resnet18"] = "lenet5"
    """The network."""
    width: float = 1.0
    """Factor of all numbers of filters, for a narrower network (not of lenet5)."""
    windows: Literal["original", "small"] = "original"
    """Of alexnet's first two convolutions. original: 11x11 and 5x5, made for large images. small: 3x3 as in the others."""
    hidden_units: int = 0
    """Of each of two linear layers before the classifier (of alexnet and vgg16), 4096 in the originals; 0 for none."""
    dropout: float = 0.0
    """Share of the features that is left out in training around hidden layers, or before the classifier where there are none (of
    alexnet and vgg16); 0.5 in the originals."""
    method: Literal["tdlrt", "dense", "matrix_dlrt", "tucker", "matrix", "cp", "snip", "grasp", "imp"] = "tdlrt"
    """tdlrt: kernels in Tucker format, their ranks adapted during training. dense: the ordinary network. matrix_dlrt: as tdlrt,
    of kernels reshaped to matrices. tucker, matrix, cp: kernels in these formats with fixed ranks, all factors trained at once by
    plain gradients. snip, grasp: dense kernels, pruned before training. imp: pruned by magnitude and rewound, in rounds."""
    linear: bool = True
    """Hidden linear layers in Tucker format (as low-rank matrices), or pruned, too. The paper compresses convolutions only."""
    rank: int | float = 20
    """Initial rank of the channel modes: a count (and at most the mode's size), or a fraction of its size (0.5, 1.0). Of cp: the
    number of terms, or a fraction of the number at which it saves nothing."""
    least_rank: int = 1
    """No channel mode of a convolution's Tucker kernel starts with a lower rank, and smaller modes start whole, as with 3 the
    three colors of an image do. Of matrices the least rank, of cp the least number of terms."""
    compression: float | None = None
    """0.9 to keep a tenth. Of the convolutions, at least: decides the fixed ranks of tucker, matrix and cp in place of --rank. Of
    all weights that can go together (with --linear those of hidden layers too): what snip, grasp and imp prune."""
    spatial: Literal["tucker", "whole"] = "tucker"
    """The convolutions' spatial modes. tucker: with a factor and a rank of their own (the paper). whole: never compressed."""
    initialization: Literal["dense", "normalized", "hosvd", "spectral"] = "dense"
    """dense: random subspaces, usual variance. normalized: the same, smaller, for layers followed by a normalization, of which a
    step then turns as much as of a dense one (not of cp). hosvd: a dense draw, truncated. spectral: decaying singular values."""
    gain: float = 1.0
    """Factor of the initial convolutions. Where normalizations follow them it changes no output, but how far a step goes:
    halving the kernels is as good as four times the learning rate. 0.25 is worth a try, above all for TDLRT (docs/results.md)."""
    norm_momentum: float = 0.99
    """Share of its averages, for evaluation, that a batch normalization keeps in a step. 0.9 in PyTorch, where it is called
    0.1: so short a memory lags less behind a network that learns fast, and is as good where batches are not small."""
    balanced: bool = False
    """Of tucker: core and factors start with even shares of the singular values, as cp does, instead of orthonormal factors."""

    def __post_init__(self) -> None:
        _is_one_of(self)
        _at_least(self, "rank", 0.0, strict=True)
        _at_least(self, "gain", 0.0, strict=True)
        _at_least(self, "width", 0.0, strict=True, high=1000)
        _at_least(self, "least_rank", 1)
        _at_least(self, "norm_momentum", 0.0, high=0.9999)
        _at_least(self, "hidden_units", 0)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: expected a rate in [0, 1)")
        for name in ("hidden_units", "dropout"):
            if (value := getattr(self, name)) and self.model not in _WITH_HIDDEN:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value}: not of {self.model}, expected --model {' or '.join(_WITH_HIDDEN)}"
                )
        if self.windows != "original" and self.model != "alexnet":
            raise ValueError(f"--windows {self.windows}: not of {self.model}, expected --model alexnet")
        if self.model == "lenet5" and self.width != 1:
            raise ValueError(f"--width {self.width}: lenet5 has one width, 1.0")
        if isinstance(self.rank, float) and self.rank > 1:
            raise ValueError(f"--rank {self.rank}: expected a fraction up to 1.0 or a whole number")
        if self.compression is not None and not 0 < self.compression < 1:
            raise ValueError(f"--compression {self.compression}: expected a number between 0 and 1, such as 0.95")
        if self.parts.pruning and self.compression is None:
            raise ValueError(f"--method {self.method}: say how much to prune with --compression, such as 0.9")
        if self.compression is not None and (self.parts.adaptive or self.method == "dense"):
            remedy = "" if self.method == "dense" else ": reach it with --budget"
            raise ValueError(f"--compression {self.compression} has no effect on --method {self.method}{remedy}")
        if self.initialization == "normalized" and self.method == "cp":
            raise ValueError(
                "--initialization normalized is not for --method cp, whose parts are not orthonormal: expected dense, hosvd or "
                "spectral, and a --gain if need be"
            )
        if self.balanced and self.method != "tucker":
            raise ValueError(f"--balanced is for --method tucker, not {self.method}")

    @property
    def has_hidden(self) -> bool:
        """Whether there are hidden linear layers."""
        return self.model == "lenet5" or self.hidden_units > 0

    @property
    def parts(self) -> Method:
        """What the method is made of."""
        return METHODS[self.method]


@dataclass(frozen=True)
class TdlrtConfig:
    """TDLRT: how ranks are chosen, by --method tdlrt and matrix_dlrt alone."""

    tau: float = 0.2
    """Relative tolerance of the truncation (line 11 of Algorithm 1): larger compresses more."""
    budget: float | None = None
    """Compression of all kernels in Tucker format to reach, 0.95 to keep a twentieth; finds tau by itself, which --tau is not."""
    budget_epochs: float | None = None
    """Epochs by which --budget is reached. Default: half of all."""
    budget_importance: Literal["error", "loss"] = "error"
    """What decides between layers under --budget. error: one relative tolerance for all. loss: the least rise of the loss
    that the scatter of gradients predicts."""
    freeze_epochs: float | None = None
    """Epochs after which ranks stay as they are."""
    integrator: Literal["bug", "parallel", "fixed_rank"] = "bug"
    """bug: Algorithm 1. parallel: one gradient a step. fixed_rank: Algorithm 1 without adapting the ranks."""
    criterion: Literal["tail", "each"] = "tail"
    """What is cut. tail: the largest tail under the tolerance (the paper). each: every singular value under it."""
    convention: Literal["shared", "per_mode", "absolute"] = "shared"
    """What tau means: shared among the modes (the paper), for each mode alone, or not relative to the kernel's norm."""
    spare: int | None = None
    """Directions kept beyond what tau asks for. Default: 0, and 1 for --integrator parallel."""
    adapt_every: int = 1
    """Bases and ranks move every so many steps, only the cores in between."""
    cores_between: bool = False
    """In between (--adapt-every) gradients are taken of the cores alone: cheaper than a factorized network's step."""
    bases_between: bool = False
    """In between (--adapt-every) bases move too, at ranks that stay: nearly a whole step, without its eigenproblems."""
    keep_momentum: bool = False
    """--cores-between: bases go on with the momentum that they had, in place of none."""
    warmup: int = 0
    """For so many steps ranks may rise but not fall."""
    min_rank: int = 1
    """No rank falls below (a mode of smaller size keeps all of it)."""
    max_rank: int | None = None
    """No rank rises above."""
    resize: bool = True
    """Arrays follow the ranks at the ends of epochs, which saves time and memory at the price of a compilation."""
    compilation_steps: int = 300
    """What a compilation costs, in steps: arrays shrink only where more are saved. 0: wherever arrays shrink by a quarter."""

    def __post_init__(self) -> None:
        _is_one_of(self)
        _at_least(self, "tau", 0.0)
        if self.convention != "absolute" and not self.tau < 1:
            raise ValueError(f"--tau {self.tau}: expected a relative tolerance in [0, 1)")
        if self.budget is not None and not 0 < self.budget < 1:
            raise ValueError(f"--budget {self.budget}: expected a compression between 0 and 1, such as 0.95")
        if self.cores_between and self.bases_between:
            raise ValueError("--cores-between with --bases-between: steps in between are of one kind")
        if self.between is not None and not self.adapt_every > 1:
            raise ValueError(
                f"--{self.between}-between with --adapt-every {self.adapt_every}: there are no steps in between"
            )
        if self.keep_momentum and not self.cores_between:
            raise ValueError("--keep-momentum: momentum is kept anyway without --cores-between")
        if self.budget is None and self.budget_epochs is not None:
            raise ValueError(f"--budget-epochs {self.budget_epochs}: give a --budget with it")
        if self.budget is None and self.budget_importance != "error":
            raise ValueError(f"--budget-importance {self.budget_importance}: give a --budget with it")
        _at_least(self, "budget_epochs", 0.0, strict=True)
        for name, low in (
            ("freeze_epochs", 0),
            ("spare", 0),
            ("adapt_every", 1),
            ("warmup", 0),
            ("compilation_steps", 0),
            ("min_rank", 1),
            ("max_rank", self.min_rank),
        ):
            _at_least(self, name, low)

    @property
    def between(self) -> Literal["cores", "bases"] | None:
        """What steps between two whole ones move, where they are of a kind of their own."""
        return "cores" if self.cores_between else "bases" if self.bases_between else None


@dataclass(frozen=True)
class PruningConfig:
    """Pruning: of --method snip, grasp and imp."""

    rounds: int = 3
    """imp: how often weights are removed, the same part of those left each time. It trains for --epochs before each, and last."""
    rewind_epochs: int = 0
    """imp: epochs of the first round after which weights are what the others start from; 0: the initialization."""
    score_images: int = 256
    """snip, grasp: training images by which weights are scored."""

    def __post_init__(self) -> None:
        for name, low in (("rounds", 1), ("rewind_epochs", 0), ("score_images", 1)):
            _at_least(self, name, low)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: the descent step."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The descent step of dense training, and of lines 4 and 9 of Algorithm 1."""
    learning_rate: float = 0.03
    """Step size at the start."""
    momentum: float = 0.9
    """Of sgd, and the first moment's decay of adam and adamw."""
    weight_decay: float = 0.0
    """Decoupled for adamw, else added to the gradient; for Tucker kernels it acts through the core."""
    clip: float | None = None
    """Largest global norm of the gradient."""
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    """cosine: down to zero over all epochs. plateau: a tenth whenever a loss stops falling (the paper), see --plateau-of; with
    a --budget only once that is reached, since a loss rises where weights go."""
    patience: int = 5
    """Epochs without a better loss before plateau lowers the learning rate."""
    plateau_of: Literal["training", "validation"] = "training"
    """The images whose loss plateau looks at. That of the training images may fall to the end, long after those held out
    for --validation learn nothing more."""
    batch_size: int = 64
    """Images a step. What the last whole batch of an epoch leaves over is not used in that epoch."""
    epochs: int = 20
    """Passes over the training images."""
    skip_nonfinite: int = 0
    """So many steps in a row may be left out because a number in them is not finite; at one more the run stops."""

    def __post_init__(self) -> None:
        _is_one_of(self)
        _at_least(self, "skip_nonfinite", 0)
        for name in ("learning_rate", "clip"):
            _at_least(self, name, 0.0, strict=True)
        _at_least(self, "momentum", 0.0)
        if self.momentum >= 1:
            raise ValueError(f"--momentum {self.momentum}: expected a number in [0, 1)")
        _at_least(self, "weight_decay", 0.0)
        for name in ("patience", "batch_size", "epochs"):
            _at_least(self, name, 1)


@dataclass(frozen=True)
class DeviceConfig:
    """Devices: on what is computed. Results are the same on any number of them, up to rounding."""

    devices: int | None = None
    """Devices that share every batch, those of all processes counted. Default: one, and of several processes all."""
    coordinator: str | None = None
    """One of several processes: HOST:PORT of the first, where it listens and the others find it. All are started with the same
    options but --process, and one --run-dir that all see. auto: as the cluster says (Slurm, Kubernetes, TPU pods, Open MPI)."""
    processes: int | None = None
    """How many there are. Default: as the cluster says."""
    process: int | None = None
    """Which of them this is, from 0 on. Default: as the cluster says."""
    steps_at_once: int | None = None
    """Steps that the host hands to the device at a time, which saves it the handing over of all arrays in between. A signal is
    answered after them. Default: 1 on a CPU, 10 elsewhere."""

    def __post_init__(self) -> None:
        for name, low in (("devices", 1), ("processes", 1), ("process", 0), ("steps_at_once", 1)):
            _at_least(self, name, low)
        if self.coordinator is None:
            for name in ("processes", "process"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"--{name} {value}: say with --coordinator where the first process is")
            return
        if self.coordinator != "auto" and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"--coordinator {self.coordinator}: expected HOST:PORT, such as 127.0.0.1:1234, or auto")
        if self.processes is not None and self.process is not None and self.process >= self.processes:
            raise ValueError(f"--process {self.process}: expected less than the {self.processes} of --processes")


@dataclass(frozen=True)
class RunConfig:
    """Run: where results go."""

    seed: int = 0
    """Of initial weights, order of images, augmentation and dropout."""
    run_dir: Path | None = None
    """Directory of this run. Default: a new one in runs/, named by data set, model, method and time."""
    resume: bool = False
    """Continue the run in --run-dir from its last checkpoint."""
    evaluate_every: int | None = None
    """Evaluate on the test images after every so many steps, not only at the ends of epochs."""
    save_every: int | None = None
    """Save a checkpoint after every so many steps too. Default: at the ends of epochs, and when interrupted."""

    def __post_init__(self) -> None:
        _at_least(self, "seed", 0, high=2**32 - 1)
        _at_least(self, "evaluate_every", 1)
        _at_least(self, "save_every", 1)
        if self.resume and self.run_dir is None:
            raise ValueError("--resume: name the run to continue with --run-dir")
