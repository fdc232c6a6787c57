"""Retrieval tasks in the layout of BEIR: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, each plain or with .gz."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from training.config import ConfigError
from training.files import BadRow, exists, lines, records, text_of


@dataclass
class Beir:
    """A retrieval task. `qrels` has the queries of the split alone, and grades above 0 alone."""

    folder: Path
    documents: dict[str, str]  # title and text
    titles: dict[str, tuple[str, str]]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    notes: list[str]
    held_out: frozenset[str] = frozenset()  # what the queries of test say, as `plain` has it; for another split


def read_beir(folder: str | Path, split: str = "test", *, judged: bool = True) -> Beir:
    """A BEIR folder. Queries of another split whose text also stands in test are left out of it, and so is their judgement.

    split: test, dev or train; "train[0.0:0.9]" is a share of its queries, by the hash of their ids.
    judged: False for documents and queries without any qrels.
    """
    folder = Path(folder)
    titles, queries = {}, {}
    for place, record in records(folder / "corpus.jsonl"):
        titles[text_of(record, "_id", place)] = (record.get("title") or "", text_of(record, "text", place))
    for place, record in records(folder / "queries.jsonl"):
        queries[text_of(record, "_id", place)] = text_of(record, "text", place)
    documents = {key: f"{title} {text}".strip() for key, (title, text) in titles.items()}
    task = Beir(folder, documents, titles, queries, {}, [])
    if not judged:
        return task
    match = re.fullmatch(r"(\w+)(?:\[([\d.]+):([\d.]+)\])?", split)
    if not match:
        raise ConfigError(f'{folder}: split is {split!r}; want a name, or a share such as "train[0.0:0.9]"')
    name, start, stop = match[1], float(match[2] or 0), float(match[3] or 1)
    qrels = read_qrels(folder, name, queries, documents)
    if name != "test" and exists(folder / "qrels" / "test.tsv"):
        task.held_out = frozenset(plain(queries[each]) for each in read_qrels(folder, "test", queries, documents))
        seen = [each for each in qrels if plain(queries[each]) in task.held_out]
        for each in seen:
            del qrels[each]
        if seen:
            task.notes.append(f"{folder.name}: {len(seen)} {name} queries also stand in test, and are left out")
    by_hash = sorted(qrels, key=lambda each: hashlib.sha256(each.encode()).digest())
    kept = set(by_hash[round(start * len(qrels)) : round(stop * len(qrels))])
    task.qrels = {each: grades for each, grades in qrels.items() if each in kept}
    if not task.qrels:
        raise ConfigError(f"{folder}: there is no query with a relevant document in split {split}")
    return task


def read_qrels(
    folder: Path, name: str, queries: Mapping[str, str], documents: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    path = folder / "qrels" / f"{name}.tsv"
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(lines(path), start=1):
        cells = line.rstrip("\r\n").split("\t")
        if number == 1 or cells == [""]:
            continue
        try:
            query, document, grade = cells[0], cells[1], int(cells[2])
        except (IndexError, ValueError):
            raise BadRow(f"{path}:{number}: {line.strip()!r}; want query id, document id and a whole number") from None
        if grade > 0 and query in queries and document in documents:
            qrels.setdefault(query, {})[document] = grade
    return qrels


def plain(text: str) -> str:
    """The words alone, so that texts are the same whatever their case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))
