"""PyLate, patched: values and gradients are its own, its callers are reached, and it is left as it was.

Runs in an environment of PyLate's (docs/development.md)."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
import tiny_colbert
from cases import embeddings, holes, ragged
from marks import compiled

pytest.importorskip("pylate")
pytestmark = compiled

from pylate import evaluation, losses, rank, scores
from pylate.models import ColBERT
from pylate.scores import SimilarityFunction

from edgecolbert_kernels.integrations.pylate import patch_pylate, unpatch_pylate, using_pylate

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# From 1.5.1 and from 1.5 on.
needs_backends = pytest.mark.skipif(
    "backend" not in inspect.signature(scores.colbert_scores).parameters, reason="this PyLate has one backend only"
)
needs_groups = pytest.mark.skipif(not hasattr(scores, "ColBERTScores"), reason="this PyLate has no ColBERTScores")
MASKS = [None, torch.bool, torch.float32, torch.int64]


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_pylate()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> ColBERT:
    return tiny_colbert.make(tmp_path_factory.mktemp("model"), query_length=8, document_length=20, dropout=0.0)


def both(call):
    """What the host gives by itself and patched, and the calls that were answered."""
    wanted = call()
    with using_pylate() as report:
        before = sum(report.hits.values())
        found = call()
        return wanted, found, sum(report.hits.values()) - before


def negative(*shape, seed):
    """Similarities of both signs, and documents of which a token has none above 0."""
    X = embeddings(*shape, seed=seed)
    X[0] = -X[0].abs()
    return X


@pytest.mark.parametrize("dtype", MASKS, ids=str)
def test_scores(dtype):
    Q, D = embeddings(5, 7, 16, seed=1).abs(), negative(6, 9, 16, seed=2)
    q_mask, d_mask = (None, None) if dtype is None else (holes(5, 7, seed=3).to(dtype), holes(6, 9, seed=4).to(dtype))
    if d_mask is not None:
        d_mask[2] = 0
    wanted, found, hits = both(lambda: scores.colbert_scores(Q, D, q_mask, d_mask))
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(ek.colbert_scores(Q, D, q_mask, d_mask), wanted, **CLOSE)
    assert hits == 1


@needs_groups
@pytest.mark.parametrize("dtype", MASKS, ids=str)
def test_groups(dtype):
    Q, D = embeddings(5, 7, 16, seed=1).abs(), negative(6, 9, 16, seed=2)
    q_mask, d_mask = (None, None) if dtype is None else (holes(5, 7, seed=3).to(dtype), holes(6, 9, seed=4).to(dtype))
    groups = D.view(3, 2, 9, 16).transpose(0, 1), None if d_mask is None else d_mask.view(3, 2, 9).transpose(0, 1)
    wanted, found, hits = both(lambda: scores.ColBERTScores()(Q, groups[0], q_mask, groups[1]))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert hits == 3


@pytest.mark.parametrize("dtype", MASKS, ids=str)
def test_kd_scores(dtype):
    Q, D = embeddings(3, 7, 16, seed=1).abs(), negative(3, 4, 9, 16, seed=2)
    q_mask, d_mask = (
        (None, None) if dtype is None else (holes(3, 7, seed=3).to(dtype), holes(3, 4, 9, seed=4).to(dtype))
    )
    wanted, found, hits = both(lambda: scores.colbert_kd_scores(Q, D, q_mask, d_mask))
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(ek.colbert_kd_scores(Q, D, q_mask, d_mask), wanted, **CLOSE)
    assert hits == 1


@pytest.mark.parametrize("make", ["tensors", "arrays", "lists", "batch", "array"])
def test_pairwise(make):
    lengths = [3, 7, 1, 5]
    Q, D = ragged([4, 2, 6, 3], 16, seed=1), ragged(lengths, 16, seed=2)
    if make in ("batch", "array"):
        Q, D = embeddings(4, 5, 16, seed=1), negative(4, 7, 16, seed=2)
    if make in ("arrays", "array"):
        Q, D = (X.numpy() if make == "array" else [x.numpy() for x in X] for X in (Q, D))
    if make == "lists":
        Q, D = ([x.tolist() for x in X] for X in (Q, D))
    wanted, found, hits = both(lambda: scores.colbert_scores_pairwise(Q, D))
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(ek.colbert_scores_pairwise(Q, D), wanted, **CLOSE)
    assert hits == 1


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["lists", "array", "tensor"])
def test_inputs(make):
    Q, D = make(embeddings(2, 3, 8, seed=1).tolist()), make(embeddings(4, 5, 8, seed=2).tolist())
    wanted, found, _ = both(lambda: scores.colbert_scores(Q, D))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert found.dtype == wanted.dtype


def test_lists_of_unequal_lengths():
    """PyLate's `similarity` stops at these."""
    Q, D = ragged([3, 5], 16, seed=1), ragged([2, 9, 4], 16, seed=2)
    with pytest.raises((ValueError, RuntimeError)):
        scores.colbert_scores(Q, D)
    with using_pylate():
        for kind in (list, lambda X: [x.numpy() for x in X]):
            torch.testing.assert_close(scores.colbert_scores(kind(Q), kind(D)), ek.maxsim(Q, D), **CLOSE)


