"""Storages of token vectors as torch has them.

Beside those of the host there is "float8_e4m3fn": four bits of exponent and three of mantissa, with one scale a document,
max|x| / 448. A value is off by at most 2^-4 of itself, and by 2^-10 of the scale where it is below 2^-6 of it: of unit
vectors int8 loses less, so that e4m3 is for values of very different sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecolbert_kernels import checks
from edgecolbert_kernels.signatures import DeviceStorage

STORAGE: dict[DeviceStorage, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
SCALED = ("int8", "float8_e4m3fn")
NAMES = {dtype: name for name, dtype in STORAGE.items()}


def name(dtype: Any) -> DeviceStorage:
    """The storage that a name, a numpy dtype or a torch dtype stands for."""
    known = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype).removeprefix("torch."))
    if known not in STORAGE:
        raise checks.storage_dtype(dtype, tuple(STORAGE))
    return known


def from_host(tokens: np.ndarray) -> Tensor:
    """An array of stored vectors as a tensor on the same memory, which is only read."""
    if not tokens.flags.writeable:
        # torch warns of memory that it may not write to.
        interface = {**tokens.__array_interface__, "data": (tokens.__array_interface__["data"][0], False)}
        tokens = np.asarray(_Lifted(tokens, interface))
    if tokens.dtype == np.uint16:
        return torch.from_numpy(tokens.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(tokens)


def to_host(tokens: Tensor) -> np.ndarray:
    """The other way round: bfloat16 as uint16 bits."""
    tokens = tokens.cpu()
    if tokens.dtype is torch.bfloat16:
        return tokens.view(torch.int16).numpy().view(np.uint16)
    return tokens.numpy()


class _Lifted:
    """Memory with another interface; holds on to the array that owns it."""

    def __init__(self, owner: np.ndarray, interface: dict[str, Any]) -> None:
        self.owner, self.__array_interface__ = owner, interface
