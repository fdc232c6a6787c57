"""precision="fast" where int8 screens it: exact for long documents, fixed point for short ones, whatever the company."""

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
from cases import STORAGES, embeddings, holes, packed, padded, ragged, storage_name
from edgecolbert_kernels import PackedEmbeddings
from screening import (
    _C,
    INF,
    MOST_DIMENSIONS,
    NAN,
    NONE,
    SHORTEST,
    bits,
    screening,
    values,
    with_gradients,
)

SHORTEST_FAST = {
    isa: 128 if isa.startswith("avx512") else 160 for isa in SHORTEST if isa not in ("avxvnni", "neon_dotprod")
}
"""Instruction sets that screen "fast", and the document tokens from which on they do."""


@pytest.fixture(autouse=True, params=SHORTEST_FAST or [NONE])
def screened_isa(request):
    with screening(request.param):
        yield


FAST_LENGTHS = (127, 128, 129, 64, 300, 12, 0, 159, 160, 161, 1000, 63, 200)
"""Around the shortest documents that "fast" screens, in no order."""


def long_ones(documents):
    """Those that "fast" screens, and so scores exactly."""
    isa = _C.get_isa()
    screened = documents[0].shape[-1] <= MOST_DIMENSIONS[isa]
    return torch.tensor([screened and len(d) >= SHORTEST_FAST[isa] for d in documents])


def fixed_point(call):
    """What `call` returns where nothing is screened."""
    before = _C.set_screening(False)
    try:
        return call()
    finally:
        _C.set_screening(before)


def check_fast(fast, exact, unscreened, long):
    """[..., Nd]: exact for long documents, fixed point for the others, both to the bit."""
    for columns, wanted in ((long, exact), (~long, unscreened)):
        np.testing.assert_array_equal(bits(fast[..., columns]), bits(wanted[..., columns]))


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
@pytest.mark.parametrize("dim", [16, 48, 50, 128, 768, 2048, 2049])
def test_fast(dim, dtype):
    """Long documents are scored exactly, short ones in fixed point, and neither is further off than fixed point may be."""
    documents = ragged(FAST_LENGTHS, dim, dtype=dtype, seed=1)
    for lengths in ((32,), (12,), (17, 33, 1)):
        queries = ragged(lengths, dim, dtype=dtype, seed=2)
        fast = ek.maxsim(queries, documents, precision="fast")
        exact = ek.maxsim(queries, documents)
        unscreened = fixed_point(lambda: ek.maxsim(queries, documents, precision="fast"))  # noqa: B023 (called at once)
        long = long_ones(documents)
        check_fast(fast, exact, unscreened, long)
        if dim <= 128:  # more do not fit fixed point in every storage
            assert not torch.equal(fast[:, ~long], exact[:, ~long])
            assert not torch.equal(unscreened[:, long], exact[:, long])
        for (i, q), (j, d) in itertools.product(enumerate(queries), enumerate(documents)):
            q, d = q.double().numpy(), d.double().numpy()
            assert abs(fast[i, j].item() - oracle.maxsim(q, d)[0]) <= oracle.bound(q, d, "fast")


def test_fast_as_without_a_screen():
    """Fixed point is that of any other instruction set."""
    Q, D = ragged((32, 5), 48, seed=1), ragged(FAST_LENGTHS, 48, seed=2)
    fast, long = ek.maxsim(Q, D, precision="fast"), long_ones(D)
    for isa in SHORTEST:
        _C.set_isa(isa)
        unscreened = fixed_point(lambda: ek.maxsim(Q, D, precision="fast"))
        assert torch.equal(fast[:, ~long], unscreened[:, ~long])
        assert not torch.equal(fast[:, long], unscreened[:, long])


def mixed_queries(dtype=torch.float32):
    """Ordinary ones beside some that int8 or fixed point cannot stand for."""
    Q = embeddings(9, 17, 48, dtype=dtype, seed=1)
    Q[1, 3] *= 1e-12
    Q[2, 4, 5] = NAN
    Q[3, 16] *= 30
    Q[4, 0] = 0
    Q[5, 1, 2] = INF
    Q[6] *= 1e-4
    Q[7, 2] *= 3e4
    return Q


