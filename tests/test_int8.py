"""int8 documents with a scale each: exact in float32, fast in integer dot products, against float64 and exact integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DIMENSIONS, LENGTHS
from conftest import ISAS
from edgecolbert_kernels import PackedEmbeddings, maxsim
from edgecolbert_kernels.backends import native
from marks import compiled
from stored import boundaries, documents_of, forward, operand, queries_of, score_packed

_C = native.module()
pytestmark = compiled

QUERY_LENGTHS = (0, 1, 2, 31, 33, 0, 12)
ROUNDOFF = 2.0**-24


def rounds_queries():
    """Whether the instruction set in use answers "fast" with integers."""
    return _C.measure_peak("i8", 0.0) > 0


def similarities(queries, tokens, precision):
    """[Tq, T] in float64, without the documents' scales: of the kernels' own int8 query where they make one."""
    values = queries.astype(np.float64)
    if precision == "fast" and rounds_queries():
        queries = queries.astype(np.float32)
        largest = np.abs(queries).max(1, keepdims=True)
        inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
        values = np.rint(queries * inverse).astype(np.float64) * (largest / np.float32(127)).astype(np.float64)
    return values @ tokens.astype(np.float64).T


def bound(queries, tokens, precision):
    """Of the error of one similarity: sums of integers are exact up to 2^24."""
    if precision == "fast" and rounds_queries() and tokens.shape[1] <= 1000:
        return 4 * ROUNDOFF * np.abs(similarities(queries, tokens, precision)).max(initial=0)
    norms = np.linalg.norm(tokens.astype(np.float64), axis=1).max(initial=0)
    return (tokens.shape[1] + 8) * ROUNDOFF * np.linalg.norm(queries.astype(np.float64), axis=1).max(initial=0) * norms


def expected(sims, query_offsets, offsets, scales, kept=None, zero_mode=False):
    """Scores [Nq, N] and winners by (query, document), from similarities [Tq, T]."""
    kept = np.ones(sims.shape[1], bool) if kept is None else kept
    scores = np.zeros((len(query_offsets) - 1, len(scales)))
    winners = {}
    for i in range(len(query_offsets) - 1):
        for j in range(len(scales)):
            rows = slice(query_offsets[i], query_offsets[i + 1])
            block, keep = sims[rows, offsets[j] : offsets[j + 1]], kept[offsets[j] : offsets[j + 1]]
            if not keep.any():
                winners[i, j] = np.full(len(block), -1)
                continue
            block = np.where(keep, block, 0.0 if zero_mode else -np.inf)
            winners[i, j] = block.argmax(1)
            scores[i, j] = block.max(1).sum() * scales[j]
    return scores, winners


def check(scores, wanted, query_offsets, scales, error):
    terms = np.diff(query_offsets)[:, None] + 1
    allowed = terms * (error * scales + terms * ROUNDOFF * np.abs(wanted).max(initial=0)) + 1e-30
    assert (np.abs(scores - wanted) <= allowed).all(), np.abs(scores - wanted).max()


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_every_dimension_and_length(isa, precision, dim):
    queries, query_offsets = queries_of(QUERY_LENGTHS, dim)
    tokens, offsets, scales = documents_of(LENGTHS, dim)
    scores = score_packed(queries, query_offsets, tokens, offsets, scales, precision=precision)
    wanted, _ = expected(similarities(queries, tokens, precision), query_offsets, offsets, scales)
    check(scores, wanted, query_offsets, scales, bound(queries, tokens, precision))


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_query_dtypes(isa, precision, dtype):
    queries, query_offsets = queries_of((31, 2), 48)
    if dtype == "bfloat16":
        given_queries = (queries.view(np.uint32) >> 16).astype(np.uint16)
        queries = (given_queries.astype(np.uint32) << 16).view(np.float32)
    else:
        given_queries = queries.astype(dtype)
        queries = given_queries.astype(np.float32)
    documents = documents_of((12, 40), 48)
    scores = score_packed(given_queries, query_offsets, *documents, precision=precision)
    np.testing.assert_array_equal(scores, score_packed(queries, query_offsets, *documents, precision=precision))


@pytest.mark.parametrize("strides", ["rows apart", "dimensions apart", "backwards", "transposed"])
def test_strides(isa, precision, strides):
    queries, query_offsets = queries_of((31, 2), 33)
    tokens, offsets, scales = documents_of((12, 40, 1), 33)
    if strides == "rows apart":
        apart = np.full((2 * len(tokens), 40), 99, np.int8)[::2, :33]
    elif strides == "dimensions apart":
        apart = np.full((len(tokens), 99), 99, np.int8)[:, ::3]
    elif strides == "backwards":
        apart = np.empty_like(tokens)[::-1, ::-1]
    else:
        apart = np.empty(tokens.shape[::-1], np.int8).T
    apart[:] = tokens
    scores = score_packed(queries, query_offsets, apart, offsets, scales, precision=precision)
    np.testing.assert_array_equal(
        scores, score_packed(queries, query_offsets, tokens, offsets, scales, precision=precision)
    )


@pytest.mark.parametrize("dim", [7, 48, 128])
@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
def test_masks_and_argmax(isa, precision, mask_mode, dim):
    """Values on a coarse grid: ties are frequent, and go to the lowest token; the argmax of a masked zero is -1."""
    random = np.random.default_rng(dim)
    query_offsets, offsets = boundaries(QUERY_LENGTHS), boundaries(LENGTHS)
    # The largest of every query token is 127: its integers are its values.
    queries = random.choice([-127.0, 0.0, 127.0], (query_offsets[-1], dim)).astype(np.float32)
    queries[:, 0] = 127
    tokens = random.integers(-1, 2, (offsets[-1], dim)).astype(np.int8)
    scales = random.uniform(0.1, 1, len(LENGTHS)).astype(np.float32)
    kept = random.random(len(tokens)) < 0.6
    kept[offsets[2] : offsets[3]] = False
    out = np.full((len(QUERY_LENGTHS), len(LENGTHS)), np.nan, np.float32)
    argmax = np.full(len(queries) * len(LENGTHS), 99, np.int32)
    queries_operand, documents_operand = operand(queries, None, query_offsets), operand(tokens, kept, offsets, scales)
    forward(queries_operand, documents_operand, native.EVERY, native.NO_INDEX, out, argmax, precision, mask_mode)

    sims = similarities(queries, tokens, precision)
    wanted, winners = expected(sims, query_offsets, offsets, scales, kept, mask_mode == "zero")
    check(out, wanted, query_offsets, scales, bound(queries, tokens, precision))
    for (i, j), tokens_of_pair in winners.items():
        start = query_offsets[i] * len(LENGTHS) + j * QUERY_LENGTHS[i]
        chosen = kept[offsets[j] : offsets[j + 1]]
        want = np.where((tokens_of_pair >= 0) & chosen[tokens_of_pair], tokens_of_pair, -1) if len(chosen) else -1
        np.testing.assert_array_equal(argmax[start : start + QUERY_LENGTHS[i]], want)


def test_padded_layouts(isa, precision):
    """Every query with all documents, with its own, and chosen pairs, with masks: all say the same of the same pair."""
    random = np.random.default_rng(5)
    queries, per_query, length, dim = 3, 4, 29, 48
    Q = random.standard_normal((queries, 32, dim)).astype(np.float32)
    D = random.integers(-127, 128, (queries * per_query, length, dim)).astype(np.int8)
    scales = random.uniform(0.001, 0.1, len(D)).astype(np.float32)
    q_mask, d_mask = random.random(Q.shape[:2]) < 0.8, random.random(D.shape[:2]) < 0.7
    table = np.empty((queries, len(D)), np.float32)
    described = operand(Q, q_mask), operand(D, d_mask, None, scales)
    forward(*described, native.EVERY, native.NO_INDEX, table, None, precision)

    sims = similarities(Q.reshape(-1, dim)[q_mask.ravel()], D.reshape(-1, dim), precision)
    query_offsets, offsets = boundaries(q_mask.sum(1)), boundaries([length] * len(D))
    wanted, _ = expected(sims, query_offsets, offsets, scales, d_mask.ravel())
    check(table, wanted, query_offsets, scales, bound(Q.reshape(-1, dim), D.reshape(-1, dim), precision))

    own = np.empty((queries, per_query), np.float32)
    forward(*described, native.OWN, native.NO_INDEX, own, None, precision)
    np.testing.assert_array_equal(
        own, np.stack([table[q, q * per_query : (q + 1) * per_query] for q in range(queries)])
    )

    query_index, document_index = np.array([2, 0, 2, 1]), np.array([0, 11, 0, 5])
    pairs = np.empty(4, np.float32)
    index = (4, query_index.ctypes.data, document_index.ctypes.data)
    forward(*described, native.INDEXED, index, pairs, None, precision)
    np.testing.assert_array_equal(pairs, table[query_index, document_index])


def test_normalize(isa, precision):
    """The scale cancels, unless a row is shorter than 1e-12."""
    queries, query_offsets = queries_of((5, 33), 48)
    tokens, offsets, scales = documents_of((12, 40, 1, 7, 7), 48, skip=0)
    scales[3], scales[4] = 0.0, 1e-17
    out = np.empty((2, 5), np.float32)
    described = operand(queries, None, query_offsets), operand(tokens, None, offsets, scales)
    forward(*described, native.EVERY, native.NO_INDEX, out, None, precision, normalize=True)
    wanted = np.zeros((2, 5))
    for j in range(5):
        rows = tokens[offsets[j] : offsets[j + 1]].astype(np.float64) * scales[j]
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        for i in range(2):
            wanted[i, j] = (queries[query_offsets[i] : query_offsets[i + 1]] @ rows.T).max(1).sum()
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)


def test_ranges_and_threads_give_the_same_bits(isa, precision):
    queries, query_offsets = queries_of((32, 5, 0, 40), 48)
    tokens, offsets, scales = documents_of([120, 0, 7, 300] * 25, 48)
    arguments = queries, query_offsets, tokens, offsets, scales
    scores = score_packed(*arguments, precision=precision, threads=1)
    for threads in (2, 4):
        np.testing.assert_array_equal(score_packed(*arguments, precision=precision, threads=threads), scores)
    part = score_packed(*arguments, begin=7, end=55, precision=precision)
    np.testing.assert_array_equal(part, scores[:, 7:55])
    assert score_packed(*arguments, begin=100, precision=precision).shape == (4, 0)
    one = score_packed(queries[32:37], np.array([0, 5]), tokens, offsets, scales, precision=precision)
    np.testing.assert_array_equal(one, scores[1:2])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_queries_that_are_not_finite(isa, precision, value):
    """IEEE decides, and queries beside them do not notice."""
    queries, query_offsets = queries_of((5, 12, 33), 48)
    documents = documents_of((40, 7, 0), 48)
    clean = score_packed(queries, query_offsets, *documents, precision=precision)
    queries[6, 3] = value
    scores = score_packed(queries, query_offsets, *documents, precision=precision)
    np.testing.assert_array_equal(scores[[0, 2]], clean[[0, 2]])
    if np.isnan(value):
        assert np.isnan(scores[1, :2]).all()
    else:
        assert not np.isfinite(scores[1, :2]).any()
    assert scores[1, 2] == 0


def test_zero_and_tiny_queries(isa, precision):
    queries, query_offsets = queries_of((5, 3, 4), 48)
    queries[2] = 0
    queries[5:8] = 0
    queries[9] = 1e-37
    tokens, offsets, scales = documents_of((40, 7), 48)
    scales[1] = 0
    scores = score_packed(queries, query_offsets, tokens, offsets, scales, precision=precision)
    wanted, _ = expected(similarities(queries, tokens, "exact"), query_offsets, offsets, scales)
    assert (scores[1] == 0).all()
    assert (scores[:, 1] == 0).all()
    np.testing.assert_allclose(scores, wanted, rtol=0.02)


@pytest.mark.parametrize("dim", [2, 48, 4096, 1 << 16, (1 << 16) + 1])
def test_nothing_saturates(isa, precision, dim):
    """The largest products of both signs, in every dimension: their sum reaches 2^30."""
    queries = np.array([[1.0], [-1.0]], np.float32) * np.ones(dim, np.float32)
    tokens = np.array([[127], [-127], [-128]], np.int8) * np.ones(dim, np.int8)
    offsets, scales = np.array([0, 1, 2, 3]), np.ones(3, np.float32)
    scores = score_packed(queries, np.array([0, 1, 2]), tokens, offsets, scales, precision=precision)
    want = np.array([[127, -127, -128], [-127, 127, 128]]) * float(dim)
    np.testing.assert_allclose(scores, want, rtol=1e-6)


def test_a_mapped_file_is_read_in_place(isa, precision, tmp_path):
    queries, query_offsets = queries_of((32,), 48)
    tokens, offsets, scales = documents_of((40, 7), 48)
    tokens.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", np.int8, mode="r", shape=tokens.shape)
    np.testing.assert_array_equal(
        score_packed(queries, query_offsets, mapped, offsets, scales, precision=precision),
        score_packed(queries, query_offsets, tokens, offsets, scales, precision=precision),
    )


@settings(max_examples=60, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ("none",)),
    precision=st.sampled_from(["exact", "fast"]),
    dim=st.integers(1, 200),
    query_lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_odd_shapes(isa, precision, dim, query_lengths, lengths, seed):
    _C.set_isa(isa)
    try:
        queries, query_offsets = queries_of(query_lengths, dim, seed)
        tokens, offsets, scales = documents_of(lengths, dim, seed, skip=seed % 3)
        scores = score_packed(queries, query_offsets, tokens, offsets, scales, precision=precision)
        wanted, _ = expected(similarities(queries, tokens, precision), query_offsets, offsets, scales)
        check(scores, wanted, query_offsets, scales, bound(queries, tokens, precision))
    finally:
        _C.set_isa("")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_float_storage(isa, precision, dtype):
    """The same functions on float tokens, which have no scales."""
    queries, query_offsets = queries_of((32, 0, 5), 48)
    lengths = (12, 0, 40, 3)
    rows, offsets = queries_of(lengths, 48, seed=3)
    rows, offsets = np.concatenate([rows[:2], rows]), offsets + 2
    tokens = (rows.view(np.uint32) >> 16).astype(np.uint16) if dtype == np.uint16 else rows.astype(dtype)
    values = (tokens.astype(np.uint32) << 16).view(np.float32) if dtype == np.uint16 else tokens
    scores = score_packed(queries, query_offsets, tokens, offsets, None, precision=precision)
    wanted, _ = expected(queries.astype(np.float64) @ values.astype(np.float64).T, query_offsets, offsets, np.ones(4))
    np.testing.assert_allclose(scores, wanted, atol=1e-5 if precision == "exact" else 1e-3)


@pytest.mark.parametrize("dim", [1, 31, 48, 64, 129])
def test_chosen_documents_have_the_bits_of_all(isa, precision, dim):
    tokens, offsets, scales = documents_of((*LENGTHS, *LENGTHS), dim, skip=0)
    scales[4] = 0
    packed = PackedEmbeddings.from_arrays(tokens[: offsets[-1]], offsets, scales)
    random = np.random.default_rng(2)
    Q = random.standard_normal((5, 33, dim)).astype(np.float32)
    mask = random.random((5, 33)) < 0.8
    every = maxsim(Q, packed, mask, precision=precision)
    for rows in ([5], [7, 7, 0, 3], range(17, -1, -1), random.integers(0, len(packed), 40), []):
        rows = np.array(rows, np.int64)
        chosen = packed[rows]
        np.testing.assert_array_equal(maxsim(Q, chosen, mask, precision=precision), every[:, rows])
        tensors = torch.from_numpy(Q), torch.from_numpy(mask)
        np.testing.assert_array_equal(maxsim(tensors[0], chosen, tensors[1], precision=precision), every[:, rows])
        one = maxsim(Q[0], chosen, mask[0], precision=precision)
        np.testing.assert_array_equal(one, every[0, rows])


class TestWrongInput:
    queries, query_offsets = queries_of((5,), 8)
    tokens, offsets, scales = documents_of((4, 3), 8)

    def test_the_module_refuses(self):
        queries, documents = operand(self.queries, None, self.query_offsets), operand(self.tokens, None, self.offsets)
        out = np.empty((1, 2), np.float32)
        with pytest.raises(ValueError, match="int8 has scales"):
            forward(queries, documents, native.EVERY, native.NO_INDEX, out, None, "exact")
        documents = operand(self.tokens, None, self.offsets, self.scales)
        with pytest.raises(ValueError, match="queries are not int8"):
            forward(documents, documents, native.EVERY, native.NO_INDEX, out, None, "exact")
        for each in ((3, 8, 0, 0, 0, 0), (0, 8, 0, 0, 0, 0, 64)):
            with pytest.raises(ValueError, match="int8 has scales"):
                forward(queries, each, native.EVERY, native.NO_INDEX, out, None, "exact")
        with pytest.raises(ValueError, match="no backward for int8"):
            _C.backward(queries, documents, native.EVERY, native.NO_INDEX, 0, 0, 4, 0, 0, False, False, 1)
