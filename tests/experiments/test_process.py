"""A process starts over once with the variables that only count before it starts."""

import subprocess
import sys

import pytest

from experiments.run.process import SETTINGS, interpreter, start_over

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is started over")


@linux
def test_starts_over_with_what_is_missing_and_keeps_what_is_set():
    started = []
    environ = {"GLIBC_TUNABLES": "", "HOME": "here"}
    start_over(environ=environ, command=["python", "-m", "x", "--y"], execute=lambda *call: started.append(call))
    ((program, command, new),) = started
    assert program == sys.executable and command == [sys.executable, "-m", "x", "--y"]
    assert new == {"GLIBC_TUNABLES": "", "HOME": "here", "OPENBLAS_NUM_THREADS": "1"}


def test_goes_on_where_all_are_set():
    def unexpected(*call):
        raise AssertionError(call)

    start_over(environ=dict(SETTINGS), command=["python"], execute=unexpected)


@linux
def test_a_process_sees_the_settings_once_and_its_own_arguments():
    program = "import os, sys; from experiments.run.process import start_over, SETTINGS; start_over()\n"
    program += "print(sys.argv[1:], [os.environ[name] for name in SETTINGS])"
    done = subprocess.run(
        [sys.executable, "-c", program, "a b"], env={"OPENBLAS_NUM_THREADS": "2"}, capture_output=True, text=True
    )
    assert done.stdout == f"{['a b']} {['2', SETTINGS['GLIBC_TUNABLES']]}\n", done.stderr


def test_the_interpreter_is_named_so_that_a_shell_finds_it(tmp_path, monkeypatch):
    """As python where that is the one that runs, and not another one."""
    ours, others = tmp_path / ".venv" / "bin", tmp_path / "elsewhere"
    for place in (ours, others):
        place.mkdir(parents=True)
        (place / "python").write_text("")
        (place / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    program = str(ours / "python3")
    assert interpreter(program, path=f"{ours}:{others}") == "python"
    assert interpreter(program, path=f"{others}:{ours}") == interpreter(program, path="") == ".venv/bin/python3"
    monkeypatch.chdir(others)
    assert interpreter(program, path="") == program