def mixed_documents(dtype=torch.float32):
    """The same of documents, of many lengths; some whose tokens are all equal, for which the screen gives up and pauses."""
    lengths = (300, 127, 128, 300, 300, 170, 170, 100, 400, 300, 64, 1200, 129, 127, 300, 40)
    D = ragged(lengths, 48, dtype=dtype, seed=2)
    for equal in (3, 4, 6, 7, 13):
        D[equal] = D[equal][:1].repeat(lengths[equal], 1)
    D[8] = D[8] * 40
    D[9][17, 5] = NAN
    D[10] = D[10] * 3
    D[12] = D[12] * 1e-12
    return D


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_fast_company(dtype):
    """A score is the same with other queries and documents in the call, and alone; in every order and layout."""
    Q, D = mixed_queries(dtype), mixed_documents(dtype)

    def same(found, wanted):
        np.testing.assert_array_equal(bits(found), bits(wanted))

    scores = ek.maxsim(list(Q), D, precision="fast")
    for i, j in itertools.product(range(len(Q)), range(len(D))):
        same(ek.maxsim(Q[i : i + 1], D[j][None], precision="fast"), scores[i : i + 1, j : j + 1])
    same(ek.maxsim(list(Q.flip(0)), D[::-1], precision="fast").flip(0, 1), scores)
    for i in range(len(Q)):
        same(ek.maxsim(Q[i], D, precision="fast"), scores[i])
    for j in range(len(D)):
        same(ek.maxsim(Q, D[j][None], precision="fast"), scores[:, j : j + 1])
    (rows, cu_q), (tokens, cu_d) = packed(list(Q)), packed(D)
    same(ek.maxsim_varlen(rows, tokens, cu_q, cu_d, precision="fast"), scores)
    grid_of = torch.cartesian_prod(torch.arange(len(Q)), torch.arange(len(D)))
    grid_of = grid_of[torch.from_numpy(np.random.default_rng(1).permutation(len(grid_of)))].unbind(1)
    same(ek.maxsim_indexed(Q, D, *grid_of, precision="fast"), scores[grid_of])
    short = [number for number, d in enumerate(D) if len(d) < SHORTEST_FAST[_C.get_isa()]]
    chosen = torch.tensor([0, 4, 8] * len(short)), torch.tensor(short).repeat_interleave(3)
    same(ek.maxsim_indexed(Q, D, *chosen, precision="fast"), scores[chosen])
    same(ek.maxsim_pairs(list(Q), D[: len(Q)], precision="fast"), scores[:, : len(Q)].diagonal())
    D, mask = padded(D)
    same(ek.maxsim(Q, D, None, mask, precision="fast"), scores)
    own = [t.expand(len(Q), *t.shape) for t in (D, mask)]
    same(ek.maxsim(Q, own[0], None, own[1], precision="fast"), scores)


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_fast_long_documents_of_every_kind(dtype):
    """Exact in what int8 or fixed point cannot stand for, too: that is fp32's, with the winners and for the scores alone."""
    Q, D = mixed_queries(dtype), mixed_documents(dtype)
    (rows, cu_q), (tokens, cu_d) = packed(list(Q)), packed(D)
    arguments = rows, tokens, None, None, cu_q, cu_d, None, None, False, "exclude"
    fast, exact, unscreened = (
        torch.ops.edgecolbert.maxsim_forward(*arguments, "fast", True),
        torch.ops.edgecolbert.maxsim_forward(*arguments, "exact", True),
        fixed_point(lambda: torch.ops.edgecolbert.maxsim_forward(*arguments, "fast", True)),
    )
    long = long_ones(D)
    check_fast(fast[0], exact[0], unscreened[0], long)
    check_fast(*(winners.reshape(len(Q), len(D), -1).transpose(1, 2) for _, winners in (fast, exact, unscreened)), long)
    alone = torch.ops.edgecolbert.maxsim_forward(*arguments, "fast", False)[0]
    np.testing.assert_array_equal(bits(alone), bits(fast[0]))


