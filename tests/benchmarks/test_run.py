"""The benchmark's command: cells are kept, not measured twice, and told of where they fail; tables come from the files alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cells, communication, factorizations, report, run, steps, timing
from benchmarks.cells import Cell, Results, ResultsError
from benchmarks.networks import Network, fraction_for
from benchmarks.profiling import _instructions

OPTIONS = run.SCALES["smoke"]


def test_timing_takes_programs_in_turn_and_their_own_seconds_where_they_have_them():
    order = []
    seconds = timing.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b") or 0.5}, rounds=2)
    assert order == ["a", "a", "b", "b"] * 3
    assert seconds["b"] == [0.5, 0.5] and len(seconds["a"]) == 2 and min(seconds["a"]) >= 0
    with pytest.raises(ValueError, match="rounds=0 must be 1 or more"):
        timing.in_turn({}, rounds=0)


def test_spread_and_ratio():
    assert timing.spread([4.0, 1.0, 2.0, 3.0]) == {
        "median": 2.5,
        "lowest": 1.0,
        "highest": 4.0,
        "quartiles": [1.75, 3.25],
    }
    compared = timing.ratio({"a": [2.0, 6.0, 4.0], "b": [1.0, 2.0, 2.0]}, "a", "b")
    assert compared == {"of_medians": 2.0, "quartiles": [2.0, 2.5]}


def test_results_survive_and_other_files_are_refused(tmp_path):
    path = tmp_path / "new" / "steps.json"
    Results(path).add("one", {"commit": None}, {"x": 1})
    again = Results(path)
    again.add("two", {"commit": None}, {"x": 2})
    assert set(Results(path).cells) == {"one", "two"}
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ResultsError, match=r"steps\.json is no results file .*: move it away"):
        Results(path)


def test_the_first_network_is_the_one_at_95_percent():
    first = next(steps.networks(run.SCALES["cpu"]))
    assert first == Network("vgg16", 1.0, 128, 0.95, "tucker") and first.key == "vgg16-batch128-95%"


def test_a_compression_out_of_reach_is_told():
    with pytest.raises(ValueError, match=r"compression=0\.99999 cannot be reached by vgg16"):
        fraction_for(Network("vgg16", compression=0.99999))


@pytest.fixture
def sections(monkeypatch):
    """Two cells that need no measuring, the second of which fails until it is mended."""
    calls = []

    def broken(say):
        calls.append("broken")
        raise RuntimeError("no such device")

    def fine(say):
        calls.append("fine")
        say("measuring")
        spread = timing.spread([0.001])
        one = {"seconds": spread, "error": 0.1, "reported_error": 0.1, "orthonormality": 1e-7}
        return {"shape": [4, 4], "capacity": [2, 2], "least_error": 0.1, "sketched_modes": [], "routes": {"gram": one}}

    from benchmarks import truncation

    monkeypatch.setattr(truncation, "cells", lambda options: [Cell("fine", fine), Cell("broken", broken)])
    return calls


def test_a_cell_that_fails_is_told_and_the_others_are_kept(sections, tmp_path, capsys):
    arguments = ["--scale", "smoke", "--sections", "truncation", "--output", str(tmp_path), "--no-peers"]
    assert run.main(arguments) == 1
    stored = json.loads((tmp_path / "truncation.json").read_text())["cells"]
    assert list(stored) == ["fine"] and stored["fine"]["environment"]["versions"]["jax"]
    captured = capsys.readouterr()
    assert "truncation: broken failed: RuntimeError: no such device" in captured.err and "measuring" in captured.out
    assert "| gram | 1.000 | 1.000e-01 |" in (tmp_path / "README.md").read_text()
    assert run.main(arguments) == 1
    assert sections == ["fine", "broken", "broken"]
    run.main([*arguments, "--list"])
    assert "done  truncation: fine" in capsys.readouterr().out
    run.main([*arguments, "--again"])
    assert sections.count("fine") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "fast"], "--methods fast: expected some of dense"),
        (["--compressions", "95"], r"--compressions (95.0,): expected fractions"),
        (["--rounds", "0"], "must be positive"),
    ],
)
def test_options_that_cannot_work(arguments, message, tmp_path, capsys):
    assert run.main([*arguments, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_inference_of_all_forms_from_the_command_to_the_table(tmp_path):
    assert run.main(["--scale", "smoke", "--sections", "inference", "--output", str(tmp_path), "--no-peers"]) == 0
    (cell,) = Results(tmp_path / "inference.json").cells.values()
    assert set(cell["result"]["forms"]) == {"dense", "tucker", "plain", "exported"}
    for form in cell["result"]["forms"].values():
        assert form["images_per_second"] > 0 and form["peak_bytes"] > 0
    text = report.markdown(tmp_path)
    assert "| form | images / s |" in text and "| exported |" in text


def test_compiling_with_options_and_without_from_the_command_to_the_table(tmp_path):
    arguments = ["--scale", "smoke", "--sections", "compiler", "--methods", "dense", "--output", str(tmp_path)]
    assert run.main([*arguments, "--no-peers"]) == 0
    (cell,) = Results(tmp_path / "compiler.json").cells.values()
    assert set(cell["result"]["methods"]) == {"dense"}
    entry = cell["result"]["methods"]["dense"]
    for name in ("without", "with"):
        assert entry[name]["seconds"] > 0 and entry[name]["host_bytes"] >= 0  # the peak need not grow
        assert entry[name]["step_seconds"]["median"] > 0
    assert entry["step_ratio"]["of_medians"] > 0
    built = cell["result"]["building"]
    assert all(built[kind][name] > 0 for kind in ("dense", "tucker") for name in ("without", "with"))
    text = report.markdown(tmp_path)
    assert "| dense |" in text and "| network | building it [s] |" in text


def test_any_choice_of_methods_has_a_table(tmp_path):
    arguments = ["--scale", "smoke", "--sections", "steps", "--output", str(tmp_path), "--no-peers"]
    for batch in ("4", "8"):
        assert run.main([*arguments, "--methods", "factorized", "cores_only", "--batches", batch]) == 0
    assert run.main([*arguments, "--methods", "cores_only", "amortized", "--batches", "2"]) == 0
    cells = Results(tmp_path / "steps.json").cells
    alone = cells["alexnet-width0.125-batch2-90%"]["result"]["methods"]
    assert alone["cores_only"]["ratio"]["cores_only"]["of_medians"] == 1
    assert set(alone["amortized"]["ratio"]) == {"cores_only"}
    line = next(line for line in report.markdown(tmp_path).splitlines() if line.startswith("| factorized |"))
    assert line.count("(1.00)") == 2 and line.endswith("|  |")


def test_steps_handed_over_at_once_are_the_same_steps():
    from benchmarks.methods import AMORTIZED, TrainingStep

    network = Network("alexnet", 1 / 8, 2, 0.9, "tucker")
    for one, several in ((m, f"{m}_at_once") for m in ("dense", "amortized", "amortized_turning")):
        step, steps = TrainingStep(network, one), TrainingStep(network, several)
        assert steps.steps == AMORTIZED
        for _ in range(AMORTIZED // step.steps):
            step.run()
        steps.run()
        for leaf, other in zip(*(jax.tree.leaves(trained.state) for trained in (step, steps)), strict=True):
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(step.loss, steps.loss, rtol=1e-3)


def test_growth_counts_and_measures_the_same_layer(tmp_path):
    from benchmarks.growth import Layer, counted, slope

    small, wide = Layer(256, 8, 4), Layer(512, 8, 4)
    assert counted(wide, "dense") == 4 * counted(small, "dense")
    assert counted(wide, "factorized") < 2.2 * counted(small, "factorized")
    assert counted(small, "bug") > counted(small, "parallel") > counted(small, "factorized")
    assert slope([64], [1.0]) is None
    assert slope([1, 2, 4, 8, 16, 32], [9, 9, 9, 64, 256, 1024]) == pytest.approx(2)


def test_a_programs_operations_are_found_by_the_names_in_its_profile():
    text = """HloModule m

