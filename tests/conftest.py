"""What every test shares: float64 on request, and deterministic property tests."""

import gc
import os
from pathlib import Path

import jaxlib

# Tests compile many small programs and run each for a moment: compile fast, not well, and in one piece, since other workers
# have the other cores. The last flags are known to this jaxlib series; an unknown flag would end the process.
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jaxlib.__version__.startswith("0.10."):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", _FLAGS)
# Nor does anyone read where in Python an operation of these programs comes from; finding it out is a twentieth of the time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# LAPACK on the CPU comes from OpenBLAS, whose threads spin: on busy cores a small QR waits for them most of the time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
# Other examples every time, and for a failure the line that draws it again: `make properties`, or --hypothesis-profile=nightly.
settings.register_profile(
    "nightly", max_examples=500, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("ci")


# Linux gives a process 65,530 memory mappings, and every compiled program takes some: thousands of compilations in one
# process end it, by an abort or a segmentation fault in the compiler or wherever it next needs memory.
MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = 12_000


@pytest.fixture(autouse=True, scope="module")
def bounded_mappings():
    """Forgets compiled programs after a module, once there are many."""
    yield
    if MAPPINGS.exists() and len(MAPPINGS.read_bytes().splitlines()) > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Runs one test in float64; the library itself never touches the global flag."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "gpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
