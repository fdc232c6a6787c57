"""The modules: PyLate's losses by name, argument, value and gradient, and better where PyLate's are wrong."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import edgecolbert_kernels as ek
import tiny_colbert
from cases import embeddings, holes
from edgecolbert_kernels import modules
from encoders import Encoder, gradients, texts
from ranks import Ranks

SKIPLIST = [3, 7, 11]


class Model(Encoder):
    """What PyLate's ColBERT is to a loss."""

    skiplist = SKIPLIST
    do_query_expansion = False

    def forward(self, features):
        features["token_embeddings"] = 3 * super().forward(features["input_ids"], features["attention_mask"])[0]
        return features


def model(**options):
    torch.manual_seed(0)
    return Model(**options).double()


def features(count=6, *, documents=2, seed=1):
    """Queries, positives and negatives, padded to lengths of their own."""
    return [texts(count, 4, seed=seed), *(texts(count, 7 + n, seed=seed + 1 + n) for n in range(documents))]


def run(loss, inputs, *labels):
    loss.zero_grad()
    torch.manual_seed(5)
    value = loss(inputs, *labels)
    value.backward()
    return value.detach(), gradients(loss)


def check(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    for ours, wanted in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, wanted, **tolerance)


def plain_scores(Q, D, queries_mask=None, documents_mask=None):
    """`[Nq, Nd * K]` of documents `[Nd, K, Ld, d]`, masked similarities 0, as PyLate's `ColBERTScores`."""
    similarity = torch.einsum("qid,nkjd->qnkij", Q, D) * documents_mask[None, :, :, None]
    best = similarity.amax(-1)
    if queries_mask is not None:
        best = best * queries_mask[:, None, None]
    return best.sum(-1).flatten(1)


def plain_kd_scores(Q, D, queries_mask=None, documents_mask=None):
    similarity = torch.einsum("qid,qkjd->qkij", Q, D) * documents_mask[:, :, None]
    return (similarity.amax(-1) * queries_mask[:, None]).sum(-1)


def plain(model, inputs, *, size_average=True, temperature=1.0, expansion=False):
    """The contrastive loss, written out."""
    tokens, masks = [], []
    for number, each in enumerate(inputs):
        out = nn.functional.normalize(model(dict(each))["token_embeddings"], dim=-1)
        mask = each["attention_mask"].bool()
        if number:
            for token in SKIPLIST:
                mask = mask & (each["input_ids"] != token)
        tokens.append(out)
        masks.append(torch.ones_like(mask) if expansion and not number else mask)
    longest = max(len(mask[0]) for mask in masks[1:])
    D = torch.stack([nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in tokens[1:]], 1)
    d_mask = torch.stack([nn.functional.pad(mask, (0, longest - mask.shape[1])) for mask in masks[1:]], 1)
    scores = plain_scores(tokens[0], D, masks[0], d_mask) / temperature
    target = torch.arange(len(D)) * D.shape[1]
    return nn.functional.cross_entropy(scores, target, reduction="mean" if size_average else "sum")


