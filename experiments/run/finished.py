"""Finished runs brought back, to be measured: the network as trained, its programs and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments.config import LOCATIONS, TrainConfig, from_json
from experiments.run import data
from experiments.run.directory import RunDirectory
from experiments.run.interruption import Interruption
from experiments.run.training import Training

__all__ = ["Finished", "bring_back"]


class Finished(NamedTuple):
    """A run as it ended."""

    config: TrainConfig  # without places of this machine
    result: dict[str, Any]  # result.json
    loaded: data.Dataset
    work: Training  # with the state of the last checkpoint


def bring_back(directory: Path, data_dir: Path | None) -> Finished:
    """Loads the data of a run and restores its last checkpoint.

    Args:
      directory: of the run.
      data_dir: directory of prepared tfds data sets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      ValueError: for a directory that holds no finished run.
    """
    stored = RunDirectory(directory).result()
    if stored is None:
        raise ValueError(f"{directory} holds no finished run (no result.json)")
    # Where files are is said here, not in a file.
    config = from_json({name: value for name, value in stored["options"].items() if name not in LOCATIONS})
    loaded = data.load(
        config.data.dataset, data_dir=data_dir, validation=config.data.validation, limit=config.data.limit
    )
    work = Training(config, loaded, Console(quiet=True), Interruption())
    work.restore_state(RunDirectory(directory).checkpoints)
    return Finished(config, stored, loaded, work)
