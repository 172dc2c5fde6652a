"""Integration of a flow by diffrax, with adaptive steps, explicit or implicit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jax import Array

from tdlrt_jax.arguments import check_integer, check_number, shown
from tdlrt_jax.dynamics.flows import Flow

__all__ = ["SOLVERS", "Statistics", "Trajectory", "integrate"]

SOLVERS: dict[str, Callable[[], Any]] = {
    "tsit5": diffrax.Tsit5,
    "dopri8": diffrax.Dopri8,
    # Diffrax's own choice, chords, seldom converges for (7): it took ten times as many steps as Newton's method.
    "kvaerno5": lambda: diffrax.Kvaerno5(root_finder=diffrax.with_stepsize_controller_tols(optimistix.Newton)()),
}

# Evaluations of an attempted step.
_STAGES = {"tsit5": 6, "dopri8": 13}


class Statistics(NamedTuple):
    """What an integration cost; Python numbers."""

    accepted: int
    rejected: int
    evaluations: int | None  # in all steps, three at most at the start left out; None for implicit solvers: not counted
    succeeded: bool  # False if max_steps were not enough or a number was not finite


class Trajectory(NamedTuple):
    """A flow at given times."""

    times: Array  # (m,)
    states: Any  # with a leading axis of m times; infinite after an integration has failed
    params: Any  # the same as parameters with full kernels
    statistics: Statistics


def integrate(
    flow: Flow,
    params: Any,
    times: float | Sequence[float] | Array,
    *,
    solver: str = "tsit5",
    rtol: float = 1e-8,
    atol: float = 1e-10,
    max_steps: int = 4096,
) -> Trajectory:
    """Integrates a flow from the given parameters at time 0.

    Args:
      flow: one of this package's, or another :class:`~tdlrt_jax.dynamics.Flow`. Calls with the same one share their program.
      params: with Tucker kernels, the start.
      times: one time or ``(m,)`` ascending ones, not negative, at which to return the solution.
      solver: ``"tsit5"`` or ``"dopri8"``, explicit Runge-Kutta methods of order 5 and 8, or ``"kvaerno5"``, an implicit one of
        order 5 for stiff flows, which solves linear systems of the size of the whole state.
      rtol, atol: tolerances of the error of a step, root mean square over all numbers of the state.
      max_steps: attempted steps at most.

    Returns:
      A :class:`Trajectory`. Nothing is raised if an integration fails: see ``statistics.succeeded``.

    Raises:
      ValueError: for an unknown solver, times that do not ascend, or kernels that the flow cannot start from.

    Example:
      >>> import jax.numpy as jnp, tdlrt_jax
      >>> from tdlrt_jax.dynamics import full_flow
      >>> flow = full_flow(lambda params: 0.5 * jnp.sum(params["w"] ** 2))
      >>> found = integrate(flow, {"w": tdlrt_jax.hosvd(jnp.ones((3, 4)))}, [0.5, 1.0], rtol=1e-5)
      >>> found.params["w"].shape, bool(jnp.allclose(found.params["w"][1], jnp.exp(-1), rtol=1e-3))
      ((2, 3, 4), True)
    """
    if not isinstance(flow, Flow):
        raise ValueError(f"flow={shown(flow)}: expected a Flow, such as tdlrt_jax.dynamics.full_flow(loss_fn)")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not 0 <= check_number(name, tolerance, "a number, 0 or more") < np.inf:
            raise ValueError(f"{name}={tolerance}: expected a finite number, 0 or more")
    check_integer("max_steps", max_steps, 1, "a number of steps")
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown: expected one of {sorted(SOLVERS)}")
    try:
        at = np.atleast_1d(np.asarray(times, float))
    except (TypeError, ValueError):
        raise ValueError(f"times={shown(times)}: expected one time, or ascending ones") from None
    if (
        at.ndim != 1
        or at.size == 0
        or at[0] < 0
        or at[-1] <= 0
        or not np.all(np.isfinite(at))
        or np.any(np.diff(at) <= 0)
    ):
        raise ValueError(f"times={at.tolist()} must be positive and ascending (the first one may be 0)")
    state = flow.initial(params)
    dtype = jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(state)))
    moments = jnp.asarray(at, dtype)
    states, dense, accepted, rejected, succeeded = _integrate(
        flow, state, moments, jnp.asarray(rtol, dtype), jnp.asarray(atol, dtype), solver, max_steps
    )
    evaluations = (int(accepted) + int(rejected)) * _STAGES[solver] if solver in _STAGES else None
    return Trajectory(moments, states, dense, Statistics(int(accepted), int(rejected), evaluations, bool(succeeded)))


@partial(jax.jit, static_argnums=(0, 5, 6))
def _integrate(
    flow: Flow, state: Any, times: Array, rtol: Array, atol: Array, solver: str, max_steps: int
) -> tuple[Any, Any, Array, Array, Array]:
    solution = solve(
        flow.velocity,
        state,
        times[-1],
        SOLVERS[solver](),
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        saveat=diffrax.SaveAt(ts=times),
    )
    stats = solution.stats
    succeeded = solution.result == diffrax.RESULTS.successful
    dense = jax.lax.map(flow.dense, solution.ys)
    return solution.ys, dense, stats["num_accepted_steps"], stats["num_rejected_steps"], succeeded


def _finite_norm(error: Any) -> Array:
    """The root mean square, large instead of not finite: a step that ends there is tried again shorter, and not for ever."""
    leaves = jax.tree.leaves(error)
    size = jnp.sqrt(sum(jnp.sum(x**2) for x in leaves) / sum(x.size for x in leaves))
    return jnp.where(jnp.isfinite(size), size, 1e6)


def solve(
    velocity: Callable[[Any], Any],
    state: Any,
    end: Array | float,
    solver: Any,
    *,
    rtol: Array | float,
    atol: Array | float,
    max_steps: int,
    saveat: Any = None,
) -> Any:
    """``y' = velocity(y)`` from time 0 to ``end`` by adaptive steps; traced. Returns diffrax's solution."""
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: velocity(y)),
        solver,
        t0=jnp.zeros_like(end),
        t1=end,
        dt0=None,
        y0=state,
        saveat=diffrax.SaveAt(t1=True) if saveat is None else saveat,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, norm=_finite_norm),
        adjoint=diffrax.ForwardMode(),  # nothing is differentiated backward, and it compiles fastest
        max_steps=max_steps,
        throw=False,
    )
