"""Runs whose files are damaged or cannot be written: what is wrong is named, what was good stays and is continued from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import train
from experiments.run import plots
from experiments.sealed import DamagedFileError, read_sealed, write_sealed
from tdlrt_jax import checkpoint

# Of threads inside orbax that give up on a damaged file.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
TUCKER = ["--limit", "110", "--validation", "0.1", "--batch-size", "16", "--epochs", "3"]
TUCKER += ["--rank", "12", "--tau", "0.4", "--learning-rate", "0.02", "--compilation-steps", "0"]
CLOCK = ("seconds", "evaluation_seconds", "compilations", "compile_seconds")


def run(directory, *arguments):
    """The exit code of the job."""
    return train.main([*TUCKER, "--run-dir", str(directory), *arguments])


def numbers(directory):
    """What must be the same in a run that met a fault and in one that did not."""
    result = read_sealed(directory / "result.json")
    epochs = [{name: value for name, value in record.items() if name not in CLOCK} for record in result["epochs"]]
    return epochs, result["layers"]


def arrays(directory):
    """The bytes of the last checkpoint's arrays, by their checksums."""
    step = checkpoint.all_steps(directory / "checkpoints")[-1]
    description = json.loads((directory / "checkpoints" / str(step) / "description" / "metadata").read_text())
    return step, description["checksums"]


