"""The GPU kernels in Triton's interpreter, at small shapes: run by `test_triton.py` in a process of its own.

The interpreter takes some ten milliseconds a program, so each test has few. bfloat16 runs as float32 there.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
import oracle
from cases import STORAGES, embeddings, grid, holes, packed, ragged, storage_name, to_float64
from conftest import INTERPRETED
from edgecolbert_kernels.backends import torch_
from edgecolbert_kernels.backends import triton as triton_backend
from layouts import LAYOUTS, flat, gradients, in_batch
from test_backward import exact_gradients, magnitudes, output_gradient

NAN, INF = float("nan"), float("inf")
F32, F16, BF16 = STORAGES[0], STORAGES[1], STORAGES[2]


@pytest.fixture(autouse=True)
def chosen():
    assert INTERPRETED
    with ek.backend("triton"):
        yield


def argmax_of(Q, D, q_mask=None, d_mask=None, cu_q=None, cu_d=None, mask_mode="exclude"):
    arguments = (q_mask, d_mask, cu_q, cu_d, None, None, False, mask_mode, "exact", True)
    return torch.ops.edgecolbert.maxsim_forward(Q, D, *arguments)


def check_on_grid(layout, dim, q_dtype, d_dtype, masked, mask_mode):
    """Scores and gradients are the float64 ones, rounded once."""
    case, grad, wanted, _ = exact_gradients(layout, dim, q_dtype, d_dtype, grid, masked, mask_mode=mask_mode)
    scores = case.expected(*case.leaves(torch.float64), mask_mode=mask_mode)
    assert torch.equal(case(case.Q, case.D, mask_mode=mask_mode).double(), scores.detach())
    found = gradients(case, *case.leaves(), grad, mask_mode=mask_mode)
    for leaf, mine, exact in zip((*flat(case.Q), *flat(case.D)), found, wanted, strict=True):
        assert mine.dtype == leaf.dtype
        assert torch.equal(mine, exact.to(leaf.dtype))


@pytest.mark.parametrize("mask", ["none", "exclude", "zero"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, mask):
    check_on_grid(layout, 48, F16, F16, mask != "none", "zero" if mask == "zero" else "exclude")


@pytest.mark.parametrize("dim", [1, 7, 16, 17, 32, 33, 64, 96, 100, 128, 129])
def test_dimensions(dim):
    """Every split into pieces, and every tail of the last."""
    check_on_grid("in_batch", dim, F16, F16, True, "exclude")


@pytest.mark.parametrize("dim", [257, 384])
def test_large_dimensions(dim):
    """More than a program holds: read in a loop."""
    for normalized in (False, True):
        case = in_batch(dim, F16, F16, num_queries=2, num_documents=2)
        grad = embeddings(*case.shape, seed=6, norm=None)
        exact = case.expected(*case.leaves(torch.float64), normalize=normalized)
        assert torch.allclose(case(case.Q, case.D, normalize=normalized).double(), exact, atol=1e-5)
        found = gradients(case, *case.leaves(), grad, normalize=normalized)
        wanted = gradients(case.expected, *case.leaves(torch.float64), grad, normalize=normalized)
        assert all(torch.allclose(f.double(), w, atol=1e-3) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("d_dtype", STORAGES, ids=storage_name)
@pytest.mark.parametrize("q_dtype", STORAGES, ids=storage_name)
def test_storages(q_dtype, d_dtype):
    check_on_grid("in_batch", 33, q_dtype, d_dtype, True, "exclude")


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
@pytest.mark.parametrize("layout", ["in_batch", "own_candidates", "varlen", "indexed"])
def test_rounding(layout, dtype, normalized):
    """Accumulation in float32 and one rounding to the dtype, element by element."""
    case, grad, wanted, sizes = exact_gradients(layout, 48, dtype, dtype, embeddings, True, normalized, scale_Q=3)
    found = gradients(case, *case.leaves(), grad, normalize=normalized)
    n = (len(case.pairs) * 40 + 4 * 48 + 16) * oracle.UNIT_ROUNDOFF["float32"]
    for mine, exact, size in zip(found, wanted, sizes, strict=True):
        allowed = n * size + oracle.UNIT_ROUNDOFF[storage_name(dtype)] * (exact.abs() + n * size) + 2.0**-25
        assert ((mine.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("scale", [1e-8, 1e-30])
def test_small_gradients(scale):
    case = in_batch(48, F16, F32, num_queries=3, num_documents=4)
    grad = embeddings(*case.shape, seed=6, norm=None)
    grad_D = gradients(case, *case.leaves(), grad * scale)[1]
    exact = gradients(case.expected, *case.leaves(torch.float64), (grad * scale).double())[1]
    size = magnitudes(case, grad * scale, False)[1]
    assert ((grad_D - exact).abs() <= 70 * oracle.UNIT_ROUNDOFF["float32"] * size).all()
    assert (grad_D[exact != 0] != 0).all()


@pytest.mark.parametrize("query_length", [1, 3, 15, 16, 17, 32, 33, 130])
def test_queries_share_columns(query_length):
    """Several short queries stand beside each other, a long one takes several blocks: each gets its own score."""
    D = grid(2, 29, 16, seed=3, dtype=F16)
    for count in (1, 2, 9, 19):
        Q = grid(count, query_length, 16, seed=count, dtype=F16)
        similarity = torch.einsum("qid,kjd->qkij", Q.double(), D.double())
        scores, argmax = argmax_of(Q, D)
        assert torch.equal(scores.double(), similarity.amax(3).sum(2))
        np.testing.assert_array_equal(argmax.numpy().reshape(similarity.shape[:3]), similarity.numpy().argmax(3))


def test_every_document_length():
    """Around every tile, padded with NaN behind a mask and packed; padding is never read."""
    lengths = [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 128, 129, 200]
    queries, documents = ragged([5, 0, 11], 16, make=grid, seed=1), ragged(lengths, 16, make=grid, seed=2)
    wanted = [[oracle.maxsim(q, d) for d in to_float64(documents)] for q in to_float64(queries)]
    (Q, cu_q), (D, cu_d) = packed(queries), packed(documents)
    scores, argmax = argmax_of(Q, D, cu_q=cu_q, cu_d=cu_d)
    assert scores.tolist() == [[score for score, _ in row] for row in wanted]
    np.testing.assert_array_equal(argmax.numpy(), np.concatenate([chosen for row in wanted for _, chosen in row]))
    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=NAN)
    d_mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    assert torch.equal(ek.maxsim(queries[0], padded, d_mask=d_mask), scores[0])


def test_masks_with_holes():
    """Tiles without a kept token before, between and after, ties, and a document without any."""
    Q, D = grid(2, 5, 16, seed=1, dtype=F16), grid(7, 200, 16, seed=2, dtype=F16)
    D[5] = D[5, :1]
    d_mask = holes(7, 200, seed=3, keep=0.1)
    d_mask[0], d_mask[1, :70], d_mask[2, 70:], d_mask[3, 20:190] = False, False, False, False
    d_mask[4] = torch.arange(200) == 130
    q_mask = holes(2, 5, seed=4)
    for mode in ("exclude", "zero"):
        scores, argmax = argmax_of(Q, D, q_mask, d_mask, mask_mode=mode)
        for (i, j), chosen in zip(itertools.product(range(2), range(7)), argmax.reshape(-1, 5), strict=True):
            q, d = Q[i].double().numpy(), D[j].double().numpy()
            score, wanted = oracle.maxsim(q, d, q_mask[i].numpy(), d_mask[j].numpy(), mode)
            assert scores[i, j] == score
            np.testing.assert_array_equal(chosen.numpy(), wanted)


def test_nan_and_infinity():
    """The first NaN wins, in its own document and query only; infinities follow IEEE; -inf everywhere names the first."""
    Q, D = grid(2, 5, 16, seed=1), grid(5, 70, 16, seed=2)
    D[0, [40, 66], 3] = NAN
    D[1, 69, 0] = INF
    D[2] = -INF
    Q[0] = Q[0].abs() + 1 / 64
    d_mask = torch.ones(5, 70, dtype=torch.bool)
    d_mask[2, :3] = False
    Q[1, 2, 0] = NAN
    scores, argmax = argmax_of(Q, D, None, d_mask)
    argmax = argmax.reshape(2, 5, 5)
    assert scores[0, 0].isnan() and (argmax[0, 0] == 40).all()
    assert scores[0, 1] == INF and (argmax[0, 1] == 69).all()
    assert scores[0, 2] == -INF and (argmax[0, 2] == 3).all()
    assert scores[0, 3:].isfinite().all()
    assert scores[1].isnan().all()
    assert (argmax[1, 3:, 2] == 0).all()


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("where", ["query", "gradient"])
def test_gradient_of_what_is_not_finite(where, normalized):
    """It reaches the tokens that it chose or was chosen by, as in PyTorch, and no other row."""
    case = in_batch(17, F16, F16, masked=False)
    grad = output_gradient(case.shape)
    grad[grad == 0] = 0.5
    if where == "query":
        case.Q[1, 3, 4] = INF
    else:
        grad[0, 1], grad[1, 2] = NAN, INF
    found = gradients(case, *case.leaves(), grad, normalize=normalized)
    with ek.backend("torch"):
        wanted = gradients(case, *case.leaves(), grad, normalize=normalized)
    assert all(torch.allclose(f, w, rtol=2e-3, atol=1e-4, equal_nan=True) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputed_winners(layout, monkeypatch):
    """Without an argmax: the same bits, and the same where most pairs have no gradient."""
    case = LAYOUTS[layout](33, F16, F16)
    grad = embeddings(*case.shape, seed=6, norm=None)
    grad = grad * (embeddings(*case.shape, seed=7, norm=None) > 0.5)
    wanted = gradients(case, *case.leaves(), grad)
    saved = triton_backend.backward

    def recomputed(grad, Q, D, argmax, *rest):
        return triton_backend.backward_recompute(grad, Q, D, *rest)

    monkeypatch.setattr(triton_backend, "backward", recomputed)
    found = gradients(case, *case.leaves(), grad)
    monkeypatch.setattr(triton_backend, "backward", saved)
    assert all(map(torch.equal, found, wanted))


def test_sum_of_query_gradients():
    case = in_batch(17, F16, F16)
    Q, D, masks = case.Q, case.D, (case.arguments["q_mask"], case.arguments["d_mask"])
    grad = output_gradient(case.shape)
    for normalized in (False, True):
        rest = *masks, None, None, None, None, normalized, "exclude", "exact"
        argmax = triton_backend.forward(Q, D, *rest, True)[1]
        sums, theirs = torch.ones(Q.shape), torch.ones(Q.shape)
        assert triton_backend.backward(grad, Q, D, argmax, *rest, True, False, sums)[0] is sums
        torch_.backward(grad, Q, D, argmax, *rest, True, False, theirs)
        assert torch.allclose(sums, theirs, atol=1e-5)


def test_strides():
    """Transposed, sliced, expanded, with the dimensions apart: read as they are, or copied."""
    base, D = grid(16, 5, 3, seed=1), grid(6, 26, 16, seed=2)[::2, 1::2]
    wanted = ek.maxsim(base.permute(2, 1, 0).contiguous(), D.contiguous())
    assert torch.equal(ek.maxsim(base.permute(2, 1, 0), D), wanted)
    assert torch.equal(ek.maxsim(base.permute(2, 1, 0), D[:1].expand(3, -1, -1)), wanted[:, :1].expand(-1, 3))
    leaf = D.detach().requires_grad_()
    grad = output_gradient((3, 3))
    found = torch.autograd.grad(ek.maxsim(base.permute(2, 1, 0), leaf), leaf, grad)[0]
    plain = D.contiguous().requires_grad_()
    assert torch.equal(found, torch.autograd.grad(ek.maxsim(base.permute(2, 1, 0), plain), plain, grad)[0])


@pytest.mark.parametrize(
    ("q_shape", "d_shape"),
    [((0, 5, 8), (3, 4, 8)), ((2, 0, 8), (3, 4, 8)), ((2, 5, 8), (0, 4, 8)), ((2, 5, 8), (3, 0, 8)), ((2, 0, 8), (3, 0, 8)),
     ((2, 3, 8), (2, 0, 4, 8)), ((2, 3, 8), (2, 3, 0, 8))],
)  # fmt: skip
def test_empty(q_shape, d_shape):
    Q, D = grid(*q_shape, seed=1).requires_grad_(), grid(*d_shape, seed=2).requires_grad_()
    scores = ek.maxsim(Q, D)
    assert scores.shape == (q_shape[0], d_shape[-3])
    assert (scores == 0).all()
    scores.sum().backward()
    assert (Q.grad == 0).all() and (D.grad == 0).all()


def test_boundaries_and_indices_that_name_nothing():
    """On a GPU nobody looks at their values first: a kernel reads inside its buffers, and such a pair scores NaN."""
    Q, D = grid(2, 5, 16, seed=1), grid(3, 7, 16, seed=2)
    query_index, document_index = torch.tensor([0, -1, 2, 1, 1]), torch.tensor([1, 0, 0, 3, 2])
    rest = None, None, None, None, query_index, document_index, False, "exclude", "exact"
    scores, argmax = triton_backend.forward(Q, D, *rest, True)
    assert scores.isnan().tolist() == [False, True, True, True, False]
    grad_q, grad_d = triton_backend.backward(torch.ones(5), Q, D, argmax, *rest, True, True)
    real = torch.tensor([0, 4])
    rest = None, None, None, None, query_index[real], document_index[real], False, "exclude", "exact"
    wanted = triton_backend.backward(torch.ones(2), Q, D, argmax.view(5, 5)[real].flatten(), *rest, True, True)
    assert torch.equal(grad_q, wanted[0]) and torch.equal(grad_d, wanted[1])
    for cu_d in ([0, 50, 7], [-3, 4, 9], [7, 2, 21], [1 << 40, 3, 5]):
        cu_q, boundaries = torch.tensor([0, 4, 99]), torch.tensor(cu_d)
        rest = None, None, cu_q, boundaries, None, None, False, "exclude", "exact"
        scores, argmax = triton_backend.forward(Q.flatten(0, 1), D.flatten(0, 1), *rest, True)
        assert scores.isfinite().all()
        triton_backend.backward(torch.ones(2, 2), Q.flatten(0, 1), D.flatten(0, 1), argmax, *rest, True, True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=storage_name)
def test_small_storages(dtype):
    """Documents in a byte a dimension with a scale each: all of float8's values, its subnormals too."""
    Q = embeddings(2, 5, 48, seed=1, dtype=F16)
    if dtype == torch.int8:
        D = torch.arange(-127, 128).repeat(6)[: 2 * 13 * 48].reshape(2, 13, 48).to(dtype)
    else:
        D = torch.arange(256, dtype=torch.uint8).repeat(5)[: 2 * 13 * 48].view(dtype).float().nan_to_num(0)
        D = D.reshape(2, 13, 48).to(dtype)
    scales = torch.tensor([0.25, 3.0])
    wanted = torch.einsum("qid,kjd->qkij", Q.double(), D.double()).amax(3).sum(2) * scales
    for queries in (Q, Q.float()):
        rest = None, None, None, None, None, None, False, "exclude", "exact"
        scores, _ = triton_backend.forward(queries, D, *rest, False, scales)
        assert torch.allclose(scores.double(), wanted, rtol=1e-6)
