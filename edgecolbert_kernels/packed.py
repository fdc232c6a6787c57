"""Token vectors of many documents back to back, in memory or in a folder.

`PackedEmbeddings` is a view that never changes: what adds, removes or picks documents returns another view of the same
memory. `PackedWriter` is the way to change a folder.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgecolbert_kernels import checks, dtypes, identifiers
from edgecolbert_kernels.identifiers import Id
from edgecolbert_kernels.scoring import Stored
from edgecolbert_kernels.storage import reader, writer
from edgecolbert_kernels.storage.header import Header

Array = np.ndarray

# Documents that kernels cannot read where they lie (int8, or scattered ones) are copied in blocks of this size.
BLOCK_BYTES = 1 << 25
# A run of neighbours at least this long is read where it lies.
RUN_DOCUMENTS = 256
GROWTH = 1.5


class PackedEmbeddings(Stored):
    """Token vectors of N documents, `[T, d]` without padding: `maxsim`, `maxsim_indexed` and `search` take it as D.

    Made by `from_list`, `from_padded`, `from_arrays`, `empty`, `load`, `concatenate` and `edgecolbert_kernels.pack`.
    Storage is "float16" (the default: off by at most 2^-11 of a value), "bfloat16", "float32", or "int8" with one scale a
    document: scale = max|x| / 127, so a value is off by at most scale / 2.

    A view is frozen. `packed[i]` is document i; `packed[a:b]`, `packed[[3, 1]]` and `packed[mask]` are views of the chosen
    documents; `append` and `remove` return the changed view. All share memory. Documents are counted from 0 in every view,
    so `remove` renumbers those behind; ids stay.

    Attributes:
        dtype: the storage, by name.
        dim: d.
        lengths: int64 `[N]`, tokens of each document.
        nbytes: bytes of the tokens, offsets and scales of these N documents, wherever they lie.
    """

    __slots__ = ("_dtype", "_ids", "_norms", "_offsets", "_positions", "_room", "_rows", "_scales", "_tokens")

    def __init__(
        self,
        dtype: str,
        tokens: Array,
        offsets: Array,
        scales: Array | None,
        ids: Sequence[Id] | Array | None,
        rows: Array | None = None,
        room: _Room | None = None,
    ) -> None:
        """For this package: arrays that are checked. `rows` are the chosen documents, None for all."""
        self._dtype, self._tokens, self._offsets, self._scales = dtype, tokens, offsets, scales
        self._ids, self._rows, self._room = ids, rows, room
        self._positions: dict[Id, int] | None = None
        self._norms: Array | None = None

    # Making

    @classmethod
    def from_list(
        cls,
        documents: Sequence[Any],
        ids: Iterable[Id] | None = None,
        *,
        dtype: Any = "float16",
        dim: int | None = None,
    ) -> PackedEmbeddings:
        """Pack documents of any lengths.

        Args:
            documents: one `[L, d]` each: numpy arrays or torch tensors in float16, bfloat16 (uint16 bits in numpy),
                float32 or float64, on any device. L may be 0.
            ids: one for each, all strings or all integers of 64 bits, each once.
            dtype: the storage: a name, a numpy or a torch dtype.
            dim: d, needed where there are no documents.

        Raises:
            TypeError: a document is not an array of floats, or an id is neither a string nor an integer.
            ValueError: shapes differ, an id repeats, or a finite value is too large for `dtype`.
        """
        dtype = dtypes.name(dtype)
        matrices = [dtypes.matrix(f"documents[{n}]", each) for n, each in enumerate(documents)]
        for n, (rows, _) in enumerate(matrices):
            checks.rank(f"documents[{n}]", rows.shape, (2,), "[L, d]")
            dim = rows.shape[1] if dim is None else dim
            if rows.shape[1] != dim:
                raise checks.wrong_shape(f"documents[{n}]", rows.shape, f"[L, {dim}]")
        checks.at_least("dim", 0 if dim is None else dim, 1)
        names = identifiers.checked(ids, len(matrices))
        offsets = _offsets([len(rows) for rows, _ in matrices])
        tokens = np.empty((int(offsets[-1]), int(dim or 0)), dtypes.STORAGE[dtype])
        scales = np.empty(len(matrices), np.float32) if dtype == "int8" else None
        for n, (rows, given) in enumerate(matrices):
            scale = dtypes.store(f"documents[{n}]", rows, given, dtype, tokens[offsets[n] : offsets[n + 1]])
            if scales is not None and scale is not None:
                scales[n] = scale
        return cls(dtype, tokens, offsets, scales, names)

    @classmethod
    def from_padded(
        cls, X: Any, mask: Any = None, ids: Iterable[Id] | None = None, *, dtype: Any = "float16"
    ) -> PackedEmbeddings:
        """Pack `[N, L, d]`, leaving out the tokens where `mask` `[N, L]` (bool, or 0/1) is 0, holes included."""
        rows, _ = dtypes.matrix("X", X)
        checks.rank("X", rows.shape, (3,), "[N, L, d]")
        if mask is not None:
            mask = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask) != 0
            checks.mask("mask", mask.shape, "X", rows.shape)
        kept = rows if mask is None else [each[keep] for each, keep in zip(rows, mask, strict=True)]
        return cls.from_list(list(kept), ids, dtype=dtype, dim=rows.shape[2])

    @classmethod
    def from_arrays(
        cls,
        tokens: Any,
        offsets: Any,
        scales: Any = None,
        ids: Iterable[Id] | None = None,
    ) -> PackedEmbeddings:
        """Take documents that are packed already, without a copy where the arrays are contiguous.

        Args:
            tokens: `[T, d]` float16, float32, uint16 (bits of bfloat16) or, with `scales`, int8; numpy or torch.
            offsets: `[N + 1]` integers from 0 to T: document n is the rows from `offsets[n]` to `offsets[n + 1]`.
            scales: float32 `[N]`, finite and not negative, where tokens are int8.
        """
        if getattr(tokens, "dtype", None) == np.int8 or str(getattr(tokens, "dtype", "")) == "torch.int8":
            rows, dtype = np.asarray(tokens), "int8"
        else:
            rows, dtype = dtypes.matrix("tokens", tokens)
        checks.rank("tokens", rows.shape, (2,), "[T, d]")
        checks.at_least("dim", rows.shape[1], 1)
        boundaries = np.ascontiguousarray(np.asarray(offsets))
        if boundaries.dtype.kind not in "iu":
            raise checks.wrong_dtype("offsets", boundaries.dtype, checks.INTEGERS)
        boundaries = boundaries.astype(np.int64, copy=False)
        checks.boundaries("offsets", boundaries.shape)
        checks.offsets("offsets", boundaries, len(rows))
        if (scales is None) is (dtype == "int8"):
            raise checks.not_an_array("scales", scales, "float32 [N] with int8 tokens, None with others")
        if scales is not None:
            scales = np.ascontiguousarray(np.asarray(scales), np.float32)
            checks.scales(scales, len(boundaries) - 1, bool((np.isfinite(scales) & (scales >= 0)).all()))
        names = identifiers.checked(ids, len(boundaries) - 1)
        return cls(dtype, np.ascontiguousarray(rows), boundaries, scales, names)

    @classmethod
    def empty(cls, dim: int, dtype: Any = "float16") -> PackedEmbeddings:
        """No documents, to append to."""
        return cls.from_list([], dtype=dtype, dim=dim)

    @classmethod
    def concatenate(cls, parts: Sequence[PackedEmbeddings]) -> PackedEmbeddings:
        """The documents of all parts in order, in the storage of the first; at least one part."""
        if not parts:
            raise ValueError("parts is empty; want at least one")
        first = parts[0].to(parts[0].dtype)
        for part in parts[1:]:
            first = first._extended(part)
        return first

    # Looking

    @property
    def dtype(self) -> str:
        return self._dtype

    @property
    def dim(self) -> int:
        return self._tokens.shape[1]

    def __len__(self) -> int:
        return len(self._offsets) - 1 if self._rows is None else len(self._rows)

    @property
    def lengths(self) -> Array:
        lengths = np.diff(self._offsets)
        return lengths if self._rows is None else lengths[self._rows]

    @property
    def num_tokens(self) -> int:
        """T: the sum of `lengths`."""
        return int(self._offsets[-1] - self._offsets[0]) if self._rows is None else int(self.lengths.sum())

    @property
    def nbytes(self) -> int:
        row = self.dim * self._tokens.itemsize
        return self.num_tokens * row + (len(self) + 1) * 8 + (4 * len(self) if self._dtype == "int8" else 0)

    @property
    def tokens(self) -> Array:
        """The storage `[T, d]`, read-only: shared, or copied together where documents are not side by side."""
        return _frozen(self._contiguous()[0])

    @property
    def offsets(self) -> Array:
        """int64 `[N + 1]` from 0 to T: document n is the rows from `offsets[n]` to `offsets[n + 1]` of `tokens`."""
        return _offsets(self.lengths)

    @property
    def scales(self) -> Array | None:
        """float32 `[N]` for int8, else None."""
        if self._scales is None:
            return None
        return _frozen(self._scales if self._rows is None else self._scales[self._rows])

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
        if found is None:
            raise checks.no_such_id(name)
        return found

    def __getitem__(self, key: Any) -> Any:
        """An integer: the document `[L, d]`, read-only, in its storage (uint16 bits for bfloat16), or in float32 for int8.
        A slice, integers or a bool mask `[N]`: a view.
        """
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
            slot = int(key) + len(self) if key < 0 else int(key)
            if not 0 <= slot < len(self):
                raise checks.no_such_document(int(key), len(self))
            return _frozen(self._document(slot))
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1 and self._rows is None:
                return self._sliced(start, max(start, stop))
            return self._picked(np.arange(start, stop, step))
        return self._picked(self._indices(key))

    def __iter__(self) -> Iterator[Array]:
        return (self[n] for n in range(len(self)))

    def __repr__(self) -> str:
        ids = "" if self._ids is None else ", with ids"
        return (
            f"PackedEmbeddings({len(self)} documents, {self.num_tokens} tokens, dim={self.dim}, {self._dtype}{ids}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    def __reduce__(self) -> Any:
        tokens, offsets, scales = self._contiguous()
        return _restore, (self._dtype, np.asarray(tokens), offsets, scales, self.ids)

    # Changing

    def to(self, dtype: Any) -> PackedEmbeddings:
        """The documents in another storage. The same view where it is that storage already."""
        dtype = dtypes.name(dtype)
        if dtype == self._dtype:
            return self
        offsets = self.offsets
        tokens = np.empty((int(offsets[-1]), self.dim), dtypes.STORAGE[dtype])
        scales = np.empty(len(self), np.float32) if dtype == "int8" else None
        for begin, end in self._cuts():
            rows, _ = self._floats(begin, end)
            if scales is None:
                tokens[offsets[begin] : offsets[end]] = dtypes.narrow("documents", rows, dtype)
                continue
            for n in range(begin, end):
                at = slice(offsets[n] - offsets[begin], offsets[n + 1] - offsets[begin])
                tokens[offsets[n] : offsets[n + 1]], scales[n] = dtypes.quantize(f"documents[{n}]", rows[at])
        return PackedEmbeddings(dtype, tokens, offsets, scales, self.ids)

    def append(self, documents: Sequence[Any], ids: Iterable[Id] | None = None) -> PackedEmbeddings:
        """The view with `documents` (as in `from_list`) at its end; this one stays as it is.

        In a chain of appends each document is copied a bounded number of times, as with a list. Memory only: a view of a
        folder is copied into memory first. `PackedWriter` appends to the folder.

        Raises:
            ValueError: ids are given where there were none, or the other way round, or one is there already.
        """
        return self._extended(PackedEmbeddings.from_list(documents, ids, dtype=self._dtype, dim=self.dim))

    def remove(self, indices: Any = None, *, ids: Iterable[Id] | None = None) -> PackedEmbeddings:
        """The view without these documents, named by indices, a bool mask `[N]`, or ids. Nothing is copied.

        Raises:
            IndexError, KeyError: there is no such document.
        """
        keep = np.ones(len(self), bool)
        if indices is not None:
            keep[self._indices(indices)] = False
        if ids is not None:
            keep[[self.position(name) for name in ids]] = False
        return self._picked(np.flatnonzero(keep))

    # Files

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a folder in one step: it holds these documents, or is as it was before.

        Args:
            folder: does not exist, or is empty; with `overwrite`, also a folder of packed embeddings. Who has that
                one loaded keeps what they loaded.

        Raises:
            FileExistsError: something is there.
            PackedLocked: with `overwrite`, a writer has the folder open.
        """
        folder = Path(folder).absolute()
        header, data = self._commit()
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
        return _view(folder, reader.read(folder, mapped=mmap, verified=verify))

    @staticmethod
    def verify(folder: str | os.PathLike[str]) -> None:
        """Raise PackedFormatError unless every byte of a folder is as it was written."""
        PackedEmbeddings.load(folder, verify=True)

    # Scoring

    def nothing(self) -> Array:
        return np.empty((0, self.dim), np.float32 if self._dtype == "int8" else self._tokens.dtype)

    def blocks(self) -> Iterator[tuple[Array, Array]]:
        if self._dtype == "int8":
            yield from (self._floats(begin, end) for begin, end in self._cuts())
        else:
            yield from (self._span(*run) if in_place else self._gathered(*run) for run, in_place in self._runs())

    def integers(self) -> Iterator[tuple[Array, Array, Array]] | None:
        if self._scales is None:
            return None
        return (
            (*(self._span(*run) if in_place else self._gathered(*run)), self._scales_of(*run))
            for run, in_place in self._runs()
        )

    def chosen_integers(self, document_index: Array) -> tuple[Array, Array, Array, Array]:
        assert self._scales is not None
        slots = document_index if self._rows is None else self._rows[document_index]
        return self._tokens, self._offsets, self._scales, slots

    def chosen(self, document_index: Array) -> Iterator[tuple[Array, Array, Array, Array]]:
        slots = document_index if self._rows is None else self._rows[document_index]
        if self._dtype != "int8":
            tokens, offsets = self._tokens_from_first(), self._offsets - self._offsets[0]
            yield np.arange(len(slots)), tokens, offsets, slots
            return
        used, index = np.unique(document_index, return_inverse=True)
        order = np.argsort(index, kind="stable")
        ordered, part = index[order], self._picked(used)
        for begin, end in part._cuts():
            where = order[np.searchsorted(ordered, begin) : np.searchsorted(ordered, end)]
            yield where, *part._floats(begin, end), index[where] - begin

    # Inside

    def _lookup(self) -> dict[Id, int]:
        if self._positions is None:
            self._positions = {name: n for n, name in enumerate(self.ids or [])}
        return self._positions

    def _indices(self, key: Any) -> Array:
        """Integers from 0 to N - 1, or a bool mask, as integers."""
        index = np.asarray(key.cpu() if hasattr(key, "cpu") else key)
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise checks.wrong_shape("the mask", index.shape, f"[{len(self)}]")
            return np.flatnonzero(index)
        index = index.astype(np.int64) if not index.size else index
        if index.dtype.kind not in "iu":
            raise checks.wrong_dtype("the index", index.dtype, f"bool or {checks.INTEGERS}")
        index = index.reshape(-1).astype(np.int64)
        checks.index("the index", index, len(self))
        return index

    def _slot(self, n: int) -> int:
        return n if self._rows is None else int(self._rows[n])

    def _document(self, n: int) -> Array:
        slot = self._slot(n)
        rows = self._tokens[self._offsets[slot] : self._offsets[slot + 1]]
        return rows if self._scales is None else rows.astype(np.float32) * self._scales[slot]

    def _sliced(self, start: int, stop: int) -> PackedEmbeddings:
        scales = None if self._scales is None else self._scales[start:stop]
        ids = None if self._ids is None else self._ids[start:stop]
        return PackedEmbeddings(self._dtype, self._tokens, self._offsets[start : stop + 1], scales, ids)

    def _picked(self, index: Array) -> PackedEmbeddings:
        rows = index.astype(np.int64) if self._rows is None else self._rows[index]
        return PackedEmbeddings(self._dtype, self._tokens, self._offsets, self._scales, self._ids, rows, self._room)

    def _tokens_from_first(self) -> Array:
        return self._tokens[self._offsets[0] : self._offsets[-1]]

    def _span(self, begin: int, end: int) -> tuple[Array, Array]:
        """Documents whose slots are side by side, where they lie."""
        slot = self._slot(begin) if begin < end else 0
        offsets = self._offsets[slot : slot + end - begin + 1]
        return self._tokens[offsets[0] : offsets[-1]], offsets - offsets[0]

    def _gathered(self, begin: int, end: int) -> tuple[Array, Array]:
        """Documents copied together."""
        slots = np.arange(begin, end) if self._rows is None else self._rows[begin:end]
        starts, lengths = self._offsets[slots], self._offsets[slots + 1] - self._offsets[slots]
        offsets = _offsets(lengths)
        return self._tokens[np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets

    def _floats(self, begin: int, end: int) -> tuple[Array, Array]:
        """Documents in float32."""
        tokens, offsets = self._span(begin, end) if self._rows is None else self._gathered(begin, end)
        rows = dtypes.widen(tokens, self._dtype)
        if self._scales is not None:
            rows = rows * np.repeat(self._scales_of(begin, end), np.diff(offsets))[:, None]
        return rows, offsets

    def _scales_of(self, begin: int, end: int) -> Array:
        assert self._scales is not None
        return self._scales[begin:end] if self._rows is None else self._scales[self._rows[begin:end]]

    def token_norms(self) -> Array:
        """float32 `[N]`: at least the largest Euclidean norm of a token of each document. Kept once it is known."""
        if self._norms is None:
            norms = np.zeros(len(self), np.float32)
            for begin, end in self._cuts():
                rows, offsets = self._floats(begin, end)
                squares = np.einsum("td,td->t", rows, rows)
                filled = np.flatnonzero(np.diff(offsets))
                if len(filled):
                    norms[begin + filled] = np.sqrt(np.maximum.reduceat(squares, offsets[filled]))
            # Above the rounding of `dim` additions in float32.
            self._norms = norms * np.float32(1 + (self.dim + 4) * 2.0**-23)
        return self._norms

    def _contiguous(self) -> tuple[Array, Array, Array | None]:
        tokens, offsets = self._span(0, len(self)) if self._rows is None else self._gathered(0, len(self))
        return tokens, offsets, self.scales

    def _cuts(self) -> Iterator[tuple[int, int]]:
        """Ranges of documents that make about BLOCK_BYTES of float32, one document at least."""
        ends, begin = np.cumsum(self.lengths), 0
        rows = max(1, BLOCK_BYTES // (4 * self.dim))
        while begin < len(ends):
            before = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + rows, "right")))
            yield begin, end
            begin = end
        if not len(ends):
            yield 0, 0

    def _runs(self) -> Iterator[tuple[tuple[int, int], bool]]:
        """Ranges of documents, each with whether it is long and can be read where it lies; short ones are put together."""
        if self._rows is None or not len(self._rows):
            yield (0, len(self)), self._rows is None
            return
        rows = self._rows
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        starts, ends = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(rows)]])
        long = np.flatnonzero(ends - starts >= RUN_DOCUMENTS)
        done = 0
        for begin, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
            yield from self._short(done, begin)
            yield (begin, end), True
            done = end
        yield from self._short(done, len(rows))

    def _short(self, begin: int, end: int) -> Iterator[tuple[tuple[int, int], bool]]:
        if begin < end:
            part = self._picked(np.arange(begin, end))
            yield from (((begin + first, begin + last), False) for first, last in part._cuts())

    def _extended(self, other: PackedEmbeddings) -> PackedEmbeddings:
        checks.same_dim((len(self), self.dim), (len(other), other.dim))
        other = other.to(self._dtype)
        if not len(other):
            return self
        added, positions = other.ids, None
        if len(self._offsets) > 1 and (self._ids is None) is not (added is None):
            raise checks.ids("some documents have ids and others none", "ids for all or for none")
        if added is not None:
            positions = self._lookup()
            identifiers.new(added, positions)
        grown = _Room.joined(self, other)
        if positions is not None:
            # Handed on, as a chain of appends asks the newest view only; this one makes its own again when asked.
            self._positions = None
            positions.update(zip(added or [], range(len(self), len(grown)), strict=True))
            grown._positions = positions
        return grown

    def _commit(self) -> tuple[Header, dict[str, Any]]:
        """As a folder has it: a header without its parts, and the bytes of each."""
        tokens, offsets, scales = self._contiguous()
        data: dict[str, Any] = {"tokens": tokens, "offsets": offsets}
        names, kind = self.ids, "none"
        if scales is not None:
            data["scales"] = scales
        if names:
            kind = identifiers.kind(names[0])
            if kind == "int64":
                data["ids"] = np.array(names, np.int64)
            else:
                data["ids"], ends = identifiers.encode(names)
                data["id_offsets"] = np.concatenate([[0], ends])
        return Header(self._dtype, self.dim, kind, documents=len(self), tokens=len(tokens)), data


