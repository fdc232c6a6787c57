"""Reading texts with ids: JSON lines as BEIR has them, CSV and TSV, or a folder of text files; and relevance judgements."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

ID_COLUMNS = ("_id", "id", "doc_id", "docid", "query_id", "qid")
TEXT_COLUMNS = ("text", "contents", "body", "passage", "query")


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """(id, text) of every document or query, in order.

    JSON lines and tables with a header have an id (`_id`, `id`, ...), a text (`text`, `contents`, ...) and may have a
    title, which goes before the text. A table without a header has the id in its first column and the text in its second.
    In a folder every .txt and .md file is a document, and its path its id.

    Raises:
        FileNotFoundError, ValueError: says what and where.
    """
    if path.is_dir():
        yield from _folder(path)
        return
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    name = path.name.removesuffix(".gz")
    seen: set[str] = set()
    if name.endswith((".jsonl", ".json", ".ndjson")):
        records = _json_lines(path)
    elif name.endswith((".csv", ".tsv")):
        records = _table(path, "\t" if name.endswith(".tsv") else ",")
    else:
        raise ValueError(f"{path}: want a folder, or a .jsonl, .csv or .tsv file, each also with .gz")
    for where, record in records:
        identifier, text = _first(record, ID_COLUMNS), _first(record, TEXT_COLUMNS)
        if identifier is None or text is None:
            raise ValueError(f"{where}: no id or no text; there are {sorted(record)}")
        if identifier in seen:
            raise ValueError(f"{where}: the id {identifier!r} stands twice")
        seen.add(identifier)
        yield identifier, f"{record.get('title') or ''} {text}".strip()


def qrels(path: Path) -> Iterator[tuple[str, str, int]]:
    """(query id, document id, grade): BEIR's three columns with a header, or TREC's four without."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            fields = line.split("\t") if "\t" in line else line.split()
            fields = [field.strip() for field in fields]
            if not line.strip() or (number == 1 and not _is_integer(fields[-1])):
                continue
            if len(fields) not in (3, 4) or not _is_integer(fields[-1]):
                raise ValueError(f"{path}:{number}: want query, document and grade, or the four columns of TREC")
            yield fields[0], fields[-2], int(fields[-1])


def _folder(path: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(path.rglob("*")):
        if file.suffix in (".txt", ".md") and file.is_file():
            yield file.relative_to(path).as_posix(), file.read_text(encoding="utf-8", errors="replace")


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: not a JSON object")
            yield f"{path}:{number}", record


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, object]]]:
    with _open(path) as file:
        rows = csv.reader(file, delimiter=delimiter)
        names: list[str] | None = None
        for row in rows:
            if not row:
                continue
            if names is None:
                lowered = [field.strip().lower() for field in row]
                header = any(name in lowered for name in ID_COLUMNS) and any(name in lowered for name in TEXT_COLUMNS)
                names = lowered if header else ["id", "text"]
                if header:
                    continue
            yield f"{path}:{rows.line_num}", dict(zip(names, row, strict=False))


def _first(record: dict[str, object], names: tuple[str, ...]) -> str | None:
    return next((str(record[name]) for name in names if record.get(name) is not None), None)


def _is_integer(text: str) -> bool:
    return text.lstrip("-").isdecimal()


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
