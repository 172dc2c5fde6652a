"""Checkpoints between processes: of earlier versions, continued in a fresh one, and cut off in the midst of a save."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax import checkpoint
from tdlrt_jax.nn import TuckerConv, TuckerLinear
from tdlrt_jax.paths import kernel_paths

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"


def run_python(code, *arguments):
    """A fresh Python process with this module at hand as ``t``; its environment, XLA's flags included, is this one's."""
    command = [sys.executable, "-c", f"from tests import test_checkpoint_process as t; {code}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


# A checkpoint of the first format, written by an earlier version; its sums were taken by that version.


def golden_tree(rank=2, capacity=None):
    """What the checkpoint was made of, built anew: other numbers, and other capacities if asked for."""
    keys = jax.random.split(jax.random.key(7), 2)
    params = {
        "conv": {
            "kernel": tdlrt_jax.hosvd(
                jax.random.normal(keys[0], (3, 3, 4, 6), "float32"), rank=(rank, None, rank, rank)
            ),
            "bias": jnp.zeros(6, "float32"),
        },
        "linear": {"kernel": tdlrt_jax.hosvd(jax.random.normal(keys[1], (6, 5), "float32"), rank=rank)},
    }
    if capacity is not None:
        sizes = {
            "conv/kernel": (min(3, capacity), 3, min(4, capacity), capacity),
            "linear/kernel": (capacity, capacity),
        }
        params = tdlrt_jax.resize(params, sizes)
    return {"params": params, "opt_state": golden_optimizer().init(params), "key": jax.random.key(0)}


def golden_optimizer():
    return tdlrt_jax.tdlrt(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), tolerance=0.05)


def sums(tree):
    """Every leaf's sum in float64, by path; PRNG keys left out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        tdlrt_jax.paths.path_name(path): float(np.sum(np.asarray(leaf, np.float64)))
        for path, leaf in leaves
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def golden_loss(params, x):
    hidden = jax.nn.relu(tdlrt_jax.tucker_conv(x, params["conv"]["kernel"]) + params["conv"]["bias"]).mean((1, 2))
    return jnp.mean(tdlrt_jax.tucker_linear(hidden, params["linear"]["kernel"]) ** 2)


@pytest.mark.parametrize("like", [{}, {"rank": 1}, {"rank": 2, "capacity": 5}], ids=["alike", "smaller", "larger"])
def test_a_checkpoint_of_the_first_format_keeps_loading(like):
    expected = json.loads((DATA / "checkpoint_format1.json").read_text())
    restored, metadata = checkpoint.restore(DATA / "checkpoint_format1", golden_tree(**like))
    assert sums(restored) == expected["sums"] | {"opt_state/skipped": 0.0}, "exactly, bit for bit; the count is younger"
    assert checkpoint.ranks(DATA / "checkpoint_format1") == expected["ranks"]
    ranks = {
        name: np.asarray(tdlrt_jax.active_rank(k)).tolist() for name, k in kernel_paths(restored["params"]).items()
    }
    assert {f"params/{name}": rank for name, rank in ranks.items()} == expected["ranks"]
    assert metadata["epoch"] == 1 and restored["opt_state"].budget == ()
    assert restored["key"].dtype == jax.random.key(0).dtype


def test_training_goes_on_from_a_checkpoint_of_the_first_format():
    restored, _ = checkpoint.restore(DATA / "checkpoint_format1", golden_tree(rank=1))
    step = tdlrt_jax.tdlrt_step(golden_loss, golden_optimizer(), donate=False)
    x = jax.random.normal(jax.random.key(1), (8, 5, 5, 4))
    params, state, before = step(restored["params"], restored["opt_state"], x)
    assert int(state.step) == int(restored["opt_state"].step) + 1 == 4
    assert int(before.status) == 0 and golden_loss(params, x) < before.loss


# A network that goes on in a fresh process.


