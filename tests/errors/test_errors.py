"""Whatever is called wrongly, the error is a ValueError or TypeError of this package that names the argument and the remedy."""

import re
import traceback
from pathlib import Path

import jax
import pytest

import tdlrt_jax
from tests.errors import core

PACKAGE = Path(tdlrt_jax.__file__).parent


@pytest.fixture(autouse=True)
def unfiltered():
    """JAX hides its own frames from tracebacks, and with them where an error was raised."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


REMEDY = re.compile(
    r"expected|must|needs?\b|use |pass |give |write |rename|one of|is (at least|in|below|a |no )|build|call |convert|map over|"
    r"install|with None|first|make",
    re.IGNORECASE,
)
TABLE = {**{f"tdlrt_jax.{name}": calls for name, calls in core.TOP.items()}}
TABLE |= {f"tdlrt_jax.{name}": calls for name, calls in core.SUBMODULES.items()}
CALLS = [(name, number) for name, calls in TABLE.items() for number in range(len(calls))]


@pytest.mark.parametrize(("name", "number"), CALLS, ids=lambda value: str(value).removeprefix("tdlrt_jax."))
def test_wrong_calls_say_what_is_wrong(name, number):
    call, argument = TABLE[name][number]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert re.search(rf"(?<![a-z_]){re.escape(argument)}(?![a-z_])", message), f"does not name {argument}: {message}"
    assert REMEDY.search(message), f"says nothing of what is expected: {message}"
    raised = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert Path(raised.filename).is_relative_to(PACKAGE), f"raised in {raised.filename}:{raised.lineno}: {message}"
