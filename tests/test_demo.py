"""The demonstration without its encoder: reading tasks, measuring rankings, ranking, caching, highlighting."""

import ast
import asyncio
import gzip
import io
import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tqdm")
pytest.importorskip("rich")
from rich.console import Console  # noqa: E402

from demo import cache, corpus, held_out, highlight, metrics, search, timing  # noqa: E402
from demo.vectors import TokenVectors  # noqa: E402
from edgecolbert_kernels.cli import encoders  # noqa: E402

try:
    from demo import shown, story
except ImportError:
    shown = story = None
needs_training = pytest.mark.skipif(story is None, reason="the extras of [train] are not installed")


class WordEncoder:
    """One token a word, and one in front that is not text; equal words get equal unit vectors."""

    name = fingerprint = "words"

    def __init__(self):
        self.calls = 0

    def fit(self, texts):
        pass

    def encode_documents(self, texts, report=None):
        self.calls += 1
        return [torch.stack([self.vector(w) for w in ["", *t.lower().split()]]) for t in texts]

    def encode_queries(self, texts, report=None):
        return [torch.stack([self.vector(w) for w in t.lower().split()]) for t in texts]

    def spans(self, text):
        return [(0, 0), *(word.span() for word in highlight.UNBROKEN.finditer(text))]

    def state(self):
        return {"scale": torch.ones(1)}

    def load_state(self, state):
        self.scale = state["scale"]

    @staticmethod
    def vector(word):
        generator = torch.Generator().manual_seed(int.from_bytes(word.encode()[:6], "little"))
        return torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)


def make_task(texts, queries, relevant):
    documents = [corpus.Document(str(i), "", text) for i, text in enumerate(texts)]
    return corpus.Task("made up", documents, queries, relevant, max_tokens=8, samples=[], notes=[])


@pytest.fixture
def animals():
    return make_task(
        ["the cat sat on the mat", "dogs bark at night", "a fish swims deep"],
        ["cat mat", "fish deep", "dogs"],
        [{0: 1}, {2: 1}, {1: 1}],
    )


def write_beir(folder, opener, suffix):
    records = {
        "corpus.jsonl": [
            {"_id": "d1", "title": "On cats", "text": "They purr."},
            {"_id": "d2", "title": "", "text": "Dogs é."},
            {"_id": "d3", "text": "No title."},
        ],
        "queries.jsonl": [{"_id": "q1", "text": "who purrs"}, {"_id": "q2", "text": "unjudged"}],
    }
    (folder / "qrels").mkdir()
    for name, lines in records.items():
        with opener(folder / (name + suffix), "wt", encoding="utf-8") as file:
            file.write("\n".join(json.dumps(line) for line in lines) + "\n")
    with opener(folder / "qrels" / ("test.tsv" + suffix), "wt", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq1\tgone\t1\nq1\td3\t1\n")


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Opens a file.  Then closes\n    it.", ("Opens a file.", "Then closes it.")),
        ("Summary without a stop\n\nAnd the\nrest.", ("Summary without a stop", "And the rest.")),
        ("Uses e.g. commas and os.path too. `x` follows", ("Uses e.g. commas and os.path too.", "`x` follows")),
        ("Only one sentence.", ("Only one sentence.", "")),
        ("", ("", "")),
    ],
)
def test_first_sentence(docstring, expected):
    assert corpus.split_first_sentence(docstring) == expected


def test_docstrings_have_dotted_names():
    source = '''
"""Module."""
class Outer:
    """Class."""
    if True:
        async def method(self):
            """Method."""
            def inner():
                """Inner."""
def bare():
    "not a docstring".upper()
'''
    assert list(corpus.docstrings(ast.parse(source), "m")) == [
        ("m", "Module."),
        ("m.Outer", "Class."),
        ("m.Outer.method", "Method."),
        ("m.Outer.method.inner", "Inner."),
    ]


