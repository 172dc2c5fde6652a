"""The arrays of a job follow its ranks: which layers press against them, and new sizes between two epochs."""

from __future__ import annotations

from typing import Any

import tdlrt_jax
from experiments.run.metrics import layer_name
from experiments.run.programs import TrainState
from tdlrt_jax.capacity import COMPILATION_STEPS, HEADROOM, full_kernels

__all__ = ["fit_arrays", "full_layers", "pressing_note"]

# After a budget was reached no rank moved by more than one, in up to 55 epochs (experiments/results/importance, width).
_SETTLED_HEADROOM = 1.1


def full_layers(params: Any, max_rank: int | None) -> list[str]:
    """Layers with a rank that fills its arrays though it could be higher; no rank is wanted above ``max_rank``."""
    return [layer_name(name) for name in full_kernels(params, max_rank=_bounds(params, max_rank))]


def pressing_note(record: dict[str, Any], resize: bool) -> str:
    """An epoch's ``pressing`` layers in words."""
    then = "They grow now" if resize else "They stay as they are: leave out --no-resize to let them grow"
    return (
        f"Ranks pressed against the capacity of their arrays in {record['pressing_steps']} steps, at the end in "
        f"{', '.join(record['pressing'])}. {then}."
    )


def fit_arrays(
    state: TrainState,
    max_rank: int | None,
    *,
    grow: bool,
    settled: bool = False,
    steps_left: int | None = None,
    compilation_steps: int = COMPILATION_STEPS,
) -> TrainState:
    """The same state with arrays that fit the ranks, or just the same where that is not worth a compilation.

    Args:
      state: between two steps.
      max_rank: no rank is wanted above.
      grow: whether a step reported a rank at its capacity.
      settled: a budget has been reached, by which the ranks of all kernels together stay, and each has little room to rise.
      steps_left, compilation_steps: see :func:`tdlrt_jax.fit_capacity`.
    """
    kernels = tdlrt_jax.kernel_paths(state.params)
    wanted = tdlrt_jax.fit_capacity(
        state.params,
        max_rank=_bounds(state.params, max_rank),
        grow=grow,
        headroom=_SETTLED_HEADROOM if settled else HEADROOM,
        steps_left=steps_left,
        compilation_steps=compilation_steps,
    )
    if all(tuple(kernels[name].core.shape) == size for name, size in wanted.items()):
        return state
    params, opt_state = (tdlrt_jax.resize(tree, wanted) for tree in (state.params, state.opt_state))
    return state._replace(params=params, opt_state=opt_state)


def _bounds(params: Any, max_rank: int | None) -> dict[str, list[int]] | None:
    if max_rank is None:
        return None
    return {name: [max_rank] * len(kernel.factors) for name, kernel in tdlrt_jax.kernel_paths(params).items()}
