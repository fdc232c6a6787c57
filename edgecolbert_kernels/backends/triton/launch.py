"""Starting a kernel in a few microseconds.

Triton's own launch binds and inspects every argument anew. Here the first call of a variant with a set of alignments takes
that path and keeps the compiled kernel that comes of it; later calls hand addresses to the CUDA driver, where the kernel
takes the parameters that it is expected to, else to Triton's launcher. On a version of Triton whose compiled kernels are not
known, every call takes the first path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from edgecolbert_kernels import checks
from edgecolbert_kernels.backends import cuda_driver

INTERPRETED = bool(knobs.runtime.interpret)
KNOWN = ("3.5.", "3.6.")
# Of a thread.
MOST_REGISTERS = 255
# A grid's first dimension.
MOST_PROGRAMS = 2**31 - 1
# The addresses of Triton's global and profiling scratch, which follow the arguments; these kernels have neither.
SCRATCH = (0, 0)
# What a launch by the driver takes for granted.
ORDINARY = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
ORDINARY |= {"global_scratch_size": 0, "profile_scratch_size": 0}
WARP = 32  # threads
# Bytes; no offset into a storage is as large.
LARGE = 1 << 40

_direct = triton.__version__.startswith(KNOWN)
_ENTRY, _PARAMETER = re.compile(r"\.entry\s+\w+\s*\(([^)]*)\)"), re.compile(r"\.param\s+\.(\w+)\s")


class Kernel:
    """A compiled kernel, and how it is started: with addresses, integers and SCRATCH, on the current device."""

    __slots__ = ("_compiled", "_constants", "_function", "_launch", "_shared", "_threads")

    def __init__(self, compiled: Any, constants: tuple[Any, ...]):
        self._compiled, self._constants = compiled, constants
        self._launch = cuda_driver.launch() if takes_eight_bytes_each(compiled) else None
        self._function = compiled.function
        self._threads, self._shared = WARP * compiled.metadata.num_warps, compiled.metadata.shared

    def start(self, grid: tuple[int, int, int], stream: int, arguments: tuple[int, ...]) -> None:
        if self._launch is not None:
            try:
                self._launch(self._function, grid, self._threads, self._shared, stream, arguments)
                return
            except RuntimeError:
                # In a thread that has no context yet, Triton's launcher provides one; else it says what is wrong.
                pass
        where = *grid, stream, self._function, self._compiled.packed_metadata, None, None, None
        self._compiled.run(*where, *arguments[: -len(SCRATCH)], *self._constants)

    def repeated(
        self, grid: tuple[int, int, int], arguments: tuple[int, ...], output: int, made: cuda_driver.Made
    ) -> cuda_driver.Launch | None:
        """What `start` does; None where that is not the driver's launch."""
        if self._launch is None:
            return None
        how = grid, self._threads, self._shared, arguments, output, made, self
        return cuda_driver.Launch(self._launch.args[0], self._function, *how)


def takes_eight_bytes_each(compiled: Any) -> bool:
    """Whether a compiled kernel takes all of its arguments, then SCRATCH, 8 bytes each, and is launched as usual."""
    types = [each for each in compiled.src.signature.values() if each != "constexpr"]
    names = compiled.src.fn.arg_names[: len(types)]
    entry = _ENTRY.search(compiled.asm.get("ptx", ""))
    return (
        list(compiled.src.signature)[: len(types)] == names
        and all(each == "i64" or each.startswith("*") for each in types)
        and entry is not None
        and _PARAMETER.findall(entry[1]) == ["u64"] * (len(types) + len(SCRATCH))
        and all(getattr(compiled.metadata, name, None) == value for name, value in ORDINARY.items())
    )


