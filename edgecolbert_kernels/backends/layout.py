"""The shapes that a call answers with, the same for every backend and for the fake implementation.

Q is `[Lq, d]` (one query, without an axis for it), `[Nq, Lq, d]`, or `[Tq, d]` with `cu_q`; D is `[Nd, Ld, d]`,
`[Nq, K, Ld, d]` (a query's own documents), or `[Td, d]` with `cu_d`; `query_index` selects the layout of chosen pairs.
Only `.shape` and `.ndim` are read, so arrays, tensors and fake tensors all do.
"""

from __future__ import annotations

import math
from typing import Any

from edgecolbert_kernels.backends import native

Shape = tuple[int, ...]


def which(D: Any, query_index: Any) -> int:
    if query_index is not None:
        return native.INDEXED
    return native.OWN if D.ndim == 4 else native.EVERY


def scores_shape(Q: Any, D: Any, cu_q: Any, cu_d: Any, query_index: Any) -> Shape:
    if query_index is not None:
        return (query_index.shape[0],)
    queries, documents = Q.shape, D.shape
    per_query = documents[1 if len(documents) == 4 else 0] if cu_d is None else cu_d.shape[0] - 1
    if cu_q is not None:
        return (cu_q.shape[0] - 1, per_query)
    return (queries[0], per_query) if len(queries) == 3 else (per_query,)


def scores_shape_of_lists(Q: Any, D: Any) -> Shape:
    """Where one or both are lists of matrices."""
    return (len(D),) if not isinstance(Q, list) and len(Q.shape) == 2 else (len(Q), len(D))


def argmax_length(Q: Any, scores: Shape, cu_q: Any) -> int:
    """Tokens of every query against every one of its documents, flat, queries outermost."""
    if cu_q is not None:
        return Q.shape[0] * scores[-1]
    return math.prod(scores) * Q.shape[-2]


def argmax_is_int16(D: Any, cu_d: Any) -> bool:
    return cu_d is None and D.shape[-2] <= native.LONGEST_INT16