class _Room:
    """Memory with spare room at its end. The view that reaches up to `documents` may append there, others copy."""

    def __init__(self, dtype: str, dim: int, tokens: int, documents: int, ids: list[Id] | None) -> None:
        self.tokens = np.empty((tokens, dim), dtypes.STORAGE[dtype])
        self.offsets = np.zeros(documents + 1, np.int64)
        self.scales = np.empty(documents, np.float32) if dtype == "int8" else None
        self.ids = ids
        self.documents = 0
        self.lock = threading.Lock()

    @classmethod
    def joined(cls, view: PackedEmbeddings, added: PackedEmbeddings) -> PackedEmbeddings:
        """The documents of both: in the room behind the first where it is the one that may append there."""
        room, count = view._room, len(view._offsets) - 1
        if room is not None:
            with room.lock:
                if room.documents == count and room._fits(count + len(added), added.num_tokens):
                    room._put(added)
                    new = np.arange(count, room.documents)
                    return room._view(view._dtype, None if view._rows is None else np.concatenate([view._rows, new]))
        documents, tokens = len(view) + len(added), view.num_tokens + added.num_tokens
        ids: list[Id] | None = None if view._ids is None and added._ids is None else []
        room = cls(view._dtype, view.dim, int(tokens * GROWTH) + 1, int(documents * GROWTH) + 1, ids)
        room._put(view)
        room._put(added)
        return room._view(view._dtype, None)

    def _view(self, dtype: str, rows: Array | None) -> PackedEmbeddings:
        count = self.documents
        offsets = self.offsets[: count + 1]
        scales = None if self.scales is None else self.scales[:count]
        return PackedEmbeddings(dtype, self.tokens, offsets, scales, self.ids, rows, self)

    def _fits(self, documents: int, new_tokens: int) -> bool:
        used = int(self.offsets[self.documents])
        return documents < len(self.offsets) and used + new_tokens <= len(self.tokens)

    def _put(self, added: PackedEmbeddings) -> None:
        start, used = self.documents, int(self.offsets[self.documents])
        tokens, offsets, scales = added._contiguous()
        stop = start + len(added)
        self.tokens[used : used + len(tokens)] = tokens
        self.offsets[start + 1 : stop + 1] = offsets[1:] + used
        if self.scales is not None:
            self.scales[start:stop] = scales
        if self.ids is not None:
            self.ids.extend(added.ids or [])
        self.documents = stop


