"""CUDA C++ to machine code with NVRTC, the compiler library that PyTorch's CUDA builds bring: no nvcc and no headers needed.

A kernel is compiled for its constants when it is first called, in some tenths of a second, and kept on disk for the next
process.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
NEWEST_FIRST = ("13", "12")


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message is its log."""


def missing() -> str | None:
    """Why nothing can be compiled, or None."""
    return (
        None
        if _library() is not None
        else "NVRTC, which compiles its kernels, is not found (PyTorch for CUDA brings it)"
    )


@cache
def capabilities() -> tuple[int, ...]:
    """What this NVRTC compiles for: 90 and the like."""
    nvrtc, count = _library(), ctypes.c_int()
    if nvrtc is None:
        return ()
    _check(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(nvrtc, nvrtc.nvrtcGetSupportedArchs(found))
    return tuple(found)


def compiled(source: str, constants: Mapping[str, int], capability: int) -> bytes:
    """The cubin of a file beside this one, for compute capability 90 and the like, with macros for its constants.

    It may include the headers that lie there.
    """
    text, headers = (SOURCES / source).read_bytes(), _headers()
    # Lambdas with an `auto` are functions of the host for NVRTC 13.0, unless it is told otherwise.
    options = [f"--gpu-architecture=sm_{capability}", "--std=c++17", "--device-as-default-execution-space"]
    options += [f"-D{name}={int(value)}" for name, value in constants.items()]
    key = hashlib.sha256(
        b"\0".join([_version(), text, *headers.values(), *(option.encode() for option in options)])
    ).hexdigest()
    folder = _folder()
    if folder is None:
        return _compile(text, source, headers, options)
    kept = folder / f"{key}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        made = _compile(text, source, headers, options)
    _keep(made, kept)
    return made


def _headers() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.h"))}


def _compile(text: bytes, name: str, headers: dict[str, bytes], options: list[str]) -> bytes:
    nvrtc = _library()
    if nvrtc is None:
        raise CompileError(missing())
    program = ctypes.c_void_p()
    strings = ctypes.c_char_p * len(headers)
    included = strings(*headers.values()), strings(*(each.encode() for each in headers))
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), len(headers), *included))
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            log = _read(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            raise CompileError(log.rstrip(b"\0\n").decode(errors="replace"))
        return _read(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, size_of: Callable[..., Any], get: Callable[..., Any]) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, get(program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        raise CompileError(nvrtc.nvrtcGetErrorString(status).decode())


@cache
def _library() -> ctypes.CDLL | None:
    """NVRTC of PyTorch's own CUDA version, where it is there, else any."""
    import torch

    major = (torch.version.cuda or "").split(".")[0]
    versions = sorted(NEWEST_FIRST, key=lambda version: version != major)
    places = [Path(torch.__file__).parent / "lib", *_wheels()]
    found = [name for v in versions for place in places for name in sorted(glob.glob(f"{place}/libnvrtc.so.{v}*"))]
    for name in [*found, *(f"libnvrtc.so.{v}" for v in versions)]:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    return None


def _wheels() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else spec.submodule_search_locations or []
    return [name for root in roots for part in ("cu*", "cuda_nvrtc") for name in glob.glob(f"{root}/{part}/lib")]


@cache
def _version() -> bytes:
    nvrtc, major, minor = _library(), ctypes.c_int(), ctypes.c_int()
    if nvrtc is not None:
        nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}".encode()


def _folder() -> Path | None:
    """None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "edgecolbert_kernels"
    except RuntimeError:
        return None


def _keep(made: bytes, path: Path) -> None:
    """Whole or not at all; a disk that cannot be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(made)
        os.replace(file.name, path)
    except OSError:
        pass
