"""Runs the property tests with other examples every time, ten thousand and more in all: ``make properties``.

What hypothesis counted is written to a file after every property (``tests/properties/results``): cases, that is examples which
fulfilled the property's assumptions, others that were discarded, failures, seconds, versions, commit and hardware. Stopped at any
moment, it goes on with the properties that have not passed yet; once all have, it begins anew. A failure prints the decorator
``@reproduce_failure`` that draws it again, and is the first example to be tried the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "properties"


def main() -> int:
    """Returns the exit code: 0 if every property holds, 1 if one fails or there were too few cases."""
    parser = argparse.ArgumentParser(prog="make properties ARGS=...", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    parser.add_argument("--only", metavar="NAME", help="only properties whose names contain this, as with pytest -k")
    parser.add_argument(
        "--least", type=int, default=10_000, help="cases that there must be in all (default: %(default)s)"
    )
    parser.add_argument("--record", type=Path, default=TESTS / "results" / "cpu.json", help="default: %(default)s")
    given = parser.parse_args()
    path = given.record.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if given.fresh or _is_complete(path):
        path.unlink(missing_ok=True)
    environ = {**os.environ, "TDLRT_PROPERTIES": str(path)}
    failed = False
    for module in sorted(TESTS.glob("test_*.py")):  # a process each: what is compiled takes memory
        command = [sys.executable, "-m", "pytest", str(module), "--hypothesis-profile=nightly", "-v", "--no-header"]
        code = subprocess.run(command + (["-k", given.only] if given.only else []), cwd=ROOT, env=environ).returncode
        if code not in (0, 1, 5):  # 5: all of its properties are done, or none is asked for
            return code
        failed |= code == 1
        record = json.loads(path.read_text()) if path.exists() else {"cases": 0, "properties": {}}
        print(f"{record['cases']:,} cases of {len(record['properties'])} properties so far", flush=True)
    if failed:
        print(f"a property fails; the rest is in {path}", file=sys.stderr)
    elif not given.only:
        _close(path)
        failed = record["cases"] < given.least
        if failed:
            print(f"{record['cases']:,} cases, expected {given.least:,} or more", file=sys.stderr)
    return int(failed)


def _is_complete(path: Path) -> bool:
    return path.exists() and json.loads(path.read_text()).get("complete", False)


def _close(path: Path) -> None:
    """All have passed: the next session begins anew."""
    record = json.loads(path.read_text())
    path.write_text(json.dumps({"complete": True, **record}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
