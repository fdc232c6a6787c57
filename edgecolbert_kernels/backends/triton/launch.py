"""Starting a kernel in a few microseconds.

Triton's own launch binds and inspects every argument anew. Here the first call of a variant with a set of alignments takes
that path and keeps the compiled kernel that comes of it; later calls hand it addresses. On a version of Triton whose
compiled kernels are not known to be called so, every call takes the first path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from edgecolbert_kernels import checks

INTERPRETED = bool(knobs.runtime.interpret)
KNOWN = ("3.5.", "3.6.")
# Of a thread.
MOST_REGISTERS = 255
# A grid's first dimension.
MOST_PROGRAMS = 2**31 - 1

_direct = triton.__version__.startswith(KNOWN)


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
        self.compiled: dict[Any, Any] = {}

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
        arguments = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        for tensor, address in zip(tensors[:2], arguments, strict=False):
            # Of a storage that was given back, as sharding does between uses, only the offset is left.
            if tensor is not None and address == tensor.storage_offset() * tensor.itemsize and tensor.numel():
                raise checks.no_storage(tensor.shape)
        arguments += integers
        bits = 0
        for number in self.aligned:
            bits |= arguments[number]
        key: Any = device
        if bits & 15:
            key = (device, *((arguments[n] % 16 == 0, arguments[n] == 1) for n in self.aligned))
        kernel = self.compiled.get(key)
        if kernel is None:
            some = [tensors[0] if tensor is None else tensor for tensor in tensors]
            kernel = self.function[programs, rows](*some, *integers, *self.constants, **self.options)
            if _direct:
                self.compiled[key] = kernel
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        where = programs, rows, 1, stream, kernel.function, kernel.packed_metadata, None, None, None
        kernel.run(*where, *arguments, *self.constants)

    def _interpret(self, programs: int, rows: int, tensors: Sequence[Tensor | None], integers: tuple[int, ...]) -> None:
        from edgecolbert_kernels.backends.triton import interpreter

        interpreter.patch()
        given = [tensor for tensor in tensors if tensor is not None]
        wide = [interpreter.widened(tensor.detach()) for tensor in given]
        passed = iter(wide)
        some = [wide[0] if tensor is None else next(passed) for tensor in tensors]
        self.function[programs, rows](*some, *integers, *self.constants)
        interpreter.narrowed(wide, given)
