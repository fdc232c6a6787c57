"""The standard library cut into entries to learn from, entries to tune on and entries to be measured on.

Each becomes a folder in the layout of BEIR, with documents of its own: nothing that is measured was seen in training, not
even as a negative. An entry's part is a function of its first sentence alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from demo.corpus import Document, Task

PARTS = {"train": 0.45, "dev": 0.08, "test": 0.2}  # the others are only searched
MIN_WORDS = 3  # of a first sentence whose entry's name is worth learning


def part_of(sentence: str) -> str:
    """train, dev, test, or "" for none of them."""
    share = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:6], "big") / 2**48
    for part, size in PARTS.items():
        share -= size
        if share < 0:
            return part
    return ""


def write(task: Task, folder: Path) -> dict[str, int]:
    """The folders train, dev and test, and names.jsonl, the pairs of stage 1; how many queries or pairs each has."""
    queries: dict[str, dict[str, dict[int, int]]] = {part: {} for part in PARTS}
    for query, grades in zip(task.queries, task.relevant, strict=True):
        if part := part_of(query):
            queries[part][query] = grades
    held_out = {task.documents[n].text for part in ("dev", "test") for grades in queries[part].values() for n in grades}
    # Some texts stand under two first sentences.
    repeated = {n for n, document in enumerate(task.documents) if document.text in held_out}
    queries["train"] = {query: grades for query, grades in queries["train"].items() if not repeated & grades.keys()}
    counts = {}
    for part, own in queries.items():
        write_beir(folder / part, part, task.documents, own)
        counts[part] = len(own)
    asked = queries["dev"].keys() | queries["test"].keys()
    learned = {n for grades in queries["train"].values() for n in grades}
    entries = [document for n, document in enumerate(task.documents) if n in learned] + task.others
    pairs = {
        f"{entry.heading} {entry.text}".strip(): words(entry.name)
        for entry in entries
        if entry.heading not in asked and entry.text not in held_out and len(entry.heading.split()) >= MIN_WORDS
    }
    _lines(folder / "names.jsonl", ({"query": name, "positive": text} for text, name in pairs.items()))
    return counts | {"names": len(pairs)}


def write_beir(folder: Path, split: str, documents: list[Document], queries: Mapping[str, Mapping[int, int]]) -> None:
    """Only the documents that are right for one of the queries."""
    kept = sorted({n for grades in queries.values() for n in grades})
    _lines(folder / "corpus.jsonl", ({"_id": f"d{n}", "title": "", "text": documents[n].text} for n in kept))
    _lines(folder / "queries.jsonl", ({"_id": f"q{n}", "text": query} for n, query in enumerate(queries)))
    rows = ["query-id\tcorpus-id\tscore"]
    rows += [f"q{n}\td{number}\t{grade}" for n, own in enumerate(queries.values()) for number, grade in own.items()]
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def words(name: str) -> str:
    """`http.client.HTTPConnection.set_tunnel` as words: "http client HTTP Connection set tunnel"."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name))


def _lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8")
