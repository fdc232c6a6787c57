"""The CUDA C++ kernels: that they compile, wherever NVRTC is, and what they answer, on a GPU, at their own tails.

Values are multiples of 1/64, so that every sum is exact and the float64 answer is the only right one; ties are frequent.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import edgecolbert_kernels as ek
from cases import DIMENSIONS, grid, holes
from conftest import CUDA
from edgecolbert_kernels import reference
from edgecolbert_kernels.backends import cuda
from edgecolbert_kernels.backends.cuda import compiler, driver

on_gpu = pytest.mark.skipif(not CUDA, reason="there is no GPU that the kernels run on")
with_compiler = pytest.mark.skipif(compiler.missing() is not None, reason="NVRTC is not found")

RERANK = {
    "STEPS": 3, "TOKENS": 4, "STAGES": 4, "WARPS": 1, "BLOCK_DOCUMENTS": 4, "LAYOUT": 0, "BF16": 0, "INT8": 0, "Q_PACKED": 0,
    "D_PACKED": 0, "D_MASK": 0, "ZERO": 0, "Q_MASK": 0, "SCALED": 0,
}  # fmt: skip
GRADIENTS = {
    "DIM": 48, "SLICE": 48, "WARPS": 8, "LAYOUT": 0, "Q_TYPE": 0, "D_TYPE": 0, "WIDE_ARGMAX": 0, "Q_PACKED": 0,
    "D_PACKED": 0, "NORMALIZE": 0, "MULTI": 0, "ALIGNED": 1, "Q_STRIDE": 48,
}  # fmt: skip
QUERIES = {
    "DIM": 48, "SLICE": 48, "TOKENS": 4, "WARPS": 8, "SHARES": 1, "LAYOUT": 0, "Q_TYPE": 0, "D_TYPE": 0, "WIDE_ARGMAX": 0,
    "Q_PACKED": 0, "D_PACKED": 0, "NORMALIZE": 0, "SUM": 0, "ALIGNED": 1, "D_STRIDE": 48, "TOGETHER": 1,
}  # fmt: skip
VARIANTS = [
    ("rerank.cu", RERANK),
    ("rerank.cu", {**RERANK, "STEPS": 8, "STAGES": 3, "WARPS": 8, "BLOCK_DOCUMENTS": 1, "LAYOUT": 1, "BF16": 1}),
    ("rerank.cu", {**RERANK, "LAYOUT": 2, "INT8": 1, "D_PACKED": 1, "SCALED": 1}),
    ("rerank.cu", {**RERANK, "D_MASK": 1, "ZERO": 1, "Q_MASK": 1, "Q_PACKED": 1}),
    ("document_gradients.cu", GRADIENTS),
    ("document_gradients.cu", {**GRADIENTS, "DIM": 33, "SLICE": 33, "Q_TYPE": 2, "ALIGNED": 0, "Q_STRIDE": 0, "NORMALIZE": 1}),
    ("document_gradients.cu", {**GRADIENTS, "LAYOUT": 1, "Q_TYPE": 1, "D_TYPE": 1, "WIDE_ARGMAX": 1, "WARPS": 4}),
    ("document_gradients.cu", {**GRADIENTS, "LAYOUT": 2, "D_TYPE": 2, "Q_PACKED": 1, "D_PACKED": 1, "MULTI": 1}),
    ("document_gradients.cu", {**GRADIENTS, "DIM": 128, "SLICE": 128, "Q_STRIDE": 128, "D_TYPE": 1, "Q_TYPE": 1}),
    ("document_gradients.cu", {**GRADIENTS, "DIM": 128, "SLICE": 128, "Q_STRIDE": 128, "MULTI": 1, "NORMALIZE": 1}),
    ("document_gradients.cu", {**GRADIENTS, "DIM": 256, "SLICE": 256, "Q_STRIDE": 256, "Q_TYPE": 2, "MULTI": 1}),
    ("query_gradients.cu", QUERIES),
    ("query_gradients.cu", {**QUERIES, "DIM": 128, "SLICE": 128, "D_STRIDE": 128, "SHARES": 8, "D_TYPE": 1, "LAYOUT": 1}),
    ("query_gradients.cu", {**QUERIES, "D_TYPE": 2, "WIDE_ARGMAX": 1, "SHARES": 2, "SUM": 1, "NORMALIZE": 1, "WARPS": 6}),
    ("query_gradients.cu", {**QUERIES, "DIM": 33, "SLICE": 33, "D_STRIDE": 0, "ALIGNED": 0, "TOGETHER": 0, "LAYOUT": 2}),
    ("query_gradients.cu", {**QUERIES, "NORMALIZE": 1, "TOGETHER": 0, "Q_PACKED": 1, "D_PACKED": 1, "Q_TYPE": 2}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))


@with_compiler
def test_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.compiled("rerank.cu", RERANK, 90).startswith(b"\x7fELF")
    (kept,) = (tmp_path / "edgecolbert_kernels").iterdir()
    kept.write_bytes(b"kept")
    assert compiler.compiled("rerank.cu", RERANK, 90) == b"kept"


def machine_code(code, tmp_path, *options):
    """What cuobjdump, which the triton package brings, says of a cubin."""
    folder = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    (tmp_path / "kernel.cubin").write_bytes(code)
    command = [folder / "cuobjdump", *options, tmp_path / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@with_compiler
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_machine_code(number, capability, tmp_path):
    """No spills; in a rerank, as many tensor-core steps as d has sixteens, a step at d = 48 three times."""
    source, constants = VARIANTS[number]
    code = compiler.compiled(source, constants, capability)
    usage = machine_code(code, tmp_path, "-res-usage")
    assert re.search(r"STACK:0\b", usage), usage
    assert re.search(r"LOCAL:0\b", usage), usage
    products = len(re.findall(r"\bHMMA\.16816\.F32", machine_code(code, tmp_path, "-sass")))
    if source == "rerank.cu":
        assert products == constants["STEPS"] * constants["TOKENS"] * constants["STAGES"]


@with_compiler
def test_what_does_not_compile_says_why():
    with pytest.raises(compiler.CompileError, match=r"rerank\.cu.*error"):
        compiler.compiled("rerank.cu", {**RERANK, "TOKENS": -1}, 90)


@with_compiler
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiler.compiled("rerank.cu", RERANK, 90).startswith(b"\x7fELF")


@with_compiler
def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def fail(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    assert compiler.compiled("rerank.cu", RERANK, 90).startswith(b"\x7fELF")


@with_compiler
def test_a_gpu_that_the_compiler_does_not_know(monkeypatch):
    """It is left to Triton."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability, reason in (((9, 0), None), ((13, 7), "capability 13.7")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        said = cuda._missing_compiler.__wrapped__()
        assert said is None if reason is None else reason in said


