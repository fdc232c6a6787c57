"""JSON and text files, plain or with .gz: whatever cannot be read is named by file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training.config import ConfigError


class BadRow(ValueError):
    """A row that cannot be read; the message begins with file and line."""


class Lines:
    """The objects of a .jsonl file: line starts are held, lines are read when asked for. A .gz is held unpacked.

    Blank lines are no objects.
    """

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
        # A line may be blank if its first byte is: few are looked at whole.
        suspects = np.flatnonzero(np.isin(self.data[self.starts[:-1]], list(b" \t\r\n"))).tolist()
        self.lines = np.delete(np.arange(len(self.starts) - 1), [n for n in suspects if not self._line(n).strip()])

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return parse_object(self._line(self.lines[index]), self.place(index))

    def place(self, index: int) -> str:
        """File and line of an object."""
        return f"{self.path}:{self.lines[index] + 1}"

    def _line(self, number: int) -> bytes:
        return bytes(self.data[self.starts[number] : self.starts[number + 1]])


def exists(path: Path) -> bool:
    return path.exists() or path.with_name(path.name + ".gz").exists()


def lines(path: Path) -> Iterator[str]:
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


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines(path), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, parse_object(line, place)


def parse_object(line: str | bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadRow(f"{place}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadRow(f"{place}: want an object, not {type(record).__name__}")
    return record


def text_of(record: Mapping[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise BadRow(f"{place}: {name} is {value!r}; want text")
    return value


def read_json(path: Path) -> Any:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
