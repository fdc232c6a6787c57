"""The known defects of other MaxSim packages, one test each, named after the package: none of them may appear here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
import oracle
from cases import address_space, embeddings, grid, holes


def float64_scores(Q, D, d_mask=None):
    similarity = torch.einsum("qid,kjd->qkij", Q.double(), D.double())
    if d_mask is not None:
        similarity = similarity.masked_fill(~d_mask[None, :, None, :], -torch.inf)
    return similarity.amax(3).sum(2)


@pytest.mark.parametrize("scale", [1e-6, 1e-7, 1e-8])
def test_late_interaction_kernels_gradient_cast_to_fp16(engine, scale):
    """Its low-memory backward loses 1.8 % at 1e-6, 15 % at 1e-7 and everything at 1e-8."""
    Q = embeddings(4, 32, 48, seed=1, dtype=torch.float16)
    D = embeddings(4, 60, 48, seed=2).requires_grad_()
    grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) * scale
    ek.maxsim(Q, D).backward(grad)
    wide = D.detach().double().requires_grad_()
    torch.einsum("qid,kjd->qkij", Q.double(), wide).amax(3).sum(2).backward(grad.double())
    error = (D.grad - wide.grad).abs().max() / wide.grad.abs().max()
    assert error < 128 * oracle.UNIT_ROUNDOFF["float32"]


def test_late_interaction_kernels_32_bit_offsets(engine):
    """Its offsets into D overflow beyond 2^31 elements: two documents that far apart, by stride alone."""
    far = 2**31 + 16
    D = torch.from_numpy(address_space(far + 64)).as_strided((2, 3, 4), (far, 4, 1))
    D.copy_(grid(2, 3, 4, seed=1))
    Q = grid(2, 5, 4, seed=2).half()
    assert torch.equal(ek.maxsim(Q, D), ek.maxsim(Q, D.contiguous()))


def test_late_interaction_kernels_fp32_lowered_to_fp16(engine):
    """Similarities that differ by 2^-20 only: in fp16 they are one."""
    Q = torch.tensor([[[1.0, 1.0]]])
    D = torch.tensor([[[1.0, 0.0]], [[1.0, 2.0**-20]]])
    scores = ek.maxsim(Q, D)
    assert (scores[0, 1] - scores[0, 0]).item() == 2.0**-20


@pytest.mark.parametrize("num_queries", [1, 2, 64])
def test_flash_maxsim_query_lengths_ignored(engine, num_queries):
    """It drops query lengths for small batches (Nq * B < 500)."""
    Q, D = grid(num_queries, 12, 16, seed=1), grid(5, 13, 16, seed=2)
    q_mask = torch.arange(12).expand(num_queries, 12) < 7
    assert torch.equal(ek.maxsim(Q, D, q_mask), ek.maxsim(Q[:, :7], D))
    assert not torch.equal(ek.maxsim(Q, D, q_mask), ek.maxsim(Q, D))


def test_flash_maxsim_empty_document_scores_minus_infinity(engine):
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1] = False
    assert ek.maxsim(grid(3, 12, 16, seed=1), grid(2, 13, 16, seed=2), None, mask)[:, 1].tolist() == [0, 0, 0]
    assert ek.maxsim(torch.ones(3, 16), [torch.ones(0, 16)]).tolist() == [0]


def test_flash_maxsim_holes_in_masks(engine):
    """It takes lengths only, so a token after a hole is lost and one inside it is scored."""
    Q, D = grid(3, 12, 16, seed=1).half(), grid(4, 13, 16, seed=2).half()
    mask = holes(4, 13, seed=3)
    mask[:, 0], mask[:, -1] = False, True
    assert torch.equal(ek.maxsim(Q, D, None, mask).double(), float64_scores(Q, D, mask))


def test_pylate_flash_backend_prefix_lengths(engine):
    """It turns a punctuation skiplist into a prefix of as many tokens."""
    Q = torch.eye(4)[None]
    D = torch.eye(4)[None] * torch.tensor([1.0, 2, 4, 8])
    skiplist = torch.tensor([[True, False, True, True]])
    assert ek.maxsim(Q, D, None, skiplist).item() == 1 + 4 + 8
    assert ek.maxsim(Q, D, None, torch.tensor([[True, True, True, False]])).item() == 1 + 2 + 4


def test_flash_maxsim_and_lik_gradients_differ_from_run_to_run(engine):
    """Atomics add in any order; here many query tokens of many queries choose one document token."""
    Q, D = embeddings(16, 32, 48, seed=1).requires_grad_(), embeddings(8, 40, 48, seed=2)
    D[:, 3] = 1.0
    D.requires_grad_()
    grad = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    runs = [torch.autograd.grad(ek.maxsim(Q, D), (Q, D), grad) for _ in range(20)]
    assert all(all(map(torch.equal, run, runs[0])) for run in runs)


@pytest.mark.parametrize("order", ["F", "transposed view"])
def test_maxsim_cpu_fortran_order(engine, order):
    """It reads column-major arrays as row-major ones."""
    Q, D = grid(12, 16, seed=1).numpy(), grid(3, 13, 16, seed=2).numpy()
    wanted = float64_scores(torch.from_numpy(Q)[None], torch.from_numpy(D))[0].float().numpy()
    if order == "F":
        q, d = np.asfortranarray(Q), np.asfortranarray(D)
    else:
        q, d = np.ascontiguousarray(Q.T).T, np.ascontiguousarray(D.transpose(2, 1, 0)).transpose(2, 1, 0)
    np.testing.assert_array_equal(ek.maxsim(q, d), wanted)
    np.testing.assert_array_equal(ek.maxsim(q, list(d)), wanted)


def test_maxsim_cpu_aborts_on_an_empty_document(engine):
    query, document = np.ones((3, 8), np.float32), np.ones((2, 8), np.float32)
    assert ek.maxsim(query, [document, document[:0], document]).tolist() == [24, 0, 24]
    assert ek.maxsim(query, np.ones((2, 0, 8), np.float32)).tolist() == [0, 0]


def test_maxsim_cpu_drops_nan(engine):
    query, documents = np.ones((3, 8), np.float32), np.ones((2, 13, 8), np.float32)
    documents[0, 6, 2] = np.nan
    scores = ek.maxsim(query, documents)
    assert np.isnan(scores[0])
    assert scores[1] == 24


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_numkong_coarse_argmax(engine, precision):
    """Its int8 argmax ignores the scale of a token and is wrong in 26-53 % of cases."""
    Q = embeddings(4, 32, 48, seed=1)
    D = embeddings(6, 60, 48, seed=2) * torch.rand(6, 60, 1, generator=torch.Generator().manual_seed(3))
    _, argmax = torch.ops.edgecolbert.maxsim_forward(
        Q, D, None, None, None, None, None, None, False, "exclude", precision, True
    )
    similarity = torch.einsum("qid,kjd->qkij", Q.double(), D.double())
    picked = similarity.gather(3, argmax.reshape(4, 6, 32, 1).long())[..., 0]
    step = 0 if precision == "exact" else 2 * 48 * 2.0**-16
    assert (similarity.amax(3) - picked).max() <= step + 100 * oracle.UNIT_ROUNDOFF["float32"]


def test_pylate_torch_path_zero_beats_negative(engine):
    """It multiplies masked similarities by 0. Only mask_mode="zero" may do as it does."""
    Q, D = torch.ones(1, 3, 4), -torch.ones(1, 5, 4)
    mask = torch.tensor([[True, True, False, False, True]])
    assert ek.maxsim(Q, D, None, mask).item() == -12
    assert ek.maxsim(Q, D, None, mask, mask_mode="zero").item() == 0


def test_pylate_sums_in_bf16(engine):
    """Its bf16 costs 2.2 nDCG@10 on SciFact: every sum here is fp32 whatever the storage."""
    for dtype in (torch.bfloat16, torch.float16):
        Q, D = embeddings(4, 32, 128, seed=1, dtype=dtype), embeddings(6, 60, 128, seed=2, dtype=dtype)
        scores = ek.maxsim(Q, D)
        assert scores.dtype == torch.float32
        wanted = float64_scores(Q, D)
        bound = max(oracle.bound(q.double().numpy(), d.double().numpy()) for q in Q for d in D)
        assert (scores - wanted).abs().max() <= bound


def test_pylate_pairwise_has_no_masks(engine):
    Q, D = grid(4, 12, 16, seed=1), grid(4, 13, 16, seed=2)
    q_mask, d_mask = holes(4, 12, seed=3), holes(4, 13, seed=4)
    wanted = ek.maxsim(Q, D, q_mask, d_mask).diagonal()
    assert torch.equal(ek.maxsim_pairs(Q, D, q_mask, d_mask), wanted)
    assert not torch.equal(ek.maxsim_pairs(Q, D), wanted)


def test_pylate_rerank_zero_padding(engine):
    """Its rerank pads ragged lists with zeros and no mask: a zero beats every negative similarity."""
    query, documents = torch.ones(3, 8), [-torch.ones(2, 8), -torch.ones(7, 8)]
    assert ek.maxsim(query, documents).tolist() == [-24, -24]


def test_rerankers_sorted_scores(engine):
    """It pairs documents with scores already sorted: the results here stand in the order of the documents."""
    query, documents = torch.ones(1, 4), [torch.full((2, 4), value) for value in (0.25, 1.0, 0.5)]
    assert ek.maxsim(query, documents).tolist() == [1, 4, 2]


def test_llama_index_mean_pooled_query(engine):
    """It averages the query into one vector, which is not MaxSim."""
    Q, D = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[1.0, 0], [0, 1]]])
    assert ek.maxsim(Q, D).item() == 2
