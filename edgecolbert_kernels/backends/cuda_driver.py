"""The launch of the CUDA driver, for kernels of any compiler, without a library or a header of CUDA."""

from __future__ import annotations

import ctypes
from functools import cache, partial
from typing import Any, NamedTuple

from edgecolbert_kernels.backends import native

# Of a function, grid, threads, shared bytes, stream and arguments; the driver's address is filled in.
Start = partial[None]

LIBRARY = "libcuda.so.1"


# Sizes, strides and dtype.
Made = tuple[tuple[int, ...], tuple[int, ...], Any]


def contiguous(shape: tuple[int, ...], dtype: Any) -> Made:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(shape), tuple(reversed(strides[: len(shape)])), dtype


class Launch(NamedTuple):
    """One that can be repeated, as `_C.Launches` keeps it."""

    address: int
    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    # 0 for those that are addresses: the inputs' come first, `output` is the place of the result's.
    arguments: tuple[int, ...]
    output: int
    # What the result is made of, on the current device: sizes, strides and dtype.
    made: Made
    # Whoever keeps the function loaded.
    owner: object


@cache
def launch() -> Start | None:
    """`_C.cuda_launch` with the driver's address filled in.

    None without the compiled module or a driver. A function belongs to a device's context, which the calling thread must
    have made its own.
    """
    function = getattr(native.module(), "cuda_launch", None)
    if function is None:
        return None
    try:
        address = ctypes.cast(ctypes.CDLL(LIBRARY).cuLaunchKernel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
    return partial(function, address)
