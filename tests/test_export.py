"""Documents that leave for other systems: what they find is what search finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
from cases import embeddings, ragged
from edgecolbert_kernels import PackedEmbeddings, export


@pytest.fixture
def documents():
    rows = ragged([3, 0, 17, 40, 1] * 12, 16, seed=1)
    return PackedEmbeddings.from_list(rows, [f"d{n}" for n in range(len(rows))])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_batches(documents, dtype):
    packed, found = documents.to(dtype), {}
    for ids, matrices in export.batches(packed, size=7):
        assert len(ids) <= 7
        found.update(zip(ids, matrices, strict=True))
    wanted = {name: rows for name, rows in zip(packed.ids, packed.to("float32"), strict=True) if len(rows)}
    assert found.keys() == wanted.keys()
    for name, rows in found.items():
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, wanted[name])
        torch.from_numpy(rows)


def test_qdrant(documents):
    client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
    export.to_qdrant(documents, client, "documents")
    Q = embeddings(4, 8, 16, seed=2).numpy()
    # Qdrant has no point for a document without tokens, which scores 0 here.
    scores, indices = ek.search(Q, documents, 10, filter=documents.lengths > 0)
    for query, wanted_scores, wanted in zip(Q, scores, indices, strict=True):
        points = client.query_points("documents", query=query.tolist(), limit=10).points
        assert [point.id for point in points] == wanted.tolist()
        assert [point.payload["id"] for point in points] == [documents.ids[n] for n in wanted]
        np.testing.assert_allclose([point.score for point in points], wanted_scores, atol=1e-4)


def test_fast_plaid(documents, tmp_path):
    """An approximate index: with all its clusters probed and all documents scored, the best one is ours."""
    search = pytest.importorskip("fast_plaid.search")
    matrices = [torch.from_numpy(rows) for _, part in export.batches(documents) for rows in part]
    index = search.FastPlaid(index=str(tmp_path / "plaid"), device="cpu")
    index.create(documents_embeddings=matrices)
    kept = documents[documents.lengths > 0]
    query = kept[5].astype(np.float32)
    ((best, _), *_) = index.search(queries_embeddings=torch.from_numpy(query)[None], top_k=5)[0]
    assert best == 5
