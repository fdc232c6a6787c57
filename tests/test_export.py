"""Documents that leave for other systems: what they find is what search finds."""

from __future__ import annotations

import itertools

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


def test_batches_of_no_size(documents):
    for bad, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="size is"):
            list(export.batches(documents, bad))


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


class Server:
    """Takes what a client sends as JSON."""

    def __init__(self):
        self.sizes, self.points = [], []

    def create_collection(self, name, **options):
        pass

    def upsert(self, name, points):
        models = pytest.importorskip("qdrant_client").models
        self.sizes.append(len(models.PointsList(points=points).model_dump_json(exclude_unset=True).encode()))
        self.points += points


@pytest.mark.parametrize("limit", [1 << 18, 1 << 16])
def test_requests_to_qdrant_have_a_size(monkeypatch, limit):
    """Values with the most digits, ids that JSON escapes; a document that alone is longer, as with 1 << 16, goes alone."""
    pytest.importorskip("qdrant_client")
    monkeypatch.setattr(export, "REQUEST_BYTES", limit)
    rows = [np.full((200 if n % 3 else 2, 16), -1.1754943508222875e-38, np.float32) for n in range(600)]
    packed = PackedEmbeddings.from_list(rows, ["\x01" * 50 + str(n) for n in range(600)], dtype="float32")
    server = Server()
    export.to_qdrant(packed, server, "documents")
    assert [point.id for point in server.points] == list(range(600))
    assert [point.payload["id"] for point in server.points] == packed.ids
    too_large = [size for size in server.sizes if size > limit]
    assert len(too_large) == (400 if limit < max(map(len, rows)) * 16 * 23 else 0)


def test_requests_to_qdrant_are_filled():
    """Documents of 300 tokens, of which 256 were 80 MB."""
    packed = PackedEmbeddings.from_list([np.ones((300, 48), np.float16)] * 600)
    spans = list(export._requests(packed))
    assert spans[0][0] == 0 and spans[-1][1] == 600
    assert all(b == c for (_, b), (c, _) in itertools.pairwise(spans))
    assert [stop - start for start, stop in spans[:-1]] == [spans[0][1]] * (len(spans) - 1) and 85 < spans[0][1] < 97


def noisy(rows, seed):
    """Unit vectors near those of a document."""
    found = rows.astype(np.float32) + 0.15 * np.random.default_rng(seed).standard_normal(rows.shape, np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture
def queries(documents):
    return [noisy(documents[n][:12], n) for n in (2, 3, 12, 58)]


# Approximate indexes: with every cluster probed and every document scored, what is left is the rounding to 8 bits.
ALL = {"n_ivf_probe": 64, "n_full_scores": 4096}


def test_fast_plaid(documents, queries, tmp_path):
    fast_plaid = pytest.importorskip("fast_plaid.search", reason="fast-plaid is not installed")
    ids, matrices = [], []
    for some, part in export.batches(documents, 7):
        ids += some
        matrices += [torch.from_numpy(rows) for rows in part]
    index = fast_plaid.FastPlaid(index=str(tmp_path / "plaid"), device="cpu")
    index.create(documents_embeddings=matrices, nbits=8, use_triton_kmeans=False)
    scores, indices = ek.search(queries, documents, 5)
    for query, wanted_scores, wanted in zip(queries, scores, indices, strict=True):
        (found,) = index.search(torch.from_numpy(query)[None], top_k=20, show_progress=False, **ALL)
        assert ids[found[0][0]] == documents.ids[wanted[0]]
        assert found[0][1] == pytest.approx(wanted_scores[0], rel=0.02)
        # An exact order of what was found is the exact order of all.
        candidates = [documents.position(ids[n]) for n, _ in found]
        assert ek.search(query, documents, 5, candidates=[candidates])[1].tolist() == wanted.tolist()


def test_plaid_through_pylate(documents, queries, tmp_path):
    pytest.importorskip("fast_plaid", reason="fast-plaid is not installed")
    indexes = pytest.importorskip("pylate.indexes", reason="PyLate is not installed")
    index = indexes.PLAID(
        index_folder=str(tmp_path), index_name="documents", nbits=8, device="cpu", use_triton=False, show_progress=False, **ALL
    )  # fmt: skip
    for ids, matrices in export.batches(documents, 30):
        index.add_documents(documents_ids=ids, documents_embeddings=matrices)
    _, wanted = ek.search(queries, documents, 5)
    results = index(queries_embeddings=[torch.from_numpy(query) for query in queries], k=20)
    assert [result[0]["id"] for result in results] == [documents.ids[best] for best, *_ in wanted]
    candidates = [[documents.position(hit["id"]) for hit in result] for result in results]
    assert ek.search(queries, documents, 5, candidates=candidates)[1].tolist() == wanted.tolist()
