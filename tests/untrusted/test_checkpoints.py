"""Checkpoints from strangers: no code of theirs is run, nothing outside is read or written, and what is wrong is named."""

import json
import os
import pickle
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

import tdlrt_jax
from tdlrt_jax import checkpoint
from tdlrt_jax.checkpoint.description import json_checksum

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning"
    ),  # of threads inside orbax that give up
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


class Payload:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A checkpoint, a module that a file could name, and the file that any code of a stranger's would leave behind."""
    tree = {"w": tdlrt_jax.hosvd(jnp.arange(12.0).reshape(3, 4)), "b": jnp.arange(3.0)}
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, tree, {"epoch": 1})
    sentinel = tmp_path / "executed"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "stranger.py").write_text(f"open({str(sentinel)!r}, 'w').close()\nclass Handler: pass\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    before = sorted(path for path in tmp_path.rglob("*") if "checkpoints" not in path.parts)
    yield tmp_path / "run" / "checkpoints", tree, sentinel
    assert not sentinel.exists() and "stranger" not in sys.modules
    assert sorted(path for path in tmp_path.rglob("*") if "checkpoints" not in path.parts) == before, (
        "something was written"
    )


def restored(directory, tree):
    """The error's message, or ``None`` where what was saved came back."""
    try:
        found, metadata = checkpoint.restore(directory, tree)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    np.testing.assert_array_equal(found["b"], tree["b"])
    np.testing.assert_array_equal(found["w"].core, tree["w"].core)
    assert metadata == {"epoch": 1}
    return None


def test_the_payload_and_the_module_would_leave_their_file(tmp_path):
    """Or the tests below could not fail."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_pickles_in_the_place_of_files_are_not_unpickled(stranger):
    directory, tree, sentinel = stranger
    files = sorted(path.relative_to(directory) for path in (directory / "1").rglob("*") if path.is_file())
    assert len(files) > 5
    messages = []
    for number, file in enumerate(files):
        for protocol in (0, 5):
            folder = directory.parent / f"checkpoints{number}-{protocol}" / "checkpoints"
            shutil.copytree(directory, folder)
            (folder / file).write_bytes(pickle.dumps(Payload(sentinel), protocol=protocol))
            messages.append(restored(folder, tree))
            shutil.rmtree(folder.parent)
    errors = [message for message in messages if message]
    assert len(errors) >= 4 and all("checkpoint" in message and str(directory.parent) in message for message in errors)


def rewritten(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


NAMES = ("stranger.Handler", "stranger:Handler", "os.system", "builtins.eval", "__main__.Handler", "../../stranger")


@pytest.mark.parametrize("name", NAMES)
def test_classes_that_metadata_names_are_not_imported(stranger, name):
    directory, tree, _ = stranger

    def handlers(content):
        content["item_handlers"] = dict.fromkeys(("arrays", "description", "stranger"), name)
        content["custom_metadata"] = {"class": name}

    def types(content):
        for entry in content["tree_metadata"].values():
            entry["value_metadata"]["value_type"] = name
        content["value_metadata_tree"] = {"mode": "NamedTuple", "class": name, "module": "stranger"}
        content["use_zarr3"] = name

    rewritten(directory / "1" / "_CHECKPOINT_METADATA", handlers)
    assert restored(directory, tree) is None
    rewritten(directory / "1" / "arrays" / "_METADATA", types)
    message = restored(directory, tree)
    assert message is None or "checkpoint 1 in" in message


def stored(directory):
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/1/arrays/"}).result()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "|O", "filters": [{"id": "pickle"}]}, "leaf 'b'"),
        ({"dtype": "|O", "filters": None}, "leaf 'b'"),
        ({"compressor": {"id": "pickle"}}, "leaf 'b'"),
        ({"shape": [10**15]}, "'b' has shape"),
        ({"shape": [10**30]}, "cannot be read"),
        ({"shape": [-3]}, "cannot be read"),
        ({"dtype": "<f8"}, "'b' has dtype float64"),
    ],
    ids=str,
)
def test_arrays_that_are_none(stranger, change, words):
    """Python objects, other codecs, shapes that no memory holds."""
    directory, tree, sentinel = stranger
    store = stored(directory)
    layout = json.loads(store.read("b/.zarray").result().value)
    store.write("b/.zarray", json.dumps({**layout, **change}).encode()).result()
    store.write("b/0", pickle.dumps(Payload(sentinel))).result()
    assert words in restored(directory, tree)


@pytest.mark.parametrize(("leaf", "shape"), [("w/core", (10**9, 10**9)), ("w/factors/0", (3, 10**12))])
def test_a_capacity_that_no_memory_holds(stranger, leaf, shape):
    """The capacity of a kernel is the checkpoint's; it is no more than the mode's size."""
    directory, tree, _ = stranger
    store = stored(directory)
    name = leaf if store.read(f"{leaf}/.zarray").result().value else leaf.replace("/", ".")
    layout = json.loads(store.read(f"{name}/.zarray").result().value)
    store.write(f"{name}/.zarray", json.dumps({**layout, "shape": shape}).encode()).result()
    assert f"'{leaf}' has shape {shape}" in restored(directory, tree)


def description(directory, change, seal=True):
    """Rewrites what is stored beside the arrays, with a checksum that fits, as any stranger can."""
    path = directory / "1" / "description" / "metadata"
    content = json.loads(path.read_text())
    content.pop("checksum")
    change(content)
    path.write_text(json.dumps({**content, "checksum": json_checksum(content)} if seal else content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(checksums=[1, 2]), "checksums are not one number"),
        (lambda c: c["checksums"].update(b="1"), "checksums are not one number"),
        (lambda c: c["checksums"].update(b=True), "checksums are not one number"),
        (lambda c: c.update(ranks={"w": "full"}), "ranks are not lists of counts"),
        (lambda c: c.update(ranks={"w": [-1, 1e9]}), "ranks are not lists of counts"),
        (lambda c: c.update(metadata=["epoch"]), "metadata is a list"),
        (lambda c: c.update(format="../../1"), "has format ../../1"),
        (lambda c: c.update(format=10**30), "has format"),
        (lambda c: c.update(empty={"b": [[10**12], "float32"]}), "without entries cannot be used"),
        (lambda c: c.update(empty={"b": [[0], "stranger.Handler"]}), "without entries cannot be used"),
        (lambda c: c.update(empty=3), "without entries cannot be used"),
        (lambda c: c["checksums"].update({"../../../x": 1}), "leaf '../../../x'"),
        (lambda c: c["checksums"].update({"/etc/passwd": 1}), "leaf '/etc/passwd'"),
    ],
)
def test_descriptions_of_wrong_types(stranger, change, words):
    directory, tree, _ = stranger
    description(directory, change)
    assert words in restored(directory, tree)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "1" * 10_000, "NaN", '"text"', "", "\x00" * 100, "{}"]
)
def test_descriptions_that_are_none(stranger, text):
    directory, tree, _ = stranger
    (directory / "1" / "description" / "metadata").write_text(text)
    assert "checkpoint 1 in" in restored(directory, tree)


@pytest.mark.parametrize("place", ["1/arrays/d", "1/description", "1/description/metadata", "1"])
def test_links_that_lead_outside_are_not_followed(stranger, place):
    """Not even to a whole checkpoint of somebody else's."""
    directory, tree, _ = stranger
    outside = directory.parent.parent / "modules" / "checkpoints"
    shutil.copytree(directory, outside)
    path = directory / place
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(outside / place)
    message = restored(directory, tree)
    assert f"has a link to {outside / place}, outside of it, and was not read" in message
    with pytest.raises(ValueError, match="has a link to"):
        checkpoint.ranks(directory)


def test_links_within_are_followed_and_a_linked_directory_of_the_users_own_too(stranger):
    directory, tree, _ = stranger
    (directory / "1" / "arrays" / "d").rename(directory / "1" / "arrays" / "moved")
    (directory / "1" / "arrays" / "d").symlink_to("moved")
    assert restored(directory, tree) is None
    link = directory.parent / "checkpoints-link" / "checkpoints"
    link.parent.mkdir()
    link.symlink_to(directory)
    assert restored(link, tree) is None
    shutil.rmtree(link.parent)
