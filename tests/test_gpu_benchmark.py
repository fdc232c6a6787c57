"""The benchmark of GPUs, on a CPU with tiny shapes: that it runs to its end and what its rows say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
            assert row["device"]["p50"] > 0 and row["wall"]["p50"] > 0
            assert row["gpu"] is None and set(row["peak"]) == {"GB/s", "TFLOP/s"}
            assert row["error"] <= 0.3
    assert "late-interaction-kernels: skipped, no GPU" in done.stdout
    assert "reached" not in done.stdout, "a dry run has no numbers"
