"""The launch of the CUDA driver, for kernels of any compiler, without a library or a header of CUDA."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial

from edgecolbert_kernels.backends import native

Start = Callable[[int, tuple[int, int, int], int, int, int, tuple[int, ...]], None]

LIBRARY = "libcuda.so.1"


@cache
def launch() -> Start | None:
    """`_C.cuda_launch` of a function, grid, threads, shared bytes, stream and arguments, with the driver's address filled in.

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
