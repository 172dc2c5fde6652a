"""What a result has to be before anything is computed from it, wherever it comes from: fields of the right types.

Nothing in a result is a path to be followed or a name to be imported, and none of it is executed. Where its numbers and names go,
into tables and figures, they are checked here first, so that what is wrong is said with the file's name.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["check_config", "check_layer", "check_links", "check_plain", "check_records", "check_result"]

_DEEPEST = 20
_LARGEST = 2**63  # what an int64 holds
_LONGEST = 10_000

# Fields of an epoch's record, and of the final one.
_COUNTS = ("epoch", "step", "weights", "compilations", "pressing_steps", "state_bytes")
_NUMBERS = (
    *("train_loss", "train_accuracy", "test_loss", "test_accuracy", "validation_loss", "validation_accuracy"),
    *(
        "compression_conv",
        "compression_all",
        "learning_rate",
        "seconds",
        "evaluation_seconds",
        "compile_seconds",
        "tolerance",
    ),
)
_RANKS = ("ranks", "capacities")
_ERRORS = ("truncation_error", "cumulative_truncation_error")


def check_plain(value: Any, deepest: int = _DEEPEST) -> None:
    """Raises ``ValueError`` for JSON that no result holds: nested deeply, or with numbers or names that cannot be shown."""
    if isinstance(value, str):
        if len(value) > _LONGEST or any(not character.isprintable() and character not in "\n\t" for character in value):
            raise ValueError(f"a text is longer than {_LONGEST:,} characters, or has some that cannot be printed")
    elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise ValueError("an integer has more than 64 bits")
    elif isinstance(value, dict | list):
        if not deepest:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        for entry in (*value, *value.values()) if isinstance(value, dict) else value:
            check_plain(entry, deepest - 1)


def check_config(config: Any) -> None:
    """Raises ``ValueError`` for what is not the ``config.json`` of a run."""
    _check(config, "config", dict)
    _check_options(config.get("options", {}))
    _check(config.get("extended", []), "extended", list)
    _check(config.get("continued", []), "continued", list)
    for stretch in config.get("continued", []):
        _check(stretch, "continued", dict)
        _check_place(stretch)
    command = config.get("command")
    if command is None:
        return
    _check(command, "command", str)
    # It is shown as what to continue a run with.
    if not command.startswith("python -m ") or shlex.join(shlex.split(command)) != command:
        raise ValueError(
            f"command is {command[:80]!r}: expected python -m MODULE and options, and nothing else for a shell"
        )


def check_result(result: Any) -> None:
    """Raises ``ValueError``, naming the field, for what is not the result of a finished run; parts may be missing."""
    check_config(result)
    check_records([result.get("final", {})], "final")
    _check(result.get("epochs", []), "epochs", list)
    check_records(result.get("epochs", []), "epochs")
    _check_place(result)
    for name, kind in (("data", str), ("seed", int), ("images", dict)):
        if name in result:
            _check(result[name], name, kind)


def check_records(records: Iterable[Any], where: str) -> None:
    """Raises ``ValueError``, naming the field, for what are not epochs' records."""
    for number, record in enumerate(records):
        name = where if where == "final" else f"{where}[{number}]"
        _check(record, name, dict)
        for field in _COUNTS:
            _check_optional(record, field, name, int)
        for field in _NUMBERS:
            _check_optional(record, field, name, (int, float))
        for field in _RANKS:
            _check_by_layer(record, field, name, _is_shape, "lists of counts")
        for field in _ERRORS:
            _check_by_layer(record, field, name, _is_number, "numbers")
        for field, kind in (("step_memory", dict), ("best_validation", dict), ("pressing", list), ("curve", list)):
            _check_optional(record, field, name, kind)


def check_layer(layer: Any) -> None:
    """Raises ``ValueError``, naming the field, for what is not a layer of a result."""
    _check(layer, "layers", dict)
    for field in ("name", "kind"):
        _check(layer.get(field), f"layers.{field}", str)
    for field in ("parameters", "full"):
        _check(layer.get(field), f"layers.{field}", int)
    if not _is_shape(layer.get("shape")) or not (layer.get("rank") is None or _is_shape(layer["rank"])):
        raise ValueError(f"layers: {layer['name'][:80]!r} has a shape or rank that is no list of counts")


def check_links(directory: Path) -> None:
    """Raises ``ValueError`` for a link in a directory that leads out of it: what is read or written there stays there."""
    home = directory.resolve()
    for path in directory.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside of {directory}: remove it, or put what it leads to there"
            )


def _check_place(stretch: dict[str, Any]) -> None:
    """Raises ``ValueError`` for fields of the wrong types that say where and when something ran."""
    for name, kinds in (("hardware", str), ("commit", (str, type(None))), ("started", str), ("versions", dict)):
        if name in stretch:
            _check(stretch[name], name, kinds)


def _check_options(options: Any) -> None:
    _check(options, "options", dict)
    for name, value in options.items():
        _check(value, f"options.{name}", (str, int, float, bool, type(None)))


def _check_by_layer(record: dict[str, Any], field: str, name: str, fits: Callable[[Any], bool], what: str) -> None:
    _check_optional(record, field, name, dict)
    for layer, value in (record.get(field) or {}).items():
        if not fits(value):
            raise ValueError(f"{name}.{field}: {layer[:80]!r} has something else than {what}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(n) and isinstance(n, int) and n >= 0 for n in value)


def _check_optional(record: dict[str, Any], field: str, name: str, kinds: Any) -> None:
    if record.get(field) is not None:
        _check(record[field], f"{name}.{field}", kinds)


def _check(value: Any, name: str, kinds: type | tuple[type, ...]) -> None:
    expected = kinds if isinstance(kinds, tuple) else (kinds,)
    wrong = isinstance(value, bool) and bool not in expected and (int in expected or float in expected)
    if wrong or not isinstance(value, expected) or (isinstance(value, float) and math.isinf(value)):
        words = " or ".join(kind.__name__ for kind in expected)
        raise ValueError(f"{name} is {str(value)[:80]!r}: expected {words}")
