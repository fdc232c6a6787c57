"""Exact top-k search over all documents, without the matrix of all scores.

Documents go by in blocks. With `precision="fast"` a block is scored in fixed point, and the proven bound of that error says
which documents may still be among the best: these alone are scored exactly, so what comes out is what exact scores of all
documents would give.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from edgecolbert_kernels import checks, dtypes, identifiers
from edgecolbert_kernels.packed import PackedEmbeddings
from edgecolbert_kernels.scoring import Stored, maxsim, maxsim_indexed
from edgecolbert_kernels.signatures import Precision

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor
    from typing_extensions import Unpack

    from edgecolbert_kernels.signatures import Arrays, SearchOptions, Tensors, Tokens

Array = np.ndarray

# Scores held at a time, [queries, documents of a block].
SCORES = 1 << 20
QUERIES = 1024
# (query, document) pairs that wait for their exact score, and pairs scored in one call.
PENDING = 1 << 20
# How many queries repay the norms of all tokens.
FEW_QUERIES = 8

# What int16 fixed point takes (docs/design.md): steps of 2^-15, so values are off by half of that; documents have
# |d|^2 <= 3.5 after rounding. Queries and documents beyond its range are scored exactly, and have no error at all.
HALF_STEP = 2.0**-16
LARGEST_NORM = math.sqrt(3.5) + 2.0**-8
FLOAT32_ROUNDING = 2.0**-24


@overload
def search(
    Q: Arrays, documents: Tokens | Stored, k: int, **options: Unpack[SearchOptions]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]: ...
@overload
def search(
    Q: Tensors, documents: Tokens | Stored, k: int, **options: Unpack[SearchOptions]
) -> tuple[Tensor, Tensor]: ...
def search(
    Q: Any,
    documents: Any,
    k: int,
    *,
    q_mask: Any = None,
    precision: Precision = "fast",
    candidates: Sequence[Any] | None = None,
    filter: Any = None,
    ids: Iterable[Any] | None = None,
) -> tuple[Any, Any]:
    """The k documents with the highest MaxSim scores, for each query.

    The scores are those of `maxsim(..., precision="exact")` and so is the order, for both precisions: "fast" scores all
    documents in fixed point, keeps those that its proven error bound cannot rule out, and scores these exactly. Equal
    scores: the lower index first. A document or a query whose score is NaN is not found.

    Args:
        Q: `[Nq, Lq, d]`, or `[Lq, d]` for one query, whose axis the results then lack, or a list of `[Lq, d]`; torch
            tensors or numpy arrays as in `maxsim`.
        documents: a PackedEmbeddings, `[Nd, Ld, d]`, or a list of `[Ld, d]`. Pack them once where they are searched again.
            For queries on a GPU, also the DeviceEmbeddings that `PackedEmbeddings.to("cuda")` is; one of the host is
            streamed there.
        k: how many, at least 0.
        q_mask: as in `maxsim`.
        precision: "fast" or "exact": only the time differs.
        candidates: the documents of each query, as one array of integers a query: search becomes a reranker. An index
            that stands twice counts once, and -1 not at all, so that results may be fed back.
        filter: the documents that may be found, for all queries: a bool mask `[Nd]` or indices.
        ids: the same by their ids, where documents are a PackedEmbeddings with ids.

    Returns:
        scores float32 `[Nq, k]` and indices int64 `[Nq, k]` into `documents`, best first. Where there are fewer than k
        documents to find, rows end in -inf and -1. Tensors, on the device of Q, where Q is one.

    Raises:
        TypeError, ValueError: as in `maxsim`; or k is negative; or `ids` is a string.
        IndexError, KeyError: a candidate, a filter's index or an id does not exist.
    """
    checks.options("exclude", precision)
    checks.at_least("k", k, 0)
    k = int(k)
    packed = _packed(documents, Q)
    single = not isinstance(Q, (list, tuple)) and len(getattr(Q, "shape", ())) == 2
    if single:
        Q, q_mask = Q[None], q_mask[None] if hasattr(q_mask, "shape") else q_mask
    allowed = _allowed(packed, filter, ids)
    if packed.device is not None or checks.on_accelerator(Q):
        scores, indices = _search_there(Q, packed, k, q_mask, candidates, allowed)
        return (scores[0], indices[0]) if single else (scores, indices)
    found = _Best(len(Q), min(k, len(packed)))
    for start in range(0, len(Q), QUERIES):
        part = slice(start, start + QUERIES)
        queries = _Queries(Q[part], None if q_mask is None else q_mask[part], start)
        if candidates is None:
            _scan(queries, packed, allowed, precision, found)
        else:
            checks.same_count("Q", len(Q), "candidates", len(candidates))
            _rerank(queries, packed, allowed, candidates[part], found)
    if not len(Q):
        maxsim(Q, packed, q_mask)  # for its complaints
    scores, indices = found.padded(k)
    if single:
        scores, indices = scores[0], indices[0]
    if _has_tensors(Q):
        import torch

        return torch.from_numpy(scores), torch.from_numpy(indices)
    return scores, indices


class _Queries:
    """Some of the queries, and the place of the first."""

    def __init__(self, Q: Any, q_mask: Any, first: int) -> None:
        self.Q, self.q_mask, self.first = Q, q_mask, first

    def __len__(self) -> int:
        return len(self.Q)

    def scores(self, documents: PackedEmbeddings, precision: Precision) -> Array:
        """`[n, Nd]`."""
        return np.asarray(maxsim(_constant(self.Q), documents, self.q_mask, precision=precision))

    def exact(self, documents: PackedEmbeddings, query: Array, document: Array) -> Array:
        """Chosen pairs `[P]`; in the order of documents, whose tokens then stay in the caches."""
        scores = np.empty(len(query), np.float32)
        order = np.argsort(document, kind="stable")
        for start in range(0, len(order), PENDING):
            some = order[start : start + PENDING]
            scores[some] = maxsim_indexed(_constant(self.Q), documents, query[some], document[some], self.q_mask)
        return scores

    def fast_errors(self, documents: PackedEmbeddings, allowed: Array | None = None) -> _Errors:
        """How far at most a fast score of an allowed document is from the exact one."""
        each = [dtypes.widen(*dtypes.matrix("Q", query)).astype(np.float64) for query in self.Q]
        if documents.dtype == "int8":
            slopes = [_int8_error(query, documents.dim) for query in each]
            norms = documents.token_norms()
            return _Errors(np.zeros(len(each)), np.array(slopes), norms if allowed is None else norms[allowed])
        return _Errors(np.array([_fixed_point_error(query, documents.dim) for query in each]))


class _Errors:
    """Bounds `constant[n] + slope[n] * norms[j]` of the error of query n on document j."""

    def __init__(self, constant: Array, slope: Array | None = None, norms: Array | None = None) -> None:
        # A step up, as float64 is rounded to float32. A NaN in a query is a NaN in its scores, which nobody compares.
        self.constant = _up(constant)
        self.slope = None if slope is None else _up(slope)
        self.norms = norms

    def block(self, documents: slice) -> Array:
        """`[n, documents]`, or `[n, 1]` where it is the same for all."""
        if self.slope is None or self.norms is None:
            return self.constant[:, None]
        return self.slope[:, None] * self.norms[documents]

    def pairs(self, query: Array, document: Array) -> Array:
        if self.slope is None or self.norms is None:
            return self.constant[query]
        return self.slope[query] * self.norms[document]


def _up(bounds: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.nextafter(np.nan_to_num(bounds, nan=np.inf).astype(np.float32), np.float32(np.inf))


def _fixed_point_error(query: Array, dim: int) -> float:
    """For one query `[Lq, d]` in int16, whatever the document.

    A similarity <q, d> in fixed point is off by at most 2^-16 (|q|_1 + |d|_1) + dim 2^-32, and |d|_1 <= sqrt(dim) |d|. A
    maximum is off by no more than its similarities, a sum by the sum.
    """
    fixed_point = HALF_STEP * (np.abs(query).sum() + len(query) * math.sqrt(dim) * LARGEST_NORM)
    fixed_point += len(query) * dim * HALF_STEP**2
    return float(fixed_point + _float32_error(query, dim) * LARGEST_NORM)


def _int8_error(query: Array, dim: int) -> float:
    """For one query in int8, and a document of norm 1; the error grows with the document's norm.

    The document is int8 already. A query token is v * scale with scale = max|q| / 127, rounded as here, so that it is
    off by e = q - v * scale, with |e_i| <= scale / 2; and a similarity by <e, d>, at most |e| |d|.
    """
    rows = query.astype(np.float32)
    largest = np.abs(rows).max(axis=1, initial=0, keepdims=True)
    with np.errstate(all="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
        rounded = np.rint(rows * inverse).astype(np.float64) * (largest / np.float32(127))
        errors = np.linalg.norm(rows - rounded, axis=1)
    return float(errors.sum() * (1 + 1e-6) + _float32_error(query, dim))


def _float32_error(query: Array, dim: int) -> float:
    """Of both scores, for a document of norm 1: dim additions in an exact similarity, a few roundings in a fast one, Lq
    additions in each sum.
    """
    return 1.05 * FLOAT32_ROUNDING * (dim + 2 * len(query) + 8) * float(np.linalg.norm(query, axis=1).sum())


def _scan(
    queries: _Queries, documents: PackedEmbeddings, allowed: Array | None, precision: Precision, found: _Best
) -> None:
    """Every document that is allowed."""
    packed = documents if allowed is None else documents[allowed]
    # With this few documents all of them would be scored twice. int8 wants the norm of every document's tokens, which
    # costs as much as scoring a few queries, once: whoever has asked for that many, one by one or at once, of all
    # documents or, more often, of a part, asks for more.
    documents.searched += len(queries) * len(packed) / max(1, len(documents))
    fast = precision == "fast" and len(packed) > 4 * found.k
    fast = fast and (packed.dtype != "int8" or documents.searched >= FEW_QUERIES)
    errors = queries.fast_errors(documents, allowed) if fast else _Errors(np.zeros(len(queries)))
    best = found.of(queries)
    # The k highest scores that documents so far have for certain; the k-th is what a newcomer must be able to reach.
    certain = np.full((len(queries), found.k), -np.inf, np.float32)
    waiting: list[tuple[Array, Array, Array]] = []
    size = max(1, SCORES // max(1, len(queries)))

    def settle() -> None:
        query, document, score = (np.concatenate(each) for each in zip(*waiting, strict=True))
        if fast:
            reach = ~(score + errors.pairs(query, document) < certain[query, 0])
            query, document = query[reach], document[reach]
            score = queries.exact(packed, query, document)
        best.add(query, document if allowed is None else allowed[document], score)
        waiting.clear()

    for start in range(0, len(packed) if found.k else 0, size):
        scores = queries.scores(packed[start : start + size], "fast" if fast else "exact")
        error = errors.block(slice(start, start + size)) if fast else np.float32(0)
        lower = scores - error
        lower[np.isnan(lower)] = -np.inf
        certain = np.partition(np.concatenate([certain, lower], axis=1), -found.k, axis=1)[:, -found.k :]
        certain[:, 0] = np.maximum(certain[:, 0], best.worst())
        # An infinite query has an infinite error: what cannot be compared is kept.
        query, document = np.nonzero(~((scores + error < certain[:, :1]) | np.isnan(scores)))
        waiting.append((query, document + start, scores[query, document]))
        if sum(len(each[0]) for each in waiting) > PENDING:
            settle()
    if waiting:
        settle()


def _rerank(
    queries: _Queries, documents: PackedEmbeddings, allowed: Array | None, candidates: Sequence[Any], found: _Best
) -> None:
    """Each query's own documents."""
    lists = _candidate_lists(documents, allowed, candidates, queries.first)
    query = np.repeat(np.arange(len(lists)), [len(index) for index in lists])
    document = np.concatenate([np.empty(0, np.int64), *lists])
    found.of(queries).add(query, document, queries.exact(documents, query, document))


