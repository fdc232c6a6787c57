"""Commits to a folder of packed embeddings."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgecolbert_kernels import checks, dtypes, identifiers
from edgecolbert_kernels.device.documents import indices_of
from edgecolbert_kernels.identifiers import Id
from edgecolbert_kernels.packed import folder as folders
from edgecolbert_kernels.packed.embeddings import PackedEmbeddings, as_packed
from edgecolbert_kernels.signatures import AnyArray, Integers, StorageLike
from edgecolbert_kernels.storage import writer


class PackedWriter:
    """Changes a folder of packed embeddings: `append`, `remove` and `upsert` are commits that a crash cannot halve.

    A commit is on the disk when the call returns; a process that dies at any moment leaves the commits before it. Readers
    may load the folder meanwhile: each sees the last commit of the moment it loaded. There is one writer: another, in any
    process, gets PackedLocked until this one is closed or its process has ended (and, where it was not closed, the children
    that it forked). Threads may share it. A forked child may not: what it commits would be lost, so it gets PackedLocked.

        with PackedWriter("index", dim=48) as writer:
            writer.append(documents, ids)

    Args:
        folder: of packed embeddings; if `dim` is given, one that does not exist or is empty becomes one.
        dim, dtype: of a new folder. An existing one must have the same, where they are given.

    Raises:
        PackedFormatError: the folder is not one, or is damaged.
        PackedLocked: another writer has it open.

    After `close`, changes and `in` raise ValueError. A writer cannot be copied or pickled.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, dim: int | None = None, dtype: StorageLike | None = None
    ) -> None:
        self.folder = Path(folder).absolute()
        self._threads = threading.Lock()
        if dim is not None and (not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir()))):
            # Where another process has just made it, it is opened.
            with contextlib.suppress(FileExistsError):
                PackedEmbeddings.empty(dim, "float16" if dtype is None else dtype).save(self.folder)
        self._folder = writer.FolderWriter(self.folder)
        try:
            header = self._folder.header
            if dim is not None and dim != header.dim:
                raise ValueError(f"{self.folder} has dim {header.dim}; {dim} is asked for")
            if dtype is not None and dtypes.name(dtype) != header.dtype:
                raise ValueError(f"{self.folder} has dtype {header.dtype}; {dtypes.name(dtype)} is asked for")
            self._live = folders.live(self._folder.contents)
            # id -> document number in the file, of those that are not removed; read when first needed
            self._numbers: dict[Id, int] | None = None
        except BaseException:
            self._folder.close()
            raise

    def __len__(self) -> int:
        """Documents that are there."""
        return len(self._live)

    def __contains__(self, name: object) -> bool:
        """Whether a document has this id."""
        with self._alone():
            return name in self._ids()

    def __reduce__(self) -> Any:
        raise TypeError("a PackedWriter cannot be copied or pickled: there is one writer a folder")

    def append(self, documents: Iterable[AnyArray], ids: Iterable[Id] | None = None) -> None:
        """Commit `documents`: as in `PackedEmbeddings.from_list`, or a PackedEmbeddings, whose ids are taken along where no
        others are given.

        Raises:
            TypeError, ValueError: as `from_list`, or an id is there already; nothing is committed.
            OSError: the disk refused; nothing is committed, what was written is freed, and the writer must be opened again.
        """
        self._add(documents, ids, replacing=False)

    def upsert(self, documents: Iterable[AnyArray], ids: Iterable[Id] | None = None) -> None:
        """As `append`, for documents with ids, and in the same commit remove those that have had these ids. The new ones
        stand at the end.

        Raises:
            TypeError, ValueError: as `from_list`, or there are no ids; nothing is committed.
            OSError: as in `append`.
        """
        self._add(documents, ids, replacing=True)

    def remove(self, indices: Integers | None = None, *, ids: Iterable[Id] | None = None) -> None:
        """Commit that these documents are no longer there; their bytes stay until `compact`.

        Args:
            indices: integers, or a bool mask, as `PackedEmbeddings.load` would count documents now.
            ids: their names.

        Raises:
            TypeError, ValueError: as in `PackedEmbeddings.remove`; nothing is committed.
            IndexError, KeyError: there is no such document; nothing is committed.
        """
        names = None if ids is None else identifiers.listed(ids)
        with self._alone():
            gone = np.empty(0, np.int64)
            if indices is not None:
                gone = self._live[indices_of(indices, len(self))]
            if names is not None:
                numbers = self._ids()
                for name in names:
                    if name not in numbers:
                        raise checks.no_such_id(name)
                gone = np.concatenate([gone, np.array([numbers[name] for name in names], np.int64)])
            gone = np.unique(gone)
            if not len(gone):
                return
            self._folder.commit({"removed": gone}, removed=len(gone))
            self._live = np.setdiff1d(self._live, gone, assume_unique=True)
            if self._numbers is not None:
                dead = set(gone.tolist())
                self._numbers = {name: n for name, n in self._numbers.items() if n not in dead}

    def compact(self) -> None:
        """Write the folder anew without the bytes of removed documents, in one step."""
        with self._alone():
            packed = PackedEmbeddings.load(self.folder)
            self._folder.replace_all(*folders.commit(packed, packed.ids))
            self._live = np.arange(len(packed))
            self._numbers = None

    def close(self) -> None:
        """Let others write; waits for changes that other threads are making."""
        # A forked child inherits the threads' lock as it was: where it was held, nobody there will let it go.
        with self._threads if self._folder.lock.owned else contextlib.nullcontext():
            self._folder.close()

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other thread changes the folder, nor closes it."""
        self._folder.lock.check()  # before waiting, for the sake of forked children, as in `close`
        with self._threads:
            self._folder.lock.check()
            yield

    def _ids(self) -> dict[Id, int]:
        if self._numbers is None:
            names = PackedEmbeddings.load(self.folder).ids
            self._numbers = {} if names is None else dict(zip(names, self._live.tolist(), strict=True))
        return self._numbers

    def _add(self, documents: Iterable[AnyArray], ids: Iterable[Id] | None, *, replacing: bool) -> None:
        header = self._folder.header  # dtype and dim stay, whatever other threads change
        added = as_packed(documents, ids, header.dtype, header.dim)
        if not len(added):
            return
        names = added.ids
        if replacing and not names:
            raise checks.ids("none are given", "one for each document")
        identifiers.each_once(names or [])
        tokens, offsets, scales = added.contiguous()
        data: dict[str, Any] = {"tokens": tokens}
        if scales is not None:
            data["scales"] = scales
        with self._alone():
            self._add_ids(names, data, replacing)
            header = self._folder.header
            data["offsets"] = offsets[1:] + header.tokens
            gone = data.get("removed", ())
            self._folder.commit(data, documents=len(added), tokens=len(tokens), removed=len(gone))
            numbers = np.arange(header.documents, header.documents + len(added))
            live = np.setdiff1d(self._live, gone, assume_unique=True) if len(gone) else self._live
            self._live = np.concatenate([live, numbers])
            if self._numbers is not None:
                self._numbers.update(zip(names or [], numbers.tolist(), strict=True))

    def _add_ids(self, names: list[Id] | None, data: dict[str, Any], replacing: bool) -> None:
        """The ids of new documents, and the removal of those that they replace, to what is committed."""
        header = self._folder.header
        kind = identifiers.kind(names[0]) if names else "none"
        if kind != header.ids:
            if header.documents:
                raise checks.ids(f"of kind {kind}, and the folder has {header.ids}", "the kind of the folder")
            self._folder.replace_all(*folders.nothing(header, kind))
        if not names:
            return
        there = self._ids()
        if replacing:
            data["removed"] = np.array([there[name] for name in names if name in there], np.int64)
        else:
            identifiers.new(names, there)
        if kind == "int64":
            data["ids"] = np.array(names, np.int64)
        else:
            data["ids"], data["id_offsets"] = identifiers.encode(names, self._folder.header.parts["ids"].size)
