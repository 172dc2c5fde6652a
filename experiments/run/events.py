"""Event files for TensorBoard, written at once: a full disk is an error of the call that meets it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

__all__ = ["EventFile"]


class EventFile:
    """The event file of one stretch of a run; its directory holds those of all stretches.

    Not ``tensorboardX.SummaryWriter``, whose thread ends when it cannot write: its queue then fills up, and the run waits for
    ever.

    Args:
      directory: made if need be.
      purge_step: of a run that continues: TensorBoard forgets what earlier files have from this step on.

    Raises:
      OSError: here and from every call, if the file cannot be written.
    """

    def __init__(self, directory: Path, purge_step: int | None = None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        if purge_step is not None:
            # The first makes TensorBoard look at the second, which is the mark.
            self._writer.write_event(Event(step=purge_step, file_version="brain.Event:2"))
            self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Iterable[tuple[str, float]], step: int) -> None:
        """Names and values at a step; on the disk when it returns."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values:
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
