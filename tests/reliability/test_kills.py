"""Runs killed at random moments, a few of the many that ``python -m reliability.kills`` does."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.sealed import read_sealed
from reliability.kills import PHASES, Moment

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_killed_runs_end_with_the_same_numbers(tmp_path):
    """One kill in each phase, then to the end."""
    output = tmp_path / "kills.json"
    command = [sys.executable, "-m", "reliability.kills", "--kills", "4", "--seed", "3", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_sealed(output)
    assert found["kills"] == 4 == len(found["each"]) and found["runs"] >= 1 and found["differing"] == []
    assert [kill["aimed_at"] for kill in found["each"]] == list(PHASES)
    assert sum(kill["phase"] == kill["aimed_at"] for kill in found["each"]) >= 2, "most are where they were aimed at"


def test_a_phase_ends_where_it_began():
    moment = Moment()
    assert moment.get()[0] is None
    with moment.within("training"):
        with moment.within("compilation"):
            phase, inner = moment.get()
            assert phase == "compilation"
        phase, outer = moment.get()
        assert phase == "training" and outer > inner
    assert moment.get()[0] is None
