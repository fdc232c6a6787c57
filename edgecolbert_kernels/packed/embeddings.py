"""The view of packed documents: ids, slices, what is added and removed, files, scoring by `maxsim` and `search`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from edgecolbert_kernels import checks, dtypes, identifiers
from edgecolbert_kernels.identifiers import Id
from edgecolbert_kernels.packed import folder as folders
from edgecolbert_kernels.packed import making
from edgecolbert_kernels.packed.room import Room
from edgecolbert_kernels.packed.tokens import PackedTokens, frozen
from edgecolbert_kernels.signatures import AnyArray, Chosen, Device, Integers, Storage, StorageLike
from edgecolbert_kernels.storage import reader, writer

if TYPE_CHECKING:
    from edgecolbert_kernels.device.embeddings import DeviceEmbeddings

Array = np.ndarray

# Guards the dictionaries of ids while they change hands.
_LOOKUPS = threading.Lock()


class PackedEmbeddings(PackedTokens):
    """Token vectors of N documents, `[T, d]` without padding: `maxsim`, `maxsim_indexed` and `search` take it as D.

    Made by `from_list`, `from_padded`, `from_arrays`, `empty`, `load`, `concatenate` and `edgecolbert_kernels.pack`.
    Storage is "float16" (the default: off by at most 2^-11 of a value), "bfloat16", "float32", or "int8" with one scale a
    document: scale = max|x| / 127, so a value is off by at most scale / 2.

    A view is frozen. `packed[i]` is document i; `packed[a:b]`, `packed[[3, 1]]` and `packed[mask]` are views of the chosen
    documents; `append` and `remove` return the changed view. All share memory. Documents are counted from 0 in every view,
    so `remove` renumbers those behind; ids stay. `packed[[0, 0]]` has a document and its id twice: it can be scored; saved only
    where there are no ids.

    Attributes:
        dtype: the storage, by name.
        dim: d.
        lengths: int64 `[N]`, tokens of each document.
        nbytes: bytes of the tokens, offsets and scales of these N documents, wherever they lie.
    """

    __slots__ = ("_ids", "_positions", "_room")

    def __init__(
        self,
        dtype: Storage,
        tokens: Array,
        offsets: Array,
        scales: Array | None,
        ids: Sequence[Id] | Array | None,
        rows: Array | None = None,
        room: Room | None = None,
    ) -> None:
        """For this package: arrays that are checked. `rows` are the chosen documents, None for all."""
        super().__init__(dtype, tokens, offsets, scales, rows)
        self._ids, self._room = ids, room
        self._positions: dict[Id, int] | None = None

    # Making

    @classmethod
    def from_list(
        cls,
        documents: Iterable[AnyArray],
        ids: Iterable[Id] | None = None,
        *,
        dtype: StorageLike = "float16",
        dim: int | None = None,
    ) -> PackedEmbeddings:
        """Pack documents of any lengths.

        Args:
            documents: one `[L, d]` each: numpy arrays or torch tensors in float16, bfloat16 (uint16 bits in numpy),
                float32 or float64, on any device. L may be 0.
            ids: one for each, all strings or all integers of 64 bits, each once.
            dtype: the storage: a name, a numpy or a torch dtype. In int8 a document whose largest |x| is below 2e-36 counts
                as zero.
            dim: d, needed where there are no documents.

        Raises:
            TypeError: a document is not an array of floats, or an id is neither a string nor an integer.
            ValueError: shapes differ, an id repeats, or a finite value is too large for `dtype`.
        """
        dtype, documents = dtypes.name(dtype), list(documents)
        arrays = making.from_list(documents, dtype, dim)
        return cls(dtype, *arrays, identifiers.checked(ids, len(documents)))

    @classmethod
    def from_padded(
        cls,
        X: AnyArray,
        mask: AnyArray | None = None,
        ids: Iterable[Id] | None = None,
        *,
        dtype: StorageLike = "float16",
    ) -> PackedEmbeddings:
        """Pack documents of one length.

        Args:
            X: `[N, L, d]`, an array or a tensor in the dtypes of `from_list`.
            mask: `[N, L]`, bool or 0/1: the tokens to keep, with holes or without. None keeps all; a document may keep none.
            ids, dtype: as in `from_list`.

        Raises:
            TypeError, ValueError: as in `from_list`, or the mask's shape is another. The storage's range is asked of kept
                tokens alone.
        """
        dtype = dtypes.name(dtype)
        arrays = making.from_padded(X, mask, dtype)
        return cls(dtype, *arrays, identifiers.checked(ids, len(arrays[1]) - 1))

    @classmethod
    def from_arrays(
        cls,
        tokens: AnyArray,
        offsets: Integers,
        scales: AnyArray | None = None,
        ids: Iterable[Id] | None = None,
    ) -> PackedEmbeddings:
        """Take documents that are packed already: offsets are copied, tokens and scales only where they are not contiguous.

        Args:
            tokens: `[T, d]` float16, float32, uint16 (bits of bfloat16) or, with `scales`, int8 from -127 to 127; numpy or
                torch. int8 is read once to make sure, also where it is mapped.
            offsets: `[N + 1]` integers from 0 to T: document n is the rows from `offsets[n]` to `offsets[n + 1]`.
            scales: float32 `[N]`, finite and not negative, where tokens are int8.

        Raises:
            TypeError: a dtype is another, or scales are given or missing.
            ValueError: a shape, an offset, a scale or an int8 token is not one of these.
        """
        dtype, arrays = making.from_arrays(tokens, offsets, scales)
        return cls(dtype, *arrays, identifiers.checked(ids, len(arrays[1]) - 1))

    @classmethod
    def empty(cls, dim: int, dtype: StorageLike = "float16") -> PackedEmbeddings:
        """No documents, to append to."""
        return cls.from_list([], dtype=dtype, dim=dim)

    @classmethod
    def concatenate(cls, parts: Iterable[PackedEmbeddings]) -> PackedEmbeddings:
        """The documents of all parts in order, in the storage of the first; at least one part.

        Raises:
            ValueError: there are no parts, some documents have ids and others none, or an id stands twice.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("parts is empty; want at least one")
        first = parts[0]
        identifiers.each_once(first.ids or [])
        for part in parts[1:]:
            first = first._extended(part._fitted(first.dtype, first.dim))
        return first

    # Looking

    @property
    def ids(self) -> list[Id] | None:
        """The ids in order, None where documents have none. A new list at every call: keep it in a loop."""
        if self._ids is None:
            return None
        slots = range(len(self)) if self._rows is None else self._rows.tolist()
        if isinstance(self._ids, np.ndarray):
            return self._ids[slots if self._rows is not None else slice(None)].tolist()
        return [self._ids[slot] for slot in slots]

    def position(self, name: Id) -> int:
        """Where the document with this id stands. KeyError where there is none."""
        found = self._lookup().get(name)
        # Another thread may just have appended to this view, and taken its dictionary.
        if found is None or found >= len(self):
            raise checks.no_such_id(name)
        return found

    @overload
    def __getitem__(self, key: int | np.integer[Any]) -> Array: ...
    @overload
    def __getitem__(self, key: Chosen) -> PackedEmbeddings: ...
    def __getitem__(self, key: Any) -> Any:
        """An integer: the document `[L, d]`, read-only, in its storage (uint16 bits for bfloat16), or in float32 for int8.
        A slice, integers or a bool mask `[N]`: a view.
        """
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
            slot = int(key) + len(self) if key < 0 else int(key)
            if not 0 <= slot < len(self):
                raise checks.no_such_document(int(key), len(self))
            return frozen(self.document(slot))
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1 and self._rows is None:
                return self._sliced(start, max(start, stop))
            return self._picked(np.arange(start, stop, step))
        return self._picked(self.indices_of(key))

    def __iter__(self) -> Iterator[Array]:
        return (self[n] for n in range(len(self)))

    def __repr__(self) -> str:
        ids = "" if self._ids is None else ", with ids"
        return (
            f"PackedEmbeddings({len(self)} documents, {self.num_tokens} tokens, dim={self.dim}, {self._dtype}{ids}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    def __reduce__(self) -> Any:
        return PackedEmbeddings, (self._dtype, *self.contiguous(), self.ids)

    # Changing

    @overload
    def to(self, dtype: StorageLike | Literal["cpu"]) -> PackedEmbeddings: ...
    @overload
    def to(self, dtype: Literal["cuda"]) -> DeviceEmbeddings: ...
    @overload
    def to(self, dtype: Device) -> PackedEmbeddings | DeviceEmbeddings: ...
    def to(self, dtype: Any) -> Any:
        """The documents in another storage; the same view where it is that storage already. Or, for a torch device or the
        name of one such as "cuda", a `DeviceEmbeddings` there: a copy, in the same storage.
        """
        if not isinstance(dtype, str) or dtype not in dtypes.STORAGE:
            device = _device(dtype)
            if device is not None:
                return self._on(device)
        dtype = dtypes.name(dtype)
        if dtype == self._dtype:
            return self
        return PackedEmbeddings(dtype, *making.converted(self, dtype), self.ids)

    def cuda(self) -> DeviceEmbeddings:
        """`to("cuda")`."""
        return self.to("cuda")

    def with_ids(self, ids: Iterable[Id] | None) -> PackedEmbeddings:
        """The same documents with these ids, as in `from_list`, in the place of those that they have; None for none.

        Memory is shared, unless documents were chosen one by one: these are copied together.

        Raises:
            TypeError, ValueError: as in `from_list`.
        """
        names = identifiers.checked(ids, len(self))
        scattered = self._rows is not None
        arrays = self.contiguous() if scattered else (self._tokens, self._offsets, self._scales)
        return PackedEmbeddings(self._dtype, *arrays, names)

    def append(self, documents: Iterable[AnyArray], ids: Iterable[Id] | None = None) -> PackedEmbeddings:
        """The view with `documents` at its end: as in `from_list`, or a PackedEmbeddings, whose ids are taken along where
        no others are given. This one stays as it is.

        In a chain of appends each document is copied a bounded number of times, as with a list. Memory only: a view of a
        folder is copied into memory first. `PackedWriter` appends to the folder.

        Raises:
            TypeError, ValueError: as in `from_list`; or ids come where there were none, or the other way round, or one is
                there already.
        """
        return self._extended(as_packed(documents, ids, self._dtype, self.dim))

    def remove(self, indices: Integers | None = None, *, ids: Iterable[Id] | None = None) -> PackedEmbeddings:
        """The view without these documents, named by indices, a bool mask `[N]`, or ids. Nothing is copied.

        Raises:
            TypeError, ValueError: indices are neither integers nor a mask of N, or `ids` is a string.
            IndexError, KeyError: there is no such document.
        """
        keep = np.ones(len(self), bool)
        if indices is not None:
            keep[self.indices_of(indices)] = False
        if ids is not None:
            keep[[self.position(name) for name in identifiers.listed(ids)]] = False
        return self._picked(np.flatnonzero(keep))

    # Files

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a folder in one step: it holds these documents, or is as it was before.

        Args:
            folder: does not exist, or is empty; with `overwrite`, also a folder of packed embeddings. Who has that
                one loaded keeps what they loaded.

        Raises:
            FileExistsError: something is there.
            ValueError: an id stands twice, as in a view that has a document twice; nothing is written.
            PackedLocked: with `overwrite`, a writer has the folder open.
        """
        folder = Path(folder).absolute()
        header, data = folders.commit(self, self.ids)
        if not (overwrite and folder.exists() and any(folder.iterdir())):
            writer.create(folder, header, data)
            return
        there = writer.FolderWriter(folder)
        try:
            there.replace_all(header, data)
        finally:
            there.close()

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, mmap: bool = True, verify: bool = False) -> PackedEmbeddings:
        """The last commit of a folder that `save` or a `PackedWriter` wrote.

        Args:
            mmap: map the tokens instead of reading them: opening takes milliseconds, memory is taken by the pages that
                are used, and processes share it. A file that is cut off later kills a process that reads it.
            verify: read everything and compare checksums. Without it sizes, counts, offsets and scales are checked,
                so that nothing is read outside a file, but not the values of the vectors.

        Raises:
            PackedFormatError: the folder is not one, is damaged, or is of a newer version; says what and where.
        """
        folder = Path(folder)
        contents = reader.read(folder, mapped=mmap, verified=verify)
        arrays = contents.tokens, contents.offsets, contents.scales
        rows = folders.live(contents) if len(contents.removed) else None
        return cls(contents.header.dtype, *arrays, folders.names(folder, contents), rows)

    @staticmethod
    def verify(folder: str | os.PathLike[str]) -> None:
        """Raise PackedFormatError unless every byte of a folder is as it was written."""
        PackedEmbeddings.load(folder, verify=True)

    # Inside

    def _on(self, device: Any) -> Any:
        if device.type == "cpu":
            return self
        from edgecolbert_kernels.device import embeddings

        return embeddings.from_host(self, device, PackedEmbeddings)

    def _sliced(self, start: int, stop: int) -> PackedEmbeddings:
        scales = None if self._scales is None else self._scales[start:stop]
        ids = None if self._ids is None else self._ids[start:stop]
        return PackedEmbeddings(self._dtype, self._tokens, self._offsets[start : stop + 1], scales, ids)

    def _picked(self, index: Array) -> PackedEmbeddings:
        rows = index.astype(np.int64) if self._rows is None else self._rows[index]
        return PackedEmbeddings(self._dtype, self._tokens, self._offsets, self._scales, self._ids, rows, self._room)

    def _fitted(self, dtype: Storage, dim: int) -> PackedEmbeddings:
        """These documents for others of this storage and dim."""
        checks.stored_dim(self.dim, dim)
        return self.to(dtype)

    def _extended(self, other: PackedEmbeddings) -> PackedEmbeddings:
        """With documents of the same storage and dim at its end."""
        if not len(other):
            return self
        names = other.ids
        if not len(self):
            identifiers.new(names or [], ())
            return self._grown(Room([(other, names)]), len(other))
        if (self._ids is None) is not (names is None):
            raise checks.ids("some documents have ids and others none", "ids for all or for none")
        if names is None:
            return self._joined(other, None)
        # Handed on, as a chain of appends asks the newest view only; this one makes its own again when asked.
        positions = self._taken_lookup()
        try:
            identifiers.new(names, positions)
        except BaseException:
            self._positions = positions
            raise
        grown = self._joined(other, names)
        positions.update(zip(names, range(len(self), len(grown)), strict=True))
        grown._positions = positions
        return grown

    def _joined(self, other: PackedEmbeddings, names: list[Id] | None) -> PackedEmbeddings:
        """The documents of both: in the room behind this view's where it is the one that may append there."""
        room, rows, count = self._room, self._rows, len(self._offsets) - 1
        if room is None or not room.append(count, other, names):
            return self._grown(Room([(self, self.ids), (other, names)]), len(self) + len(other))
        if rows is not None:
            rows = np.concatenate([rows, np.arange(count, count + len(other))])
        return self._grown(room, count + len(other), rows)

    def _grown(self, room: Room, count: int, rows: Array | None = None) -> PackedEmbeddings:
        """The first `count` documents of a room, or `rows` of these."""
        scales = None if room.scales is None else room.scales[:count]
        return PackedEmbeddings(self._dtype, room.tokens, room.offsets[: count + 1], scales, room.ids, rows, room)

    def _lookup(self) -> dict[Id, int]:
        positions = self._positions
        if positions is None:
            positions = self._positions = {name: n for n, name in enumerate(self.ids or [])}
        return positions

    def _taken_lookup(self) -> dict[Id, int]:
        """The dictionary of ids, which this view then no longer has."""
        with _LOOKUPS:
            positions, self._positions = self._lookup(), None
        return positions


def as_packed(documents: Iterable[AnyArray], ids: Iterable[Id] | None, dtype: Storage, dim: int) -> PackedEmbeddings:
    """Documents to be added to others of this storage and dim: as in `from_list`, or packed already, with their own ids
    where none are given.
    """
    if not isinstance(documents, PackedEmbeddings):
        return PackedEmbeddings.from_list(documents, ids, dtype=dtype, dim=dim)
    return (documents if ids is None else documents.with_ids(ids))._fitted(dtype, dim)


def _device(seen: Any) -> Any:
    """What torch takes for a device; None for all else."""
    if not isinstance(seen, str) and type(seen).__module__ != "torch":
        return None
    try:
        from edgecolbert_kernels.device.embeddings import as_device
    except ImportError:
        return None
    return as_device(seen)
