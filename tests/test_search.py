"""search: the k best of all documents are those that float64 brute force and plain exact scores give, ties included."""

from __future__ import annotations

import functools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgecolbert_kernels as ek
from cases import embeddings, grid, holes, ragged
from edgecolbert_kernels import PackedEmbeddings, retrieval

DTYPES = ("float16", "bfloat16", "float32", "int8")


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(retrieval, "SCORES", 35)
        monkeypatch.setattr(retrieval, "QUERIES", 2)
        monkeypatch.setattr(retrieval, "PENDING", 7)
        monkeypatch.setattr(retrieval, "FEW_QUERIES", 0)


def ranked(scores: np.ndarray, k: int, allowed=None) -> tuple[np.ndarray, np.ndarray]:
    """Top k of [Nq, Nd] by a stable sort; NaN and what is not allowed is not found."""
    found = np.full((len(scores), k), -np.inf, np.float32), np.full((len(scores), k), -1)
    for row, each in enumerate(scores):
        order = [j for j in np.argsort(-each, kind="stable") if not np.isnan(each[j])]
        if allowed is not None:
            order = [
                j
                for j in order
                if j in set(np.asarray(allowed[row] if isinstance(allowed, list) else allowed).tolist())
            ]
        order = order[:k]
        found[0][row, : len(order)], found[1][row, : len(order)] = each[order], order
    return found


def brute_force(Q, packed) -> np.ndarray:
    scores = np.zeros((len(Q), len(packed)))
    for j, rows in enumerate(packed.to("float32")):
        if len(rows):
            scores[:, j] = np.einsum("qid,jd->qij", Q.astype(np.float64), rows.astype(np.float64)).max(2).sum(1)
    return scores


def collection(make=embeddings, count=60, dim=48, dtype="float16", seed=1) -> PackedEmbeddings:
    """With empty documents, and some that stand twice."""
    lengths = np.random.default_rng(seed).integers(0, 20, count)
    rows = [x.numpy() for x in ragged(lengths, dim, make=make, seed=seed)]
    for n in range(0, count, 7):
        rows[n] = rows[(n * 5) % count]
    return PackedEmbeddings.from_list(rows, [f"d{n}" for n in range(count)], dtype=dtype, dim=dim)


def same(found, wanted):
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_array_equal(found[0], wanted[0])
    assert found[0].dtype == np.float32
    assert found[1].dtype == np.int64


def test_one_query_after_another():
    """int8 is scored in integers once enough queries have come to repay the norms, with the same result."""
    packed = collection(dtype="int8")
    Q = embeddings(8, 5, 48, seed=3).numpy()
    wanted = ek.search(Q, collection(dtype="int8"), 4, precision="exact")
    for n in range(8):
        assert packed._norms is None
        for found, each in zip(ek.search(Q[n], packed, 4), wanted, strict=True):
            np.testing.assert_array_equal(found, each[n])
    assert packed._norms is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 5, 59, 60, 61, 200])
