"""Data sets as rows of texts.

Formats of a source:

- `.jsonl`, `.jsonl.gz`: one object a line, in any of these forms (and the names that PyLate and others use for them):
  {query, positive}; {query, positive, negatives} or negative, negative_1, ...; {query, documents, scores}, the positive first;
  {query_id, document_ids, scores} with `corpus`, a BEIR folder; {text}. What training.mine and training.score write.
- a BEIR folder (training/beir.py): a row is a query with one of its relevant documents, drawn anew each epoch.
  `kind = "titles"`: title -> text of each document; "texts": all queries and documents.
- a folder that training.teach wrote, with `corpus`: a row is a query with some of its relevant documents and some of those
  that the teacher puts first, and other queries about these documents; scores are those of all pairs in the batch.
- `hub:owner/name`: a data set of the Hugging Face hub, with the columns above.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from training.beir import Beir, plain, read_beir, read_qrels
from training.config import Column, ConfigError, Source
from training.files import BadRow, Lines, exists, records

COLUMNS: dict[Column, tuple[str, ...]] = {
    "query": ("query", "anchor", "question"),
    "positive": ("positive", "pos", "answer", "document"),
    "negatives": ("negatives", "neg", "negative"),
    "documents": ("documents",),
    "scores": ("scores",),
    "query_id": ("query_id",),
    "document_ids": ("document_ids",),
    "text": ("text",),
}


@dataclass
class Row:
    """A query and its documents, the right one first; or (stage distill) only one of the two."""

    query: str = ""
    documents: list[str] = field(default_factory=list)
    scores: list[float] | None = None  # a teacher's, one for each document
    keys: list[str] = field(default_factory=list)  # what tells documents apart: ids, or the texts
    relevant: frozenset[str] = frozenset()  # keys of documents that are no negatives of this query
    index: int = 0  # in its source
    others: tuple[int, ...] = ()  # in-batch distillation: the numbers of other queries, one or more about each document


class Rows:
    """Rows by number; each draws what it may choose from `rng`."""

    notes: Sequence[str] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, index: int, rng: np.random.Generator) -> Row:
        raise NotImplementedError


class BeirRows(Rows):
    def __init__(self, task: Beir) -> None:
        self.task, self.notes = task, task.notes
        self.ids = list(task.qrels)

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, index: int, rng: np.random.Generator) -> Row:
        grades = self.task.qrels[self.ids[index]]
        best = [key for key, grade in grades.items() if grade == max(grades.values())]
        key = best[int(rng.integers(len(best)))]
        query = self.task.queries[self.ids[index]]
        return Row(query, [self.task.documents[key]], None, [key], frozenset(grades), index)


class TitleRows(Rows):
    """The texts of a corpus under their titles. Reads no query and no judgement."""

    def __init__(self, task: Beir, avoid: frozenset[str] = frozenset()) -> None:
        self.task = task
        self.ids = [
            each
            for each, (title, text) in task.titles.items()
            if len(title.split()) > 2 and len(text.split()) > 9 and plain(title) not in avoid
        ]

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, index: int, rng: np.random.Generator) -> Row:
        key = self.ids[index]
        title, text = self.task.titles[key]
        return Row(title, [text], None, [key], frozenset([key]), index)


class TextRows(Rows):
    def __init__(self, task: Beir) -> None:
        self.texts = [(task.queries[each], True) for each in task.qrels] + [(t, False) for t in task.documents.values()]

    def __len__(self) -> int:
        return len(self.texts)

    def row(self, index: int, rng: np.random.Generator) -> Row:
        text, is_query = self.texts[index]
        return Row(query=text, index=index) if is_query else Row(documents=[text], index=index)


class RecordRows(Rows):
    """Records (of a file or of the hub) read as rows."""

    def __init__(self, records: Any, source: Source) -> None:
        self.records, self.source = records, source
        self.task = read_beir(source.corpus, judged=False) if source.corpus else None

    def __len__(self) -> int:
        return len(self.records)

    def row(self, index: int, rng: np.random.Generator) -> Row:
        own = self.records
        place = own.place(index) if isinstance(own, Lines) else f"{self.source.path}:{index + 1}"
        return parse(own[index], place, self.source, self.task, index)


class TaughtRows(Rows):
    """What training.teach wrote. A row is a judged query; of the others, those about its documents come along."""

    def __init__(self, folder: Path, source: Source, limit: int | None = None) -> None:
        if source.corpus is None:
            raise ConfigError(f"{folder}: data.sources needs corpus, the BEIR folder that was taught")
        self.task, self.source = read_beir(source.corpus, judged=False), source
        self.ids = list(self.task.documents)
        self.numbers = {key: n for n, key in enumerate(self.ids)}
        lines = Lines(folder / "queries.jsonl")
        records = [lines[n] for n in range(len(lines))]
        self.scores = np.load(folder / "scores.npy", mmap_mode="r")
        if self.scores.shape != (len(records), len(self.ids)):
            raise ConfigError(
                f"{folder}: scores.npy has the shape {self.scores.shape}; want {len(records)} queries and the {len(self.ids)}"
                f" documents of {source.corpus}"
            )
        self.queries = [record["query"] for record in records]
        self.relevant = [record["relevant"] for record in records]
        self.judged = [n for n, grades in enumerate(self.relevant) if grades][:limit]
        self.about: dict[str, list[int]] = {}
        for n, record in enumerate(records):
            if record["about"] is not None:
                self.about.setdefault(record["about"], []).append(n)

    def __len__(self) -> int:
        return len(self.judged)

    def row(self, index: int, rng: np.random.Generator) -> Row:
        number, source = self.judged[index], self.source
        grades = self.relevant[number]
        own = list(grades)
        keys = [own[n] for n in rng.permutation(len(own))[: source.positives]]
        # The first of the teacher's are the hard ones, relevant by its lights or not.
        best = np.argsort(-self.scores[number].astype(np.float32), kind="stable")
        hard = [self.ids[n] for n in best[: source.depth + len(own)] if self.ids[n] not in grades][: source.depth]
        keys += [hard[n] for n in rng.permutation(len(hard))[: source.hard]]
        others = [n for key in keys for n in rng.permutation(self.about.get(key, []))[: source.about].tolist()]
        documents = [self.task.documents[key] for key in keys]
        return Row(self.queries[number], documents, None, keys, frozenset(grades), number, tuple(others))

    def targets(self, queries: Sequence[int], keys: Sequence[str], bonus: float) -> np.ndarray:
        """float32 `[queries, keys]`: the teacher's scores, and `bonus` times the grade where there is one."""
        scores = self.scores[np.ix_(queries, [self.numbers[key] for key in keys])].astype(np.float32)
        grades = [[self.relevant[n].get(key, 0) for key in keys] for n in queries]
        return scores + bonus * np.array(grades, np.float32)


