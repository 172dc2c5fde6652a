"""What the command for other versions would install and run, without installing anything."""

import sys
from pathlib import Path

from reliability import compatibility

ROOT = Path(__file__).resolve().parents[2]


def test_the_oldest_versions_are_those_of_the_project():
    pins = dict(pin.split("==") for pin in compatibility.constraints("oldest"))
    project = (ROOT / "pyproject.toml").read_text()
    assert set(pins) == {"jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint"}
    assert (
        all(f'"{name}>={pins[name]}"' in project for name in pins if name != "jaxlib") and pins["jaxlib"] == pins["jax"]
    )
    assert compatibility.constraints("newest") == []


def test_every_python_and_both_ends_are_covered():
    assert {environment.python for environment in compatibility.ENVIRONMENTS} == {"3.11", "3.12", "3.13"}
    assert {environment.versions for environment in compatibility.ENVIRONMENTS} == {"oldest", "newest"}
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()


def test_selected_tests_are_there():
    paths = [path for paths in compatibility.SELECTIONS.values() for path in paths] + compatibility.FLAX
    assert paths and all((ROOT / path).exists() for path in paths)


def test_every_setting_runs_on_the_oldest_and_the_newest_versions():
    cells = [(environment.versions, setting, paths) for environment, setting, paths in compatibility.cells_of("all")]
    for versions in ("oldest", "newest"):
        assert {setting for found, setting, _ in cells if found == versions} == set(compatibility.SETTINGS)
    assert all(paths == [] for _, setting, paths in cells if setting in ("default", "x64"))
    assert len(cells) == 4 + 2 * 3


def test_this_python_is_found_and_its_tests_are_counted(tmp_path):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert compatibility.interpreter("2.0") is None
    found = compatibility.interpreter(version)
    assert found is None or Path(found).exists()
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "def test_good(): assert os.environ['MARK'] == 'x'\n"
        "def test_bad(): assert False\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
    )
    done = compatibility.run_tests(
        Path(sys.executable), {"MARK": "x"}, [str(tmp_path / "test_it.py")], 1, tmp_path / "log"
    )
    assert (done["passed"], done["failed"], done["skipped"]) == (1, 1, 1) and done["exit_code"] == 1
    assert len(done["failures"]) == 1 and done["failures"][0].endswith("::test_bad")
    assert compatibility.versions_of(Path(sys.executable))["jax"]
