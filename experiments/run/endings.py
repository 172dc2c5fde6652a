"""How a stretch of training ends: what the user is told, and the result of a run that is finished."""

from __future__ import annotations

import dataclasses
import shlex
import signal
from pathlib import Path
from typing import Any

from rich.console import Console

import tdlrt_jax
from experiments.config import TrainConfig
from experiments.run import plots
from experiments.run.directory import RunDirectory
from experiments.run.display import layer_table
from experiments.run.metrics import Layer, totals
from experiments.run.process import interpreter
from tdlrt_jax import checkpoint
from tdlrt_jax.status import NOT_ORTHONORMAL

__all__ = ["Ending", "NotFiniteError", "Outcome"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    exit_code: int  # 0 finished, 1 not finite or not to be written, 130 or 143 interrupted
    directory: Path
    result: dict[str, Any] | None  # the content of result.json, if finished


class NotFiniteError(ArithmeticError):
    """A step was left out, and no more may be: the loss or a gradient is not finite, or the status says what else it was."""

    def __init__(self, epoch: int, step: int, loss: float, status: int):
        super().__init__(f"epoch {epoch}, step {step}")
        self.epoch, self.step, self.loss, self.status = epoch, step, loss, status


class Ending:
    """Says how it ended, and what to do next; for one stretch of a run."""

    def __init__(self, config: TrainConfig, directory: RunDirectory, console: Console, steps_per_epoch: int):
        self.config, self.directory, self.console = config, directory, console
        self.steps_per_epoch = steps_per_epoch

    def interrupted(self, by: signal.Signals, epoch: int, steps: int) -> Outcome:
        """After a signal, once everything is saved.

        Args:
          by: the signal.
          epoch: those completed.
          steps: those done in the next one.
        """
        self._say(
            f"{by.name}: saved in {self.directory.path} at epoch {epoch + 1}, "
            f"{steps} of {self.steps_per_epoch} steps done. Continue with\n  {self._resume_command()}"
        )
        return Outcome(128 + by, self.directory.path, None)

    def cannot_write(self, error: OSError, epoch: int) -> Outcome:
        """Where a file of the run cannot be written: what is there already stays, and is continued from."""
        steps = checkpoint.all_steps(self.directory.checkpoints)
        last = f"The last checkpoint, after step {steps[-1]}, is whole" if steps else "There is no checkpoint yet"
        self._say(
            f"Stopped in epoch {epoch + 1}: {error}\n{last}. Make room or the directory writable, then continue with\n"
            f"  {self._resume_command()}"
        )
        return Outcome(1, self.directory.path, None)

    def not_finite(self, error: NotFiniteError) -> Outcome:
        """After a step that was not finite, once the state of before it is saved."""
        options = self.config.optimizer
        advice = [f"a lower --learning-rate (it was {options.learning_rate:g})"]
        if options.clip is None:
            advice.append("--clip 1.0")
        if self.config.model.parts.adaptive:
            name = "tau" if self.config.tdlrt.budget is None else "budget"
            advice.append(f"a smaller --{name} (it was {getattr(self.config.tdlrt, name):g})")
        what = f"the loss ({error.loss:g}) or a gradient is not finite"
        if error.status & NOT_ORTHONORMAL:
            what = "; ".join(tdlrt_jax.describe_status(error.status))
        self._say(
            f"Stopped in epoch {error.epoch}, step {error.step} of {self.steps_per_epoch}: {what}. "
            f"The last good state is saved in {self.directory.checkpoints}. "
            f"Try, in another run directory: {', '.join(advice)}. Or go on from there without such steps: the same command with "
            f"--resume and a larger --skip-nonfinite (it was {options.skip_nonfinite})."
        )
        return Outcome(1, self.directory.path, None)

    def finished(
        self,
        history: list[dict[str, Any]],
        summary: list[Layer],
        *,
        data: dict[str, Any],
        spectra: dict[str, Any],
        status: int,
    ) -> Outcome:
        """Writes the result and the plots of a run that is finished, and shows its layers.

        Args:
          history: the records of all epochs.
          summary: of the layers at the end.
          data: ``data`` and ``images`` of the result, see :mod:`~experiments.schema`.
          spectra: singular values by layer, to be plotted.
          status: flags of the steps since the last change of array sizes.
        """
        self._plot(history, spectra)
        stored = self.directory.config() or {}
        result: dict[str, Any] = {
            **{
                key: stored[key]
                for key in ("options", "command", "commit", "versions", "hardware", "settings", "started")
            },
            **{key: stored[key] for key in ("extended", "continued") if key in stored},
            "seed": self.config.run.seed,
            **data,
            "layers": [{**layer._asdict(), "compression": layer.compression} for layer in summary],
            "epochs": history,
            "final": _final(history),
        }
        self.directory.finish(result)
        self.console.print(layer_table(summary, totals(summary)))
        for advice in tdlrt_jax.describe_status(status):
            self._say(f"Note: {advice}.")
        self._say_what_a_budget_lacks(summary)
        final = history[-1]
        self._say(
            f"test accuracy {final['test_accuracy']:.2%}, compression {final['compression_all']:.1%} of all weights, "
            f"{final['compression_conv']:.1%} of the convolutions. Results, plots and checkpoints: {self.directory.path}"
        )
        return Outcome(0, self.directory.path, result)

    def _say_what_a_budget_lacks(self, summary: list[Layer]) -> None:
        """A note where less was saved than asked for."""
        budget = self.config.tdlrt.budget
        kernels = [layer for layer in summary if layer.rank is not None]
        if budget is None or not self.config.model.parts.adaptive or not kernels:
            return
        saved = 1 - sum(layer.parameters for layer in kernels) / sum(layer.full for layer in kernels)
        if saved < budget - 1e-3:
            self._say(
                f"Note: --budget {budget:g} was not reached, {saved:.1%} of the kernels in Tucker format are saved. Train for "
                "more --epochs, or reach it sooner with fewer --budget-epochs."
            )

    def _plot(self, history: list[dict[str, Any]], spectra: dict[str, Any]) -> None:
        figures = {
            "learning": plots.plot_learning(history),
            "ranks": plots.plot_ranks(history),
            "singular_values": plots.plot_spectra(spectra),
        }
        for name, figure in figures.items():
            if figure is not None:
                plots.save_figure(figure, self.directory.plots, name)

    def _resume_command(self) -> str:
        command = (self.directory.config() or {})["command"]
        _, *words = [word for word in shlex.split(command) if word != "--resume"]
        if self.config.run.run_dir is None:
            words += ["--run-dir", str(self.directory.path)]
        return shlex.join([interpreter(), *words, "--resume"])

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def _final(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The last epoch's record; with that of the best validation accuracy, where there are validation images."""
    final = dict(history[-1])
    if "validation_accuracy" in final:
        best = max(history, key=lambda record: record["validation_accuracy"])
        final["best_validation"] = {
            key: best[key] for key in ("epoch", "validation_accuracy", "test_accuracy", "compression_all")
        }
    return final
