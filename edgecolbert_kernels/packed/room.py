"""Memory that views append to."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np

from edgecolbert_kernels import dtypes
from edgecolbert_kernels.identifiers import Id
from edgecolbert_kernels.packed.tokens import PackedTokens

Array = np.ndarray
GROWTH = 1.5


class Room:
    """Memory with spare room at its end. The view that reaches up to `documents` may append there, others copy.

    Attributes:
        tokens, offsets, scales: filled up to `documents`.
        ids: of these, None where they have none.
    """

    def __init__(self, parts: Iterable[tuple[PackedTokens, list[Id] | None]]) -> None:
        """For these parts, of one storage and dim, with room for half as much again."""
        parts = list(parts)
        first = parts[0][0]
        tokens, documents = sum(part.num_tokens for part, _ in parts), sum(len(part) for part, _ in parts)
        self.tokens = np.empty((int(tokens * GROWTH) + 1, first.dim), dtypes.STORAGE[first.dtype])
        self.offsets = np.zeros(int(documents * GROWTH) + 2, np.int64)
        self.scales = np.empty(len(self.offsets) - 1, np.float32) if first.dtype == "int8" else None
        self.ids: list[Id] | None = None if all(ids is None for _, ids in parts) else []
        self.documents = 0
        self._lock = threading.Lock()
        for part, ids in parts:
            self._put(part, ids)

    def append(self, documents: int, added: PackedTokens, ids: list[Id] | None) -> bool:
        """Put `added` behind the first `documents`; False where others are there already, or it does not fit."""
        with self._lock:
            if self.documents != documents or not self._fits(added):
                return False
            self._put(added, ids)
            return True

    def _fits(self, added: PackedTokens) -> bool:
        used = int(self.offsets[self.documents])
        return self.documents + len(added) < len(self.offsets) and used + added.num_tokens <= len(self.tokens)

    def _put(self, added: PackedTokens, ids: list[Id] | None) -> None:
        start, used = self.documents, int(self.offsets[self.documents])
        tokens, offsets, scales = added.contiguous()
        stop = start + len(added)
        self.tokens[used : used + len(tokens)] = tokens
        self.offsets[start + 1 : stop + 1] = offsets[1:] + used
        if self.scales is not None:
            self.scales[start:stop] = scales
        if self.ids is not None:
            self.ids.extend(ids or [])
        self.documents = stop
