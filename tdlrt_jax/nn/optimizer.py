"""``nnx.Optimizer`` and Tucker kernels: ``tdlrt`` for it, other transformations around that, other array sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx

import tdlrt_jax.capacity
import tdlrt_jax.optimizer
from tdlrt_jax.arguments import shown
from tdlrt_jax.capacity import Capacity

__all__ = ["purify", "resize", "tdlrt"]


def purify(tx: Any) -> optax.GradientTransformationExtraArgs:
    """An optax transformation around :func:`tdlrt_jax.tdlrt`, for ``nnx.Optimizer(model, tx, wrt=nnx.Param)``.

    ``nnx.Optimizer`` initializes with Variables and updates with arrays; a state whose fields hold kernels does not survive
    that. Here both are arrays. Of :func:`tdlrt_jax.tdlrt` alone, :func:`tdlrt` is this; what stands around it and keeps a tree of
    the parameters' structure itself (``optax.MultiSteps``, ``optax.ema``) is to be wrapped as a whole.

    Args:
      tx: an optax transformation, or an ``optax.MultiSteps``.

    Returns:
      An optax transformation. Where parameters come with Variables, updates do so too.

    Raises:
      ValueError: if ``tx`` is neither.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import tdlrt_jax, tdlrt_jax.nn
      >>> model = tdlrt_jax.nn.TuckerLinear(6, 5, rank=2, rngs=nnx.Rngs(0))
      >>> every = tdlrt_jax.tdlrt(optax.sgd(0.1), tolerance=0.1, integrator="parallel")
      >>> tx = tdlrt_jax.nn.purify(optax.MultiSteps(every, 2))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> step = tdlrt_jax.nn.tdlrt_step(lambda model, x: jnp.mean((model(x) - 1) ** 2))
      >>> losses = [float(step(model, optimizer, jnp.ones((3, 6))).loss) for _ in range(3)]
      >>> losses[2] < losses[1] == losses[0]
      True
    """
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise ValueError(f"tx is {shown(tx)}: expected an optax transformation")
    if isinstance(tx, optax.GradientTransformation):
        tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return tx.init(nnx.as_pure(params))

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = tx.update(nnx.as_pure(grads), nnx.as_pure(state), nnx.as_pure(params), **extra)
        treedef: Any = jax.tree.structure(params)
        return treedef.unflatten(jax.tree.leaves(updates)), state

    return optax.GradientTransformationExtraArgs(init, update)


def tdlrt(inner: optax.GradientTransformation, **options: Any) -> optax.GradientTransformationExtraArgs:
    """:func:`tdlrt_jax.tdlrt` for ``nnx.Optimizer(model, tx, wrt=nnx.Param)``, see :func:`purify`.

    Integrators with two evaluations get theirs by ``optimizer.update(model, grads, value_and_grad_fn=...)``, see
    :func:`value_and_grad_fn`.

    Args:
      inner: an optax transformation, the descent step.
      **options: of :func:`tdlrt_jax.tdlrt`, ``tolerance`` among them.

    Returns:
      An optax transformation. Where parameters come with Variables, updates do so too.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import tdlrt_jax.nn
      >>> model = tdlrt_jax.nn.TuckerLinear(6, 5, rank=2, rngs=nnx.Rngs(0))
      >>> tx = tdlrt_jax.nn.tdlrt(optax.sgd(0.1), tolerance=0.1, integrator="parallel")
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     loss_fn = lambda model, x: jnp.mean((model(x) - 1) ** 2)
      ...     loss, grads = tdlrt_jax.nn.value_and_grad(loss_fn)(model, x)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> losses = [float(step(model, optimizer, jnp.ones((3, 6)))) for _ in range(3)]
      >>> losses[2] < losses[0]
      True
    """
    return purify(tdlrt_jax.optimizer.tdlrt(inner, **options))


def resize(model: Any, optimizer: Any, capacity: Capacity | Mapping[str, Capacity]) -> None:
    """:func:`tdlrt_jax.resize` of a model and its optimizer, in place: both or, after an error, neither.

    Args:
      model: an ``nnx.Module``.
      optimizer: its ``nnx.Optimizer``; ``None`` for a model without.
      capacity: as in :func:`tdlrt_jax.resize`, for example what :func:`tdlrt_jax.fit_capacity` proposes for
        ``nnx.state(model)``.

    Raises:
      ValueError: for something else than a model or an optimizer; as :func:`tdlrt_jax.resize` does.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> import tdlrt_jax, tdlrt_jax.nn
      >>> model = tdlrt_jax.nn.TuckerLinear(64, 32, rank=8, rngs=nnx.Rngs(0))
      >>> tx = tdlrt_jax.nn.tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.1)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> tdlrt_jax.nn.resize(model, optimizer, 16)
      >>> model.kernel.get_value().core.shape, optimizer.opt_state.inner[0].trace["kernel"].core.shape
      ((16, 16), (16, 16))
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model is {shown(model)}: expected an nnx.Module")
    if not isinstance(optimizer, nnx.Optimizer | None):
        raise ValueError(f"optimizer is {shown(optimizer)}: expected the model's nnx.Optimizer, or None")
    trees = [nnx.state(model)] if optimizer is None else [nnx.state(model), optimizer.opt_state]
    resized = [tdlrt_jax.capacity.resize(nnx.as_pure(tree), capacity) for tree in trees]
    for tree, values in zip(trees, resized):
        jax.tree.map(_set_value, tree, values, is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _set_value(variable: nnx.Variable, value: Any) -> None:
    variable.set_value(value)
