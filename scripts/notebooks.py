"""Runs notebooks and refreshes their outputs: every ``notebooks/NAME.py`` becomes ``notebooks/NAME.ipynb``, executed.

    python scripts/notebooks.py [notebooks/NAME.py ...]      default: all of them

The ``.py`` files (jupytext's percent format) are what is edited; the ``.ipynb`` files follow them. What is written holds
nothing of the machine or the moment, and nothing is written for a notebook that raises or warns.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

__all__ = ["FOLDER", "problems", "refresh", "sources"]

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
LARGEST = 700_000  # bytes of a file
SECONDS = 300  # for a cell
# Absolute paths of this machine or of a package; warnings that a library printed or logged.
_UNWANTED = re.compile(
    r"(?<![\w.:/<])/(?:home|root|tmp|usr|var|opt|mnt|work|Users)/|[A-Z]:\\\\|site-packages|Warning\b"
)


def sources() -> list[Path]:
    """The notebooks' ``.py`` files, in order."""
    return sorted(FOLDER.glob("*.py"))


def refresh(source: Path) -> Path:
    """Executes a notebook from its ``.py`` file in a new kernel and writes its ``.ipynb``.

    Args:
      source: a percent script.

    Returns:
      The file written.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell raises.
      ValueError: if an output is not fit to be kept, see :func:`problems`.
    """
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number:02d}"
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(source.parent)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    found = problems(notebook)
    if found:
        raise ValueError(f"{source.name} is not written: " + "; ".join(found))
    target = source.with_suffix(".ipynb")
    temporary = target.with_name(f".{target.name}.new")
    nbformat.write(notebook, temporary)
    temporary.replace(target)
    return target


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What an executed notebook should not have, in words: errors, warnings, paths, timestamps, cells that were not run."""
    found = []
    runs = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    if runs != list(range(1, len(runs) + 1)):
        found.append(f"cells were not run once, in order: {runs}")
    for number, cell in enumerate(notebook.cells, 1):
        if "execution" in cell.metadata:
            found.append(f"cell {number} has timestamps")
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                found.append(f"cell {number} raised {output.ename}")
            elif output.get("name") == "stderr":
                found.append(f"cell {number} wrote to stderr: {output.text[:200]!r}")
            match = _UNWANTED.search(_text(output))
            if match:
                found.append(f"cell {number} shows {match.group()!r}")
    size = len(nbformat.writes(notebook).encode())
    if size > LARGEST:
        found.append(f"{size:,} bytes, more than {LARGEST:,}: draw fewer figures, or smaller ones")
    return found


def _text(output: nbformat.NotebookNode) -> str:
    """All readable parts of an output."""
    data = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/png")}
    return "\n".join([str(output.get("text", "")), *map(str, data.values())])


def main(arguments: Sequence[str]) -> int:
    """The command: 0 if all notebooks were written."""
    # What is kept is what a machine without accelerators shows.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    failed = False
    for source in [Path(argument).resolve() for argument in arguments] or sources():
        started = time.monotonic()
        try:
            target = refresh(source)
        except Exception as error:
            failed = True
            print(f"{source.name}: {error}", file=sys.stderr)
        else:
            size = target.stat().st_size / 1000
            print(f"{target.name}: {time.monotonic() - started:.0f} s, {size:.0f} kB", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
