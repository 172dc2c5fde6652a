"""Initial Tucker kernels of the norm that a dense layer would start with, so that activations keep their size.

For factors with orthonormal columns ``||W|| = ||C||``, and a dense kernel whose entries have variance ``v`` has
``E ||W||^2 = v prod n_i``. With ``v = 1 / fan_in`` (LeCun, the default of dense layers) that is ``n_out``, the last
mode's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from tdlrt_jax.arguments import (
    check_array,
    check_callable,
    check_dtype,
    check_key,
    check_number,
    check_shape,
    shown,
)
from tdlrt_jax.ranks import check_ranks
from tdlrt_jax.spectra import SMALLEST_VALUE, mode_spectra, prescribe_spectra
from tdlrt_jax.truncation import hosvd
from tdlrt_jax.tucker import TuckerTensor, kernel_shape

__all__ = [
    "INITIALIZATIONS",
    "dense_norm",
    "initial_kernel",
    "kernel_rank",
    "tucker_from_dense",
    "tucker_normal",
    "tucker_normalized",
    "tucker_spectral",
]

INITIALIZATIONS = ("dense", "normalized", "hosvd", "spectral")

Scheme = Literal["lecun", "he", "glorot"]

Rank = int | float | Sequence[int | float | None] | None


def kernel_rank(shape: Sequence[int], rank: Rank = None) -> tuple[int | None, ...]:
    """The ranks of a kernel from what a user writes: counts, fractions of the modes' sizes, or nothing.

    Args:
      shape: of the dense kernel, ``(spatial..., in, out)``, or ``(in, out)``.
      rank: ``None``: the full rank of every mode. One number: for the two channel modes, the spatial modes start at
        their full rank (they are small, and truncation lowers them all the same). A sequence: one entry a mode, in the
        kernel's layout; a ``None`` entry leaves that mode whole (no factor, never compressed). An ``int`` is a count (a
        single one is clipped to each mode's size), a ``float`` in (0, 1] a fraction of the mode's size, rounded, at
        least 1.

    Returns:
      One count a mode, ``None`` for whole modes, lowered to what a Tucker tensor can have:
      ``R_i <= min(n_i, prod_{j != i} R_j)``.

    Raises:
      ValueError: for a fraction outside (0, 1], a count below 1 (or above ``n_i`` in a sequence), a wrong number of
        entries.

    Example:
      >>> kernel_rank((3, 3, 16, 32), 0.25), kernel_rank((3, 3, 16, 32), (None, None, 8, 0.5))
      ((3, 3, 4, 8), (None, None, 8, 16))
    """
    shape = check_shape(shape)
    if isinstance(rank, bool | str) or not isinstance(rank, int | float | np.number | Sequence | np.ndarray | None):
        raise ValueError(
            f"rank={shown(rank)}: expected a count, a fraction in (0, 1], or one of these (or None) a mode"
        )
    if rank is None:
        entries: list[int | float | None] = list(shape)
    elif isinstance(rank, int | float | np.number):
        spatial = list(shape[:-2])
        fraction = isinstance(rank, float | np.floating)
        entries = [*spatial, *(float(rank) if fraction else min(int(rank), n) for n in shape[-2:])]
    else:
        entries = list(rank)
    if len(entries) != len(shape):
        raise ValueError(
            f"rank={tuple(entries)} has {len(entries)} entries for a kernel of shape {shape}: give one a mode, in the "
            "kernel's layout (spatial..., in, out), or one number for the channel modes"
        )
    counts = [mode_rank(entry, size, mode, shape) for mode, (entry, size) in enumerate(zip(entries, shape))]
    sizes, whole = check_ranks(counts, shape)
    return tuple(None if w else size for size, w in zip(sizes, whole))


def mode_rank(entry: int | float | None, size: int, mode: int, shape: tuple[int, ...]) -> int | None:
    """One entry of a rank as a count; ``None`` for a whole mode."""
    if entry is None:
        return None
    if isinstance(entry, float | np.floating):
        if not 0 < entry <= 1:
            raise ValueError(
                f"rank={entry} for mode {mode} of a kernel of shape {shape}: a float is a fraction of the mode's size, "
                "in (0, 1]; write an int for a count"
            )
        return max(1, round(entry * size))
    if not isinstance(entry, int | np.integer) or isinstance(entry, bool) or not 1 <= entry <= size:
        raise ValueError(
            f"rank={entry!r} for mode {mode} of a kernel of shape {shape}: a count is in 1..{size} "
            "(the layout is spatial..., in, out), None leaves the mode whole"
        )
    return int(entry)


def dense_norm(shape: Sequence[int], scheme: Scheme = "lecun") -> float:
    """The expected Frobenius norm ``sqrt(prod n_i Var[W])`` of a dense initialization.

    Args:
      shape: ``(spatial..., in, out)``.
      scheme: ``"lecun"``: variance ``1 / fan_in``; ``"he"``: ``2 / fan_in``; ``"glorot"``: ``2 / (fan_in + fan_out)``.

    Raises:
      ValueError: for another scheme, or a shape of less than two modes.

    Example:
      >>> dense_norm((3, 3, 16, 64))
      8.0
    """
    shape = check_shape(shape)
    size = math.prod(shape)
    fan_in, fan_out = size / shape[-1], size / shape[-2]
    variances = {"lecun": 1 / fan_in, "he": 2 / fan_in, "glorot": 2 / (fan_in + fan_out)}
    if scheme not in variances:
        raise ValueError(f"scheme={scheme!r} is unknown: expected one of {tuple(variances)}")
    return math.sqrt(size * variances[scheme])


def tucker_normal(
    key: Array,
    shape: Sequence[int],
    rank: Rank = None,
    *,
    norm: ArrayLike | None = None,
    dtype: DTypeLike = jnp.float32,
) -> TuckerTensor:
    """A random kernel whose entries have the variance of a dense initialization: ``Var[W] prod n_i = ||C||^2``.

    The factors are orthonormal bases of random subspaces, the core is normal, and scaled to the norm exactly: its
    entries have the standard deviation ``norm / sqrt(prod R_i)``, by default ``sqrt(n_out / prod R_i)``.

    Args:
      key: a random key.
      shape: ``(n_1, ..., n_d)``, of the dense kernel, ``(spatial..., in, out)``.
      rank: see :func:`kernel_rank`.
      norm: ``||W||``, a scalar, possibly traced; default: :func:`dense_norm`, ``sqrt(n_out)``.
      dtype: of core and factors; at least float32 is used.

    Returns:
      A :class:`~tdlrt_jax.tucker.TuckerTensor`.

    Example:
      >>> import jax, jax.numpy as jnp, tdlrt_jax
      >>> kernel = tucker_normal(jax.random.key(0), (3, 3, 16, 64), rank=0.25)
      >>> kernel.core.shape, round(float(jnp.linalg.norm(tdlrt_jax.to_dense(kernel))), 4)
      ((3, 3, 4, 16), 8.0)
    """
    core_key, factor_key = jax.random.split(check_key("key", key))
    dtype = jnp.promote_types(check_dtype("dtype", dtype), jnp.float32)
    ranks = kernel_rank(shape, rank)
    core = jax.random.normal(core_key, [n if r is None else r for n, r in zip(shape, ranks)], dtype)
    return with_norm(TuckerTensor(core, random_factors(factor_key, shape, ranks, dtype)), norm)


def tucker_normalized(
    key: Array,
    shape: Sequence[int],
    rank: Rank = None,
    *,
    norm: ArrayLike | None = None,
    dtype: DTypeLike = jnp.float32,
) -> TuckerTensor:
    """:func:`tucker_normal` for layers whose output is normalized: of the norm at which a step turns it as a dense one.

    Where a normalization follows, the scale of a kernel changes no output, but decides how far a step turns it: by
    ``lr ||g|| / ||W||^2``, with ``g`` the gradient at norm 1. A step of the core sees of ``g`` what lies in the factors'
    ranges, of a gradient without a preferred direction the part ``prod R_i / n_i`` of its energy. So with ``||C||`` a dense
    kernel's norm times ``(prod R_i / n_i)^(1/4)`` it turns as far as the dense kernel would. With the dense norm it turns
    less, at a tenth of the directions of both channel modes a tenth as far.

    Args:
      key: a random key.
      shape: ``(n_1, ..., n_d)``, of the dense kernel, ``(spatial..., in, out)``.
      rank: see :func:`kernel_rank`.
      norm: the dense kernel's, a scalar, possibly traced; default: :func:`dense_norm`, ``sqrt(n_out)``.
      dtype: of core and factors; at least float32 is used.

    Returns:
      A :class:`~tdlrt_jax.tucker.TuckerTensor`; of full ranks it is that of :func:`tucker_normal`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> kernel = tucker_normalized(jax.random.key(0), (3, 3, 16, 64), rank=0.25)
      >>> round(float(jnp.linalg.norm(kernel.core)), 4)  # 8 (1/16)^(1/4)
      4.0
    """
    kernel = tucker_normal(key, shape, rank, norm=norm, dtype=dtype)
    share = math.prod(size / n for size, n in zip(kernel.core.shape, kernel_shape(kernel)))
    return kernel._replace(core=share**0.25 * kernel.core)


def tucker_from_dense(weights: Array, rank: Rank = None, *, rescale: bool = True) -> TuckerTensor:
    """The HOSVD of a dense kernel, scaled back to the norm that truncation took away.

    The HOSVD of random weights keeps little of them: without rescaling, activations vanish within a few layers. For
    trained weights use ``rescale=False``, or ``tdlrt_jax.hosvd`` with a tolerance.

    Args:
      weights: ``(n_1, ..., n_d)``, floating.
      rank: see :func:`kernel_rank`.
      rescale: whether ``||C||`` becomes ``||weights||``.

    Returns:
      A :class:`~tdlrt_jax.tucker.TuckerTensor` of the weights' dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = jax.random.normal(jax.random.key(0), (8, 8))
      >>> kernel = tucker_from_dense(weights, rank=2)
      >>> bool(jnp.isclose(jnp.linalg.norm(kernel.core), jnp.linalg.norm(weights)))
      True
    """
    weights = check_array("weights", weights, "a dense kernel (n_1, ..., n_d)", modes=2, floating=True)
    kernel = compiled_hosvd(weights, rank=kernel_rank(weights.shape, rank))
    return with_norm(kernel, jnp.linalg.norm(weights)) if rescale else kernel


# One program instead of many small ones: half the time of compilation, which is most of it.
compiled_hosvd = jax.jit(hosvd, static_argnames="rank")


def tucker_spectral(
    key: Array,
    shape: Sequence[int],
    rank: Rank = None,
    *,
    decay: float = 0.1,
    singular_values: Sequence[float] | Sequence[Sequence[float] | None] | None = None,
    norm: ArrayLike | None = None,
    dtype: DTypeLike = jnp.float32,
) -> TuckerTensor:
    """A random kernel with prescribed singular values of every unfolding: the "overestimated rank" of section 4.3.

    Every unfolding ``Mat_i(W)`` gets the singular values ``s_k``, each mode's scaled to the common norm. The core comes
    from :func:`~tdlrt_jax.spectra.prescribe_spectra`, whose cost is some ten to a hundred SVDs of its unfoldings.

    Args:
      key: a random key.
      shape: ``(n_1, ..., n_d)``, of the dense kernel, ``(spatial..., in, out)``.
      rank: see :func:`kernel_rank`.
      decay: ``s_k = decay^k``, k = 0, 1, ...; the default decays with powers of ten (and stops at 1e-30).
      singular_values: instead of ``decay``, descending and positive: one sequence for all modes, at least as long as
        the largest rank, or one a mode. Whole modes, and modes whose entry is ``None``, are left as they come.
      norm: ``||W||``; default: :func:`dense_norm`.
      dtype: of core and factors; at least float32 is used. The core is found in float64 whatever the dtype.

    Returns:
      A :class:`~tdlrt_jax.tucker.TuckerTensor`; the core's slices are orthogonal with descending norms, so small
      singular values survive the rounding to ``dtype``.

    Raises:
      ValueError: for values that are not descending and positive, too few of them, or if no such tensor is found (not
        every set of spectra has one). Under ``jit`` the last comes as JAX's error of a failed callback.

    Example:
      >>> import jax, jax.numpy as jnp, tdlrt_jax
      >>> kernel = tucker_spectral(jax.random.key(0), (3, 3, 8, 8), norm=1.0)
      >>> values = jnp.linalg.svd(tdlrt_jax.to_dense(kernel).reshape(-1, 8), compute_uv=False)
      >>> [f"{value:.0e}" for value in values[:4]]
      ['1e+00', '1e-01', '1e-02', '1e-03']
    """
    core_key, factor_key = jax.random.split(check_key("key", key))
    dtype = jnp.promote_types(check_dtype("dtype", dtype), jnp.float32)
    ranks = kernel_rank(shape, rank)
    if singular_values is None:
        if not 0 < check_number("decay", decay, "the ratio of successive singular values, in (0, 1]") <= 1:
            raise ValueError(
                f"decay={decay}: the ratio of successive singular values is in (0, 1], expected such a number"
            )
        singular_values = [max(decay**k, SMALLEST_VALUE) for k in range(max(shape))]
    spectra = mode_spectra(singular_values, ranks)
    start = jax.random.normal(core_key, [n if r is None else r for n, r in zip(shape, ranks)], dtype)

    def prescribed(start: Array) -> np.ndarray:
        return prescribe_spectra(np.asarray(start, np.float64), spectra).astype(start.dtype)

    if isinstance(start, jax.core.Tracer):
        core = jax.pure_callback(prescribed, jax.ShapeDtypeStruct(start.shape, dtype), start, vmap_method="sequential")
    else:
        core = jnp.asarray(prescribed(start))
    return with_norm(TuckerTensor(core, random_factors(factor_key, shape, ranks, dtype)), norm)


def initial_kernel(
    key: Array,
    shape: Sequence[int],
    rank: Rank,
    *,
    initialization: str | Callable[..., TuckerTensor],
    kernel_init: Callable[..., Any],
    dtype: DTypeLike,
) -> TuckerTensor:
    """The kernel a layer starts with, from a dense initializer ``kernel_init(key, shape, dtype)`` and a rank.

    Args:
      key: a random key, given to ``kernel_init`` as it is.
      shape: of the dense kernel, ``(spatial..., in, out)``.
      rank: see :func:`kernel_rank`.
      initialization: ``"dense"``: :func:`tucker_normal` with the norm of the dense draw; ``"normalized"``:
        :func:`tucker_normalized` with that norm; ``"hosvd"``:
        :func:`tucker_from_dense` of the draw; ``"spectral"``: :func:`tucker_spectral` with the norm of the draw; or a
        function ``(key, shape, rank, *, norm, dtype)`` such as these with options of their own.
      kernel_init: a dense initializer. If it returns a TuckerTensor, that is the kernel.
      dtype: of core and factors; at least float32 is used.

    Raises:
      ValueError: for an unknown name, or weights of another shape.
    """
    check_callable("kernel_init", kernel_init, "kernel_init(key, shape, dtype) -> weights")
    dtype = jnp.promote_types(check_dtype("dtype", dtype), jnp.float32)
    if not callable(initialization) and initialization not in INITIALIZATIONS:
        raise ValueError(
            f"initialization={initialization!r} is unknown: expected one of {INITIALIZATIONS}, or a function "
            "(key, shape, rank, *, norm, dtype) -> TuckerTensor"
        )
    weights = drawn(kernel_init, key, shape, dtype)
    found = kernel_shape(weights) if isinstance(weights, TuckerTensor) else jnp.shape(weights)
    if tuple(found) != tuple(shape):
        raise ValueError(f"kernel_init returned weights of shape {tuple(found)}: expected {tuple(shape)}, the kernel's")
    if isinstance(weights, TuckerTensor):
        return weights
    if initialization == "hosvd":
        return tucker_from_dense(weights, rank)
    draws = {"dense": tucker_normal, "normalized": tucker_normalized, "spectral": tucker_spectral}
    draw = draws.get(initialization, initialization)  # type: ignore[arg-type]
    return draw(jax.random.fold_in(key, 1), shape, rank, norm=jnp.linalg.norm(weights), dtype=dtype)


def drawn(kernel_init: Callable[..., Any], key: Array, shape: Sequence[int], dtype: DTypeLike) -> Any:
    """What a dense initializer draws; raises ``ValueError`` for one that names axes for a sharding."""
    weights = kernel_init(key, tuple(shape), dtype)
    if hasattr(weights, "raw_value"):  # a VariableMetadata of flax
        raise ValueError(
            f"kernel_init returned a {type(weights).__name__}, as nnx.with_partitioning makes it: expected an array. Its names "
            "are for the axes of a dense kernel, of which core and factors have others: give the initializer without them, and "
            "place the parameters afterwards (docs/scaling.md)"
        )
    return weights


def random_factors(
    key: Array, shape: Sequence[int], ranks: Sequence[int | None], dtype: DTypeLike
) -> tuple[Array | None, ...]:
    """Orthonormal bases ``(n_i, R_i)`` of random subspaces; ``None`` for whole modes."""
    keys = jax.random.split(key, len(shape))
    return tuple(
        None if r is None else jnp.linalg.qr(jax.random.normal(k, (n, r), dtype))[0]
        for k, n, r in zip(keys, shape, ranks)
    )


def with_norm(kernel: TuckerTensor, norm: ArrayLike | None) -> TuckerTensor:
    """The kernel scaled to ``||W|| = norm``, by default that of a dense layer; a zero kernel stays zero."""
    if norm is not None and not isinstance(norm, jax.Array):
        check_number("norm", norm, "a number, the kernel's Frobenius norm")
    norm = dense_norm(kernel_shape(kernel)) if norm is None else norm
    size = jnp.linalg.norm(kernel.core)
    scale = jnp.where(size > 0, norm / jnp.where(size > 0, size, 1), 0)
    return kernel._replace(core=kernel.core * scale.astype(kernel.core.dtype))
