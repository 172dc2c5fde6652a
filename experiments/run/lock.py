"""Files that one process at a time holds: of a run's directory, and of a grid's."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

__all__ = ["holder", "lock"]


def lock(path: Path) -> int | None:
    """Locks a file, made if need be, with the process's number and machine in it.

    Returns:
      Its descriptor: the lock is held until that is closed, by processes that inherit it too. ``None`` where there are no
      locks (Windows, some shares).

    Raises:
      BlockingIOError: if another process has it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
                os.truncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
            os.close(file)  # its holder has removed it in the meantime
        except OSError as error:
            os.close(file)
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return None
            raise


def holder(path: Path) -> str:
    """Who has locked a file, or has last; empty if that cannot be read."""
    try:
        return path.read_text(errors="replace")[:200]
    except OSError:
        return ""
