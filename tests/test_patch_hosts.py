"""colbert-ai, colpali-engine and rerankers, patched, and the rerankers for LlamaIndex and LangChain. Each needs its host."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

import edgecolbert_kernels as ek
from cases import embeddings, holes, ragged
from marks import compiled

pytestmark = compiled
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def host(name):
    """The module, or a skip: some hosts do not even import where a version of what they need does not fit."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name}: {error}")


def negative(*shape, seed):
    X = embeddings(*shape, seed=seed)
    X[0] = -X[0].abs()
    return X


def both(using, call):
    wanted = call()
    with using() as report:
        before = sum(report.hits.values())
        found = call()
        return wanted, found, sum(report.hits.values()) - before


# colbert-ai


CONFIG = SimpleNamespace(total_visible_gpus=0, interaction="colbert", query_maxlen=32)


@pytest.fixture
def colbert_ai():
    return host("colbert.modeling.colbert")


@pytest.mark.parametrize("queries", [1, 5], ids=["one", "aligned"])
def test_colbert_ai_score(colbert_ai, queries):
    from edgecolbert_kernels.integrations.colbert_ai import using_colbert_ai

    Q, D = embeddings(queries, 7, 16, seed=1).abs(), negative(5, 9, 16, seed=2)
    mask = holes(5, 9, seed=3)[..., None]
    mask[3] = False
    wanted, found, hits = both(using_colbert_ai, lambda: colbert_ai.colbert_score(Q, D, mask, CONFIG))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert hits == 1


def test_colbert_ai_packed(colbert_ai):
    """Against what its C++ computes, which needs a compiler: the maximum starts at 0."""
    from edgecolbert_kernels.integrations.colbert_ai import using_colbert_ai

    Q, lengths = embeddings(1, 7, 16, seed=1).abs(), torch.tensor([4, 1, 9])
    D = negative(14, 16, seed=2)
    D[4] = -D[4].abs()
    similarities = (D @ Q[0].T).split(lengths.tolist())
    wanted = torch.stack([each.amax(0).clamp_min(0).sum() for each in similarities])
    assert wanted[1] == 0
    before = vars(colbert_ai.ColBERT).copy()
    with using_colbert_ai() as report:
        found = colbert_ai.colbert_score_packed(Q, D, lengths, CONFIG)
        assert report.hits["colbert.modeling.colbert:colbert_score_packed"] > 0
        torch.testing.assert_close(found, wanted, **CLOSE)
        torch.testing.assert_close(colbert_ai.ColBERT.segmented_maxsim(D @ Q[0].T, lengths), wanted, **CLOSE)
        colbert_ai.ColBERT.try_load_torch_extensions(False)
    assert dict(vars(colbert_ai.ColBERT)) == dict(before)
    assert not hasattr(colbert_ai.ColBERT, "loaded_extensions")


def test_colbert_ai_flipr_stays(colbert_ai):
    from edgecolbert_kernels.integrations.colbert_ai import using_colbert_ai

    flipr = SimpleNamespace(total_visible_gpus=0, interaction="flipr", query_maxlen=64)
    Q, D, mask = embeddings(1, 80, 16, seed=1), embeddings(5, 9, 16, seed=2), holes(5, 9, seed=3)[..., None]
    wanted, found, hits = both(using_colbert_ai, lambda: colbert_ai.colbert_score(Q, D, mask, flipr))
    assert torch.equal(found, wanted)
    assert not hits


# colpali-engine


@pytest.fixture
def colpali():
    return host("colpali_engine")


@pytest.mark.parametrize("batch_size", [2, 128])
def test_colpali_scores(colpali, batch_size):
    from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor

    from edgecolbert_kernels.integrations.colpali import using_colpali

    Q, D = ragged([3, 5, 4], 16, seed=1), ragged([9, 2, 6], 16, seed=2)
    Q, D[1] = [q.abs() for q in Q], -D[1].abs()
    score = BaseVisualRetrieverProcessor.score_multi_vector
    wanted, found, hits = both(using_colpali, lambda: score(Q, D, batch_size=batch_size, device="cpu"))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert hits > 0


LOSSES = [
    "ColbertLoss",
    "ColbertNegativeCELoss",
    "ColbertPairwiseCELoss",
    "ColbertPairwiseNegativeCELoss",
    "ColbertSigmoidLoss",
]


def colpali_step(name, **options):
    """A function of no arguments: loss and gradients, of a loss made now."""
    from colpali_engine.loss import late_interaction_losses

    loss = getattr(late_interaction_losses, name)(normalize_scores=False, **options)
    inputs = [embeddings(4, 6, 16, seed=1), embeddings(4, 9, 16, seed=2)]
    if "Negative" in name:
        inputs.append(embeddings(4, 3, 7, 16, seed=3))

    def step():
        leaves = [X.clone().requires_grad_() for X in inputs]
        value = loss(*leaves)
        value.backward()
        return [value.detach(), *(X.grad for X in leaves)]

    return step


