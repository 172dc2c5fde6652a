"""Every notebook runs from its ``.py`` file, and its ``.ipynb`` is what that file gives."""

import os
import subprocess
import sys

import jupytext
import nbformat
import pytest

from scripts.notebooks import problems, sources

SOURCES = sources()
each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert [path.stem for path in SOURCES] == [
        "01_tucker_in_ten_minutes",
        "02_gradient_flow_on_the_manifold",
        "03_theorems",
        "04_compress_your_own_network",
        "05_momentum",
    ]


@each
def test_runs_from_its_script(source, tmp_path):
    environment = os.environ | {"MPLBACKEND": "agg", "TDLRT_NOTEBOOK_SMALL": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(source)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(tmp_path.iterdir()), "a notebook leaves no files behind"


@each
def test_both_files_have_the_same_cells(source):
    script, notebook = jupytext.read(source), nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (script, notebook)]
    assert cells[0] == cells[1], "run make notebooks"
    formats = [one.metadata["jupytext"]["formats"] for one in (script, notebook)]
    assert formats == ["ipynb,py:percent"] * 2


@each
def test_outputs_are_complete_and_clean(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())}
    assert "image/png" in kinds


@pytest.mark.parametrize(
    ("output", "word"),
    [
        (nbformat.v4.new_output("stream", name="stderr", text="careful"), "stderr"),
        (nbformat.v4.new_output("stream", name="stdout", text="x.py:3: UserWarning: old"), "Warning"),
        (nbformat.v4.new_output("stream", name="stdout", text="saved in /tmp/abc/network"), "/tmp/"),
        (nbformat.v4.new_output("execute_result", {"text/plain": "'/home/someone/x'"}), "/home/"),
        (nbformat.v4.new_output("error", ename="KeyError", evalue="", traceback=[]), "KeyError"),
    ],
)
def test_what_is_not_fit_to_be_kept_is_named(output, word):
    cell = nbformat.v4.new_code_cell("x", execution_count=1, outputs=[output])
    (problem,) = problems(nbformat.v4.new_notebook(cells=[cell]))
    assert word in problem


def test_cells_out_of_order_are_named():
    cells = [nbformat.v4.new_code_cell("x", execution_count=count) for count in (2, 1)]
    assert "[2, 1]" in problems(nbformat.v4.new_notebook(cells=cells))[0]
