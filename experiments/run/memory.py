"""Memory of the host that programs take: how much it is, and giving back what is not needed any more."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import jax

__all__ = ["forget_traces", "give_back", "heap_in_use", "resident_bytes"]


def forget_traces() -> None:
    """Drops what JAX keeps of programs that it has traced, and gives the memory back to the system.

    JAX keeps the trace of every program for every set of shapes, in case it is called so again. Steps whose arrays have changed
    sizes seldom are, and each of their traces is large. Compiled programs that somebody holds stay; others are traced again.
    """
    jax.clear_caches()
    gc.collect()
    give_back()


def give_back() -> None:
    """Makes the C library return to the system what it holds and nobody uses; it keeps it for later otherwise (glibc only)."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def heap_in_use() -> int:
    """Bytes that the C library has handed out and not got back; unlike those that are resident, without what is torn to pieces.

    Returns:
      0 elsewhere than with glibc 2.33 or later.
    """
    mallinfo = _glibc("mallinfo2")
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


def resident_bytes() -> int:
    """Bytes of memory that the process has by itself, as the system counts them (Linux only)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS: expected Linux")


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def _glibc(name: str) -> Any:
    """A function of glibc; ``None`` where there is none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
