"""Fixtures: every instruction set this CPU can run, the PyTorch backend and the GPU kernels, behind one name `engine`.

All are asked for, so a new one is tested without an edit here. Without the module and a GPU only "torch" is left. The GPU
kernels take part where there is a CUDA GPU, to which their backend then carries the tests' CPU tensors, and in Triton's
interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib

# Thousands of tiny parallel regions: threads that spin between them take the cores from whatever else runs here.
# Read once, when the OpenMP runtime comes in with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from torch.utils._pytree import tree_map

import edgecolbert_kernels as ek
import edgecolbert_kernels.ops
from edgecolbert_kernels.backends import cuda as cuda_backend
from edgecolbert_kernels.backends import triton as triton_backend

try:
    from edgecolbert_kernels import _C
except ImportError:
    _C = None

ISAS = tuple(_C.available_isas()) if _C else ()
INTERPRETED = triton_backend.supports("maxsim", "cpu", "float32") is None
GPU = triton_backend.supports("maxsim", "cuda", "float32") is None
CUDA = cuda_backend.supports("maxsim", "cuda", "float32") is None
ENGINES = (*ISAS, "torch", *(["triton"] if GPU or INTERPRETED else []), *(["cuda"] if CUDA else []))
ON_GPU = {"triton": triton_backend, "cuda": cuda_backend}
# A GPU's kernels are compiled for each dtype and dimension, a second each. EDGECOLBERT_TEST_WHOLE=1 takes them all.
WHOLE = not GPU or bool(os.environ.get("EDGECOLBERT_TEST_WHOLE"))
SHARE = 12
PRECISIONS = ("exact", "fast")


@pytest.fixture(params=ISAS or [pytest.param(None, marks=pytest.mark.skip(reason="the compiled module is not built"))])
def isa(request):
    """Each instruction set that the CPU can run, in use for the test."""
    _C.set_isa(request.param)
    with ek.backend("cpu"):
        yield request.param
    _C.set_isa("")


def on_gpu(function):
    """`function` of CPU tensors with its work done on the GPU; what it adds to is brought back."""

    def move(x, device):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    def call(*arguments):
        moved = [move(x, "cuda") for x in arguments]
        found = [move(x, "cpu") for x in function(*moved)]
        sums = arguments[-1] if len(arguments) > SUMS and isinstance(arguments[-1], torch.Tensor) else None
        if sums is not None and found[0] is not None:
            found[0] = sums.copy_(found[0])
        return tuple(found)

    return call


SUMS = 13  # arguments of a backward before `sum_queries`, at least


def tiles_on_gpu(make):
    """A backend's `RowSums` or `Weights` of CPU tensors, with its work done on the GPU; what it writes to is brought back."""

    def moved(tree, device):
        return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, tree)

    class Carried:
        def __init__(self, *arguments):
            self.carried = make(*moved(arguments, "cuda"))
            self.takes_everything = self.carried.takes_everything

        def add(self, *arguments):
            self.carried.add(*moved(arguments, "cuda"))

        def finish(self):
            return moved(self.carried.finish(), "cpu")

        def of(self, scores, some, out=None):
            found = self.carried.of(scores.cuda(), some).cpu()
            return found if out is None else out.copy_(found)

        def temperature_gradient(self):
            return self.carried.temperature_gradient().cpu()

    return Carried


def use(name, monkeypatch):
    """The context of an engine, which is not an instruction set."""
    if name in ON_GPU and not INTERPRETED:
        module = ON_GPU[name]
        for attribute in ("forward", "backward", "backward_recompute", "distill"):
            monkeypatch.setattr(module, attribute, on_gpu(getattr(module, attribute)))
        for attribute in ("RowSums", "Weights"):
            monkeypatch.setattr(module, attribute, tiles_on_gpu(getattr(module, attribute)))
        supports = module.supports
        monkeypatch.setattr(module, "supports", lambda op, device, dtype: supports(op, "cuda", dtype))
    return ek.backend(name)


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Each instruction set of the compiled module in turn, then PyTorch, then the GPU kernels."""
    if request.param in ("torch", *ON_GPU):
        with use(request.param, monkeypatch):
            yield request.param
        return
    _C.set_isa(request.param)
    with ek.backend("cpu"):
        yield request.param
    _C.set_isa("")


@pytest.fixture(params=[*ISAS[:1], *ENGINES[len(ISAS) :]])
def backend(request, monkeypatch):
    """The compiled module on its best instruction set, then the others: for what no instruction set can change."""
    with use(request.param if request.param in ("torch", *ON_GPU) else "cpu", monkeypatch):
        yield request.param


@pytest.fixture
def sweep(request):
    """The values of a sweep that the test's engine takes: all, or one in SHARE where each is compiled.

    Which ones goes by the test's name, so that tests which differ in a parameter take them all together.
    """
    name = next(name for name in ("engine", "backend") if name in request.fixturenames)

    def pick(values):
        values = list(values)
        if WHOLE or request.getfixturevalue(name) not in ON_GPU:
            return values
        return values[zlib.crc32(request.node.name.encode()) % min(SHARE, len(values)) :: SHARE]

    return pick


def examples(count):
    """How many hypothesis tries."""
    return count if WHOLE else -(-count // SHARE)


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