@pytest.mark.parametrize("metric", [None, plain_scores], ids=["fused", "score_metric"])
@pytest.mark.parametrize("expansion", [False, True], ids=["", "expansion"])
@pytest.mark.parametrize("size_average", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("documents", [1, 3])
def test_contrastive(documents, size_average, expansion, metric):
    encoder = model(dropout=0.2)
    encoder.do_query_expansion = expansion
    inputs = features(documents=documents)
    torch.manual_seed(5)
    value = plain(encoder, inputs, size_average=size_average, temperature=0.3, expansion=expansion)
    value.backward()
    expected = value.detach(), gradients(encoder)
    options = {"size_average": size_average, "temperature": 0.3}
    check(run(modules.Contrastive(encoder, metric, **options), inputs), expected)
    check(run(modules.Contrastive(encoder, metric, 2, **options), inputs), expected)
    check(run(modules.CachedContrastive(encoder, metric, len(inputs[0]["input_ids"]), **options), inputs), expected)


@pytest.mark.parametrize("size", [1, 2, 5, 50])
def test_cached_has_the_gradients_of_contrastive(size):
    encoder = model(dropout=0.0)
    inputs = features()
    check(
        run(modules.CachedContrastive(encoder, mini_batch_size=size), inputs), run(modules.Contrastive(encoder), inputs)
    )


def test_inputs_stay_as_they_are():
    inputs = features()
    for loss in (modules.Contrastive(model()), modules.CachedContrastive(model(), mini_batch_size=2)):
        run(loss, inputs)
        assert all(set(each) == {"input_ids", "attention_mask"} for each in inputs)


def test_mask_modes():
    """Where similarities are negative, a masked token that counts as 0 wins."""
    encoder = model(dropout=0.0)
    inputs = features()
    values = [run(modules.Contrastive(encoder, mask_mode=mode), inputs)[0] for mode in ("zero", "exclude")]
    assert values[0] != values[1]
    with pytest.raises(ValueError, match="mask_mode"):
        modules.Contrastive(encoder, mask_mode="none")


def test_evaluation():
    encoder = model().eval()
    with torch.no_grad():
        values = [
            loss(features()) for loss in (modules.Contrastive(encoder), modules.CachedContrastive(encoder, None, 2))
        ]
    torch.testing.assert_close(*values)
    assert not values[1].requires_grad


def test_a_wrapped_model():
    encoder = model(dropout=0.0)
    wrapped = SimpleNamespace(module=encoder)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = encoder

        def forward(self, batch):
            return wrapped.module(batch)

    check(run(modules.Contrastive(Wrapper()), features()), run(modules.Contrastive(encoder), features()))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size_average", [True, False], ids=["mean", "sum"])
def test_distillation(size_average, normalize):
    encoder = model(dropout=0.2)
    inputs = [texts(4, 5, seed=1), texts(12, 9, seed=2)]
    teacher = torch.randn(4, 3, dtype=torch.float64)
    options = {"size_average": size_average, "normalize_scores": normalize}
    fused, plain = (
        run(modules.Distillation(encoder, metric, **options), inputs, teacher) for metric in (None, plain_kd_scores)
    )
    check(fused, plain)
    assert fused[0] > 0


def test_errors():
    with pytest.raises(ValueError, match="no documents"):
        modules.Contrastive(model())(features(documents=0))
    with pytest.raises(ValueError, match="rows"):
        modules.Contrastive(model())([texts(3, 4, seed=1), texts(4, 4, seed=2)])
    with pytest.raises(ValueError, match=r"\[4, 5\] rows"):
        modules.Contrastive(model())([texts(4, 4, seed=1), texts(4, 4, seed=2), texts(5, 4, seed=2)])
    with pytest.raises(ValueError, match="mini_batch_size is 0"):
        modules.CachedContrastive(model(), mini_batch_size=0)
    with pytest.raises(ValueError, match="temperature is 0"):
        modules.Contrastive(model(), temperature=0)
    with pytest.raises(TypeError, match="Linear without a skiplist"):
        modules.Contrastive(torch.nn.Linear(1, 1))(features())
    distillation = modules.Distillation(model())
    with pytest.raises(ValueError, match=r"documents .*each of 2 queries"):
        distillation([texts(2, 4, seed=1), texts(5, 4, seed=2)], torch.ones(2, 2))
    with pytest.raises(ValueError, match="3 batches of texts"):
        distillation([texts(2, 4, seed=n) for n in range(3)], torch.ones(2, 2))


def test_scorer():
    Q, D = embeddings(3, 4, 8, seed=1), embeddings(5, 6, 8, seed=2) * 2
    q_mask, d_mask = holes(3, 4, seed=3), holes(5, 6, seed=4)
    for options in ({}, {"normalize": True}, {"mask_mode": "zero"}, {"precision": "fast"}):
        scorer = ek.MaxSimScorer(**options)
        assert torch.equal(scorer(Q, D, q_mask, d_mask), ek.maxsim(Q, D, q_mask, d_mask, **options))
    assert "normalize=False, mask_mode='exclude', precision='exact'" in repr(ek.MaxSimScorer())
    assert not list(scorer.parameters())
    with pytest.raises(ValueError, match="mask_mode"):
        ek.MaxSimScorer(mask_mode="none")


COUNTS = (4, 2)


def one_rank(rank, cached, size_average, parts):
    encoder = DistributedDataParallel(model(dropout=0.0))
    calls = []

    def hook(state, bucket):
        calls.append(bucket)
        work = distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    encoder.register_comm_hook(None, hook)
    kind = modules.CachedContrastive if cached else modules.Contrastive
    options = {"mini_batch_size": 1 + rank} if cached else {}
    loss = kind(encoder, size_average=size_average, gather_across_devices=True, temperature=0.5, **options)
    value = loss(parts[rank])
    value.backward()
    if cached:
        assert len(calls) == 1
    return value.item(), gradients(encoder)


def padded(parts):
    longest = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])


@pytest.mark.parametrize("size_average", [True, False], ids=["mean", "sum"])
def test_gather_across_devices(size_average):
    """Unequal batches and lengths: what one process has with both."""
    parts = [features(count, seed=10 * count) for count in COUNTS]
    joined = [{name: padded([part[name] for part in each]) for name in each[0]} for each in zip(*parts, strict=True)]
    expected = run(modules.Contrastive(model(dropout=0.0), size_average=size_average, temperature=0.5), joined)
    ranks = Ranks(2)
    try:
        for cached in (False, True):
            values, found = zip(*ranks.run(one_rank, cached, size_average, parts), strict=True)
            assert sum(values) / 2 == pytest.approx(expected[0].item())
            for each in found:
                check((expected[0], each), expected)
    finally:
        ranks.close()


