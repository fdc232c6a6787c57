"""Where the token vectors of documents lie, and how kernels get at them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgecolbert_kernels import dtypes
from edgecolbert_kernels.backends.packed import available, unpack_rows
from edgecolbert_kernels.device.documents import Documents
from edgecolbert_kernels.signatures import Storage

Array = np.ndarray

# Documents that are wanted in float32, or side by side where they are scattered, are copied in blocks of this size.
BLOCK_BYTES = 1 << 25
# A run of neighbours at least this long is read where it lies.
RUN_DOCUMENTS = 256


class PackedTokens(Documents):
    """Token vectors of N documents: all of a storage, a range of it, or chosen ones."""

    __slots__ = ("_dtype", "_norms", "_offsets", "_rows", "_scales", "_tokens", "searched")

    def __init__(
        self, dtype: Storage, tokens: Array, offsets: Array, scales: Array | None, rows: Array | None = None
    ) -> None:
        """For this package: arrays that are checked. `offsets` may start anywhere in `tokens`; `rows` are the chosen
        documents, None for all.
        """
        self._dtype, self._tokens, self._offsets, self._scales, self._rows = dtype, tokens, offsets, scales, rows
        self._norms: Array | None = None
        self.searched = 0.0  # queries, in all these documents
        self.operand = None

    def __reduce__(self) -> Any:
        # Without what kernels were told of the arrays: their addresses.
        return PackedTokens, (self._dtype, self._tokens, self._offsets, self._scales, self._rows)

    @property
    def dtype(self) -> Storage:
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
        return frozen(self.contiguous()[0])

    @property
    def offsets(self) -> Array:
        """int64 `[N + 1]` from 0 to T: document n is the rows from `offsets[n]` to `offsets[n + 1]` of `tokens`."""
        return offsets_of(self.lengths)

    @property
    def scales(self) -> Array | None:
        """float32 `[N]` for int8, else None."""
        if self._scales is None:
            return None
        return frozen(self._scales if self._rows is None else self._scales[self._rows])

    # What kernels read

    def nothing(self) -> Array:
        return np.empty((0, self.dim), np.float32 if self._dtype == "int8" else self._tokens.dtype)

    def blocks(self) -> Iterator[tuple[Array, Array]]:
        if self._dtype == "int8":
            yield from (self.floats(begin, end) for begin, end in self.cuts())
        else:
            yield from (self._span(*run) if in_place else self._gathered(*run) for run, in_place in self._runs())

    def storage(self) -> tuple[Array, Array, Array | None]:
        return self._tokens, self._offsets, self._scales

    def places(self, document_index: Array | None) -> Array | None:
        return self._rows if document_index is None else self._slots(document_index)

    def chosen(self, document_index: Array) -> Iterator[tuple[Array, Array, Array, Array]]:
        if self._dtype != "int8":
            tokens, offsets = self._tokens[self._offsets[0] : self._offsets[-1]], self._offsets - self._offsets[0]
            yield np.arange(len(document_index)), tokens, offsets, self._slots(document_index)
            return
        used, index = np.unique(document_index, return_inverse=True)
        order = np.argsort(index, kind="stable")
        ordered, part = index[order], self._part(used)
        for begin, end in part.cuts():
            where = order[np.searchsorted(ordered, begin) : np.searchsorted(ordered, end)]
            yield where, *part.floats(begin, end), index[where] - begin

    def token_norms(self) -> Array:
        """float32 `[N]`: at least the largest Euclidean norm of a token of each document. Kept once it is known."""
        if self._norms is None:
            norms = np.zeros(len(self), np.float32)
            for begin, end in self.cuts():
                rows, offsets = self.floats(begin, end)
                squares = np.einsum("td,td->t", rows, rows)
                filled = np.flatnonzero(np.diff(offsets))
                if len(filled):
                    norms[begin + filled] = np.sqrt(np.maximum.reduceat(squares, offsets[filled]))
            # Above the rounding of `dim` additions in float32.
            self._norms = norms * np.float32(1 + (self.dim + 4) * 2.0**-23)
        return self._norms

    # For the rest of the package

    def cuts(self) -> Iterator[tuple[int, int]]:
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

    def floats(self, begin: int, end: int) -> tuple[Array, Array]:
        """Documents in float32 `[t, d]`, with their boundaries from 0."""
        tokens, offsets = self.stored(begin, end)
        scales = None if self._scales is None else self._scales_of(begin, end)
        # The kernels take subnormal scales for zeros.
        normal = scales is None or not ((scales > 0) & (scales < np.finfo(np.float32).tiny)).any()
        if self._dtype != "float32" and normal and available():
            return unpack_rows(tokens, offsets, scales), offsets
        rows = dtypes.widen(tokens, self._dtype)
        if scales is not None:
            rows = rows * np.repeat(scales, np.diff(offsets))[:, None]
        return rows, offsets

    def stored(self, begin: int, end: int) -> tuple[Array, Array]:
        """Documents in their storage, int8 without its scales, with their boundaries from 0."""
        return self._span(begin, end) if self._rows is None else self._gathered(begin, end)

    def contiguous(self) -> tuple[Array, Array, Array | None]:
        """Tokens, offsets from 0 and scales of these documents alone."""
        return *self.stored(0, len(self)), self.scales

    def document(self, n: int) -> Array:
        """`[L, d]` in its storage; int8 in float32."""
        slot = self._slot(n)
        rows = self._tokens[self._offsets[slot] : self._offsets[slot + 1]]
        return rows if self._scales is None else rows.astype(np.float32) * self._scales[slot]

    # Inside

    def _slot(self, n: int) -> int:
        return n if self._rows is None else int(self._rows[n])

    def _slots(self, index: Array) -> Array:
        return index if self._rows is None else self._rows[index]

    def _part(self, index: Array) -> PackedTokens:
        return PackedTokens(self._dtype, self._tokens, self._offsets, self._scales, self._slots(index))

    def _scales_of(self, begin: int, end: int) -> Array:
        assert self._scales is not None
        return self._scales[begin:end] if self._rows is None else self._scales[self._rows[begin:end]]

    def _span(self, begin: int, end: int) -> tuple[Array, Array]:
        """Documents whose slots are side by side, where they lie."""
        slot = self._slot(begin) if begin < end else 0
        offsets = self._offsets[slot : slot + end - begin + 1]
        return self._tokens[offsets[0] : offsets[-1]], offsets - offsets[0]

    def _gathered(self, begin: int, end: int) -> tuple[Array, Array]:
        """Documents copied together."""
        slots = self._slots(np.arange(begin, end))
        starts, lengths = self._offsets[slots], self._offsets[slots + 1] - self._offsets[slots]
        offsets = offsets_of(lengths)
        return self._tokens[np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets

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
            part = self._part(np.arange(begin, end))
            yield from (((begin + first, begin + last), False) for first, last in part.cuts())


def offsets_of(lengths: Any) -> Array:
    """int64 `[N + 1]`, from 0 to their sum."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def frozen(array: Array) -> Array:
    """A read-only view."""
    view = array.view()
    view.flags.writeable = False
    return view