@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
@pytest.mark.parametrize("normalize", [False, True], ids=["as they are", "normalized"])
def test_fast_masked(mask_mode, normalize):
    """Kept tokens count, not all of them, nor the longest document's."""
    options = {"mask_mode": mask_mode, "normalize": normalize}
    kept = torch.tensor([126, 127, 128, 129, 300, 0, 1, 64, 159, 160])
    for dtype in STORAGES:
        Q, D = embeddings(3, 20, 48, dtype=dtype, seed=1), embeddings(len(kept), 300, 48, dtype=dtype, seed=2)
        order = np.random.default_rng(3).random((len(kept), 300)).argsort(1).argsort(1)
        mask = torch.from_numpy(order) < kept[:, None]
        masked = D.masked_fill(~mask[..., None], NAN)
        call = functools.partial(ek.maxsim, Q, masked, holes(3, 20, seed=4), mask, **options)
        fast, unscreened = call(precision="fast"), fixed_point(lambda: call(precision="fast"))  # noqa: B023
        check_fast(fast, call(), unscreened, kept >= SHORTEST_FAST[_C.get_isa()])
        assert not torch.equal(fast[:, 1], call()[:, 1])
        for j in range(len(kept)):
            alone = ek.maxsim(Q, masked[j : j + 1], holes(3, 20, seed=4), mask[j : j + 1], precision="fast", **options)
            assert torch.equal(alone[:, 0], fast[:, j])
        if mask_mode == "exclude":
            compact = [rows[keep] for rows, keep in zip(D, mask, strict=True)]
            found = ek.maxsim(list(Q), compact, list(holes(3, 20, seed=4)), precision="fast", normalize=normalize)
            assert torch.equal(found, fast)


@pytest.mark.parametrize("query_length", [12, 32, 40])
def test_fast_threads(threads, query_length):
    """Documents that make the screen pause are another thread's, or not: the bits do not show it."""
    Q = embeddings(5, query_length, 48, seed=1)
    Q[3, 4] *= 1e-12
    D = ragged((300, 127, 128, 200, 100) * 16, 48, seed=2)
    for equal in range(3, len(D), 7):
        D[equal] = D[equal][:1].repeat(len(D[equal]), 1)
    long = long_ones(D)
    for count in (1, 2, 4):
        threads(count)
        fast = ek.maxsim(list(Q), D, precision="fast")
        check_fast(fast, ek.maxsim(list(Q), D), fixed_point(lambda: ek.maxsim(list(Q), D, precision="fast")), long)
        one_by_one = torch.cat([ek.maxsim(Q, d[None], precision="fast") for d in D], 1)
        assert torch.equal(fast, one_by_one)