class PackedWriter:
    """Changes a folder of packed embeddings: `append` and `remove` are commits that a crash cannot halve.

    A commit is on the disk when the call returns; a process that dies at any moment leaves the commits before it. Readers
    may load the folder meanwhile: each sees the last commit of the moment it loaded. There is one writer: another, in any
    process, gets PackedLocked until this one is closed or its process has ended.

        with PackedWriter("index", dim=48) as writer:
            writer.append(documents, ids)

    Args:
        folder: of packed embeddings; a new one is created if `dim` is given.
        dim, dtype: of a new folder. An existing one must have the same, where they are given.

    Raises:
        PackedFormatError: the folder is not one, or is damaged.
        PackedLocked: another writer has it open.
    """

    def __init__(self, folder: str | os.PathLike[str], *, dim: int | None = None, dtype: Any = None) -> None:
        self.folder = Path(folder).absolute()
        if dim is not None and not self.folder.exists():
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
            self._live = _live(self._folder.contents)
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
        return name in self._ids()

    def append(self, documents: Sequence[Any], ids: Iterable[Id] | None = None) -> None:
        """Commit `documents`: as in `PackedEmbeddings.from_list`, or a PackedEmbeddings, whose ids are taken along.

        Raises:
            TypeError, ValueError: as `from_list`, or an id is there already; nothing is committed.
            OSError: the disk refused; nothing is committed, and the writer must be opened again.
        """
        header = self._folder.header
        if isinstance(documents, PackedEmbeddings):
            added = documents.to(header.dtype)
            checks.same_dim((0, header.dim), (0, added.dim))
            names = identifiers.checked(added.ids if ids is None else ids, len(added))
        else:
            added = PackedEmbeddings.from_list(documents, ids, dtype=header.dtype, dim=header.dim)
            names = added.ids
        if not len(added):
            return
        tokens, offsets, scales = added._contiguous()
        data: dict[str, Any] = {"tokens": tokens, "offsets": offsets[1:] + header.tokens}
        if scales is not None:
            data["scales"] = scales
        self._add_ids(names, data)
        first = header.documents
        self._folder.commit(data, documents=len(added), tokens=len(tokens))
        numbers = np.arange(first, first + len(added))
        self._live = np.concatenate([self._live, numbers])
        if self._numbers is not None:
            self._numbers.update(zip(names or [], numbers.tolist(), strict=True))

    def remove(self, indices: Any = None, *, ids: Iterable[Id] | None = None) -> None:
        """Commit that these documents are no longer there; their bytes stay until `compact`.

        Args:
            indices: as `PackedEmbeddings.load` would count them now.
            ids: their names.

        Raises:
            IndexError, KeyError: there is no such document; nothing is committed.
        """
        gone = np.empty(0, np.int64)
        if indices is not None:
            index = np.asarray(indices)
            if index.dtype == bool and index.shape == (len(self),):
                index = np.flatnonzero(index)
            index = index.astype(np.int64).reshape(-1)
            checks.index("indices", index, len(self))
            gone = self._live[index]
        if ids is not None:
            numbers = self._ids()
            for name in (names := list(ids)):
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
        packed = PackedEmbeddings.load(self.folder)
        self._folder.replace_all(*packed._commit())
        self._live = np.arange(len(packed))
        self._numbers = None

    def close(self) -> None:
        self._folder.close()

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ids(self) -> dict[Id, int]:
        if self._numbers is None:
            names = PackedEmbeddings.load(self.folder).ids
            self._numbers = {} if names is None else dict(zip(names, self._live.tolist(), strict=True))
        return self._numbers

    def _add_ids(self, names: list[Id] | None, data: dict[str, Any]) -> None:
        header = self._folder.header
        kind = identifiers.kind(names[0]) if names else "none"
        if kind != header.ids:
            if header.documents:
                raise checks.ids(f"of kind {kind}, and the folder has {header.ids}", "the kind of the folder")
            self._folder.replace_all(*_nothing(header, kind))
        if not names:
            return
        identifiers.new(names, self._ids())
        if kind == "int64":
            data["ids"] = np.array(names, np.int64)
        else:
            data["ids"], data["id_offsets"] = identifiers.encode(names, self._folder.header.parts["ids"].size)


def _nothing(header: Header, kind: str) -> tuple[Header, dict[str, Any]]:
    """An empty folder with this kind of ids."""
    data = {"offsets": np.zeros(1, np.int64)}
    if kind == "utf8":
        data["id_offsets"] = np.zeros(1, np.int64)
    return Header(header.dtype, header.dim, kind), data


def _view(folder: Path, contents: reader.Contents) -> PackedEmbeddings:
    header = contents.header
    ids: Any = contents.ids
    if ids is not None and contents.id_offsets is not None:
        ids = identifiers.MappedIds(ids, contents.id_offsets, str(folder / header.file("ids")))
    rows = _live(contents) if len(contents.removed) else None
    return PackedEmbeddings(header.dtype, contents.tokens, contents.offsets, contents.scales, ids, rows)


def _live(contents: reader.Contents) -> Array:
    keep = np.ones(contents.header.documents, bool)
    keep[contents.removed] = False
    return np.flatnonzero(keep)


def _restore(dtype: str, tokens: Array, offsets: Array, scales: Array | None, ids: list[Id] | None) -> PackedEmbeddings:
    return PackedEmbeddings(dtype, tokens, offsets, scales, ids)


def _offsets(lengths: Any) -> Array:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _frozen(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
