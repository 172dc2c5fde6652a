"""Environment variables that only count before a process starts, and make CPU work faster: set, the process starts over once."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path

__all__ = ["SETTINGS", "interpreter", "start_over"]

SETTINGS = {
    # jaxlib factorizes on the CPU by scipy's OpenBLAS, whose threads wait for one another within every small QR: with a busy
    # neighbour a step takes many times as long.
    "OPENBLAS_NUM_THREADS": "1",
    # A step on the CPU allocates its temporaries, hundreds of MiB, from the C library and gives them back at its end. So the
    # kernel hands out every page of 4 KiB anew in every step. With huge pages, of 2 MiB, that is hardly noticed.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def interpreter(executable: str = sys.executable, path: str | None = None) -> str:
    """How a command line starts the Python that runs: ``python`` where a shell finds that one, else where it is.

    Args:
      executable: the Python that runs.
      path: where a shell looks, ``$PATH`` by default.
    """
    found = shutil.which("python", path=path)
    if found is not None and Path(found).absolute().parent == Path(executable).absolute().parent:
        return "python"
    near = os.path.relpath(executable)
    return executable if near.startswith("..") else near


def start_over(
    settings: dict[str, str] = SETTINGS,
    *,
    environ: MutableMapping[str, str] = os.environ,
    command: Sequence[str] | None = None,
    execute: Callable[[str, list[str], dict[str, str]], object] = os.execve,
) -> None:
    """Starts the process over with ``settings`` in its environment, unless all are there; elsewhere than on Linux only sets them.

    Variables that are set, to whatever value, stay as they are: ``GLIBC_TUNABLES= python -m ...`` runs without these.

    Args:
      settings: variables and their values.
      environ: the environment.
      command: what to start, by default what this process was started with.
      execute: replaces the process, as :func:`os.execve` does.
    """
    missing = {name: value for name, value in settings.items() if name not in environ}
    command = list(sys.orig_argv if command is None else command)
    if not missing:
        return
    if not sys.platform.startswith("linux") or not sys.executable:
        environ.update(missing)  # in time for libraries that are not loaded yet
        return
    sys.stdout.flush()
    sys.stderr.flush()
    execute(sys.executable, [sys.executable, *command[1:]], {**environ, **missing})
