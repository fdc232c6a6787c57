"""Every layout: shapes and dtypes of results, the pairs that are scored, agreement between layouts, and empty everything."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import edgecolbert_kernels as ek
import oracle
from cases import STORAGES, embeddings, grid, holes, packed, padded, ragged, storage_name, to_float64
from layouts import LAYOUTS, flat


@functools.cache
def exact_scores(layout, dim, q_dtype, d_dtype, make, masked, scale=1.0, **options):
    """A layout's case, both sides scaled, and its scores in float64."""
    case = LAYOUTS[layout](dim, q_dtype, d_dtype, make=make, masked=masked)
    case.Q, case.D = (
        [t * scale for t in rows] if isinstance(rows, list) else rows * scale for rows in (case.Q, case.D)
    )
    return case, case.expected(*case.leaves(torch.float64), **options).detach()


@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores(engine, sweep, precision, layout, masked, mask_mode):
    for dim, q_dtype, d_dtype in sweep(itertools.product((3, 16, 48, 129), STORAGES, STORAGES)):
        case, wanted = exact_scores(layout, dim, q_dtype, d_dtype, grid, masked, mask_mode=mask_mode)
        result = case(case.Q, case.D, mask_mode=mask_mode, precision=precision)
        assert result.dtype == torch.float32
        assert result.shape == case.shape
        assert oracle.same_on_grid(result, wanted, precision, 33, dim), (dim, q_dtype, d_dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalize(engine, sweep, precision, layout):
    """As torch.nn.functional.normalize in float64, within fp32 rounding of the norms and sums."""
    for dim, dtype, scale in sweep(itertools.product((3, 48, 128), STORAGES, (1.0, 100.0, 2.0**-10))):
        case, wanted = exact_scores(layout, dim, dtype, dtype, embeddings, True, scale, normalize=True)
        result = case(case.Q, case.D, normalize=True, precision=precision).double()
        # Unit rows: each similarity errs by at most 3 d + 8 roundings, of sum |q d| <= 1.
        allowed = 33 * (3 * dim + 8 + 33) * oracle.UNIT_ROUNDOFF["float32"] + (5e-4 if precision == "fast" else 0)
        assert (result - wanted).abs().max() <= allowed, (dim, dtype, scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_dtype", [*STORAGES, torch.float64], ids=storage_name)
def test_out_dtype(engine, layout, out_dtype):
    """The fp32 scores, rounded once; gradients flow through the cast."""
    case = LAYOUTS[layout](16, torch.float32, torch.float32)
    scores = case(case.Q, case.D)
    cast = case(case.Q, case.D, out_dtype=out_dtype)
    assert cast.dtype == out_dtype
    assert torch.equal(cast, scores.to(out_dtype))
    Q, D = case.leaves()
    case(Q, D, out_dtype=out_dtype).sum().backward()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in (*flat(Q), *flat(D)) if leaf.numel())


def test_two_dimensional_query_drops_the_axis(engine, precision):
    Q, D = embeddings(12, 48, seed=1), embeddings(5, 13, 48, seed=2)
    q_mask, d_mask = holes(12, seed=3), holes(5, 13, seed=4)
    kwargs = {"precision": precision}
    assert torch.equal(ek.maxsim(Q, D, **kwargs), ek.maxsim(Q[None], D, **kwargs)[0])
    assert torch.equal(
        ek.maxsim(Q, D, q_mask, d_mask, **kwargs), ek.maxsim(Q[None], D, q_mask[None], d_mask, **kwargs)[0]
    )
    assert torch.equal(ek.maxsim(Q, list(D), **kwargs), ek.maxsim(Q[None], list(D), **kwargs)[0])


def test_ragged_against_padded(engine, precision):
    """A list, its padded form with a mask and its packed form hold the same tokens: one matrix."""
    queries, documents = (
        ragged((5, 0, 33, 1, 8), 48, make=grid, seed=1),
        ragged((12, 1, 0, 40, 13), 48, make=grid, seed=2),
    )
    (Q, q_mask), (D, d_mask) = padded(queries), padded(documents)
    (Qp, cu_q), (Dp, cu_d) = packed(queries), packed(documents)
    wanted = ek.maxsim(queries, documents, precision=precision)
    assert torch.equal(ek.maxsim(Q, D, q_mask, d_mask, precision=precision), wanted)
    assert torch.equal(ek.maxsim_varlen(Qp, Dp, cu_q, cu_d, precision=precision), wanted)
    assert torch.equal(ek.maxsim(Q[:1, :5], documents, precision=precision), wanted[:1])
    assert torch.equal(ek.maxsim(queries, D, None, d_mask, precision=precision), wanted)
    index = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    chosen = ek.maxsim_indexed(Q, D, index[:, 0], index[:, 1], q_mask, d_mask, precision=precision)
    assert torch.equal(chosen.reshape(5, 5), wanted)
    chosen = ek.maxsim_indexed(queries, documents, index[:, 0], index[:, 1], precision=precision)
    assert torch.equal(chosen.reshape(5, 5), wanted)


def test_own_candidates_are_rows_of_the_matrix(engine, precision):
    Q, D = grid(3, 12, 48, seed=1), grid(3, 4, 13, 48, seed=2)
    wanted = torch.stack([ek.maxsim(q, d, precision=precision) for q, d in zip(Q, D, strict=True)])
    assert torch.equal(ek.maxsim(Q, D, precision=precision), wanted)
    assert torch.equal(ek.maxsim_pairs(Q, D[:, 2], precision=precision), wanted[:, 2])


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_index_dtypes(engine, index_dtype):
    Q, D = grid(3, 5, 16, seed=1), grid(4, 7, 16, seed=2)
    q, d = torch.tensor([2, 0, 2, 1]), torch.tensor([3, 3, 0, 1])
    wanted = ek.maxsim(Q, D)[q, d]
    assert torch.equal(ek.maxsim_indexed(Q, D, q.to(index_dtype), d.to(index_dtype)), wanted)
    if index_dtype in (torch.int64, torch.int32):
        cu = torch.tensor([0, 3, 15])
        X = Q.reshape(15, 16)
        wanted = ek.maxsim_varlen(X, X, cu, cu)
        assert torch.equal(ek.maxsim_varlen(X, X, cu.to(index_dtype), cu.to(index_dtype)), wanted)


EMPTY_SHAPES = {
    "no queries": ((0, 5, 8), (3, 7, 8)),
    "no documents": ((2, 5, 8), (0, 7, 8)),
    "no query tokens": ((2, 0, 8), (3, 7, 8)),
    "no document tokens": ((2, 5, 8), (3, 0, 8)),
    "no tokens": ((2, 0, 8), (3, 0, 8)),
    "nothing": ((0, 0, 8), (0, 0, 8)),
    "no candidates": ((2, 5, 8), (2, 0, 7, 8)),
    "empty candidates": ((2, 5, 8), (2, 3, 0, 8)),
    "no queries, so no candidates": ((0, 5, 8), (0, 3, 7, 8)),
    "one query, no documents": ((5, 8), (0, 7, 8)),
    "one query, no document tokens": ((5, 8), (3, 0, 8)),
    "one query, no query tokens": ((0, 8), (3, 7, 8)),
}


@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
@pytest.mark.parametrize("name", EMPTY_SHAPES)
def test_empty(engine, precision, name, mask_mode):
    """Shapes are kept, scores are 0, gradients are 0 and have the inputs' shapes, with masks and without."""
    q_shape, d_shape = EMPTY_SHAPES[name]
    Q, D = torch.ones(q_shape, requires_grad=True), torch.ones(d_shape, requires_grad=True)
    wanted = torch.zeros(d_shape[:2] if len(d_shape) == 4 else (*q_shape[:-2], d_shape[0]))
    masks = torch.ones(q_shape[:-1], dtype=torch.bool), torch.ones(d_shape[:-1], dtype=torch.bool)
    for arguments in ((), masks):
        scores = ek.maxsim(Q, D, *arguments, mask_mode=mask_mode, precision=precision)
        assert torch.equal(scores, wanted)
        gradients = torch.autograd.grad(scores, (Q, D), torch.ones_like(scores))
        assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(gradients, (Q, D), strict=True))
        with torch.no_grad():
            assert torch.equal(ek.maxsim(Q, D, *arguments, normalize=True, precision=precision), wanted)


