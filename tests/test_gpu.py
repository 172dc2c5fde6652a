"""What has to hold on a GPU as on the CPU: ``make gpu``. In CI the comparison itself is tested."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tdlrt_jax
from tdlrt_jax import checkpoint, tdlrt, tdlrt_step, to_dense
from tests.helpers import orthonormality
from tests.test_step import loss_fn, network

INTEGRATORS = ["bug", "parallel", "fixed_rank"]


def trained_on(device, integrator, steps=10):
    """Parameters, ranks and losses after some steps on a device."""
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        params, images, labels = jax.device_put(network(), device)
        tx = tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.05, integrator=integrator)
        step, state, losses = tdlrt_step(loss_fn, tx), tx.init(params), []
        for _ in range(steps):
            params, state, info = step(params, state, images, labels)
            losses.append(float(info.loss))
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(params))
    return params, {name: np.asarray(rank).tolist() for name, rank in info.rank.items()}, losses


def compare(here, there, integrator):
    """Ranks are equal, losses and kernels up to rounding, and factors orthonormal."""
    params, rank, losses = trained_on(here, integrator)
    other, other_rank, other_losses = trained_on(there, integrator)
    assert rank == other_rank
    np.testing.assert_allclose(losses, other_losses, rtol=1e-4)
    for name in ("conv", "head"):
        kernel, counterpart = (tree["conv"] if name == "conv" else tree["head"]["kernel"] for tree in (params, other))
        dense = np.asarray(to_dense(kernel))
        np.testing.assert_allclose(dense, np.asarray(to_dense(counterpart)), atol=1e-4 * np.abs(dense).max())
        assert orthonormality(kernel) < 1e-5


def test_the_comparison_itself():
    """On the CPU alone: a device agrees with itself."""
    cpu = jax.devices("cpu")[0]
    compare(cpu, cpu, "parallel")


@pytest.mark.gpu
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_a_step_is_the_same(integrator):
    compare(jax.devices("gpu")[0], jax.devices("cpu")[0], integrator)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 3, 16, 24), (64, 48), (5, 5, 3, 8)])
def test_truncation_is_the_same(shape):
    weights = jax.random.normal(jax.random.key(0), shape)
    with jax.default_matmul_precision("highest"):
        found = [
            tdlrt_jax.hosvd(jax.device_put(weights, jax.devices(kind)[0]), tolerance=0.3) for kind in ("gpu", "cpu")
        ]
    here, there = (np.asarray(to_dense(jax.device_put(kernel, jax.devices("cpu")[0]))) for kernel in found)
    np.testing.assert_allclose(here, there, atol=1e-4)
    assert orthonormality(found[0]) < 1e-5


@pytest.mark.gpu
def test_nothing_moves_between_host_and_gpu():
    params, images, labels = network()
    tx = tdlrt(optax.adam(0.01), tolerance=0.05)
    step, state = tdlrt_step(loss_fn, tx), tx.init(params)
    params, state, _ = step(params, state, images, labels)
    with jax.transfer_guard("disallow"):
        params, state, info = step(params, state, images, labels)
    assert int(info.status) == 0


@pytest.mark.gpu
def test_a_checkpoint_of_a_gpu_is_read_on_the_cpu(tmp_path):
    params, _, _ = trained_on(jax.devices("gpu")[0], "bug", 2)
    checkpoint.save(tmp_path, 0, params)
    like = jax.device_put(jax.tree.map(jnp.zeros_like, params), jax.devices("cpu")[0])
    restored, _ = checkpoint.restore(tmp_path, like)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(params))
    assert all(leaf.devices() == {jax.devices("cpu")[0]} for leaf in jax.tree.leaves(restored))
