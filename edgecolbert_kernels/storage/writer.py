"""Writing a folder so that every commit is whole or not there.

A commit appends to the data files, flushes them to the disk, writes the new header beside the old one, flushes it, and
renames it over the old one. A process that dies, or a disk that fills up, at any byte leaves the old header: what lies
behind its counts is overwritten by the next append. Where the disk refuses, it is cut off at once, as it may be what fills it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecolbert_kernels.storage import header, reader
from edgecolbert_kernels.storage.header import Header, Part
from edgecolbert_kernels.storage.lock import Lock

Data = Mapping[str, Any]  # what a commit adds to each data file: contiguous little-endian arrays, or bytes


class FolderWriter:
    """The one writer of a folder, from construction to `close`, in the process that constructed it. One thread at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        reader.read_header(folder)  # before a lock file is left in a folder that is something else
        self.lock = Lock(folder)
        try:
            # An append behind a file that was cut off would fill the hole with zeros: sizes are checked here.
            self.contents = reader.read(folder)
        except BaseException:
            self.lock.release()
            raise
        self.header = self.contents.header
        self._broken = False

    def commit(self, data: Data, *, documents: int = 0, tokens: int = 0, removed: int = 0) -> None:
        """Add `data`, and so many documents, tokens and removals to the counts.

        Raises:
            OSError: the disk refused; nothing was committed, and this writer takes no more.
            PackedLocked, ValueError: this process does not hold the folder, or no longer.
        """
        self._check()
        old = self.header
        parts = dict(old.parts)
        self._broken = True
        try:
            for name, added in data.items():
                if memoryview(added).nbytes:
                    _append(self.folder / old.file(name), added, parts[name].size)
                    parts[name] = parts[name].extended(_bytes(added))
            new = replace(
                old,
                documents=old.documents + documents,
                tokens=old.tokens + tokens,
                removed=old.removed + removed,
                parts=parts,
            )
            unfinished = _write_header(self.folder, new)
        except OSError:
            _take_back(self.folder, old)
            raise
        _rename_header(self.folder, unfinished)
        self.header, self._broken = new, False

    def replace_all(self, new: Header, data: Data) -> None:
        """Put `data` in the place of everything that is there, in one step. `new` is a header without its parts.

        Raises:
            OSError: the disk refused; everything is as it was.
            PackedLocked, ValueError: as in `commit`.
        """
        self._check()
        old = self.header
        try:
            new = _write_parts(self.folder, replace(new, generation=old.generation + 1), data)
            unfinished = _write_header(self.folder, new)
        except OSError:
            _take_back(self.folder, old)
            raise
        self._broken = True
        _rename_header(self.folder, unfinished)
        self.header, self._broken = new, False
        remove_strays(self.folder, new)

    def close(self) -> None:
        self.lock.release()

    def _check(self) -> None:
        self.lock.check()
        if self._broken:
            raise RuntimeError(f"{self.folder}: a commit failed before; open it again to write on")


def create(folder: Path, new: Header, data: Data) -> Header:
    """A folder that was not there before, or an empty one. Returns the header with its parts.

    Raises:
        FileExistsError: something is there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the rename stays on one disk.
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    unfinished.mkdir()
    try:
        new = _write_parts(unfinished, new, data)
        _rename_header(unfinished, _write_header(unfinished, new))
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            raise FileExistsError(f"{folder} is there already") from None
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _flush_folder(folder.parent)
    return new


def remove_strays(folder: Path, current: Header) -> None:
    """Remove the data files of other generations. Who has them mapped keeps them."""
    wanted = {current.file(name) for name in current.parts}
    names = [name for kind in ("float16", "int8") for name in Header(kind, 1, ids="utf8").sizes()]
    for path in folder.glob("*.bin"):
        name, _, rest = path.name.partition(".")
        if name in names and rest.removesuffix(".bin").isdecimal() and path.name not in wanted:
            path.unlink(missing_ok=True)
    for path in folder.glob(f"{header.NAME}.*.tmp"):
        path.unlink(missing_ok=True)


def _write_parts(folder: Path, new: Header, data: Data) -> Header:
    parts = {}
    for name in new.sizes():
        added = data.get(name, b"")
        path = folder / new.file(name)
        path.unlink(missing_ok=True)
        _append(path, added, 0)
        parts[name] = Part().extended(_bytes(added))
    return replace(new, parts=parts)


def _append(path: Path, data: Any, at: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o644)
    try:
        os.lseek(file, at, os.SEEK_SET)
        left = _bytes(data)
        while left:
            left = left[os.write(file, left[: reader.BLOCK_BYTES]) :]
        os.fsync(file)
    finally:
        os.close(file)


def _take_back(folder: Path, current: Header) -> None:
    """Free what an unfinished commit has taken: whole files, and the ends of those in use. `current` is the header on the
    disk; no reader has mapped more than it counts, as no header of its generation has counted more.
    """
    # What refuses takes room and is not in the way: the next commit overwrites it.
    with contextlib.suppress(OSError):
        remove_strays(folder, current)
    for name, part in current.parts.items():
        with contextlib.suppress(OSError):
            _shorten(folder / current.file(name), part.size)


def _shorten(path: Path, size: int) -> None:
    file = os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    try:
        if os.fstat(file).st_size > size:  # a shorter one was damaged: longer, it would pass for whole
            os.ftruncate(file, size)
    finally:
        os.close(file)


def _write_header(folder: Path, new: Header) -> Path:
    """Beside the old one, and on the disk."""
    unfinished = folder / f"{header.NAME}.{os.getpid()}.tmp"
    unfinished.unlink(missing_ok=True)
    _append(unfinished, header.render(new), 0)
    return unfinished


def _rename_header(folder: Path, unfinished: Path) -> None:
    """The commit: from here on nothing of the data may be taken back, even if this raises."""
    os.replace(unfinished, folder / header.NAME)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _bytes(data: Any) -> memoryview:
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return memoryview(data).cast("B")
