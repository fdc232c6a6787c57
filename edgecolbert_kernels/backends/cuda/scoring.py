"""Scores of documents with one query each: from tensors to launches of `rerank.cu`. Other calls are the Triton backend's."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgecolbert_kernels.backends import layout, native, plans
from edgecolbert_kernels.backends.cuda import driver
from edgecolbert_kernels.backends.cuda.driver import Kernel
from edgecolbert_kernels.backends.cuda_driver import Launch, contiguous
from edgecolbert_kernels.backends.triton import scoring as triton
from edgecolbert_kernels.backends.triton.launch import LARGE, check_storage
from edgecolbert_kernels.backends.triton.scoring import strides

# Registers: products of 16 dimensions with 8 tokens that a lane holds of the query.
MOST_PRODUCTS = 32
MOST_STEPS = 8
# Warps that share a document: one for so many tokens, or more, so that a multiprocessor has enough. Each of them looks
# at the whole mask, and of what is behind one less is read than its length says.
WARP_TOKENS, WARP_TOKENS_MASKED = 160, 320
WARPS_EACH = 8
MOST_WARPS = 8
# The kernel's arguments that are addresses, which come first; the last of them is the scores'.
ADDRESSES = 10


class _Plan(NamedTuple):
    """What calls of the same shapes, strides and options have in common."""

    kernel: Kernel
    shape: layout.Shape
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]


_plans: dict[Any, _Plan | None] = {}


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
    """As `triton.forward`."""
    if not (with_argmax or normalize):
        scores = _rerank(Q, D, q_mask, d_mask, cu_q, cu_d, query_index, document_index, mask_mode, scales)
        if scores is not None:
            return scores, None
    batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index
    return triton.forward(Q, D, *batch, normalize, mask_mode, precision, with_argmax, scales)


def launch_of(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
    scales: Tensor | None,
    normalize: bool,
    mask_mode: str,
    precision: str,
) -> Launch | None:
    """As `triton.launch_of`."""
    key = _key(Q, D, q_mask, d_mask, cu_q, cu_d, query_index, mask_mode, scales)
    plan = None if normalize or not _aligned(Q.data_ptr(), D.data_ptr()) else _plans.get(key)
    if plan is None:
        batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index, scales
        return triton.launch_of(Q, D, *batch, normalize, mask_mode, precision)
    arguments, made = (0,) * ADDRESSES + plan.sizes, contiguous(plan.shape, torch.float32)
    return plan.kernel.repeated(Q.device.index, plan.grid, arguments, ADDRESSES - 1, made) if plan.grid[0] else None


def _key(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    mask_mode: str,
    scales: Tensor | None,
) -> tuple[Any, ...]:
    options = mask_mode, q_mask is None, d_mask is None, scales is None
    return plans.key(Q, D, cu_q, cu_d, query_index), options


def _aligned(q: int, d: int) -> bool:
    return q % 8 == 0 and d % 16 == 0


def _rerank(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
    mask_mode: str,
    scales: Tensor | None,
) -> Tensor | None:
    """None where the kernel does not fit."""
    key = _key(Q, D, q_mask, d_mask, cu_q, cu_d, query_index, mask_mode, scales)
    try:
        plan = _plans[key]
    except KeyError:
        plan = plans.keep(_plans, key, _plan(Q, D, q_mask, d_mask, cu_q, cu_d, query_index, mask_mode, scales))
    if plan is None:
        return None
    q, d = Q.data_ptr(), D.data_ptr()
    if not _aligned(q, d):
        return None
    if q < LARGE or d < LARGE:
        check_storage((Q, D), (q, d))
    device = Q.device
    scores = torch.empty(*plan.shape, dtype=torch.float32, device=device)
    if plan.grid[0]:
        arguments = (
            q,
            d,
            0 if q_mask is None else q_mask.data_ptr(),
            0 if d_mask is None else d_mask.data_ptr(),
            0 if cu_q is None else cu_q.data_ptr(),
            0 if cu_d is None else cu_d.data_ptr(),
            0 if query_index is None else query_index.data_ptr(),
            0 if document_index is None else document_index.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            scores.data_ptr(),
        )
        plan.kernel.start(device.index, plan.grid, 0, arguments + plan.sizes)
    return scores


def _plan(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    mask_mode: str,
    scales: Tensor | None,
) -> _Plan | None:
    which = layout.which(D, query_index)
    num_queries = (Q.shape[0] if Q.ndim == 3 else 1) if cu_q is None else cu_q.shape[0] - 1
    num_documents = D.shape[-3] if cu_d is None else cu_d.shape[0] - 1
    steps, tokens = Q.shape[-1] // 16, max(1, -(-Q.shape[-2] // 8))
    q, d = strides(Q), strides(D)
    small = D.dtype is torch.int8
    fits = (
        (D.dtype is Q.dtype and Q.dtype in (torch.float16, torch.bfloat16)) or (small and Q.dtype is torch.float16),
        (which != native.EVERY and cu_q is None) or num_queries == 1,
        Q.shape[-1] % 16 == 0 and steps <= MOST_STEPS and steps * tokens <= MOST_PRODUCTS,
        Q.stride(-1) == 1 and D.stride(-1) == 1,
        not any(each % 4 for each in q) and not any(each % 8 for each in d),
    )
    if not all(fits):
        return None
    pairs = num_documents * (num_queries if which == native.OWN else 1) if query_index is None else query_index.shape[0]
    length = D.shape[-2] if cu_d is None else -(-D.shape[-2] // max(1, num_documents))
    warps, fewest = 1, WARPS_EACH * driver.processors(D.get_device())
    most = WARP_TOKENS if d_mask is None else WARP_TOKENS_MASKED
    while warps < MOST_WARPS and (most * warps < length or pairs * warps < fewest) and 32 * warps < length:
        warps *= 2
    # Documents of a block; one where their lengths differ, as the block stays for the longest.
    beside = max(1, 4 // warps) if cu_d is None else 1
    constants = {
        "STEPS": steps,
        "TOKENS": tokens,
        "STAGES": 4 if steps <= 3 else 3,
        "WARPS": warps,
        "BLOCK_DOCUMENTS": beside,
        "LAYOUT": which,
        "BF16": Q.dtype is torch.bfloat16,
        "INT8": small,
        "Q_PACKED": cu_q is not None,
        "D_PACKED": cu_d is not None,
        "D_MASK": d_mask is not None,
        "ZERO": d_mask is not None and mask_mode == "zero",
        "Q_MASK": q_mask is not None,
        "SCALED": scales is not None,
    }
    sizes = q[0], q[2], *d, num_queries, num_documents, Q.shape[-2], D.shape[-2], pairs
    shape = layout.scores_shape(Q, D, cu_q, cu_d, query_index)
    return _Plan(_kernel(tuple(constants.items()), 32 * warps * beside), shape, (-(-pairs // beside), 1, 1), sizes)


@cache
def _kernel(constants: tuple[tuple[str, int], ...], threads: int) -> Kernel:
    return Kernel("rerank.cu", "rerank", dict(constants), threads)