def test_against_all_scores(blocks, precision, dtype, k):
    """Bit for bit: fast only decides what is not worth an exact score."""
    packed, Q = collection(dtype=dtype), embeddings(5, 32, 48, seed=3).numpy()
    same(ek.search(Q, packed, k, precision=precision), ranked(ek.maxsim(Q, packed), k))


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_against_float64(engine, blocks, precision, dtype):
    """On a grid of values that every storage holds: the scores are integers of a step, ties are everywhere."""
    make = functools.partial(grid, largest=1)
    packed, Q = collection(make=make, dim=8, dtype=dtype), make(5, 12, 8, seed=3).numpy()
    scores = brute_force(Q, packed)
    assert len(np.unique(scores)) < scores.size / 2, "no ties to speak of"
    same(ek.search(Q, packed, 10, precision=precision), ranked(scores.astype(np.float32), 10))


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_close_to_float64(engine, precision):
    packed, Q = collection(), embeddings(5, 32, 48, seed=3).numpy()
    scores, indices = ek.search(Q, packed, 10, precision=precision)
    wanted = brute_force(Q, packed)
    np.testing.assert_allclose(scores, np.take_along_axis(wanted, indices, 1), atol=2e-5)
    np.testing.assert_allclose(scores, -np.sort(-wanted, axis=1)[:, :10], atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_bound(isa, dtype):
    """What search trusts: no fast score is further off than the bound, for queries and documents made to be."""
    worst = 0.0
    for seed in range(20):
        for length, norm in ((32, 1.0), (32, 0.3), (1, 1.0), (7, 1.02), (32, 3.0)):
            Q = embeddings(3, length, 48, seed=seed, norm=norm).numpy()
            Q[1] = Q[1, :1]  # one token again and again: its rounding error adds up
            Q[2] = np.round(Q[2] * 2**15) / 2**15 + 2.0**-16.1  # every value nearly half a step off
            rows = [x.numpy() for x in ragged((5, 1, 40), 48, seed=seed, norm=min(norm * 1.5, 2.0))]
            packed = PackedEmbeddings.from_list(rows, dtype=dtype)
            error = np.abs(ek.maxsim(Q, packed, precision="fast") - ek.maxsim(Q, packed))
            bound = retrieval._Queries(Q, None, 0).fast_errors(packed).block(slice(None))
            assert (error <= bound).all()
            worst = max(worst, float((error / bound).max()))
    assert worst < 1


def test_the_error_bound_is_not_idle(isa):
    """A bound that is far too wide would score everything twice."""
    Q = np.repeat(embeddings(1, 1, 48, seed=1).numpy(), 32, axis=1)
    rows = [x.numpy() for x in ragged([1] * 200, 48, seed=2)]
    for dtype, least in (("float32", 0.03), ("int8", 0.1)):
        packed = PackedEmbeddings.from_list(rows, dtype=dtype)
        error = np.abs(ek.maxsim(Q, packed, precision="fast") - ek.maxsim(Q, packed)).max()
        if error == 0:
            pytest.skip("fast is exact with these instructions")
        assert error > least * retrieval._Queries(Q, None, 0).fast_errors(packed).block(slice(None)).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_almost_ties(blocks, dtype):
    """Documents whose scores differ by less than the fast error: their order is that of the exact scores."""
    random = np.random.default_rng(1)
    Q = embeddings(3, 32, 48, seed=1).numpy()
    base = embeddings(10, 48, seed=2).numpy()
    rows = [base + 1e-4 * random.standard_normal(base.shape).astype(np.float32) for _ in range(300)]
    packed = PackedEmbeddings.from_list(rows, dtype=dtype)
    exact, fast = ek.maxsim(Q, packed), ek.maxsim(Q, packed, precision="fast")
    wanted = ranked(exact, 20)
    if (exact != fast).any():
        assert (ranked(fast, 20)[1] != wanted[1]).any(), "fast alone would do"
    same(ek.search(Q, packed, 20), wanted)


def test_all_the_same(blocks, precision):
    packed = PackedEmbeddings.from_list([np.ones((2, 8), np.float32) / 4] * 100)
    scores, indices = ek.search(np.ones((3, 5, 8), np.float32) / 8, packed, 7, precision=precision)
    assert (indices == np.arange(7)).all()
    assert (scores == scores[0, 0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_filters_and_candidates(blocks, precision, dtype):
    packed, Q = collection(dtype=dtype), embeddings(5, 32, 48, seed=3).numpy()
    random = np.random.default_rng(5)
    for view in (packed, packed[10:50], packed.remove(ids=["d3", "d4", "d58"]), packed[::-1], packed[[5, 5, 9]]):
        count = len(view)
        scores = ek.maxsim(Q, view)
        mask = random.random(count) < 0.4
        same(ek.search(Q, view, 9, filter=mask, precision=precision), ranked(scores, 9, np.flatnonzero(mask)))
        index = np.flatnonzero(mask)
        same(ek.search(Q, view, 9, filter=index[::-1], precision=precision), ranked(scores, 9, index))
        if view.ids and len(set(view.ids)) == count:
            named = ek.search(Q, view, 9, ids=[view.ids[2], view.ids[0]], precision=precision)
            same(named, ranked(scores, 9, np.array([0, 2])))
        own = [random.integers(0, count, random.integers(0, 25)) for _ in Q]
        own[2] = np.array([], np.int64)
        same(ek.search(Q, view, 9, candidates=own, precision=precision), ranked(scores, 9, own))
        both = [np.intersect1d(each, np.flatnonzero(mask)) for each in own]
        same(ek.search(Q, view, 9, candidates=own, filter=mask, precision=precision), ranked(scores, 9, both))
    nobody = ek.search(Q, packed, 3, filter=np.zeros(60, bool))
    assert (nobody[1] == -1).all()
    assert np.isneginf(nobody[0]).all()


def test_filtered_searches_share_the_norms_of_all_documents():
    """int8 goes fast once as many queries were scored as all norms cost, however few documents each was of."""
    packed, Q = collection(dtype="int8"), embeddings(4, 32, 48, seed=3).numpy()
    scores, some = ek.maxsim(Q, packed), np.arange(0, 60, 2)
    for known in (False, False, False, True, True):
        same(ek.search(Q, packed, 3, filter=some), ranked(scores, 3, some))
        assert (packed._norms is not None) == known
    norms, some = packed._norms, np.array([1, *range(20, 40)])
    same(ek.search(Q, packed, 3, filter=some), ranked(scores, 3, some))
    assert packed._norms is norms


def test_queries_in_every_form(blocks):
    packed, Q, q_mask = collection(), embeddings(5, 12, 48, seed=3), holes(5, 12, seed=4)
    wanted = ranked(ek.maxsim(Q.numpy(), packed, q_mask.numpy()), 6)
    same(ek.search(Q.numpy(), packed, 6, q_mask=q_mask.numpy()), wanted)
    listed = [q[m].numpy() for q, m in zip(Q, q_mask, strict=True)]
    same(ek.search(listed, packed, 6), wanted)
    same(ek.search(list(Q.numpy()), packed, 6, q_mask=list(q_mask.numpy())), wanted)
    scores, indices = ek.search(Q.requires_grad_(), packed, 6, q_mask=q_mask)
    assert type(scores) is type(indices) is torch.Tensor
    assert not scores.requires_grad
    same((scores.numpy(), indices.numpy()), wanted)
    single = ek.search(Q[1].detach(), packed, 6, q_mask=q_mask[1])
    assert single[0].shape == (6,)
    same(tuple(x.numpy()[None] for x in single), tuple(x[1:2] for x in wanted))
    half = Q.detach().half()
    same(ek.search(half.numpy(), packed, 6), tuple(x.numpy() for x in ek.search(half, packed, 6)))
    bits = Q.detach().bfloat16()
    same(
        ek.search(bits.view(torch.uint16).numpy(), packed, 6),
        tuple(x.numpy() for x in ek.search(bits, packed, 6)),
    )


def test_documents_in_every_form(blocks):
    Q, rows = embeddings(3, 12, 48, seed=3), embeddings(30, 9, 48, seed=4)
    wanted = ranked(ek.maxsim(Q.numpy(), rows.numpy()), 6)
    same(ek.search(Q.numpy(), rows.numpy(), 6), wanted)
    same(ek.search(Q.numpy(), list(rows.numpy()), 6), wanted)
    same(tuple(x.numpy() for x in ek.search(Q, rows, 6)), wanted)


def test_not_finite(blocks, precision):
    """NaN is not found; infinities are ordered as IEEE orders them."""
    rows = [np.full((2, 4), value, np.float32) for value in (1, np.nan, np.inf, 2, -np.inf, 0, 3)] * 8
    packed = PackedEmbeddings.from_list(rows, dtype="float32")
    Q = np.ones((5, 3, 4), np.float32)
    Q[1] *= 2
    Q[2, 1, 1] = np.nan
    Q[3] *= np.inf
    Q[4] *= -np.inf
    with np.errstate(invalid="ignore"):
        same(ek.search(Q, packed, 30, precision=precision), ranked(ek.maxsim(Q, packed), 30))
        same(ek.search(Q, packed, 3, precision=precision), ranked(ek.maxsim(Q, packed), 3))


def test_nothing_to_search():
    Q = np.ones((2, 3, 4), np.float32)
    _, indices = ek.search(Q, PackedEmbeddings.empty(4), 3)
    assert indices.tolist() == [[-1] * 3] * 2
    assert ek.search(Q[:0], collection(dim=4), 3)[0].shape == (0, 3)
    assert ek.search(Q[:, :0], collection(dim=4), 3)[1].tolist() == [[0, 1, 2]] * 2
    assert ek.search(Q, [np.zeros((0, 4), np.float32)], 1)[0].tolist() == [[0], [0]]


@pytest.mark.parametrize("candidates", [None, [[1, 2, 3]] * 2])
def test_more_than_there_are(candidates):
    """Beside the results, an entry for each document is held, not one for each of k."""
    Q, packed, k = embeddings(2, 3, 48, seed=3).numpy(), collection(), 200_000
    tracemalloc.start()
    scores, indices = ek.search(Q, packed, k, candidates=candidates)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * (scores.nbytes + indices.nbytes)
    same((scores, indices), ranked(ek.maxsim(Q, packed), k, None if candidates is None else np.array(candidates[0])))


def test_no_documents(blocks):
    Q = embeddings(2, 3, 4, seed=1)
    for queries, shape in ((Q, (2, 3)), (Q.numpy(), (2, 3)), (list(Q), (2, 3)), (Q[0], (3,))):
        scores, indices = ek.search(queries, [], 3)
        assert tuple(scores.shape) == tuple(indices.shape) == shape
        assert (np.asarray(indices) == -1).all()


def test_results_as_candidates(blocks, precision):
    """Rows that were filled with -1 go in as they came out."""
    packed, Q = collection(), embeddings(5, 12, 48, seed=3)
    for queries in (Q.numpy(), Q):
        found = ek.search(queries, packed, 9, filter=[4, 7, 30], precision=precision)
        again = ek.search(queries, packed, 9, candidates=found[1], precision=precision)
        assert (np.asarray(found[1])[:, 3:] == -1).all()
        same(tuple(map(np.asarray, again)), tuple(map(np.asarray, found)))


def test_wrong_calls():
    Q, packed = np.ones((2, 3, 48), np.float32), collection()
    with pytest.raises(ValueError, match="k is -1"):
        ek.search(Q, packed, -1)
    for bad in (1.5, "3", None, True):
        with pytest.raises(TypeError, match="k is"):
            ek.search(Q, packed, bad)
    with pytest.raises(ValueError, match="precision"):
        ek.search(Q, packed, 1, precision="int8")
    with pytest.raises(ValueError, match="last dimension"):
        ek.search(Q[..., :5], packed, 1)
    with pytest.raises(ValueError, match="candidates"):
        ek.search(Q, packed, 1, candidates=[[1]])
    with pytest.raises(IndexError, match=r"candidates\[1\]"):
        ek.search(Q, packed, 1, candidates=[[1], [60]])
    with pytest.raises(IndexError, match=r"candidates\[0\]"):
        ek.search(Q, packed, 1, candidates=[[-2], [6]])
    with pytest.raises(TypeError, match=r"candidates\[0\]"):
        ek.search(Q, packed, 1, candidates=[[0.5], [6]])
    with pytest.raises(TypeError, match="q_mask is a list"):
        ek.search(Q[0], packed, 1, q_mask=[True, True, False])
    with pytest.raises(ValueError, match="mask"):
        ek.search(Q, packed, 1, filter=np.ones(3, bool))
    with pytest.raises(IndexError):
        ek.search(Q, packed, 1, filter=[60])
    with pytest.raises(KeyError, match="x"):
        ek.search(Q, packed, 1, ids=["x"])
    with pytest.raises(ValueError, match="documents"):
        ek.search(Q, np.ones((3, 48), np.float32), 1)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 6), max_size=40),
    st.integers(1, 5),
    st.integers(0, 9),
    st.integers(1, 20),
    st.integers(0, 45),
    st.sampled_from(DTYPES),
    st.sampled_from(["exact", "fast"]),
    st.integers(1, 60),
)
def test_any_shapes(lengths, num_queries, query_length, dim, k, dtype, precision, size):
    rows = [x.numpy() for x in ragged(lengths, dim, make=grid, seed=1)]
    packed = PackedEmbeddings.from_list(rows, dtype=dtype, dim=dim)
    Q = grid(num_queries, query_length, dim, seed=2).numpy()
    before, retrieval.SCORES = retrieval.SCORES, size
    try:
        found = ek.search(Q, packed, k, precision=precision)
    finally:
        retrieval.SCORES = before
    same(found, ranked(ek.maxsim(Q, packed), k))


def test_memory_stays_small(monkeypatch):
    """No call makes a score for every (query, document): blocks are bounded, whatever survives."""
    seen = []
    score = retrieval.maxsim

    def watched(Q, documents, *arguments, **options):
        scores = score(Q, documents, *arguments, **options)
        seen.append(math.prod(scores.shape))
        return scores

    monkeypatch.setattr(retrieval, "maxsim", watched)
    monkeypatch.setattr(retrieval, "SCORES", 1000)
    packed = PackedEmbeddings.from_list([np.ones((1, 4), np.float16)] * 5000)
    ek.search(np.ones((10, 2, 4), np.float32), packed, 3)
    assert max(seen) <= 1000
    assert sum(seen) == 50_000
