"""Whatever is called wrongly, the error is a ValueError or TypeError of this package that names the argument and the remedy."""

import importlib
import pkgutil
import re
import traceback
import types
from pathlib import Path

import jax
import pytest

import tdlrt_jax
from tests.errors import core, layers
from tests.errors.exempt import EXEMPT

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
    r"the (paths|gradients) (are|have)|install|with None|first|make",
    re.IGNORECASE,
)
TABLE = {**{f"tdlrt_jax.{name}": calls for name, calls in core.TOP.items()}}
TABLE |= {f"tdlrt_jax.{name}": calls for name, calls in (core.SUBMODULES | layers.ALL).items()}
CALLS = [(name, number) for name, calls in TABLE.items() for number in range(len(calls))]


@pytest.mark.parametrize(("name", "number"), CALLS, ids=lambda value: str(value).removeprefix("tdlrt_jax."))
def test_wrong_calls_say_what_is_wrong(name, number):
    call, argument = TABLE[name][number]
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        call()
    message = str(caught.value)
    assert re.search(rf"(?<![a-z_]){re.escape(argument)}(?![a-z_])", message), f"does not name {argument}: {message}"
    assert REMEDY.search(message), f"says nothing of what is expected: {message}"
    raised = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert Path(raised.filename).is_relative_to(PACKAGE), f"raised in {raised.filename}:{raised.lineno}: {message}"


def public_callables():
    """Every function and class that the package or one of its modules exports, by where it is defined; with all its names."""
    found = {}
    modules = [info.name for info in pkgutil.walk_packages(tdlrt_jax.__path__, "tdlrt_jax.")]
    for name in ("tdlrt_jax", *modules):
        module = importlib.import_module(name)
        for entry in module.__all__:
            value = getattr(module, entry)
            if isinstance(value, types.FunctionType | type) and value.__module__.startswith("tdlrt_jax"):
                home = f"{value.__module__}.{value.__qualname__}"
                found.setdefault(home, set()).update({home, f"{name}.{entry}"})
            elif hasattr(value, "__wrapped__"):  # jitted
                found.setdefault(f"{name}.{entry}", set()).add(f"{name}.{entry}")
    return found


def test_every_public_callable_has_wrong_calls_or_a_reason():
    found = public_callables()
    assert len(found) > 150
    exempt = {f"tdlrt_jax.{name}" for name in EXEMPT}
    for home, names in found.items():
        tested, excused = bool(names & TABLE.keys()), bool(names & exempt)
        assert tested or excused, (
            f"{home} has no wrong calls in tests/errors: add some, or a reason why it can have none"
        )
        assert not (tested and excused), f"{home} is in a table and exempt"
    everything = set().union(*found.values())
    assert exempt <= everything and TABLE.keys() <= everything, (exempt | TABLE.keys()) - everything
    assert all(TABLE.values())
