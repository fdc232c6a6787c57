"""Data sets as rows of texts, in an order that is a function of the step alone: resuming is starting at another step.

Formats of a source:

- `.jsonl`, `.jsonl.gz`: one object a line, in any of these forms (and the names that PyLate and others use for them):
  {query, positive}; {query, positive, negatives} or negative, negative_1, ...; {query, documents, scores}, the positive first;
  {query_id, document_ids, scores} with `corpus`, a BEIR folder; {text}. What training.mine and training.score write.
- a BEIR folder (corpus.jsonl, queries.jsonl, qrels/<split>.tsv, each plain or .gz): a row is a query with one of its relevant
  documents, drawn anew each epoch. `kind = "titles"`: title -> text of each document; "texts": all queries and documents.
- a folder that training.teach wrote, with `corpus`: a row is a query with some of its relevant documents and some of those
  that the teacher puts first, and other queries about these documents; scores are those of all pairs in the batch.
- `hub:owner/name`: a data set of the Hugging Face hub, with the columns above.

A batch comes from one source. Rows of a source are a new permutation each epoch; `streaming` instead reads in order and
shuffles blocks of `buffer` rows, so that nothing but a block is held.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from training.config import Config, ConfigError, Source

COLUMNS = {
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


class BadRow(ValueError):
    """A row that cannot be read; the message begins with file and line."""


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
    for place, record in _records(folder / "corpus.jsonl"):
        titles[_text(record, "_id", place)] = (record.get("title") or "", _text(record, "text", place))
    for place, record in _records(folder / "queries.jsonl"):
        queries[_text(record, "_id", place)] = _text(record, "text", place)
    documents = {key: f"{title} {text}".strip() for key, (title, text) in titles.items()}
    task = Beir(folder, documents, titles, queries, {}, [])
    if not judged:
        return task
    match = re.fullmatch(r"(\w+)(?:\[([\d.]+):([\d.]+)\])?", split)
    if not match:
        raise ConfigError(f'{folder}: split is {split!r}; want a name, or a share such as "train[0.0:0.9]"')
    name, start, stop = match[1], float(match[2] or 0), float(match[3] or 1)
    qrels = _qrels(folder, name, queries, documents)
    if name != "test" and _exists(folder / "qrels" / "test.tsv"):
        task.held_out = frozenset(plain(queries[each]) for each in _qrels(folder, "test", queries, documents))
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


def _qrels(
    folder: Path, name: str, queries: Mapping[str, str], documents: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    path = folder / "qrels" / f"{name}.tsv"
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_lines(path), start=1):
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
        return parse(self.records[index], f"{self.source.path}:{index + 1}", self.source, self.task, index)


class TaughtRows(Rows):
    """What training.teach wrote. A row is a judged query; of the others, those about its documents come along."""

    def __init__(self, folder: Path, source: Source) -> None:
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
        self.judged = [n for n, grades in enumerate(self.relevant) if grades]
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


class Lines:
    """The objects of a .jsonl file: line starts are held, lines are read when asked for. A .gz is held unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix == ".gz":
            try:
                self.data: Any = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
            except (OSError, EOFError) as error:
                raise BadRow(f"{path}: {error}") from None
        else:
            self.data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        step = 1 << 26
        ends = [np.flatnonzero(self.data[at : at + step] == 10) + at + 1 for at in range(0, len(self.data), step)]
        self.starts = np.concatenate([[0], *ends]).astype(np.int64)
        if self.starts[-1] != len(self.data):
            self.starts = np.append(self.starts, len(self.data))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        raw = bytes(self.data[self.starts[index] : self.starts[index + 1]])
        return _object(raw, f"{self.path}:{index + 1}")


