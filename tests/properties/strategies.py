"""What the properties draw: kernels and their forms, geometries, containers; and how many cases they are given.

A case is one example that hypothesis drew and that fulfilled the property's assumptions. What XLA compiles for (shape, capacity,
whole modes) is drawn from short lists, so that programs are used again; ranks, spectra, tolerances and numbers are drawn freely.
"""

import contextlib
import gc
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from tdlrt_jax import TuckerTensor
from tests import references
from tests.conftest import MANY_MAPPINGS, MAPPINGS

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(["float32", "float64"])
# Relative to the norm of what is compared: some hundred roundings.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}

SHAPES = (
    *((2, 2), (1, 4), (5, 1), (6, 5), (4, 9)),
    *((2, 3, 4), (1, 1, 3), (3, 3, 8), (7, 2, 2)),
    *((3, 3, 1, 5), (2, 3, 4, 5), (3, 3, 4, 4)),
    *((2, 1, 3, 2, 4), (2, 2, 2, 3, 3)),
)


def cases(*, ci, nightly):
    """How many examples a property is given: few where all tests run, many by ``make properties``."""
    many = settings.get_current_profile_name().startswith("nightly")
    return settings(max_examples=nightly if many else ci)


_entered = itertools.count(1)


@contextlib.contextmanager
def precision(dtype):
    """Computes a case in one precision; now and then forgets compiled programs, as the fixture for modules does."""
    many = next(_entered) % 50 == 0 and MAPPINGS.exists() and len(MAPPINGS.read_bytes().splitlines()) > MANY_MAPPINGS
    if many:
        jax.clear_caches()
        gc.collect()
    with jax.enable_x64(dtype == "float64"):
        yield


class Form(NamedTuple):
    """What a program is compiled for."""

    shape: tuple
    capacity: tuple
    whole: tuple


def feasible(sizes, whole):
    """Lowers sizes to ``R_i <= prod_{j != i} R_j``; whole modes stay."""
    sizes = list(sizes)
    for mode in list(range(len(sizes))) * len(sizes):
        if not whole[mode]:
            sizes[mode] = min(sizes[mode], math.prod(sizes[:mode] + sizes[mode + 1 :]))
    return tuple(sizes)


@st.composite
def forms(draw, shapes=SHAPES):
    shape = draw(st.sampled_from(shapes))
    fraction = draw(st.sampled_from([1.0, 1.0, 0.6, 0.3]))
    pattern = draw(st.sampled_from(["none", "none", "window", "last", "all but last"]))
    order = len(shape)
    whole = {
        "none": [False] * order,
        "window": [mode < order - 2 for mode in range(order)],
        "last": [mode == order - 1 for mode in range(order)],
        "all but last": [mode < order - 1 for mode in range(order)],
    }[pattern]
    sizes = [n if w else max(1, round(fraction * n)) for n, w in zip(shape, whole)]
    return Form(shape, feasible(sizes, whole), tuple(whole))


@st.composite
def ranks(draw, form):
    """Ranks in use: from one to the whole capacity."""
    drawn = [n if w else draw(st.integers(1, size)) for n, size, w in zip(form.shape, form.capacity, form.whole)]
    return feasible(drawn, form.whole)


class Kernel(NamedTuple):
    """One kernel twice: of true ranks for the references, and as the library stores it."""

    core: np.ndarray  # float64
    factors: list  # float64, None for a whole mode
    tucker: TuckerTensor

    @property
    def dense(self):
        return references.to_dense(self.core, self.factors)


def kernel_of(form, rank, seed, dtype, decades=0.0):
    """A random kernel; the slices of its core fall over so many decades along every mode."""
    rng = np.random.default_rng(seed)
    core = rng.standard_normal(rank)
    for mode, r in enumerate(rank):
        falling = np.logspace(0, -decades, r) if r > 1 else np.ones(1)
        core = references.mode_product(core, np.diag(falling), mode)
    core = core.astype(dtype).astype(np.float64)
    factors = [
        None if w else references.random_orthonormal(rng, n, r).astype(dtype).astype(np.float64)
        for n, r, w in zip(form.shape, rank, form.whole)
    ]
    padded = np.pad(core, [(0, size - r) for size, r in zip(form.capacity, rank)])
    columns = [
        None if u is None else jnp.asarray(np.pad(u, [(0, 0), (0, size - u.shape[1])]), dtype)
        for u, size in zip(factors, form.capacity)
    ]
    return Kernel(core, factors, TuckerTensor(jnp.asarray(padded, dtype), tuple(columns)))


@st.composite
def kernels(draw, dtype, shapes=SHAPES, highest_decades=3):
    """A form, and a kernel of it in the given precision; drawn within :func:`precision`."""
    form = draw(forms(shapes))
    rank = draw(ranks(form))
    decades = draw(st.sampled_from([0.0, 0.0, 1.0, float(highest_decades)]))
    return form, kernel_of(form, rank, draw(seeds), dtype, decades)


def assert_close(found, expected, tolerance, scale=None):
    """``||found - expected|| <= tolerance * scale``, the scale being the norm of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    scale = np.linalg.norm(expected) if scale is None else scale
    assert np.all(np.isfinite(found))
    assert np.linalg.norm(found - expected) <= tolerance * scale + 1e-30


def assert_orthonormal(factors, rank, tolerance):
    """Columns up to the rank are orthonormal, the others exactly zero."""
    for factor, r in zip(factors, rank):
        if factor is not None:
            u = np.asarray(factor, np.float64)
            assert np.abs(u[:, :r].T @ u[:, :r] - np.eye(r)).max() <= tolerance
            assert not np.any(u[:, r:])
