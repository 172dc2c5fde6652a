"""The options that programs are compiled with."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax import compilation
from tdlrt_jax.models import LeNet5
from tdlrt_jax.nn import TuckerConv

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="options for the CPU")


@pytest.fixture
def no_flags(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@on_cpu
def test_options_are_those_that_this_jaxlib_knows(no_flags, monkeypatch):
    monkeypatch.setattr(compilation, "_ON_CPU", {**compilation._ON_CPU, "xla_no_such_option": True})
    options = tdlrt_jax.compiler_options()
    assert options["xla_backend_optimization_level"] == 1
    assert "xla_no_such_option" not in options
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


@on_cpu
def test_what_the_user_sets_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3 --xla_force_host_platform_device_count=2")
    assert "xla_backend_optimization_level" not in tdlrt_jax.compiler_options()


@on_cpu
def test_a_program_that_runs_once_is_optimized_least(no_flags):
    usual, once = tdlrt_jax.compiler_options(), tdlrt_jax.compiler_options(runs_once=True)
    assert once == {**usual, "xla_backend_optimization_level": 0}


@on_cpu
def test_a_program_that_runs_often_is_optimized_as_usual(no_flags):
    usual, often = tdlrt_jax.compiler_options(), tdlrt_jax.compiler_options(runs_often=True)
    assert usual == {**often, **compilation._ON_CPU}
    assert not often.keys() & compilation._ON_CPU.keys()
    with pytest.raises(ValueError, match="runs_once and runs_often are both True"):
        tdlrt_jax.compiler_options(runs_once=True, runs_often=True)


def library_calls(options):
    """How many convolutions and sums of a program are left to a library."""

    def program(x, kernel, matrix):
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
        return jax.lax.conv_general_dilated(y, kernel, (1, 1), "SAME", dimension_numbers=layout), jnp.sum(matrix)

    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 8, 8, 32), (3, 3, 32, 32), (512, 512))]
    text = jax.jit(program, compiler_options=options).lower(*arguments).compile().as_text()
    called = re.findall(rf"calls=%([\w.]+)[^\n]*{compilation._MARK}", text)
    bodies = [re.search(rf"^%{re.escape(name)} .*?^}}", text, re.M | re.S).group() for name in called]
    return {kind: sum(f" {kind}(" in body for body in bodies) for kind in ("convolution", "reduce")}


@on_cpu
def test_convolutions_are_xlas_own(no_flags):
    """Those of 32 and 64 filters are left to a library otherwise, which takes them on one core; sums stay where they are."""
    options = tdlrt_jax.compiler_options(runs_often=True)
    if not compilation._with_convolutions_of_its_own():
        assert not options
        pytest.skip("this jaxlib takes them by itself")
    as_it_comes, own = (library_calls(o) for o in ({}, options))
    assert as_it_comes == {"convolution": 2, "reduce": 1}
    assert own == {"convolution": 0, "reduce": 1}


def test_other_devices_have_none(no_flags, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for how in ({}, {"runs_once": True}, {"runs_often": True}):
        assert tdlrt_jax.compiler_options(**how) == {}


@on_cpu
def test_a_network_is_the_same_built_at_once(no_flags):
    def create():
        return LeNet5(num_classes=10, rngs=nnx.Rngs(0), conv=functools.partial(TuckerConv, rank=0.5))

    at_once = jax.jit(create, compiler_options=tdlrt_jax.compiler_options(runs_once=True))()
    usual = create()
    for model in (at_once, usual):
        model.train()
    assert nnx.graphdef(at_once) == nnx.graphdef(usual)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), nnx.state(at_once), nnx.state(usual)
    )


def step_with(compiler_options):
    params = {"w": tdlrt_jax.hosvd(jnp.arange(12.0).reshape(3, 4) / 12, rank=2)}
    tx = tdlrt_jax.tdlrt(optax.sgd(0.01), tolerance=0.05)

    def loss_fn(params, x, y):
        return jnp.mean((tdlrt_jax.tucker_linear(x, params["w"]) - y) ** 2)

    step = tdlrt_jax.tdlrt_step(loss_fn, tx, donate=False, compiler_options=compiler_options)
    return functools.partial(step, params, tx.init(params), jnp.ones((8, 3)), jnp.ones((8, 4)))


@on_cpu
def test_a_step_is_the_same_with_them(no_flags):
    with_them, without = step_with(tdlrt_jax.compiler_options())(), step_with(None)()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), with_them[0], without[0])


@on_cpu
def test_a_step_hands_them_to_the_compiler():
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        step_with({"xla_no_such_option": True})()


@on_cpu
def test_in_another_jitted_function_they_are_refused_not_ignored(no_flags):
    step = step_with(tdlrt_jax.compiler_options())
    with pytest.raises(ValueError, match="compiler_options"):
        jax.jit(lambda: step())()
