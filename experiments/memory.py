"""Memory of the host that programs take: what is not needed any more, given back."""

from __future__ import annotations

import ctypes
import gc
import sys

import jax

__all__ = ["forget_traces"]


def forget_traces() -> None:
    """Drops what JAX keeps of programs that it has traced, and gives the memory back to the system.

    JAX keeps the trace of every program for every set of shapes, in case it is called so again; for steps whose arrays change
    sizes that is up to 100 MiB each, and they seldom are. Compiled programs that somebody holds stay; others are traced again.
    """
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:  # glibc's: it keeps what a compilation has freed, a gigabyte and more, for a next one
        trim(0)