@pytest.mark.parametrize("name", LOSSES)
def test_colpali_losses(colpali, name):
    """Made before the patch; in every version, whether it has functions to patch or writes its losses out."""
    from edgecolbert_kernels.integrations.colpali import patch_colpali, unpatch_colpali, using_colpali

    assert not patch_colpali().missed
    unpatch_colpali()
    wanted, found, hits = both(using_colpali, colpali_step(name))
    assert hits > 0
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_colpali_smooth_losses_stay(colpali, name):
    from edgecolbert_kernels.integrations.colpali import using_colpali

    wanted, found, hits = both(using_colpali, colpali_step(name, use_smooth_max=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    assert not hits


def test_colpali_restored_exactly(colpali):
    from colpali_engine.loss import late_interaction_losses as losses

    from edgecolbert_kernels.integrations.colpali import using_colpali

    before = dict(vars(losses))
    with using_colpali() as report:
        assert report.reached
    assert dict(vars(losses)) == before
    assert losses.torch is torch


# rerankers


def test_rerankers():
    module = host("rerankers.models.colbert_ranker")
    from edgecolbert_kernels.integrations.rerankers import using_rerankers

    Q, D = embeddings(2, 7, 16, seed=1).abs(), negative(5, 9, 16, seed=2)
    q_mask, d_mask = holes(2, 7, seed=3).long(), holes(5, 9, seed=4).long()
    d_mask[3] = 0
    code = module._colbert_score.__code__
    with torch.inference_mode():
        wanted, found, hits = both(using_rerankers, lambda: module._colbert_score(Q, D, q_mask, d_mask))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    assert hits == 1
    assert module._colbert_score.__code__ is code


# LlamaIndex and LangChain


class Encoder:
    """An encoder without a model: a token a word, drawn from the word."""

    def encode(self, texts, is_query, **options):
        def token(word):
            generator = torch.Generator().manual_seed(sum(word.encode()))
            return torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)

        return [torch.stack([token(word) for word in text.split()]).numpy() for text in texts]


TEXTS = ["snow on a roof", "rain on the river", "the river in snow", "a dog"]
QUERY = "snow on the river"


def wanted():
    (query,), documents = (Encoder().encode(texts, True) for texts in ([QUERY], TEXTS))
    scores = ek.maxsim(query, documents).tolist()
    return sorted(zip(scores, TEXTS, strict=True), reverse=True)


def test_llama_index():
    schema = host("llama_index.core.schema")
    from edgecolbert_kernels.integrations.llama_index import MaxSimRerank

    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text), score=float(n)) for n, text in enumerate(TEXTS)]
    rerank = MaxSimRerank(Encoder(), top_n=3, keep_retrieval_score=True)
    found = rerank.postprocess_nodes(nodes, query_str=QUERY)
    assert [(node.score, node.node.text) for node in found] == wanted()[:3]
    assert [TEXTS.index(node.node.text) for node in found] == [node.metadata["retrieval_score"] for node in found]
    assert rerank.postprocess_nodes([], query_str=QUERY) == []
    with pytest.raises(ValueError, match="query"):
        rerank.postprocess_nodes(nodes)


def test_langchain():
    documents = host("langchain_core.documents")
    from edgecolbert_kernels.integrations.langchain import MaxSimRerank

    given = [documents.Document(page_content=text, metadata={"n": n}) for n, text in enumerate(TEXTS)]
    found = MaxSimRerank(Encoder(), top_n=2).compress_documents(given, QUERY)
    assert [(each.metadata["relevance_score"], each.page_content) for each in found] == wanted()[:2]
    assert all("relevance_score" not in each.metadata for each in given)
    assert MaxSimRerank(Encoder()).compress_documents([], QUERY) == []


def test_a_checkpoint(tmp_path):
    """Loaded by PyLate or by sentence-transformers 6, whichever is here."""
    from edgecolbert_kernels.integrations.checkpoint import Checkpoint

    try:
        import pylate.models

        kind = pylate.models.ColBERT
    except ImportError:
        kind = getattr(host("sentence_transformers"), "MultiVectorEncoder", None)
    if kind is None:
        pytest.skip("no library that loads ColBERT checkpoints")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in TEXTS for word in text.split()})]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path)
    kind(str(tmp_path), device="cpu").save_pretrained(str(tmp_path / "colbert"))
    checkpoint = Checkpoint(str(tmp_path / "colbert"), device="cpu")
    scores = checkpoint.scores(QUERY, TEXTS)
    assert len(scores) == 4
    best = checkpoint.best(QUERY, TEXTS, 2)
    assert [score for _, score in best] == sorted(scores, reverse=True)[:2]
    assert checkpoint.scores(QUERY, []) == []
    with pytest.raises(TypeError, match="texts is a str"):
        checkpoint.scores(QUERY, TEXTS[0])
    with pytest.raises(ValueError, match="count is -1"):
        checkpoint.best(QUERY, TEXTS, -1)
