"""`python -m edgecolbert_kernels.env`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import edgecolbert_kernels as ek
from conftest import CUDA, GPU
from edgecolbert_kernels import env
from edgecolbert_kernels.backends import native
from marks import compiled


def run(*arguments, **environment):
    root = os.path.dirname(os.path.dirname(ek.__file__))
    return subprocess.run(
        [sys.executable, "-m", "edgecolbert_kernels.env", *arguments],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help():
    done = run("--help")
    assert done.returncode == 0
    assert "--json" in done.stdout
    assert "EDGECOLBERT_ISA" in done.stdout


def test_text_says_what_runs(capsys):
    assert env.main([]) == 0
    text = capsys.readouterr().out
    for name in (ek.__version__, torch.__version__, "triton", "cuda", "threads"):
        assert name in text


def test_without_torch_and_module():
    """The text copes with everything that may be absent."""
    found = env.report()
    found.update(torch=None, module={"missing": "it is not built"})
    found["threads"]["torch"] = None
    text = "\n".join(env.lines(found))
    assert "not installed" in text
    assert "it is not built" in text


@compiled
def test_json_equals_the_module():
    done = run("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == ek.__version__
    assert found["module"]["available"] == native.module().available_isas()
    assert found["module"]["isa"] in found["module"]["available"]
    assert found["backends"]["cpu"] is None
    assert bool(found["backends"]["cuda"]) is not CUDA


@compiled
def test_forced_instruction_set():
    assert json.loads(run("--json", EDGECOLBERT_ISA="scalar").stdout)["module"]["isa"] == "scalar"


@compiled
def test_refused_instruction_set():
    done = run(EDGECOLBERT_ISA="mmx")
    assert done.returncode == 1
    assert "'mmx'" in done.stdout
    assert "scalar" in done.stdout


@pytest.mark.skipif(GPU, reason="a GPU is there")
def test_refused_backend():
    done = run(EDGECOLBERT_BACKEND="cuda")
    assert done.returncode == 1
    assert "GPU" in done.stdout


def test_threads_of_numpy_calls():
    assert json.loads(run("--json", EDGECOLBERT_NUM_THREADS="3").stdout)["threads"]["numpy"] == 3