def parse(record: Mapping[str, Any], place: str, source: Source, task: Beir | None, index: int = 0) -> Row:
    """A record in any of the forms above."""

    def get(name: str) -> Any:
        names = (source.columns[name],) if name in source.columns else COLUMNS[name]
        return next((record[each] for each in names if record.get(each) is not None), None)

    query, documents, scores = get("query"), get("documents"), get("scores")
    keys: list[str] | None = None
    if get("document_ids") is not None:
        if task is None:
            raise BadRow(f"{place}: it has document_ids, so data.sources needs corpus, the BEIR folder they stand in")
        keys = [str(key) for key in get("document_ids")]
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
        documents = [get("positive"), *([negatives] if isinstance(negatives, str) else negatives), *more]
    if query is None and documents is None:
        query = get("text")
    if query is None and documents is None:
        wanted = "query and positive, query and documents, query_id and document_ids, or text"
        raise BadRow(f"{place}: it has {', '.join(record) or 'nothing'}; want {wanted}")
    documents = [] if documents is None else documents
    if not isinstance(query or "", str) or not all(isinstance(each, str) for each in documents):
        raise BadRow(f"{place}: the query and the documents must be text")
    if scores is not None:
        if len(scores) != len(documents):
            raise BadRow(f"{place}: {len(scores)} scores for {len(documents)} documents")
        if not np.isfinite(scores).all():
            raise BadRow(f"{place}: a score is not a finite number")
    keys = documents if keys is None else keys
    # Mined rows name the other right documents, which may stand in the batch as negatives.
    relevant = frozenset(map(str, record.get("relevant_ids") or keys[:1]))
    return Row(query or "", list(documents), scores, list(keys), relevant, index)


def open_rows(source: Source, limit: int | None = None) -> Rows:
    path = Path(source.path)
    if source.path.startswith("hub:"):
        records = _hub(source)
        rows: Rows = RecordRows(records if limit is None else records.select(range(min(limit, len(records)))), source)
        return rows
    if path.is_dir():
        split = source.split
        if (path / "scores.npy").exists():
            rows = TaughtRows(path, source)
        elif source.kind == "titles":
            task = read_beir(path, judged=False)
            has_test = _exists(path / "qrels" / "test.tsv")
            held_out = _qrels(path, "test", task.queries, task.documents) if has_test else {}
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
            yield from _records(Path(self.source.path))