def test_empty_pairs_varlen_indexed_and_lists(engine, precision):
    none, one = torch.ones(0, 8), torch.ones(3, 8)
    zero, no_index = torch.tensor([0]), torch.tensor([], dtype=torch.int64)
    kwargs = {"precision": precision}
    assert ek.maxsim_pairs(torch.ones(0, 5, 8), torch.ones(0, 7, 8), **kwargs).shape == (0,)
    assert torch.equal(ek.maxsim_pairs(torch.ones(2, 5, 8), torch.ones(2, 0, 8), **kwargs), torch.zeros(2))
    assert ek.maxsim_varlen(none, none, zero, zero, **kwargs).shape == (0, 0)
    assert ek.maxsim_varlen(one, none, torch.tensor([0, 3]), zero, **kwargs).shape == (1, 0)
    assert torch.equal(ek.maxsim_varlen(none, none, *[torch.tensor([0, 0, 0])] * 2, **kwargs), torch.zeros(2, 2))
    assert ek.maxsim_indexed(torch.ones(2, 5, 8), torch.ones(2, 7, 8), no_index, no_index, **kwargs).shape == (0,)
    assert ek.maxsim_indexed(torch.ones(0, 5, 8), torch.ones(0, 7, 8), no_index, no_index, **kwargs).shape == (0,)
    assert torch.equal(ek.maxsim([none, one], [one, none, none], **kwargs), torch.tensor([[0.0, 0, 0], [24, 0, 0]]))
    assert ek.maxsim([one, none], [], **kwargs).shape == (2, 0)
    assert ek.maxsim(one, [], **kwargs).shape == (0,)


