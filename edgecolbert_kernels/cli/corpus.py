"""Reading texts with ids: JSON lines as BEIR has them, CSV and TSV, or a folder of text files; and relevance judgements."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

ID_COLUMNS = ("_id", "id", "doc_id", "docid", "query_id", "qid")
TEXT_COLUMNS = ("text", "contents", "body", "passage", "query")
# Python's own limit of a field is 128 KiB; this one is the largest that every platform takes.
LARGEST_FIELD = (1 << 31) - 1


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """(id, text) of every document or query, in order.

    JSON lines and tables with a header have an id (`_id`, `id`, ...), a text (`text`, `contents`, ...) and may have a
    title, which goes before the text. A table without a header has the id in its first column and the text in its second.
    A .csv file quotes as RFC 4180 has it; a .tsv file does not quote, and a tab or the end of a line ends a field. In a folder
    every .txt and .md file is a document, and its path its id.

    Raises:
        FileNotFoundError, ValueError: says what and where; also where there is no text at all.
    """
    seen: set[str] = set()
    for where, identifier, text in _named(path):
        if identifier in seen:
            raise ValueError(f"{where}: the id {identifier!r} stands twice")
        seen.add(identifier)
        yield unicode(where, identifier), unicode(where, text)
    if not seen:
        raise ValueError(f"{path}: no texts" + (", no .txt or .md file" if path.is_dir() else ""))


def unicode(where: str, text: str) -> str:
    """`text`, where UTF-8 can hold it: no half of a surrogate pair, nor the bytes of a shell that were something else.

    Raises:
        ValueError: begins with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not Unicode, character {error.start} is {text[error.start]!r}") from None
    return text


def qrels(path: Path) -> Iterator[tuple[str, str, int]]:
    """(query id, document id, grade): BEIR's three columns with a header, or TREC's four without.

    Raises:
        FileNotFoundError, ValueError: says what and where; also where there is no judgement at all.
    """
    empty = True
    for number, line in enumerate(_lines(path), 1):
        fields = line.split("\t") if "\t" in line else line.split()
        fields = [field.strip() for field in fields]
        if not line.strip() or (number == 1 and not _is_integer(fields[-1])):
            continue
        if len(fields) not in (3, 4) or not _is_integer(fields[-1]):
            raise ValueError(f"{path}:{number}: want query, document and grade, or the four columns of TREC")
        empty = False
        yield fields[0], fields[-2], int(fields[-1])
    if empty:
        raise ValueError(f"{path}: no judgements")


def _named(path: Path) -> Iterator[tuple[str, str, str]]:
    """(where, id, text)."""
    if path.is_dir():
        yield from _folder(path)
        return
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".json", ".ndjson")):
        records = _json_lines(path)
    elif name.endswith((".csv", ".tsv")):
        records = _table(_tabs(path) if name.endswith(".tsv") else _commas(path))
    else:
        raise ValueError(f"{path}: want a folder, or a .jsonl, .csv or .tsv file, each also with .gz")
    for where, record in records:
        identifier, text = _first(where, record, ID_COLUMNS, (str, int)), _first(where, record, TEXT_COLUMNS)
        if identifier is None or text is None:
            raise ValueError(f"{where}: no id or no text; there are {sorted(record)}")
        yield where, identifier, f"{_first(where, record, ('title',)) or ''} {text}".strip()


def _folder(path: Path) -> Iterator[tuple[str, str, str]]:
    for file in sorted(path.rglob("*")):
        if file.suffix in (".txt", ".md") and file.is_file():
            text = file.read_text(encoding="utf-8-sig", errors="replace")
            yield str(file), file.relative_to(path).as_posix(), text


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: not a JSON object")
        yield f"{path}:{number}", record


def _table(rows: Iterator[tuple[str, list[str]]]) -> Iterator[tuple[str, dict[str, object]]]:
    names: list[str] | None = None
    for where, row in rows:
        if names is None:
            lowered = [field.strip().lower() for field in row]
            header = any(name in lowered for name in ID_COLUMNS) and any(name in lowered for name in TEXT_COLUMNS)
            names = lowered if header else ["id", "text"]
            if header:
                continue
        yield where, dict(zip(names, row, strict=False))


def _tabs(path: Path) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(_lines(path), 1):
        if row := line.rstrip("\r\n"):
            yield f"{path}:{number}", row.split("\t")


def _commas(path: Path) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(LARGEST_FIELD)
    # Strict: a quote that is never closed would make one text of all that follows.
    rows = csv.reader(_lines(path), strict=True)
    while True:
        where = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{where}: not CSV ({error})") from None
        if row:
            yield where, row


def _first(
    where: str, record: dict[str, object], names: tuple[str, ...], kinds: tuple[type, ...] = (str,)
) -> str | None:
    found = next(((name, record[name]) for name in names if record.get(name) is not None), None)
    if found is None:
        return None
    name, value = found
    if type(value) not in kinds:
        wanted = "a string or an integer" if int in kinds else "a string"
        raise ValueError(f"{where}: {name} is {value!r:.60}; want {wanted}")
    return str(value)


def _is_integer(text: str) -> bool:
    return text.lstrip("-").isdecimal()


def _lines(path: Path) -> Iterator[str]:
    """With their ends. A byte order mark, which Excel writes, is not part of the first.

    Decoded one by one, so that the line of an error is known.
    """
    number = 1
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from None
