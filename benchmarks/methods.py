"""One training step of every way to train that is compared, compiled and ready to run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import tdlrt_jax
from benchmarks.networks import Network, build, images, loss_of
from benchmarks.paper_step import paper_step
from experiments.run import programs
from experiments.run.devices import on_the_host, onto_the_device

__all__ = ["AMORTIZED", "JAX_METHODS", "TrainingStep", "memory_of", "step_of", "tree_bytes"]

AMORTIZED = 10  # bases and ranks move every so many steps
# Below it nothing is cut but what the arrays have no room for: ranks stay at their capacities, so every step has all its work.
TOLERANCE = 1e-3
PLAIN = ("dense", "dense_xla", "factorized", "factorized_at_rank")  # without TDLRT
JAX_METHODS = {
    "dense": "dense, with a matrix product where XLA's convolution is slow",
    "dense_xla": "dense, flax as it comes",
    "factorized": "Tucker-factorized: plain gradients of core and factors, layers one after the other",
    "factorized_at_rank": "the same with its normalizations at the kernels' ranks, as all below have them but the last",
    "bug": "TDLRT, Algorithm 1 in one forward and one backward pass",
    "parallel": "TDLRT, one gradient a step",
    "fixed_rank": "TDLRT, Algorithm 1 not adaptive (two passes)",
    "amortized": f"TDLRT, Algorithm 1 every {AMORTIZED} steps, between them steps of the cores alone (cores_only)",
    "amortized_at_once": f"the same, the {AMORTIZED - 1} steps between two adaptations handed to the device at once",
    "amortized_turning": f"TDLRT, Algorithm 1 every {AMORTIZED} steps, between them steps at ranks that stay (ranks_stay)",
    "amortized_turning_at_once": f"the same, the {AMORTIZED - 1} steps between two adaptations handed to the device at once",
    "dense_at_once": f"dense, {AMORTIZED} steps handed to the device at once",
    "cores_only": "TDLRT, steps of the cores alone by themselves",
    "ranks_stay": "TDLRT, steps at ranks that stay by themselves: bases turn, without eigenproblems",
    "amortized_in_one": f"TDLRT, Algorithm 1 every {AMORTIZED} steps in one program (adapt_every)",
    "bug_second_pass": "TDLRT, Algorithm 1 with a second pass",
    "paper": "TDLRT as the paper writes it: one pass for each factor and one for the core",
}


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) in a pytree, as they lie on the device."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes that the compiler plans for a program: its temporaries, and its peak with all arguments and results."""
    found = programs.memory_of(compiled)
    return {"temporary_bytes": found["temporaries"], "peak_bytes": found["peak"]} if found else {}