def content(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit in the midst of it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_figure", lambda figure, directory, name: [])
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that met no fault."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert run(directory) == 0
    return directory


@pytest.fixture
def copy(whole, tmp_path):
    """A copy to be damaged, as if its process had been killed before it wrote the result."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_checkpoint_is_named_and_the_one_before_continued_from(whole, copy, damage, capsys):
    for path in (copy / "checkpoints" / "18").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            damage(path)
    broken = content(copy / "checkpoints" / "18")
    assert run(copy, "--resume") == 0
    printed = capsys.readouterr().out
    assert "checkpoint 18 in" in printed and "is damaged" in printed and "continuing after step 12" in printed
    assert numbers(copy) == numbers(whole) and arrays(copy) == arrays(whole)
    assert content(copy / "damaged" / "checkpoints" / "18") == broken, "nothing is thrown away"
    assert checkpoint.all_steps(copy / "checkpoints") == [12, 18]


def test_where_all_checkpoints_are_damaged_nothing_is_changed(copy, capsys):
    for path in (copy / "checkpoints").rglob("metadata"):
        truncate(path)
    before = content(copy)
    assert run(copy, "--resume") == 2
    message = capsys.readouterr().err
    assert "no checkpoint of" in message and "checkpoint 12 in" in message and "checkpoint 18 in" in message
    assert "Start the run anew in another --run-dir" in message
    assert content(copy) == before


def test_where_checkpoints_are_gone_nothing_is_changed(copy, capsys):
    shutil.rmtree(copy / "checkpoints")
    before = content(copy)
    assert run(copy, "--resume") == 2
    message = capsys.readouterr().err
    assert (
        "has the metrics of 3 epochs, but has no checkpoint to go on from" in message
        and "Nothing was changed" in message
    )
    assert content(copy) == before


def test_a_finished_run_stays_finished_where_it_cannot_go_on(tmp_path, capsys):
    """With more epochs asked for, and checkpoints damaged or gone."""
    directory, options = tmp_path / "run", ["--schedule", "plateau", "--epochs"]
    assert run(directory, *options, "1") == 0
    for path in (directory / "checkpoints").rglob("metadata"):
        truncate(path)
    before = content(directory)
    assert run(directory, *options, "2", "--resume") == 2
    message = capsys.readouterr().err
    assert "no checkpoint of" in message and "Nothing was changed" in message and content(directory) == before
    shutil.rmtree(directory / "checkpoints")
    before = content(directory)
    assert run(directory, *options, "2", "--resume") == 2
    assert "is finished, but has no checkpoint to go on from" in capsys.readouterr().err
    assert content(directory) == before


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_a_pruned_run_killed_before_its_first_checkpoint_is_pruned_again(method, tmp_path, monkeypatch):
    options = ["--method", method, "--compression", "0.9", "--score-images", "32", "--epochs", "1"]
    assert run(tmp_path / "whole", *options) == 0

    def die(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", die)
        assert run(tmp_path / "killed", *options) == 130
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 1
    assert run(tmp_path / "killed", *options, "--resume") == 0
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert arrays(tmp_path / "killed") == arrays(tmp_path / "whole")
    assert numbers(tmp_path / "whole")[0][-1]["compression_all"] > 0.85


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_damaged_metrics_come_back_from_the_checkpoint(whole, copy, damage):
    damage(copy / "metrics.jsonl")
    assert run(copy, "--resume") == 0
    assert numbers(copy) == numbers(whole)
    assert (copy / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_result_is_named_and_made_anew(whole, copy, damage, capsys):
    shutil.copy(whole / "result.json", copy)
    damage(copy / "result.json")
    before = content(copy)
    assert run(copy) == 2
    assert "result.json is damaged" in capsys.readouterr().err and content(copy) == before
    assert run(copy, "--resume") == 0
    assert "result.json is damaged" in capsys.readouterr().out
    assert numbers(copy) == numbers(whole)
    assert (copy / "damaged" / "result.json").read_bytes() == before[Path("result.json")]


@pytest.mark.parametrize("damage", [truncate, flip])
def test_damaged_options_are_named_and_nothing_is_changed(copy, damage, capsys):
    damage(copy / "config.json")
    before = content(copy)
    assert run(copy, "--resume") == 2
    assert "config.json is damaged" in capsys.readouterr().err and content(copy) == before


def test_every_bit_of_a_result_is_guarded(tmp_path):
    path = tmp_path / "result.json"
    written = {"final": {"accuracy": 0.9871, "ranks": [1, 2]}, "note": "τ = 0.1", "none": None, "limit": float("inf")}
    write_sealed(path, written)
    good = path.read_bytes()
    assert read_sealed(path) == written
    noticed = 0
    for position in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:position] + bytes([good[position] ^ (1 << bit)]) + good[position + 1 :])
            try:
                # Other white space, or an escape in place of a letter, is the same content. The name of the checksum is
                # no content: with another one it is one entry more.
                assert {**read_sealed(path), **written} == read_sealed(path)
                assert {name: value for name, value in read_sealed(path).items() if name in written} == written
            except DamagedFileError as error:
                noticed += 1
                assert str(path) in str(error)
    assert noticed > 7 * len(good)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[1]", '"text"', "nan", "\x00"])
def test_what_is_no_result_is_said_to_be_none(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(DamagedFileError, match=r"result\.json is damaged"):
        read_sealed(path)


def test_saving_more_often_changes_nothing_and_loses_less(whole, tmp_path, monkeypatch):
    """Killed in the midst of an epoch, a run continues from there."""
    saved = []
    save = checkpoint.save

    def save_and_die(directory, step, *arguments, **options):
        saved.append(step)
        path = save(directory, step, *arguments, **options)
        if step == 10:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    assert run(tmp_path / "run", "--save-every", "5") == 130
    assert saved == [5, 6, 10]
    assert run(tmp_path / "run", "--resume") == 0, "how often a run saves may change"
    assert saved == [5, 6, 10, 12, 18]
    assert numbers(tmp_path / "run") == numbers(whole) and arrays(tmp_path / "run") == arrays(whole)


# Files that cannot be written, on a file system of the test's own: in a namespace, so that no rights are needed.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size={size} tmpfs {disk} || exit 77
{train} ; echo "code $?"
mount -o remount,rw,size=200m {disk} || exit 77
{train} --resume ; echo "code $?"
cp -r {disk}/run {result}
"""


def on_a_small_disk(tmp_path, size):
    disk, result = tmp_path / "disk", tmp_path / "result"
    disk.mkdir()
    words = [sys.executable, "-m", "experiments.train", *TUCKER, "--run-dir", f"{disk}/run"]
    script = ON_A_SMALL_DISK.format(size=size, disk=disk, result=result, train=" ".join(words))
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    return done.stdout + done.stderr, result


@pytest.mark.skipif(sys.platform != "linux", reason="needs namespaces")
def test_a_full_disk(whole, tmp_path):
    """Room for the first checkpoint and not for the second one."""
    printed, result = on_a_small_disk(tmp_path, size="330k")
    assert "checkpoint 12 could not be written to" in printed and "No space left" in printed
    assert (
        "The last checkpoint, after step 6, is whole. Make room or the directory writable, then continue with"
        in printed
    )
    assert "code 1" in printed and "code 0" in printed and "continuing after step" in printed
    assert numbers(result) == numbers(whole) and arrays(result) == arrays(whole)


@pytest.mark.skipif(sys.platform != "linux", reason="needs namespaces")
def test_a_directory_that_cannot_be_written(tmp_path, capsys):
    """From the start: a file is where the directory should be, whoever asks."""
    (tmp_path / "file").write_text("mine")
    assert run(tmp_path / "file" / "run") == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'file' / 'run'} cannot be written (Not a directory): name another directory" in message
    assert (tmp_path / "file").read_text() == "mine"
