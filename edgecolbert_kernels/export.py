"""Ways out, for collections that one machine cannot hold: vector databases with multivectors, and PLAID.

Nothing here is a server. Documents leave as lists of float32 matrices, in bounded memory; docs/search.md says when to go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgecolbert_kernels import checks
from edgecolbert_kernels.packed import PackedEmbeddings

Array = np.ndarray
BATCH = 256
# A server of Qdrant takes requests of up to 32 MiB, as it comes; the longest float32 in JSON has 23 characters and a comma.
REQUEST_BYTES = 30 << 20
VALUE_BYTES = 24
POINT_BYTES = 200  # braces and names around the vectors of a point


def batches(documents: PackedEmbeddings, size: int = BATCH) -> Iterator[tuple[list[Any], list[Array]]]:
    """Ids (positions where there are none) and float32 `[L, d]` matrices, `size` documents a time.

    The hand-over to PyLate and fast-plaid: `index.add_documents(documents_ids=ids, documents_embeddings=matrices)`, or
    `[torch.from_numpy(matrix) for matrix in matrices]` for `fast_plaid.search.FastPlaid.create`. Documents without
    tokens are left out: neither of them takes any.

    Raises:
        TypeError, ValueError: `size` is not an integer of at least 1.
    """
    checks.at_least("size", size, 1)
    for start in range(0, len(documents), size):
        part = documents[start : start + size]
        ids = part.ids or list(range(start, start + len(part)))
        kept = [(name, rows) for name, rows in zip(ids, part.to("float32"), strict=True) if len(rows)]
        if kept:
            yield [name for name, _ in kept], [rows.copy() for _, rows in kept]


def to_qdrant(documents: PackedEmbeddings, client: Any, collection: str) -> None:
    """Create a collection with a multivector that Qdrant compares by MaxSim, and fill it, in requests below 32 MiB.

    A document that alone is longer, some 27,000 tokens at d = 48, is sent alone, and the server says whether it takes it.

    Args:
        client: a `qdrant_client.QdrantClient`, local or of a server.
        collection: a name that is not taken. A document's position in `documents` is the point's id, and its id, where
            it has one, stands in the payload as "id". Query with `client.query_points(collection, query=[[...], ...])`.
    """
    from qdrant_client import models

    client.create_collection(
        collection,
        vectors_config=models.VectorParams(
            size=documents.dim,
            distance=models.Distance.DOT,
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            # Token vectors by the hundred a document: a graph over them costs more than it saves in a reranker.
            hnsw_config=models.HnswConfigDiff(m=0),
        ),
    )
    for start, stop in _requests(documents):
        part = documents[start:stop]
        ids = part.ids
        points = [
            models.PointStruct(id=start + n, vector=rows.tolist(), payload={} if ids is None else {"id": ids[n]})
            for n, rows in enumerate(part.to("float32"))
            if len(rows)
        ]
        if points:
            client.upsert(collection, points)


def _requests(documents: PackedEmbeddings) -> Iterator[tuple[int, int]]:
    """Spans of documents whose points fit into a request, at most BATCH of them, whatever digits their values have."""
    sizes = documents.lengths * (documents.dim * VALUE_BYTES + 2) + POINT_BYTES
    if documents.ids is not None:
        # A character is four bytes of UTF-8 at most, or six where it is escaped.
        sizes = sizes + [6 * len(str(name)) for name in documents.ids]
    start, total = 0, 0
    for stop, size in enumerate(sizes.tolist()):
        if stop > start and (total + size > REQUEST_BYTES or stop - start == BATCH):
            yield start, stop
            start, total = stop, 0
        total += size
    if start < len(documents):
        yield start, len(documents)
