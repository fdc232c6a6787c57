"""sentence-transformers 6, patched, and `maxsim_st`: its values with masks of every kind, its callers, left as it was."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

import edgecolbert_kernels as ek
from cases import embeddings, holes, ragged
from marks import compiled

similarity = pytest.importorskip("sentence_transformers.util.similarity")
if not hasattr(similarity, "maxsim"):
    pytest.skip("sentence-transformers before 6", allow_module_level=True)
pytestmark = compiled

from sentence_transformers.multi_vector_encoder import losses, scoring

from edgecolbert_kernels.integrations.sentence_transformers import (
    patch_sentence_transformers,
    unpatch_sentence_transformers,
    using_sentence_transformers,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_sentence_transformers()


def both(call):
    wanted = call()
    with using_sentence_transformers() as report:
        before = sum(report.hits.values())
        found = call()
        return wanted, found, sum(report.hits.values()) - before


def inputs(kind, documents=5):
    """Queries and documents of both signs; the first document has no similarity above 0."""
    if kind.startswith("list"):
        Q, D = ragged([4, 7, 1], 16, seed=1), ragged([9, 3, 1, 6, 2][:documents], 16, seed=2)
        Q, D[0] = [q.abs() for q in Q], -D[0].abs()
        return ([q.numpy() for q in Q], [d.numpy() for d in D]) if kind == "list of arrays" else (Q, D)
    Q, D = embeddings(3, 7, 16, seed=1).abs(), embeddings(documents, 9, 16, seed=2)
    D[0] = -D[0].abs()
    Q[1, 5:], D[2, 4:] = 0, 0
    return (Q.numpy(), D.numpy()) if kind == "array" else (Q, D)


KINDS = ["tensor", "array", "list", "list of arrays"]
MASKS = ["none", "bool", "float", "empty document", "list"]


def masks(kind, Q, D):
    if kind == "none":
        return None, None
    longest = [max(len(x) for x in X) for X in (Q, D)]
    q_mask, d_mask = holes(len(Q), longest[0], seed=3), holes(len(D), longest[1], seed=4)
    q_mask[:, 0] = d_mask[:, 0] = True
    if kind == "empty document":
        d_mask[1] = False
    if kind == "list":
        return [m[: len(q)] for m, q in zip(q_mask, Q, strict=True)], [
            m[: len(d)] for m, d in zip(d_mask, D, strict=True)
        ]
    for mask, X in ((q_mask, Q), (d_mask, D)):
        for row, x in zip(mask, X, strict=True):
            row[len(x) :] = False
    return (q_mask.float(), d_mask.float()) if kind == "float" else (q_mask, d_mask)


@pytest.mark.parametrize(
    "options", [{}, {"chunk_elements": 50}, {"length_normalize": True}, {"device": "cpu"}], ids=str
)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_maxsim(kind, mask, options):
    Q, D = inputs(kind)
    q_mask, d_mask = masks(mask, Q, D)
    wanted, found, hits = both(lambda: similarity.maxsim(Q, D, q_mask, d_mask, **options))
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(ek.maxsim_st(Q, D, q_mask, d_mask, **options), wanted, **CLOSE)
    assert hits > 0
    Q, D = inputs(kind, 3)
    q_mask, d_mask = masks(mask, Q, D)
    wanted, found, hits = both(lambda: similarity.maxsim_pairwise(Q, D, q_mask, d_mask, **options))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert hits > 0


def test_one_query_and_nothing():
    Q, D = inputs("tensor")
    wanted, found, _ = both(lambda: similarity.maxsim(Q[0], D[1]))
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(ek.maxsim_st(Q[0], D[1]), wanted, **CLOSE)
    for a, b in (([], D), (Q, []), ([], [])):
        wanted, found, _ = both(lambda a=a, b=b: similarity.maxsim(a, b))
        assert found.shape == wanted.shape == ek.maxsim_st(a, b).shape
    empty = [D[1], D[1][:0]]
    wanted, found, _ = both(lambda: similarity.maxsim(Q, empty))
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(ek.maxsim_st(Q, empty), wanted, **CLOSE)


def test_wrong_masks():
    Q, D = inputs("tensor")
    for bad in ({"a_mask": torch.ones(len(Q), 99)}, {"b_mask": torch.ones(len(D), 2)}):
        (name,) = bad
        with using_sentence_transformers(), pytest.raises(ValueError, match=name):
            similarity.maxsim(Q, D, **bad)
        with pytest.raises(ValueError, match=name):
            ek.maxsim_st(Q, D, **bad)


def test_a_document_of_zeros():
    """It has no token."""
    Q, D = inputs("tensor")
    D[1] = 0
    wanted, found, _ = both(lambda: similarity.maxsim(Q, D))
    assert (wanted[:, 1] == -1e9).all()
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(ek.maxsim_st(Q, D), wanted, **CLOSE)


def test_query_weights_stay_with_the_host():
    """A query mask of other values than 0 and 1 is a weight there."""
    Q, D = inputs("tensor")
    weights = torch.rand(3, 7, generator=torch.Generator().manual_seed(1))
    wanted, found, hits = both(lambda: similarity.maxsim(Q, D, weights))
    assert torch.equal(found, wanted)
    assert not hits
    with pytest.raises(ValueError, match="other than 0 and 1"):
        ek.maxsim_st(Q, D, weights)
    wanted, found, hits = both(lambda: similarity.maxsim(Q.double(), D.double()))
    assert torch.equal(found, wanted)
    assert not hits


class Passing(torch.nn.Module):
    """Embeddings for features; what MultiVectorEncoder is to a loss."""

    def forward(self, features, task=None):
        return features


def feature(length, seed):
    return {"token_embeddings": embeddings(4, length, 8, seed=seed), "attention_mask": holes(4, length, seed=seed)}


LOSSES = {
    "MultiVectorMultipleNegativesRankingLoss": {},
    "CachedMultiVectorMultipleNegativesRankingLoss": {"mini_batch_size": 2},
    "MultiVectorDistillKLDivLoss": {},
    "MultiVectorMarginMSELoss": {},
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    """Values and gradients, of a loss made before the patch; it pickles in and out of it."""
    loss = getattr(losses, name)(model=Passing(), **LOSSES[name])
    labels = torch.rand(
        4, 2 if name == "MultiVectorDistillKLDivLoss" else 1, generator=torch.Generator().manual_seed(1)
    )

    def step(loss=loss):
        batch = [feature(length, seed) for seed, length in enumerate((6, 10, 14))]
        for each in batch:
            each["token_embeddings"].requires_grad_()
        value = loss(batch, labels)
        value.backward()
        return value.detach(), *(each["token_embeddings"].grad for each in batch)

    wanted, found, hits = both(step)
    assert hits > 0
    with using_sentence_transformers():
        again = step(pickle.loads(pickle.dumps(loss)))
    for a, b, c in zip(wanted, found, again, strict=True):
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-5)


def test_a_compiled_training_step():
    def loss(Q, D, q_mask, d_mask):
        return scoring.colbert_scores(Q, D, q_mask, d_mask).logsumexp(1).sum()

    Q, D = embeddings(4, 6, 16, seed=1), embeddings(4, 2, 9, 16, seed=2)
    q_mask, d_mask = holes(4, 6, seed=3), holes(4, 2, 9, seed=4)
    d_mask[..., 0] = True

    def run(function):
        leaves = [X.clone().requires_grad_() for X in (Q, D)]
        value = function(*leaves, q_mask, d_mask)
        value.backward()
        return value.detach(), *(X.grad for X in leaves)

    wanted = run(loss)
    with using_sentence_transformers():
        found = run(torch.compile(loss, backend="aot_eager"))
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, **CLOSE)
    torch.compiler.reset()


def test_restored_exactly():
    names = ("_maxsim_score_documents", "_maxsim_score_pairs", "maxsim")
    before = dict(vars(similarity))
    codes = [getattr(similarity, name).__code__ for name in names]
    report = patch_sentence_transformers()
    assert report is patch_sentence_transformers()
    assert len(report.reached) == 3
    assert not report.missed
    unpatch_sentence_transformers()
    unpatch_sentence_transformers()
    assert dict(vars(similarity)) == before
    assert all(getattr(similarity, name).__code__ is code for name, code in zip(names, codes, strict=True))


def test_signature():
    ours, theirs = (inspect.signature(f).parameters for f in (ek.maxsim_st, similarity.maxsim))
    assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}
