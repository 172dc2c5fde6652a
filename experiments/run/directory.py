"""The directory of a run: options, metrics, checkpoints, result. Nothing in it is ever overwritten by another run."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.config import LATER, LOCATIONS, TrainConfig, changed_by_epochs
from experiments.run.lock import holder, lock
from experiments.run.process import SETTINGS
from experiments.schema import check_config, check_links, check_plain, check_result
from experiments.sealed import DamagedFileError, read_sealed, write_sealed, write_text

__all__ = ["RunDirectory", "RunDirectoryError", "distinct_names", "environment"]

_LOCK = ".lock"
_PACKAGES = ("tdlrt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")
_PLACE = ("commit", "versions", "hardware", "settings")  # what numbers of a stretch of a run may depend on


class RunDirectoryError(ValueError):
    """The directory cannot be used for this run."""


class RunDirectory:
    """Files of one run.

    ``config.json`` (options and environment), ``metrics.jsonl`` (a line an epoch), ``checkpoints/`` (the last two),
    ``tensorboard/``, ``plots/`` and, once the run is finished, ``result.json``.
    """

    def __init__(self, path: Path, *, new: bool = False):
        self.path = path
        self._new = new  # nobody named it: another name is as good
        self._lock: int | None = None
        self._made: list[Path] = []

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Where event files are."""
        return self.path / "tensorboard"

    @property
    def plots(self) -> Path:
        """Where figures are."""
        return self.path / "plots"

    @classmethod
    def of(cls, config: TrainConfig) -> RunDirectory:
        """The directory that the options name, or a new one. Looks at nothing."""
        return cls(config.run.run_dir) if config.run.run_dir else cls(default_path(config), new=True)

    @classmethod
    def open(cls, config: TrainConfig) -> RunDirectory:
        """The directory of a new run, or of one to be continued. Looks only; writes nothing.

        Raises:
          RunDirectoryError: if it holds a run and ``--resume`` is not given, holds none and it is, holds one with other
            options (another number of epochs apart, where that changes nothing of those before), or holds something else.
        """
        directory = cls.of(config)
        if not directory._new:
            directory.check(config)
        return directory

    def check(self, config: TrainConfig) -> None:
        """Raises as :meth:`open` does."""
        stored = self.config()
        if config.run.resume:
            if stored is None:
                raise RunDirectoryError(f"--resume: there is no run in {self.path} (no config.json)")
            try:
                check_links(self.path)
            except ValueError as error:
                raise RunDirectoryError(str(error)) from None
            self._check_same(stored["options"], config, stored["command"])
        elif stored is not None:
            state = "a finished run" if self.result() else "a run that is not finished"
            raise RunDirectoryError(
                f"{self.path} holds {state}: continue it with --resume, or name another --run-dir. Nothing was changed"
            )
        elif self.path.exists() and not self._is_empty():
            raise RunDirectoryError(f"{self.path} exists and is not the directory of a run: name another --run-dir")

    def _is_empty(self) -> bool:
        """Whether there is nothing but what a run that was ended while it began may have left."""
        return self.path.is_dir() and all(
            path.name.startswith((".config.json.", _LOCK)) for path in self.path.iterdir()
        )

    def hold(self) -> None:
        """Keeps other processes out until :meth:`release`, or the end of this one; makes the directory, if need be.

        Raises:
          RunDirectoryError: if another process is at work in it, or it cannot be written.
        """
        try:
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            if self._new:
                self.path = _make_new(self.path)
                self._made = [self.path, *[path for path in self._made if path in self.path.parents]]
            else:
                self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path / _LOCK)
        except BlockingIOError:
            who = holder(self.path / _LOCK)
            self._made = []
            raise RunDirectoryError(
                f"{self.path}: another process is at work there{who and f' ({who})'}: wait for its end, or name another "
                "--run-dir. Nothing was changed"
            ) from None
        except OSError as error:
            self.release()
            raise RunDirectoryError(
                f"{self.path} cannot be written ({error.strerror}): name another directory with --run-dir, or make room there. "
                "What is there stays"
            ) from None

    def release(self) -> None:
        """Lets others in; of a run that never began nothing stays."""
        if self._lock is not None:
            (self.path / _LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
        if not (self.path / "config.json").exists():
            for path in self._made:
                try:
                    path.rmdir()
                except OSError:  # others have put something there
                    break
        self._made = []

    def begin(self, options: dict[str, Any], environment: dict[str, Any]) -> None:
        """Makes the directory of a new run, with its ``config.json``.

        Raises:
          RunDirectoryError: if it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_sealed(self.path / "config.json", {"options": options, **environment})
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path} cannot be written ({error.strerror}): name another directory with --run-dir, or make room there"
            ) from None

    def go_on(self, options: dict[str, Any], environment: dict[str, Any], step: int) -> None:
        """Notes what a run that goes on does so with: another commit or machine, or more or fewer epochs.

        A result stays then, named by its epochs.

        Args:
          options: those given now.
          environment: see :func:`environment`.
          step: after which it goes on.

        Raises:
          RunDirectoryError: if it cannot be written; nothing is lost, and the same command goes on from there.
        """
        stored = self.config() or {}
        changed: dict[str, Any] = {}
        before = [stored, *stored.get("continued", [])][-1]
        later = {name: options[name] for name in LATER if stored["options"].get(name, options[name]) != options[name]}
        if later or any(before.get(name) != environment[name] for name in _PLACE):
            place = {name: environment[name] for name in (*_PLACE, "started")}
            note = {"options": later} if later else {}
            changed["continued"] = [*stored.get("continued", []), {"step": step, **place, **note}]
        if later:
            changed["options"] = {**stored["options"], **later}
        epochs = stored["options"].get("epochs", options["epochs"])
        if options["epochs"] != epochs:
            words = [word for word in shlex.split(environment["command"]) if word != "--resume"]
            extended = {"epochs": epochs, "commit": environment["commit"], "started": environment["started"]}
            changed["options"] = {**stored["options"], **later, "epochs": options["epochs"]}
            changed["command"] = shlex.join(words)
            changed["extended"] = [*stored.get("extended", []), extended]
        if not changed:
            return
        try:
            if "extended" in changed and (self.path / "result.json").exists():
                (self.path / "result.json").rename(self.path / f"result-{epochs}-epochs.json")
            write_sealed(self.path / "config.json", {**stored, **changed})
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path} cannot be written ({error.strerror}): make room there, and give the same command again"
            ) from None

    def config(self) -> dict[str, Any] | None:
        """Options and environment as stored, ``None`` if this is no run's directory.

        Raises:
          RunDirectoryError: if they cannot be read, or are not what was written.
        """
        return self._read("config.json", check_config)

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run.

        Raises:
          RunDirectoryError: if there is one that cannot be read, or is not what was written.
        """
        return self._read("result.json", check_result)

    def append(self, record: dict[str, Any]) -> None:
        """Adds an epoch's line to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """All epochs' lines; a last line that was cut off is left out."""
        path = self.path / "metrics.jsonl"
        records = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
                check_plain(record)
            except (ValueError, RecursionError):
                break
            records.append(record)
        return records

    def cut_history(self, epochs: int) -> list[dict[str, Any]]:
        """Keeps the lines of the first ``epochs`` epochs, those that the checkpoint to continue from contains.

        Raises:
          RunDirectoryError: if some of them are not there.
        """
        records = self.history()[:epochs]
        if [record["epoch"] for record in records] != list(range(1, epochs + 1)):
            raise RunDirectoryError(
                f"{self.path / 'metrics.jsonl'} lacks lines of the {epochs} epochs that the checkpoint contains"
            )
        self.write_history(records)
        return records

    def write_history(self, records: list[dict[str, Any]]) -> None:
        """Replaces ``metrics.jsonl``."""
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def put_aside(self, name: str) -> Path:
        """Moves a damaged file or directory of the run into ``damaged/``, under a name that is free there; returns it there."""
        source, target = self.path / name, self.path / "damaged" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{source.name}-{number}")
        return source.rename(target)

    def finish(self, result: dict[str, Any]) -> None:
        """Writes ``result.json``; from then on the run is finished."""
        write_sealed(self.path / "result.json", result)

    def _read(self, name: str, check: Callable[[Any], None]) -> dict[str, Any] | None:
        path = self.path / name
        if not path.is_file():
            return None
        try:
            content = read_sealed(path)
        except (DamagedFileError, OSError) as error:
            raise RunDirectoryError(str(error)) from None
        try:
            check(content)
        except ValueError as error:
            raise RunDirectoryError(f"{path} is not what experiments.train writes: {error}") from None
        return content

    def _check_same(self, stored: dict[str, Any], config: TrainConfig, command: str) -> None:
        stored = {**TrainConfig().to_json(), **stored}  # options younger than the run had their defaults
        given = config.to_json()
        names = [name for name in sorted(stored.keys() | given.keys()) if name not in LOCATIONS]
        differing = [name for name in names if stored.get(name) != given.get(name) and name not in LATER]
        if differing == ["epochs"]:
            finished = given["epochs"] < stored["epochs"] and (self.path / "result.json").exists()
            reason = "it is finished" if finished else changed_by_epochs(config)
            if reason is None:
                return
            raise RunDirectoryError(
                f"{self.path} holds a run of {stored['epochs']} epochs, which cannot be made one of {given['epochs']}: {reason}. "
                "Start another run in another --run-dir. Nothing was changed"
            )
        if differing:
            listed = "\n".join(
                f"  --{name.replace('_', '-')}: {stored.get(name)} there, {given.get(name)} given" for name in differing
            )
            raise RunDirectoryError(
                f"{self.path} holds a run with other options:\n{listed}\nIt was started with: {command}"
            )


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Names of runs and results, told apart by more of their paths where the last part of several is the same.

    Example:
      >>> distinct_names([Path("a/seed0"), Path("b/seed0"), Path("c/first.json")])
      ['a-seed0', 'b-seed0', 'first']
    """
    parts = [(path.with_suffix("") if path.suffix == ".json" else path.resolve()).parts for path in paths]
    names = [part[-1] for part in parts]
    longer = [name if names.count(name) == 1 else "-".join(part[-2:]) for name, part in zip(names, parts)]
    if len(set(longer)) == len(longer):
        return longer
    return [f"{name} ({number})" for number, name in enumerate(longer, start=1)]


def _make_new(path: Path) -> Path:
    """A directory that was not there, of this name or, where there is one, of the next that is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        try:
            path.mkdir()
            return path
        except FileExistsError:
            path = path.with_name(f"{path.name.removesuffix(f'_{number - 1}')}_{number}")
    raise AssertionError


def default_path(config: TrainConfig) -> Path:
    """A new directory under ``runs/``."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.data.dataset}-{config.model.model}-{config.model.method}-{now}"


def environment(argv: list[str]) -> dict[str, Any]:
    """What a result depends on beside its options: command, commit, versions, hardware, settings of the process."""
    import jax

    devices = jax.devices()
    accelerator = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    return {
        "command": shlex.join(["python", "-m", "experiments.train", *argv]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "hardware": f"{_processor()}, {_cores()} cores, {platform.system()} {platform.machine()}; {accelerator}",
        "settings": {name: os.environ.get(name) for name in SETTINGS},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the project's checkout, with a mark if files differ from it; ``None`` outside of one."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"