class TrainingStep:
    """A compiled training step of a method, with its state; ``run()`` takes one and waits for it."""

    def __init__(
        self,
        network: Network,
        method: str,
        *,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        compiler_options: Mapping[str, Any] | None = None,
        compile: Callable[..., Callable[[], Any]] | None = None,
    ):
        """Builds the network, its state and the step's programs.

        Args:
          network, method: what is trained, and how.
          learning_rate, momentum: of the descent.
          compiler_options: of this machine's compiler; default: :func:`tdlrt_jax.compiler_options`, as the main job has them.
          compile: ``compile(function, arguments)``, which traces a step and returns what compiles it; default: for this machine.
        """
        chosen: Mapping[str, Any] = tdlrt_jax.compiler_options(runs_often=method in PLAIN)
        self.compiler_options = dict(chosen if compiler_options is None else compiler_options)
        self._lower = compile or self._for_here
        self.host_bytes = 0  # by which compiling made the process' peak of memory grow
        ordinary = method in ("factorized", "paper")
        # What is run beside a first program, and whether a call takes several steps of it.
        between = {"amortized": "cores_only", "amortized_turning": "ranks_stay"}.get(method.removesuffix("_at_once"))
        at_once = method.endswith("_at_once")
        usual = "bug" if between else method.removesuffix("_at_once")
        kind = usual if method.startswith("dense") else "tucker_ordinary" if ordinary else "tucker"
        with on_the_host():
            parts: Any = nnx.split(build(network, kind), nnx.Param, ...)
            graphdef, params, model_state = parts[0], nnx.as_pure(parts[1]), nnx.as_pure(parts[2])
            loss_fn, inner = loss_of(graphdef), optax.sgd(learning_rate, momentum=momentum)
            function, init = step_of(usual, loss_fn, inner)
            opt_state = jax.jit(init)(params)
            # Every leaf its own buffer: the step donates its state.
            state = jax.tree.map(jnp.copy, (params, opt_state, model_state))
        self.state = onto_the_device(state)
        self.batch = images(network)
        self.seconds_to = {"trace": 0.0, "compile": 0.0}
        # What is run, one after the other, and how many steps each takes; the largest of the programs is the first one.
        self.period = [self._compile(function, AMORTIZED if at_once and not between else 1)]
        self.steps = AMORTIZED if at_once or between or method == "amortized_in_one" else 1
        if between:
            rest = AMORTIZED - 1
            program = self._compile(step_of(between, loss_fn, inner)[0], rest if at_once else 1)
            self.period += [program] * (1 if at_once else rest)
        elif method == "amortized_in_one":
            self.period *= AMORTIZED
        self.compiled = self.period[0]
        self.loss: Array | None = None

    def _compile(self, function: Callable[..., Any], steps: int = 1) -> Any:
        started = time.perf_counter()
        function = function if steps == 1 else several(function, steps)
        finish = self._lower(function, (*self.state, *self.batch))
        traced, before = time.perf_counter(), peak_of_host()
        compiled = finish()
        self.seconds_to["trace"] += traced - started
        self.seconds_to["compile"] += time.perf_counter() - traced
        self.host_bytes += peak_of_host() - before
        return compiled

    def _for_here(self, function: Callable[..., Any], arguments: Any) -> Callable[[], Any]:
        lowered = jax.jit(function, donate_argnums=(0, 1, 2)).lower(*arguments)
        return lambda: lowered.compile(self.compiler_options)

    def run(self) -> float:
        """Steps once (or a whole period) and returns the seconds of one step."""
        started = time.perf_counter()
        for program in self.period:
            *state, self.loss = program(*self.state, *self.batch)
            self.state = tuple(state)
        jax.block_until_ready((self.state, self.loss))
        return (time.perf_counter() - started) / self.steps

    def facts(self) -> dict[str, Any]:
        """All but the times of steps: compilation, memory, counted work."""
        params, opt_state, model_state = self.state
        kernels = tdlrt_jax.kernel_paths(params)
        cost = self.compiled.cost_analysis() or {}
        return {
            "seconds_to": self.seconds_to,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            # Gradients have the shapes and dtypes of the parameters.
            "state_bytes": 2 * tree_bytes(params) + tree_bytes(opt_state),
            "model_state_bytes": tree_bytes(model_state),
            **memory_of(self.compiled),
            "flops": cost.get("flops"),
            "ranks": {name: [int(r) for r in tdlrt_jax.active_rank(kernel)] for name, kernel in kernels.items()},
            "loss": None if self.loss is None else float(self.loss),
        }


def peak_of_host() -> int:
    """Bytes of the host's memory that this process has had at most; 0 where the platform does not say."""
    if not sys.platform.startswith("linux"):
        return 0
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def several(step: Callable[..., Any], steps: int) -> Callable[..., Any]:
    """So many steps on one batch, in one program."""

    def of_them(params: Any, opt_state: Any, model_state: Any, *batch: Array) -> tuple[Any, Any, Any, Array]:
        def one(_: int, carried: tuple[Any, Any, Any, Array]) -> tuple[Any, Any, Any, Array]:
            return step(*carried[:3], *batch)

        start = params, opt_state, model_state, jnp.zeros(())
        return jax.lax.fori_loop(0, steps, one, start)

    return of_them


def step_of(method: str, loss_fn: Callable[..., Any], inner: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``step(params, opt_state, model_state, *batch)`` of a method, and the initialization of its optimizer."""
    if method in PLAIN:

        def plain(params: Any, opt_state: Any, model_state: Any, *batch: Array) -> tuple[Any, Any, Any, Array]:
            (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, model_state, *batch)
            updates, opt_state = inner.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, state, loss

        return plain, inner.init
    options: dict[str, Any] = {"integrator": method if method in ("parallel", "fixed_rank") else "bug"}
    if method == "amortized_in_one":
        options["adapt_every"] = AMORTIZED
    tx = tdlrt_jax.tdlrt(inner, tolerance=TOLERANCE, **options)
    if method == "paper":
        return paper_step(loss_fn, tx), tx.init
    if method not in JAX_METHODS:
        raise ValueError(f"method={method!r} is unknown: expected one of {', '.join(JAX_METHODS)}")
    kinds = {"bug_second_pass": "second_pass", "cores_only": "cores_only", "ranks_stay": "ranks_stay"}
    how: dict[str, Any] = {kinds[method]: True} if method in kinds else {}
    inner_step = tdlrt_jax.tdlrt_step(loss_fn, tx, has_state=True, donate=False, **how)

    def step(params: Any, opt_state: Any, model_state: Any, *batch: Array) -> tuple[Any, Any, Any, Array]:
        params, opt_state, model_state, info = inner_step(params, opt_state, model_state, *batch)
        return params, opt_state, model_state, info.loss

    return step, tx.init
