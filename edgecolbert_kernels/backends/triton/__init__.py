"""Backend `triton`: the kernels for CUDA GPUs of compute capability 8.0 and newer.

Importing this package does not import triton; the first call does. Nothing here waits for the device: boundaries and indices
are looked at by the kernels alone, which clamp boundaries into the buffer and answer a pair that does not exist with NaN.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

# What a backend offers, by the file that has it.
_PARTS = {
    "forward": "scoring",
    "launch_of": "scoring",
    "backward": "gradients",
    "backward_recompute": "gradients",
    "RowSums": "contrastive",
    "Weights": "contrastive",
    "distill": "distillation",
}
OLDEST = (8, 0)
# Kernels that read inside their buffers whatever boundaries, indices and argmax say.
GUARDED = True
# Of a query, for `distill`: a program holds them in registers.
MOST_CANDIDATES = 4096


def supports(op: str, device: str, dtype: str) -> str | None:
    if dtype != "float32":
        return f"its GPU kernels accumulate in float32, not in {dtype}"
    if device == "cuda":
        return _unfit()
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") and _missing_triton() is None and _interpreted():
        return None
    return f"the inputs are on {device} and its kernels run on a CUDA GPU"


def __getattr__(name: str) -> Any:
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_PARTS[name]}"), name)
    return found


@cache
def _unfit() -> str | None:
    return _missing_triton() or _unfit_devices()


@cache
def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton, which compiles its GPU kernels, is not installed"
    try:
        importlib.import_module("triton.language")
    except Exception as error:
        return f"triton, which compiles its GPU kernels, does not load ({error})"
    return None


@cache
def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 before triton was first imported."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def _unfit_devices() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_capability(number)
        if found < OLDEST:
            name = torch.cuda.get_device_name(number)
            return f"GPU {number} ({name}) has compute capability {found[0]}.{found[1]}; want {OLDEST[0]}.{OLDEST[1]}"
    return None
