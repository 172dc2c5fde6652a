"""The compiled programs of a job: one training step, and evaluation.

A step makes its batch itself and is dispatched without waiting for the one before. On a CPU that is done step by step and not
in a loop of the program's own, in whose body XLA's CPU convolutions are not the fast ones. On an accelerator, where handing a
program hundreds of arrays takes the host as long as the step takes the device, one call takes several steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import tdlrt_jax
from experiments.run.batches import DeviceImages, Transform, evaluation_batches, standardize, training_batch
from experiments.run.devices import ONE_DEVICE, Devices
from experiments.run.memory import forget_traces
from experiments.run.metrics import correct, cross_entropy
from tdlrt_jax.status import SKIPPED

__all__ = ["Programs", "StepReport", "TrainState", "build_programs", "memory_of"]


Integer = Array | np.int32
_KEPT = 2  # compiled programs of a kind


class TrainState(NamedTuple):
    """All that training changes."""

    params: Any
    opt_state: Any
    model_state: Any  # BatchNorm statistics, random counters
    healthy: Array  # bool; False from a step on that was left out, and then nothing moves until the host has seen to it


class StepReport(NamedTuple):
    """What the host wants to know of a step; scalars on the device, or with an axis for the steps of one call."""

    loss: Array  # float32, mean over the batch
    correct: Array  # int32, of the batch
    finite: Array  # bool; where not, the state is left as it was before the step, and so by the steps after it
    status: Array  # int32, see tdlrt_jax.describe_status


class Programs:
    """``train(state, data, order, epoch, step)``, ``train_several(..., count=n)`` and ``evaluate(state, data)``.

    ``train`` compiles for every new set of array sizes, that is where capacities change, and keeps the last two programs and
    none of their traces: each takes megabytes of the host's memory, and sizes seldom come back.

    Args:
      step: what ``train`` compiles.
      evaluate: as called.
      devices: that share every batch.
      between: a step to be taken in the place of ``step`` where ``train(..., whole=False)``; the same by default.
      at_once: steps that one call may take; with more than one, ``step`` is compiled in a loop.
      compiler_options: of :func:`jax.jit`, for the steps.
    """

    def __init__(
        self,
        step: Callable[..., tuple[TrainState, StepReport]],
        evaluate: Callable[..., tuple[float, float]],
        devices: Devices = ONE_DEVICE,
        between: Callable[..., tuple[TrainState, StepReport]] | None = None,
        at_once: int = 1,
        compiler_options: dict[str, Any] | None = None,
    ):
        self.evaluate, self.at_once = evaluate, at_once
        self.compilations = 0
        self.compile_seconds = 0.0
        self.memory: dict[str, int] = {}  # bytes of the last compiled step, a whole one if there is one, see memory_of
        # Said, since the partitioner might leave a part of the state where it was computed.
        steps = {True: step} if between is None else {True: step, False: between}
        self._steps = {
            whole: jax.jit(
                step if at_once == 1 else _several(step, at_once),
                donate_argnums=0,
                out_shardings=devices.same,
                compiler_options=compiler_options,
            )
            for whole, step in steps.items()
        }
        # By what is compiled and the sizes of arrays, the one used last at the end.
        self._compiled: dict[Any, Any] = {}

    def train(
        self, state: TrainState, data: DeviceImages, order: Array, epoch: Integer, index: Integer, *, whole: bool = True
    ) -> tuple[TrainState, StepReport]:
        """One step; dispatched, not waited for."""
        state, report = self.train_several(state, data, order, epoch, index, 1, whole=whole)
        return state, jax.tree.map(lambda leaf: leaf[0], report) if self.at_once > 1 else report

    def train_several(
        self,
        state: TrainState,
        data: DeviceImages,
        order: Array,
        epoch: Integer,
        index: Integer,
        count: int,
        *,
        whole: bool = True,
    ) -> tuple[TrainState, StepReport]:
        """``count <= at_once`` steps of one kind; dispatched, not waited for.

        Returns:
          The state, and the report; if ``at_once`` is more than one, of so many steps, the first ``count`` of which were taken.
        """
        whole = whole or False not in self._steps
        key = whole, tuple(leaf.shape for leaf in jax.tree.leaves((state, order)))
        arguments = (state, data, order, epoch, index) + ((np.int32(count),) if self.at_once > 1 else ())
        if key not in self._compiled:
            self._compile(key, *arguments)
        program = self._compiled[key] = self._compiled.pop(key)
        while len(self._compiled) > _KEPT * len(self._steps):
            del self._compiled[next(iter(self._compiled))]
        return program(*arguments)

    def _compile(self, key: tuple[bool, Any], *arguments: Any) -> None:
        """Compiles the step that is asked for, and at the same time the other kind for the same arrays, which comes next."""
        started = time.monotonic()
        keys = [(whole, key[1]) for whole in self._steps if (whole, key[1]) not in self._compiled]
        # Traced here, since JAX's contexts are a thread's own.
        lowered = [self._steps[whole].lower(*arguments) for whole, _ in keys]
        with ThreadPoolExecutor() as threads:
            for (whole, shapes), program in zip(keys, threads.map(lambda program: program.compile(), lowered)):
                self._compiled[whole, shapes] = program
                self.compilations += 1
                if whole or not self.memory:
                    self.memory = memory_of(program)
        self.compile_seconds += time.monotonic() - started
        if self.compilations > len(keys):
            forget_traces()


def _several(step: Callable[..., tuple[TrainState, StepReport]], at_once: int) -> Callable[..., Any]:
    """As many of the steps in a row as the last argument says, up to ``at_once``, in one program."""

    def steps(
        state: TrainState, data: DeviceImages, order: Array, epoch: Array, index: Array, count: Array
    ) -> tuple[TrainState, StepReport]:
        def one(number: Array, carried: tuple[TrainState, StepReport]) -> tuple[TrainState, StepReport]:
            state, reports = carried
            state, report = step(state, data, order, epoch, index + number)
            return state, jax.tree.map(lambda all_, now: all_.at[number].set(now), reports, report)

        shapes = jax.eval_shape(step, state, data, order, epoch, index)[1]
        reports = jax.tree.map(lambda leaf: jnp.zeros((at_once, *leaf.shape), leaf.dtype), shapes)
        return jax.lax.fori_loop(0, count, one, (state, reports))

    return steps


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes on the device as the compiler plans them: ``peak`` of a step, its arguments (data set included) and temporaries."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    arguments, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {"peak": arguments + temporary + new, "arguments": arguments, "temporaries": temporary}


def build_programs(
    model: nnx.Module,
    tx: optax.GradientTransformationExtraArgs,
    transform: Transform,
    *,
    seed: int,
    adaptive: bool = True,
    between: Literal["cores", "bases"] | None = None,
    evaluation_batch: int = 500,
    devices: Devices = ONE_DEVICE,
    at_once: int = 1,
) -> tuple[Programs, TrainState]:
    """The programs of a network, and its state at the start.

    Args:
      model: freshly built.
      tx: the optimizer.
      transform: what happens to images on their way.
      seed: of the augmentation.
      adaptive: whether ``tx`` is :func:`tdlrt_jax.tdlrt`, which moves kernels in Tucker format by an integrator; otherwise
        gradients are the plain ones of all arrays.
      between: what the steps of ``train(..., whole=False)`` move, if there are such: the cores alone, or bases too, at ranks
        that stay.
      evaluation_batch: images evaluated at a time.
      devices: that share every batch. The state comes on the default device, to be replicated by the caller.
      at_once: steps that one call may take.
    """
    model.eval()
    still, _, _ = _split(model)
    model.train()
    graphdef, params, model_state = _split(model)

    def loss_fn(params: Any, model_state: Any, images: Array, labels: Array) -> tuple[Array, tuple[Any, Array]]:
        network = nnx.merge(graphdef, params, model_state, copy=True)
        logits = network(images)
        _, _, new_model_state = _split(network)
        hits = jnp.sum(correct(logits, labels), dtype=jnp.int32)
        return jnp.mean(cross_entropy(logits, labels)), (new_model_state, hits)

    def step_of(**kind: Any) -> Callable[..., tuple[Any, Any, Any, Array, Array, Array]]:
        """``advance(params, opt_state, model_state, *batch)``: new ones; loss, hits and status of the step."""
        inner = tdlrt_jax.tdlrt_step(loss_fn, tx, has_aux=True, has_state=True, donate=False, **kind)

        def advance(params: Any, opt_state: Any, model_state: Any, *batch: Array) -> tuple:
            params, opt_state, model_state, info = inner(params, opt_state, model_state, *batch)
            return params, opt_state, model_state, info.loss, info.aux, info.status

        return advance

    def plain(
        params: Any, opt_state: Any, model_state: Any, *batch: Array
    ) -> tuple[Any, Any, Any, Array, Array, Array]:
        (loss, (model_state, hits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, model_state, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state, model_state, loss, hits, jnp.int32(0)

    def share(batch: tuple[Array, ...]) -> tuple[Array, ...]:
        """Every device makes and computes its own part of a batch."""
        return batch if devices.spread is None else jax.lax.with_sharding_constraint(batch, devices.spread)

    def step(
        advance: Callable[..., Any], state: TrainState, data: DeviceImages, order: Array, epoch: Array, index: Array
    ) -> tuple[TrainState, StepReport]:
        batch = share(training_batch(data, order, transform, seed, epoch, index))
        params, opt_state, model_state, loss, hits, status = advance(
            state.params, state.opt_state, state.model_state, *batch
        )
        finite = jnp.isfinite(loss) & (status & SKIPPED == 0) & _all_finite(params)
        healthy = state.healthy & finite
        after = TrainState(params, opt_state, model_state, healthy)
        # Not a selection leaf by leaf, see tdlrt_jax.optimizer.
        kept = jax.lax.cond(healthy, lambda: after, lambda: state._replace(healthy=healthy))
        return kept, StepReport(loss, hits, finite, status)

    @partial(jax.jit, compiler_options=tdlrt_jax.compiler_options())
    def evaluate_batch(
        params: Any, model_state: Any, data: DeviceImages, indices: Array, weights: Array
    ) -> tuple[Array, Array]:
        network = nnx.merge(still, params, model_state, copy=True)
        images, labels = share((standardize(data.images[indices], transform), data.labels[indices]))
        logits = network(images)
        hits = jnp.sum(correct(logits, labels) & (weights > 0), dtype=jnp.int32)
        return jnp.sum(cross_entropy(logits, labels) * weights), hits

    def evaluate(state: TrainState, data: DeviceImages) -> tuple[float, float]:
        """Mean loss and accuracy over all images, each counted once."""
        count = data.labels.shape[0]
        batches = zip(*evaluation_batches(count, evaluation_batch, devices.count))
        parts = [evaluate_batch(state.params, state.model_state, data, *batch) for batch in batches]
        losses, hits = zip(*jax.device_get(parts))
        return sum(map(float, losses)) / count, sum(map(int, hits)) / count

    kinds = {"cores": "cores_only", "bases": "ranks_stay"}
    whole = step_of() if adaptive else plain
    frequent = None if between is None else partial(step, step_of(**{kinds[between]: True}))
    # Steps of other methods compile in seconds as it is.
    options = tdlrt_jax.compiler_options(runs_often=not adaptive)
    programs = Programs(partial(step, whole), evaluate, devices, frequent, at_once, options)
    start = TrainState(params, tx.init(params), model_state, jnp.bool_(True))
    # Every leaf its own buffer: the step donates its state, and no buffer can be given away twice.
    return programs, jax.tree.map(jnp.copy, start)


def _split(model: nnx.Module) -> tuple[Any, Any, Any]:
    """The static part of a network, its parameters, and the rest of its state."""
    parts: Any = nnx.split(model, nnx.Param, ...)
    return parts


def _all_finite(tree: Any) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
