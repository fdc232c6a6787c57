"""The GPU kernels of packing, stored documents and losses in Triton's interpreter; run by test_device_interpreted.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
from cases import embeddings, holes, ragged
from edgecolbert_kernels import reference
from edgecolbert_kernels.backends import pack_torch
from edgecolbert_kernels.backends.triton import pack
from edgecolbert_kernels.device import embeddings as there
from edgecolbert_kernels.device import packing
from losses import assert_as_near, value_and_gradients

CPU = torch.device("cpu")
LENGTHS = (0, 13, 1, 40, 7)


@pytest.fixture(autouse=True)
def kernels():
    with ek.backend("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 48, 129])
def test_packing(dim, source, dtype):
    """To the bit as PyTorch where nothing is normalised, else within a rounding of the storage."""
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    X = embeddings(int(bounds[-1]), dim, seed=dim, norm=None).to(source)
    kept = holes(len(X), seed=2)
    ends = torch.zeros(len(X) + 1, dtype=torch.int64)
    torch.cumsum(kept, 0, out=ends[1:])
    for normalize in (False, True):
        for mask, target, offsets in ((None, None, bounds), (kept, ends[:-1], ends[bounds])):
            found = []
            for module in (pack, pack_torch):
                tokens, scales, refused = packing.empty(
                    int(offsets[-1]), len(LENGTHS), dim, there.dtypes.NAMES[dtype], CPU
                )
                module.store_rows(X, bounds, mask, target, normalize, tokens, scales, refused)
                assert not refused
                found.append((tokens, scales, module.unpack_rows(tokens, offsets, scales)))
            (tokens, scales, rows), (wanted, wanted_scales, wanted_rows) = found
            if not normalize:
                assert torch.equal(tokens.view(torch.uint8), wanted.view(torch.uint8))
                assert scales is None or torch.equal(scales, wanted_scales)
                assert torch.equal(rows, wanted_rows)
            else:
                step = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-10 if dtype is not torch.int8 else 1.01 / 127
                torch.testing.assert_close(rows, wanted_rows, rtol=0, atol=step)


def test_packing_refuses_what_does_not_fit():
    bounds, X = torch.tensor([0, 3, 5]), torch.ones(5, 8)
    for dtype, value in ((torch.float16, 1e5), (torch.int8, torch.nan), (torch.int8, torch.inf), (torch.float32, 1e5)):
        X[4, 7] = value
        tokens, scales, refused = packing.empty(5, 2, 8, there.dtypes.NAMES[dtype], CPU)
        pack.store_rows(X, bounds, None, None, False, tokens, scales, refused)
        assert bool(refused) == (dtype is not torch.float32)
        kept = torch.arange(5) < 4
        refused.zero_()
        pack.store_rows(X, bounds, kept, torch.arange(5), False, tokens, scales, refused)
        assert not refused, "what is left out is not looked at"


@pytest.mark.parametrize("dtype", ["float16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("queries", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_stored_documents(dtype, queries):
    """Read as they are stored, and exact for that."""
    packed = ek.PackedEmbeddings.from_list(ragged((3, 0, 17, 40), 48, seed=3), dtype="float32")
    resident = there.from_host(packed, CPU, ek.PackedEmbeddings).to(dtype)
    stored = [there.unpack(resident[n : n + 1].arrays).double() for n in range(len(resident))]
    Q = embeddings(3, 7, 48, seed=9, dtype=queries)
    wanted = torch.tensor(
        [[(q @ d.T).amax(1).sum() if len(d) else 0.0 for d in stored] for q in Q.double()], dtype=torch.float64
    )
    torch.testing.assert_close(ek.maxsim(Q, resident).double(), wanted, rtol=1e-6, atol=2e-6)
    index = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 2])
    torch.testing.assert_close(ek.maxsim_indexed(Q, resident, *index).double(), wanted[index], rtol=1e-6, atol=2e-6)
    _, indices = ek.search(Q, resident, 2)
    assert torch.equal(indices, wanted.topk(2)[1])


NQ, ND, LQ, LD, DIM = 3, 5, 6, 9, 16
TARGETS = torch.zeros(NQ, ND, dtype=torch.bool)
TARGETS[[0, 0, 2], [1, 4, 3]] = True
LOSSES = {
    "cold": {"temperature": 0.05},
    "symmetric, smoothed": {"symmetric": True, "label_smoothing": 0.2, "temperature": 0.5},
    "margin, normalised": {"margin": 0.9, "normalize": True, "target": torch.tensor([2, -1, 4])},
    "several": {"target": TARGETS, "mask_mode": "zero"},
}
REGIMES = ({}, {"save_scores": True, "max_saved_bytes": 0}, {"save_scores": False})


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_contrastive(name, dtype):
    Q, D = embeddings(NQ, LQ, DIM, seed=1).to(dtype), embeddings(ND, LD, DIM, seed=2).to(dtype)
    masks = holes(NQ, LQ, seed=3), holes(ND, LD, seed=4)
    exact, plain = (
        value_and_gradients(reference.contrastive_loss, Q, D, *masks, dtype=each, **LOSSES[name])
        for each in (torch.float64, torch.float32)
    )
    for regime in REGIMES if dtype is torch.float32 else REGIMES[2:]:
        found = value_and_gradients(ek.contrastive_loss, Q, D, *masks, **LOSSES[name], **regime)
        assert_as_near(found, exact, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distillation(dtype):
    Q, D = embeddings(3, 5, 16, seed=1).to(dtype), embeddings(3, 4, 7, 16, seed=2).to(dtype)
    teacher, masks = embeddings(3, 4, seed=3, norm=None), (holes(3, 5, seed=4), holes(3, 4, 7, seed=5))
    exact, plain = (
        value_and_gradients(reference.distillation_loss, Q, D, teacher, *masks, dtype=each)
        for each in (torch.float64, torch.float32)
    )
    assert_as_near(value_and_gradients(ek.distillation_loss, Q, D, teacher, *masks), exact, plain)


def test_gradient_cache():
    """Chunks of a batch through an encoder with dropout, and the whole at once."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(8, 16)
    queries, documents = embeddings(6, 4, 8, seed=1), embeddings(6, 5, 8, seed=2)

    def loss(q, d):
        return ek.contrastive_loss(q, d, temperature=0.3, save_scores=False)

    ek.GradCache(encoder, loss, mini_batch_size=2).step(queries, documents)
    found = encoder.weight.grad.clone()
    encoder.zero_grad()
    reference.contrastive_loss(encoder(queries), encoder(documents), temperature=0.3).backward()
    torch.testing.assert_close(found, encoder.weight.grad, rtol=1e-4, atol=1e-6)


def test_numbers_of_the_host():
    """What the streams hand over is numpy's, on any memory."""
    tokens = np.arange(6, dtype=np.float16).reshape(2, 3)
    tokens.flags.writeable = False
    assert there.dtypes.from_host(tokens).tolist() == tokens.tolist()
