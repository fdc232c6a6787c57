"""Model files: ours load in PyLate and in sentence-transformers to the same bits, and theirs load here."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import tiny
import tiny_colbert

pytest.importorskip("accelerate")
pytest.importorskip("sentence_transformers")
from training import backbones, config, model, rankers, tokens

TEXTS = ["word1 word2, word3.", "Word4 word5! word6 word7 (word8) word9 word10", "word11"]
HEADS = {
    "one layer": config.Head(widths=[16], residual=False),
    "two layers": config.Head(),
    "a square layer with a residual": config.Head(widths=[32, 16], residual=[True, False], bias=True),
    "three layers, the middle one square": config.Head(widths=[64, 64, 16], residual=[False, True, False]),
}
PYLATE = os.environ.get("EDGECOLBERT_PYLATE")
needs_pylate = pytest.mark.skipif(not PYLATE, reason="EDGECOLBERT_PYLATE names no interpreter with PyLate")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.encoder(tmp_path_factory.mktemp("base"))


def build(base: Path, head: config.Head | None = None, stage: str = "colbert", **options) -> model.Encoder:
    torch.manual_seed(1)
    wanted = config.Model(base=str(base), dimension=16, head=head, **options)
    return model.create(wanted, stage).eval()


def vectors(encoder: model.Encoder, is_query: bool) -> list[torch.Tensor]:
    found = []
    for text in TEXTS:
        features = encoder.tokenize([text], is_query)
        with torch.no_grad():
            tokens = encoder(features["input_ids"], features["attention_mask"])
        found.append(tokens[0] if encoder.head is None else tokens[0][features["score_mask"][0]])
    return found


@pytest.mark.parametrize("head", HEADS, ids=list(HEADS))
@pytest.mark.parametrize("expansion", [False, True])
def test_sentence_transformers_loads_ours_to_the_same_bits(base, tmp_path, head, expansion):
    from sentence_transformers import MultiVectorEncoder

    ours = build(base, HEADS[head], query_expansion=expansion, query_length=20, document_length=12)
    ours.save(tmp_path / "saved")
    theirs = MultiVectorEncoder(str(tmp_path / "saved"), device="cpu")
    theirs.save(str(tmp_path / "native"))
    again = model.load(tmp_path / "native")
    for is_query, encode in ((True, theirs.encode_query), (False, theirs.encode_document)):
        expected = [encode([text], batch_size=1)[0] for text in TEXTS]
        for encoder in (ours, model.load(tmp_path / "saved"), again):
            for mine, other in zip(vectors(encoder, is_query), expected, strict=True):
                assert torch.equal(mine, torch.as_tensor(other))


@needs_pylate
@pytest.mark.parametrize("head", ["two layers", "a square layer with a residual"])
def test_pylate_loads_ours_and_we_load_theirs_to_the_same_bits(base, tmp_path, head):
    build(base, HEADS[head], query_expansion=True, query_length=20, document_length=12).save(tmp_path / "ours")
    source = f"""
import sys
import torch
from pylate import models
from training import model
import tiny, test_training_model as here
theirs = models.ColBERT({str(tmp_path / "ours")!r}, device="cpu")
theirs.save({str(tmp_path / "theirs")!r})
default = models.ColBERT({str(base)!r}, device="cpu", embedding_size=16)
default.save({str(tmp_path / "default")!r})
for name, loaded in (("ours", theirs), ("theirs", theirs), ("default", default)):
    ours = model.load({str(tmp_path)!r} + "/" + name)
    for is_query in (True, False):
        for mine, text in zip(here.vectors(ours, is_query), here.TEXTS):
            other = loaded.encode([text], is_query=is_query, convert_to_numpy=False, show_progress_bar=False)[0]
            assert torch.equal(mine, other), (name, is_query, text)
print("the same")
"""
    root = Path(__file__).parent.parent
    paths = {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    source = source.replace("import tiny, test_training_model as here", HERE)
    done = subprocess.run(
        [PYLATE, "-c", source], env={**os.environ, **paths}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.endswith("the same\n"), done.stderr


# PyLate's environment need not have pytest.
HERE = f"""
class here:
    TEXTS = {TEXTS!r}
    @staticmethod
    def vectors(encoder, is_query):
        found = []
        for text in here.TEXTS:
            features = encoder.tokenize([text], is_query)
            with torch.no_grad():
                tokens = encoder(features["input_ids"], features["attention_mask"])
            found.append(tokens[0][features["score_mask"][0]])
        return found
"""


def test_a_square_residual_survives_the_export(base, tmp_path):
    """Without its residual the layer gives other vectors: nothing but the file's flag says that it is there."""
    ours = build(base, HEADS["a square layer with a residual"])
    ours.save(tmp_path / "saved")
    path = tmp_path / "saved" / "1_Dense" / "config.json"
    facts = json.loads(path.read_text())
    assert facts["use_residual"] and facts["in_features"] == facts["out_features"]
    path.write_text(json.dumps(facts | {"use_residual": False}))
    wrong = model.load(tmp_path / "saved")
    assert not any(torch.equal(a, b) for a, b in zip(vectors(ours, False), vectors(wrong, False), strict=True))