def test_nothing_is_loaded_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="once before"):
        driver.Kernel("rerank.cu", "rerank", RERANK, 128)._load(0)


def test_importing_the_backend_imports_nothing():
    source = "import sys, edgecolbert_kernels.backends.cuda; print('torch' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def exact(Q, D, q_mask=None, d_mask=None, **options):
    """Scores in float64, of one query without its axis."""
    single = Q.dim() == 2
    Q, q_mask = (x[None] if single and x is not None else x for x in (Q, q_mask))
    scores = reference.maxsim(Q.double(), D.double(), q_mask, d_mask, **options)[0]
    return scores[0] if single else scores


def scored(*arguments, **options):
    """By the kernels, and in float64."""
    with ek.backend("cuda"):
        found = ek.maxsim(*(None if x is None else x.cuda() for x in arguments), **options)
    return found.cpu(), exact(*arguments, **options)


@on_gpu
@pytest.mark.parametrize("dim", [each for each in DIMENSIONS if each % 16 == 0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rerank(dim, dtype):
    for query_length in (1, 7, 8, 31, 32, 33):
        for count, length in ((1, 1), (5, 15), (70, 16), (70, 17), (3, 300), (1500, 33)):
            Q, D = grid(query_length, dim, dtype=dtype, seed=1), grid(count, length, dim, dtype=dtype, seed=2)
            found, wanted = scored(Q, D)
            assert torch.equal(found, wanted.float()), (query_length, count, length)


@on_gpu
@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
def test_rerank_with_masks(mask_mode):
    Q, q_mask = grid(32, 48, dtype=torch.float16, seed=1), holes(32, seed=3)
    for count, length, keep in ((9, 70, 0.5), (40, 33, 0.03), (1500, 20, 0.1)):
        D, d_mask = grid(count, length, 48, dtype=torch.float16, seed=2), holes(count, length, seed=4, keep=keep)
        D[~d_mask] = torch.nan if mask_mode == "exclude" else 7
        found, wanted = scored(Q, D, q_mask, d_mask, mask_mode=mask_mode)
        assert torch.equal(found, wanted.float()), (count, length)


@on_gpu
def test_candidates_and_pairs():
    Q, D = grid(6, 32, 64, dtype=torch.float16, seed=1), grid(6, 11, 40, 64, dtype=torch.float16, seed=2)
    found, wanted = scored(Q, D)
    assert torch.equal(found, wanted.float())
    flat = D.flatten(0, 1)
    of_query, of_document = torch.tensor([0, 5, 5, 2, 6, 0]), torch.tensor([65, 0, 7, 7, 1, -1])
    with ek.backend("cuda"):
        found = ek.maxsim_indexed(*(x.cuda() for x in (Q, flat, of_query, of_document))).cpu()
    wanted = reference.maxsim_indexed(Q.double(), flat.double(), of_query[:4], of_document[:4])[0]
    assert torch.equal(found[:4], wanted.float())
    assert found[4:].isnan().all()


@on_gpu
@pytest.mark.parametrize("documents", ["padded", "packed"])
@pytest.mark.parametrize("dim", DIMENSIONS)
def test_gradients(dim, documents):
    for query_length, num_queries, count, length in (
        (1, 1, 1, 1),
        (31, 5, 6, 17),
        (33, 70, 3, 300),
        (70, 40, 2, 700),
        (33, 1100, 2, 40),
    ):
        for query_dtype, dtype in ((torch.float16, torch.bfloat16), (torch.float32, torch.float16)):
            Q = grid(num_queries, query_length, dim, dtype=query_dtype, seed=1)
            D = grid(count, length, dim, dtype=dtype, seed=2)
            # Powers of two, so that sums stay exact in float32, with zeros to skip.
            generator = torch.Generator().manual_seed(3)
            grad = 2.0 ** torch.randint(-2, 2, (num_queries, count), generator=generator)
            grad *= torch.rand(num_queries, count, generator=generator) < 0.6
            wide = [X.double().requires_grad_() for X in (Q, D)]
            exact(*wide).backward(grad.double())
            leaves = [X.cuda().requires_grad_() for X in (Q, D)]
            with ek.backend("cuda"):
                if documents == "padded":
                    scores = ek.maxsim(*leaves)
                else:
                    bounds = torch.arange(0, count * length + 1, length).cuda()
                    cu_q = torch.arange(0, num_queries * query_length + 1, query_length).cuda()
                    scores = ek.maxsim_varlen(*(x.flatten(0, 1) for x in leaves), cu_q, bounds)
                scores.backward(grad.cuda())
            for leaf, right in zip(leaves, wide, strict=True):
                assert torch.equal(leaf.grad.cpu(), right.grad.to(leaf.dtype)), (query_length, num_queries, length)


@on_gpu
def test_small_gradients_are_kept():
    Q, D = grid(40, 32, 48, dtype=torch.float16, seed=1), grid(3, 60, 48, dtype=torch.float32, seed=2)
    wide = D.double().requires_grad_()
    grad = 1e-30 * (0.5 + torch.rand(40, 3, generator=torch.Generator().manual_seed(3)))
    exact(Q, wide).backward(grad.double())
    leaf = D.cuda().requires_grad_()
    with ek.backend("cuda"):
        ek.maxsim(Q.cuda(), leaf).backward(grad.cuda())
    atol = 1e-6 * wide.grad.abs().max().item()
    torch.testing.assert_close(leaf.grad.cpu().double(), wide.grad, rtol=1e-5, atol=atol)


@on_gpu
def test_nan_reaches_only_the_rows_that_it_chose():
    Q, D = grid(4, 8, 48, dtype=torch.float16, seed=1), grid(3, 20, 48, dtype=torch.float16, seed=2)
    Q[1, 3, 5] = torch.nan
    leaf = D.cuda().requires_grad_()
    with ek.backend("cuda"):
        ek.maxsim(Q.cuda(), leaf).sum().backward()
    assert (leaf.grad.isnan().any(-1).sum(-1) == 1).all()
