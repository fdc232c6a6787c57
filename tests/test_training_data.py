"""Rows, their order, mined negatives and teachers' scores; and what is said of files that are wrong."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import tiny

pytest.importorskip("accelerate")
pytest.importorskip("bm25s")
from training import beir, config, data, evaluate, files, mine, rankers, score, sources

REAL = os.environ.get("EDGECOLBERT_DATA", "")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    return tiny.beir(tmp_path_factory.mktemp("task"))


def batches(*sources: config.Source, rank: int = 0, ranks: int = 1, **train) -> data.Batches:
    settings = config.Config("colbert", "out", config.Model("x"), config.Data(list(sources)))
    settings.train = config.Train(**{"batch": 8, **train})
    return data.Batches(settings, None, rank, ranks)


def test_an_epoch_has_every_row_once_and_the_next_another_order(task):
    made = batches(config.Source(str(task)), epochs=2)
    assert len(made) == 2 * (60 // 8)
    epochs = [[row.index for step in range(e * 7, e * 7 + 7) for row in made.rows_of(step)] for e in (0, 1)]
    assert all(len(set(epoch)) == 56 for epoch in epochs) and epochs[0] != epochs[1]


def test_a_batch_depends_on_its_step_alone(task):
    first, second = batches(config.Source(str(task)), epochs=3), batches(config.Source(str(task)), epochs=3)
    late = second.rows_of(17)
    assert [first.rows_of(step) for step in range(18)][17] == late
    assert batches(config.Source(str(task)), epochs=3, seed=1).rows_of(17) != late
    assert batches(config.Source(str(task)), epochs=3, seed=1, data_seed=0).rows_of(17) == late


def test_ranks_share_the_batch_of_one(task, tmp_path):
    sources = [config.Source(str(task)), config.Source(str(tiny.tuples(tmp_path / "t.jsonl")))]
    whole = batches(*sources)
    parts = [batches(*sources, rank=rank, ranks=2) for rank in (0, 1)]
    for step in range(len(whole)):
        assert whole.rows_of(step) == [row for part in parts for row in part.rows_of(step)]
        assert parts[0].rows_of(step, 1) == parts[1].rows_of(step)


def test_a_batch_comes_from_one_source_and_weights_say_how_often(task, tmp_path):
    path = str(tiny.tuples(tmp_path / "t.jsonl"))
    exact = batches(config.Source(str(task)), config.Source(path))
    assert Counter(exact.choice.tolist()) == {0: 7, 1: 5}
    weighted = batches(config.Source(str(task), weight=1), config.Source(path, weight=3), steps=400)
    assert 250 < Counter(weighted.choice.tolist())[1] < 350
    never = batches(config.Source(str(task), weight=1), config.Source(path, weight=0), steps=40)
    assert Counter(never.choice.tolist()) == {0: 40}


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_a_stream_reads_every_row_in_an_order_that_can_be_entered_anywhere(tmp_path, name):
    plain = tiny.tuples(tmp_path / "plain.jsonl", rows=40)
    path = tmp_path / name
    path.write_bytes(gzip.compress(plain.read_bytes()) if name.endswith("gz") else plain.read_bytes())
    source = config.Source(str(path), streaming=True, buffer=16)
    made = batches(source, steps=12)
    queries = [[row.query for row in made.rows_of(step)] for step in range(12)]
    assert len({query for step in queries[:6] for query in step}) == 40
    assert [row.query for row in batches(source, steps=12).rows_of(9)] == queries[9]


def test_negatives_are_drawn_and_keep_their_scores(tmp_path):
    made = batches(config.Source(str(tiny.tuples(tmp_path / "t.jsonl", ways=6))))
    everything = {row.query: row for row in made.rows_of(0)}
    made.negatives = 2
    for row in made.rows_of(0):
        whole = everything[row.query]
        assert len(row.documents) == 3 and row.documents[0] == whole.documents[0]
        assert [whole.scores[whole.documents.index(text)] for text in row.documents] == row.scores


def test_splits_and_queries_that_stand_in_test(task, tmp_path):
    a, b = beir.read_beir(task, "train[0.0:0.7]"), beir.read_beir(task, "train[0.7:1.0]")
    assert len(a.qrels) == 42 and len(b.qrels) == 18 and not a.qrels.keys() & b.qrels.keys()
    copy = tiny.beir(tmp_path / "copy")
    lines = (copy / "queries.jsonl").read_text().splitlines()
    test = json.loads(lines[75])
    lines[3] = json.dumps({"_id": "q3", "text": test["text"].upper() + "?"})
    (copy / "queries.jsonl").write_text("\n".join(lines))
    found = beir.read_beir(copy, "train")
    assert "q3" not in found.qrels and "1 train queries also stand in test" in found.notes[0]


def test_titles_read_no_judgement(task, tmp_path):
    rows = sources.open_rows(config.Source(str(task), kind="titles"))
    row = rows.row(0, np.random.default_rng(0))
    assert row.query and row.documents[0].endswith("end.") and row.query not in row.documents[0]


@pytest.mark.parametrize(
    "record, documents",
    [
        ({"query": "q", "positive": "p"}, ["p"]),
        ({"anchor": "q", "pos": "p", "negative": "n"}, ["p", "n"]),
        ({"question": "q", "answer": "p", "negatives": ["n", "m"]}, ["p", "n", "m"]),
        ({"query": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}, ["p", "n", "m"]),
        ({"query": "q", "documents": ["p", "n"], "scores": [1, 0]}, ["p", "n"]),
        ({"text": "q"}, []),
    ],
)
def test_forms_of_a_row(record, documents):
    row = sources.parse(record, "here", config.Source("x"), None)
    assert row.query == "q" and row.documents == documents and row.scores == record.get("scores")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"rows.jsonl:2: not JSON"),
        ("[1]", r"rows.jsonl:2: want an object, not list"),
        ('{"a": 1}', r"rows.jsonl:2: it has a; want query and positive"),
        ('{"query": "q", "positive": 3}', r"rows.jsonl:2: the query and the documents must be text"),
        ('{"query": "q", "documents": ["a", "b"], "scores": [1]}', r"rows.jsonl:2: 1 scores for 2 documents"),
        ('{"query": "q", "documents": ["a"], "scores": [NaN]}', r"rows.jsonl:2: a score is not a finite number"),
        ('{"query": "q", "documents": ["a"], "scores": ["1.0"]}', r"rows.jsonl:2: a score is not a finite number"),
        ('{"query": "q", "documents": ["a"], "scores": [null]}', r"rows.jsonl:2: a score is not a finite number"),
        ('{"query": "q", "documents": ["a"], "scores": 1.0}', r"rows.jsonl:2: scores is 1.0; want a list"),
        ('{"query": "q", "documents": "abc"}', r"rows.jsonl:2: documents is 'abc'; want a list"),
        ('{"query": "q", "positive": "p", "negatives": 3}', r"rows.jsonl:2: negatives is 3; want a list"),
        (
            '{"query_id": "q", "document_ids": ["a"]}',
            r"rows.jsonl:2: it has document_ids, so data.sources needs corpus",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q", "positive": "p"}\n' + line + "\n")
    rows = sources.open_rows(config.Source(str(path)))
    rows.row(0, np.random.default_rng(0))
    with pytest.raises(files.BadRow, match=message):
        rows.row(1, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_blank_lines_are_no_rows_and_count_as_lines(tmp_path, name):
    path = tmp_path / name
    text = b'{"text": "a"}\n\n  \r\n {"text": "b"}\n{\n\n'
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    rows = sources.open_rows(config.Source(str(path)))
    assert len(rows) == 3
    assert [rows.row(n, np.random.default_rng(0)).query for n in (0, 1)] == ["a", "b"]
    with pytest.raises(files.BadRow, match=rf"{name}:5: not JSON"):
        rows.row(2, np.random.default_rng(0))
    (tmp_path / "blank.jsonl").write_text("\n\n")
    assert len(files.Lines(tmp_path / "blank.jsonl")) == 0


def test_broken_and_missing_files(task, tmp_path):
    copy = tiny.beir(tmp_path / "copy")
    (copy / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\tyes\n")
    with pytest.raises(files.BadRow, match=r"train.tsv:2: .* want query id, document id and a whole number"):
        beir.read_beir(copy, "train")
    (copy / "corpus.jsonl").rename(copy / "elsewhere")
    with pytest.raises(config.ConfigError, match=r"corpus.jsonl does not exist, with or without .gz"):
        beir.read_beir(copy, "test")
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    with pytest.raises(files.BadRow, match=r"t\.jsonl\.gz"):
        sources.open_rows(config.Source(str(tmp_path / "t.jsonl.gz")))
    with pytest.raises(config.ConfigError, match="does not exist"):
        sources.open_rows(config.Source(str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(config.ConfigError, match=r"60 rows; want at least train.batch, which is 100"):
        batches(config.Source(str(task)), batch=100)


def test_mined_negatives_follow_mix_threshold_and_judgements():
    rng = np.random.default_rng(0)
    dense, sparse = rng.random(500).astype(np.float32), rng.random(500).astype(np.float32)
    dense[7] = 0.9  # the positive
    chosen = mine.choose(dense, sparse, 7, [7, 8], 20, np.random.default_rng(1), depth=40)
    assert len(set(chosen)) == 20 and not {7, 8} & set(chosen)
    assert (dense[chosen] < 0.95 * 0.9).all()
    allowed = np.where(dense < 0.95 * 0.9, dense, -1)
    assert set(chosen[:7]) <= set(np.argsort(-allowed)[:41].tolist())
    lexical = np.where(dense < 0.95 * 0.9, sparse, -1)
    assert set(chosen[7:14]) <= set(np.argsort(-lexical)[:55].tolist())
    again = mine.choose(dense, sparse, 7, [7, 8], 20, np.random.default_rng(1), depth=40)
    assert chosen == again


def test_mine_then_score_then_train_rows(task, tmp_path):
    mine.mine(str(task), "bm25", tmp_path / "rows.jsonl", negatives=5, repeats=2, threshold=None)
    out = tmp_path / "scored.jsonl"
    score.score(tmp_path / "rows.jsonl", "bm25", out, corpus=str(task))
    rows = sources.open_rows(config.Source(str(out), corpus=str(task)))
    assert len(rows) == 120
    row = rows.row(3, np.random.default_rng(0))
    judged = beir.read_beir(task, "train").qrels
    query = json.loads(out.read_text().splitlines()[3])["query_id"]
    assert row.keys[0] in judged[query] and not set(row.keys[1:]) & judged[query].keys()
    ranker = rankers.Bm25()
    ranker.index(list(beir.read_beir(task, judged=False).documents.values()))
    numbers = [list(beir.read_beir(task, judged=False).documents).index(key) for key in row.keys]
    np.testing.assert_allclose(ranker.all_scores([row.query])[0][numbers], row.scores, atol=1e-5)
    with pytest.raises(config.ConfigError, match="was made from something else"):
        score.score(tmp_path / "rows.jsonl", "fusion:bm25:0.5", out, corpus=str(task))


def test_an_interrupted_file_goes_on_where_it_was(tmp_path):
    calls = []

    def make(start: int, stop: int):
        calls.append(start)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [{"n": n} for n in range(start, stop)]

    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score.resumable(out, 50, {}, make, chunk=8)
    assert not out.exists()
    with (tmp_path / "out.jsonl.part").open("a") as file:
        file.write('{"n": 16}\n{"n"')
    score.resumable(out, 50, {}, make, chunk=8)
    assert [json.loads(line)["n"] for line in out.read_text().splitlines()] == list(range(50))
    assert calls == [0, 8, 16, 16, 24, 32, 40, 48]


@pytest.mark.parametrize("name", ["fusion:bm25", "fusion:bm25:7", "fusion:0.5", "fusion::0.5", "fusion:bm25:-1"])
def test_a_fusion_has_a_model_and_a_weight(name):
    with pytest.raises(config.ConfigError, match="want fusion:MODEL:WEIGHT with a weight of 0 to 1"):
        rankers.open_ranker(name)
    assert rankers.open_ranker("fusion:bm25:.5").weight == 0.5
    with pytest.raises(config.ConfigError, match=r"^/nowhere: there is no such folder"):
        rankers.open_ranker("fusion:/nowhere:0.5")


def test_measures_are_those_of_trec_eval():
    found = evaluate.means(evaluate.measure({"q": {"a": 2, "b": 1}}, {"q": {"x": 3.0, "b": 2.0, "a": 1.0}}))
    ideal = 2 + 1 / np.log2(3)
    assert found["nDCG@10"] == pytest.approx((1 / np.log2(3) + 2 / 2) / ideal, abs=1e-4)
    assert found["RR@10"] == 0.5 and found["R@10"] == 1


@pytest.mark.skipif(not Path(REAL, "beir/scifact").is_dir() or not REAL, reason="EDGECOLBERT_DATA names no real data")
def test_bm25_on_scifact_is_the_published_figure():
    means = evaluate.evaluate(rankers.Bm25(), Path(REAL) / "beir/scifact")
    assert means["nDCG@10"] == pytest.approx(0.671, abs=0.002)


def test_nanobeir_by_name(monkeypatch):
    """The hub's tables, without the hub: an id that is a number, and judgements without scores."""
    datasets = pytest.importorskip("datasets")
    tables = {
        "corpus": [{"_id": 1, "text": "one"}, {"_id": "b", "text": "two", "title": "T"}],
        "queries": [{"_id": "q", "text": "which"}, {"_id": "unjudged", "text": "what"}],
        "qrels": [{"query-id": "q", "corpus-id": "b"}, {"query-id": "q", "corpus-id": "gone"}],
    }
    asked = []

    def load(name, part):
        asked.append(name)
        return {"train": tables[part]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = beir.read_beir("NanoSciFact")
    assert set(asked) == {"zeta-alpha-ai/NanoSciFact"} and len(beir.NANO_BEIR) == 13
    assert task.documents == {"1": "one", "b": "T two"} and task.qrels == {"q": {"b": 1}}

    def fail(name, part):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(config.ConfigError, match=r"hub:some/thing: corpus cannot be loaded: ConnectionError: no route"):
        beir.read_beir("hub:some/thing", "test")
    assert evaluate.split_of("hub:some/thing:dev") == ("hub:some/thing", "dev")
    assert evaluate.split_of("/a/b") == ("/a/b", "test") and evaluate.label("hub:some/thing") == "thing"


def test_costs_stand_beside_the_measures(task, capsys):
    evaluate.main(["bm25", str(task), f"{task}:dev"])
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == [*evaluate.MEASURES, *evaluate.COSTS]
    assert [line.split()[0] for line in lines] == [task.name, task.name, "mean"]
    with pytest.raises(SystemExit, match="--document-length is for late-interaction models"):
        evaluate.main(["bm25", str(task), "--document-length", "9"])
