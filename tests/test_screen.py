"""The int8 screen of exact scores: scores, winners and gradients have the same bits with it and without.

Every check runs a call twice. What is right is the business of the other tests; here float64 only shows that both are.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgecolbert_kernels as ek
import oracle
from cases import DIMENSIONS, STORAGES, embeddings, grid, holes, packed, padded, ragged, storage_name
from edgecolbert_kernels import PackedEmbeddings, reference
from edgecolbert_kernels.backends import native
from screening import (
    _C,
    INF,
    MOST_DIMENSIONS,
    NAN,
    SHORTEST,
    SUMS_OF_16_BITS,
    bits,
    both,
    check,
    check_winners,
    on_screening_isas,  # noqa: F401 (for every test here)
    outputs,
    screened_documents,
    values,
    with_gradients,
)
from stored import documents_of, forward, operand, queries_of, score_packed

LENGTHS = (31, 32, 33, 35, 36, 37, 63, 64, 65, 75, 76, 77, 255, 300, 1000)
"""Around the shortest document that is screened and around a tile; a full document; one of several blocks."""


QUERY_LENGTHS = (1, 2, 12, 16, 17, 32, 33, 100)
"""Around a register of query tokens and a panel of two."""


def test_screens_what_it_should(screened_isa):
    """Ordinary documents are screened, and nothing that int8 cannot stand for: else the checks below would check nothing."""

    def share(Q, D):
        tried, done = _C.screened()
        ek.maxsim(Q, D)
        tried, done = (after - before for after, before in zip(_C.screened(), (tried, done), strict=True))
        return done / len(D), tried / len(D)

    for dim in (16, 48, 64, 96, 128, 256, 768):
        wanted = (1, 1) if dim <= MOST_DIMENSIONS[screened_isa] else (0, 0)
        for num_queries in (1, 3):
            Q = embeddings(num_queries, 32, dim)
            assert share(Q, embeddings(50, 300, dim, seed=1)) == wanted
            assert share(Q, embeddings(50, 300, dim, seed=1, dtype=torch.float16)) == wanted
            for scale in (0.5, 0.2):  # nothing tells how large the first document's values are
                assert share(Q, scale * embeddings(50, 300, dim, seed=1))[0] >= 0.9 * wanted[0]
    Q, D = embeddings(1, 32, 48), embeddings(50, 300, 48, seed=1)
    shortest = SHORTEST[screened_isa]
    assert share(Q, D[:, : shortest - 1]) == (0, 0)
    assert share(Q, D[:, :shortest]) == (1, 1)
    assert share(Q * 1e-12, D) == (0, 0)
    for unfit in (D * 1e-12, D * NAN, D[:, :1].expand(-1, 300, -1)):
        done, tried = share(Q, unfit)
        assert done == 0 and tried < 0.2
    _C.set_screening(False)
    assert share(Q, D) == (0, 0)


@functools.cache
def documents_of_every_length(dim, dtype):
    return packed(ragged(LENGTHS, dim, dtype=dtype, seed=dim))


SWEEP = [*DIMENSIONS, 768, 2047, 2048, 2049]


@pytest.mark.parametrize("dim", SWEEP)
def test_every_shape(dim):
    """One query and all of them, so one register, one panel, and several with one left over; storages take turns."""
    pairs = list(itertools.product(STORAGES, STORAGES))
    for number, lengths in enumerate([*[(n,) for n in QUERY_LENGTHS], QUERY_LENGTHS]):
        q_dtype, d_dtype = pairs[(number + SWEEP.index(dim)) % len(pairs)]
        queries = ragged(lengths, dim, dtype=q_dtype, seed=3)
        (Q, cu_q), (D, cu_d) = packed(queries), documents_of_every_length(dim, d_dtype)
        scores, _, alone = both(lambda: outputs(Q, D, cu_q=cu_q, cu_d=cu_d))  # noqa: B023 (called at once)
        assert torch.equal(scores, alone)

        q, d = Q.double().numpy(), D.double().numpy()
        wanted = oracle.every_pair(q @ d.T, lengths, LENGTHS)
        bound = oracle.every_pair(oracle.rounding_term(q, d), lengths, LENGTHS)
        eager = oracle.every_pair((Q.float() @ D.float().T).numpy(), lengths, LENGTHS)
        error = np.abs(scores.double().numpy() - wanted)
        assert (error <= bound).all(), (lengths, q_dtype, d_dtype)
        if dim <= 129:  # beyond, PyTorch's library adds in blocks, and is better than any sum in order
            allowed = 2 * np.abs(eager - wanted).sum() + oracle.UNIT_ROUNDOFF["float32"] * np.abs(wanted).sum()
            assert error.sum() <= allowed, (lengths, q_dtype, d_dtype)


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
@pytest.mark.parametrize("num_queries", [1, 2, 3, 5])
@pytest.mark.parametrize("query_length", QUERY_LENGTHS)
def test_padded(dtype, num_queries, query_length):
    Q, D = embeddings(num_queries, query_length, 48, dtype=dtype, seed=1), embeddings(7, 300, 48, dtype=dtype, seed=2)
    scores, winners = check(Q, D)
    check_winners(Q, D, winners)
    wanted, _ = reference.maxsim(Q.double(), D.double())
    assert (scores - wanted).abs().max() <= 1e-5 * query_length


MIXED = (300, 12, 64, 0, 47, 1000, 1, 100, 77)
"""Documents that are screened between ones that are not."""


def layout_case(name, dtype, masked):
    """(function, Q, D, options)"""
    Q, D = embeddings(3, 17, 48, dtype=dtype, seed=1), embeddings(6, 130, 48, dtype=dtype, seed=2)
    q_mask, d_mask = (holes(3, 17, seed=3), holes(6, 130, seed=4)) if masked else (None, None)
    index = {"query_index": torch.tensor([2, 0, 0, 2, 1]), "document_index": torch.tensor([5, 0, 3, 5, 1])}
    if name == "in batch":
        return ek.maxsim, Q, D, {"q_mask": q_mask, "d_mask": d_mask}
    if name == "one query":
        return ek.maxsim, Q[0], D, {"q_mask": q_mask if q_mask is None else q_mask[0], "d_mask": d_mask}
    if name == "own candidates":
        own_mask = None if d_mask is None else d_mask.reshape(3, 2, 130)
        return ek.maxsim, Q, D.reshape(3, 2, 130, 48), {"q_mask": q_mask, "d_mask": own_mask}
    if name == "pairs":
        return ek.maxsim_pairs, Q, D[1:4], {"q_mask": q_mask, "d_mask": None if d_mask is None else d_mask[1:4]}
    if name == "indexed":
        return ek.maxsim_indexed, Q, D, {**index, "q_mask": q_mask, "d_mask": d_mask}
    queries, documents = ragged((17, 0, 33, 1), 48, dtype=dtype, seed=5), ragged(MIXED, 48, dtype=dtype, seed=6)
    q_masks, d_masks = ([holes(len(x), seed=7 + i) for i, x in enumerate(rows)] for rows in (queries, documents))
    if name == "lists":
        return ek.maxsim, queries, documents, {"q_mask": q_masks, "d_mask": d_masks} if masked else {}
    if name == "padded":
        (Q, q_mask), (D, d_mask) = padded(queries), padded(documents)
        if masked:
            d_mask &= holes(*d_mask.shape, seed=8)
        return ek.maxsim, Q, D, {"q_mask": q_mask, "d_mask": d_mask}
    (Q, cu_q), (D, cu_d) = packed(queries), packed(documents)
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_d": cu_d}
    return (
        ek.maxsim_varlen,
        Q,
        D,
        options | ({"q_mask": torch.cat(q_masks), "d_mask": torch.cat(d_masks)} if masked else {}),
    )


@pytest.mark.parametrize("normalize", [False, True], ids=["as they are", "normalized"])
@pytest.mark.parametrize("mask_mode", ["unmasked", "exclude", "zero"])
@pytest.mark.parametrize(
    "name", ["in batch", "one query", "own candidates", "pairs", "indexed", "lists", "padded", "varlen"]
)
def test_layouts(name, mask_mode, normalize):
    """Scores alone, and scores with gradients, of each layout, and again with each array the other way round."""
    for dtype in STORAGES:
        function, Q, D, options = layout_case(name, dtype, mask_mode != "unmasked")
        options |= {"normalize": normalize, "mask_mode": "zero" if mask_mode == "zero" else "exclude"}
        (scores,) = both(lambda: [function(Q, D, **options)])  # noqa: B023 (called at once)
        with_winners = both(lambda: with_gradients(function, Q, D, **options))  # noqa: B023
        assert torch.equal(scores, with_winners[0])


@pytest.mark.parametrize("dim", [7, 8, 48, 129])
def test_views(dim):
    """Columns, gaps and rows in other places: the tokens that are scored once more are found where they are."""
    for dtype in STORAGES:
        Q, D = embeddings(2, 17, dim, dtype=dtype, seed=1), embeddings(4, 130, dim, dtype=dtype, seed=2)
        wanted = check(Q, D)
        spread = torch.full((8, 3 * 130, 2 * dim), NAN, dtype=dtype)
        spread[1::2, 1::3, 1::2] = D
        wider = torch.full((4, 130, dim + 5), NAN, dtype=dtype)
        wider[..., 2 : 2 + dim] = D
        for view in (
            D.permute(2, 1, 0).contiguous().permute(2, 1, 0),
            D.transpose(1, 2).contiguous().transpose(1, 2),
            D.transpose(0, 1).contiguous().transpose(0, 1),
            spread[1::2, 1::3, 1::2],
            wider[..., 2 : 2 + dim],
            D[:, :1].expand(4, 130, dim),
        ):
            found = check(Q.permute(2, 1, 0).contiguous().permute(2, 1, 0), view)
            if torch.equal(view, D):
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_views(dtype):
    """Backward strides, which only NumPy has."""
    Q, D = embeddings(2, 33, 48, seed=1).numpy().astype(dtype), embeddings(4, 300, 48, seed=2).numpy().astype(dtype)
    (wanted,) = both(lambda: [ek.maxsim(Q, D)])
    for flip in ((slice(None, None, -1), slice(None)), (slice(None), slice(None, None, -1))):
        rows = D[(slice(None), *flip)].copy()[(slice(None), *flip)]
        (found,) = both(lambda: [ek.maxsim(Q, rows)])  # noqa: B023 (called at once)
        np.testing.assert_array_equal(found, wanted)
    (found,) = both(lambda: [ek.maxsim(np.asfortranarray(Q), np.asfortranarray(D))])
    np.testing.assert_array_equal(found, wanted)
    both(lambda: [ek.maxsim(Q, D[::-1, ::-2])])


@pytest.mark.parametrize("normalize", [False, True], ids=["as they are", "normalized"])
@pytest.mark.parametrize("dim", [7, 48, 128])
def test_int8(dim, normalize):
    """int8 documents with a scale each, some 0 or next to it, rounded once more."""
    queries, query_offsets = queries_of((5, 33, 12), dim)
    tokens, offsets, scales = documents_of((300, 12, 100, 64, 0, 1000, 80, 80), dim, skip=0)
    scales[2], scales[3], scales[6] = 0, 1e-17, 1e5
    tokens[offsets[6] : offsets[7]] //= 40
    kept = np.random.default_rng(1).random(len(tokens)) < 0.9

    def call(mask):
        out, winners = np.empty((3, 8), np.float32), np.empty(len(queries) * 8, np.int32)
        described = operand(queries, None, query_offsets), operand(tokens, mask, offsets, scales)
        for argmax in (None, winners):
            forward(*described, native.EVERY, native.NO_INDEX, out, argmax, "exact", normalize=normalize)
        return out, winners

    for mask in (None, kept):
        both(lambda: call(mask))  # noqa: B023 (called at once)
    if not normalize:
        arguments = queries, query_offsets, tokens, offsets, scales
        both(lambda: [score_packed(*arguments), score_packed(*arguments, begin=3), score_packed(*arguments, threads=1)])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_packed_embeddings(dtype):
    documents = PackedEmbeddings.from_list(ragged(MIXED, 48, seed=1), dtype=dtype)
    Q = embeddings(3, 32, 48, seed=2).numpy()
    both(lambda: [ek.maxsim(Q, documents), ek.maxsim(Q[0], documents[2:6])])


@pytest.mark.parametrize("query_length", [1, 16, 32, 33, 100])
@pytest.mark.parametrize(("dim", "length"), [(48, 3000), (128, 1500), (1000, 200), (2048, 100)])
def test_blocks(dim, length, query_length):
    """The best tokens lie in the first, a middle or the last block of a document, or in each a little better or worse."""
    Q, D = embeddings(1, query_length, dim, seed=1), embeddings(7, length, dim, seed=2)
    best = Q[0, -1]
    for document, place in enumerate((0, length // 2, length - 1)):
        D[document, place] = best
    places = [0, length // 3, length // 2, length - 13, length - 1]
    for document, factors in ((3, (0.9, 0.95, 1, 0.95, 0.9)), (4, (1, 0.98, 0.96, 0.94, 0.92))):
        D[document, places] = best * torch.tensor(factors)[:, None]
    D[5, places] = best  # equal in every block
    D[6] *= torch.linspace(1, 0.05, length)[:, None]
    _, winners = check(Q, D)
    check_winners(Q, D, winners)
    found = winners[0, :, -1].tolist()
    assert found[:6] == [0, length // 2, length - 1, length // 2, 0, 0]
    check(Q, -D)


@pytest.mark.parametrize("place", ["query", "document"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_not_finite(place, value):
    """In one token: what stands beside it is scored as ever."""
    for dtype, query_length, token in itertools.product(STORAGES, (12, 33), (0, 11, 70, 129)):
        Q, D = embeddings(3, query_length, 17, dtype=dtype, seed=1), embeddings(4, 130, 17, dtype=dtype, seed=2)
        clean, _ = check(Q, D)
        (Q if place == "query" else D)[1, token % query_length if place == "query" else token, 5] = value
        broken, _ = check(Q, D)
        others = (slice(None, None, 2), slice(None)) if place == "query" else (slice(None), [0, 2, 3])
        assert torch.equal(broken[others], clean[others])


@pytest.mark.parametrize("query_length", [1, 5, 16, 32, 33, 40])
def test_zeros(query_length):
    """Zero query tokens are won by the first token; documents of zeros, and rows of zeros as padding is often stored."""
    for dtype, dim in itertools.product(STORAGES, (1, 48, 2048)):
        Q, D = embeddings(2, query_length, dim, dtype=dtype, seed=1), embeddings(5, 90, dim, dtype=dtype, seed=2)
        Q[0, ::2] = 0
        D[1] = 0
        D[2, 40:] = 0
        D[3, :80] = 0
        D[4] = -D[4].abs()
        scores, winners = check(Q, D)
        assert (winners[0, :, ::2] == 0).all()
        assert scores[0].isfinite().all()
        check(Q.abs(), D)
        check(torch.zeros_like(Q), D)
        check(Q, torch.zeros_like(D))
        assert (check(torch.zeros_like(Q), D)[1] == 0).all()
        check(-torch.zeros_like(Q), -D)


SCALES = (1e-45, 1e-40, 1e-30, 1e-20, 1e-12, 0.9e-10, 1.1e-10, 1e-6, 1e3, 0.9e10, 1.1e10, 1e12, 1e18, 1e30)


@pytest.mark.parametrize("query_length", [12, 32, 40])
def test_scales(query_length):
    """Tiny and huge ones of either side and of both, up to subnormal numbers and infinite sums."""
    Q, D = embeddings(2, query_length, 48, seed=1), embeddings(3, 130, 48, seed=2)
    for scale in SCALES:
        for q, d in ((scale, 1), (1, scale), (scale, scale), (scale, 1 / scale), (1 / scale, scale)):
            if max(q, d) < 3e38:
                check(Q * q, D * d)
        rows = Q.clone()
        rows[:, 3] *= scale
        check(rows, D)
        rows = D.clone()
        rows[1, 70:] *= scale
        check(Q, rows)


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
@pytest.mark.parametrize("query_length", [12, 32, 33])
def test_documents_of_other_scales(dtype, query_length):
    """Integers are scaled by what the documents before were like: too little is cut off, too much is coarse."""
    scales = torch.tensor([1, 1e-3, 1e3, 1e-6, 1, 1.5, 2.2, 1.02, 1.06, 1.1, 0.5, 0.15, 0.13, 0.1, 60, 1e-2, 1, 0, 1])
    for dim in (16, 48):
        Q = embeddings(2, query_length, dim, dtype=dtype, seed=1)
        D = (embeddings(len(scales), 300, dim, seed=2) * scales[:, None, None]).to(dtype)
        _, winners = check(Q, D)
        check_winners(Q, D, winners)
        check(Q, D.flip(0))
        check(Q, D.repeat(1, 4, 1))  # several blocks of one scale
        within = (embeddings(2, 1900, dim, seed=3) * scales.repeat_interleave(100)[:, None]).to(dtype)
        _, winners = check(Q, within)
        check_winners(Q, within, winners)


def test_documents_that_grow_out_of_range():
    """Each a little larger than the last, as the guessed scale allows, until the sums of fp32 overflow."""
    count, random = int(np.log(1e21) / np.log(1.04)), np.random.default_rng(0)
    D = random.standard_normal((count, 40, 48))
    D[:, 20, :24], D[:, 20, 24:] = 4, -4
    D *= 1e7 * 1.04 ** np.arange(count)[:, None, None]
    check(torch.full((1, 3, 48), 1e10), torch.from_numpy(D).float())


@pytest.mark.parametrize("query_length", [12, 32, 33])
@pytest.mark.parametrize("cut_off", [1.04, 1.06, 1.2, 2.0, 5.0])
def test_tokens_that_are_cut_off(cut_off, query_length):
    """One token is a little larger than all before it, and wins only where its integers are not cut off."""
    for dim in (16, 48, 128):
        D = embeddings(4, 100, dim, seed=1)
        D /= D.abs().amax((1, 2), keepdim=True)
        direction = D.new_ones(dim) * torch.tensor([1.0, -1.0]).repeat(dim // 2)
        D[2:, 30] = direction / cut_off
        D[2:, 60] = direction / cut_off
        D[2:, 60, 3] *= 1.001 * cut_off**2
        Q = embeddings(1, query_length, dim, seed=2) * 0.01 + direction
        Q[0, :, 3] *= 10
        _, winners = check(Q, D)
        check_winners(Q, D, winners)
        assert (winners[0, 2:] == 60).all()


@pytest.mark.parametrize("query_length", [12, 32, 33])
def test_an_outlier(query_length):
    """One dimension, or one value, of a thousand times the others: all else rounds to a few steps or none."""
    for dim, dtype in itertools.product((8, 48, 128), STORAGES):
        Q, D = embeddings(2, query_length, dim, dtype=dtype, seed=1), embeddings(5, 200, dim, dtype=dtype, seed=2)
        for large_q, large_d in itertools.product((1, 1e3), (1, 1e3)):
            q, d = Q.clone(), D.clone()
            q[..., 3] *= large_q
            d[:3, :, 3] *= large_d
            d[3, 17, 3] *= large_d
            check(q, d)
            d[..., 3] = large_d
            check_winners(q, d, check(q, d)[1])


@pytest.mark.parametrize("query_length", [12, 32, 33])
@pytest.mark.parametrize("dim", [1, 2, 16, 48, 128])
def test_ties(dim, query_length):
    """The first of equals wins: on a grid, with tokens that return in any order, and where all tokens are equal."""
    order = torch.from_numpy(np.random.default_rng(5).permutation(200) % 67)
    for dtype in STORAGES:
        Q, D = grid(3, query_length, dim, dtype=dtype, seed=1), grid(4, 200, dim, dtype=dtype, seed=2)
        returning = embeddings(4, 67, dim, dtype=dtype, seed=3)[:, order]
        for documents in (D, returning, torch.cat([returning] * 6, 1), D[:, order], D[:, :1].expand(4, 200, dim)):
            scores, winners = check(Q, documents)
            similarity = torch.einsum("qid,kjd->qkij", Q.double(), documents.double())
            if documents is returning or documents is D:
                first = (documents[:, None] == documents[:, :, None]).all(3).int().argmax(2)  # [Nd, token]
                assert all(torch.equal(first[j][winners[:, j].long()], winners[:, j].long()) for j in range(4))
            if documents is D:
                assert torch.equal(winners.long(), similarity.argmax(3))
                assert torch.equal(scores.double(), similarity.amax(3).sum(2))


@pytest.mark.parametrize("query_length", [12, 16, 32, 33])
def test_ties_of_unlike_tokens(query_length):
    """Equal for one query token, while the earlier one is also best for others: it is then scored after the later one."""
    for dim, place in itertools.product((16, 48), range(0, 64, 5)):
        Q, D = embeddings(1, query_length, dim, seed=1) * 0.1, -embeddings(2, 90, dim, seed=2).abs()
        tied = slice(query_length - 3, query_length)
        Q += torch.linspace(0.5, 1, dim)
        Q[..., 0] = 0
        Q[:, tied] = 0
        Q[:, tied, 0] = 1
        D[0, place], D[0, place + 3] = 1, -1
        D[1, place], D[1, place + 3] = -1, 1
        D[:, [place, place + 3], 0] = 1
        _, winners = check(Q, D)
        assert (winners[0, :, tied] == place).all()
        assert (winners[0, 0, : tied.start] == place).all()
        assert (winners[0, 1, : tied.start] == place + 3).all()


@pytest.mark.parametrize("query_length", [12, 16, 32, 33])
@pytest.mark.parametrize(("dim", "block"), [(48, 504), (128, 252), (2048, 12)])
def test_a_short_last_block(dim, block, query_length):
    """Fewer tokens than a tile, five times as large: their integers are not to be compared with those of the block before."""
    for left in (1, 4, 11):
        Q = embeddings(1, query_length, dim, seed=1) * 0.1 + 1
        D = -embeddings(3, max(72 // block, 1) * block + left, dim, seed=2, norm=None).abs().clamp(max=1)
        D[:, -left - block + 11] = 1  # where a tile of the last block would end
        D[:, -left:] = 5
        D[:, -left:, ::3] = -5
        _, winners = check(Q, D)
        assert (winners == D.shape[1] - left).all()


@pytest.mark.parametrize("query_length", [12, 32, 33])
@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_last_bits(dtype, query_length):
    """Tokens that differ from the best one in the last bit of a value, above or below, before and behind it."""
    for dim in (8, 48, 128):
        Q, D = embeddings(1, query_length, dim, dtype=dtype, seed=1), embeddings(4, 150, dim, dtype=dtype, seed=2)
        for document in range(4):
            rows = D[document]
            rows[70] = Q[0, document % query_length]
            for token in range(60, 80):
                rows[token] = rows[70]
                step = torch.tensor(INF if (token * (document + 3)) % 5 < 2 else -INF).to(dtype)
                rows[token, token % dim] = torch.nextafter(rows[token, token % dim], step)
        check(Q, D)
        check(Q, D.flip(1))


@pytest.mark.parametrize("query_length", [12, 32, 33])
def test_signs(query_length):
    """Negated copies, and queries whose best similarity is negative."""
    for dim, dtype in itertools.product((7, 48, 128), STORAGES):
        Q, D = embeddings(2, query_length, dim, dtype=dtype, seed=1), embeddings(4, 75, dim, dtype=dtype, seed=2)
        both_signs = torch.cat([D, -D], 1)
        check_winners(Q, both_signs, check(Q, both_signs)[1])
        _, winners = check(Q.abs(), -both_signs.abs() - 0.01)
        assert winners.isfinite().all()
        scores, winners = check(Q.abs(), -both_signs.abs() - 0.01, None, holes(4, 150, seed=3), mask_mode="zero")
        assert (scores == 0).all()
        assert (winners == -1).all()


@pytest.mark.parametrize("dim", [1, 2, 16, 48, 2048])
def test_one_hot(dim):
    for dtype, query_length in itertools.product(STORAGES, (12, 33)):
        random = np.random.default_rng(dim)
        Q, D = torch.zeros(2, query_length, dim, dtype=dtype), torch.zeros(3, 100, dim, dtype=dtype)
        for rows in (Q, D):
            places = torch.from_numpy(random.integers(0, dim, rows.shape[:2]))[..., None]
            rows.scatter_(2, places, torch.from_numpy(random.choice([-1.0, 1.0], places.shape)).to(dtype))
        scores, winners = check(Q, D)
        similarity = torch.einsum("qid,kjd->qkij", Q.double(), D.double())
        assert torch.equal(winners.long(), torch.from_numpy(similarity.numpy().argmax(3)))
        assert torch.equal(scores.double(), similarity.amax(3).sum(2))


@pytest.mark.parametrize("query_length", [7, 32])
@pytest.mark.parametrize("dim", [2, 3, 4, 7, 48, 50, 64, 127, 128, 255, 256])
def test_long_tokens(dim, query_length):
    """Values that are all as large as the largest, in every dimension or in half of them, and tokens that are parallel to
    query tokens: where sums are of 16 bits, no other tokens bring as much to them."""
    random = np.random.default_rng(dim)
    pair = np.arange(dim) // 2 % 2
    for part in (pair == 0, pair == 1, pair >= 0):
        if not part.any():
            continue
        D = random.choice([-1.0, 1.0], (12, 300, dim)) * part
        D[3:] *= random.uniform(0.9, 1, (9, 300, dim))
        D[6:] *= 2.0 ** random.integers(-3, 4, (6, 1, 1))
        tokens = D[random.integers(0, 12, query_length), random.integers(0, 300, query_length)]
        Q = tokens * random.choice([-1, 1], (query_length, 1)) * 2.0 ** -random.integers(0, 4, (query_length, 1))
        Q[1] *= random.uniform(0, 1, dim)
        Q, D = torch.from_numpy(Q[None]).float(), torch.from_numpy(D).float()
        (_, winners, _), tried, done = screened_documents(lambda: outputs(Q, D))  # noqa: B023 (called at once)
        check_winners(Q, D, winners.reshape(1, 12, -1))
        check(Q, D)
        if part.sum() >= 48 and dim <= MOST_DIMENSIONS[_C.get_isa()]:
            assert done >= tried // 2 > 0


def steps_of_blocks(count):
    """The kernel's steps to 1 in each block of a thread's documents, the largest norm of two neighbours being 1 in all,
    and no token too long for sums of 16 bits.

    As in narrow_inl.h and screen_inl.h; that these are the kernel's own only makes the cases below hard, not right.
    """
    largest, steps = np.float32(1), []
    for _ in range(count):
        steps.append(np.float32(60 if _C.get_isa() in SUMS_OF_16_BITS else 120) / largest)
        seen = (np.rint(steps[-1]) + np.float32(0.5)) / steps[-1]
        largest = max(seen, largest * np.float32(1 - 1 / 512))
    return steps


def rounded_documents(dim, steps, random):
    """(query, winner, rival): rounding the tokens costs the winner half a step in every dimension, and gives it the rival."""
    signs = random.choice([-1.0, 1.0], dim)
    integers = random.integers(20, 40, dim)
    gap = int(np.ceil(0.998 * dim)) - 1
    more = random.permutation(dim) < gap
    return signs, signs * (integers + 0.499) / steps, signs * (integers + more - 0.499) / steps


def rounded_against(query, integers, steps):
    more = np.zeros(len(query))
    largest_first = np.argsort(-np.abs(query))
    more[largest_first] = np.abs(query)[largest_first].cumsum() < 0.9975 * np.abs(query).sum()
    signs = np.sign(query)
    return query, signs * (integers + 0.499) / steps, signs * (integers + more - 0.499) / steps


def rounded_documents_uneven(dim, steps, random):
    """The same with a query whose values are of every size, and integers at 127 to 1."""
    query = random.choice([-1.0, 1.0], dim) * random.integers(1, 128, dim) / 127
    query[random.integers(dim)] = 1
    return rounded_against(query, random.integers(20, 40, dim), steps)


def rounded_documents_short(dim, steps, random):
    """The same with tokens that sums of 16 bits hold as they are: a query of one 127 and as large others as fit beside."""
    query = np.full(dim, int((157**2 - 127**2) ** 0.5 / ((dim + 1) // 2) ** 0.5) / 127)
    query[0] = 1
    return rounded_against(random.choice([-1.0, 1.0], dim) * query, random.integers(8, 15, dim), steps)


def rounded_query(dim, steps, random):
    """(query, winner, rival): rounding the query costs the winner half a step in every dimension, and gives it the rival."""
    errors = random.choice([-1.0, 1.0], dim)
    below = np.zeros(dim)
    below[1 + random.permutation(dim - 1)[: int(0.49 * (dim - 1))]] = 1
    query = errors * (0.49 - below) / 127
    winner = errors * np.rint(min(0.7 * steps, 170 / dim**0.5 if steps < 100 else np.inf)) / steps
    query[0], winner[0] = 1, 0
    return query, winner, -winner


def hard_documents(make, dim, length, winner_at, rival_at, count=3, blocks=1, seed=0):
    """(query [d], documents [count, length, d]): each a winner and a rival, which int8 prefers as clearly as it can."""
    random = np.random.default_rng(seed)
    all_steps = steps_of_blocks(count * blocks)
    documents, query = [], None
    for number in range(count):
        steps = float(all_steps[number * blocks + winner_at * blocks // length])
        query, winner, rival = make(dim, steps, np.random.default_rng(seed))
        # Others: far from the query, the largest value 1 beside a 0.
        document = -query * random.uniform(0.3, 0.6, (length, dim))
        document[:, 0], document[:, 1] = -np.sign(query[0]) or 1, 0
        document[winner_at], document[rival_at] = winner, rival
        documents.append(document)
    return torch.from_numpy(query).float(), torch.from_numpy(np.stack(documents)).float()


def check_hard(query, documents, winner_at, query_length):
    for share in (1.0, 0.37, -1.0):
        Q = torch.cat([query[None] * share] * query_length)[None]
        _, winners = check(Q, documents * np.sign(share))
        assert (winners == winner_at).all()


@pytest.mark.parametrize("query_length", [1, 16, 17, 32, 33])
@pytest.mark.parametrize("make", [rounded_documents, rounded_documents_uneven, rounded_documents_short, rounded_query])
@pytest.mark.parametrize("dim", [8, 16, 33, 48, 64, 128, 600, 768, 1000, 2048])
def test_roundings_that_agree(make, dim, query_length):
    """Every rounding goes against the winner, up to the bound itself; the rival stands before and behind it."""
    if dim > MOST_DIMENSIONS[_C.get_isa()]:
        pytest.skip("so many dimensions are not screened")
    for seed, (winner_at, rival_at) in itertools.product(range(3), ((5, 6), (60, 3), (64, 63))):
        # A block at d = 768 is 36 tokens, and at d = 2048 it is 12: then winner and rival are not always in one.
        block = max(12, 32768 // -(-dim // 32 * 32) // 12 * 12)
        if winner_at // block == rival_at // block:
            query, documents = hard_documents(make, dim, 96, winner_at, rival_at, blocks=-(-96 // block), seed=seed)
            check_winners(query[None, None], documents, torch.full((1, 3, 1), winner_at))
            check_hard(query, documents, winner_at, query_length)


@pytest.mark.parametrize("query_length", [1, 17, 32, 33])
@pytest.mark.parametrize("dim", [48, 128])
def test_roundings_that_agree_against_an_earlier_block(dim, query_length):
    """The rival is exact and lies in a block before: the winner's similarity must be allowed all of its own error."""
    length, block = 600, {48: 504, 128: 252}[dim]
    steps = [float(s) for s in steps_of_blocks(3 * -(-length // block))]
    for later in range(1, -(-length // block)):
        documents = []
        for number in range(3):
            signs = np.ones(dim)
            document = np.full((length, dim), -0.5)
            document[:, 0], document[:, 1] = -1, 0
            document[later * block + 30] = (30 + 0.499) / steps[number * -(-length // block) + later]
            document[later * block - 60] = document[later * block + 30] * (1 - 1e-5)
            documents.append(document)
        query, D = torch.from_numpy(signs).float(), torch.from_numpy(np.stack(documents)).float()
        check_hard(query, D, later * block + 30, query_length)


@pytest.mark.parametrize("query_length", [1, 17, 32, 33])
@pytest.mark.parametrize("dim", [16, 33, 48, 64, 96, 128, 600])
def test_queries_that_round_to_almost_nothing(dim, query_length):
    """int8 sees one dimension of the query: what the others lose grows with the norm of a token, which must be all of it."""
    query = np.full(dim, 0.499 / 127)
    query[0] = 1
    lost = query[1:].sum()
    for share in (0.6, 0.8, 0.9, 0.95, 0.99):
        documents = np.full((2, 100, dim), -1.0)
        documents[:, :, 0] = 0
        documents[:, 50] = 1
        documents[:, 20] = 0
        documents[:, 50, 0] = 0.25
        documents[:, 20, 0] = 0.25 + share * min(lost, 0.7)
        check_hard(torch.from_numpy(query).float(), torch.from_numpy(documents).float(), 50, query_length)


@pytest.mark.parametrize("query_length", [1, 12, 32, 33])
@pytest.mark.parametrize("d_dtype", STORAGES, ids=storage_name)
def test_close_tokens(d_dtype, query_length):
    """Random tokens close around a best one, at half steps of the integers: many maxima are within the bound of others."""
    for seed, dim in itertools.product(range(6), (4, 17, 48, 128)):
        random = np.random.default_rng(seed)
        center = random.integers(-100, 100, dim) / 120
        D = random.uniform(-0.3, 0.3, (3, 200, dim))
        near = random.permutation(200)[:15]
        D[:, near] = center + (random.integers(-2, 2, (3, 15, dim)) + random.choice([0.499, 0.501], (3, 15, dim))) / 120
        D[:, 0, 0] = 1
        Q = center * random.choice([1.0, 0.5, 1 / 3], (1, query_length, 1)) + random.uniform(
            -0.004, 0.004, (1, query_length, dim)
        )
        Q, documents = torch.from_numpy(Q).float(), torch.from_numpy(D).to(d_dtype)
        check_winners(Q, documents, check(Q, documents)[1])


@pytest.mark.parametrize("query_length", [12, 32, 40])
def test_threads(threads, query_length):
    """The scale is guessed from the documents that a thread had before: the bits do not show it."""
    scales = torch.tensor([1, 1.5, 0.2, 1e-3, 1.04]).repeat(20)[:, None, None]
    Q, D = embeddings(3, query_length, 48, seed=1), embeddings(100, 200, 48, seed=2) * scales
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(check(Q, D))
    for scores, winners in found[1:]:
        assert torch.equal(scores, found[0][0])
        assert torch.equal(winners, found[0][1])


def test_company():
    """A score is a function of its query and document alone, and not of the others in the call or of their order."""
    scales = torch.tensor([1, 1.5, 0.2, 1e-3, 1.04, 0]).repeat(2)[:, None, None]
    Q, D = embeddings(5, 17, 48, seed=1), embeddings(12, 200, 48, seed=2) * scales
    Q[3, 4] = NAN
    scores, winners = check(Q, D)
    for i, j in itertools.product(range(5), range(12)):
        one, who = check(Q[i : i + 1], D[j : j + 1])
        np.testing.assert_array_equal(bits(one[0, 0]), bits(scores[i, j]))
        assert torch.equal(who[0, 0], winners[i, j])
    order = torch.from_numpy(np.random.default_rng(3).permutation(12))
    shuffled, who = check(Q.flip(0), D[order])
    np.testing.assert_array_equal(bits(shuffled.flip(0)), bits(scores[:, order]))
    assert torch.equal(who.flip(0), winners[:, order])


@st.composite
def calls(draw):
    dim = draw(st.sampled_from((*DIMENSIONS, 24, 256, 768)))
    num_queries, query_length = draw(st.sampled_from(((1, 1), (1, 16), (1, 32), (2, 12), (3, 17), (1, 70))))
    num_documents, length = draw(st.integers(1, 6)), draw(st.integers(64, 700))
    seed = draw(st.integers(0, 2**20))
    Q = draw(values(seed))(num_queries, query_length, dim).to(draw(st.sampled_from(STORAGES)))
    D = draw(values(seed + 1))(num_documents, length, dim).to(draw(st.sampled_from(STORAGES)))
    mask = holes(num_documents, length, seed=seed) if draw(st.booleans()) else None
    options = {"normalize": draw(st.booleans()), "mask_mode": draw(st.sampled_from(("exclude", "zero")))}
    return Q, D, mask, options


@settings(max_examples=250, deadline=None, derandomize=True)
@given(call=calls())
def test_anything(call):
    Q, D, mask, options = call
    with ek.backend("cpu"):
        check(Q, D, None, mask, **options)


def test_switch():
    """It says what was before, so that it can be put back."""
    assert _C.set_screening(False) is True
    assert _C.set_screening(False) is False
    assert _C.set_screening(True) is False


def test_whole_and_ragged_rows():
    """Rows of whole and of ragged steps of the second scoring, up to the last one of a collection."""
    for dim in (4, 7, 8, 48):
        queries, query_offsets = queries_of((33,), dim)
        rows, offsets = queries_of((64, 100), dim, seed=1)
        for dtype in (np.float32, np.float16):
            tokens = rows.astype(dtype)
            both(lambda: [score_packed(queries, query_offsets, tokens, offsets, None)])  # noqa: B023