class Batches:
    """Step -> the rows of its batch that belong to this rank. A map-style data set for torch's DataLoader.

    Everything random is a function of (data seed, source, step or epoch), so any step can be asked for at any time, and
    the rows of the whole batch do not depend on how many ranks share it.
    """

    def __init__(self, config: Config, collate: Any, rank: int = 0, ranks: int = 1) -> None:
        train, self.sources = config.train, config.data.sources
        self.seed = train.seed if train.data_seed is None else train.data_seed
        self.batch, self.rank, self.ranks, self.collate = train.batch, rank, ranks, collate
        if train.batch % ranks:
            raise ConfigError(f"train.batch is {train.batch}; want a multiple of the {ranks} devices")
        self.negatives = config.data.negatives
        self.rows: list[Rows | Stream] = []
        counts = []
        for number, source in enumerate(self.sources):
            if source.streaming:
                if Path(source.path).is_dir() or not (source.path.startswith("hub:") or Path(source.path).exists()):
                    raise ConfigError(f"data.sources: {source.path}: want a .jsonl file or hub:owner/name to stream")
                self.rows.append(Stream(source, [self.seed, number]))
                continue
            rows = open_rows(source, config.data.limit)
            if len(rows) < train.batch:
                raise ConfigError(
                    f"{source.path} has {len(rows)} rows; want at least train.batch, which is {train.batch}"
                )
            self.rows.append(rows)
            counts.append(len(rows) // train.batch)
        whole = len(counts) == len(self.sources)
        if train.steps is None and not whole:
            raise ConfigError("train.steps is missing: a streamed data set has no known length")
        self.steps = train.steps or max(1, round(train.epochs * sum(counts)))
        rng = np.random.default_rng([self.seed, 0x5EED])
        weights = [source.weight for source in self.sources]
        if whole and all(weight is None for weight in weights):
            order: list[np.ndarray] = []
            every = np.repeat(np.arange(len(counts)), counts)
            while sum(map(len, order)) < self.steps:
                order.append(rng.permutation(every))
            self.choice = np.concatenate(order)[: self.steps]
        else:
            if any(weight is None for weight in weights) and len(weights) > 1:
                raise ConfigError("data.sources: give every data set a weight, as some have one or are streamed")
            shares = np.array([weight or 1.0 for weight in weights])
            self.choice = rng.choice(len(shares), self.steps, p=shares / shares.sum())
        # The how-manieth batch of its source a step is.
        self.turn = np.zeros(self.steps, np.int64)
        for number in range(len(self.sources)):
            mine = self.choice == number
            self.turn[mine] = np.arange(mine.sum())
        self._order: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def notes(self) -> list[str]:
        return [note for rows in self.rows if isinstance(rows, Rows) for note in rows.notes]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Any:
        return self.collate(self.rows_of(step), int(self.choice[step]))

    def rows_of(self, step: int) -> list[Row]:
        number, turn = int(self.choice[step]), int(self.turn[step])
        rows, share = self.rows[number], self.batch // self.ranks
        first = self.rank * share
        if isinstance(rows, Stream):
            chosen = rows.rows(turn * self.batch + first, share)
        else:
            epoch, place = divmod(turn, len(rows) // self.batch)
            at = place * self.batch + first
            indices = self._permutation(number, epoch)[at : at + share]
            rngs = [np.random.default_rng([self.seed, step, first + n]) for n in range(share)]
            chosen = [rows.row(int(index), rng) for index, rng in zip(indices, rngs, strict=True)]
        return [self._drawn(row, step, first + n) for n, row in enumerate(chosen)]

    def _drawn(self, row: Row, step: int, place: int) -> Row:
        """The row with as many negatives as wanted."""
        wanted = self.negatives
        if wanted is None or len(row.documents) <= wanted + 1:
            return row
        rng = np.random.default_rng([self.seed, step, place, 1])
        kept = [0, *(1 + np.sort(rng.permutation(len(row.documents) - 1)[:wanted])).tolist()]
        scores = None if row.scores is None else [row.scores[n] for n in kept]
        documents, keys = [row.documents[n] for n in kept], [row.keys[n] for n in kept]
        return Row(row.query, documents, scores, keys, row.relevant, row.index)

    def _permutation(self, number: int, epoch: int) -> np.ndarray:
        if self._order.get(number, (-1,))[0] != epoch:
            rows = self.rows[number]
            assert isinstance(rows, Rows)
            self._order[number] = epoch, np.random.default_rng([self.seed, number, epoch]).permutation(len(rows))
        return self._order[number][1]


def _hub(source: Source) -> Any:
    import datasets

    name = source.path.removeprefix("hub:")
    try:
        return datasets.load_dataset(name, source.name, split=source.split, streaming=source.streaming)
    except Exception as error:  # the hub, a proxy, a cache: whatever it was, say which data set
        raise ConfigError(f"{source.path}: cannot be loaded: {type(error).__name__}: {error}") from error


def _exists(path: Path) -> bool:
    return path.exists() or path.with_name(path.name + ".gz").exists()


def _lines(path: Path) -> Iterator[str]:
    compressed = path if path.suffix == ".gz" else path.with_name(path.name + ".gz")
    try:
        if path.exists() and path.suffix != ".gz":
            with path.open(encoding="utf-8", newline="\n") as file:
                yield from file
        elif compressed.exists():
            with gzip.open(compressed, "rt", encoding="utf-8", newline="\n") as file:
                yield from file
        else:
            raise ConfigError(f"{path} does not exist, with or without .gz")
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise BadRow(f"{path}: {error}") from None


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _object(line, place)


def _object(line: str | bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadRow(f"{place}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadRow(f"{place}: want an object, not {type(record).__name__}")
    return record


def _text(record: Mapping[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise BadRow(f"{place}: {name} is {value!r}; want text")
    return value
