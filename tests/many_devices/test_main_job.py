"""The main job on many devices and in many processes, and its options for them."""

import json

import orbax.checkpoint as ocp
import pytest

from experiments.config import TrainConfig, from_json
from experiments.options import DeviceConfig
from experiments.run import batches
from experiments.run.devices import take_devices
from tdlrt_jax import checkpoint
from tests.many_devices.processes import DEVICES, finish, free_port, start

JOB = ["--limit", "192", "--batch-size", "8", "--epochs", "1", "--no-linear", "--spatial", "whole", "--rank", "12"]
JOB += ["--tau", "0.6", "--integrator", "parallel", "--spare", "0", "--learning-rate", "0.002"]


def epochs_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_job_of_two_processes_is_interrupted_and_resumed_on_eight_devices(tmp_path, monkeypatch):
    """The second process alone hears the signal, both end, one has written; it ends as the run on one device did."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    together = [*JOB, "--run-dir", parts, "--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2]
    code = "t.job(int(sys.argv[1]), *sys.argv[2:])"
    processes = [start(code, (-1, 2)[index], *together, "--process", index, devices=2) for index in range(2)]
    finish(*processes, code=143)
    (saved,) = checkpoint.all_steps(parts / "checkpoints")
    assert 2 < saved < 24 and not (parts / "metrics.jsonl").exists()
    assert len(list((parts / "tensorboard").iterdir())) == 1
    resumed = [*JOB, "--run-dir", parts, "--resume", "--devices", DEVICES]
    finish(start(code, -1, *resumed), start(code, -1, *JOB, "--run-dir", whole))

    (ours,), (theirs,) = epochs_of(parts), epochs_of(whole)
    assert all(ours[name] == theirs[name] for name in ("step", "ranks", "train_accuracy"))
    for name in ("train_loss", "test_loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    shapes = [kernel_shapes(directory) for directory in (parts, whole)]
    assert shapes[0] == shapes[1] and shapes[0]["conv2"][-2:] != [12, 12], "arrays have shrunk at the epoch's end"
    assert json.loads((parts / "result.json").read_text())["final"]["step"] == 24


def kernel_shapes(directory):
    """The sizes of the cores in a run's last checkpoint, by layer."""
    with ocp.CheckpointManager(directory / "checkpoints", item_names=("arrays", "description")) as manager:
        arrays = manager.restore(24, args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))["arrays"]
    return {
        name.split("/")[1]: list(array.shape)
        for name, array in arrays.items()
        if name.startswith("params/") and name.endswith("/core")
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"devices": 512},
            "XLA_FLAGS=--xla_force_host_platform_device_count=512",
        ),
        ({"devices": 0}, "--devices 0: expected a number at least 1"),
        ({"process": 1}, "--process 1: say with --coordinator where the first process is"),
        ({"coordinator": "localhost"}, "--coordinator localhost: expected HOST:PORT, such as 127.0.0.1:1234, or auto"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "--process 2: expected less than the 2 of --processes"),
    ],
)
def test_options_that_cannot_work_name_the_remedy(options, words):
    with pytest.raises(ValueError, match=words):
        take_devices(DeviceConfig(**options), 64)


def test_several_processes_need_one_directory():
    with pytest.raises(ValueError, match="--coordinator: name the directory of the run"):
        TrainConfig(device=DeviceConfig(coordinator="127.0.0.1:1", processes=2, process=0))


def test_a_batch_that_devices_cannot_share_names_those_they_can():
    process = start("t.job(-1, *sys.argv[1:])", "--batch-size", "30", "--devices", 8)
    assert process.communicate(timeout=100)[1].endswith(
        "error: --batch-size 30: 8 devices cannot share it evenly; take 24 or 32\n"
    )
    assert process.returncode == 2


def test_devices_are_no_part_of_what_is_computed():
    """A run is the same run on others."""
    options = TrainConfig(device=DeviceConfig(devices=4)).to_json()
    assert options["devices"] == 4 and from_json(options).device.devices == 4


def test_evaluation_batches_are_shared_evenly():
    indices, weights = batches.evaluation_batches(30, 500, multiple=8)
    assert indices.shape == (1, 32) and weights.sum() == 30 and set(indices[0]) == set(range(30))
