"""The soak's own judgement: kernels that do not hold what they promise, and memory that grows; and a moment of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tdlrt_jax
from reliability import soak


@pytest.fixture
def params():
    kernel = tdlrt_jax.hosvd(jax.random.normal(jax.random.key(0), (6, 5)), rank=2)
    return jax.device_get({"kernel": tdlrt_jax.resize(kernel, 4), "bias": jnp.zeros(5)})


def test_a_good_kernel_has_no_problems(params):
    problems, deviation = soak.broken_invariants(params, {"kernel": [2, 2]})
    assert problems == [] and 0 < deviation < 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda k: k._replace(factors=(k.factors[0] * 1.001, k.factors[1])), "factor 0 of rank 2 deviates by 2.0e-03"),
        (lambda k: k._replace(factors=(k.factors[0], np.eye(5, 4))), "factor 1 of rank 2 deviates"),
        (lambda k: k._replace(core=np.ones((4, 4))), "the core has entries beyond its ranks"),
        (lambda k: k._replace(core=k.core * np.nan), "not finite"),
    ],
)
def test_a_broken_one_is_named(params, change, words):
    params["kernel"] = change(params["kernel"])
    problems, _ = soak.broken_invariants(params, {"kernel": [2, 2]})
    assert any(words in problem for problem in problems)


def test_other_ranks_than_reported_are_noticed(params):
    problems, _ = soak.broken_invariants(params, {"kernel": [1, 2]})
    assert any("has columns beyond its rank 1" in problem for problem in problems)


def look(index, **found):
    same = {"minutes": index, "step": index, "loss": 1.0, "tolerance": 0.1, "rank": {"kernel": [2 + index % 3, 2]}}
    same |= {"stored": 40, "deviation": 1e-7, "compilations": 3, "changes": 2, "host_bytes": 1000}
    same |= {"heap_bytes": 300, "state_bytes": 60 + index % 7}
    return soak.Look(**{**same, "device_bytes": 100 + index % 7, "arrays": 7, **found})


def test_what_grows_is_named():
    assert soak.summary([look(i) for i in range(40)])["problems"] == []
    grown = soak.summary([look(i, host_bytes=1000 + 3 * i) for i in range(40)])
    assert grown["problems"] == ["host memory grew by 5.7%"]
    grown = soak.summary([look(i, heap_bytes=300 + i) for i in range(40)])
    assert [problem.split(" grew")[0] for problem in grown["problems"]] == ["heap in use"]
    grown = soak.summary([look(i, device_bytes=100 + i % 7 + i) for i in range(40)])
    assert [problem.split(" grew")[0] for problem in grown["problems"]] == ["device memory beyond the state"]
    assert soak.summary([look(i, arrays=7 + i) for i in range(40)])["problems"][0].startswith("live arrays grew")
    (problem,) = soak.summary([look(i, compilations=9) for i in range(40)])["problems"]
    assert problem == "9 compilations for 2 changes of array sizes"


def test_the_first_looks(tmp_path, monkeypatch):
    """Ranks move with the tolerance, and what comes back from a checkpoint goes on."""
    monkeypatch.setattr(soak, "LOOK_EVERY", 5)
    monkeypatch.setattr(soak, "SWING", 40)
    monkeypatch.setattr(soak, "SAVE_EVERY", 2)
    looks = []
    for found in soak.soak(60, tmp_path):
        looks.append(found)
        if len(looks) == 8:
            break
    assert [found.step for found in looks] == list(range(5, 45, 5))
    assert len({str(found.rank) for found in looks}) > 2
    assert len(list(tmp_path.iterdir())) == 2, "checkpoints"
    assert looks[-1].compilations <= looks[-1].changes + 1 and looks[-1].host_bytes > 1e7 and looks[-1].arrays > 10
    assert all(found.heap_bytes < found.host_bytes and 0 < found.state_bytes < found.device_bytes for found in looks)