def test_lists_with_masks():
    Q, D = embeddings(2, 3, 8, seed=1), embeddings(4, 5, 8, seed=2)
    q_mask, d_mask = holes(2, 3, seed=3), holes(4, 5, seed=4)
    arrays = [x.numpy() for x in Q], [x.numpy() for x in D]
    wanted, found, hits = both(lambda: scores.colbert_scores(*arrays, q_mask, d_mask))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert hits == 1


def test_mask_mode():
    Q, D = torch.ones(1, 3, 4), -torch.ones(1, 5, 4)
    mask = torch.tensor([[True, True, False, False, True]])
    with using_pylate():
        assert scores.colbert_scores(Q, D, None, mask).item() == 0
        assert scores.colbert_kd_scores(Q, D[None], None, mask[None]).item() == 0
    with using_pylate(mask_mode="exclude"):
        assert scores.colbert_scores(Q, D, None, mask).item() == -12
        assert scores.colbert_kd_scores(Q, D[None], None, mask[None]).item() == -12
    with pytest.raises(ValueError, match="mask_mode"):
        patch_pylate(mask_mode="none")


@needs_backends
def test_what_stays_with_the_host(monkeypatch):
    Q, D = embeddings(2, 3, 8, seed=1), embeddings(4, 5, 8, seed=2)
    weights = torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    calls = {
        "weights": lambda: scores.colbert_scores(Q, D, weights),
        "float64": lambda: scores.colbert_scores(Q.double(), D.double()),
        "its torch": lambda: scores.colbert_scores(Q, D, backend="torch"),
    }
    for name, call in calls.items():
        wanted, found, hits = both(call)
        assert torch.equal(found, wanted), name
        assert not hits, name
    with using_pylate():
        with pytest.raises(RuntimeError, match="CUDA"):
            scores.colbert_scores(Q, D, backend="lik")
        with pytest.raises(ValueError, match="backend"):
            scores.colbert_scores(Q, D, backend="nope")
        with pytest.raises(RuntimeError, match="einsum"):
            scores.colbert_scores(Q, D[..., :4])
    monkeypatch.setenv("PYLATE_SCORES_BACKEND", "torch")
    assert both(lambda: scores.colbert_scores(Q, D))[2] == 0
    assert both(lambda: rank.rerank([[1, 2]], [Q[0]], [[D[0], D[1]]]))[2] == 0


def test_half_precision_is_scored_in_float32():
    Q, D = embeddings(2, 32, 48, seed=1), embeddings(3, 60, 48, seed=2)
    with using_pylate():
        found = scores.colbert_scores(Q.bfloat16(), D.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scores.colbert_scores(Q.bfloat16().float(), D.bfloat16().float()), **CLOSE)


DOCUMENTS = [[4, 9, 2], [7, 7, 7, 7], [1]]