%fused (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %dot.1 = f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %q = (f32[4,4]{1,0}, f32[4]{0}) custom-call(%a), custom_call_target="lapack_geqrf", metadata={op_name="jit(f)/tdlrt.lift/geqrf"}
  ROOT %f.2 = f32[4,4]{1,0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/transpose(jvp())/dot"}
}
"""
    found = _instructions(text)
    assert found["f.2"] == ("jit(f)/transpose(jvp())/dot", "dot", "f32[4,4]{1,0}")
    assert found["q"][:2] == ("jit(f)/tdlrt.lift/geqrf", "lapack_geqrf")


def test_every_section_has_cells_at_every_scale(monkeypatch):
    import importlib

    from benchmarks import ahead

    monkeypatch.setattr(ahead, "_is_installed", lambda plugin: True)  # it has none where JAX's CUDA plugin is missing
    for options in run.SCALES.values():
        for section in run.SECTIONS:
            found = importlib.import_module(f"benchmarks.{section}").cells(options)
            assert found and len({cell.key for cell in found}) == len(found)
    assert isinstance(OPTIONS, cells.Options)


def test_the_committed_tables_are_those_of_the_committed_files():
    from pathlib import Path

    results = Path(run.__file__).parent / "results"
    others = {"communication": communication, "factorizations": factorizations}
    names = {path.name for path in results.iterdir() if path.is_dir()}
    assert names > others.keys()
    for name in names:
        directory = results / name
        if name in others:
            expected = others[name].markdown(Results(directory / f"{name}.json").cells)
        else:
            expected = report.markdown(directory)
        assert (directory / "README.md").read_text() == expected
