"""Kernels on the device: loading machine code and starting it, through the CUDA driver."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from edgecolbert_kernels.backends import cuda_driver
from edgecolbert_kernels.backends.cuda import compiler

# CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES and ..._MAX_DYNAMIC_SHARED_SIZE_BYTES
_DECLARED_SHARED, _MAX_DYNAMIC_SHARED = 1, 8


class Kernel:
    """A kernel with its constants, on the devices where it was started.

    Its parameters are addresses and 64-bit integers.
    """

    def __init__(self, source: str, name: str, constants: Mapping[str, int], threads: int):
        self.source, self.name, self.constants, self.threads = source, name, dict(constants), threads
        self._loaded: dict[int, int] = {}
        self._modules: list[ctypes.c_void_p] = []

    def launch(
        self, grid: tuple[int, int], shared: int, tensors: Sequence[Tensor | None], integers: tuple[int, ...]
    ) -> None:
        """On the device and stream of the first tensor, which is never None; `shared` is bytes of memory a block."""
        first = tensors[0]
        assert first is not None
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        self.start(first.get_device(), (*grid, 1), shared, (*addresses, *integers))

    def start(self, device: int, grid: tuple[int, int, int], shared: int, arguments: tuple[int, ...]) -> None:
        """On the current stream of a device."""
        if device == torch._C._cuda_getDevice():
            self._start(device, grid, shared, arguments)
            return
        with torch.cuda.device(device):
            self._start(device, grid, shared, arguments)

    def _start(self, device: int, grid: tuple[int, int, int], shared: int, arguments: tuple[int, ...]) -> None:
        function = self._loaded.get(device)
        if function is None:
            function = self._loaded[device] = self._load(device)
        stream = torch._C._cuda_getCurrentRawStream(device)
        launch = cuda_driver.launch()
        if launch is not None:
            try:
                launch(function, grid, self.threads, shared, stream, arguments)
            except RuntimeError:
                # A thread that has no context yet is given one by the CUDA runtime; else the driver refuses again.
                torch.cuda.current_stream(device).query()
                launch(function, grid, self.threads, shared, stream, arguments)
            return
        count = len(arguments)
        values = (ctypes.c_int64 * count)(*arguments)
        first = ctypes.addressof(values)
        places = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        block = self.threads, 1, 1, shared, ctypes.c_void_p(stream)
        _check(_driver().cuLaunchKernel(ctypes.c_void_p(function), *grid, *block, places, None))

    def repeated(
        self, device: int, grid: tuple[int, int, int], arguments: tuple[int, ...], output: int, made: cuda_driver.Made
    ) -> cuda_driver.Launch | None:
        """What `start` did without shared memory; None where it was not done here, or not by the compiled module."""
        function, launch = self._loaded.get(device), cuda_driver.launch()
        if function is None or launch is None:
            return None
        return cuda_driver.Launch(launch.args[0], function, grid, self.threads, 0, arguments, output, made, self)

    def _load(self, device: int) -> int:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a kernel cannot be loaded while a CUDA graph is captured; make the call once before, on tensors of the "
                "same shapes, strides and alignment"
            )
        major, minor = torch.cuda.get_device_capability(device)
        code = compiler.compiled(self.source, self.constants, 10 * major + minor)
        torch.cuda.synchronize(device)  # makes the device's context, where this is its first use in a thread
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), code))
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, self.name.encode()))
        most = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
        _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, _shared_left(function, most)))
        self._modules.append(module)
        assert function.value is not None
        return function.value


def _shared_left(function: ctypes.c_void_p, most: int) -> int:
    """What a block may have beside what is declared in the kernel."""
    declared = ctypes.c_int()
    _check(_driver().cuFuncGetAttribute(ctypes.byref(declared), _DECLARED_SHARED, function))
    return most - declared.value


@cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL(cuda_driver.LIBRARY)


def _check(status: int) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"the CUDA driver answered {(name.value or str(status).encode()).decode()}")
