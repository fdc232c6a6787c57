"""Backend `triton`: the kernels for CUDA GPUs of compute capability 8.0 and newer.

Importing this package does not import triton; the first call does. Nothing here waits for the device: boundaries and indices
are looked at by the kernels alone, which clamp boundaries into the buffer and answer a pair that does not exist with NaN.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

from torch import Tensor

OLDEST = (8, 0)
# Kernels that read inside their buffers whatever boundaries, indices and argmax say.
GUARDED = True


def supports(op: str, device: str, dtype: str) -> str | None:
    if dtype != "float32":
        return f"its GPU kernels accumulate in float32, not in {dtype}"
    if device == "cuda":
        return _missing_triton() or _unfit_devices()
    if device == "cpu" and _missing_triton() is None and _interpreted():
        return None
    return f"the inputs are on {device} and its kernels run on a CUDA GPU"


def forward(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
    normalize: bool,
    mask_mode: str,
    precision: str,
    with_argmax: bool,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `cpu.forward`. D may also be int8, or float8_e4m3fn, with float32 `scales` [documents] that multiply its scores."""
    batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index
    return _part("scoring").forward(Q, D, *batch, normalize, mask_mode, precision, with_argmax, scales)


def backward(
    grad: Tensor,
    Q: Tensor,
    D: Tensor,
    argmax: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
    normalize: bool,
    mask_mode: str,
    precision: str,
    need_queries: bool,
    need_documents: bool,
    sum_queries: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """As `cpu.backward`."""
    batch: tuple[Any, ...] = q_mask, d_mask, cu_q, cu_d, query_index, document_index
    options = normalize, mask_mode, precision
    return _part("gradients").backward(grad, Q, D, argmax, *batch, *options, need_queries, need_documents, sum_queries)


def backward_recompute(
    grad: Tensor,
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
    normalize: bool,
    mask_mode: str,
    precision: str,
    need_queries: bool,
    need_documents: bool,
    sum_queries: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`backward` without an argmax: winners are found again, but for pairs whose gradient is 0, and the host does not wait.

    Its scratch is one argmax of the documents passed, unwritten where it is not needed.
    """
    batch: tuple[Any, ...] = q_mask, d_mask, cu_q, cu_d, query_index, document_index
    options = normalize, mask_mode, precision
    argmax = _part("scoring").winners(grad, Q, D, *batch, *options)
    return _part("gradients").backward(grad, Q, D, argmax, *batch, *options, need_queries, need_documents, sum_queries)


@cache
def _part(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


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
