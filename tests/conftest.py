"""Fixtures: every instruction set this CPU can run, and the PyTorch backend, behind one name `engine`.

The sets are asked of the module, so a new one is tested without an edit here. Without the module only "torch" is left.
"""

from __future__ import annotations

import os
import subprocess
import sys

# Thousands of tiny parallel regions: threads that spin between them take the cores from whatever else runs here.
# Read once, when the OpenMP runtime comes in with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

import edgecolbert_kernels as ek
import edgecolbert_kernels.ops

try:
    from edgecolbert_kernels import _C
except ImportError:
    _C = None

ISAS = tuple(_C.available_isas()) if _C else ()
ENGINES = (*ISAS, "torch")
PRECISIONS = ("exact", "fast")


@pytest.fixture(params=ISAS or [pytest.param(None, marks=pytest.mark.skip(reason="the compiled module is not built"))])
def isa(request):
    """Each instruction set that the CPU can run, in use for the test."""
    _C.set_isa(request.param)
    with ek.backend("cpu"):
        yield request.param
    _C.set_isa("")


@pytest.fixture(params=ENGINES)
def engine(request):
    """Each instruction set of the compiled module in turn, then the PyTorch backend."""
    if request.param == "torch":
        with ek.backend("torch"):
            yield request.param
        return
    _C.set_isa(request.param)
    with ek.backend("cpu"):
        yield request.param
    _C.set_isa("")


@pytest.fixture(params=[*ISAS[:1], "torch"])
def backend(request):
    """The compiled module on its best instruction set, then PyTorch: for what no instruction set can change."""
    with ek.backend("torch" if request.param == "torch" else "cpu"):
        yield request.param


@pytest.fixture(params=PRECISIONS)
def precision(request):
    return request.param


@pytest.fixture
def threads():
    """A function that sets PyTorch's thread count; the count before is restored."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def python():
    """Runs Python source in a fresh interpreter and returns its output; fails on a non-zero exit, a crash or a hang."""

    def run(source: str, *arguments: str, timeout: float = 120, **environment: str | None) -> str:
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
        done = subprocess.run(
            [sys.executable, "-c", source, *arguments],
            env={name: value for name, value in variables.items() if value is not None},
            cwd=os.path.dirname(__file__),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
