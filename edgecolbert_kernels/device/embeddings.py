"""Packed token embeddings that stay on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from edgecolbert_kernels import checks
from edgecolbert_kernels.device import dtypes, packing
from edgecolbert_kernels.device.documents import Documents
from edgecolbert_kernels.signatures import Chosen, Device, DeviceStorage, DeviceStorageLike

Id = str | int

# Of float32 that a change of storage makes at a time.
CONVERSION_BYTES = 1 << 27


class Packed(NamedTuple):
    """Token vectors back to back, on a device, as kernels read them."""

    tokens: Tensor  # [T, d]
    offsets: Tensor  # int64 [N + 1], from 0 to T
    scales: Tensor | None  # float32 [N], for int8 and float8_e4m3fn

    def to(self, device: torch.device) -> Packed:
        scales = None if self.scales is None else self.scales.to(device)
        return Packed(self.tokens.to(device), self.offsets.to(device), scales)


class DeviceEmbeddings(Documents):
    """Token vectors of N documents, `[T, d]` without padding, on an accelerator: `maxsim`, `maxsim_indexed` and `search`
    take it as D, with queries on the same device.

    Made by `PackedEmbeddings.to(device)` and by `pack(..., device=...)`; `cpu()` is the way back. A view is frozen:
    `packed[i]` is document i, `packed[a:b]` shares memory, `packed[[3, 1]]` and `packed[mask]` are copies of the chosen
    documents. Storage is that of PackedEmbeddings, or "float8_e4m3fn".

    Attributes:
        dtype: the storage, by name.
        device: where it lies.
        dim: d.
        lengths: int64 `[N]`, a numpy array: tokens of each document.
        nbytes: bytes of the tokens, offsets and scales.
        ids: one for each document, or None.
    """

    __slots__ = ("_host", "_positions", "_starts", "arrays", "ids")

    def __init__(self, arrays: Packed, starts: np.ndarray, ids: Sequence[Id] | None, host: Callable[..., Any]) -> None:
        """For this package: arrays that are checked. `starts` are the offsets on the host; `host` makes what `cpu()`
        returns, from the storage's name, tokens, offsets, scales and ids.
        """
        self.arrays, self._starts, self._host = arrays, starts, host
        self.ids = None if ids is None else list(ids)
        self._positions: dict[Id, int] | None = None

    @property
    def dtype(self) -> DeviceStorage:
        return dtypes.NAMES[self.tokens.dtype]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def dim(self) -> int:
        return self.tokens.shape[1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self._starts)

    @property
    def num_tokens(self) -> int:
        """T: the sum of `lengths`."""
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.arrays if each is not None)

    @property
    def tokens(self) -> Tensor:
        """The storage `[T, d]`, not to be written to."""
        return self.arrays.tokens

    @property
    def offsets(self) -> Tensor:
        """int64 `[N + 1]` on the device: document n is the rows from `offsets[n]` to `offsets[n + 1]` of `tokens`."""
        return self.arrays.offsets

    @property
    def scales(self) -> Tensor | None:
        """float32 `[N]` on the device, for int8 and float8_e4m3fn, else None."""
        return self.arrays.scales

    def position(self, name: Id) -> int:
        """Where the document with this id stands. KeyError where there is none."""
        if self._positions is None:
            self._positions = {each: n for n, each in enumerate(self.ids or [])}
        if name not in self._positions:
            raise checks.no_such_id(name)
        return self._positions[name]

    @overload
    def __getitem__(self, key: int | np.integer[Any]) -> Tensor: ...
    @overload
    def __getitem__(self, key: Chosen) -> DeviceEmbeddings: ...
    def __getitem__(self, key: Any) -> Any:
        """An integer: the document `[L, d]`, in its storage, or in float32 where that has scales. A slice: a view.
        Integers or a bool mask `[N]`: a copy of the chosen documents.
        """
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
            slot = int(key) + len(self) if key < 0 else int(key)
            if not 0 <= slot < len(self):
                raise checks.no_such_document(int(key), len(self))
            rows = self.tokens[self._starts[slot] : self._starts[slot + 1]]
            return rows if self.scales is None else rows.float() * self.scales[slot]
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._sliced(start, max(start, stop))
            return self._picked(np.arange(start, stop, step))
        return self._picked(self.indices_of(key))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[n] for n in range(len(self)))

    def __repr__(self) -> str:
        ids = "" if self.ids is None else ", with ids"
        return (
            f"DeviceEmbeddings({len(self)} documents, {self.num_tokens} tokens, dim={self.dim}, {self.dtype}{ids}, "
            f"{self.nbytes / 2**20:.1f} MiB on {self.device})"
        )

    def cpu(self) -> Any:
        """The same as PackedEmbeddings, in the memory of the host.

        Raises:
            ValueError: the storage is float8_e4m3fn, which the host has not; `to("float16")` first.
        """
        if self.dtype == "float8_e4m3fn":
            raise checks.storage_dtype(self.dtype, tuple(name for name in dtypes.STORAGE if name != self.dtype))
        scales = None if self.scales is None else self.scales.cpu().numpy()
        return self._host(self.dtype, dtypes.to_host(self.tokens), self._starts, scales, self.ids)

    @overload
    def to(self, where: DeviceStorageLike | Literal["cuda"]) -> DeviceEmbeddings: ...
    @overload
    def to(self, where: Device) -> Any: ...
    def to(self, where: Any) -> Any:
        """On another device, or in another storage, which is rounded to on this device.

        Raises:
            ValueError: a finite value is too large for the storage.
        """
        if (device := as_device(where)) is not None:
            if device.type == "cpu":
                return self.cpu()
            if device == self.device:
                return self
            return DeviceEmbeddings(self.arrays.to(device), self._starts, self.ids, self._host)
        storage = dtypes.name(where)
        if storage == self.dtype:
            return self
        kernels = packing.backend(self.device, self.dim, storage)
        tokens, scales, refused = packing.empty(self.num_tokens, len(self), self.dim, storage, self.device)
        for begin, end in packing.cuts(self._starts, CONVERSION_BYTES // (4 * self.dim)):
            part = self._sliced(begin, end)
            kernels.store_rows(
                unpack(part.arrays),
                part.offsets,
                None,
                None,
                False,
                tokens[self._starts[begin] : self._starts[end]],
                None if scales is None else scales[begin:end],
                refused,
            )
        if refused.item():
            raise checks.storage_range("documents", storage)
        return DeviceEmbeddings(Packed(tokens, self.offsets, scales), self._starts, self.ids, self._host)

    def cuda(self) -> DeviceEmbeddings:
        """On the current CUDA device, where it is not on one already."""
        return self if self.device.type == "cuda" else self.to("cuda")

    # What `scoring` asks

    @property
    def resident(self) -> Packed:
        return self.arrays

    def nothing(self) -> Tensor:
        dtype = torch.float32 if self.scales is not None else self.tokens.dtype
        return torch.empty(0, self.dim, dtype=dtype, device=self.device)

    def blocks_on(
        self, device: torch.device, tokens: int | None = None, documents: int | None = None
    ) -> Iterator[tuple[slice, Packed]]:
        """Ranges of documents where they lie, of up to so many tokens (one document at least) and documents."""
        checks.same_device("Q", device, self.device, "D")
        for begin, end in packing.cuts(self._starts, self.num_tokens if tokens is None else tokens, documents):
            yield slice(begin, end), self._sliced(begin, end).arrays

    def _sliced(self, begin: int, end: int) -> DeviceEmbeddings:
        if (begin, end) == (0, len(self)):
            return self
        first, last = self._starts[begin], self._starts[end]
        tokens, offsets, scales = self.arrays
        scales = None if scales is None else scales[begin:end]
        arrays = Packed(tokens[first:last], offsets[begin : end + 1] - int(first), scales)
        ids = None if self.ids is None else self.ids[begin:end]
        return DeviceEmbeddings(arrays, self._starts[begin : end + 1] - first, ids, self._host)

    def _picked(self, index: np.ndarray) -> DeviceEmbeddings:
        starts = np.zeros(len(index) + 1, np.int64)
        np.cumsum(self.lengths[index], out=starts[1:])
        tokens, offsets, scales = self.arrays
        chosen = torch.from_numpy(index).to(self.device, non_blocking=True)
        moved = torch.from_numpy(starts).to(self.device, non_blocking=True)
        shift = (offsets[chosen] - moved[:-1]).repeat_interleave(moved.diff(), output_size=int(starts[-1]))
        rows = shift + torch.arange(int(starts[-1]), device=self.device)
        arrays = Packed(take_rows(tokens, rows), moved, None if scales is None else scales[chosen])
        ids = None if self.ids is None else [self.ids[n] for n in index.tolist()]
        return DeviceEmbeddings(arrays, starts, ids, self._host)


def unpack(arrays: Packed) -> Tensor:
    """float32 `[T, d]`."""
    kernels = packing.backend(arrays.tokens.device, arrays.tokens.shape[1], dtypes.NAMES[arrays.tokens.dtype])
    return kernels.unpack_rows(*arrays)


def take_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    # Indexing knows no float8: its bytes will do.
    if tokens.dtype is torch.float8_e4m3fn:
        return tokens.view(torch.int8)[rows].view(tokens.dtype)
    return tokens[rows]


def as_device(where: Any) -> torch.device | None:
    """A device by name or as such; None for what is none, such as a storage."""
    if isinstance(where, torch.device):
        return where
    if not isinstance(where, str) or where in dtypes.STORAGE:
        return None
    try:
        return torch.device(where)
    except RuntimeError:
        return None


def from_device(tokens: Tensor, offsets: Tensor, scales: Tensor | None, host: Callable[..., Any]) -> DeviceEmbeddings:
    """Arrays of a device that are right; the offsets come to the host."""
    return DeviceEmbeddings(Packed(tokens, offsets, scales), offsets.cpu().numpy(), None, host)


def from_host(documents: Any, device: torch.device, host: Callable[..., Any]) -> DeviceEmbeddings:
    """A copy of the documents of a PackedEmbeddings on a device."""
    arrays = on_host(documents)
    return DeviceEmbeddings(arrays.to(device), arrays.offsets.numpy(), documents.ids, host)


def on_host(documents: Any) -> Packed:
    """The documents of a PackedEmbeddings as tensors of the host, where they lie if they lie side by side."""
    tokens, offsets, scales = documents.contiguous()
    return Packed(
        dtypes.from_host(np.ascontiguousarray(tokens)),
        dtypes.from_host(np.ascontiguousarray(offsets)),
        None if scales is None else dtypes.from_host(np.ascontiguousarray(scales)),
    )