def test_dense_models_load_in_sentence_transformers(base, tmp_path):
    from sentence_transformers import SentenceTransformer

    ours = build(base, stage="contrastive", query_prefix="word1 : ", document_length=32)
    ours.save(tmp_path / "saved")
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for encoder in (ours, model.load(tmp_path / "saved")):
        for is_query, encode in ((True, theirs.encode_query), (False, theirs.encode_document)):
            for text, mine in zip(TEXTS, vectors(encoder, is_query), strict=True):
                torch.testing.assert_close(mine[0], torch.as_tensor(encode(text)))


def test_a_colbert_starts_from_a_dense_model(base, tmp_path):
    build(base, stage="contrastive", query_prefix="word1 : ").save(tmp_path / "dense")
    built = build(tmp_path / "dense")
    assert built.reading.query_prefix == "[Q] " and built.reading.document_length == 180 and built.dimension == 16


@pytest.mark.parametrize("head", ["one layer", "two layers"])
def test_a_head_can_start_at_a_projection(base, head):
    ours = build(base, HEADS[head])
    directions = torch.linalg.qr(torch.randn(32, 16))[0]
    ours.start_at(directions)
    features = ours.tokenize(TEXTS, False)
    with torch.no_grad():
        hidden = ours.backbone(input_ids=features["input_ids"], attention_mask=features["attention_mask"])[0]
        expected = torch.nn.functional.normalize(hidden @ directions, dim=-1)
        torch.testing.assert_close(ours(features["input_ids"], features["attention_mask"]), expected)


def test_prefix_lengths_and_skiplist(base):
    ours = build(base, query_length=8, document_length=6)
    query = ours.tokenize(["word1 " * 20], True)["input_ids"][0]
    assert len(query) == 8 and query[1] == ours.tokenizer.convert_tokens_to_ids("[Q] ")
    document = ours.tokenize(["word1, word2. word3 word4"], False)
    assert len(document["input_ids"][0]) == 6
    comma = ours.tokenizer.convert_tokens_to_ids(",")
    assert torch.equal(document["score_mask"], document["input_ids"] != comma)
    # Words that are no tokens would stand for all unknown words.
    assert ours.tokenizer.unk_token_id not in ours.skipped


def test_lower_casing_is_in_the_file(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate([*tiny_colbert.VOCABULARY, "[END]"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokens.lowercase(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (
        again("WORD1 Word2")["input_ids"] == tokenizer("word1 word2")["input_ids"] == [words["word1"], words["word2"]]
    )


@pytest.mark.parametrize("name, count", [("ettin-17m", 16_797_440), ("ettin-32m", 31_883_136)])
def test_random_ettin_has_the_papers_size(name, count):
    from transformers import AutoModel

    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModel.from_config(backbones.ettin(name)).parameters()) == count


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head": config.Head(widths=[32, 8])}, "ends with 8, but model.dimension is 16"),
        ({"head": config.Head(activation="Sillu")}, "activation is 'Sillu'"),
        ({"head": config.Head(widths=[64, 16], residual=[True])}, "1 entries; want 2"),
        ({"document_length": 1000}, "model.document_length is 1000; this encoder reads 4 to 512"),
    ],
)
def test_errors(base, options, message):
    with pytest.raises(config.ConfigError, match=message):
        build(base, **options)


def refuse(error):
    def load(*_, **__):
        raise error

    return load


def test_a_missing_folder_is_named(monkeypatch):
    with pytest.raises(config.ConfigError, match=r"model.base './nowhere' is no such folder"):
        model.create(config.Model(base="./nowhere"), "colbert")
    monkeypatch.setattr(backbones.AutoModel, "from_pretrained", refuse(OSError("no answer\nand how to get one")))
    for name in ("models/foo", "foo"):
        wanted = rf"model.base '{name}' is no such folder, and was looked for on the hub: no answer$"
        with pytest.raises(config.ConfigError, match=wanted):
            model.create(config.Model(base=name), "colbert")


@pytest.mark.parametrize("kind", ["LocalEntryNotFoundError", "RepositoryNotFoundError"])
def test_a_missing_teacher_is_named(monkeypatch, kind):
    """One that the hub does not have, and where it does not answer."""
    import httpx
    import huggingface_hub
    import sentence_transformers
    from huggingface_hub import errors

    if kind == "RepositoryNotFoundError":
        error = errors.RepositoryNotFoundError(
            "no answer", response=httpx.Response(404, request=httpx.Request("GET", "https://hub"))
        )
    else:
        error = errors.LocalEntryNotFoundError("no answer")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse(error))
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", refuse(OSError("no answer")))
    for load in (rankers.open_ranker, rankers.sentence_transformer):
        with pytest.raises(
            config.ConfigError, match=r"^models/foo is no such folder, and was looked for on the hub: no"
        ):
            load("models/foo")


def test_positions_that_are_computed_have_no_end(base):
    """ModernBERT reads beyond what it was made for, and the folder says so; BERT has learned as many as it has."""
    from transformers import ModernBertConfig, ModernBertModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    backbone = ModernBertModel(ModernBertConfig(vocab_size=99, max_position_embeddings=20, pad_token_id=0, **sizes))
    assert backbones.trained_length(backbone) == 20 and backbones.longest_text(backbone) > 1 << 20
    bert = build(base).backbone
    assert backbones.longest_text(bert) == backbones.trained_length(bert) == 512
