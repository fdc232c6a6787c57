"""Which implementation runs a call.

`cpu` is the compiled module, `triton` the GPU kernels, `cuda` those with some of them in CUDA C++, `torch` plain PyTorch on
any device. The choice is made at every
call: the innermost `backend()` context, else the variable EDGECOLBERT_BACKEND, else the fastest that can run. Each backend is
a module with `supports`, `forward` and `backward`; it is imported when it is first chosen.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import get_args

from edgecolbert_kernels.backends import native
from edgecolbert_kernels.signatures import BackendName

BACKENDS = get_args(BackendName)
# Of a GPU, the fastest first.
ON_GPU = ("cuda", "triton")
VARIABLE = "EDGECOLBERT_BACKEND"
# Packages whose lines say nothing about who called.
BETWEEN = ("edgecolbert_kernels", "torch")

# What `os.environ` wraps: its own `get` raises and catches where a variable is not set, a microsecond in every call.
_environment = getattr(os.environ, "_data", os.environ)
_VARIABLE_KEY = os.environ.encodekey(VARIABLE) if _environment is not os.environ else VARIABLE

_chosen: ContextVar[str] = ContextVar("edgecolbert_backend", default="")


class BackendUnsupported(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


@contextmanager
def backend(name: BackendName) -> Iterator[None]:
    """Run the calls inside the `with` block on one backend: "auto", "cpu", "torch", "triton" or "cuda".

    Wins over EDGECOLBERT_BACKEND. It holds for the current thread or task. A call that the backend cannot run raises
    `BackendUnsupported`; an unknown name raises ValueError at once.
    """
    token = _chosen.set(_known(name, "backend()"))
    try:
        yield
    finally:
        _chosen.reset(token)


def choose(op: str, device: str, dtype: str) -> str:
    """The backend's name, for an op ("maxsim") on a device type ("cpu", "cuda") that sums in "float32" or "float64"."""
    name = _chosen.get() or _variable()
    if name and name != "auto":
        reason = supports(_known(name, VARIABLE), op, device, dtype)
        if reason:
            raise BackendUnsupported(f"backend {name!r} cannot run {op}: {reason}")
        return name
    reason = None
    for fastest in ("cpu",) if device == "cpu" else ON_GPU:
        reason = supports(fastest, op, device, dtype)
        if reason is None:
            return fastest
    no_torch = supports("torch", op, device, dtype)
    if no_torch:
        raise BackendUnsupported(f"no backend can run {op}: {reason}; {no_torch}")
    if device == "cpu":
        _warn_without_module()
    return "torch"


def select(op: str, device: str, dtype: str) -> ModuleType:
    """The backend itself, as `choose` names it."""
    return _load(choose(op, device, dtype))


def supports(name: str, op: str, device: str, dtype: str) -> str | None:
    """None where the backend can run such a call, else the reason why not."""
    if name == "cpu":
        return native.supports(op, device, dtype)
    missing = _missing_torch()
    if missing or name == "torch":
        return missing
    found: str | None = _load(name).supports(op, device, dtype)
    return found


@cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{'torch_' if name == 'torch' else name}")


@cache
def _missing_torch() -> str | None:
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        return "torch is not installed" if absent else f"torch does not load ({error})"
    return None


def _variable() -> str:
    value = _environment.get(_VARIABLE_KEY)
    return os.fsdecode(value) if value else ""


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} names the backend {name!r}; want one of {BACKENDS}")
    return name


@cache
def _warn_without_module() -> None:
    reason = native.missing()
    if reason:
        text = f"scoring runs in plain PyTorch, which is slower: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The `stacklevel` for whoever calls this of the code that called the package, PyTorch between them or not."""
    frame, level = sys._getframe(1), 1
    # A graph that torch.compile made has no name.
    while frame.f_back and frame.f_globals.get("__name__", "torch").partition(".")[0] in BETWEEN:
        frame, level = frame.f_back, level + 1
    return level