def test_packed_tail_outside_any_document(engine, precision):
    """Rows after the last offset belong to nobody: not scored, NaN allowed, gradient zero."""
    Q, D = grid(9, 16, seed=1), grid(30, 16, seed=2)
    D[25:] = float("nan")
    cu_q, cu_d = torch.tensor([0, 4, 9]), torch.tensor([0, 12, 25])
    Q.requires_grad_()
    D.requires_grad_()
    scores = ek.maxsim_varlen(Q, D, cu_q, cu_d, precision=precision)
    scores.sum().backward()
    assert scores.isfinite().all()
    assert (D.grad[25:] == 0).all()
    assert D.grad.isfinite().all()


def test_precision_of_each_storage(engine):
    """What the storage holds is what is scored: nothing lowers fp32 to half on the way."""
    for dtype in STORAGES:
        Q, D = embeddings(2, 12, 48, seed=1, dtype=dtype), embeddings(3, 13, 48, seed=2, dtype=dtype)
        wanted = torch.einsum("qid,kjd->qkij", Q.double(), D.double()).amax(3).sum(2)
        bound = max(oracle.bound(q, d) for q in to_float64(Q) for d in to_float64(D))
        assert (ek.maxsim(Q, D).double() - wanted).abs().max() <= bound


def test_float64(engine):
    """float64 stays float64 inside, on whatever backend, and comes out in out_dtype."""
    Q, D = embeddings(2, 12, 48, seed=1).double() * (1 + 2.0**-30), embeddings(3, 13, 48, seed=2).double()
    with ek.backend("torch"):
        scores = ek.maxsim(Q, D, out_dtype=torch.float64)
    wanted = torch.einsum("qid,kjd->qkij", Q, D).amax(3).sum(2)
    assert (scores - wanted).abs().max() < 32 * 49 * oracle.UNIT_ROUNDOFF["float64"] * 2