def test_sources_that_cannot_be_parsed_are_passed_over(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text('"""Find the nearest of all things. It looks at one after the other."""')
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "nul.py").write_bytes(b"x = 1\0")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text('"""Never read this file at all. It belongs to the tests."""')
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    task = corpus.standard_library()
    assert [document.name for document in task.documents] == ["good"]
    assert task.queries == ["Find the nearest of all things."]
    assert task.relevant == [{0: 1}]


def test_a_library_without_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--data"):
        corpus.standard_library()


def test_a_part_of_the_real_library(monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(Path(asyncio.__file__).parent))
    task = corpus.standard_library()
    assert len(task.documents) > 100
    assert len(task.queries) == len(set(task.queries)) == len(task.relevant)
    judged = [number for grades in task.relevant for number in grades]
    assert sorted(judged) == list(range(len(task.documents)))


@pytest.mark.parametrize(("opener", "suffix"), [(open, ""), (gzip.open, ".gz")])
def test_beir_folder(tmp_path, opener, suffix):
    write_beir(tmp_path, opener, suffix)
    task = corpus.beir(tmp_path)
    assert [document.text for document in task.documents] == ["On cats They purr.", "Dogs é.", "No title."]
    assert task.queries == ["who purrs"]
    assert task.relevant == [{0: 2, 2: 1}]
    assert len(task.notes) == 1


def test_missing_beir_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl"):
        corpus.beir(tmp_path)


def test_subsample_keeps_judgements_right(animals):
    assert corpus.subsample(animals, 3) is animals
    small = corpus.subsample(animals, 2)
    assert len(small.documents) == 2
    assert small == corpus.subsample(animals, 2)
    for query, grades in zip(small.queries, small.relevant, strict=True):
        (number,) = grades
        assert query.split()[0] in small.documents[number].text
    assert "1 of 3" in small.notes[-1]


def test_metrics_by_hand():
    grades = {7: 2, 9: 1}
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert metrics.ndcg([7, 9, 1], grades) == pytest.approx(1.0)
    assert metrics.ndcg([9, 1, 7], grades) == pytest.approx((1 + 2 / math.log2(4)) / ideal)
    assert metrics.ndcg([1, 2], grades) == 0
    assert metrics.ndcg([1, 2, 7], grades, depth=2) == 0
    assert metrics.reciprocal_rank([1, 9, 7], grades) == pytest.approx(1 / 2)
    assert metrics.reciprocal_rank([1, 9], grades, depth=1) == 0


