"""The kernel of a batch, whose rows are query tokens, in Triton's interpreter: run by `test_triton.py`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
import oracle
from cases import embeddings, grid, holes, packed, ragged
from conftest import INTERPRETED
from edgecolbert_kernels.backends.triton import config, scoring
from edgecolbert_kernels.backends.triton.score_rows_kernel import score_rows

NAN, INF = float("nan"), float("inf")
F16 = torch.float16


@pytest.fixture(autouse=True)
def rows():
    """Every call of a test goes to this kernel."""
    assert INTERPRETED
    scoring.forget()
    with ek.backend("triton"):
        yield
    assert {variant.function for variant in scoring._variants.values()} == {score_rows}
    scoring.forget()


def forward(
    Q, D, q_mask=None, d_mask=None, cu_d=None, normalize=False, mask_mode="exclude", scales=None, with_argmax=True
):
    batch = q_mask, d_mask, None, cu_d, None, None
    return scoring.forward(Q, D, *batch, normalize, mask_mode, "exact", with_argmax, scales)


def check(Q, D, **options):
    """Scores and the first tokens that have the maxima, of float64's similarities."""
    similarity = torch.einsum("qid,kjd->qkij", Q.double(), D.double())
    scores, argmax = forward(Q, D, **options)
    wanted = similarity.amax(3).sum(2).float()
    assert torch.equal(scores.nan_to_num(nan=1e30), wanted.nan_to_num(nan=1e30))
    np.testing.assert_array_equal(argmax.numpy().reshape(similarity.shape[:3]), similarity.numpy().argmax(3))
    assert torch.equal(forward(Q, D, with_argmax=False, **options)[0].nan_to_num(nan=1e30), scores.nan_to_num(nan=1e30))


@pytest.mark.parametrize("count", [64, 65, 70, 131])
def test_many_queries(count):
    """16 blocks of four take turns over the documents, the last ones fewer."""
    check(grid(count, 32, 16, dtype=F16, seed=1), grid(3, 9, 16, dtype=F16, seed=2))


def check_pairs(queries, documents, scores, argmax, q_mask=None, d_mask=None, mode="exclude"):
    found = argmax.reshape(len(queries) * len(documents), -1)
    for (i, j), chosen in zip(itertools.product(range(len(queries)), range(len(documents))), found, strict=True):
        q, d = queries[i].double().numpy(), documents[j].double().numpy()
        masks = None if q_mask is None else q_mask[i].numpy(), None if d_mask is None else d_mask[j].numpy()
        score, wanted = oracle.maxsim(q, d, *masks, mode)
        assert scores[i, j] == score
        np.testing.assert_array_equal(chosen.numpy(), wanted)


@pytest.mark.parametrize(
    ("count", "length"),
    [(2, 32), (4, 32), (9, 32), (13, 5), (5, 33), (1, 64), (2, 100), (2, 128), (1, 129), (2, 300)],
)
def test_queries(count, length):
    """Below each other where they are short, in several rounds where they are long."""
    check(grid(count, length, 16, seed=count, dtype=F16), grid(2, 70, 16, seed=3, dtype=F16))


@pytest.mark.parametrize("dim", [1, 16, 33, 48, 64, 96, 128, 129, 256])
def test_dimensions(dim):
    check(grid(3, 32, dim, seed=1, dtype=F16), grid(2, 67, dim, seed=2, dtype=F16))


@pytest.mark.parametrize("blocks", [(64, 16, 4, 1), (64, 32, 4, 1), (128, 128, 8, 1), (256, 256, 8, 1)])
def test_blocks(blocks, monkeypatch):
    """Tiles of a quarter of a chunk and of four chunks, whose last copies of a token are many."""
    monkeypatch.setattr(config, "rule", lambda *_: config.Blocks(*blocks))
    Q = grid(5, 32, 16, seed=1, dtype=F16)
    for length in (1, 20, 130, 300):
        check(Q, grid(2, length, 16, seed=length, dtype=F16))
    # Every similarity is a maximum, then all from some place on.
    D = torch.ones(3, 300, 16, dtype=F16)
    D[1, :21] = 0
    D[2, :135] = 0
    check(Q.abs() + 1 / 64, D)