def parse(record: Mapping[str, Any], place: str, source: Source, task: Beir | None, index: int = 0) -> Row:
    """A record in any of the forms above."""

    def get(name: Column) -> Any:
        names = (source.columns[name],) if name in source.columns else COLUMNS[name]
        return next((record[each] for each in names if record.get(each) is not None), None)

    query, documents, scores = get("query"), get("documents"), get("scores")
    keys: list[str] | None = None
    if get("document_ids") is not None:
        if task is None:
            raise BadRow(f"{place}: it has document_ids, so data.sources needs corpus, the BEIR folder they stand in")
        keys = [str(key) for key in listed(get("document_ids"), "document_ids", place)]
        missing = next((key for key in keys if key not in task.documents), None)
        if missing is not None:
            raise BadRow(f"{place}: {task.folder} has no document {missing!r}")
        documents = [task.documents[key] for key in keys]
        if query is None:
            query = task.queries.get(str(get("query_id")))
            if query is None:
                raise BadRow(f"{place}: {task.folder} has no query {get('query_id')!r}")
    elif documents is None and get("positive") is not None:
        negatives = get("negatives") or []
        more = [record[name] for name in record if re.fullmatch(r"negative_\d+", name)]
        negatives = [negatives] if isinstance(negatives, str) else listed(negatives, "negatives", place)
        documents = [get("positive"), *negatives, *more]
    if query is None and documents is None:
        query = get("text")
    if query is None and documents is None:
        wanted = "query and positive, query and documents, query_id and document_ids, or text"
        raise BadRow(f"{place}: it has {', '.join(record) or 'nothing'}; want {wanted}")
    documents = [] if documents is None else listed(documents, "documents", place)
    if not isinstance(query or "", str) or not all(isinstance(each, str) for each in documents):
        raise BadRow(f"{place}: the query and the documents must be text")
    if scores is not None:
        if len(listed(scores, "scores", place)) != len(documents):
            raise BadRow(f"{place}: {len(scores)} scores for {len(documents)} documents")
        if not all(isinstance(score, (int, float)) and math.isfinite(score) for score in scores):
            raise BadRow(f"{place}: a score is not a finite number")
    keys = documents if keys is None else keys
    # Mined rows name the other right documents, which may stand in the batch as negatives.
    relevant = frozenset(map(str, listed(record.get("relevant_ids") or keys[:1], "relevant_ids", place)))
    return Row(query or "", list(documents), scores, list(keys), relevant, index)


