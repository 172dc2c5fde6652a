"""What is stored beside the arrays, as JSON: ranks, checksums, the shapes of arrays without entries, metadata."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from tdlrt_jax.arguments import check_mapping
from tdlrt_jax.checkpoint.damage import damaged
from tdlrt_jax.checkpoint.directory import PathLike

__all__ = ["FORMAT", "check_metadata", "empty_arrays", "json_checksum", "read_description"]

FORMAT = 1


def read_description(manager: ocp.CheckpointManager, directory: PathLike, step: int) -> dict[str, Any]:
    """What is stored beside the arrays."""
    try:
        description = manager.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore()))["description"]
        version, checksum = description["format"], description.pop("checksum", None)
    except Exception as error:
        raise damaged(
            directory, step, f"ranks and checksums cannot be read. {type(error).__name__}: {error}"
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"checkpoint {step} in {directory} has format {version}, written by another version of tdlrt_jax; this one reads "
            f"format {FORMAT}"
        )
    try:
        _check_description(description)
    except (ValueError, RecursionError) as error:
        raise damaged(directory, step, f"ranks, checksums or metadata cannot be used. {error}") from None
    # Checkpoints of the first versions have no checksum of the description itself.
    if checksum is not None and checksum != json_checksum(description):
        raise damaged(directory, step, "ranks, checksums or metadata are not what was saved")
    return description


def empty_arrays(description: Mapping[str, Any], directory: PathLike, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays without entries, by path."""
    try:
        found = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for name, (shape, dtype) in description.get("empty", {}).items()
        }
        if all(0 in struct.shape and name in description["checksums"] for name, struct in found.items()):
            return found
        problem = "an array that is listed as empty has entries, or no checksum"
    except (TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise damaged(directory, step, f"the list of arrays without entries cannot be used. {problem}")


def _check_description(description: Any) -> None:
    """Raises ``ValueError`` unless everything has the type with which it was written."""

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    checksums, ranks, metadata = (description.get(name) for name in ("checksums", "ranks", "metadata"))
    if not isinstance(checksums, dict) or not all(is_count(value) for value in checksums.values()):
        raise ValueError("The checksums are not one number for every array")
    if not isinstance(metadata, dict):
        raise ValueError(f"The metadata is a {type(metadata).__name__}")
    lists = isinstance(ranks, dict) and all(isinstance(value, list) for value in ranks.values())
    if not lists or not all(is_count(entry) for value in ranks.values() for entry in value):
        raise ValueError("The ranks are not lists of counts")


def check_metadata(metadata: Any) -> None:
    """Raises ``ValueError`` unless it is ``None`` or a mapping that JSON can hold."""
    check_mapping("metadata", {} if metadata is None else metadata, "which JSON can hold")
    try:
        json.dumps(dict(metadata or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata must be what JSON can hold: {error}") from None


def json_checksum(description: Mapping[str, Any]) -> int:
    """Of the content, not of the text: as JSON gives it back."""
    plain = json.loads(json.dumps(description))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())