def test_document_lengths():
    """Packed, and padded with NaN behind a mask; padding is never read."""
    lengths = [0, 1, 2, 33, 63, 64, 65, 129, 300]
    Q, documents = grid(3, 32, 16, seed=1), ragged(lengths, 16, make=grid, seed=2)
    Q, documents = Q.half(), [document.half() for document in documents]
    D, cu_d = packed(documents)
    scores, argmax = forward(Q, D, cu_d=cu_d)
    check_pairs(Q, documents, scores, argmax)
    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=NAN)
    d_mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    again, same = forward(Q, padded, d_mask=d_mask)
    assert torch.equal(again, scores) and torch.equal(same.flatten().int(), argmax.flatten().int())


@pytest.mark.parametrize("mode", ["exclude", "zero"])
def test_masks_with_holes(mode):
    """Tiles without a kept token before, between and after, ties, and a document without any."""
    Q, D = grid(2, 33, 16, seed=1, dtype=F16), grid(7, 200, 16, seed=2, dtype=F16)
    D[5] = D[5, :1]
    d_mask = holes(7, 200, seed=3, keep=0.1)
    d_mask[0], d_mask[1, :70], d_mask[2, 70:], d_mask[3, 20:190] = False, False, False, False
    d_mask[4] = torch.arange(200) == 130
    q_mask = holes(2, 33, seed=4)
    scores, argmax = forward(Q, D, q_mask, d_mask, mask_mode=mode)
    check_pairs(Q, D, scores, argmax, q_mask, d_mask, mode)
    D[~d_mask] = NAN
    again, same = forward(Q, D, q_mask, d_mask, mask_mode=mode)
    assert torch.equal(again, scores) and torch.equal(same, argmax)


def test_ties_and_signs():
    """The lowest token of several, also where maxima are negative, zero or minus zero."""
    Q = torch.full((2, 32, 16), 0.5, dtype=F16)
    Q[:, ::3] *= -1
    Q[:, 5] = 0
    D = grid(6, 150, 16, seed=1, dtype=F16)
    D = D[:, torch.arange(150) % 37]
    D[2] = -D[2].abs()
    D[3] = D[3].abs()
    D[4], D[5, 77:] = 0, -0.0
    check(Q, D)


