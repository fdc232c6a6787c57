"""The GPU kernels without a GPU: in Triton's interpreter, which must be switched on before triton is imported."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = [
    f"{name}::{test}"
    for name in (
        "interpreted_kernels.py",
        "interpreted_rows.py",
        "interpreted_distillation.py",
        "interpreted_contrastive.py",
        "interpreted_fast.py",
    )
    for test in re.findall(r"^def (test_\w+)", (HERE / name).read_text(), re.MULTILINE)
]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("number", range(3))
def test_interpreted(number):
    """A third of the tests of these files, so that they can run side by side."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *TESTS[number::3]],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