def _candidate_lists(
    documents: Stored, allowed: Array | None, candidates: Sequence[Any], first: int = 0
) -> list[Array]:
    """Sorted and distinct, those that are allowed; `first` is the number of the first query."""
    lists = []
    for n, candidate in enumerate(candidates):
        index = np.asarray(candidate.cpu() if hasattr(candidate, "cpu") else candidate)
        index = index.astype(np.int64) if not index.size else index
        if index.dtype.kind not in "iu":
            raise checks.wrong_dtype(f"candidates[{first + n}]", index.dtype, checks.INTEGERS)
        checks.rank(f"candidates[{first + n}]", index.shape, (1,), "one dimension")
        index = np.unique(index[index != -1])
        checks.index(f"candidates[{first + n}]", index, len(documents))
        lists.append(index if allowed is None else np.intersect1d(index, allowed, assume_unique=True))
    return lists


class _Best:
    """The k best documents of each query so far: by score, equal ones by index."""

    def __init__(self, num_queries: int, k: int) -> None:
        self.k = k
        self.scores = np.full((num_queries, k), -np.inf, np.float32)
        self.indices = np.full((num_queries, k), -1, np.int64)

    def of(self, queries: _Queries) -> _Best:
        """The part of some queries, in the same memory."""
        part = _Best(0, self.k)
        part.scores = self.scores[queries.first : queries.first + len(queries)]
        part.indices = self.indices[queries.first : queries.first + len(queries)]
        return part

    def padded(self, k: int) -> tuple[Array, Array]:
        """Scores and indices `[n, k]`; where k is more than there are documents, rows end in -inf and -1."""
        if k == self.k:
            return self.scores, self.indices
        padded = _Best(len(self.scores), k)
        padded.scores[:, : self.k], padded.indices[:, : self.k] = self.scores, self.indices
        return padded.scores, padded.indices

    def worst(self) -> Array:
        """The k-th best score `[n]`, -inf where there are fewer."""
        return self.scores[:, -1]

    def add(self, query: Array, document: Array, score: Array) -> None:
        there, _ = np.nonzero(self.indices >= 0)
        query = np.concatenate([query, there])
        document = np.concatenate([document, self.indices[self.indices >= 0]])
        score = np.concatenate([score, self.scores[self.indices >= 0]])
        number = ~np.isnan(score)
        query, document, score = query[number], document[number], score[number]
        order = np.lexsort((document, -score, query))
        query, document, score = query[order], document[order], score[order]
        place = np.arange(len(query)) - np.searchsorted(query, query)
        kept = place < self.k
        self.scores[query[kept], place[kept]] = score[kept]
        self.indices[query[kept], place[kept]] = document[kept]


