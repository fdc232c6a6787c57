"""Scores and argmax of every engine against float64: every tail of dimension and length, every storage, both precisions."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
import oracle
from cases import DIMENSIONS, LENGTHS, STORAGES, embeddings, grid, packed, padded, ragged, storage_name, to_float64
from conftest import ON_GPU

STORAGE_PAIRS = list(itertools.product(STORAGES, STORAGES))
SHORT_LENGTHS = (0, 1, 2, 11, 12, 13, 31, 33)  # padding these to the longest costs little


def argmax_of(Q, D, q_mask=None, d_mask=None, cu_q=None, cu_d=None, mask_mode="exclude", precision="exact"):
    arguments = (q_mask, d_mask, cu_q, cu_d, None, None, False, mask_mode, precision, True)
    return torch.ops.edgecolbert.maxsim_forward(Q, D, *arguments)


@functools.cache
def grid_case(dim):
    """Grid queries and documents of every length, their exact scores, and the argmax of each pair."""
    queries, documents = ragged(LENGTHS, dim, make=grid, seed=1), ragged(LENGTHS, dim, make=grid, seed=2)
    pairs = [[oracle.maxsim(q, d) for d in to_float64(documents)] for q in to_float64(queries)]
    scores = torch.tensor([[score for score, _ in row] for row in pairs], dtype=torch.float32)
    return queries, documents, scores, [[argmax for _, argmax in row] for row in pairs]


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_grid_ragged(engine, sweep, precision, dim):
    """Without rounding anywhere there is one right answer, whatever the storage and the order of the sums."""
    queries, documents, scores, _ = grid_case(dim)
    for q_dtype, d_dtype in sweep(STORAGE_PAIRS):
        Q, D = [q.to(q_dtype) for q in queries], [d.to(d_dtype) for d in documents]
        result = ek.maxsim(Q, D, precision=precision)
        assert result.dtype == torch.float32
        assert oracle.same_on_grid(result, scores, precision, max(LENGTHS), dim), f"{q_dtype} x {d_dtype}"


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_grid_packed(engine, sweep, precision, dim):
    queries, documents, scores, argmaxes = grid_case(dim)
    expected_argmax = np.concatenate([argmax for row in argmaxes for argmax in row])
    for q_dtype, d_dtype in sweep(STORAGE_PAIRS):
        (Q, cu_q), (D, cu_d) = packed([q.to(q_dtype) for q in queries]), packed([d.to(d_dtype) for d in documents])
        result = ek.maxsim_varlen(Q, D, cu_q, cu_d, precision=precision)
        assert oracle.same_on_grid(result, scores, precision, max(LENGTHS), dim), f"{q_dtype} x {d_dtype}"
        result, argmax = argmax_of(Q, D, cu_q=cu_q, cu_d=cu_d, precision=precision)
        assert oracle.same_on_grid(result, scores, precision, max(LENGTHS), dim), f"{q_dtype} x {d_dtype}"
        np.testing.assert_array_equal(argmax.numpy(), expected_argmax, err_msg=f"{q_dtype} x {d_dtype}")


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_grid_padded(engine, sweep, precision, dim):
    """Padding is NaN: a kernel that reads it and a mask that multiplies it both show."""
    queries, documents, scores, argmaxes = grid_case(dim)
    count = len(SHORT_LENGTHS)
    expected_argmax = np.full((count, count, max(SHORT_LENGTHS)), -1)
    for i, j in itertools.product(range(count), range(count)):
        expected_argmax[i, j, : SHORT_LENGTHS[i]] = argmaxes[i][j]
    for q_dtype, d_dtype in sweep(STORAGE_PAIRS):
        Q, q_mask = padded([q.to(q_dtype) for q in queries[:count]])
        D, d_mask = padded([d.to(d_dtype) for d in documents[:count]])
        result, argmax = argmax_of(Q, D, q_mask, d_mask, precision=precision)
        assert oracle.same_on_grid(result, scores[:count, :count], precision, max(SHORT_LENGTHS), dim), (
            q_dtype,
            d_dtype,
        )
        np.testing.assert_array_equal(argmax.numpy().reshape(expected_argmax.shape), expected_argmax)
        assert torch.equal(ek.maxsim(Q, D, q_mask, d_mask, precision=precision), result)


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_grid_without_masks(engine, sweep, precision, dim):
    """One length at a time, so that no mask and no table of offsets takes part."""
    queries, documents, scores, argmaxes = grid_case(dim)
    places = range(len(LENGTHS))
    for dtype, i, j in sweep(itertools.product(STORAGES, places, places)):
        query, document = queries[i].to(dtype), documents[j].to(dtype)
        result, argmax = argmax_of(query[None], document[None], precision=precision)
        what = f"{dtype} {LENGTHS[i]} {LENGTHS[j]}"
        assert oracle.same_on_grid(result[0, 0], scores[i, j], precision, len(query), dim), what
        np.testing.assert_array_equal(argmax.numpy(), argmaxes[i][j], err_msg=what)


@pytest.mark.parametrize("query_length", [*range(1, 18), 24, 31, 32, 33, 47, 48, 49, 64, 65])
def test_queries_share_registers(engine, precision, query_length):
    """Several short queries may share a register row: each count of queries, each must get its own score."""
    documents = grid(5, 29, 48, seed=3, dtype=torch.float16)
    for num_queries in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33):
        Q = grid(num_queries, query_length, 48, seed=num_queries, dtype=torch.float16)
        similarity = torch.einsum("qid,kjd->qkij", Q.double(), documents.double())
        result, argmax = argmax_of(Q, documents, precision=precision)
        assert oracle.same_on_grid(result, similarity.amax(3).sum(2), precision, query_length, 48), num_queries
        expected = similarity.numpy().argmax(3)
        np.testing.assert_array_equal(argmax.numpy().reshape(expected.shape), expected, err_msg=str(num_queries))


@pytest.mark.parametrize("dim", [16, 48, 129])
def test_every_document_length(engine, precision, dim):
    """From 1 to 70 tokens, one at a time and all in one call."""
    query, documents = grid(32, dim, seed=5), ragged(range(1, 71), dim, make=grid, seed=6)
    expected = [oracle.maxsim(query.double().numpy(), d)[0] for d in to_float64(documents)]
    assert oracle.same_on_grid(ek.maxsim(query, documents, precision=precision), np.array(expected), precision, 32, dim)
    one_by_one = np.array([ek.maxsim(query, d[None], precision=precision).item() for d in documents])
    assert oracle.same_on_grid(one_by_one, np.array(expected), precision, 32, dim)


@functools.cache
def rounding_case(dim, q_dtype, d_dtype, norm):
    """Queries, documents, their scores in float64, PyTorch's in fp32, and the two bounds, each [Nq, Nd]."""
    queries = ragged(LENGTHS, dim, seed=7, dtype=q_dtype, norm=norm)
    documents = ragged(LENGTHS, dim, seed=8, dtype=d_dtype, norm=norm)
    Q, D = torch.cat(queries).double().numpy(), torch.cat(documents).double().numpy()
    reduced = [
        torch.from_numpy(oracle.every_pair(terms, LENGTHS, LENGTHS))
        for terms in (Q @ D.T, oracle.rounding_term(Q, D), oracle.fixed_point_term(Q, D))
    ]
    eager = [[(q.float() @ d.float().T).amax(1).sum().item() if len(d) else 0.0 for d in documents] for q in queries]
    return queries, documents, reduced[0], torch.tensor(eager, dtype=torch.float64), *reduced[1:]


