"""The reference leaves nothing out; that the site builds without a warning is checked by ``make docs``."""

import re
from pathlib import Path

import pytest

import tdlrt_jax

ROOT = Path(__file__).parents[2]
PAGES = {path: path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.rst"))}


def described(directive):
    return [name for text in PAGES.values() for name in re.findall(rf"^\.\. {directive}:: (\S+)$", text, re.MULTILINE)]


def test_every_name_of_the_package_is_described_once():
    names = described("autofunction") + described("autoclass")
    assert sorted(names) == sorted(f"tdlrt_jax.{name}" for name in tdlrt_jax.__all__)


def test_every_module_is_described_once():
    found = []
    for path in (ROOT / "tdlrt_jax").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert sorted(described("automodule")) == sorted(found)


def test_every_page_is_listed():
    index = (ROOT / "docs" / "index.md").read_text()
    pages = [path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in PAGES]
    pages += [path.stem for path in (ROOT / "docs").glob("*.md") if path.stem != "index"]
    listed = [
        line for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL) for line in block.splitlines()
    ]
    assert set(pages) <= set(listed)


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_what_is_included_is_there(path):
    for target, options in re.findall(r"```\{include\} (\S+)\n((?::.*\n)*)```", path.read_text()):
        text = (path.parent / target).read_text()
        for mark in re.findall(r'^:(?:start-after|end-before): "(.*)"$', options, re.MULTILINE):
            assert text.count(f"\n{mark}\n") == 1, f"{target} has no heading {mark!r}"
