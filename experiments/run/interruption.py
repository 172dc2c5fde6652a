"""Turns SIGINT and SIGTERM into a wish that the job grants at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

__all__ = ["Interruption"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Within the context, ``signal`` is the signal that asked for an end, if one did. A second one raises at once.

    Example:
      >>> with Interruption() as interruption:
      ...     signal.raise_signal(signal.SIGTERM)
      ...     interruption.signal.name, interruption.exit_code
      ('SIGTERM', 143)
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """As a shell reports a process that a signal ended: 130 for SIGINT, 143 for SIGTERM; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> Interruption:
        in_main = threading.current_thread() is threading.main_thread()  # elsewhere Python forbids handlers
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS if in_main}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