class Variant:
    """A kernel with its constants; the dtypes behind its pointers are the same in every launch.

    `aligned` names the arguments, by number, on whose divisibility by 16 the compiler's loads depend: pointers and strides.
    With `all_registers` the compiler takes as many as it needs, where by itself it would spill to let another program in.
    """

    def __init__(
        self,
        function: Any,
        constants: tuple[Any, ...],
        num_warps: int,
        num_stages: int,
        aligned: tuple[int, ...],
        all_registers: bool = False,
    ):
        self.function, self.constants, self.aligned = function, constants, aligned
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        if all_registers:
            self.options["maxnreg"] = MOST_REGISTERS
        self.kernels: dict[Any, Kernel] = {}

    def launch(self, programs: int, rows: int, tensors: Sequence[Tensor | None], integers: tuple[int, ...]) -> None:
        """On a grid of `programs` by `rows`, on the device and stream of the first tensor, which is never None."""
        first = tensors[0]
        assert first is not None
        if INTERPRETED:
            self._interpret(programs, rows, tensors, integers)
            return
        device = first.get_device()
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self._launch(device, programs, rows, tensors, integers)
        else:
            self._launch(device, programs, rows, tensors, integers)

    def _launch(
        self, device: int, programs: int, rows: int, tensors: Sequence[Tensor | None], integers: tuple[int, ...]
    ) -> None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        check_storage(tensors, addresses)
        arguments = *addresses, *integers, *SCRATCH
        key = self.alignment(device, arguments)
        kernel = self.kernels.get(key)
        if kernel is not None:
            kernel.start((programs, rows, 1), torch._C._cuda_getCurrentRawStream(device), arguments)
            return
        some = [tensors[0] if tensor is None else tensor for tensor in tensors]
        compiled = self.function[programs, rows](*some, *integers, *self.constants, **self.options)
        if _direct:
            self.kernels[key] = Kernel(compiled, self.constants)

    def alignment(self, device: int, arguments: Sequence[int]) -> Any:
        """What the compiled kernel depends on beside the dtypes."""
        bits = 0
        for number in self.aligned:
            bits |= arguments[number]
        if not bits & 15:
            return device
        return (device, *((arguments[n] % 16 == 0, arguments[n] == 1) for n in self.aligned))

    def _interpret(self, programs: int, rows: int, tensors: Sequence[Tensor | None], integers: tuple[int, ...]) -> None:
        from edgecolbert_kernels.backends.triton import interpreter

        interpreter.patch()
        given = [tensor for tensor in tensors if tensor is not None]
        wide = [interpreter.widened(tensor.detach()) for tensor in given]
        passed = iter(wide)
        # A null pointer, as on a device.
        some = [wide[0].new_empty(0) if tensor is None else next(passed) for tensor in tensors]
        self.function[programs, rows](*some, *integers, *self.constants)
        interpreter.narrowed(wide, given)


class Launch:
    """A launch that is repeated: device, grid and integers are settled, and addresses come with every call."""

    __slots__ = ("_device", "_grid", "_integers", "_kernels", "_key", "_pointers", "_tail", "_variant")

    def __init__(self, variant: Variant, device: int, programs: int, pointers: int, integers: tuple[int, ...]):
        """Of `variant.launch(programs, 1, ...)` with so many pointers, of which no other than the first two need alignment."""
        self._variant, self._device, self._grid = variant, device, (programs, 1, 1)
        self._pointers, self._integers, self._tail = pointers, integers, (*integers, *SCRATCH)
        self._kernels, self._key = variant.kernels, variant.alignment(device, (0,) * pointers + self._tail)

    def start(self, addresses: tuple[int, ...], tensors: tuple[Tensor | None, ...]) -> None:
        """`addresses` are those of the tensors, 0 for None."""
        first, second = addresses[0], addresses[1]
        kernel = self._kernels.get(self._key)
        if kernel is None or (first | second) & 15 or self._device != torch._C._cuda_getDevice():
            self._variant.launch(self._grid[0], 1, tensors, self._integers)
            return
        if first < LARGE or second < LARGE:
            check_storage(tensors, addresses)
        kernel.start(self._grid, torch._C._cuda_getCurrentRawStream(self._device), addresses + self._tail)

    def repeated(self, addresses: tuple[int, int], output: int, made: cuda_driver.Made) -> cuda_driver.Launch | None:
        """What `start` does with tensors aligned as these; None where it looks at more than addresses."""
        kernel = self._kernels.get(self._key)
        if kernel is None or (addresses[0] | addresses[1]) & 15:
            return None
        return kernel.repeated(self._grid, (0,) * self._pointers + self._tail, output, made)


def check_storage(tensors: Sequence[Tensor | None], addresses: Sequence[int]) -> None:
    for tensor, address in zip(tensors[:2], addresses, strict=False):
        # Of a storage that was given back, as sharding does between uses, only the offset is left.
        if tensor is not None and address == tensor.storage_offset() * tensor.itemsize and tensor.numel():
            raise checks.no_storage(tensor.shape)
