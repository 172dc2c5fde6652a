"""The configuration of a run of the main job: all sections of its options, and what some of them mean for others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.options import (
    DataConfig,
    DeviceConfig,
    ModelConfig,
    OptimizerConfig,
    PruningConfig,
    RunConfig,
    TdlrtConfig,
)

__all__ = ["LATER", "LOCATIONS", "TrainConfig", "changed_by_epochs", "from_json"]

# Options that say where things are and how often they are saved, not what is computed: they may differ when a run is continued.
LOCATIONS = (
    "data_dir",
    "cache_dir",
    "run_dir",
    "resume",
    "save_every",
    "devices",
    "coordinator",
    "processes",
    "process",
    "steps_at_once",
)


# Options that may be others from some step on, since they change nothing of the steps before: a run that goes on notes them.
LATER = ("skip_nonfinite",)


@dataclass(frozen=True)
class TrainConfig:
    """Trains a convolutional network: in Tucker format with adaptive ranks (TDLRT), densely, or as TDLRT is compared with."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tdlrt: TdlrtConfig = field(default_factory=TdlrtConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.device.coordinator is not None and self.run.run_dir is None:
            raise ValueError("--coordinator: name the directory of the run, which all processes see, with --run-dir")
        if self.optimizer.plateau_of == "validation" and (
            self.optimizer.schedule != "plateau" or not self.data.validation
        ):
            raise ValueError(
                f"--plateau-of validation: expected --schedule plateau and a part of the training images for --validation, "
                f"found --schedule {self.optimizer.schedule} --validation {self.data.validation}"
            )
        if self.tdlrt.budget is not None and not self.model.parts.adaptive and self.model.method != "dense":
            raise ValueError(
                f"--budget {self.tdlrt.budget} has no effect on --method {self.model.method}, whose ranks or masks are fixed: "
                "say what to save with --compression"
            )
        if self.model.method == "imp" and self.pruning.rewind_epochs >= self.optimizer.epochs:
            raise ValueError(
                f"--rewind-epochs {self.pruning.rewind_epochs}: expected fewer than the {self.optimizer.epochs} of --epochs"
            )

    @property
    def between(self) -> Literal["cores", "bases"] | None:
        """What steps between two whole ones move, where the method has such."""
        return self.tdlrt.between if self.model.parts.adaptive else None

    @property
    def epochs(self) -> int:
        """Epochs in all: those of every round of ``imp``."""
        return self.optimizer.epochs * (self.pruning.rounds + 1 if self.model.method == "imp" else 1)

    def to_json(self) -> dict[str, Any]:
        """All options, flat, by name; what a run directory stores."""
        flat: dict[str, Any] = {}
        for section in dataclasses.fields(self):
            for option, value in dataclasses.asdict(getattr(self, section.name)).items():
                flat[option] = str(value) if isinstance(value, Path) else value
        return flat


def from_json(options: dict[str, Any]) -> TrainConfig:
    """The options that :meth:`TrainConfig.to_json` gave; those it does not name have their defaults.

    Raises:
      ValueError: for a value that cannot be.
    """
    sections = {}
    for section in dataclasses.fields(TrainConfig):
        kind: Any = section.default_factory  # the section's class
        values = {option.name: options[option.name] for option in dataclasses.fields(kind) if option.name in options}
        for name in ("data_dir", "cache_dir", "run_dir"):
            if values.get(name) is not None:
                values[name] = Path(values[name])
        sections[section.name] = kind(**values)
    return TrainConfig(**sections)


def changed_by_epochs(config: TrainConfig) -> str | None:
    """Why a run of more or fewer epochs is another one from the start; ``None`` where the longer begins as the shorter.

    Example:
      >>> changed_by_epochs(TrainConfig(optimizer=OptimizerConfig(schedule="cosine")))
      '--schedule cosine lowers the learning rate over all of them'
      >>> changed_by_epochs(TrainConfig(optimizer=OptimizerConfig(schedule="plateau")))
    """
    if config.model.method == "imp":
        return "--method imp trains for --epochs in every round"
    if config.optimizer.schedule == "cosine":
        return "--schedule cosine lowers the learning rate over all of them"
    if config.model.parts.adaptive and config.tdlrt.budget is not None and config.tdlrt.budget_epochs is None:
        return "without --budget-epochs a budget is reached after half of them"
    return None
