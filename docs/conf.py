"""Sphinx builds the site from the pages of this folder, parts of the README, the notebooks and the docstrings.

    make docs

The notebooks are shown with the outputs that they were committed with; nothing is executed, and nothing needs a network.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

project = "tdlrt_jax"
author = "the authors of tdlrt_jax"
html_title = "tdlrt_jax"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]  # myst_nb writes the second
templates_path: list[str] = []
html_theme = "furo"
html_show_copyright = False

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 100

# Packages with a page of their own: what they export is described there, and not again among the modules behind them.
PACKAGES = (
    "tdlrt_jax",
    "tdlrt_jax.baselines",
    "tdlrt_jax.checkpoint",
    "tdlrt_jax.conv",
    "tdlrt_jax.dynamics",
    "tdlrt_jax.integrators",
    "tdlrt_jax.models",
    "tdlrt_jax.nn",
)


def collect_notebooks() -> None:
    """Copies the notebooks to where Sphinx looks for pages; those that are gone go here too."""
    target = ROOT / "docs" / "notebooks"
    target.mkdir(exist_ok=True)
    current = {path.name: path for path in (ROOT / "notebooks").glob("*.ipynb")}
    for path in target.iterdir():
        if path.name not in current:
            path.unlink()
    for name, path in current.items():
        copy = target / name
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copy)


def source_section(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes the paragraph ``Source: ...``, with which docstrings end, a section as napoleon knows them."""
    start = next((i for i, line in enumerate(lines) if line.startswith("Source: ")), None)
    if start is not None:
        end = next((i for i, line in enumerate(lines) if i > start and not line.strip()), len(lines))
        text = [lines[start].removeprefix("Source: "), *lines[start + 1 : end]]
        lines[start:end] = ["Source:", *("  " + line for line in text)]


def lists_of_names(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Puts names that share a description, ``a, b, c: as in ...``, on one line, as napoleon wants them."""
    position = 0
    while position < len(lines) - 1:
        if re.fullmatch(r"  [\w*]+(, [\w*]+)*,", lines[position]):
            lines[position : position + 2] = [f"{lines[position]} {lines[position + 1].strip()}"]
        else:
            position += 1
    lines[:] = [re.sub(r"^(  \*\w+, )(\*\*\w+:)", r"\1\\\2", line) for line in lines]


def field_comment(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Gives the field of a named tuple the comment beside it in the place of ``Alias for field number 0``."""
    if what != "attribute" or not lines or not lines[0].startswith("Alias for field number"):
        return
    parts = name.split(".")
    owner: Any = importlib.import_module(parts[0])
    for part in parts[1:-1]:
        owner = getattr(owner, part)
    match = re.search(rf"^ +{parts[-1]}:.*?  # (.+)$", inspect.getsource(owner), re.MULTILINE)
    # Comments are plain text: what looks like code is shown as it stands.
    lines[:] = [match.group(1).replace("\\", r"\\").replace("*", r"\*").replace("|", r"\|")] if match else []


def described_elsewhere(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out of the page of modules what the page of a package describes."""
    if not app.env.current_document.docname.startswith("api/modules"):
        return None
    exported = [getattr(importlib.import_module(package), name, None) for package in PACKAGES]
    return True if any(obj is other for other in exported if other is not None) else None


def setup(app: Any) -> None:
    """Connects what is above."""
    collect_notebooks()
    app.connect("autodoc-process-docstring", field_comment, priority=600)  # after napoleon
    app.connect("autodoc-process-docstring", lists_of_names, priority=400)
    app.connect("autodoc-process-docstring", source_section, priority=400)
    app.connect("autodoc-skip-member", described_elsewhere)
