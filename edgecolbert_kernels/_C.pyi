"""CPU kernels, and the launch of GPU kernels. Addresses and integers in, nothing out: the callers check shapes, dtypes and
lifetimes.

A sequence description is one of
    (data, dtype, dim, dim_stride, token_stride, inner_stride, outer_stride, inner_count, count, length, offsets, mask, scales)
    (dtype, dim, pointers, lengths, token_strides, count), of int8 with scales behind it
with addresses as integers and strides in elements; dtype 0 float32, 1 float16, 2 bfloat16, 3 int8 (documents only, with
float32 `scales[count]`); see `csrc/cpu/driver.h`.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

def built_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def get_isa() -> str: ...
def set_isa(name: str) -> None: ...
def set_screening(on: bool) -> bool: ...
def screened() -> tuple[int, int]: ...
def has_openmp() -> bool: ...
def measure_peak(kind: str, seconds: float = 0.05) -> float: ...
def dispatch_rate() -> float: ...
def move_lines(source: int, out: int, runs: int, count: int, ratio: int, threads: int) -> None:
    """The traffic of packing: of each run, int64 (first line read, lines read, first line written), `ratio` lines of 64
    bytes at a time are summed, what is left at its end too, and written past the caches."""

def forward(
    queries: tuple[int, ...],
    documents: tuple[int, ...],
    layout: int,
    index: tuple[int, int, int],
    out: int,
    argmax: int,
    argmax_bytes: int,
    precision: int,
    zero_mode: bool,
    normalize: bool,
    threads: int,
) -> None: ...
def backward(
    queries: tuple[int, ...],
    documents: tuple[int, ...],
    layout: int,
    index: tuple[int, int, int],
    grad: int,
    argmax: int,
    argmax_bytes: int,
    grad_queries: int,
    grad_documents: int,
    normalize: bool,
    accumulate_queries: bool,
    threads: int,
) -> None: ...
def pack_offsets(source: tuple[int, ...], out: int, threads: int) -> None:
    """Where each document begins among the kept tokens: int64 [count + 1] from 0."""

def pack(
    source: tuple[int, ...],
    normalize: bool,
    dtype: int,
    offsets: int,
    out: int,
    scales: int,
    threads: int,
) -> int:
    """Kept tokens to `out`, row `offsets[0]` of the result.

    Returns the first document with a value that is not finite or, unless floats are normalised, became infinite; or -1.
    """

def unpack(source: tuple[int, ...], out: int, threads: int) -> None:
    """The rows of packed documents in float32, `out` being row `offsets[0]`."""

def cuda_launch(
    address: int,
    function: int,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    stream: int,
    arguments: tuple[int, ...],
    /,
) -> None:
    """Start a kernel, `address` being that of the driver's `cuLaunchKernel`, `function` a CUfunction, `shared` in bytes.

    The kernel takes each of its arguments, at most 64, in 8 bytes. A grid with a 0 starts nothing. RuntimeError with the
    CUDA error's number where the driver refuses.
    """

class Launches:
    """Launches by the calls that they came to. A call is `inputs` tensors or None, then settings, the same number always.

    The first tensor is never None. Settings count by identity, tensors by everything but their values: type (one of
    `tensor_types`), device (of `device_type`), requires_grad where `grad_enabled()`, dtype, shape, strides, dispatch keys
    (`raw(keys_of(tensor))`), and their addresses modulo 16. So do `raw(keys_of_calls())`, `function_modes()` and, by
    identity, the value of the context variable and those in dictionaries, given as (dictionary, key). `exchange` is the
    capsule of DLPack's functions that reads tensors; ValueError if it does not.
    """

    def __init__(
        self,
        *,
        inputs: int,
        device_type: int,
        exchange: object,
        tensor_types: tuple[type, ...],
        keys_of: Callable[[Any], Any],
        keys_of_calls: Callable[[], Any],
        raw: Callable[[Any], int],
        function_modes: Callable[[], int],
        grad_enabled: Callable[[], bool],
        device: Callable[[], int],
        stream: Callable[[int], int],
        empty: Callable[..., Any],
        entries: tuple[tuple[dict[Any, Any], Any], ...],
        variable: ContextVar[Any],
    ) -> None: ...
    def __len__(self) -> int: ...
    def repeat(self, *call: Any) -> Any:
        """A new tensor that the launch of this call writes to, started on the current stream.

        None where the call is not known, an input requires a gradient, is on a device other than the current one, has no
        storage, or where anything fails, such as an allocation or the driver.
        """

    def missed(self, *call: Any) -> bool:
        """Whether the last call of `repeat` was with these very objects, and was not known."""

    def keep(self, *call: Any) -> bool:
        """From now on `repeat` of this call does the launch that comes last, as in `cuda_driver.Launch`; nothing with None.

        False where such a call is not repeated in any case. 4096 are kept; after that it begins anew.
        """

    def clear(self) -> None: ...
