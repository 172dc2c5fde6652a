"""When things happen in a run: of what kind a step is, how many one call takes, and until when ranks fall."""

from __future__ import annotations

import dataclasses

from experiments.config import TrainConfig
from experiments.run.build import falling_steps

__all__ = ["Timetable"]


@dataclasses.dataclass(frozen=True)
class Timetable:
    """A run's steps, counted from its start, in epochs of equal length.

    Example:
      >>> from experiments.config import RunConfig, TdlrtConfig
      >>> ranks = TdlrtConfig(budget=0.9, budget_epochs=2, adapt_every=4, bases_between=True)
      >>> timetable = Timetable(TrainConfig(tdlrt=ranks, run=RunConfig(save_every=6)), steps_per_epoch=10)
      >>> timetable.next_steps(0, at_once=10), timetable.next_steps(1, at_once=10), timetable.next_steps(5, at_once=10)
      ((True, 1), (False, 3), (False, 1))
      >>> timetable.ranks_fall(19), timetable.ranks_fall(20)
      (True, False)
    """

    config: TrainConfig
    steps_per_epoch: int

    def next_steps(self, done: int, at_once: int) -> tuple[bool, int]:
        """Of what kind the next step is, whole or one in between, and how many of that kind one call takes.

        Args:
          done: the steps taken.
          at_once: the most that a call may take.
        """
        every = self.config.tdlrt.adapt_every
        whole = done % every == 0
        count = min(at_once, self.steps_per_epoch - done % self.steps_per_epoch)
        if self.config.between is not None:
            count = 1 if whole else min(count, every - done % every)
        for stop in (self.config.run.evaluate_every, self.config.run.save_every):
            count = count if stop is None else min(count, stop - done % stop)
        return whole, count

    def is_evaluated(self, done: int) -> bool:
        """Whether a point of the curve of ``--evaluate-every`` is due after so many steps."""
        return _is_due(self.config.run.evaluate_every, done)

    def is_saved(self, done: int) -> bool:
        """Whether a checkpoint of ``--save-every`` is due after so many steps."""
        return _is_due(self.config.run.save_every, done)

    def ranks_fall(self, done: int) -> bool:
        """Whether a budget is yet to be reached after so many steps."""
        falling = self._falling_steps()
        return falling is not None and done < falling

    def ranks_have_settled(self, done: int) -> bool:
        """Whether a budget has been reached after so many steps."""
        falling = self._falling_steps()
        return falling is not None and done >= falling

    def steps_at_new_sizes(self, done: int) -> int:
        """How many steps arrays are good for that fit the ranks after so many: all that are left, or those for which ranks fall.

        The arrays follow the ranks once more where a budget is reached.

        Example:
          >>> from experiments.config import OptimizerConfig, TdlrtConfig
          >>> def after(done, **ranks):
          ...     config = TrainConfig(tdlrt=TdlrtConfig(**ranks), optimizer=OptimizerConfig(epochs=10))
          ...     return Timetable(config, steps_per_epoch=100).steps_at_new_sizes(done)
          >>> after(100), after(100, budget=0.9, budget_epochs=3), after(300, budget=0.9, budget_epochs=3)
          (900, 200, 700)
        """
        last, falling = self.config.epochs * self.steps_per_epoch, self._falling_steps()
        return (last if falling is None or done >= falling else min(falling, last)) - done

    def _falling_steps(self) -> int | None:
        """Steps until a budget is reached, or ranks are frozen; ``None`` without one."""
        if not self.config.model.parts.adaptive:
            return None
        return falling_steps(self.config.tdlrt, self.config.optimizer.epochs, self.steps_per_epoch)


def _is_due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0