class Network(nnx.Module):
    """A convolution, a normalization with statistics, a linear layer."""

    def __init__(self, rngs):
        self.conv = TuckerConv(3, 12, (3, 3), rank=8, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.linear = TuckerLinear(12, 5, rank=5, rngs=rngs)

    def __call__(self, x):
        return self.linear(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def build(seed):
    """A network built anew: the jitted step, and what it starts from."""
    graphdef, params, model_state = nnx.split(Network(nnx.Rngs(seed)), nnx.Param, ...)

    def loss_fn(params, model_state, x, y):
        network = nnx.merge(graphdef, params, model_state, copy=True)
        loss = jnp.mean((network(x) - y) ** 2)
        return loss, nnx.split(network, nnx.Param, ...)[2]

    tx = tdlrt_jax.tdlrt(optax.sgd(0.05, momentum=0.9), tolerance=0.7, integrator="parallel")
    step = tdlrt_jax.tdlrt_step(loss_fn, tx, has_state=True, donate=False)
    return step, {"params": params, "opt_state": tx.init(params), "model_state": model_state}


def advance(step, tree, steps):
    """Trains on batches that the step's number decides."""
    for _ in range(steps):
        x, y = np.random.default_rng(int(tree["opt_state"].step)).normal(size=(2, 8 * 4 * 4 * 3)).astype(np.float32)
        batch = x.reshape(8, 4, 4, 3), y[:40].reshape(8, 5)
        params, opt_state, model_state, _ = step(tree["params"], tree["opt_state"], tree["model_state"], *batch)
        tree = {"params": params, "opt_state": opt_state, "model_state": model_state}
    return tree


def go_on(directory):
    """What the fresh process does: a new network of other numbers and larger arrays, the checkpoint, three steps, another."""
    step, tree = build(seed=99)
    tree, metadata = checkpoint.restore(directory, tree)
    assert metadata == {"note": "shrunken"}
    checkpoint.save(directory, 5, advance(step, tree, 3))


def test_a_fresh_process_goes_on_bit_for_bit(tmp_path):
    """With arrays that shrank before the save; momentum, statistics and ranks included."""
    step, tree = build(seed=0)
    tree = advance(step, tree, 2)
    larger = {name: kernel.core.shape for name, kernel in kernel_paths(tree["params"]).items()}
    wanted = tdlrt_jax.fit_capacity(tree["params"], multiple=1, headroom=1.0, hysteresis=1.0)
    tree = tree | {name: tdlrt_jax.resize(tree[name], wanted) for name in ("params", "opt_state")}
    assert all(np.prod(wanted[name]) < np.prod(larger[name]) for name in larger)
    checkpoint.save(tmp_path, 2, tree, {"note": "shrunken"})

    process = run_python("import sys; t.go_on(sys.argv[1])", tmp_path)
    assert process.returncode == 0, process.stderr
    here = advance(step, tree, 3)
    there, _ = checkpoint.restore(tmp_path, build(seed=1)[1], 5)
    assert jax.tree.structure(there) == jax.tree.structure(here)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(here), jax.tree.leaves(there), strict=True):
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), jax.tree_util.keystr(path)
    kernels = kernel_paths(here["params"])
    assert {name: kernel.core.shape for name, kernel in kernels.items()} == wanted


# A save that is cut off: the process is killed, as by a machine that goes down.


def large_tree(value):
    """Large enough that arrays have files of their own."""
    return {"x": jnp.full((300, 400), float(value)), "kernel": tdlrt_jax.hosvd(jnp.eye(6) * value, rank=3)}


def save_and_die(directory, last):
    """Saves step 4 and kills itself at the ``last``-th directory made, file opened or name changed; how many there were if not.

    Runs in a fork of its own, made before anything of JAX has started.
    """
    events = 0

    def count(event, arguments):
        nonlocal events
        mine = event in ("os.mkdir", "os.rename", "open") and str(directory) in str(arguments)
        events += mine
        if mine and events == last:
            os.kill(os.getpid(), signal.SIGKILL)

    tree = large_tree(4)
    sys.addaudithook(count)
    checkpoint.save(directory, 4, tree)
    return events


def die_at_several_moments(directory):
    """Counts the events of a save that goes through, then dies at some of them, the last one among them; prints which."""

    def in_a_fork(name, last):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, str(save_and_die(Path(directory) / name, last)).encode())
            os._exit(0)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), os.read(reading, 100)

    code, count = in_a_fork("whole", None)
    assert code == 0
    total = int(count)
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        last = 1 + round(part * (total - 1))
        code, _ = in_a_fork(f"{part}", last)
        print(json.dumps({"name": f"{part}", "events": total, "last": last, "code": code}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_in_a_save_leaves_the_checkpoint_before(tmp_path):
    names = ["whole", "0.0", "0.25", "0.5", "0.75", "1.0"]
    for name in names:
        checkpoint.save(tmp_path / name, 3, large_tree(3))
    process = run_python("import sys; t.die_at_several_moments(sys.argv[1])", tmp_path)
    assert process.returncode == 0, process.stderr
    runs = [json.loads(line) for line in process.stdout.splitlines()]
    assert [run["name"] for run in runs] == names[1:] and len({run["last"] for run in runs}) == len(runs)
    assert all(run["code"] == -signal.SIGKILL for run in runs)
    assert checkpoint.all_steps(tmp_path / "whole") == [3, 4]

    for name in names[1:]:
        directory = tmp_path / name
        # At the very last event the new one may be complete; a step that is listed is complete in any case.
        steps = checkpoint.all_steps(directory)
        assert steps == [3] or (name == "1.0" and steps == [3, 4])
        for step in steps:
            restored, _ = checkpoint.restore(directory, large_tree(0), step)
            jax.tree.map(np.testing.assert_array_equal, restored, large_tree(step))
        checkpoint.save(directory, 5, large_tree(5))
        assert checkpoint.all_steps(directory) == [*steps, 5]
        leftovers = [path.name for path in directory.iterdir() if not path.name.isdigit()]
        assert leftovers == [], "what was cut off is cleaned up by the next save"
