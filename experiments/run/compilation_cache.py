"""Compiled programs that are kept between runs, in the user's cache directory."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import jax

from experiments.run import data

__all__ = ["LIMIT", "trim", "use_compilation_cache"]

LIMIT = 2 * 1024**3
"""Bytes that a run lets older runs' programs take."""

_PROGRAM = re.compile(r".+-[0-9a-f]{64}-cache")  # as JAX names them


def use_compilation_cache(cache_dir: Path | None) -> None:
    """Keeps compiled programs between runs, unless the user has said where or whether to.

    Args:
      cache_dir: they go to ``compiled`` in it, which is trimmed to :data:`LIMIT`.
        Default: :func:`~experiments.run.data.cache_directory`.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or "JAX_ENABLE_COMPILATION_CACHE" in os.environ:
        return
    directory = (cache_dir.expanduser() if cache_dir else data.cache_directory()) / "compiled"
    trim(directory, LIMIT)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def trim(directory: Path, limit: int) -> int:
    """Removes the programs that were used longest ago if all together have more than ``limit`` bytes.

    JAX by itself never removes any, and ranks that move make new ones in every run. A program that another process was about
    to read is compiled there.

    Args:
      directory: where JAX keeps them; other files in it stay, and nothing is done if there is no such directory.
      limit: in bytes; once it is exceeded, programs go until three quarters of it are left, so that not every run removes some.

    Returns:
      How many bytes were removed.

    Example:
      >>> import tempfile
      >>> directory = Path(tempfile.mkdtemp())
      >>> for age, name in enumerate(("jit_new", "jit_old", "jit_oldest")):
      ...     program = directory / f"{name}-{0:064x}-cache"
      ...     _ = program.write_bytes(bytes(10))
      ...     os.utime(program, (1000 - age, 1000 - age))
      >>> trim(directory, 30), trim(directory, 29), sorted(file.name.partition("-")[0] for file in directory.iterdir())
      (0, 10, ['jit_new', 'jit_old'])
    """
    found: list[tuple[float, int, str]] = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # gone since
                if _PROGRAM.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    about = entry.stat(follow_symlinks=False)
                    found.append((max(about.st_atime, about.st_mtime), about.st_size, entry.path))
    total, removed = sum(size for _, size, _ in found), 0
    if total <= limit:
        return 0
    for _, size, path in sorted(found):
        if total - removed <= 0.75 * limit:
            break
        with contextlib.suppress(OSError):  # another run's, or not ours to remove
            os.unlink(path)
            removed += size
    return removed
