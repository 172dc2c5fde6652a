"""Checkpoints: exact round trips, other capacities, true ranks, and errors that name the leaf."""

import gc
import inspect
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax import TuckerTensor, checkpoint


def network(seed=0, rank=2, capacity=None, features=5):
    """Parameters with two kernels of rank ``rank`` and some dense leaves."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "conv": {
            "kernel": tdlrt_jax.hosvd(jax.random.normal(keys[0], (3, 3, 4, features)), rank=(None, None, rank, rank)),
            "bias": jnp.arange(float(features)),
        },
        "linear": {"kernel": tdlrt_jax.hosvd(jax.random.normal(keys[1], (8, 6)), rank=rank)},
        "scale": jax.random.normal(keys[2], (), "float32"),
    }
    return params if capacity is None else tdlrt_jax.resize(params, {"linear/kernel": (capacity, capacity)})


def optimizer():
    return tdlrt_jax.tdlrt(optax.chain(optax.adam(0.01), optax.contrib.reduce_on_plateau()), tolerance=0.1)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def saved(tmp_path):
    params = network()
    tree = {"params": params, "opt_state": optimizer().init(params)}
    checkpoint.save(tmp_path, 3, tree, {"epoch": 1, "sums": [0.1, 0.2]})
    return tmp_path, tree


def test_round_trip_is_exact(saved):
    directory, tree = saved
    fresh = network(seed=1)
    restored, metadata = checkpoint.restore(directory, {"params": fresh, "opt_state": optimizer().init(fresh)})
    assert_equal(restored, tree)
    assert metadata == {"epoch": 1, "sums": [0.1, 0.2]}


def test_whole_modes_stay_whole(saved):
    directory, tree = saved
    restored, _ = checkpoint.restore(directory, tree)
    assert restored["params"]["conv"]["kernel"].factors[:2] == (None, None)


def test_abstract_target(saved):
    directory, tree = saved
    restored, _ = checkpoint.restore(directory, jax.eval_shape(lambda: tree))
    assert_equal(restored, tree)


def test_ranks_are_the_true_ones_and_only_of_kernels(tmp_path):
    params = network(rank=2, capacity=5)
    assert params["linear"]["kernel"].core.shape == (5, 5)
    checkpoint.save(tmp_path, 0, {"params": params, "opt_state": optimizer().init(params)})
    assert checkpoint.ranks(tmp_path) == {"params/conv/kernel": [3, 3, 2, 2], "params/linear/kernel": [2, 2]}


@pytest.mark.parametrize("capacity", [1, 6])
def test_other_capacity_comes_back_as_stored_then_resizes(saved, capacity):
    directory, tree = saved
    fresh = network(seed=1, rank=1, capacity=capacity)
    like = {"params": fresh, "opt_state": optimizer().init(fresh)}
    restored, _ = checkpoint.restore(directory, like)
    assert_equal(restored, tree)

    larger = tdlrt_jax.resize(restored, {"conv/kernel": (3, 3, 3, 3), "linear/kernel": (4, 4)})
    assert larger["params"]["linear"]["kernel"].core.shape == (4, 4)
    assert larger["opt_state"].inner[0][0].mu["linear"]["kernel"].core.shape == (4, 4)
    for name in ("conv", "linear"):
        np.testing.assert_allclose(
            tdlrt_jax.to_dense(larger["params"][name]["kernel"]),
            tdlrt_jax.to_dense(tree["params"][name]["kernel"]),
            atol=1e-6,
        )


def test_training_continues_as_if_never_stopped(tmp_path):
    tx, x = optimizer(), jnp.ones((4, 8))

    def loss_fn(params, x):
        return jnp.mean((tdlrt_jax.tucker_linear(x, params["kernel"]) - params["bias"]) ** 2)

    def fresh(seed):
        return {"kernel": tdlrt_jax.hosvd(jax.random.normal(jax.random.key(seed), (8, 6)), rank=3), "bias": jnp.ones(6)}

    step = tdlrt_jax.tdlrt_step(loss_fn, tx, donate=False)
    params = fresh(0)
    state = tx.init(params)
    for index in range(4):
        if index == 2:
            checkpoint.save(tmp_path, index, (params, state))
        params, state, _ = step(params, state, x)
    like = fresh(1)
    (other, other_state), _ = checkpoint.restore(tmp_path, (like, tx.init(like)))
    for _ in range(2):
        other, other_state, _ = step(other, other_state, x)
    assert_equal((other, other_state), (params, state))


def test_nnx_state_with_random_keys(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)
            self.linear.kernel = nnx.Param(tdlrt_jax.hosvd(self.linear.kernel[...], rank=1))
            self.blocks = nnx.List([nnx.BatchNorm(2, rngs=rngs)])
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    _, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    checkpoint.save(tmp_path, 0, {"params": params, "rest": rest})
    _, other_params, other_rest = nnx.split(Net(nnx.Rngs(5)), nnx.Param, ...)
    restored, _ = checkpoint.restore(tmp_path, {"params": other_params, "rest": other_rest})
    data = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for tree in (restored, {"params": params, "rest": rest})
        for leaf in jax.tree.leaves(tree)
    ]
    half = len(data) // 2
    for left, right in zip(data[:half], data[half:]):
        np.testing.assert_array_equal(left, right)
    keys = [tree["dropout"]["rngs"]["key"][...] for tree in (restored["rest"], rest)]
    assert keys[0].dtype == keys[1].dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "bool", "float32"])
def test_dtypes(tmp_path, dtype):
    tree = {"x": jnp.asarray([0, 1, 1], dtype)}
    checkpoint.save(tmp_path, 0, tree)
    assert_equal(checkpoint.restore(tmp_path, tree)[0], tree)


def test_float64(tmp_path, x64):
    tree = {"x": jnp.asarray([1 / 3, 1e-300])}
    checkpoint.save(tmp_path, 0, tree)
    assert_equal(checkpoint.restore(tmp_path, tree)[0], tree)
    with pytest.raises(ValueError, match="'x' has dtype float64, the given tree float32"):
        checkpoint.restore(tmp_path, {"x": jnp.zeros(2, jnp.float32)})


def test_keeps_the_last_ones_and_restores_any(tmp_path):
    for step in (1, 2, 5, 9):
        checkpoint.save(tmp_path, step, {"x": jnp.full(2, float(step))}, keep=2)
    assert checkpoint.all_steps(tmp_path) == [5, 9]
    assert checkpoint.restore(tmp_path, {"x": jnp.zeros(2)})[0]["x"][0] == 9
    assert checkpoint.restore(tmp_path, {"x": jnp.zeros(2)}, 5)[0]["x"][0] == 5
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 1 .* there are \[5, 9\]"):
        checkpoint.restore(tmp_path, {"x": jnp.zeros(2)}, 1)


def test_a_step_is_not_overwritten(saved):
    directory, tree = saved
    with pytest.raises(ValueError, match="step=3 has a checkpoint already"):
        checkpoint.save(directory, 3, tree)
    with pytest.raises(ValueError, match="step=-1"):
        checkpoint.save(directory, -1, tree)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_an_interrupted_save_leaves_the_earlier_one(saved, monkeypatch):
    """Everything is written under a temporary name: cut off before the final rename, it is no checkpoint."""
    directory, tree = saved

    def cut_off(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "save", cut_off)
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", cut_off, raising=False)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(directory, 4, tree)
    monkeypatch.undo()
    assert checkpoint.all_steps(directory) == [3]
    assert_equal(checkpoint.restore(directory, tree)[0], tree)
    checkpoint.save(directory, 4, tree, keep=2)
    assert sorted(path.name for path in directory.iterdir()) == ["3", "4"], "leftovers are cleaned up"


def test_restoring_wraps_no_functions(saved):
    """JAX keeps every function that it has wrapped, with its signature; training that saves often must not pile them up."""
    directory, tree = saved

    def signatures():
        checkpoint.restore(directory, tree)
        gc.collect()
        return sum(isinstance(found, inspect.Signature) for found in gc.get_objects())

    signatures()
    assert signatures() == signatures()


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.all_steps(tmp_path / "nothing") == []
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.restore(tmp_path / "nothing", {"x": jnp.zeros(2)})


def without(tree, *path):
    *parents, last = path
    copy = jax.tree.map(lambda leaf: leaf, tree)
    node = copy
    for key in parents:
        node = node[key]
    del node[last]
    return copy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda p: without(p, "conv", "bias"),
            "without a place for it in the given tree, leaf 'params/conv/bias': was it saved from another model",
        ),
        (lambda p: p | {"extra": jnp.zeros(3)}, "lacks leaf 'params/extra': was it saved from another model"),
        (lambda p: p | {"scale": jnp.zeros(2)}, r"'params/scale' has shape \(\), the given tree \(2,\)"),
        (
            lambda p: p | {"scale": jnp.zeros((), jnp.int32)},
            "'params/scale' has dtype float32, the given tree int32: build it with",
        ),
        (lambda p: network(features=6), r"'params/conv/(bias|kernel/.*)' has shape"),
        (
            lambda p: p | {"linear": {"kernel": tdlrt_jax.hosvd(jnp.ones((8, 7)), rank=2)}},
            r"'params/linear/kernel/factors/1' has shape \(6, 2\), the given tree \(7, 2\)",
        ),
        (
            lambda p: p | {"linear": {"kernel": TuckerTensor(jnp.ones((2, 6)), (jnp.ones((8, 2)), None))}},
            "without a place for it in the given tree, leaf 'params/linear/kernel/factors/1'",
        ),
        (
            lambda p: p | {"linear": {"kernel": jnp.zeros((8, 6))}},
            "lacks leaf 'params/linear/kernel'",
        ),
    ],
    ids=["left over", "missing", "shape", "dtype", "features", "mode size", "whole mode", "dense kernel"],
)
def test_errors_name_the_leaf(saved, change, words):
    directory, tree = saved
    like = {"params": change(tree["params"]), "opt_state": tree["opt_state"]}
    with pytest.raises(ValueError, match=words):
        checkpoint.restore(directory, like)


def test_damaged_array_is_found_and_named(saved, monkeypatch):
    directory, tree = saved
    original = ocp.StandardCheckpointHandler.restore

    def flipped(self, *args, **kwargs):
        arrays = original(self, *args, **kwargs)
        bits = np.array(arrays["params/conv/bias"])
        bits.view(np.uint32)[2] ^= 1  # one bit of one number
        return {**arrays, "params/conv/bias": bits}

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", flipped)
    with pytest.raises(ValueError, match="damaged: leaf 'params/conv/bias': not what was saved"):
        checkpoint.restore(directory, tree)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of threads inside orbax that give up
@pytest.mark.parametrize("what", ["arrays", "manifest", "description", "metadata"])
def test_damaged_files_are_reported(saved, what):
    directory, tree = saved
    checkpoint.save(directory, 4, tree)
    folder = directory / "4"
    files = {
        "arrays": [path for path in (folder / "arrays").rglob("*") if path.is_file() and path.parent.name == "d"],
        "manifest": list((folder / "arrays").rglob("manifest.ocdbt")),
        "description": [path for path in (folder / "description").iterdir() if path.name == "metadata"],
        "metadata": [folder / "arrays" / "_METADATA"],
    }[what]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"checkpoint 4 in .* is damaged.*another one: \[3\]"):
        checkpoint.restore(directory, tree)
    assert_equal(checkpoint.restore(directory, tree, 3)[0], tree)
    shutil.rmtree(folder)
    assert_equal(checkpoint.restore(directory, tree)[0], tree)


def test_two_leaves_with_one_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        checkpoint.save(tmp_path, 0, {"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)})


def test_arrays_without_entries_and_trees_without_arrays(tmp_path):
    """Orbax stores neither."""
    for step, tree in enumerate([{"x": jnp.zeros((0, 3), jnp.bfloat16), "y": jnp.ones(2)}, {"x": jnp.zeros(0)}, {}]):
        checkpoint.save(tmp_path, step, tree, {"epoch": 1})
        restored, metadata = checkpoint.restore(tmp_path, tree)
        assert_equal(restored, tree)
        assert metadata == {"epoch": 1}
    with pytest.raises(ValueError, match=r"'x' has shape \(0,\), the given tree \(3,\)"):
        checkpoint.restore(tmp_path, {"x": jnp.zeros(3)}, 1)


def test_numpy_s_numbers_stay_what_they_are(tmp_path):
    """64 bits are not JAX's by default, where a file of them would be a file of other numbers."""
    tree = {"counts": np.array([2**40 + 1, -3]), "sums": np.array([0.1, 1e300]), "last": np.float64(1e-300)}
    checkpoint.save(tmp_path, 1, tree)
    restored, _ = checkpoint.restore(tmp_path, jax.tree.map(np.zeros_like, tree))
    for name, leaf in tree.items():
        assert isinstance(restored[name], np.ndarray | np.generic) and restored[name].dtype == leaf.dtype
        np.testing.assert_array_equal(restored[name], leaf)


