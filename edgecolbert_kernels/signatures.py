"""Names for the types of the public functions, which annotations of their callers may use too.

Loads neither numpy nor torch: while a program runs, what is made of their types is Any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

Precision: TypeAlias = Literal["exact", "fast"]
MaskMode: TypeAlias = Literal["exclude", "zero"]
BackendName: TypeAlias = Literal["auto", "cpu", "torch", "triton", "cuda"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
Normalization: TypeAlias = Literal["minmax", "zscore", "none"]
Objective: TypeAlias = Literal["kl", "margin_mse"]
Storage: TypeAlias = Literal["float16", "bfloat16", "float32", "int8"]
DeviceStorage: TypeAlias = Literal[Storage, "float8_e4m3fn"]

if TYPE_CHECKING:
    import numpy as np
    import torch

    AnyArray: TypeAlias = np.ndarray | torch.Tensor
    Arrays: TypeAlias = np.ndarray | Sequence[np.ndarray]
    Tensors: TypeAlias = torch.Tensor | Sequence[torch.Tensor]
    Tokens: TypeAlias = AnyArray | Sequence[AnyArray]
    Masks: TypeAlias = AnyArray | Sequence[AnyArray | None] | None
    Integers: TypeAlias = AnyArray | Sequence[int]
    # Some documents: a slice, their numbers, or a bool for each.
    Chosen: TypeAlias = slice | Integers

    Device: TypeAlias = str | torch.device
    ScoreDtype: TypeAlias = type | str | np.dtype[Any] | torch.dtype
    # Not every name that numpy has for a dtype: a misspelt storage is to be found.
    StorageLike: TypeAlias = Storage | type[np.generic] | np.dtype[Any] | torch.dtype
    DeviceStorageLike: TypeAlias = DeviceStorage | StorageLike
else:
    AnyArray = Arrays = Tensors = Tokens = Masks = Integers = Chosen = Any
    Device = ScoreDtype = StorageLike = DeviceStorageLike = Any


class ScoreOptions(TypedDict, total=False):
    """What `maxsim` and its kin take by name."""

    normalize: bool
    mask_mode: MaskMode
    precision: Precision
    out_dtype: ScoreDtype | None


class SearchOptions(TypedDict, total=False):
    """What `search` takes by name."""

    q_mask: Masks
    precision: Precision
    candidates: Sequence[Integers] | None
    filter: Integers | None
    ids: Iterable[str | int] | None
