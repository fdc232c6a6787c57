"""The CUDA C++ kernels on the CPU: compiled by g++ with `emulated/cuda.h`, and started by the backend's own Python.

Each launch runs twice: with every buffer at the end of a page, blocks and threads in order, then with every buffer at the
start of a page, all in reverse. What lies beside a page cannot be read, what lies between a buffer's rows is NaN, and both
runs must answer with the same bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from edgecolbert_kernels.backends.cuda import compiler, driver, gradients, scoring

HERE = Path(__file__).parent / "emulated"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
OPTIONS = [
    "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", f"-I{HERE}",
    "-fno-strict-aliasing",
    "-w",  # a constant that is 0 leaves much unused
    # What is not written is not 0; what has no meaning is an illegal instruction.
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error",
]  # fmt: skip
PROCESSES = 2  # of the compiler, at a time
PAGE = mmap.PAGESIZE
NOTHING = 0xFF
# Of compute capability 9.0: bytes of shared memory that a block and a multiprocessor have.
MEMORY = 232_448, 233_472

T = TypeVar("T")


@cache
def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if not sys.platform.startswith("linux") or COMPILER is None:
        return "it takes Linux and g++"
    command = [COMPILER, *OPTIONS, "-x", "c++", "-fsyntax-only", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else f"{COMPILER} does not know an option: {done.stderr.strip()[-200:]}"


class EmulationError(RuntimeError):
    """A kernel did what it must not, or waits for what never comes."""


class Emulator:
    """In place of the driver: the backend's planners make its kernels, and it runs them."""

    def __init__(self, folder: Path, monkeypatch: Any, processors: int = 132):
        """Libraries are kept in `folder`; `processors` is what the planners take for the number of multiprocessors."""
        self.folder = folder
        self.tensors: dict[int, Tensor] = {}
        self.planned: dict[Path, Kernel] | None = None
        self.launches = 0
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(scoring, "_kernel", lambda *a: Kernel(self, "rerank.cu", "rerank", dict(a[0]), a[1]))
        monkeypatch.setattr(gradients, "_kernel", self._gradients)
        monkeypatch.setattr(gradients, "_memory", lambda device: MEMORY)
        monkeypatch.setattr(scoring, "_rerank", self._noting(scoring._rerank))
        monkeypatch.setattr(torch, "empty", self._noting(torch.empty))
        self.use(processors)

    def use(self, processors: int) -> None:
        self._monkeypatch.setattr(scoring, "_plans", {})
        self._monkeypatch.setattr(gradients, "_plans", {})
        self._monkeypatch.setattr(driver, "processors", lambda device: processors)

    def __call__(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """What the calls of the backend return; every kernel that they start is compiled first."""
        self.planned = {}
        for call in calls:
            call()
        missing = [kernel for library, kernel in self.planned.items() if not library.exists()]
        self.planned = None
        with ThreadPoolExecutor(PROCESSES) as pool:
            list(pool.map(Kernel.compile, missing))
        return [call() for call in calls]

    def note(self, *values: Any) -> None:
        """Tensors that a kernel may be given the addresses of."""
        self.tensors |= {value.data_ptr(): value for value in values if isinstance(value, Tensor)}

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found = function(*arguments, **options)
            self.note(found)
            return found

        def noted(*arguments: Any, **options: Any) -> Any:
            self.note(*arguments)
            return call(*arguments, **options)

        return noted

    def _gradients(self, name: str, constants: tuple[tuple[str, int], ...]) -> Kernel:
        return Kernel(self, f"{name}.cu", name, dict(constants), 32 * dict(constants)["WARPS"])


class Kernel(driver.Kernel):
    def __init__(self, emulator: Emulator, source: str, name: str, constants: Mapping[str, int], threads: int):
        super().__init__(source, name, constants, threads)
        self.emulator = emulator
        path = compiler.SOURCES / source
        defined = {**{name: int(value) for name, value in constants.items()}, "SOURCE": f'"{path}"', "KERNEL": name}
        self.command = [*OPTIONS, *(f"-D{name}={value}" for name, value in defined.items()), f"{HERE / 'launch.cpp'}"]
        parts = [path, *sorted(HERE.iterdir())]
        key = hashlib.sha256(b"\0".join([*map(Path.read_bytes, parts), *map(str.encode, self.command)])).hexdigest()
        self.library = emulator.folder / f"{key}.so"

    def compile(self) -> None:
        assert COMPILER is not None
        with tempfile.TemporaryDirectory(dir=self.library.parent) as folder:
            made = f"{folder}/kernel.so"
            done = subprocess.run([COMPILER, *self.command, "-o", made], capture_output=True, text=True)
            if done.returncode:
                raise EmulationError(done.stderr)
            os.replace(made, self.library)

    def launch(
        self, grid: tuple[int, int], shared: int, tensors: Sequence[Tensor | None], integers: tuple[int, ...]
    ) -> None:
        self.emulator.note(*tensors)
        super().launch(grid, shared, tensors, integers)

    def start(self, device: int, grid: tuple[int, int, int], shared: int, arguments: tuple[int, ...]) -> None:
        if self.emulator.planned is not None:
            self.emulator.planned[self.library] = self
            return
        if not self.library.exists():
            self.compile()
        library = _loaded(self.library)
        self.emulator.launches += 1
        if len(arguments) != library.num_arguments():
            raise EmulationError(f"{len(arguments)} arguments of {library.num_arguments()}")
        pointers, written = library.num_pointers(), library.written_pointers()
        tensors = [self.emulator.tensors[each] if each else None for each in arguments[:pointers]]
        found = []
        for backwards in (False, True):
            buffers = [None if x is None else Buffer(x, at_end=not backwards) for x in tensors]
            places = [0 if buffer is None else buffer.address for buffer in buffers]
            _run(library, grid, self.threads, shared, (*places, *arguments[pointers:]), backwards, buffers)
            for number, buffer in enumerate(buffers):
                if buffer is not None and buffer.changed(inside=not written >> number & 1):
                    raise EmulationError(f"argument {number} was written where it must not be")
            found.append([each for number, each in enumerate(buffers) if each is not None and written >> number & 1])
        for forth, back in zip(*found, strict=True):
            if not torch.equal(forth.contents(), back.contents()):
                raise EmulationError("the order of threads and blocks changes what is written")
        for number, buffer in enumerate(buffers):
            if buffer is not None and written >> number & 1:
                tensor = tensors[number]
                assert tensor is not None
                tensor.detach().copy_(buffer.tensor)


class Buffer:
    """A copy of a tensor, strides included, at one end of pages between two that nobody may touch."""

    def __init__(self, tensor: Tensor, at_end: bool):
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
        self.size = span * tensor.element_size()
        inner = -(-self.size // PAGE) * PAGE
        memory = mmap.mmap(-1, inner + 2 * PAGE)
        self.start = PAGE + (inner - self.size if at_end else 0)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.address, self.first, self.last = base + self.start, base, base + inner + 2 * PAGE
        self.pages = torch.frombuffer(memory, dtype=torch.uint8)[PAGE : PAGE + inner]
        self.pages.fill_(NOTHING)
        if span:
            flat = torch.frombuffer(memory, dtype=tensor.dtype, count=span, offset=self.start)
            self.tensor = flat.as_strided(tensor.shape, tensor.stride())
            self.tensor.copy_(tensor.detach())
        else:
            self.tensor = torch.empty_like(tensor)
        for guard in (base, base + PAGE + inner):
            if _libc().mprotect(ctypes.c_void_p(guard), PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self._before = self.pages.clone()

    def contents(self) -> Tensor:
        start = self.start - PAGE
        return self.pages[start : start + self.size]

    def changed(self, inside: bool) -> bool:
        """Whether anything was written; only around its contents, unless `inside`."""
        differs = self.pages != self._before
        if not inside:
            differs[self.start - PAGE : self.start - PAGE + self.size] = False
        return bool(differs.any())


def _run(
    library: ctypes.CDLL,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    arguments: tuple[int, ...],
    backwards: bool,
    buffers: Sequence[Buffer | None],
) -> None:
    message = ctypes.create_string_buffer(400)
    values = (ctypes.c_int64 * len(arguments))(*arguments)
    block = threads, ctypes.c_size_t(shared), int(backwards)
    if library.launch(values, *grid[:2], *block, message, ctypes.c_size_t(len(message))):
        text = message.value.decode()
        address = re.search(r"outside, at (0x\w+)", text)
        where = int(address[1], 16) if address else -1
        for number, buffer in enumerate(buffers):
            if buffer is not None and buffer.first <= where < buffer.last:
                text += f": {where - buffer.address} bytes from the start of argument {number}, which has {buffer.size}"
        raise EmulationError(text)


@cache
def _loaded(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
