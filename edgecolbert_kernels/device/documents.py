"""What stored documents of the host and of a device share. Without torch, until queries on a device arrive."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from edgecolbert_kernels import checks
from edgecolbert_kernels.scoring import Stored


class Documents(Stored):
    """Stored documents that are chosen by index or mask, and scored on a device."""

    __slots__ = ()

    def position(self, name: Any) -> int:
        """Where the document with this id stands. KeyError where there is none."""
        raise NotImplementedError

    def __contains__(self, name: object) -> bool:
        """Whether a document has this id."""
        try:
            self.position(name)
        except KeyError:
            return False
        return True

    def indices_of(self, key: Any) -> np.ndarray:
        """Those that `key` names, as `indices_of` below."""
        return indices_of(key, len(self))

    def device_scores(self, *arguments: Any) -> Any:
        return _scores().score(self, *arguments)

    def device_pair_scores(self, *arguments: Any) -> Any:
        return _scores().score_pairs(self, *arguments)


def indices_of(key: Any, count: int) -> np.ndarray:
    """Integers from 0 to `count` - 1, or a bool mask `[count]`, as int64 integers on the host.

    Raises:
        TypeError: neither integers nor bools.
        ValueError: the mask has another shape.
        IndexError: there is no such document.
    """
    index = np.asarray(key.cpu() if hasattr(key, "cpu") else key)
    if index.dtype == bool:
        if index.shape != (count,):
            raise checks.wrong_shape("the mask", index.shape, f"[{count}]")
        return np.flatnonzero(index)
    index = index.astype(np.int64) if not index.size else index
    if index.dtype.kind not in "iu":
        raise checks.wrong_dtype("the index", index.dtype, f"bool or {checks.INTEGERS}")
    index = index.reshape(-1)
    checks.index("the index", index, count)
    return index.astype(np.int64)


@cache
def _scores() -> ModuleType:
    from edgecolbert_kernels.device import scores

    return scores
