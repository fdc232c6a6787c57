"""Documents of the host, block by block on a device, with the transfer of one block behind the work on another.

A block is copied into pinned memory, from there by a stream of its own to the device, and read there by the caller's stream.
There are two places, on either side, and two events a place: `copied`, from which on the caller's stream may read and the
host may write into the pinned memory again; and `used`, recorded when the caller asks for the next block, from which on
the transfer may write to the device's memory again. So the host runs ahead by one block, memory stays what it is however
large the collection is, and the transfer, the kernels, and the host's reading of a mapped file go on at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, cuda

from edgecolbert_kernels.device import dtypes
from edgecolbert_kernels.device.embeddings import Packed, on_host
from edgecolbert_kernels.device.packing import cuts

BLOCK_BYTES = 1 << 26
PLACES = 2
ALIGNMENT = 256


def blocks(
    documents: Any, device: torch.device, most_tokens: int | None = None, most_documents: int | None = None
) -> Iterator[tuple[slice, Packed]]:
    """All documents of a PackedEmbeddings in order: ranges of them, and their vectors on the device.

    A block is valid until the next one is asked for, in the order of the caller's stream.

    Args:
        device: of any type; only on CUDA does the transfer overlap.
        most_tokens: of a block; a longer document is a block of its own. None: about BLOCK_BYTES.
        most_documents: of a block. None: any number.
    """
    starts = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(documents.lengths, out=starts[1:])
    row = documents.dim * dtypes.STORAGE[documents.dtype].itemsize
    most = max(1, BLOCK_BYTES // row) if most_tokens is None else most_tokens
    ranges = list(cuts(starts, most, most_documents))
    if device.type != "cuda":
        for begin, end in ranges:
            yield slice(begin, end), on_host(documents[begin:end]).to(device)
        return
    if not ranges:
        return
    largest = max(_sizes(row, int(starts[end] - starts[begin]), end - begin)[-1] for begin, end in ranges)
    copier = cuda.Stream(device)
    # What the places' memory was used for before may still be running.
    copier.wait_stream(cuda.current_stream(device))
    places = [_Place(largest, device) for _ in range(min(PLACES, len(ranges)))]
    for number, (begin, end) in enumerate(ranges):
        place = places[number % len(places)]
        sent = place.send(on_host(documents[begin:end]), copier)
        cuda.current_stream(device).wait_event(place.copied)
        yield slice(begin, end), sent
        place.used.record(cuda.current_stream(device))


class _Place:
    """Pinned memory and memory of the device that blocks take turns in."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.there = torch.empty(size, dtype=torch.uint8, device=device)
        self.copied, self.used = cuda.Event(), cuda.Event()

    def send(self, block: Packed, copier: cuda.Stream) -> Packed:
        self.copied.synchronize()  # returns at once for an event that was never recorded
        ends = _sizes(block.tokens.shape[1] * block.tokens.itemsize, block.tokens.shape[0], len(block.offsets) - 1)
        arrived: list[Any] = []
        for each, first in zip(block, (0, *ends), strict=False):
            if each is None:
                arrived.append(None)
                continue
            part = slice(first, first + each.nbytes)
            self.pinned[part].view(each.dtype).view(each.shape).copy_(each)
            arrived.append(self.there[part].view(each.dtype).view(each.shape))
        with cuda.stream(copier):
            copier.wait_event(self.used)
            transfer(self.pinned[: ends[-1]], self.there[: ends[-1]])
            self.copied.record(copier)
        return Packed(*arrived)


def transfer(source: Tensor, target: Tensor) -> None:
    """On the current stream."""
    target.copy_(source, non_blocking=True)


def _sizes(row: int, tokens: int, documents: int) -> list[int]:
    """Where tokens, offsets and scales end, each rounded up to the alignment."""
    ends, last = [], 0
    for size in (row * tokens, 8 * (documents + 1), 4 * documents):
        last = -(-(last + size) // ALIGNMENT) * ALIGNMENT
        ends.append(last)
    return ends
