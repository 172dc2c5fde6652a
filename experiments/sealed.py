"""JSON files that notice damage: an object, and beside its content a checksum of it."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from experiments.schema import check_plain

__all__ = ["DamagedFileError", "read_sealed", "sealed", "write_sealed", "write_text"]

_FIELD = "checksum"


class DamagedFileError(ValueError):
    """A file that is not what was written; the message names it."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """An object that JSON can hold, with its checksum, to be written in whatever layout; one that it has already is replaced."""
    bare = {name: value for name, value in content.items() if name != _FIELD}
    return {**bare, _FIELD: _checksum(bare)}


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes an object with its checksum; a reader sees the old file or the new one, whole.

    Raises:
      OSError: if it cannot be written; a file that was there is as it was.
    """
    write_text(path, json.dumps(sealed(content), indent=2) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """An object without its checksum. Files of earlier versions have none: of these, only what JSON shows is noticed.

    Raises:
      DamagedFileError: if the content is not what was written.
      OSError: if the file cannot be read at all.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = Path(directory) / "result.json"
      ...     write_sealed(path, {"accuracy": 0.97})
      ...     altered = path.write_text(path.read_text().replace("0.97", "0.99"))
      ...     try:
      ...         read_sealed(path)
      ...     except DamagedFileError as error:
      ...         str(error).endswith("result.json is damaged: its content is not what was written")
      True
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_plain(content)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is damaged: it holds a {type(content).__name__} in place of an object")
    if _FIELD in content and content.pop(_FIELD) != _checksum(content):
        raise DamagedFileError(f"{path} is damaged: its content is not what was written")
    return content


def write_text(path: Path, text: str) -> None:
    """Writes beside the target and renames, so that a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _checksum(content: dict[str, Any]) -> int:
    """Of the content as JSON gives it back, not of the text."""
    plain = json.loads(json.dumps(content))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())
