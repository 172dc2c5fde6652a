"""The main job: trains a network, watches it, and keeps what it finds in a run directory."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from experiments.config import TrainConfig
from experiments.run import data
from experiments.run.compilation_cache import use_compilation_cache
from experiments.run.devices import Devices, first_says, join_processes, take_devices
from experiments.run.directory import RunDirectory, RunDirectoryError, environment
from experiments.run.endings import Outcome
from experiments.run.interruption import Interruption
from experiments.run.restoring import check_begun
from experiments.run.training import Training

__all__ = ["Outcome", "run"]


def run(config: TrainConfig, *, argv: list[str] | None = None, console: Console | None = None) -> Outcome:
    """Trains as the options say.

    Args:
      config: the options.
      argv: the command line, for the records.
      console: where to show progress; default standard output.

    Returns:
      How it ended; files are in its directory (see :class:`~experiments.run.directory.RunDirectory`).

    Raises:
      RunDirectoryError: if the directory cannot be used; nothing is changed then.
      FileNotFoundError, ValueError: for data that are not there, devices that are not, or options that do not go together.
    """
    join_processes(config.device)
    devices = take_devices(config.device, config.optimizer.batch_size)
    console = console or Console(quiet=not devices.leads)
    argv = argv or []
    directory = _open(config, devices)
    try:
        return _run(directory, config, devices, console, argv)
    finally:
        directory.release()


def _run(directory: RunDirectory, config: TrainConfig, devices: Devices, console: Console, argv: list[str]) -> Outcome:
    finished = _finished(directory, config, console)
    if finished is not None and not _asks_for_more(config, finished):
        console.print(f"{directory.path} is finished already: nothing to do", soft_wrap=True)
        return Outcome(0, directory.path, finished)
    with Interruption() as interruption:
        use_compilation_cache(config.data.cache_dir)
        loaded = data.load(
            config.data.dataset,
            data_dir=config.data.data_dir,
            cache_dir=config.data.cache_dir,
            validation=config.data.validation,
            limit=config.data.limit,
        )
        training = Training(config, loaded, console, interruption, devices)
        if config.run.resume:
            check_begun(directory, config.epochs, training.steps_per_epoch)
            training.restore(directory)
        if devices.leads:
            if config.run.resume:
                directory.go_on(config.to_json(), environment(argv), training.global_step)
            else:
                directory.begin(config.to_json(), environment(argv))
        return training.run(directory)


def _finished(directory: RunDirectory, config: TrainConfig, console: Console) -> dict[str, Any] | None:
    """The result, if there is one; one that is damaged is put aside, since what it was made from is in the checkpoint."""
    try:
        return directory.result()
    except RunDirectoryError as error:
        if not config.run.resume:
            raise
        aside = directory.put_aside("result.json")
        console.print(f"{error}. Kept as {aside}; made anew from the last checkpoint", soft_wrap=True, highlight=False)
        return None


def _check_again(directory: RunDirectory, config: TrainConfig) -> None:
    """Another process may have been at work in it until it was held."""
    try:
        directory.check(config)
    except RunDirectoryError:
        directory.release()
        raise


def _is_done(directory: RunDirectory, config: TrainConfig) -> bool:
    """Whether there is a result, whole, and no more is asked for."""
    try:
        result = directory.result()
    except RunDirectoryError:
        return False
    return result is not None and not _asks_for_more(config, result)


def _asks_for_more(config: TrainConfig, finished: dict[str, Any]) -> bool:
    """Whether the options ask for more epochs than a result has."""
    return bool(config.optimizer.epochs > finished.get("options", {}).get("epochs", config.optimizer.epochs))


def _open(config: TrainConfig, devices: Devices) -> RunDirectory:
    """The directory of the run, of whose state the first of several processes judges: the others may come late.

    That one holds it, but where there is nothing to do.
    """
    problem: RunDirectoryError | None = None
    if devices.leads:
        try:
            directory = RunDirectory.open(config)
            if config.run.run_dir is None or not _is_done(directory, config):
                directory.hold()
                if config.run.run_dir is not None:
                    _check_again(directory, config)
        except RunDirectoryError as error:
            problem = error
    else:
        assert config.run.run_dir is not None
        directory = RunDirectory(config.run.run_dir)
    if not first_says(problem):
        raise problem or RunDirectoryError(f"{config.run.run_dir} cannot be used: the first process says why")
    return directory
