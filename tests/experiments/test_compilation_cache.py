"""Compiled programs that are kept between runs: which of them go, and when."""

import os

import jax
import jax.numpy as jnp
import pytest

from experiments.run import compilation_cache
from experiments.run.compilation_cache import trim, use_compilation_cache


@pytest.fixture
def programs(tmp_path):
    """A directory with four programs of 100 bytes, last used one after another."""
    directory = tmp_path / "compiled"
    directory.mkdir()
    for when in range(4):
        program = directory / f"jit_step{when}-{when:064x}-cache"
        program.write_bytes(bytes(100))
        os.utime(program, (1000 + when, 1000 + when))
    return directory


def names(directory):
    return sorted(file.name.partition("-")[0] for file in directory.iterdir())


def test_those_used_longest_ago_go(programs):
    assert trim(programs, 400) == 0
    assert trim(programs, 399) == 200  # to three quarters of the limit
    assert names(programs) == ["jit_step2", "jit_step3"]


def test_reading_is_using(programs):
    oldest = programs / f"jit_step0-{0:064x}-cache"
    os.utime(oldest, (2000, 1000))
    trim(programs, 399)
    assert names(programs) == ["jit_step0", "jit_step3"]


def test_what_jax_did_not_write_stays(programs, tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(bytes(1000))
    (programs / "notes.txt").write_bytes(bytes(1000))
    (programs / "step-cache").mkdir()
    (programs / f"link-{9:064x}-cache").symlink_to(mine)
    assert trim(programs, 400) == 0, "they are not counted either"
    assert trim(programs, 0) == 400
    assert names(programs) == ["link", "notes.txt", "step"] and mine.exists()


def test_no_directory(tmp_path):
    assert trim(tmp_path / "none", 0) == 0
    file = tmp_path / "file"
    file.write_text("mine")
    assert trim(file, 0) == 0 and file.exists()


def test_programs_of_a_run_are_found_and_trimmed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    use_compilation_cache(tmp_path)
    jax.jit(lambda x: jnp.sin(x) + 0.12345)(jnp.arange(3.0))
    kept = list((tmp_path / "compiled").glob("*-cache"))
    assert kept, "JAX kept something under the name that is looked for"
    use_compilation_cache(tmp_path)
    assert all(program.exists() for program in kept)
    monkeypatch.setattr(compilation_cache, "LIMIT", 0)
    use_compilation_cache(tmp_path)
    assert not any(program.exists() for program in kept)


@pytest.mark.parametrize("variable", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_what_the_user_has_said_is_left_alone(programs, monkeypatch, variable):
    monkeypatch.setenv(variable, "0")
    monkeypatch.setattr(compilation_cache, "LIMIT", 0)
    before = jax.config.jax_compilation_cache_dir
    use_compilation_cache(programs.parent)
    assert jax.config.jax_compilation_cache_dir == before and len(names(programs)) == 4
