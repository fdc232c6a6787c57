"""Backend `cuda`: CUDA C++ kernels, compiled at first use, where they are faster than the Triton ones; those elsewhere.

Importing this package imports neither torch nor triton; the first call does.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from edgecolbert_kernels.backends import triton

_PARTS = {
    "forward": "cuda.scoring",
    "launch_of": "cuda.scoring",
    "backward": "cuda.gradients",
    "backward_recompute": "cuda.gradients",
    "RowSums": "triton.contrastive",
    "Weights": "triton.contrastive",
    "distill": "triton.distillation",
}
# Kernels that read inside their buffers whatever boundaries, indices and argmax say.
GUARDED = True
MOST_CANDIDATES = triton.MOST_CANDIDATES


def supports(op: str, device: str, dtype: str) -> str | None:
    if device != "cuda":
        return f"the inputs are on {device} and its kernels run on a CUDA GPU"
    return triton.supports(op, device, dtype) or _missing_compiler()


def __getattr__(name: str) -> Any:
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"edgecolbert_kernels.backends.{_PARTS[name]}"), name)
    return found


@cache
def _missing_compiler() -> str | None:
    import torch

    from edgecolbert_kernels.backends.cuda import compiler

    reason = compiler.missing()
    if reason:
        return reason
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        if 10 * major + minor not in compiler.capabilities():
            return (
                f"NVRTC, which compiles its kernels, does not know GPU {number}, of compute capability {major}.{minor}"
            )
    return None