def test_token_vectors():
    vectors = TokenVectors.from_texts([torch.ones(2, 3), torch.zeros(0, 3), torch.full((1, 3), 2.0)])
    assert vectors.values.dtype is torch.float16
    assert vectors.offsets.tolist() == [0, 2, 2, 3]
    assert [len(view) for view in vectors.views()] == [2, 0, 1]
    values, mask = vectors.padded()
    assert values.shape == (3, 2, 3)
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    assert values[2].tolist() == [[2.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_ranking(animals, precision):
    encoder = WordEncoder()
    documents = TokenVectors.from_texts(encoder.encode_documents([document.text for document in animals.documents]))
    queries = TokenVectors.from_texts(encoder.encode_queries(animals.queries))
    scores, numbers = search.rank(queries, documents, 10, precision=precision)
    assert scores.shape == numbers.shape == (3, 3)
    assert numbers[:, 0].tolist() == [0, 2, 1]
    assert scores[:, 0].tolist() == pytest.approx([2, 2, 1], abs=1e-2)


def test_timed_scorers_agree(animals, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS_A_SHAPE", 0)
    encoder = WordEncoder()
    documents = TokenVectors.from_texts(encoder.encode_documents([document.text for document in animals.documents]))
    assert timing._save(TokenVectors.from_texts(encoder.encode_queries(animals.queries)), documents, tmp_path) == 3
    measured = {name: timing._measure(name, tmp_path) for name in timing.CONTENDERS}
    assert max(measurement.max_error for measurement in measured.values()) < 5e-4
    assert all(measurement.single_s > 0 and measurement.batch_s > 0 for measurement in measured.values())
    stored = [measurement.document_bytes for measurement in measured.values()]
    assert stored[0] == 2 * stored[1] > 2 * stored[-1]


def test_encodings_are_kept(animals, tmp_path):
    encoder = WordEncoder()
    first = cache.encode(animals, encoder, tmp_path)
    second = cache.encode(animals, encoder, tmp_path)
    assert encoder.calls == 1
    assert encoder.scale.tolist() == [1]
    for kept, fresh in zip(second, first, strict=True):
        assert torch.equal(kept.values, fresh.values)
        assert torch.equal(kept.offsets, fresh.offsets)

    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    cache.encode(animals, encoder, tmp_path)
    assert encoder.calls == 2
    encoder.fingerprint = "other words"
    cache.encode(animals, encoder, tmp_path)
    assert encoder.calls == 3


def test_winning_words_are_marked():
    text = "The cat sat; on a mat."
    encoder = WordEncoder()
    (document,), (query,) = encoder.encode_documents([text]), encoder.encode_queries(["mat. cat"])
    marked = highlight.winning_words(query, document, encoder.spans(text), text)
    assert [text[start:stop] for start, stop in marked] == ["cat", "mat"]
    assert str(highlight.excerpt(text, marked, colour=False)) == "The «cat» sat; on a «mat»."
    coloured = highlight.excerpt(text, marked, colour=True)
    assert str(coloured) == text
    assert [text[span.start : span.end] for span in coloured.spans] == ["cat", "mat"]


def test_tokens_that_are_not_text_mark_nothing():
    text = "some words"
    encoder = WordEncoder()
    assert (
        highlight.winning_words(
            encoder.vector("")[None], encoder.encode_documents([text])[0], encoder.spans(text), text
        )
        == []
    )


def test_part_of_a_word_marks_the_word():
    document = torch.eye(2)
    assert highlight.winning_words(document[1:], document, [(0, 3), (3, 6)], "tokens go") == [(0, 6)]


def test_excerpt_shows_where_the_marks_are():
    words = [f"w{i}" for i in range(100)]
    text = " ".join(words)
    marked = [(text.index(word), text.index(word) + len(word)) for word in ("w3", "w50", "w52")]
    assert str(highlight.excerpt(text, marked, num_words=5, colour=False)) == "… w48 w49 «w50» w51 «w52» …"
    assert str(highlight.excerpt(text, [], num_words=2, colour=False)) == "w0 w1 …"


def test_principal_directions_keep_inner_products():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    projection = encoders.principal_directions(rows, 3)
    torch.testing.assert_close(projection.T @ projection, torch.eye(3))
    torch.testing.assert_close((rows @ projection) @ (rows @ projection).T, rows @ rows.T, rtol=0, atol=1e-3)


def test_a_server_that_is_not_there_does_not_answer():
    assert not encoders._answers("http://127.0.0.1:9")


@pytest.fixture
def library():
    """Forty entries, two of which share their text, and one that is too short for a question."""
    documents = [
        corpus.Document(f"pack.ModuleX.get_item{n}", f"Question number {n} here.", f"Text {n % 39} of it.")
        for n in range(40)
    ]
    queries = [document.heading for document in documents]
    others = [corpus.Document("pack.thing", "Only one sentence.", ""), corpus.Document("pack.it", "Short.", "")]
    relevant = [{n: 1} for n in range(40)]
    return corpus.Task("made up", documents, queries, relevant, 8, samples=[], notes=[], others=others)


def test_what_is_measured_is_in_no_part_that_is_learned(library, tmp_path):
    counts = held_out.write(library, tmp_path)
    texts, questions = {}, {}
    for part in held_out.PARTS:
        folder = tmp_path / part
        texts[part] = {json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()}
        questions[part] = {json.loads(line)["text"] for line in (folder / "queries.jsonl").read_text().splitlines()}
        assert counts[part] == len(questions[part]) > 0
    assert not texts["train"] & (texts["dev"] | texts["test"])
    assert not questions["train"] & (questions["dev"] | questions["test"])
    pairs = [json.loads(line) for line in (tmp_path / "names.jsonl").read_text().splitlines()]
    for pair in pairs:
        assert not any(text in pair["positive"] for part in ("dev", "test") for text in texts[part] | questions[part])
    assert {"query": "pack thing", "positive": "Only one sentence."} in pairs
    assert "pack it" not in {pair["query"] for pair in pairs}


def test_names_as_words():
    assert held_out.words("http.client.HTTPConnection.set_tunnel") == "http client HTTP Connection set tunnel"


def test_folders_are_read_by_training(library, tmp_path):
    beir = pytest.importorskip("training.beir")
    held_out.write(library, tmp_path)
    task = beir.read_beir(tmp_path / "test", "test")
    assert len(task.qrels) == len(task.queries) and len(task.documents) >= len(task.qrels)


def chapter(name, values, seconds=0.0):
    return story.Chapter(name, name, "what", list(values), seconds)


@needs_training
def test_bars_are_as_long_as_their_values():
    assert shown.bar(1.0, 1.0, 4) == "████" and shown.bar(0.5, 1.0, 4) == "██"
    assert shown.bar(0.27, 1.0, 4) == "█▏" and shown.bar(0.0, 1.0, 4) == ""


@needs_training
def test_gains_are_over_the_line_above_and_only_of_stages(tmp_path):
    values = [0.1 * (n % 10) for n in range(200)]
    chapters = [chapter("BM25", values), chapter("start", values)]
    chapters += [chapter("1", [v + 0.1 for v in values], 3), chapter("2", values[::-1], 4)]
    found = shown.gains(chapters)
    assert found[:2] == [None, None]
    assert found[2] == pytest.approx((0.1, 0.1, 0.1))
    mean, low, high = found[3]
    assert low < mean < high and mean == pytest.approx(-0.1)

    console = Console(width=80, record=True, file=io.StringIO())
    shown.table(console, chapters)
    told = console.export_text()
    assert "+0.100 ± 0.000" in told and "█" in told
    shown.plot(chapters, "title", tmp_path / "stages.png")
    assert (tmp_path / "stages.png").stat().st_size > 1000


@needs_training
def test_a_folder_made_from_something_else_is_made_again(tmp_path):
    folder = tmp_path / "stage"
    assert story._stale(folder, "a")
    (folder / "checkpoint").write_text("begun")
    assert story._stale(folder, "a") and (folder / "checkpoint").exists()  # goes on
    story._fresh(folder, "a")
    assert not story._stale(folder, "a")
    assert story._stale(folder, "b") and not (folder / "checkpoint").exists()


@needs_training
@pytest.mark.parametrize("prefix", [None, ""])
def test_a_trained_checkpoint_tells_where_its_vectors_stand(tmp_path, prefix):
    """What training saves, as the command line loads it: a span a vector, prefix and punctuation accounted for."""
    tiny = pytest.importorskip("tiny")
    from training import config, model

    wanted = config.Model(base=str(tiny.encoder(tmp_path / "base")), dimension=16, document_length=24)
    wanted.query_prefix = wanted.document_prefix = prefix
    trained = model.create(wanted, "colbert").eval()
    trained.save(tmp_path / "model")
    encoder = encoders.load_encoder(str(tmp_path / "model"), 24)
    text = "word1, word2 word3. (word4)"
    (vectors,) = encoder.encode_documents([text])
    spans = encoder.spans(text)
    assert len(spans) == len(vectors)
    assert [text[start:stop] for start, stop in spans if stop > start] == ["word1", "word2", "word3", "word4"]
    features = trained.tokenize([text], False)
    with torch.no_grad():
        expected = trained(features["input_ids"], features["attention_mask"])[0][features["score_mask"][0]]
    torch.testing.assert_close(vectors.float(), expected, atol=1e-3, rtol=0)
