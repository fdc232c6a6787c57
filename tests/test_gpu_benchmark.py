"""The benchmark of GPUs, on a CPU with tiny shapes: that it runs to its end and what its rows say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import failed, replaced, run_for

ROOT = Path(__file__).parent.parent


def test_dry_run(tmp_path):
    out = tmp_path / "gpu.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "EDGECOLBERT_BACKEND": "torch"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = list(dict.fromkeys(row["case"] for row in rows))
    assert len(names) == done.stdout.count("s left")
    for name in names:
        contenders = {row["contender"]: row for row in rows if row["case"] == name}
        assert {"fused", "torch eager, fp32 sums"} <= set(contenders), name
        for row in contenders.values():
            assert row["p50"] > 0 and row["wall"]["p50"] > 0
            assert row["gpu"] is None and set(row["peak"]) == {"GB/s", "TFLOP/s"}
            assert row["error"] <= 0.3
    assert "late-interaction-kernels: skipped, no GPU" in done.stdout
    assert "reached" not in done.stdout, "a dry run has no numbers"


def test_rows_that_are_measured_again():
    """They stand where the case stood; of a contender that no longer runs nothing is left."""
    before = [{"case": case, "contender": who, "p50": 1} for case, who in (("a", "x"), ("a", "y"), ("b", "x"))]
    again = [{"case": case, "contender": "x", "p50": 2} for case in ("c", "a")]
    assert replaced(before, again) == [again[1], before[2], again[0]]


def test_what_does_not_end_is_ended():
    code = "import time, signal; signal.signal(signal.SIGINT, lambda *_: exit(3)); print('begun', flush=True); time.sleep(99)"
    output, status = run_for(5.0, [sys.executable, "-c", code])
    assert output == "begun\n" and status is None
    assert run_for(60.0, [sys.executable, "-c", "print(1)"]) == ("1\n", 0)


@pytest.mark.parametrize(
    "found, wanted",
    [
        ({"exit_status": 0, "passed": 9}, False),
        ({"exit_status": 1, "passed": 9, "failed": 1}, True),
        ({"exit_status": None, "passed": 9}, False),
        ({"exit_status": None, "passed": 9, "error": 1}, True),
        ({"exit_status": None}, True),
    ],
)
def test_tests_without_an_end(found, wanted):
    """Out of time is no failure; without one that passed, it is."""
    assert failed(found) is wanted
