"""Checkpoints that are damaged: never other numbers than were saved, and an error that names what is lost."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tdlrt_jax
from tdlrt_jax import checkpoint
from tdlrt_jax.checkpoint.damage import not_written

# Of threads inside orbax that give up on a damaged file.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two arrays that are large enough for files of their own, and a kernel, which is not."""
    keys = jax.random.split(jax.random.key(0), 3)
    tree = {
        "embedding": jax.random.normal(keys[0], (200, 80)),
        "head": {"kernel": tdlrt_jax.hosvd(jax.random.normal(keys[1], (8, 6)), rank=2)},
        "table": jax.random.normal(keys[2], (200, 80)),
    }
    # Arrays that are ready at the same moment share a file, large ones too: saved again until each of these has its own.
    for _ in range(50):
        directory = tmp_path_factory.mktemp("checkpoints")
        checkpoint.save(directory, 3, tree, {"epoch": 1})
        sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
        if sum(size > tree["table"].nbytes // 2 for size in sizes) == 2:
            return directory, tree
    raise RuntimeError("large arrays have shared a file in 50 checkpoints")


@pytest.fixture
def copy(saved, tmp_path):
    """A copy to be damaged."""
    directory, tree = saved
    shutil.copytree(directory, tmp_path / "copy")
    return tmp_path / "copy", tree


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit in the midst of it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def attempt(directory, tree):
    """The message of the error that a restoration ends with, ``None`` if it returned what was saved."""
    try:
        restored, metadata = checkpoint.restore(directory, tree)
    except ValueError as error:
        return str(error)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
    assert metadata == {"epoch": 1}
    return None


@pytest.mark.parametrize("damage", [delete, truncate, flip])
def test_every_file(saved, tmp_path, damage):
    """Each of a checkpoint's files is damaged in turn: what was saved comes back, or an error that says what is lost."""
    original, tree = saved
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    messages = {}
    for number, path in enumerate(files):
        directory = tmp_path / str(number)  # elsewhere every time: what was read once is cached by its path
        shutil.copytree(original, directory)
        damage(directory / path)
        messages[path.relative_to("3")] = attempt(directory, tree)
    errors = [message for message in messages.values() if message is not None]
    assert all("checkpoint 3 in" in message and "is damaged: " in message for message in errors)

    for name in ("embedding", "table"):  # in files without the small arrays
        named = [message for message in errors if f"'{name}'" in message and "'head/kernel/core'" not in message]
        assert len(named) == 1 and ("cannot be read" in named[0] or "not what was saved" in named[0])
    message = messages[Path("description/metadata")]
    assert message and ("ranks and checksums cannot be read" in message or "not what was saved" in message)
    everything = "leaves 'embedding', 'head/kernel/core', 'head/kernel/factors/0', 'head/kernel/factors/1', 'table'"
    assert everything in messages[Path("arrays/manifest.ocdbt")]
    message = messages[Path("arrays/_METADATA")]
    assert everything in message or "the list of its arrays cannot be read" in message
    shared = [message for path, message in messages.items() if path.parts[:2] == ("arrays", "d")]
    assert len(shared) == 1 and "'head/kernel/core'" in shared[0], "small arrays share a file"


@pytest.mark.parametrize("field", ["ranks", "metadata", "checksums"])
def test_other_ranks_or_metadata_are_noticed(copy, field):
    """Changes after which the description can still be read."""
    directory, tree = copy
    path = directory / "3" / "description" / "metadata"
    description = json.loads(path.read_text())
    key = next(iter(description[field]))
    description[field][key] = [1, 1] if field == "ranks" else description[field][key] + 1
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="damaged: ranks, checksums or metadata are not what was saved"):
        checkpoint.restore(directory, tree)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.ranks(directory)


def test_an_array_that_is_not_listed_is_named(copy):
    directory, tree = copy
    path = directory / "3" / "arrays" / "_METADATA"
    listing = json.loads(path.read_text())
    (entry,) = [name for name in listing["tree_metadata"] if "table" in name]
    del listing["tree_metadata"][entry]
    path.write_text(json.dumps(listing))
    with pytest.raises(ValueError, match="damaged: leaf 'table': the list of arrays is not the one that was saved"):
        checkpoint.restore(directory, tree)


def test_another_format_is_said_to_be_one(copy):
    directory, tree = copy
    path = directory / "3" / "description" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(
        ValueError, match="has format 99, written by another version of tdlrt_jax; this one reads format 1"
    ):
        checkpoint.restore(directory, tree)


def budgeted(tolerance):
    params = {"kernel": tdlrt_jax.hosvd(jax.random.normal(jax.random.key(0), (12, 10)), rank=6)}
    tx = tdlrt_jax.tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=tolerance)
    return {"params": params, "opt_state": tx.init(params)}


def test_a_budget_is_saved_with_the_state_and_missed_where_it_is_not(tmp_path):
    budget = budgeted(tdlrt_jax.Budget(0.5, steps=10))
    ceiling = {"kernel": jnp.array([5, 4], jnp.int32)}
    state = budget["opt_state"]
    budget["opt_state"] = state._replace(budget=state.budget._replace(start=jnp.float32(1 / 3), ceiling=ceiling))
    checkpoint.save(tmp_path / "with", 0, budget)
    restored, _ = checkpoint.restore(tmp_path / "with", budgeted(tdlrt_jax.Budget(0.5, steps=10)))
    assert jax.tree.structure(restored) == jax.tree.structure(budget)
    jax.tree.map(np.testing.assert_array_equal, restored, budget)
    assert len(jax.tree.leaves(restored["opt_state"].budget)) == 3

    checkpoint.save(tmp_path / "without", 0, budgeted(0.1))
    names = "'opt_state/budget/ceiling/kernel', 'opt_state/budget/start'"
    with pytest.raises(
        ValueError, match=f"lacks leaves {names}: was it saved .* with another optimizer or other options"
    ):
        checkpoint.restore(tmp_path / "without", budget)
    names = names.replace("start", "look', 'opt_state/budget/start")
    with pytest.raises(ValueError, match=f"without a place for it in the given tree, leaves {names}"):
        checkpoint.restore(tmp_path / "with", budgeted(0.1))


def test_what_a_failed_save_leaves_is_removed_and_nothing_else(tmp_path):
    """Directories that a user named like the step are the user's."""
    for name in ("8.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp-17", "8.before", "8.5", "18.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    error = not_written(tmp_path, 8, OSError("no space"))
    assert "checkpoint 8 could not be written" in str(error) and "no space" in str(error)
    assert {path.name for path in tmp_path.iterdir()} == {"8.before", "8.5", "18.orbax-checkpoint-tmp"}