def test_nan_and_infinity():
    """The first NaN wins, in its own document and query token only, also over an infinity before it."""
    Q, D = grid(2, 32, 16, seed=1, dtype=F16), grid(6, 140, 16, seed=2, dtype=F16)
    Q = Q.abs() + 1 / 64
    Q[1, 2, 0], Q[1, 9] = NAN, -Q[1, 9]
    D[0, [40, 66, 67], 3] = NAN
    D[1, [20, 21, 22], 0] = INF
    D[1, [20, 90], 1] = -INF
    D[1, 69, 0] = INF
    D[2, :, 4] = -INF
    D[3, :139, 4] = -INF
    D[4, 139, 4] = INF
    check(Q, D)
    d_mask = torch.ones(6, 140, dtype=torch.bool)
    d_mask[2, :3] = False
    scores, argmax = forward(Q, D, d_mask=d_mask)
    assert scores[0, 2] == -INF and (argmax.reshape(2, 6, 32)[0, 2] == 3).all()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_normalize(masked):
    Q, D = embeddings(3, 32, 48, seed=1, dtype=F16, norm=None), embeddings(4, 90, 48, seed=2, dtype=F16, norm=None)
    D[1, 4] = 0
    q_mask, d_mask = (holes(3, 32, seed=3), holes(4, 90, seed=4)) if masked else (None, None)
    unit_q, unit_d = (torch.nn.functional.normalize(X.double(), dim=-1) for X in (Q, D))
    similarity = torch.einsum("qid,kjd->qkij", unit_q, unit_d)
    if masked:
        similarity = similarity.masked_fill(~d_mask[None, :, None, :], -INF)
    value, _ = similarity.max(3)
    kept = torch.ones(3, 32) if q_mask is None else q_mask
    scores, argmax = forward(Q, D, q_mask, d_mask, normalize=True)
    assert torch.allclose(scores.double(), (value * kept[:, None]).sum(2), atol=1e-5)
    argmax = argmax.reshape(3, 4, 32).long()
    assert ((argmax >= 0) == kept.bool()[:, None]).all()
    chosen = similarity.gather(3, argmax.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(chosen[argmax >= 0], value[argmax >= 0], atol=1e-6)
    Q[0, 3, 0] = INF
    scores, argmax = forward(Q, D, normalize=True)
    assert scores[0].isnan().all() and scores[1:].isfinite().all()
    assert (argmax.reshape(3, 4, 32)[0, :, 3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
def test_small_storages(dtype):
    """Documents in a byte a dimension, packed, with a scale each."""
    Q, bounds = embeddings(2, 32, 48, seed=1, dtype=F16), [0, 0, 13, 110]
    if dtype == torch.int8:
        D = torch.arange(-127, 128).repeat(21)[: 110 * 48].reshape(110, 48).to(dtype)
    else:
        D = torch.arange(256, dtype=torch.uint8).repeat(21)[: 110 * 48].view(dtype).float().nan_to_num(0)
        D = D.reshape(110, 48).to(dtype)
    scales = torch.tensor([1.0, 0.25, 3.0])
    scores, _ = forward(Q, D, cu_d=torch.tensor(bounds), scales=scales)
    assert (scores[:, 0] == 0).all()
    for j in (1, 2):
        document = D[bounds[j] : bounds[j + 1]].to(torch.float64)
        wanted = (Q.double() @ document.T).amax(2).sum(1) * scales[j]
        assert torch.allclose(scores[:, j].double(), wanted, rtol=1e-6)


def test_winners_where_the_gradient_is_not_zero():
    Q, D = grid(9, 32, 16, seed=1, dtype=F16), grid(3, 70, 16, seed=2, dtype=F16)
    grad = torch.zeros(9, 3)
    grad[1, 0], grad[8, 2] = -1e-30, NAN
    rest = None, None, None, None, None, None, False, "exclude", "exact"
    argmax = forward(Q, D)[1].reshape(9, 3, 32)
    found = scoring.winners(grad, Q, D, *rest).reshape(9, 3, 32)
    assert torch.equal(found[grad != 0], argmax[grad != 0])


def test_strides():
    """Transposed, sliced, expanded: read as they are."""
    Q, D = grid(32, 3, 16, seed=1, dtype=F16).transpose(0, 1), grid(6, 80, 32, seed=2, dtype=F16)[::2, 1::2, :16]
    check(Q, D)
    check(Q[:1].expand(3, -1, -1), D[:1].expand(2, -1, -1))


def test_masked_zero_beside_infinity():
    """A masked similarity is 0 also where the query's token is infinite; a masked winner is no token."""
    Q, D = grid(2, 32, 16, seed=1, dtype=F16).abs() + 1, -grid(2, 70, 16, seed=2, dtype=F16).abs() - 1
    Q[0, 1, 0] = INF
    d_mask = torch.ones(2, 70, dtype=torch.bool)
    d_mask[0, 66] = False
    scores, argmax = forward(Q, D, d_mask=d_mask, mask_mode="zero")
    argmax = argmax.reshape(2, 2, 32)
    assert (scores[:, 0] == 0).all() and (argmax[:, 0] == -1).all()
    assert scores[0, 1] == -INF and argmax[0, 1, 1] == 0