def test_the_cached_loss_cites_gradcache():
    assert "2101.06983" in modules.CachedContrastive(Model()).citation


# Next to PyLate itself.


@pytest.fixture(scope="module")
def pylate():
    return pytest.importorskip("pylate")


@pytest.fixture(scope="module")
def encoder(pylate, tmp_path_factory):
    return tiny_colbert.make(tmp_path_factory.mktemp("model"), query_length=8, document_length=20)


def tokenized(encoder, count, documents):
    queries = encoder.tokenize(tiny_colbert.texts(count, 6, seed=1), is_query=True)
    each = (tiny_colbert.texts(count, 18, seed=2 + n) for n in range(documents))
    return [dict(queries), *(dict(encoder.tokenize(lines, is_query=False, pad=True)) for lines in each)]


def names_and_defaults(kind):
    parameters = list(inspect.signature(kind).parameters.values())
    return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("name", ["Contrastive", "CachedContrastive", "Distillation"])
def test_the_arguments_of_pylate(pylate, name):
    from pylate import losses

    theirs, ours = (dict(names_and_defaults(getattr(where, name))) for where in (losses, modules))
    assert list(ours) == list(theirs)
    for parameter in set(ours) - {"score_metric"}:
        assert ours[parameter] == theirs[parameter], parameter


@pytest.mark.parametrize("name", ["Contrastive", "CachedContrastive", "Distillation"])
def test_the_citations_of_pylate(pylate, name):
    """sentence-transformers makes the model's card of them."""
    from pylate import losses

    theirs, ours = (getattr(getattr(each, name)(Model()), "citation", None) for each in (losses, modules))
    assert ours == theirs


CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.parametrize("options", [{}, {"size_average": False}, {"temperature": 0.1}], ids=str)
@pytest.mark.parametrize("documents", [1, 3])
def test_contrastive_of_pylate(pylate, encoder, documents, options):
    from pylate import losses

    inputs = tokenized(encoder.train(), 6, documents)
    check(
        run(modules.Contrastive(encoder, **options), inputs),
        run(losses.Contrastive(encoder, **options), inputs),
        **CLOSE,
    )


def test_cached_contrastive_of_pylate(pylate, encoder):
    """Dropout on: the loss is PyLate's; its gradients are ours times the batch size."""
    from pylate import losses

    inputs = tokenized(encoder.train(), 6, 2)
    ours, theirs = (run(where.CachedContrastive(encoder, mini_batch_size=4), inputs) for where in (modules, losses))
    check(ours, (theirs[0], [gradient if gradient is None else gradient / 6 for gradient in theirs[1]]), **CLOSE)
    encoder.eval()
    ours, theirs = (
        run(modules.CachedContrastive(encoder, mini_batch_size=4), inputs),
        run(losses.Contrastive(encoder), inputs),
    )
    check(ours, theirs, **CLOSE)


@pytest.mark.parametrize("expansion", [True, False], ids=["expansion", ""])
def test_distillation_of_pylate(pylate, encoder, expansion, monkeypatch):
    from pylate import losses

    monkeypatch.setattr(encoder.train(), "do_query_expansion", expansion)
    queries = encoder.tokenize(tiny_colbert.texts(4, 6, seed=1), is_query=True)
    documents = encoder.tokenize(tiny_colbert.texts(20, 18, seed=2), is_query=False, pad=True)
    teacher = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    ours, theirs = (
        run(where.Distillation(encoder), [dict(queries), dict(documents)], teacher) for where in (modules, losses)
    )
    check(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", ["Contrastive", "CachedContrastive", "Distillation"])
def test_a_training_script_changes_one_import(pylate, tmp_path, name):
    """The trainer of sentence-transformers, as PyLate's documentation uses it: the same losses step by step."""
    datasets = pytest.importorskip("datasets")
    from pylate import losses, utils
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    def train(library):
        encoder = tiny_colbert.make(tmp_path / "model", query_length=8, document_length=20)
        data = {"query": tiny_colbert.texts(8, 6, seed=1), "document": tiny_colbert.texts(8, 18, seed=2)}
        if name == "Distillation":
            data = {"query": data["query"], "documents": [tiny_colbert.texts(3, 18, seed=n) for n in range(8)]}
            data["scores"] = torch.randn(8, 3, generator=torch.Generator().manual_seed(3)).tolist()
        options = {"mini_batch_size": 2} if name == "CachedContrastive" else {}
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1, seed=3,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
            max_grad_norm=0.0, learning_rate=1e-4,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=encoder,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict(data),
            loss=getattr(library, name)(encoder, **options),
            data_collator=utils.ColBERTCollator(encoder.tokenize),
        )
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    ours, theirs = train(modules), train(losses)
    assert len(ours) == 2
    # Adam steps by the sign of small gradients more than by their size: later losses part by rounding.
    assert ours == pytest.approx(theirs, rel=2e-3)
