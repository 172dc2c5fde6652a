"""Tensors with prescribed singular values of every unfolding, for kernels of an "overestimated rank" (section 4.3); on the host.

Singular values of a tensor's unfoldings constrain one another: not every set of spectra has a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tdlrt_jax.arguments import shown

__all__ = ["SMALLEST_VALUE", "mode_spectra", "prescribe_spectra"]

# Where a prescribed decay ends: far below any rounding error, and not yet where float32 ends.
SMALLEST_VALUE = 1e-30


def prescribe_spectra(
    core: np.ndarray, spectra: Sequence[np.ndarray | None], *, tolerance: float = 1e-8, sweeps: int = 500
) -> np.ndarray:
    """A tensor near the given one whose unfoldings have the given singular values, in float64 on the host.

    Alternates over the modes: the SVD of each unfolding with its singular values replaced,
    ``Mat_i(C) <- diag(s_i) V_i^T`` (the left vectors are a rotation of the mode, which no other mode sees), until all
    of them match.

    Args:
      core: ``(R_1, ..., R_d)``.
      spectra: per mode ``(R_i,)`` descending, all of one norm; ``None`` leaves the mode as it comes.
      tolerance: of every singular value, relative to itself (values under the rounding of the largest, to that).
      sweeps: how many rounds over all modes to try.

    Returns:
      A core whose slices along every prescribed mode are orthogonal to the tolerance, with norms ``s_i``.

    Raises:
      ValueError: if the values do not match after ``sweeps`` rounds: such a tensor may not exist.

    Source: Hackbusch and Uschmajew, "On the interconnection between the higher-order singular values of real tensors"
    (2017), alternating projections.
    """
    fit = all(values is None or np.shape(values) == (size,) for values, size in zip(spectra, core.shape))
    if len(spectra) != core.ndim or not fit:
        raise ValueError(
            f"spectra have the shapes {[() if values is None else np.shape(values) for values in spectra]}: expected "
            f"({', '.join(map(str, core.shape))}) values, one sequence a mode, or None"
        )
    for mode, values in enumerate(spectra):
        if values is not None:
            # A graded start: from a flat one, the small singular values would be picked from rounding errors.
            core = core * np.expand_dims(values / values[0], [axis for axis in range(core.ndim) if axis != mode])
    deviations = [0.0] * core.ndim
    for _ in range(sweeps):
        for mode, values in enumerate(spectra):
            if values is None:
                continue
            _, found, right = np.linalg.svd(_unfold(core, mode), full_matrices=False)
            floor = 100 * np.finfo(np.float64).eps * values[0] / tolerance
            deviations[mode] = float(np.max(np.abs(found - values) / (values + floor)))
            rest = [size for axis, size in enumerate(core.shape) if axis != mode]
            core = np.moveaxis((values[:, None] * right).reshape(-1, *rest), 0, mode)
        if max(deviations) <= tolerance:
            return core
    raise ValueError(
        f"no core of shape {core.shape} with the singular values asked for was found: after {sweeps} sweeps the "
        f"relative deviations per mode are {[f'{d:.0e}' for d in deviations]}. The unfoldings of a tensor constrain "
        "each other: use ranks or decays that differ less between the modes, or leave a mode free with None"
    )


def mode_spectra(
    singular_values: Sequence[float] | Sequence[Sequence[float] | None], ranks: Sequence[int | None]
) -> list[np.ndarray | None]:
    """One descending sequence of unit norm for every mode, as long as its rank; ``None`` where it is free."""
    if isinstance(singular_values, str) or not isinstance(singular_values, Sequence | np.ndarray):
        raise ValueError(f"singular_values={shown(singular_values)}: expected a sequence of numbers, or one a mode")
    one_for_all = all(isinstance(value, int | float | np.number) for value in singular_values)
    per_mode: list[Any] = [singular_values] * len(ranks) if one_for_all else list(singular_values)
    if len(per_mode) != len(ranks):
        raise ValueError(
            f"singular_values has {len(per_mode)} sequences for a kernel: expected {len(ranks)}, one a mode"
        )
    spectra: list[np.ndarray | None] = []
    for mode, (entry, rank) in enumerate(zip(per_mode, ranks)):
        if entry is None or rank is None:
            spectra.append(None)
            continue
        values = np.asarray(entry, np.float64)[:rank]
        if len(values) < rank:
            raise ValueError(
                f"singular_values has {len(values)} values for mode {mode} of rank {rank}: give at least {rank}"
            )
        if not np.all(values > 0) or np.any(np.diff(values) > 0):
            raise ValueError(f"singular_values of mode {mode} must be positive and descending, got {values.tolist()}")
        spectra.append(values / np.linalg.norm(values))
    return spectra


def _unfold(tensor: np.ndarray, mode: int) -> np.ndarray:
    """:func:`~tdlrt_jax.tucker.unfold` on the host."""
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
