"""Storages of token vectors as torch has them."""

from __future__ import annotations

from typing import Any

import torch

from edgecolbert_kernels import checks

STORAGE = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}


def name(dtype: Any) -> str:
    """The storage that a name, a numpy dtype or a torch dtype stands for."""
    known = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype).removeprefix("torch."))
    if known not in STORAGE:
        raise checks.storage_dtype(dtype, tuple(STORAGE))
    return known
