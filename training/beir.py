"""Retrieval tasks in the layout of BEIR: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, each plain or with .gz; or on the hub.

`hub:owner/name` is a data set with the configurations corpus, queries and qrels. The thirteen sets of NanoBEIR go by their
names alone, such as NanoSciFact.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import ConfigError
from training.files import BadRow, exists, lines, records, text_of

NANO_BEIR = [
    "NanoArguAna",
    "NanoClimateFEVER",
    "NanoDBPedia",
    "NanoFEVER",
    "NanoFiQA2018",
    "NanoHotpotQA",
    "NanoMSMARCO",
]
NANO_BEIR += ["NanoNFCorpus", "NanoNQ", "NanoQuoraRetrieval", "NanoSCIDOCS", "NanoSciFact", "NanoTouche2020"]


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
    name = str(folder)
    if name in NANO_BEIR and not Path(name).exists():
        name = f"hub:zeta-alpha-ai/{name}"
    if name.startswith("hub:"):
        return _read_hub(name.removeprefix("hub:"), split)
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


def _read_hub(name: str, split: str) -> Beir:
    """Judgements of `split`, or of the only split there is. A judgement without a score is a 1."""
    import datasets

    def table(part: str) -> Iterable[Mapping[str, Any]]:
        try:
            found = datasets.load_dataset(name, part)
        except Exception as error:  # the hub, a proxy, a cache: whatever it was, say which data set
            raise ConfigError(f"hub:{name}: {part} cannot be loaded: {type(error).__name__}: {error}") from error
        if split not in found and len(found) > 1 and part == "qrels":
            raise ConfigError(f"hub:{name}: there is no split {split}, only {', '.join(found)}")
        return found[split] if split in found else next(iter(found.values()))

    titles = {str(row["_id"]): (row.get("title") or "", row["text"]) for row in table("corpus")}
    queries = {str(row["_id"]): row["text"] for row in table("queries")}
    qrels: dict[str, dict[str, int]] = {}
    for row in table("qrels"):
        query, document, grade = str(row["query-id"]), str(row["corpus-id"]), int(row.get("score", 1))
        if grade > 0 and query in queries and document in titles:
            qrels.setdefault(query, {})[document] = grade
    documents = {key: f"{title} {text}".strip() for key, (title, text) in titles.items()}
    return Beir(Path(name), documents, titles, queries, qrels, [])


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
