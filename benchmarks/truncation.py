"""Line 11 of Algorithm 1 by its two routes: all eigenvectors of the Gram matrix, and randomized rounding.

Cores as ``bug`` truncates them, from twice the rank in every mode (as far as a 3x3 window has room) back to the rank; and kernels
as they are compressed at once, to an eighth of their channels. Errors are relative, and stand beside a bound that no truncation
to these ranks can beat, the largest of the modes' discarded tails. Only modes where it is cheaper by count are sketched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.cells import Cell, Options
from benchmarks.timing import in_turn, spread
from tdlrt_jax.ranks import Route

__all__ = ["cells"]

ROUTES: tuple[Route, ...] = ("gram", "randomized")
# Singular values sigma_j of the channel modes.
SPECTRA: dict[str, Callable[[int, int], float]] = {
    "steep": lambda j, rank: 10 ** (-6 * j / rank),
    "flat": lambda j, rank: 1 / (1 + j / rank),
}
CORES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "augmented core": lambda rank: (4, 4, 2 * rank, 2 * rank),
    "whole kernel": lambda rank: (3, 3, 8 * rank, 8 * rank),
}


def cells(options: Options) -> list[Cell]:
    """One cell a kind of core, rank and spectrum."""
    return [
        Cell(f"{kind}, rank {rank}, {spectrum} spectrum", partial(_measure, options, shape(rank), rank, spectrum))
        for kind, shape in CORES.items()
        for rank in options.truncation_ranks
        for spectrum in SPECTRA
    ]


def _measure(
    options: Options, shape: tuple[int, ...], rank: int, spectrum: str, say: Callable[[str], None]
) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tdlrt_jax.ranks import RankPolicy
    from tdlrt_jax.rotation import sketch_size
    from tdlrt_jax.truncation import truncate

    capacity = (3, 3, rank, rank)
    channels = shape[-1]
    rng = np.random.default_rng(0)
    values = [SPECTRA[spectrum](j, rank) for j in range(channels)]
    core = rng.standard_normal(shape)
    for mode in (2, 3):  # rows scaled by the spectrum, then mixed: the principal directions are not the axes
        mix = np.linalg.qr(rng.standard_normal((channels, channels)))[0] * values
        core = np.moveaxis(np.tensordot(mix, core, (1, mode)), 0, mode)
    core = core / np.linalg.norm(core)
    array = jnp.asarray(core, jnp.float32)

    programs: dict[str, Callable[[], None]] = {}
    facts = {}
    for route in ROUTES:
        say(f"compiling {route}")
        function = partial(truncate, capacity=capacity, policy=RankPolicy(route=route))
        run = jax.jit(lambda c, function=function: function(c, 1e-6))
        cut = run(array)
        rebuilt = np.asarray(cut.core, np.float64)
        for mode, rotation in enumerate(cut.rotations):
            rebuilt = np.moveaxis(np.tensordot(np.asarray(rotation, np.float64), rebuilt, (1, mode)), 0, mode)
        orthonormality = max(
            float(np.abs(np.asarray(p, np.float64).T @ np.asarray(p, np.float64) - np.diag(np.asarray(p).any(0))).max())
            for p in cut.rotations
        )
        facts[route] = {
            "error": float(np.linalg.norm(core - rebuilt)),
            "reported_error": float(cut.error),
            "orthonormality": orthonormality,
        }
        programs[route] = partial(_run, run, array)
    seconds = in_turn(programs, rounds=max(options.rounds, 10))
    tails = [np.linalg.svd(np.moveaxis(core, m, 0).reshape(core.shape[m], -1), compute_uv=False) for m in range(4)]
    least = max(float(np.linalg.norm(s[c:])) for s, c in zip(tails, capacity))
    return {
        "shape": shape,
        "capacity": capacity,
        "sketched_modes": [m for m, n in enumerate(shape) if sketch_size(n, _columns(shape, capacity, m), capacity[m])],
        "least_error": least,
        "routes": {route: {"seconds": spread(seconds[route]), **facts[route]} for route in ROUTES},
    }


def _columns(shape: tuple[int, ...], capacity: tuple[int, ...], mode: int) -> int:
    """Of a mode's unfolding, the modes before it cut already."""
    return math.prod(capacity[:mode]) * math.prod(shape[mode + 1 :])


def _run(program: Callable[[Any], Any], core: Any) -> None:
    import jax

    jax.block_until_ready(program(core))