def test_numpy_s_numbers_of_earlier_checkpoints_come_back(tmp_path):
    """Those held what JAX makes of them."""
    checkpoint.save(tmp_path, 1, {"count": jnp.array([7, 8])})
    restored, _ = checkpoint.restore(tmp_path, {"count": np.zeros(2, np.int64)})
    assert restored["count"].dtype == np.int64 and restored["count"].tolist() == [7, 8]


@pytest.mark.parametrize("number", [2**32 - 1, -(2**31) - 1, 1e300])
def test_a_python_number_that_does_not_fit_is_named(tmp_path, number):
    with pytest.raises(ValueError, match=r"'a/seed', .* does not hold: give a NumPy number, .* np\.(int|float)64"):
        checkpoint.save(tmp_path, 1, {"a": {"seed": number}})
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path, 1, {"a": {"seed": type(number)(2**31 - 1)}, "worst": float("inf"), "flag": True})


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_what_builds_a_state_with_a_key_is_enough_to_restore_it(tmp_path, impl):
    def build():
        return {"key": jax.random.key(3, impl=impl), "weights": jnp.ones(2)}

    checkpoint.save(tmp_path, 1, build())
    restored, _ = checkpoint.restore(tmp_path, jax.eval_shape(build))
    assert restored["key"].dtype == build()["key"].dtype
    np.testing.assert_array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(build()["key"]))
    np.testing.assert_array_equal(restored["weights"], 1)