def listed(value: Any, name: str, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow(f"{place}: {name} is {value!r}; want a list")
    return value


def open_rows(source: Source, limit: int | None = None) -> Rows:
    path = Path(source.path)
    if source.path.startswith("hub:"):
        records = _hub(source)
        rows: Rows = RecordRows(records if limit is None else records.select(range(min(limit, len(records)))), source)
        return rows
    if path.is_dir():
        split = source.split
        if (path / "scores.npy").exists():
            # Cut by itself: a stage asks it for more than rows.
            return TaughtRows(path, source, limit)
        elif source.kind == "titles":
            task = read_beir(path, judged=False)
            has_test = exists(path / "qrels" / "test.tsv")
            held_out = read_qrels(path, "test", task.queries, task.documents) if has_test else {}
            rows = TitleRows(task, frozenset(plain(task.queries[each]) for each in held_out))
        else:
            task = read_beir(path, split)
            rows = TextRows(task) if source.kind == "texts" else BeirRows(task)
    elif path.exists():
        rows = RecordRows(Lines(path), source)
    else:
        raise ConfigError(f"data.sources: {path} does not exist")
    return _First(rows, limit) if limit is not None and limit < len(rows) else rows


class _First(Rows):
    def __init__(self, rows: Rows, count: int) -> None:
        self.rows, self.count, self.notes = rows, count, rows.notes

    def __len__(self) -> int:
        return self.count

    def row(self, index: int, rng: np.random.Generator) -> Row:
        return self.rows.row(index, rng)


class Stream:
    """Rows in blocks: block b holds `buffer` rows in a shuffled order. After the last row the first comes again."""

    def __init__(self, source: Source, seed: Sequence[int]) -> None:
        self.source, self.seed = source, list(seed)
        self.task = read_beir(source.corpus, judged=False) if source.corpus else None
        self._records: Iterator[tuple[str, Mapping[str, Any]]] = iter(())
        self._block: list[tuple[str, Mapping[str, Any]]] = []
        self._number = -1

    def rows(self, start: int, count: int) -> list[Row]:
        """Rows `start` to `start + count` of the endless shuffled stream."""
        rows = []
        for position in range(start, start + count):
            block, place = divmod(position, self.source.buffer)
            self._seek(block)
            order = np.random.default_rng([*self.seed, block]).permutation(len(self._block))
            where, record = self._block[int(order[place])]
            rows.append(parse(record, where, self.source, self.task, position))
        return rows

    def _seek(self, block: int) -> None:
        if block < self._number or self._number < 0:
            self._records, self._number = self._endless(), -1
        while self._number < block:
            self._block = list(islice(self._records, self.source.buffer))
            self._number += 1

    def _endless(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        while True:
            empty = True
            for item in self._once():
                empty = False
                yield item
            if empty:
                raise ConfigError(f"{self.source.path} has no rows")

    def _once(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if self.source.path.startswith("hub:"):
            for number, record in enumerate(_hub(self.source), start=1):
                yield f"{self.source.path}:{number}", record
        else:
            yield from records(Path(self.source.path))


def _hub(source: Source) -> Any:
    import datasets

    name = source.path.removeprefix("hub:")
    try:
        return datasets.load_dataset(name, source.name, split=source.split, streaming=source.streaming)
    except Exception as error:  # the hub, a proxy, a cache: whatever it was, say which data set
        raise ConfigError(f"{source.path}: cannot be loaded: {type(error).__name__}: {error}") from error
