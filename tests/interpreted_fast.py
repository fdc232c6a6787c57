"""Float32 in TF32 products, in Triton's interpreter: run by `test_triton.py`. Operands lose here what tensor cores cut off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import edgecolbert_kernels as ek
from cases import embeddings
from conftest import INTERPRETED

NAN, INF = float("nan"), float("inf")
LARGEST = torch.finfo(torch.float32).max


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch):
    assert INTERPRETED
    create_dot = interpreter.InterpreterBuilder.create_dot

    def cut_off(self, a, b, c, precision, imprecise):
        if "TF32" in str(precision).upper():
            for operand in (a, b):
                operand.data = (operand.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return create_dot(self, a, b, c, precision, imprecise)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", cut_off)
    with ek.backend("triton"):
        yield


@pytest.mark.parametrize("dim", [16, 33, 48, 128, 300])
def test_error(dim):
    """Three products are within 2^-19 of each element, where one is not."""
    Q, D = embeddings(3, 5, dim, seed=1), embeddings(4, 40, dim, seed=2)
    similarity = torch.einsum("qid,kjd->qkij", Q.double(), D.double())
    # A maximum moves by no more than the similarities do.
    size = torch.einsum("qid,kjd->qkij", Q.double().abs(), D.double().abs()).amax(3).sum(2)
    error = (ek.maxsim(Q, D, precision="fast").double() - similarity.amax(3).sum(2)).abs()
    assert (error <= (2.0**-19 + dim * 2.0**-24) * size).all()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        error = (ek.maxsim(Q, D).double() - similarity.amax(3).sum(2)).abs()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert error.max() > 2.0**-19 * size.max(), "as one product"


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients(normalize):
    """Rows are picked as they are, whatever their low bits."""
    Q, D = embeddings(5, 7, 48, seed=1, norm=None), embeddings(4, 40, 48, seed=2, norm=None)
    grad = embeddings(5, 4, 1, seed=3, norm=None)[..., 0]
    found = []
    for precision in ("exact", "fast"):
        leaves = Q.clone().requires_grad_(), D.clone().requires_grad_()
        scores = ek.maxsim(*leaves, normalize=normalize, precision=precision)
        found.append(torch.autograd.grad(scores, leaves, grad))
    for exact, fast in zip(*found, strict=True):
        assert (exact - fast).abs().max() <= 2.0**-21 * exact.abs().max()


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF])
def test_any_nan(bits):
    for place in (0, 1):
        sides = np.full((1, 2, 5), 0.25, np.float32), np.full((1, 14, 5), 0.25, np.float32)
        sides[place].view(np.uint32)[0, 1, 4] = bits
        assert ek.maxsim(*map(torch.from_numpy, sides), precision="fast").isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_large_numbers(sign):
    """The largest is one, products beyond it are infinities of their sign, and so are those with an infinity."""
    for q, d, wanted in (
        (1.0, LARGEST, LARGEST),
        (1e30, 1e30, INF),
        (1.0, INF, INF),
        (1.0 + 2.0**-20, INF, INF),
        (INF, 1e-20, INF),
        (1e-30, 1e30, 1.0),
    ):
        Q, D = torch.full((1, 1, 1), q), torch.full((2, 13, 1), sign * d)
        assert ek.maxsim(Q, D, precision="fast")[0].tolist() == pytest.approx([sign * wanted] * 2, rel=2.0**-19)
    Q, D = torch.ones(1, 1, 2), torch.tensor([[[INF, -INF]]])
    assert ek.maxsim(Q, D, precision="fast").isnan().all()