@pytest.mark.parametrize("norm", [1.0, None], ids=["normalized", "gaussian"])
@pytest.mark.parametrize("dim", DIMENSIONS)
def test_exact_rounding(engine, dim, norm):
    """Each score within the bound of fp32 accumulation, and together no worse than twice PyTorch's fp32 and a rounding.

    PyTorch gets the storage widened to fp32, which is far better than what it does in fp16 and bf16 themselves. Tensor cores
    add in fp32 too, but cut off where others round, which is half the precision.
    """
    times = 4 if engine in ON_GPU else 2
    for q_dtype, d_dtype in STORAGE_PAIRS:
        queries, documents, scores, eager, bound, _ = rounding_case(dim, q_dtype, d_dtype, norm)
        error = (ek.maxsim(queries, documents).double() - scores).abs()
        assert (error <= bound).all(), f"{q_dtype} x {d_dtype}: {error.max()}"
        allowed = times * (eager - scores).abs().sum() + oracle.UNIT_ROUNDOFF["float32"] * scores.abs().sum()
        assert error.sum() <= allowed, f"{q_dtype} x {d_dtype}: {error.sum()} > {allowed}"


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_fast_rounding(engine, dim):
    """Half a fixed-point step an element and no more: gaussian rows leave the range and must not saturate."""
    for norm, (q_dtype, d_dtype) in itertools.product((1.0, None), STORAGE_PAIRS):
        queries, documents, scores, _, rounding, fixed_point = rounding_case(dim, q_dtype, d_dtype, norm)
        error = (ek.maxsim(queries, documents, precision="fast").double() - scores).abs()
        excess = (error - rounding - fixed_point).max()
        assert excess <= 0, f"{q_dtype} x {d_dtype}, norm {norm}: {excess} too much"


@functools.cache
def contract_case(dim, dtype):
    """Unit queries of 32 tokens, documents of which the first eight hold a query each, and the scores in float64."""
    Q, D = embeddings(8, 32, dim, dtype=dtype, seed=9), embeddings(600, 40, dim, dtype=dtype, seed=10)
    D[:8, 3:35] = Q
    return Q, D, torch.stack([(q.double() @ D.double().mT).amax(2).sum(1) for q in Q])


@pytest.mark.parametrize("dim", [dim for dim in DIMENSIONS if dim <= 128])
@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_fast_contract(engine, dim, dtype):
    """Normalised rows, 32 query tokens, d <= 128: at most 5e-4 a score, of strangers and of a document that holds the query.

    The second has the largest scores, so it shows an error that grows with them instead of cancelling.
    """
    Q, D, expected = contract_case(dim, dtype)
    assert (ek.maxsim(Q, D, precision="fast").double() - expected).abs().max() <= 5e-4


