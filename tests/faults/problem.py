"""A problem whose numbers can be made to go wrong one by one, in one compiled program: what is wrong is part of the batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tdlrt_jax import TuckerTensor, to_dense
from tdlrt_jax.step import find_states
from tests.helpers import random_kernel

SHAPE = (4, 3, 5)
INTEGRATORS = ("bug", "parallel", "fixed_rank")


class Batch(NamedTuple):
    """Every array has a leading axis of two, so that it can be split into micro-batches; factors multiply over it."""

    target: Any  # (2, *SHAPE), the kernel is to be their mean
    first: Any  # (2,), factor of the kernel's gradient
    second: Any  # (2,), and in the second gradient, at the augmented bases
    bias: Any  # (2,), the bias's gradient, in all entries
    loss: Any  # (2,), what is added to the loss, without a gradient


def batch(seed=0, dtype=np.float32, **wrong):
    """A batch in which nothing is wrong but what is said: ``first=np.nan``, ``bias=1e30``, ..."""
    target = np.random.default_rng(seed).normal(size=SHAPE).astype(dtype)
    good = {"target": np.stack([target, target]), "first": 1.0, "second": 1.0, "bias": 0.0, "loss": 0.0}
    factors = {name: value for name, value in (good | wrong).items() if name != "target"}
    pairs = {name: np.array([value, good[name]], dtype) for name, value in factors.items()}
    return jax.tree.map(jnp.asarray, Batch(target=(good | wrong)["target"], **pairs))


def parameters(kernel=None, dtype=jnp.float32, rank=(2, 2, 3), capacity=(3, 3, 4)):
    """A kernel and a bias."""
    kernel = random_kernel(np.random.default_rng(1), SHAPE, rank, capacity, dtype) if kernel is None else kernel
    return {"kernel": kernel, "bias": jnp.zeros(3, dtype)}


@jax.custom_vjp
def with_factor(x, factor):
    """``x``, whose gradient is multiplied by a factor."""
    del factor
    return x


def _forward(x, factor):
    return x, factor


def _backward(factor, gradient):
    return gradient * factor.astype(gradient.dtype), jnp.zeros_like(factor)


with_factor.defvjp(_forward, _backward)


def loss_fn(params, batch):
    """``||W - T||^2 / 2``, and a bias of which only the gradient is felt."""
    kernel = params["kernel"]
    again = hasattr(kernel, "U") and kernel.K is None  # the core-only frame of the second gradient
    factor = jnp.prod(batch.second if again else batch.first)
    dense = with_factor(to_dense(kernel), factor)
    bias = jnp.sum(with_factor(params["bias"], jnp.sum(batch.bias)))
    bias = bias - jax.lax.stop_gradient(bias)
    return 0.5 * jnp.sum((dense - batch.target.mean(0)) ** 2) + bias + jax.lax.stop_gradient(jnp.sum(batch.loss))


def same(a: Any, b: Any) -> bool:
    """Whether two pytrees are alike in every bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))]
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


def without_report(state: Any) -> Any:
    """An optimizer's state but for what it tells about the last step."""
    (inside,) = find_states(state)
    return jax.tree.map(
        lambda node: node._replace(status=0, skipped=0) if node is inside else node,
        state,
        is_leaf=lambda node: node is inside,
    )


def is_finite(tree: Any) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return all(np.all(np.isfinite(np.asarray(leaf, np.float64))) for leaf in leaves)


def superdiagonal(rank, capacity, values, dtype=jnp.float32, seed=2):
    """A kernel whose unfoldings all have the given singular values."""
    kernel = random_kernel(np.random.default_rng(seed), SHAPE, rank, capacity, dtype)
    core = np.zeros(kernel.core.shape)
    for i, value in enumerate(values):
        core[i, i, i] = value
    return TuckerTensor(jnp.asarray(core, dtype), kernel.factors)
