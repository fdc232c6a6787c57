"""Names of documents: all strings or all integers, each once. In memory a list; in a file an array, or UTF-8 and offsets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from edgecolbert_kernels import checks
from edgecolbert_kernels.storage.header import PackedFormatError

Array = np.ndarray
Id = str | int

INT64 = range(-(1 << 63), 1 << 63)


class MappedIds(Sequence[Id]):
    """Strings in a file, decoded one by one when they are asked for."""

    def __init__(self, text: Array, offsets: Array, where: str) -> None:
        self.text, self.offsets, self.where = text, offsets, where

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, slot: Any) -> Any:
        if isinstance(slot, slice):
            start, stop, _ = slot.indices(len(self))
            return MappedIds(self.text, self.offsets[start : max(start, stop) + 1], self.where)
        try:
            return str(self.text[self.offsets[slot] : self.offsets[slot + 1]].tobytes(), "utf-8")
        except UnicodeDecodeError as error:
            raise PackedFormatError(f"{self.where}: the id of document {slot} is not UTF-8 ({error})") from None


def checked(ids: Iterable[Any] | None, count: int) -> list[Id] | None:
    """The ids of `count` documents as a list.

    Raises:
        TypeError: one is neither a string nor an integer, both kinds are there, or `ids` is a string itself.
        ValueError: there are more or fewer, one stands twice, or cannot be stored.
    """
    if ids is None:
        return None
    names = [each.item() if isinstance(each, np.generic) else each for each in listed(ids)]
    if len(names) != count:
        raise checks.ids(f"{len(names)} for {count} documents", "one for each")
    if len({kind(each) for each in names}) > 1:
        raise TypeError("ids are strings and integers; want all of one kind")
    each_once(names)
    return names


def listed(ids: Iterable[Any]) -> list[Any]:
    """Ids as a list. A string is one id: its letters would name other documents.

    Raises:
        TypeError: `ids` is a string or bytes.
    """
    if isinstance(ids, (str, bytes)):
        raise checks.not_an_array("ids", ids, "a list of ids")
    return list(ids)


def each_once(names: Sequence[Id]) -> None:
    """Raise ValueError where one stands twice, as in a view that has a document twice."""
    if len(set(names)) != len(names):
        seen: set[Id] = set()
        twice = next(each for each in names if each in seen or seen.add(each))  # type: ignore[func-returns-value]
        raise checks.ids(f"{twice!r} stands twice", "each once")


def new(names: Sequence[Id], there: Collection[Id]) -> None:
    """Raise where one of `names` is there already or stands twice, or where they are of another kind."""
    each_once(names)
    if len(there) and len(names) and kind(names[0]) != kind(next(iter(there))):
        raise TypeError("ids are strings and integers; want all of one kind")
    twice = next((name for name in names if name in there), None)
    if twice is not None:
        raise checks.ids(f"{twice!r} is there already", "new ones")


def kind(name: Any) -> str:
    if isinstance(name, str):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise checks.ids(f"{name!r} is not Unicode", "what UTF-8 can hold") from None
        return "utf8"
    if type(name) is int:
        if name not in INT64:
            raise checks.ids(f"{name} is beyond 64 bits", "integers of 64 bits")
        return "int64"
    raise checks.not_an_array("an id", name, "a string or an integer")


def encode(names: Sequence[Id], at: int = 0) -> tuple[Array, Array]:
    """UTF-8 of all of them, back to back, and where each ends, the first one starting at `at`."""
    parts = [str(name).encode() for name in names]
    ends = at + np.cumsum([len(part) for part in parts], dtype=np.int64)
    return np.frombuffer(b"".join(parts), np.uint8), ends
