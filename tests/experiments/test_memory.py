"""What a process gives back to the system."""

import ctypes
import gc
import sys
import weakref

import jax
import jax.numpy as jnp
import pytest

from experiments.run.memory import forget_traces, give_back, heap_in_use, resident_bytes


def test_compiled_programs_stay_and_traces_go():
    class Mark:
        """Alive as long as the trace that has it as a static argument."""

    marks = [Mark()]
    found = weakref.ref(marks[0])
    program = jax.jit(lambda x, mark: 2 * x, static_argnums=1).lower(1.0, marks.pop()).compile()
    gc.collect()
    assert found() is not None
    forget_traces()
    assert found() is None and float(program(jnp.float32(3.0))) == 6.0


needs_glibc = pytest.mark.skipif(not sys.platform.startswith("linux") or not heap_in_use(), reason="needs glibc")


@pytest.fixture
def libc():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    return libc


@needs_glibc
def test_what_is_free_between_blocks_in_use_goes_back(libc):
    """Of the heap's end free memory goes back by itself; below a block in use it stays, until it is asked for."""
    give_back()
    blocks = [libc.malloc(60_000) for _ in range(2000)]
    for block in blocks:
        ctypes.memset(block, 1, 60_000)
    used = resident_bytes()
    for block in blocks[:-1]:
        libc.free(block)
    held = resident_bytes()
    give_back()
    assert used - held < 10_000_000, "free memory is held"
    assert held - resident_bytes() > 100_000_000
    libc.free(blocks[-1])


@needs_glibc
def test_what_is_handed_out_is_counted(libc):
    before = heap_in_use()
    block = libc.malloc(50_000_000)
    assert 50_000_000 <= heap_in_use() - before < 51_000_000
    libc.free(block)
    assert abs(heap_in_use() - before) < 1_000_000