@pytest.mark.parametrize("name", ["in batch", "own candidates", "pairs", "indexed", "lists", "padded", "varlen"])
def test_fast_gradients(name):
    """They are those of the exact scores' winners, where every document is long."""
    for dtype in STORAGES:
        Q, D = embeddings(4, 17, 48, dtype=dtype, seed=1), embeddings(4, 200, 48, dtype=dtype, seed=2)
        function, options = ek.maxsim, {}
        if name == "own candidates":
            D = embeddings(4, 2, 200, 48, dtype=dtype, seed=2)
        elif name == "pairs":
            function = ek.maxsim_pairs
        elif name == "indexed":
            function = ek.maxsim_indexed
            options = {"query_index": torch.tensor([2, 0, 0, 3, 1]), "document_index": torch.tensor([3, 0, 3, 2, 1])}
        elif name == "lists":
            Q, D = ragged((17, 2, 33), 48, dtype=dtype, seed=3), ragged((160, 300, 1000), 48, dtype=dtype, seed=4)
        elif name == "padded":
            D, mask = padded(ragged((160, 300, 1000), 48, dtype=dtype, seed=4))
            options = {"d_mask": mask}
        elif name == "varlen":
            function = ek.maxsim_varlen
            (Q, cu_q), (D, cu_d) = packed(list(Q)), packed(ragged((160, 300, 1000), 48, dtype=dtype, seed=4))
            options = {"cu_seqlens_q": cu_q, "cu_seqlens_d": cu_d}
        fast, exact = (
            with_gradients(function, Q, D, precision=precision, **options) for precision in ("fast", "exact")
        )
        for number, (a, b) in enumerate(zip(fast, exact, strict=True)):
            np.testing.assert_array_equal(bits(a), bits(b), err_msg=f"output {number}")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_fast_packed_embeddings(dtype):
    """Stored floats as any others; int8 with a scale has a fixed point of its own, which no screen replaces."""
    documents = PackedEmbeddings.from_list(ragged(FAST_LENGTHS, 48, seed=1), dtype=dtype)
    Q = embeddings(3, 32, 48, seed=2)
    index = torch.tensor([0, 2, 1, 0, 2]), torch.tensor([0, 4, 2, 3, 7])
    for kind in (np.asarray, torch.as_tensor):
        queries = kind(Q)
        fast, exact = (ek.maxsim(queries, documents, precision=precision) for precision in ("fast", "exact"))
        unscreened = fixed_point(lambda: ek.maxsim(queries, documents, precision="fast"))  # noqa: B023 (called at once)
        check_fast(fast, exact, unscreened, long_ones(documents).numpy() & (dtype != "int8"))
        for j in range(len(documents)):
            alone = ek.maxsim(queries, documents[j : j + 1], precision="fast")
            np.testing.assert_array_equal(bits(alone[:, 0]), bits(fast[:, j]))
        pairs = ek.maxsim_indexed(queries, documents, *map(kind, index), precision="fast")
        np.testing.assert_array_equal(bits(pairs), bits(fast[tuple(map(kind, index))]))


def test_fast_numpy():
    """The same bits from NumPy as from PyTorch, also of rows whose values do not lie side by side."""
    Q, D = embeddings(3, 32, 48, seed=1), embeddings(5, 200, 48, seed=2)
    for long in (True, False):
        rows = D if long else D[:, :127]
        wanted = ek.maxsim(Q, rows, precision="fast")
        assert torch.equal(wanted, ek.maxsim(Q, rows)) == long
        for d in (rows.numpy(), np.asfortranarray(rows.numpy())):
            np.testing.assert_array_equal(ek.maxsim(Q.numpy(), d, precision="fast"), wanted.numpy())


@st.composite
def fast_calls(draw):
    dim = draw(st.sampled_from((1, 7, 16, 48, 50, 128, 300)))
    seed = draw(st.integers(0, 2**20))
    Q = draw(values(seed))(draw(st.integers(1, 4)), draw(st.sampled_from((1, 12, 17, 33))), dim)
    lengths = draw(st.lists(st.sampled_from((0, 40, 127, 128, 129, 159, 160, 260, 700)), min_size=1, max_size=5))
    D = [draw(values(seed + 1 + number))(1, length, dim)[0] for number, length in enumerate(lengths)]
    q_dtype, d_dtype = draw(st.sampled_from(STORAGES)), draw(st.sampled_from(STORAGES))
    return Q.to(q_dtype), [d.to(d_dtype) for d in D], draw(st.booleans())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(call=fast_calls())
def test_fast_anything(call):
    Q, D, normalize = call
    with ek.backend("cpu"):
        options = {"normalize": normalize, "precision": "fast"}
        fast, unscreened = ek.maxsim(list(Q), D, **options), fixed_point(lambda: ek.maxsim(list(Q), D, **options))
        exact = ek.maxsim(list(Q), D, normalize=normalize)
        check_fast(fast, exact, unscreened, long_ones(D))
        for j, d in enumerate(D):
            np.testing.assert_array_equal(bits(ek.maxsim(Q, d[None], **options)[:, 0]), bits(fast[:, j]))