@pytest.mark.parametrize("kind", ["arrays", "tensors", "mixed", "half", "padded"])
def test_rerank(kind):
    """Similarities are made positive: PyLate pads with zeros, which beat negative ones."""
    dtype = torch.float16 if kind == "half" else torch.float32
    Q = [embeddings(5, 16, seed=n).abs().to(dtype) for n in range(3)]
    D = [[x.abs().to(dtype) for x in ragged(lengths, 16, seed=n)] for n, lengths in enumerate(DOCUMENTS)]
    ids = [[f"{n}.{k}" for k in range(len(lengths))] for n, lengths in enumerate(DOCUMENTS)]
    if kind in ("arrays", "mixed"):
        D = [[x.numpy() for x in each] for each in D]
    if kind == "arrays":
        Q = [x.numpy() for x in Q]
    if kind == "padded":
        Q, D, ids = torch.stack(Q), [torch.stack(D[1])] * 3, [ids[1]] * 3
    wanted, found, hits = both(lambda: rank.rerank(documents_ids=ids, queries_embeddings=Q, documents_embeddings=D))
    assert hits == 1
    assert [[row["id"] for row in each] for each in found] == [[row["id"] for row in each] for each in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert isinstance(ours[0]["score"], float)
        close = {"rel": 2e-3 if kind == "half" else 1e-5}
        assert [row["score"] for row in ours] == pytest.approx([row["score"] for row in theirs], **close)


def test_rerank_without_padding():
    query, documents = np.ones((3, 8), np.float32), [-np.ones((2, 8), np.float32), -2 * np.ones((7, 8), np.float32)]
    wanted, found, _ = both(lambda: rank.rerank([["a", "b"]], [query], [documents], device="cpu"))
    assert [row["score"] for row in wanted[0]] == [0, -48]
    assert [(row["id"], row["score"]) for row in found[0]] == [("a", -24), ("b", -48)]


def test_rerank_of_nothing():
    with using_pylate():
        assert rank.rerank([[]], [np.ones((3, 8), np.float32)], [[]]) == [[]]
        assert rank.rerank([], [], []) == []


# Losses.


def features(encoder, count=6, documents=2):
    queries = encoder.tokenize(tiny_colbert.texts(count, 6, seed=1), is_query=True)
    each = (tiny_colbert.texts(count, 18, seed=2 + n) for n in range(documents))
    return [dict(queries), *(dict(encoder.tokenize(lines, is_query=False, pad=True)) for lines in each)]


def step(loss, inputs, labels=None):
    loss.zero_grad()
    value = loss([dict(each) for each in inputs], labels)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in loss.parameters() if p.grad is not None)]


def make(name, encoder, **options):
    """The loss, made now, its inputs and labels."""
    if name == "CachedContrastive":
        options = {"mini_batch_size": 4, **options}
    inputs, labels = features(encoder), None
    if name == "Distillation":
        documents = encoder.tokenize(tiny_colbert.texts(24, 18, seed=2), is_query=False, pad=True)
        inputs = [inputs[0], dict(documents)]
        labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    return getattr(losses, name)(encoder, **options), inputs, labels


