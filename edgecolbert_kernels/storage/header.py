"""header.json: what a folder holds, and the one place where a commit becomes visible.

The header is replaced as a whole, by a rename. It counts documents, tokens and bytes, so whatever an unfinished append has
left behind the counted bytes is not there for a reader.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edgecolbert_kernels.signatures import Storage

T = TypeVar("T", bound=str)

FORMAT = "edgecolbert-packed"
VERSION = 1
NAME = "header.json"
# Far above any header that is written; a larger file is something else, and is not read.
MOST_BYTES = 1 << 16
# Beyond these, sizes in bytes could pass 2^63.
MOST_DIMENSIONS = 1 << 16
MOST_ROWS = 1 << 44

ITEM_BYTES: dict[Storage, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}
IDS = ("none", "int64", "utf8")
_CHECKSUM = re.compile(rb'"header_crc32": "([0-9a-f]{8})"')


class PackedFormatError(ValueError):
    """A folder of packed embeddings that cannot be read as one; the message names the file and what is wrong in it."""


@dataclass(frozen=True)
class Part:
    """The committed bytes of one data file, counted from its start, and their CRC-32."""

    size: int = 0
    crc32: int = 0

    def extended(self, data: Any) -> Part:
        return Part(self.size + memoryview(data).nbytes, zlib.crc32(data, self.crc32))


@dataclass(frozen=True)
class Header:
    """A commit. `documents` counts removed ones too; `removed` says how many of them are."""

    dtype: Storage
    dim: int
    ids: str = "none"
    generation: int = 0
    documents: int = 0
    tokens: int = 0
    removed: int = 0
    parts: Mapping[str, Part] = field(default_factory=dict)

    def sizes(self) -> dict[str, int | None]:
        """Bytes of every data file that there must be; None where the counts do not tell."""
        wanted: dict[str, int | None] = {
            "tokens": self.tokens * self.dim * ITEM_BYTES[self.dtype],
            "offsets": (self.documents + 1) * 8,
            "removed": self.removed * 8,
        }
        if self.dtype == "int8":
            wanted["scales"] = self.documents * 4
        if self.ids == "int64":
            wanted["ids"] = self.documents * 8
        if self.ids == "utf8":
            wanted |= {"ids": None, "id_offsets": (self.documents + 1) * 8}
        return wanted

    def file(self, part: str) -> str:
        """The name of a data file: never taken from the header, so it cannot lead out of the folder."""
        return f"{part}.{self.generation}.bin"


def render(header: Header) -> bytes:
    """The bytes of header.json. Its checksum is taken with zeros where the checksum stands."""
    record = {
        "format": FORMAT,
        "version": VERSION,
        "header_crc32": "0" * 8,
        "byteorder": "little",
        "dtype": header.dtype,
        "dim": header.dim,
        "ids": header.ids,
        "generation": header.generation,
        "documents": header.documents,
        "tokens": header.tokens,
        "removed": header.removed,
        "parts": {
            name: {"bytes": part.size, "crc32": f"{part.crc32:08x}"} for name, part in sorted(header.parts.items())
        },
    }
    text = (json.dumps(record, indent=1) + "\n").encode()
    return text.replace(b'"header_crc32": "00000000"', f'"header_crc32": "{zlib.crc32(text):08x}"'.encode(), 1)


def parse(text: bytes, where: str) -> Header:
    """The header in `text`, whole and consistent. `where` names the file in errors.

    Raises:
        PackedFormatError: anything else.
    """
    record = _record(text, where)
    if record.get("format") != FORMAT:
        raise PackedFormatError(f"{where}: format is {_short(record.get('format'))}; want {FORMAT!r}")
    version = _integer(record, "version", 1 << 31, where)
    if version != VERSION:
        raise PackedFormatError(f"{where}: format version {version}; this program reads version {VERSION}")
    _verify_checksum(text, where)
    _keys(record, json.loads(render(Header("int8", 1))), where)
    if record["byteorder"] != "little":
        raise PackedFormatError(f"{where}: byteorder is {_short(record['byteorder'])}; want 'little'")
    header = Header(
        dtype=_one_of(record, "dtype", tuple(ITEM_BYTES), where),
        dim=_integer(record, "dim", MOST_DIMENSIONS, where),
        ids=_one_of(record, "ids", IDS, where),
        generation=_integer(record, "generation", MOST_ROWS, where),
        documents=_integer(record, "documents", MOST_ROWS, where),
        tokens=_integer(record, "tokens", MOST_ROWS, where),
        removed=_integer(record, "removed", MOST_ROWS, where),
        parts=_parts(record["parts"], where),
    )
    if header.dim < 1:
        raise PackedFormatError(f"{where}: dim is 0; want at least 1")
    if header.removed > header.documents:
        raise PackedFormatError(f"{where}: {header.removed} of {header.documents} documents are removed")
    sizes = header.sizes()
    _keys(header.parts, sizes, f"{where}: parts")
    for name, wanted in sizes.items():
        if wanted not in (None, header.parts[name].size):
            raise PackedFormatError(
                f"{where}: {name} has {header.parts[name].size} bytes; {header.documents} documents, {header.tokens} "
                f"tokens, {header.removed} removed make {wanted}"
            )
    return header


def _record(text: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_refuse)
    except (ValueError, RecursionError) as error:
        raise PackedFormatError(f"{where}: not the JSON of a header ({error})") from None
    if not isinstance(record, dict):
        raise PackedFormatError(f"{where}: a {type(record).__name__}; want a JSON object")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return record


def _refuse(number: str) -> Any:
    raise ValueError(f"the number {_short(number)}; there are only integers in a header")


def _verify_checksum(text: bytes, where: str) -> None:
    found = _CHECKSUM.findall(text)
    if len(found) != 1:
        raise PackedFormatError(f"{where}: header_crc32 stands {len(found)} times; want once, as eight hex digits")
    zeroed = _CHECKSUM.sub(b'"header_crc32": "00000000"', text)
    if zlib.crc32(zeroed) != int(found[0], 16):
        raise PackedFormatError(
            f"{where}: its checksum is {zlib.crc32(zeroed):08x}; {found[0].decode()} was written, so it was damaged"
        )


def _keys(seen: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    if seen.keys() != wanted.keys():
        missing, unknown = sorted(wanted.keys() - seen.keys()), sorted(seen.keys() - wanted.keys())
        raise PackedFormatError(f"{where}: missing {missing}, unknown {_short(unknown)}")


def _parts(record: Any, where: str) -> dict[str, Part]:
    if not isinstance(record, dict):
        raise PackedFormatError(f"{where}: parts is {_short(record)}; want an object")
    parts = {}
    for name, part in record.items():
        inside = f"{where}: part {_short(name)}"
        if not isinstance(part, dict):
            raise PackedFormatError(f"{inside} is {_short(part)}; want an object")
        _keys(part, {"bytes": 0, "crc32": ""}, inside)
        if not (isinstance(part["crc32"], str) and re.fullmatch("[0-9a-f]{8}", part["crc32"])):
            raise PackedFormatError(f"{inside}: crc32 is {_short(part['crc32'])}; want eight hex digits")
        parts[name] = Part(_integer(part, "bytes", 1 << 62, inside), int(part["crc32"], 16))
    return parts


def _integer(record: Mapping[str, Any], name: str, most: int, where: str) -> int:
    value = record.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise PackedFormatError(f"{where}: {name} is {_short(value)}; want an integer from 0 to {most}")
    return value


def _one_of(record: Mapping[str, Any], name: str, known: tuple[T, ...], where: str) -> T:
    value = record[name]
    if value not in known:
        raise PackedFormatError(f"{where}: {name} is {_short(value)}; want one of {known}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
