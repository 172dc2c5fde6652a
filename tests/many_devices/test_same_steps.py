"""Data-parallel training on JAX's own engine: the batch over the devices of a mesh, everything else on all of them."""

import pytest

from tdlrt_jax import checkpoint
from tests.many_devices.processes import DEVICES, finish, free_port, last_line, start
from tests.many_devices.programs import INTEGRATORS, NETWORKS, SAME, STEPS


@pytest.fixture(scope="module")
def on_eight():
    return last_line(*finish(start("t.eight_devices()")))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What two processes found, and where they saved."""
    directory, port = tmp_path_factory.mktemp("checkpoints"), free_port()
    code = "t.two_processes(int(sys.argv[1]), *sys.argv[2:])"
    processes = [start(code, index, port, directory, devices=2) for index in range(2)]
    return [last_line(output) for output in finish(*processes)], directory


def check_trajectory(found, dtype):
    assert found["kernels"] < SAME[dtype] and found["loss"] < SAME[dtype]
    assert found["same_ranks"] and found["alike"]
    assert len(found["ranks"]) == STEPS


@pytest.mark.parametrize("dtype", SAME)
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_eight_devices_follow_one(on_eight, integrator, dtype):
    """Kernels, losses and ranks over fifty steps; every device holds the same bits."""
    found = on_eight[f"{integrator} {dtype}"]
    check_trajectory(found, dtype)
    if integrator != "fixed_rank":
        assert len({str(ranks) for ranks in found["ranks"]}) >= 3, "they fall on the way"


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_nothing_but_sums_is_exchanged(on_eight, integrator):
    """No activation is gathered, in the one-pass second gradient neither; the sums travel together."""
    found = on_eight[f"{integrator} float32"]["collectives"]
    assert list(found) == ["all-reduce"] and found["all-reduce"] <= (3 if integrator != "fixed_rank" else 6)


def test_rows_of_large_factors_may_be_spread(on_eight):
    assert on_eight["spread"]["deviation"] < SAME["float32"]
    assert on_eight["spread"]["rows"] == [2, 2], "a quarter of the eight on each of four devices, before and after"


def test_every_network_takes_the_same_step_on_eight_devices():
    """Statistics of BatchNorm are those of the whole batch."""
    found = last_line(*finish(start("t.networks()")))
    assert found.keys() == NETWORKS.keys()
    for name, step in found.items():
        assert step["loss"] < 1e-5 and step["kernels"] < 1e-5 and step["same_ranks"] and step["alike"], name
        assert all(deviation < 1e-5 for deviation in step["statistics"]), name
        assert step["statistics"] and step["tucker"] >= 1


@pytest.mark.parametrize("dtype", SAME)
def test_two_processes_follow_one_device(of_two, dtype):
    found, _ = of_two
    assert [result["devices"] for result in found] == ["4 devices of 2 processes"] * 2
    check_trajectory(found[0][dtype], dtype)
    assert found[0][dtype]["alike"] and found[1][dtype]["alike"]
    assert found[0][dtype]["digest"] == found[1][dtype]["digest"]


def test_a_checkpoint_of_two_processes_is_written_once_and_restored_on_other_devices(of_two):
    found, directory = of_two
    assert [result["steps"] for result in found] == [[STEPS], [STEPS]] and checkpoint.all_steps(directory) == [STEPS]
    assert [path.name for path in directory.iterdir()] == [str(STEPS)]
    (restored,) = finish(start("t.restore_everywhere(*sys.argv[1:])", directory))
    expected = {"digest": found[0]["float32"]["digest"], "metadata": {"process": 0}}
    assert last_line(restored) == dict.fromkeys(("1", "2", "8"), expected)


def test_the_example_of_the_documentation_runs():
    assert last_line(*finish(start("t.docs_example()"))) == DEVICES