@pytest.mark.parametrize(
    ("query_value", "document_value", "dim"),
    [
        (1.0, 1.0, 1),
        (-1.0, -1.0, 1),
        (-1.0, -1.0, 2),  # one pair of int16 products: 2 * 2^30 overflows int32
        (1.0, -1.0, 2),
        (1.0, 1.0, 2),
        (1.0, 1.0, 3),
        (-1.0, -1.0, 4),
        (1.0, 1.0, 128),
        (-1.0, 1.0, 128),
        (0.125, 0.125, 128),  # norm 1.41 on both sides
        (0.17, 0.18, 128),  # norms 1.92 and 2.04: a product just under 4
        (0.18, 0.18, 128),  # just over
        (1.0, 2.0**-10, 128),
        (1.0001, 0.01, 16),
        (-1.0001, -0.01, 16),
        (100.0, 100.0, 48),
        (1.0, 1 / 3, 5),
        # Just over half a step on both sides, in so many dimensions that rounding alone carries a sum over 2^31 steps.
        (206.51 / 2**15, 206.51 / 2**15, 100_000),
        (102.51 / 2**15, 186.51 / 2**15, 100_000),
        # Documents far out of range, whose squares overflow int32 as well and are small again.
        *[(0.01, (-(-(2**21) // dim**0.5) + step) / 2**15, dim) for dim in (5120, 6144, 8192) for step in (0, 1, 2)],
        (0.01, 0.99, 8192),
    ],
)
def test_fast_overflow(engine, query_value, document_value, dim):
    """Fixed point near and beyond its range of values and norms: either it holds, or the exact path answers."""
    Q, D = torch.full((33, dim), query_value), torch.full((3, 13, dim), document_value)
    q, d = Q.double().numpy(), D[0].double().numpy()
    expected = oracle.maxsim(q, d)[0]
    allowed = oracle.bound(q, d, "fast")
    assert (ek.maxsim(Q, D, precision="fast").double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("where", ["query", "document", "both"])
@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_fast_falls_back_by_itself(engine, where, dtype):
    """One element out of range anywhere, at every tail position: its scores are exact, and nothing saturates."""
    dim = 17
    for token, component, value in itertools.product((0, 11, 12, 28), (0, 8, 16), (1.5, -1.5, -40.0)):
        queries, documents = (
            ragged((5, 33, 29), dim, seed=11, dtype=dtype),
            ragged((29, 31, 40), dim, seed=12, dtype=dtype),
        )
        if where != "document":
            queries[1][token, component] = value
        if where != "query":
            documents[1][token, component] = value
        result = ek.maxsim(queries, documents, precision="fast").double()
        for i, j in itertools.product(range(3), range(3)):
            q, d = queries[i].double().numpy(), documents[j].double().numpy()
            allowed = oracle.bound(q, d, "fast")
            assert abs(result[i, j].item() - oracle.maxsim(q, d)[0]) <= allowed, (token, component, value, i, j)


def test_argmax_width():
    """int16 while the document tokens fit it; int32 beyond, where the winner may lie past 32767."""
    Q = torch.ones(1, 2, 1)
    for length, dtype in ((32768, torch.int16), (32769, torch.int32), (70000, torch.int32)):
        D = torch.zeros(1, length, 1)
        D[0, -1] = 1
        scores, argmax = argmax_of(Q, D)
        assert argmax.dtype == dtype
        assert scores.item() == 2
        assert argmax.tolist() == [length - 1] * 2


@pytest.mark.parametrize("length", [32767, 32768, 32769, 65535, 65536, 65537, 70001])
def test_long_documents(engine, precision, length):
    """Token numbers around the range of 16-bit integers, won by the last token, scored and argmaxed."""
    Q, D = torch.full((1, 3, 2), 0.5), torch.zeros(2, length, 2)
    D[0, -1], D[1, length // 2] = 0.25, 0.5
    scores, argmax = argmax_of(Q, D, precision=precision)
    assert scores.tolist() == [[pytest.approx(0.75, rel=1e-4), pytest.approx(1.5, rel=1e-4)]]
    assert argmax.tolist() == [length - 1] * 3 + [length // 2] * 3


def test_long_queries(engine, precision):
    for length in (1023, 1024, 1025, 5000):
        Q, D = grid(length, 8, seed=13), grid(2, 13, 8, seed=14)
        expected = torch.einsum("id,kjd->kij", Q.double(), D.double()).amax(2).sum(1)
        assert oracle.same_on_grid(ek.maxsim(Q, D, precision=precision), expected, precision, length, 8)


def test_large_dimension(engine, precision):
    """Dimensions far above a model's: an encoder's hidden size, and one that no scratch buffer expects."""
    for dim in (768, 1000, 4099):
        Q, D = grid(3, 5, dim, seed=15, largest=2), grid(4, 13, dim, seed=16, largest=2)
        expected = torch.einsum("qid,kjd->qkij", Q.double(), D.double()).amax(3).sum(2)
        assert oracle.same_on_grid(ek.maxsim(Q, D, precision=precision), expected, precision, 5, dim), dim