def test_a_budget_of_an_earlier_version_looks_as_if_it_had_at_step_0(tmp_path, monkeypatch):
    """Such a checkpoint lacks the step of the last look."""
    params = network()
    tx = tdlrt_jax.tdlrt(optax.sgd(0.1), tolerance=tdlrt_jax.Budget(0.5, steps=10))
    state = tx.init(params)
    state = state._replace(budget=state.budget._replace(look=jnp.int32(4)))
    named = tdlrt_jax.checkpoint.store.named_leaves
    with monkeypatch.context() as patch:
        patch.setattr(
            tdlrt_jax.checkpoint.store,
            "named_leaves",
            lambda tree: {name: leaf for name, leaf in named(tree).items() if not name.endswith("budget/look")},
        )
        checkpoint.save(tmp_path, 1, state)
    restored, _ = checkpoint.restore(tmp_path, tx.init(params))
    assert int(restored.budget.look) == 0 and restored.budget.look.dtype == jnp.int32
    assert_equal(restored.budget.ceiling, state.budget.ceiling)


def test_a_partition_by_labels_a_leaf_comes_back(tmp_path):
    """Its parts hold kernels without arrays, of the other labels' parameters."""
    rng = np.random.default_rng(0)
    params = {"w": tdlrt_jax.hosvd(jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), rank=3), "b": jnp.zeros(6)}
    labels = jax.tree.map(lambda leaf: "matrices" if leaf.ndim > 1 else "vectors", params)
    inner = optax.partition({"matrices": optax.sgd(0.1, momentum=0.9), "vectors": optax.adam(1e-2)}, labels)
    for tx in (inner, tdlrt_jax.tdlrt(inner, tolerance=0.3)):
        directory, tree = tmp_path / type(tx.init(params)).__name__, (params, tx.init(params))
        checkpoint.save(directory, 1, tree)
        restored, _ = checkpoint.restore(directory, tree)
        jax.tree.map(np.testing.assert_array_equal, restored, tree)
