"""Odd shapes by hypothesis: any layout, dtype, mask and option, on a grid where the right answer is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgecolbert_kernels as ek
import oracle
from cases import STORAGES, embeddings, grid, to_float64
from conftest import examples

relaxed = settings(
    max_examples=examples(60),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
lengths = st.lists(st.integers(0, 40), max_size=6)


@st.composite
def ragged_pairs(draw):
    """(queries, documents, query masks, document masks), each a list, masks with holes or None."""
    dim, seed = draw(st.integers(1, 140)), draw(st.integers(0, 2**16))
    sides = []
    for side in range(2):
        dtype = draw(st.sampled_from(STORAGES))
        rows = [grid(n, dim, seed=seed + 100 * side + i, dtype=dtype) for i, n in enumerate(draw(lengths))]
        generator = torch.Generator().manual_seed(seed + side)
        kept = [torch.rand(len(r), generator=generator) < draw(st.sampled_from((0.05, 0.5, 1.0))) for r in rows]
        sides.append((rows, kept if draw(st.booleans()) else None))
    (queries, q_mask), (documents, d_mask) = sides
    return queries, documents, q_mask, d_mask


def exact(queries, documents, q_mask, d_mask, mask_mode):
    q_masks = [None] * len(queries) if q_mask is None else [m.numpy() for m in q_mask]
    d_masks = [None] * len(documents) if d_mask is None else [m.numpy() for m in d_mask]
    rows = [
        [oracle.maxsim(q, d, qm, dm, mask_mode)[0] for d, dm in zip(to_float64(documents), d_masks, strict=True)]
        for q, qm in zip(to_float64(queries), q_masks, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(queries), len(documents))


@relaxed
@given(case=ragged_pairs(), mask_mode=st.sampled_from(("exclude", "zero")))
def test_lists(engine, precision, case, mask_mode):
    result = ek.maxsim(*case, mask_mode=mask_mode, precision=precision)
    assert oracle.same_on_grid(result, exact(*case, mask_mode), precision, 40, 140)


@relaxed
@given(case=ragged_pairs(), mask_mode=st.sampled_from(("exclude", "zero")))
def test_varlen(engine, precision, case, mask_mode):
    queries, documents, q_mask, d_mask = case
    if not queries or not documents:
        return
    cu_q, cu_d = (torch.tensor([0] + [len(r) for r in rows]).cumsum(0) for rows in (queries, documents))
    q_packed, d_packed = (None if mask is None else torch.cat(mask) for mask in (q_mask, d_mask))
    Q, D = torch.cat(queries).requires_grad_(), torch.cat(documents).requires_grad_()
    scores = ek.maxsim_varlen(Q, D, cu_q, cu_d, q_packed, d_packed, mask_mode=mask_mode, precision=precision)
    assert oracle.same_on_grid(scores.detach(), exact(*case, mask_mode), precision, 40, 140)
    scores.sum().backward()
    # Euler: a sum of bilinear terms is recovered from either gradient.
    for leaf in (Q, D):
        recovered = (leaf.detach().double() * leaf.grad.double()).sum().item()
        assert recovered == pytest.approx(
            scores.double().sum().item(), rel=2.0**-7, abs=2.0**-6 + leaf.numel() * 2.0**-9
        )


@relaxed
@given(
    shape=st.tuples(*[st.integers(0, 5)] * 2, *[st.integers(0, 40)] * 2, st.integers(1, 140)),
    dtypes=st.tuples(*[st.sampled_from(STORAGES)] * 2),
    seed=st.integers(0, 2**16),
    transposed=st.booleans(),
)
def test_own_candidates(engine, precision, shape, dtypes, seed, transposed):
    num_queries, candidates, query_length, length, dim = shape
    Q = grid(num_queries, query_length, dim, dtype=dtypes[0], seed=seed)
    D = grid(num_queries, candidates, length, dim, dtype=dtypes[1], seed=seed + 1)
    if transposed:
        D = D.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    wanted = [[oracle.maxsim(q, d)[0] for d in to_float64(own)] for q, own in zip(to_float64(Q), D, strict=True)]
    result = ek.maxsim(Q, D, precision=precision)
    wanted = torch.tensor(wanted, dtype=torch.float64).reshape(num_queries, candidates)
    assert oracle.same_on_grid(result, wanted, precision, query_length, dim)


@relaxed
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(1, 140)),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**16),
)
def test_symmetries(engine, precision, shape, scale, seed):
    """Permuting documents permutes scores; a repeated token, or a permutation of tokens, changes none; scale is linear."""
    num_queries, num_documents, query_length, length, dim = shape
    Q, D = embeddings(num_queries, query_length, dim, seed=seed), embeddings(num_documents, length, dim, seed=seed + 1)
    scores = ek.maxsim(Q, D, precision=precision)
    slack = 33 * query_length * 2.0**-15 if precision == "fast" else 0
    tolerance = {"rtol": 0, "atol": 4 * (dim + query_length) * query_length * oracle.UNIT_ROUNDOFF["float32"] + slack}
    order = torch.randperm(num_documents, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ek.maxsim(Q, D[order], precision=precision), scores[:, order], **tolerance)
    torch.testing.assert_close(ek.maxsim(Q, D.flip(1), precision=precision), scores, **tolerance)
    torch.testing.assert_close(ek.maxsim(Q, torch.cat([D, D[:, :1]], 1), precision=precision), scores, **tolerance)
    torch.testing.assert_close(ek.maxsim(Q.flip(1), D, precision=precision), scores, **tolerance)
    torch.testing.assert_close(ek.maxsim(Q * scale, D) / scale, ek.maxsim(Q, D), **tolerance)