def _packed(documents: Any, Q: Any) -> Any:
    """As they are stored; without any, in the dimension of the queries."""
    if isinstance(documents, Stored):
        return documents
    if checks.on_accelerator(documents):
        return _packed_there(documents)
    if isinstance(documents, (list, tuple)):
        names = {dtypes.matrix(f"documents[{n}]", each)[1] for n, each in enumerate(documents)}
        dim = None if documents else _dim(Q)
        return PackedEmbeddings.from_list(documents, dtype=names.pop() if len(names) == 1 else "float32", dim=dim)
    rows, _ = dtypes.matrix("documents", documents)
    checks.rank("documents", rows.shape, (3,), "[Nd, Ld, d], a list of [Ld, d] or a PackedEmbeddings")
    count, length, dim = rows.shape
    return PackedEmbeddings.from_arrays(rows.reshape(count * length, dim), np.arange(count + 1) * length)


def _dim(Q: Any) -> int | None:
    """The last dimension of queries in any form, None where there is none."""
    shape = getattr(Q[0] if isinstance(Q, (list, tuple)) and Q else Q, "shape", None)
    return shape[-1] if shape else None


def _allowed(documents: Any, filter: Any, ids: Iterable[Any] | None) -> Array | None:
    """Sorted indices of the documents that may be found, None for all."""
    allowed = None
    if filter is not None:
        allowed = np.unique(documents.indices_of(filter))
    if ids is not None:
        named = np.unique(np.array([documents.position(name) for name in identifiers.listed(ids)], np.int64))
        allowed = named if allowed is None else np.intersect1d(allowed, named, assume_unique=True)
    return allowed


def _packed_there(documents: Any) -> Any:
    from edgecolbert_kernels.device import search as there

    return there.documents_of(documents)


def _search_there(
    Q: Any, documents: Any, k: int, q_mask: Any, candidates: Sequence[Any] | None, allowed: Array | None
) -> tuple[Any, Any]:
    from edgecolbert_kernels.device import search as there

    Q, q_mask = there.queries_of(Q, q_mask, documents)
    if candidates is None:
        return there.search(Q, documents, k, q_mask, allowed)
    checks.same_count("Q", len(Q), "candidates", len(candidates))
    return there.rerank(Q, documents, k, q_mask, _candidate_lists(documents, allowed, candidates))


def _has_tensors(Q: Any) -> bool:
    return any(hasattr(each, "detach") for each in (Q if isinstance(Q, (list, tuple)) else [Q]))


def _constant(Q: Any) -> Any:
    """Without a gradient, which nothing here would use."""
    if isinstance(Q, (list, tuple)):
        return [_constant(each) for each in Q]
    return Q.detach() if hasattr(Q, "detach") else Q
