"""Each layout of queries and documents as one small case: the public call, and the pairs that it is meant to score.

A case knows its pairs as plain indexing, so its expected scores and gradients are float64 autograd over rows picked one
pair at a time by `oracle.py`, without the package's own reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import edgecolbert_kernels as ek
import oracle
from cases import embeddings, holes, packed, ragged

Rows = torch.Tensor | list[torch.Tensor]


@dataclass
class Case:
    """`function(Q, D, *arguments, **options)` scores `pairs`, in the order of the flattened result of `shape`.

    A pair is (query index, document index, kept query tokens, kept document tokens); `Q[index]` is the pair's [Lq, d].
    """

    function: Callable
    Q: Rows
    D: Rows
    shape: tuple[int, ...]
    pairs: list[tuple]
    arguments: dict = field(default_factory=dict)

    def __call__(self, Q: Rows, D: Rows, **options) -> torch.Tensor:
        return self.function(Q, D, **self.arguments, **options)

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Rows, Rows]:
        """Copies of Q and D that require gradients, in `dtype` or their own."""
        return tuple(
            [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in rows]
            if isinstance(rows, list)
            else rows.detach().to(dtype or rows.dtype, copy=True).requires_grad_()
            for rows in (self.Q, self.D)
        )

    def choices(self, *, normalize: bool = False, mask_mode: str = "exclude") -> list:
        """The argmax [Lq] of each pair, in float64."""
        chosen = []
        for q, d, q_keep, d_keep in self.pairs:
            query, document = (rows[i].detach().double().numpy() for rows, i in ((self.Q, q), (self.D, d)))
            if normalize:
                query, document = oracle.normalized(query), oracle.normalized(document)
            keeps = (None if keep is None else keep.numpy() for keep in (q_keep, d_keep))
            chosen.append(torch.from_numpy(oracle.maxsim(query, document, *keeps, mask_mode=mask_mode)[1]))
        return chosen

    def expected(self, Q: Rows, D: Rows, *, normalize: bool = False, mask_mode: str = "exclude") -> torch.Tensor:
        """Scores in the dtype of Q, differentiable; every score is a sum over chosen tokens only (a masked winner is 0)."""
        scores = []
        for (q, d, _, _), argmax in zip(
            self.pairs, self.choices(normalize=normalize, mask_mode=mask_mode), strict=True
        ):
            query, document = Q[q][argmax >= 0], D[d][argmax[argmax >= 0]]
            if normalize:
                query, document = (torch.nn.functional.normalize(rows, dim=-1) for rows in (query, document))
            scores.append((query * document).sum())
        return torch.stack(scores).reshape(self.shape) if scores else torch.zeros(self.shape, dtype=torch.float64)


def flat(rows: Rows) -> list[torch.Tensor]:
    return rows if isinstance(rows, list) else [rows]


def gradients(function: Callable, Q: Rows, D: Rows, grad: torch.Tensor, **options) -> list[torch.Tensor]:
    """Gradients of `function(Q, D)` to every leaf; a leaf without an edge gets zeros."""
    scores = function(Q, D, **options)
    if not scores.requires_grad:
        return [torch.zeros_like(leaf) for leaf in (*flat(Q), *flat(D))]
    found = torch.autograd.grad(scores, [*flat(Q), *flat(D)], grad.to(scores.dtype), materialize_grads=True)
    return list(found)


def _index_pairs(count_q, count_d, q_mask, d_mask):
    return [
        (i, j, None if q_mask is None else q_mask[i], None if d_mask is None else d_mask[j])
        for i in range(count_q)
        for j in range(count_d)
    ]


def in_batch(dim, q_dtype, d_dtype, make=embeddings, masked=True, num_queries=3, num_documents=4, lq=11, ld=13) -> Case:
    Q, D = make(num_queries, lq, dim, dtype=q_dtype, seed=21), make(num_documents, ld, dim, dtype=d_dtype, seed=22)
    q_mask, d_mask = (holes(num_queries, lq, seed=23), holes(num_documents, ld, seed=24)) if masked else (None, None)
    pairs = _index_pairs(num_queries, num_documents, q_mask, d_mask)
    return Case(ek.maxsim, Q, D, (num_queries, num_documents), pairs, {"q_mask": q_mask, "d_mask": d_mask})


def one_query(dim, q_dtype, d_dtype, make=embeddings, masked=True) -> Case:
    Q, D = make(33, dim, dtype=q_dtype, seed=31), make(5, 12, dim, dtype=d_dtype, seed=32)
    q_mask, d_mask = (holes(33, seed=33), holes(5, 12, seed=34)) if masked else (None, None)
    pairs = [(slice(None), j, q_mask, None if d_mask is None else d_mask[j]) for j in range(5)]
    return Case(ek.maxsim, Q, D, (5,), pairs, {"q_mask": q_mask, "d_mask": d_mask})


def own_candidates(dim, q_dtype, d_dtype, make=embeddings, masked=True) -> Case:
    Q, D = make(3, 12, dim, dtype=q_dtype, seed=41), make(3, 4, 17, dim, dtype=d_dtype, seed=42)
    q_mask, d_mask = (holes(3, 12, seed=43), holes(3, 4, 17, seed=44)) if masked else (None, None)
    pairs = [
        (i, (i, k), None if q_mask is None else q_mask[i], None if d_mask is None else d_mask[i, k])
        for i in range(3)
        for k in range(4)
    ]
    return Case(ek.maxsim, Q, D, (3, 4), pairs, {"q_mask": q_mask, "d_mask": d_mask})


def row_by_row(dim, q_dtype, d_dtype, make=embeddings, masked=True) -> Case:
    Q, D = make(5, 7, dim, dtype=q_dtype, seed=51), make(5, 31, dim, dtype=d_dtype, seed=52)
    q_mask, d_mask = (holes(5, 7, seed=53), holes(5, 31, seed=54)) if masked else (None, None)
    pairs = [pair for pair in _index_pairs(5, 5, q_mask, d_mask) if pair[0] == pair[1]]
    return Case(ek.maxsim_pairs, Q, D, (5,), pairs, {"q_mask": q_mask, "d_mask": d_mask})


def varlen(dim, q_dtype, d_dtype, make=embeddings, masked=True) -> Case:
    Q, cu_q = packed(ragged((5, 0, 33, 1), dim, make=make, dtype=q_dtype, seed=61))
    D, cu_d = packed(ragged((12, 1, 0, 40, 13), dim, make=make, dtype=d_dtype, seed=62))
    q_mask, d_mask = (holes(len(Q), seed=63), holes(len(D), seed=64)) if masked else (None, None)
    q_slices, d_slices = ([slice(a, b) for a, b in itertools.pairwise(cu)] for cu in (cu_q, cu_d))
    pairs = [
        (q, d, None if q_mask is None else q_mask[q], None if d_mask is None else d_mask[d])
        for q in q_slices
        for d in d_slices
    ]
    arguments = {"cu_seqlens_q": cu_q, "cu_seqlens_d": cu_d, "q_mask": q_mask, "d_mask": d_mask}
    return Case(ek.maxsim_varlen, Q, D, (4, 5), pairs, arguments)


def lists(dim, q_dtype, d_dtype, make=embeddings, masked=True) -> Case:
    Q = ragged((5, 0, 33, 1), dim, make=make, dtype=q_dtype, seed=71)
    D = ragged((12, 1, 0, 40, 13), dim, make=make, dtype=d_dtype, seed=72)
    q_mask = [holes(len(q), seed=73 + i) for i, q in enumerate(Q)] if masked else None
    d_mask = [holes(len(d), seed=83 + j) for j, d in enumerate(D)] if masked else None
    return Case(ek.maxsim, Q, D, (4, 5), _index_pairs(4, 5, q_mask, d_mask), {"q_mask": q_mask, "d_mask": d_mask})


def indexed(dim, q_dtype, d_dtype, make=embeddings, masked=True) -> Case:
    """Chosen pairs with repetitions, in no order, leaving a query and a document out."""
    Q, D = make(4, 9, dim, dtype=q_dtype, seed=91), make(5, 14, dim, dtype=d_dtype, seed=92)
    q_mask, d_mask = (holes(4, 9, seed=93), holes(5, 14, seed=94)) if masked else (None, None)
    query_index, document_index = torch.tensor([3, 0, 0, 3, 1, 3, 1]), torch.tensor([4, 1, 0, 4, 2, 0, 2])
    pairs = [
        (i, j, None if q_mask is None else q_mask[i], None if d_mask is None else d_mask[j])
        for i, j in zip(query_index.tolist(), document_index.tolist(), strict=True)
    ]
    arguments = {"query_index": query_index, "document_index": document_index, "q_mask": q_mask, "d_mask": d_mask}
    return Case(ek.maxsim_indexed, Q, D, (7,), pairs, arguments)


LAYOUTS = {
    function.__name__: function
    for function in (in_batch, one_query, own_candidates, row_by_row, varlen, lists, indexed)
}
