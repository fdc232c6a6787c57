"""In-batch distillation and frozen layers: what is written, what a batch is, and the gradients of both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny

pytest.importorskip("accelerate")
from training import beir, config, data, model, stages, teach


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("taught")
    tiny.encoder(place / "base", dropout=0.0)
    tiny.beir(place / "task")
    teach.teach(str(place / "task"), "bm25", place / "taught", with_sentences=True)
    return place


def build(folder: Path, **tables):
    tables.setdefault("loss", {"temperature": 0.5, "teacher_temperature": 2.0, "bonus": 3.0})
    raw = tiny.settings("colbert", folder / "base", folder / "taught", folder / "out", **tables)
    raw["data"]["sources"][0]["corpus"] = str(folder / "task")
    settings = config.build(raw)
    torch.manual_seed(0)
    encoder = model.create(settings.model, "colbert")
    batches = data.Batches(settings, None)
    stage = stages.build(settings, encoder, rows=batches.rows)
    batches.collate = stage.collate
    return stage, batches


def test_what_is_written(folder):
    task = beir.read_beir(folder / "task", "train")
    records = [json.loads(line) for line in (folder / "taught" / "queries.jsonl").read_text().splitlines()]
    scores = np.load(folder / "taught" / "scores.npy")
    assert scores.shape == (len(records), len(task.documents)) and scores.dtype == np.float16
    assert [each["relevant"] for each in records if each["relevant"]] == list(task.qrels.values())
    made = [each for each in records if each["about"]]
    assert {each["about"] for each in made} <= set(task.documents) and len(made) > len(task.documents)
    assert all(beir.plain(each["query"]) not in task.held_out for each in records)
    with pytest.raises(config.ConfigError, match="exists"):
        teach.teach(str(folder / "task"), "bm25", folder / "taught")


def test_sentences_are_last_ones_without_their_opening():
    text = "One study of sleep was made. In conclusion, these results suggest that short sleep is bad for the heart. Short end."
    task = beir.Beir(Path(), {}, {"d": ("Sleep and the heart", text)}, {}, {}, [])
    assert list(teach.sentences(task)) == [("short sleep is bad for the heart.", "d"), ("Sleep and the heart", "d")]
    avoid = frozenset({"sleep and the heart"})
    assert list(teach.sentences(task, avoid)) == [("short sleep is bad for the heart.", "d")]


def test_a_batch_has_a_score_for_every_pair(folder):
    _, batches = build(folder)
    rows, source = batches.rows_of(1), int(batches.choice[1])
    batch = batches[1]
    queries, documents = batch["inputs"]
    scores = batch["options"]["teacher_scores"]
    assert scores.shape == (len(queries["input_ids"]), len(documents["input_ids"]))
    taught = batches.rows[source]
    keys = list(dict.fromkeys(key for row in rows for key in row.keys))
    whole = np.load(folder / "taught" / "scores.npy").astype(np.float32)
    for n, row in enumerate(rows):
        assert row.relevant & set(row.keys) and len(row.others) >= len(row.keys)
        wanted = [whole[row.index, taught.numbers[key]] + 3.0 * (key in row.relevant) for key in keys]
        np.testing.assert_allclose(scores[n], wanted, rtol=1e-6)
    assert batches[1]["rows"] == batch["rows"]


def test_a_limit_leaves_it_what_it_is(folder):
    limited = {"sources": [{"path": str(folder / "taught")}], "limit": 9}
    stage, batches = build(folder, data=limited)
    assert isinstance(stage, stages.InBatch) and len(batches.rows[0]) == 9
    assert batches[0]["options"]["teacher_scores"].ndim == 2


def test_ranks_share_the_texts_of_one(folder):
    ranks = []
    for rank in range(3):
        _, own = build(folder, train={"batch": 9})
        own.rank, own.ranks = rank, 3
        ranks.append(own[0])
    _, batches = build(folder, train={"batch": 9})
    whole = batches[0]
    for side in (0, 1):
        sides = [part["inputs"][side] for part in (*ranks, whole)]
        texts = [
            ids[mask.bool()].tolist()
            for each in sides
            for ids, mask in zip(each["input_ids"], each["attention_mask"], strict=True)
        ]
        assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]
    options = [part["options"] for part in ranks]
    assert torch.equal(torch.cat([each["teacher_scores"] for each in options]), whole["options"]["teacher_scores"])
    weights = [float(each["weight"]) for each in options]
    counts = [len(each["teacher_scores"]) for each in options]
    assert weights == pytest.approx([3 * count / sum(counts) for count in counts]) and whole["options"]["weight"] == 1


def test_the_loss_is_the_divergence_over_the_whole_matrix(folder):
    stage, batches = build(folder)
    queries, documents = batches[0]["inputs"]
    teacher = batches[0]["options"]["teacher_scores"].double()
    stage.model.eval()
    (Q, q_mask), (D, d_mask) = stage.encode(**queries), stage.encode(**documents)
    loss = stage.loss((Q, q_mask), (D, d_mask), **batches[0]["options"])
    pairs = torch.einsum("qld,nmd->qnlm", Q.double(), D.double()).masked_fill(~d_mask[None, :, None], -torch.inf)
    scores = (pairs.amax(-1) * q_mask[:, None]).sum(-1)

    def normalized(x):
        return (x - x.amin(1, keepdim=True)) / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True) + 1e-8)

    student, wanted = normalized(scores) / 0.5, normalized(teacher) / 2.0
    expected = F.kl_div(student.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("freeze", [0, 1])
def test_frozen_layers_and_pieces_change_no_gradient(folder, freeze):
    stage, batches = build(folder, model={"freeze": freeze})
    whole, _ = build(folder)
    whole.model.load_state_dict(stage.model.state_dict())
    inputs, options = batches[0]["inputs"], batches[0]["options"]
    assert len(inputs[0]["input_ids"]) > model.TEXTS_A_PIECE
    for each, training in ((stage, True), (whole, False)):
        each.model.train(training)
        each.loss(*(each.encode(**side) for side in inputs), **options).backward()
    expected = dict(whole.model.named_parameters())
    trained = [name for name, parameter in stage.model.named_parameters() if parameter.grad is not None]
    assert any("layer.1." in name for name in trained)
    assert any("layer.0." in name or "embeddings" in name for name in trained) == (not freeze)
    got, want = (
        torch.cat([one[name].grad.flatten() for name in trained])
        for one in (dict(stage.model.named_parameters()), expected)
    )
    # Frozen states are rounded to float16.
    assert float((got - want).norm() / want.norm()) < (2e-2 if freeze else 1e-5)


def test_a_text_has_the_same_frozen_states_in_every_batch(folder):
    stage, batches = build(folder, model={"freeze": 1})
    again, _ = build(folder, model={"freeze": 1})
    features = batches[0]["inputs"][1]
    stage.model.train()
    stage.encode(**features)
    for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
        text = ids[: int(mask.sum())]
        assert torch.equal(stage.encoder.frozen.states(text), again.encoder.frozen.states(text))


def test_states_are_kept_between_runs(folder, tmp_path):
    tables = {"model": {"freeze": 2, "states": str(tmp_path / "states")}}
    stage, batches = build(folder, **tables)
    trained = [name for name, parameter in stage.model.named_parameters() if parameter.requires_grad]
    assert trained and all(name.startswith("head.") for name in trained)
    before = stage.encode(**batches[0]["inputs"][1])[0]
    stage.encoder.frozen.save()
    again, _ = build(folder, **tables)
    assert again.encoder.frozen.kept.keys() == stage.encoder.frozen.kept.keys()
    again.encoder.frozen.lower = None  # what is kept is not computed
    assert torch.equal(again.encode(**batches[0]["inputs"][1])[0], before)
    other, _ = build(folder, model={"freeze": 1, "states": str(tmp_path / "states")})
    assert not other.encoder.frozen.kept


def test_freezing_what_cannot_be_frozen(folder):
    with pytest.raises(config.ConfigError, match="has 2 layers"):
        build(folder, model={"freeze": 3})
    with pytest.raises(config.ConfigError, match="attend_to_expansion"):
        build(folder, model={"freeze": 1, "query_expansion": True})
