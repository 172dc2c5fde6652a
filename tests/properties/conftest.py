"""Counts the cases that hypothesis ran, property by property, into the file that ``TDLRT_PROPERTIES`` names."""

import gc
import os
import time
from pathlib import Path

import jax
import pytest
from hypothesis.statistics import collector

from tests.properties import record

HERE = Path(__file__).parent


@pytest.hookimpl(hookwrapper=True, trylast=True)
def pytest_runtest_call(item):
    """Within hypothesis' own hook, so that its statistics come here too."""
    path, outer, phases = os.environ.get("TDLRT_PROPERTIES"), collector.value, []
    if not path or outer is None:
        yield
        return

    def note(statistics):
        phases.extend(statistics[name] for name in record.PHASES if name in statistics)
        outer(statistics)

    start = time.perf_counter()
    with collector.with_value(note):
        outcome = yield
    record.add(Path(path), property_name(item), phases, outcome.excinfo is None, time.perf_counter() - start)


def pytest_collection_modifyitems(config, items):
    """Leaves out what an earlier session has finished."""
    path = os.environ.get("TDLRT_PROPERTIES")
    done = record.finished(Path(path)) if path else set()
    left_out = [item for item in items if item.path.parent == HERE and property_name(item) in done]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def forgotten_programs():
    """Of a session that compiles for hours, nothing is kept beyond a property."""
    yield
    if os.environ.get("TDLRT_PROPERTIES"):
        jax.clear_caches()
        gc.collect()


def property_name(item):
    return f"{item.path.stem}::{item.name}"
