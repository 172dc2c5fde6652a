"""Steps compiled for a GPU that is not there: what is counted, and the table that it ends in."""

import json

import jax
import pytest

from benchmarks import ahead, report, run
from benchmarks.cells import Results
from benchmarks.counts import Launches, launches
from benchmarks.methods import TrainingStep
from benchmarks.networks import Network

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %n = f32[2]{0} negate(%p)
}

%thrice (s: (s32[], f32[2])) -> (s32[], f32[2]) {
  %s = (s32[], f32[2]{0}) parameter(0)
  %x = f32[2]{0} get-tuple-element(%s), index=1
  %y = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused
  %z = (f32[2]{0}, s8[9]{0}) custom-call(%y), custom_call_target="__cublas$lt$matmul"
  ROOT %t = (s32[], f32[2]{0}) tuple(%i, %y)
}

%asked (s: (s32[], f32[2])) -> (s32[], f32[2]) {
  %s = (s32[], f32[2]{0}) parameter(0)
  %x = f32[2]{0} get-tuple-element(%s), index=1
  %y = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused
  %l = (s32[], f32[2]{0}) while(%s), condition=%below, body=%thrice, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %t = (s32[], f32[2]{0}) tuple(%i, %y)
}

%below (s: (s32[], f32[2])) -> pred[] {
  %s = (s32[], f32[2]{0}) parameter(0)
  ROOT %b = pred[] fusion(%s), kind=kLoop, calls=%fused
}

ENTRY %main (p.1: f32[2]) -> f32[2] {
  %p.1 = f32[2]{0} parameter(0)
  %a = f32[2]{0} fusion(%p.1), kind=kLoop, calls=%fused
  %b = f32[2]{0} bitcast(%a)
  %c = (f32[2]{0}, u8[0]{0}) custom-call(%b), custom_call_target="__cudnn$convForward"
  %d = (f32[2]{0}, s32[]) custom-call(%b), custom_call_target="cusolver_potrf_ffi"
  %l = (s32[], f32[2]{0}) while(%t), condition=%below, body=%thrice, backend_config={"known_trip_count":{"n":"3"}}
  %w = (s32[], f32[2]{0}) while(%l), condition=%below, body=%asked
  ROOT %r = f32[2]{0} get-tuple-element(%w), index=1
}
"""


def test_loops_count_as_often_as_they_run_and_those_that_ask_apart():
    # A fusion and two library calls; three rounds of a fusion and a library call; then a loop that asks.
    assert launches(PROGRAM) == Launches(always=3 + 3 * 2, library=2 + 3, waits=1, in_loops=1 + 3 * 2)


def test_both_branches_of_a_condition_are_left_apart():
    def either(x):
        return jax.lax.cond(
            x[0] > 0, lambda x: jax.numpy.sort(x), lambda x: jax.numpy.linalg.cholesky(x[:, None]).T[0], x
        )

    found = launches(jax.jit(either).lower(jax.numpy.ones(9)).compile().as_text())
    assert found.waits == 1 and found.in_loops > 0


def test_the_description_is_a_protocol_buffers_text():
    assert ahead._as_text({"a": 1, "b": {"c": "x", "d": 0.5}}) == 'a: 1 b { c: "x" d: 0.5 }'


def test_a_step_can_be_compiled_for_elsewhere():
    seen = []

    def compile_there(function, arguments):
        seen.append(jax.tree.leaves(arguments)[0].shape)
        return lambda: "compiled"

    assert TrainingStep(Network("alexnet", 1 / 8, 2, 0.9), "dense", compile=compile_there).compiled == "compiled"
    assert seen


def test_without_the_plugin_it_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ahead, "PLUGINS", ("no_such_package.plugin",))
    assert run.main(["--scale", "smoke", "--sections", "ahead", "--output", str(tmp_path), "--no-peers"]) == 0
    assert 'pip install ".[cuda]"' in capsys.readouterr().out
    assert not (tmp_path / "ahead.json").exists()


@pytest.mark.skipif(not any(map(ahead._is_installed, ahead.PLUGINS)), reason="needs JAX's CUDA plugin")
def test_from_the_command_to_the_table(tmp_path):
    assert run.main(["--scale", "smoke", "--sections", "ahead", "--output", str(tmp_path), "--no-peers"]) == 0
    (cell,) = Results(tmp_path / "ahead.json").cells.values()
    methods = cell["result"]["methods"]
    assert methods["dense"]["always"] < methods["cores_only"]["always"] < methods["bug"]["always"]
    assert methods["dense"]["waits"] == 0


def test_the_table_has_a_line_a_method(tmp_path):
    entry = {"always": 7, "library": 3, "waits": 1, "in_loops": 5, "arguments": 2**20, "peak": 3 * 2**20}
    result = {"device": "GPU", "options": {"level": 0}, "methods": {"dense": {**entry, "seconds_to": {"compile": 2.0}}}}
    environment = {
        "hardware": "CPU",
        "versions": {"jax": "0.10.2"},
        "commit": "0" * 40,
        "started": "2026-11-28T00:00:00",
    }
    Results(tmp_path / "ahead.json").add("net", environment, result)
    text = report.markdown(tmp_path)
    assert "Compiled for GPU, with `level=0`." in text and "| dense | 7 | 3 | 1 | 5 | 1 | 3 | 2 |" in text
    assert json.loads((tmp_path / "ahead.json").read_text())["cells"]["net"]["result"] == result
