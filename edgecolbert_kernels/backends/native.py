"""The compiled module `_C`: loading it, what it supports, and how it is told where tokens lie.

No framework: the backend `cpu` and the numpy path both speak to `_C` through this file. `_C` reads raw memory, so whoever
calls it keeps every array alive and has checked every shape, offset and index.
"""

from __future__ import annotations

import importlib
import os
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

# More are never started; a number that is a slip of the pen should not ask the system for them.
MOST_THREADS = 1024

FLOAT32, FLOAT16, BFLOAT16, INT8 = 0, 1, 2, 3
PRECISIONS = {"exact": 0, "fast": 1}
EVERY, OWN, INDEXED = 0, 1, 2
NO_INDEX = (0, 0, 0)
# An int16 argmax holds the token numbers of documents up to this length.
LONGEST_INT16 = 32768

Operand = tuple[Any, ...]


@cache
def module() -> Any:
    """`_C`, or None where it does not load."""
    return None if missing() else importlib.import_module("edgecolbert_kernels._C")


@cache
def missing() -> str | None:
    """The reason why there is no compiled module, None where there is one."""
    # Late, so that torch's OpenMP runtime, where there is one, is in the process first and both share it.
    try:
        importlib.import_module("edgecolbert_kernels._C")
    except ImportError as error:
        return f"the compiled module edgecolbert_kernels._C does not load ({error})"
    return None


def supports(op: str, device: str, dtype: str) -> str | None:
    if device != "cpu":
        return f"the inputs are on {device} and its kernels run on the CPU"
    if dtype != "float32":
        return f"its kernels accumulate in float32, not in {dtype}"
    return missing()


def padded(address: int, dtype: int, shape: Sequence[int], strides: Sequence[int], mask: int) -> Operand:
    """`[L, d]`, `[N, L, d]` or `[N, K, L, d]`; strides in elements; `mask` is the address of a byte a token, or 0."""
    # Slices of a torch.Size would cost as much as all the rest.
    if len(shape) == 3:
        batch = (strides[0], 0, max(shape[0], 1), shape[0])
    elif len(shape) == 4:
        batch = (strides[1], strides[0], max(shape[1], 1), shape[0] * shape[1])
    else:
        batch = (0, 0, 1, 1)
    return (address, dtype, shape[-1], strides[-1], strides[-2], *batch, shape[-2], 0, mask, 0)


def packed(
    address: int,
    dtype: int,
    shape: Sequence[int],
    strides: Sequence[int],
    offsets: int,
    count: int,
    mask: int,
    scales: int = 0,
) -> Operand:
    """`[T, d]`, sequence n being the rows from `offsets[n]` to `offsets[n + 1]`; of int8, times `scales[n]`."""
    return (address, dtype, shape[1], strides[1], strides[0], 0, 0, 1, count, 0, offsets, mask, scales)


def table(dtype: int, dim: int, addresses: list[int], lengths: list[int], strides: list[int]) -> tuple[Operand, Any]:
    """A list of `[L, d]`, each with its rows `strides[n]` elements apart; with it, the array to keep alive."""
    rows = array("q", [*addresses, *lengths, *strides])
    start, step = rows.buffer_info()[0], len(lengths) * rows.itemsize
    return (dtype, dim, start, start + step, start + 2 * step, len(lengths)), rows


def forward(
    queries: Operand,
    documents: Operand,
    layout: int,
    index: tuple[int, int, int],
    scores: int,
    normalize: bool,
    mask_mode: str,
    precision: str,
    threads: int,
    argmax: int = 0,
    argmax_bytes: int = 4,
) -> None:
    """Write float32 scores, and the argmax unless its address is 0."""
    module().forward(
        queries,
        documents,
        layout,
        index,
        scores,
        argmax,
        argmax_bytes,
        PRECISIONS[precision],
        mask_mode == "zero",
        normalize,
        threads,
    )


@cache
def _threads(own: str | None, openmp: str | None) -> int:
    if own:
        if not own.isdecimal() or int(own) < 1:
            raise ValueError(f"EDGECOLBERT_NUM_THREADS is {own!r}; want a number of threads, at least 1")
        return min(int(own), MOST_THREADS)
    # A number, or one for each level of nesting.
    first = (openmp or "").split(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        return min(int(first), MOST_THREADS)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Threads for calls without torch: EDGECOLBERT_NUM_THREADS, else OMP_NUM_THREADS, else the CPUs of this process.

    ValueError: the first is not a number above 0.
    """
    return _threads(os.environ.get("EDGECOLBERT_NUM_THREADS"), os.environ.get("OMP_NUM_THREADS"))
