"""Opening a folder: every size and every offset is checked before an array is handed out.

Always checked, at the price of reading 8 bytes a document (more with ids, removals or int8): the header, the sizes of the
files, that offsets start at 0, never decrease and end at the last token, that scales are finite and not negative, that
removed documents exist and are removed once. Checked by `verify` alone, as it reads everything: the checksums of the data.
"""

from __future__ import annotations

import io
import mmap
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecolbert_kernels.storage import header
from edgecolbert_kernels.storage.header import Header, PackedFormatError

Array = np.ndarray
BLOCK_BYTES = 1 << 24
# A folder that is written over again and again while it is opened; one retry is the rule.
ATTEMPTS = 10

_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "int8": "i1"}


@dataclass(frozen=True)
class Contents:
    """One commit, all arrays little-endian and read-only."""

    header: Header
    tokens: Array  # [T, dim]
    offsets: Array  # int64 [N + 1]
    scales: Array | None  # float32 [N]
    ids: Array | None  # int64 [N], or uint8, the bytes of all ids
    id_offsets: Array | None  # int64 [N + 1] into these bytes
    removed: Array  # int64, sorted document numbers


def read(folder: Path, *, mapped: bool = True, verified: bool = False) -> Contents:
    """The last commit in `folder`, with its checksums compared where it is to be `verified`.

    Raises:
        PackedFormatError: the folder is not one, or is damaged in a way that the checks above see.
    """
    found = read_header(folder)
    for _ in range(ATTEMPTS):
        try:
            contents = _read(folder, found, mapped)
            if verified:
                verify(folder, found)
            return contents
        except FileNotFoundError as error:
            # A writer that writes a folder over removes the files that its new header no longer names.
            again = read_header(folder)
            if again.generation == found.generation:
                raise PackedFormatError(f"{error.filename} is missing") from None
            found = again
    raise PackedFormatError(f"{folder} is written over faster than it can be opened")


def read_header(folder: Path) -> Header:
    path = folder / header.NAME
    try:
        file = _open(path)
    except (FileNotFoundError, NotADirectoryError):
        what = "is not a folder" if folder.exists() and not folder.is_dir() else f"has no {header.NAME}"
        if not folder.exists():
            what = "does not exist"
        raise PackedFormatError(f"{folder} {what}: not a folder of packed embeddings") from None
    try:
        size = os.fstat(file).st_size
        if size > header.MOST_BYTES:
            raise PackedFormatError(f"{path}: {size} bytes; a header has at most {header.MOST_BYTES}")
        text = os.read(file, header.MOST_BYTES)
    finally:
        os.close(file)
    return header.parse(text, str(path))


def verify(folder: Path, found: Header) -> None:
    """Read every committed byte and compare the checksums.

    Raises:
        PackedFormatError: names the first file whose bytes are not those that were written.
    """
    for name, part in found.parts.items():
        path = folder / found.file(name)
        with os.fdopen(_open(path), "rb") as file:
            crc32, left = 0, part.size
            while left:
                block = file.read(min(left, BLOCK_BYTES))
                if not block:
                    raise _truncated(path, part.size - left, part.size)
                crc32, left = zlib.crc32(block, crc32), left - len(block)
        if crc32 != part.crc32:
            raise PackedFormatError(
                f"{path}: the checksum of its first {part.size} bytes is {crc32:08x}; the header says {part.crc32:08x}"
            )


def _read(folder: Path, found: Header, mapped: bool) -> Contents:
    def array(part: str, dtype: str, mapped: bool = False) -> Array:
        return _array(folder / found.file(part), found.parts[part].size, np.dtype(dtype), mapped)

    def offsets(part: str, last: int, mapped: bool = False) -> Array:
        values = array(part, "<i8", mapped)
        _check_offsets(folder / found.file(part), values, last)
        return values

    tokens = array("tokens", _DTYPES[found.dtype], mapped).reshape(found.tokens, found.dim)
    scales = array("scales", "<f4") if "scales" in found.parts else None
    if scales is not None and not (np.isfinite(scales) & (scales >= 0)).all():
        number = int(np.flatnonzero(~(np.isfinite(scales) & (scales >= 0)))[0])
        path = folder / found.file("scales")
        raise PackedFormatError(f"{path}: the scale of document {number} is {scales[number]}; want finite, at least 0")
    ids = id_offsets = None
    if found.ids == "int64":
        ids = array("ids", "<i8")
    elif found.ids == "utf8":
        ids = array("ids", "u1", mapped)
        id_offsets = offsets("id_offsets", found.parts["ids"].size, mapped)
    removed = np.sort(array("removed", "<i8"))
    _check_removed(folder / found.file("removed"), removed, found.documents)
    # Kernels trust what was checked here, whatever becomes of the file.
    return Contents(found, tokens, offsets("offsets", found.tokens), scales, ids, id_offsets, removed)


def _check_offsets(path: Path, offsets: Array, last: int) -> None:
    if offsets[0] != 0:
        raise PackedFormatError(f"{path}: starts at {offsets[0]}; want 0")
    falls = offsets[1:] < offsets[:-1]
    if falls.any():
        number = int(falls.argmax())
        raise PackedFormatError(
            f"{path}: falls from {offsets[number]} to {offsets[number + 1]} at entry {number + 1}; want none to fall"
        )
    if offsets[-1] != last:
        raise PackedFormatError(f"{path}: ends at {offsets[-1]}; want {last}")


def _check_removed(path: Path, removed: Array, documents: int) -> None:
    if len(removed) and not (removed[0] >= 0 and removed[-1] < documents):
        raise PackedFormatError(f"{path}: spans {removed[0]} to {removed[-1]}; there are {documents} documents")
    if (removed[1:] == removed[:-1]).any():
        raise PackedFormatError(f"{path}: a document is removed twice")


def _array(path: Path, size: int, dtype: np.dtype[Any], mapped: bool) -> Array:
    file = _open(path)
    try:
        there = os.fstat(file).st_size
        if there < size:
            raise _truncated(path, there, size)
        if not size:
            return np.empty(0, dtype)
        if mapped:
            return np.frombuffer(mmap.mmap(file, size, access=mmap.ACCESS_READ), dtype)
        values = np.empty(size // dtype.itemsize, dtype)
        _fill(file, memoryview(values.view(np.uint8)), path)  # type: ignore[arg-type]
        values.flags.writeable = False
        return values
    except (OSError, OverflowError, MemoryError, ValueError) as error:
        if isinstance(error, PackedFormatError):
            raise
        raise PackedFormatError(f"{path}: {size} bytes cannot be {'mapped' if mapped else 'read'} ({error})") from None
    finally:
        os.close(file)


def _fill(file: int, buffer: memoryview, path: Path) -> None:
    done = 0
    with io.FileIO(file, "rb", closefd=False) as stream:
        while done < len(buffer):
            count = stream.readinto(buffer[done : done + BLOCK_BYTES])
            if not count:
                raise _truncated(path, done, len(buffer))
            done += count


def _open(path: Path) -> int:
    """A regular file: a link could lead anywhere, and a pipe would wait for ever."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        if path.is_symlink():
            raise PackedFormatError(
                f"{path} is a symbolic link, and links are not followed; copy the files themselves (cp -rL)"
            ) from None
        raise PackedFormatError(f"{path} cannot be opened as a file ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise PackedFormatError(f"{path} is not a regular file")
    return file


def _truncated(path: Path, there: int, wanted: int) -> PackedFormatError:
    return PackedFormatError(f"{path}: {there} bytes; the header counts {wanted}, so it was cut off")
