"""How token vectors are stored: the dtypes, and the roundings from one to another.

float16, float32, bfloat16 (as uint16 bits, since numpy has none), and int8 with one scale a document: x is about v * scale,
with scale = max|x| / 127 and v = rint(x / scale) from -127 to 127. A document of zeros has scale 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgecolbert_kernels import checks
from edgecolbert_kernels.signatures import Storage

Array = np.ndarray

# Little-endian: the bytes of a file are those of the memory.
STORAGE: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
}
LARGEST_INT8 = 127
# The largest |x| of a document below which it counts as zero: its scale would be subnormal, or nearly.
SMALLEST_INT8 = np.float32(2e-36)


def name(dtype: Any) -> Storage:
    """The storage that a name, a numpy dtype or a torch dtype stands for."""
    known = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype).removeprefix("torch."))
    if known not in STORAGE:
        raise checks.storage_dtype(dtype, tuple(STORAGE))
    return known  # type: ignore[return-value]


def matrix(label: str, seen: Any) -> tuple[Array, Storage]:
    """Token vectors as numpy has them, with the name of their storage; a tensor comes without its gradient.

    Nothing is copied where the values can be read as they lie. float64 becomes float32.
    """
    if not isinstance(seen, np.ndarray):
        seen = _from_tensor(label, seen)
    if seen.dtype.name == "bfloat16":  # of ml_dtypes
        return seen.view(np.uint16), "bfloat16"
    if seen.dtype == np.uint16:
        return seen, "bfloat16"
    if seen.dtype.kind != "f":
        raise checks.wrong_dtype(label, seen.dtype, f"{checks.FLOATS}, or uint16 for the bits of bfloat16")
    if seen.dtype.itemsize == 2:
        return seen.astype(STORAGE["float16"], copy=False), "float16"
    return _rounded(label, seen, "float32"), "float32"


def widen(tokens: Array, dtype: str) -> Array:
    """As float32; int8 as the integers they are, without their scale."""
    if dtype == "bfloat16":
        return (tokens.astype(np.uint32) << 16).view(np.float32)
    return tokens.astype(np.float32, copy=False)


def narrow(label: str, rows: Array, dtype: str) -> Array:
    """float32 in any storage but int8, rounded to nearest even.

    Raises:
        ValueError: a finite value would become infinite.
    """
    if dtype != "bfloat16":
        return _rounded(label, rows, dtype)
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    infinite = (rounded & 0x7FFF) == 0x7F80
    if infinite.any() and np.isfinite(rows[infinite]).any():
        raise checks.storage_range(label, dtype)
    # The carry of a rounding must not turn a NaN into an infinity or a zero.
    return np.where(np.isnan(rows), np.uint16(0x7FC0), rounded)


def quantize(label: str, rows: Array) -> tuple[Array, np.float32]:
    """One document, float32 [L, d], as int8 and its scale."""
    largest = np.float32(np.abs(rows).max(initial=0))
    if not np.isfinite(largest):
        raise checks.storage_range(label, "int8")
    if largest < SMALLEST_INT8:
        return np.zeros(rows.shape, np.int8), np.float32(0)
    values = np.rint(rows * (np.float32(LARGEST_INT8) / largest))
    return values.astype(np.int8), largest / np.float32(LARGEST_INT8)


def store(label: str, rows: Array, given: str, wanted: str, out: Array) -> np.float32 | None:
    """Write one document into `out`, which has its shape; the scale where `wanted` is int8."""
    if given == wanted:
        out[:] = rows
        return None
    rows = widen(rows, given)
    if wanted != "int8":
        out[:] = narrow(label, rows, wanted)
        return None
    out[:], scale = quantize(label, rows)
    return scale


def _rounded(label: str, rows: Array, dtype: str) -> Array:
    if rows.dtype == STORAGE[dtype]:
        return rows
    try:
        with np.errstate(over="raise"):
            return rows.astype(STORAGE[dtype])
    except FloatingPointError:
        raise checks.storage_range(label, dtype) from None


def _from_tensor(label: str, seen: Any) -> Array:
    if not hasattr(seen, "detach"):
        raise checks.not_an_array(label, seen)
    tensor = seen.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()