NAMES = ["Contrastive", "CachedContrastive", "Distillation"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_losses(encoder, name, when):
    """With their default arguments; made before the patch or after it."""
    loss, inputs, labels = make(name, encoder)
    wanted = step(loss, inputs, labels)
    with using_pylate(average_cached_gradients=False) as report:
        before = sum(report.hits.values())
        if when == "after":
            loss, _, _ = make(name, encoder)
        found = step(loss, inputs, labels)
        assert sum(report.hits.values()) > before
    assert len(found) == len(wanted) > 1
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", [True, False], ids=["mean", "sum"])
def test_cached_gradients_are_those_of_the_whole_batch(encoder, average):
    inputs = features(encoder)
    wanted = step(losses.Contrastive(encoder, size_average=average), inputs)
    loss = losses.CachedContrastive(encoder, mini_batch_size=4, size_average=average)
    theirs = step(loss, inputs)
    with using_pylate():
        found = step(loss, inputs)
    with using_pylate(average_cached_gradients=False):
        unchanged = step(loss, inputs)
    factor = 6 if average else 1
    for n in range(len(wanted)):
        torch.testing.assert_close(found[n], wanted[n], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unchanged[n], theirs[n], rtol=1e-4, atol=1e-5)
        if n:
            torch.testing.assert_close(theirs[n], factor * wanted[n], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_losses_pickle(encoder, name):
    """Made before, while or after; loaded before, while or after; without a word of us in them."""
    before, inputs, labels = make(name, encoder)
    wanted = step(before, inputs, labels)[0]
    with using_pylate():
        during, _, _ = make(name, encoder)
        pickles = []
        for loss in (before, during):
            buffer = io.BytesIO()
            torch.save(loss, buffer)
            pickles.append(buffer.getvalue())
            assert b"edgecolbert" not in buffer.getvalue()
            copy.deepcopy(loss)
        pickle.dumps(during.score_metric)
        during = [torch.load(io.BytesIO(data), weights_only=False) for data in pickles]
        values = [step(loss, inputs, labels)[0] for loss in during]
    values += [step(loss, inputs, labels)[0] for loss in during]
    values += [step(torch.load(io.BytesIO(data), weights_only=False), inputs, labels)[0] for data in pickles]
    for value in values:
        torch.testing.assert_close(value, wanted, **CLOSE)


@needs_groups
def test_a_compiled_training_step():
    """fullgraph: the patched scores break no graph. Compiled while patched, before and after: always the same values."""

    def loss(Q, D, q_mask, d_mask):
        scored = scores.ColBERTScores()(Q, D, q_mask, d_mask)
        return torch.nn.functional.cross_entropy(scored, 2 * torch.arange(len(Q)))

    inputs = embeddings(4, 6, 16, seed=1), embeddings(4, 2, 9, 16, seed=2)
    masks = holes(4, 6, seed=3), holes(4, 2, 9, seed=4)

    def run(function):
        Q, D = (X.clone().requires_grad_() for X in inputs)
        value = function(Q, D, *masks)
        value.backward()
        return value.detach(), Q.grad, D.grad

    wanted = run(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with using_pylate():
        inside = torch.compile(loss, fullgraph=True, backend="aot_eager")
        graphs = [run(inside), run(compiled)]
    graphs += [run(inside), run(compiled)]
    for found in graphs:
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.compiler.reset()


def test_the_kernels_are_in_the_compiled_graph():
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with using_pylate():
        torch.compile(scores.colbert_scores, fullgraph=True, backend=look)(torch.ones(2, 3, 8), torch.ones(4, 5, 8))
    assert any("edgecolbert" in each for each in seen)
    torch.compiler.reset()


def test_every_caller(encoder):
    """What the requirement lists: similarity, evaluators; the losses, rerank and scores are above."""
    texts = tiny_colbert.texts(6, 6, seed=1)
    Q, D = encoder.encode(texts, is_query=True), encoder.encode(texts, is_query=False)
    same = [D[0]] * 3
    similar, pairs = (getattr(SimilarityFunction, f"to_similarity_{each}")("MaxSim") for each in ("fn", "pairwise_fn"))
    triplets = evaluation.ColBERTTripletEvaluator(anchors=texts, positives=texts, negatives=texts[::-1])
    distillation = evaluation.ColBERTDistillationEvaluator(
        queries=texts[:2], documents=[texts[:3], texts[3:]], scores=[[0.9, 0.5, 0.1]] * 2
    )
    calls = {
        "similarity": lambda: encoder.similarity(Q, same),
        "similarity_pairwise": lambda: encoder.similarity_pairwise(Q, D),
        "SimilarityFunction": lambda: similar(Q, same),
        "SimilarityFunction, pairs": lambda: pairs(Q, D),
        "triplet evaluator": lambda: list(triplets(encoder).values()),
        "distillation evaluator": lambda: list(distillation(encoder).values()),
    }
    for name, call in calls.items():
        wanted, found, hits = both(call)
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), **CLOSE, msg=name)
        assert hits > 0, name


def test_restored_exactly():
    functions = [
        scores.colbert_scores,
        scores.colbert_kd_scores,
        scores.colbert_scores_pairwise,
        rank.rerank,
        losses.CachedContrastive.calculate_loss_and_cache_gradients,
    ]
    state = [(f.__code__, f.__defaults__, dict(f.__dict__), inspect.signature(f)) for f in functions]
    names = dict(vars(scores)), dict(vars(rank)), dict(vars(losses.CachedContrastive))
    for _ in range(2):
        report = patch_pylate()
        assert patch_pylate() is report
        assert not report.missed
        assert len(report.reached) == 5
        assert all(f.__code__ is not code for f, (code, *_) in zip(functions, state, strict=True))
        assert [inspect.signature(f) for f in functions] == [each[-1] for each in state]
        unpatch_pylate()
        unpatch_pylate()
        assert all(f.__code__ is code for f, (code, *_) in zip(functions, state, strict=True))
        assert [(f.__code__, f.__defaults__, dict(f.__dict__), inspect.signature(f)) for f in functions] == state
        assert (dict(vars(scores)), dict(vars(rank)), dict(vars(losses.CachedContrastive))) == names


@needs_backends
@pytest.mark.parametrize("name", ["colbert_scores", "colbert_kd_scores", "colbert_scores_pairwise"])
def test_signatures(name):
    ours, theirs = (inspect.signature(getattr(where, name)).parameters for where in (ek, scores))
    assert {n: p.default for n, p in ours.items() if n != "mask_mode"} == {n: p.default for n, p in theirs.items()}
