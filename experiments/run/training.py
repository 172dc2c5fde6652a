"""One stretch of training, from the start or from a checkpoint: its epochs, and what is noted and saved after each."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.config import TrainConfig
from experiments.run import data
from experiments.run.arrays import fit_arrays, full_layers, pressing_note
from experiments.run.batches import DeviceImages, epoch_order, to_device, transform_of
from experiments.run.build import (
    after_epoch,
    build_descent,
    build_model,
    build_optimizer,
    kinds_of,
    learning_rate,
)
from experiments.run.devices import ONE_DEVICE, Devices, on_the_host, onto_the_device
from experiments.run.directory import RunDirectory
from experiments.run.display import Display
from experiments.run.endings import Ending, NotFiniteError, Outcome
from experiments.run.events import EventFile
from experiments.run.interruption import Interruption
from experiments.run.memory import give_back
from experiments.run.metrics import Layer, layers, singular_values
from experiments.run.programs import Programs, StepReport, TrainState, build_programs
from experiments.run.pruning import Pruning
from experiments.run.records import Sums, network_record, scalars, truncation_record
from experiments.run.restoring import restore_last_good
from experiments.run.timetable import Timetable
from tdlrt_jax import checkpoint
from tdlrt_jax.capacity import array_bytes
from tdlrt_jax.status import RANK_AT_CAPACITY

__all__ = ["Training"]

# Calls that may be under way before the host looks at the first of them: enough that none waits for the host, few enough
# that a signal is answered soon.
_AHEAD = 4
_STEPS_AT_ONCE = 10  # of one call, where it is not the CPU that computes
_KEEP = 2  # checkpoints


class UnderWay(NamedTuple):
    """A call of the compiled steps that was not waited for."""

    steps: int  # that it takes
    reports: StepReport  # of these
    heard: Any  # a signal that any process had before it


class Training:
    """One stretch of training, from the start or from a checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        loaded: data.Dataset,
        console: Console,
        interruption: Interruption,
        devices: Devices = ONE_DEVICE,
    ):
        self.config, self.console, self.interruption, self.devices = config, console, interruption, devices
        self.stop: signal.Signals | None = None  # what all processes have heard of
        count, batch = len(loaded.train.labels), config.optimizer.batch_size
        if count < batch:
            raise ValueError(f"--batch-size {batch}: there are only {count} training images")
        self.loaded = loaded
        self.steps_per_epoch = count // batch
        self.timetable = Timetable(config, self.steps_per_epoch)
        self.train = to_device(loaded.train)
        self.adaptive = config.model.parts.adaptive
        self.pruning: Pruning | None = None
        transform = transform_of(loaded, crop=config.data.crop, flip=config.data.flip)
        self.programs: Programs
        self.state: TrainState
        # What is pruned is chosen by gradients: that is nothing for the host.
        with contextlib.nullcontext() if config.model.parts.pruning else on_the_host():
            model = build_model(config.model, loaded, config.run.seed)
            self.kinds = kinds_of(model)
            if self.adaptive:
                tx = build_optimizer(config.optimizer, config.tdlrt, self.steps_per_epoch)
            else:
                tx = build_descent(config.optimizer, self.steps_per_epoch)
            if config.model.parts.pruning:
                self.pruning = Pruning(config, self.kinds, tx)
                tx = self.pruning.optimizer(model, self.train, transform, masks_follow=_has_checkpoint(config))
            self.programs, self.state = build_programs(
                model,
                tx,
                transform,
                seed=config.run.seed,
                adaptive=self.adaptive,
                between=config.between,
                devices=devices,
                at_once=config.device.steps_at_once or (1 if jax.default_backend() == "cpu" else _STEPS_AT_ONCE),
            )
        self.state = onto_the_device(self.state)
        if self.pruning is not None:
            self.pruning.remember(self.state.params, self.state.model_state)
            self.state = self.state._replace(params=self.pruning.start(self.state.params, self.state.opt_state))
        self.state, self.train = devices.replicate((self.state, self.train))
        self.held_out: dict[str, DeviceImages] = {"test": devices.replicate(to_device(loaded.test))}
        if loaded.validation is not None:
            self.held_out["validation"] = devices.replicate(to_device(loaded.validation))
        self.epoch = 0  # epochs completed
        self.sums = Sums()
        self.status = 0  # flags of all steps since then
        self.history: list[dict[str, Any]] = []

    def run(self, directory: RunDirectory) -> Outcome:
        """Trains to the end, or until a signal, a number that is not finite, or a file that cannot be written.

        Args:
          directory: of the run, begun; of one that is resumed, :meth:`restore` has taken the state.
        """
        self.directory = directory
        self.ending = Ending(self.config, directory, self.console, self.steps_per_epoch)
        self._announce()
        try:
            return self._train()
        except OSError as error:
            return self.ending.cannot_write(error, self.epoch)

    def _announce(self) -> None:
        sizes = f"{len(self.loaded.train.labels):,} training and {len(self.loaded.test.labels):,} test images"
        start = f"continuing after step {self.global_step}" if self.config.run.resume else "starting"
        model = self.config.model
        on = f"; {self.devices}" if self.devices.count > 1 else ""
        self.console.print(
            f"{model.model} ({model.method}) on {self.loaded.source}: {sizes}{on}; {start}; files in {self.directory.path}",
            soft_wrap=True,
            highlight=False,
        )

    def _train(self) -> Outcome:
        """All epochs that are left."""
        purge_step = self.global_step + 1 if self.config.run.resume else None
        writer = EventFile(self.directory.tensorboard, purge_step) if self.devices.leads else None
        epochs = self.config.epochs
        try:
            with Display(self.console, epochs, self.steps_per_epoch, self.global_step) as display:
                while self.epoch < epochs:
                    if not self._train_epoch(display):
                        return self._interrupted()
                    self._close_epoch(display, writer)
                    self._hear(self._heard())
                    if self.stop is not None and self.epoch < epochs:
                        return self._interrupted()
        except NotFiniteError as error:
            return self._not_finite(error)
        finally:
            if writer is not None:
                writer.close()
        return self._finish()

    # One epoch.

    def _train_epoch(self, display: Display) -> bool:
        """The steps of an epoch that are left to do; ``False`` if a signal ended it early."""
        order = epoch_order(
            self.config.run.seed, self.epoch, len(self.loaded.train.labels), self.config.optimizer.batch_size
        )
        order = self.devices.replicate(order)
        epoch, under_way = np.int32(self.epoch), collections.deque[UnderWay]()
        mark = self._mark()
        try:
            while (step := self.sums.steps + sum(call.steps for call in under_way)) < self.steps_per_epoch:
                heard = self._heard()
                if self.stop is not None:
                    break
                whole, count = self.timetable.next_steps(
                    self.epoch * self.steps_per_epoch + step, self.programs.at_once
                )
                self.state, report = self.programs.train_several(
                    self.state, self.train, order, epoch, np.int32(step), count, whole=whole
                )
                under_way.append(UnderWay(count, report, heard))
                if len(under_way) > (_AHEAD if self.programs.at_once == 1 else 1):
                    self._read(under_way, display)
                step += count
                done = self.epoch * self.steps_per_epoch + step
                evaluate, save = self.timetable.is_evaluated(done), self.timetable.is_saved(done)
                while under_way and (evaluate or save or step == self.steps_per_epoch):
                    self._read(under_way, display)
                if self.sums.steps == step:  # else steps are to be taken again
                    if evaluate:
                        self._evaluate_between()
                    if save and step < self.steps_per_epoch:
                        self._count_since(mark)
                        self._save()
                        mark = self._mark()
            while under_way:
                self._read(under_way, display)
        finally:
            self._count_since(mark)
        return self.sums.steps == self.steps_per_epoch

    def _mark(self) -> tuple[float, int, float]:
        return time.monotonic(), self.programs.compilations, self.programs.compile_seconds

    def _count_since(self, mark: tuple[float, int, float]) -> None:
        """Adds the time and the compilations since a mark to those of the epoch."""
        seconds, compilations, compile_seconds = (now - then for now, then in zip(self._mark(), mark))
        self.sums.seconds += seconds
        self.sums.compilations += int(compilations)
        self.sums.compile_seconds += compile_seconds

    def _heard(self) -> Any:
        """A signal that any process has had, as a number; known at once where there is one, else with the step's report."""
        number = self.devices.largest(self.interruption.signal or 0)
        if isinstance(number, int):
            self._hear(number)
        return number

    def _hear(self, number: Any) -> None:
        if self.stop is None and int(number):
            self.stop = signal.Signals(int(number))

    def _read(self, under_way: collections.deque[UnderWay], display: Display) -> None:
        """Waits for the steps of a call and adds their numbers up, or leaves one out."""
        call = under_way.popleft()
        reports = jax.tree.map(np.atleast_1d, jax.device_get(call.reports))
        self._hear(call.heard)
        for report in itertools.islice(map(StepReport._make, zip(*reports)), call.steps):
            if not report.finite:
                self._leave_out(under_way, float(report.loss), int(report.status))
                return
            self.sums.steps += 1
            self.sums.skipped_in_a_row = 0
            self.sums.loss += float(report.loss)
            self.sums.correct += int(report.correct)
            display.step(self.epoch + 1, self.global_step, float(report.loss))
            self.sums.pressing_steps += bool(report.status & RANK_AT_CAPACITY)
            self.status |= int(report.status)

    def _leave_out(self, under_way: collections.deque[UnderWay], loss: float, status: int) -> None:
        """Goes on after a step that changed nothing, if it may; those under way changed nothing either, and are taken again."""
        if self.sums.skipped_in_a_row >= self.config.optimizer.skip_nonfinite:
            raise NotFiniteError(self.epoch + 1, self.sums.steps + 1, loss, status)
        while under_way:
            self._hear(under_way.popleft().heard)
        self.state = self.state._replace(healthy=self.devices.replicate(jnp.bool_(True)))
        self.sums.steps += 1
        self.sums.skipped += 1
        self.sums.skipped_in_a_row += 1

    def _evaluate_between(self) -> None:
        """A point of the curve of ``--evaluate-every``."""
        started = time.monotonic()
        test_loss, test_accuracy = self.programs.evaluate(self.state, self.held_out["test"])
        self.sums.seconds -= time.monotonic() - started  # an epoch's seconds are those of its steps
        self.sums.add_point(self.global_step, self.config.optimizer.batch_size, test_loss, test_accuracy)

    def _close_epoch(self, display: Display, writer: EventFile | None) -> None:
        """Evaluates, records, fits the arrays to the ranks, and saves, in this order."""
        record = self._record()
        if self.devices.leads:
            self.directory.append(record)
        self.history.append(record)
        display.epoch(record)
        if record["pressing"]:
            self.console.print(pressing_note(record, self.config.tdlrt.resize), soft_wrap=True, highlight=False)
        if writer is not None:
            writer.scalars(scalars(record), record["step"])
        after = after_epoch(
            self.config.optimizer,
            self.state.opt_state,
            record.get("validation_loss"),
            self._place,
            ranks_fall=self.timetable.ranks_fall(self.global_step),
        )
        self.state = self.state._replace(opt_state=after)
        if self.adaptive and self.config.tdlrt.resize:
            here = self._here() if jax.default_backend() == "cpu" else self._on_the_host()
            with on_the_host():
                fitted = fit_arrays(
                    here,
                    self.config.tdlrt.max_rank,
                    grow=self.sums.pressing_steps > 0,
                    settled=self.timetable.ranks_have_settled(self.global_step),
                    steps_left=self.timetable.steps_at_new_sizes(self.global_step),
                    compilation_steps=self.config.tdlrt.compilation_steps,
                )
            if fitted is not here:
                self.state = self._place(fitted)
            self.status &= ~RANK_AT_CAPACITY
        self.epoch, self.sums = self.epoch + 1, Sums(skipped_in_a_row=self.sums.skipped_in_a_row)
        if self.pruning is not None and self.pruning.rounds:
            self._close_round(self.pruning)
        self._save()
        give_back()

    def _close_round(self, pruning: Pruning) -> None:
        """Where a round of ``imp`` ends: prunes, rewinds, and starts the next one."""
        if self.epoch == self.config.pruning.rewind_epochs:
            here = self._here()
            pruning.remember(here.params, here.model_state)
        done, rest = divmod(self.epoch, self.config.optimizer.epochs)
        if rest == 0 and self.epoch < self.config.epochs:
            here = self._here()
            start = pruning.next_round(here.params, here.opt_state, done)
            self.state = self.devices.replicate(TrainState(*start, healthy=jnp.bool_(True)))
            self.console.print(
                f"Round {done} of {pruning.rounds} is done: the smallest weights are pruned, the rest rewound."
            )

    def _record(self) -> dict[str, Any]:
        started = time.monotonic()
        record: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.global_step,
            **self.sums.means(self.config.optimizer.batch_size),
        }
        for name, images_ in self.held_out.items():
            record[f"{name}_loss"], record[f"{name}_accuracy"] = self.programs.evaluate(self.state, images_)
        done, epoch = divmod(self.epoch, self.config.optimizer.epochs)
        if self.pruning is not None and self.pruning.rounds:
            record["round"] = done + 1
        step = (epoch + 1) * self.steps_per_epoch
        here = self._on_the_host()
        with on_the_host():
            record |= network_record(here.params, self._layers(here))
            rate = learning_rate(self.config.optimizer, self.steps_per_epoch, step, here.opt_state)
            full = full_layers(here.params, self.config.tdlrt.max_rank) if self.sums.pressing_steps else []
        record |= {
            "learning_rate": rate,
            # Layers whose ranks fill their arrays, if a step reported one that would be higher; and how many steps did.
            "pressing": full,
            **self.sums.counts(),
            "evaluation_seconds": time.monotonic() - started,
            # Of the step just compiled, and of what training keeps on the device between steps.
            "step_memory": dict(self.programs.memory),
            "state_bytes": array_bytes((here.params, here.opt_state)),
        }
        if self.adaptive:
            record |= truncation_record(here.opt_state)
        if self.config.run.evaluate_every is not None:
            record["curve"] = self.sums.points
        return record

    def _place(self, tree: Any) -> Any:
        """Arrays of the host's on every device."""
        return self.devices.replicate(onto_the_device(tree))

    def _here(self) -> TrainState:
        """The state as one device of this process has it, for the host's work."""
        return self.devices.local(self.state)

    def _on_the_host(self) -> TrainState:
        """The state in the host's memory."""
        return jax.device_get(self._here())

    def _layers(self, here: TrainState) -> list[Layer]:
        """The layers of a state in the host's memory."""
        return layers(here.params, self.kinds, self.pruning and self.pruning.masks(here.opt_state))

    # Checkpoints.

    @property
    def global_step(self) -> int:
        """Steps done, of all epochs."""
        return self.epoch * self.steps_per_epoch + self.sums.steps

    def _save(self) -> None:
        step = self.global_step
        if step not in checkpoint.all_steps(self.directory.checkpoints):
            metadata = {
                "epoch": self.epoch,
                "sums": dataclasses.asdict(self.sums),
                "status": self.status,
                "history": self.history,  # metrics.jsonl, should that be damaged
            }
            checkpoint.save(self.directory.checkpoints, step, self._stored(), metadata, keep=_KEEP)

    def _stored(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        rewind = {} if self.pruning is None or not self.pruning.rounds else {"rewind": self.pruning.rewind}
        return self.state._asdict() | rewind

    def restore_state(self, checkpoints: Path, step: int | None = None) -> dict[str, Any]:
        """Takes the state of a checkpoint in a directory, by default of the last; returns what was saved with it."""
        stored, metadata = checkpoint.restore(checkpoints, self._stored(), step)
        if "rewind" in stored and self.pruning is not None:
            self.pruning.rewind = stored.pop("rewind")
        # Arrays of other sizes than at the start come back on the default device.
        self.state = self.devices.replicate(self.devices.local(TrainState(**stored)))
        return metadata

    def restore(self, directory: RunDirectory) -> None:
        """Takes the state of the last checkpoint that is not damaged; a run stopped before its first one starts anew.

        Raises:
          RunDirectoryError: if there is nothing to go on from where there should be; nothing is changed then.
        """
        metadata = restore_last_good(
            directory,
            lambda step: self.restore_state(directory.checkpoints, step),
            self.devices,
            self.console,
        )
        if metadata is not None:
            self.epoch, self.sums = metadata["epoch"], Sums(**metadata["sums"])
            self.status = metadata.get("status", 0)  # not in checkpoints of earlier versions
        self.history = (metadata or {}).get("history") or []
        if self.devices.leads:
            if len(self.history) == self.epoch:
                directory.write_history(self.history)
            else:  # a checkpoint of an earlier version
                self.history = directory.cut_history(self.epoch)

    # Ends.

    def _interrupted(self) -> Outcome:
        self._save()
        assert self.stop is not None
        return self.ending.interrupted(self.stop, self.epoch, self.sums.steps)

    def _not_finite(self, error: NotFiniteError) -> Outcome:
        """The state is that of before such a step, since it changes nothing."""
        # Healthy again: a run that is resumed meets the same step, and stops there again.
        self.state = self.state._replace(healthy=self.devices.replicate(jnp.bool_(True)))
        self._save()
        return self.ending.not_finite(error)

    def _finish(self) -> Outcome:
        if not self.devices.leads:
            return Outcome(0, self.directory.path, None)
        images = {name: held_out.labels.shape[0] for name, held_out in self.held_out.items()}
        here = self._on_the_host()
        with on_the_host():
            spectra, summary = singular_values(here.params), self._layers(here)
        return self.ending.finished(
            self.history,
            summary,
            data={"data": self.loaded.source, "images": {"train": len(self.loaded.train.labels), **images}},
            spectra=spectra,
            status=self.status,
        )


def _has_checkpoint(config: TrainConfig) -> bool:
    """Whether a run is resumed that was saved before."""
    return config.run.resume and bool(checkpoint.all_steps(RunDirectory.of(config).checkpoints))
