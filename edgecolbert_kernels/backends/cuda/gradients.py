"""Gradients of document tokens: from tensors to launches of `document_gradients.cu`. Queries' are the Triton backend's."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from edgecolbert_kernels.backends import layout, native
from edgecolbert_kernels.backends.cuda.driver import Kernel
from edgecolbert_kernels.backends.triton import gradients as triton
from edgecolbert_kernels.backends.triton.scoring import rows, strides, winners

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SLICE = 64  # dimensions of a token that a block takes, two a lane
MOST_WARPS = 8
# Of shared memory for a warp's sums: less makes more warps, more makes fewer looks at every winner.
TILE_BYTES = 80_000
# Of a multiprocessor's shared memory, what each block takes beside its own.
RESERVED = 1024


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
    """As `triton.backward`. With `normalize` and d above 64 it is that one's."""
    by_kernel = need_documents and not (normalize and Q.shape[-1] > SLICE)
    batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index
    options = normalize, mask_mode, precision
    grad_queries = grad_documents = None
    if need_queries or not by_kernel:
        needs = need_queries, need_documents and not by_kernel, sum_queries
        grad_queries, grad_documents = triton.backward(grad, Q, D, argmax, *batch, *options, *needs)
    if by_kernel:
        grad_documents = _documents(grad, Q, D, argmax, cu_q, cu_d, query_index, document_index, normalize)
    return grad_queries, grad_documents


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
    """As `triton.backward_recompute`."""
    batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index
    options = normalize, mask_mode, precision
    argmax = winners(grad, Q, D, *batch, *options)
    return backward(grad, Q, D, argmax, *batch, *options, need_queries, need_documents, sum_queries)


class _Plan(NamedTuple):
    """What calls of the same shapes, strides and options have in common."""

    kernel: Kernel
    grid: tuple[int, int]
    shared: int
    integers: tuple[int, ...]


_plans: dict[object, _Plan | None] = {}
MOST_PLANS = 4096


def _documents(
    grad: Tensor,
    Q: Tensor,
    D: Tensor,
    argmax: Tensor,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
    normalize: bool,
) -> Tensor:
    Q, D, grad = rows(Q), rows(D), grad.contiguous()
    # Rows of packed tokens that belong to no document have no gradient.
    out = (torch.empty_like if cu_d is None else torch.zeros_like)(D, memory_format=torch.contiguous_format)
    aligned = Q.data_ptr() % (2 * Q.itemsize) == 0
    key = (
        (Q.dtype, Q.shape, Q.stride()),
        (D.dtype, D.shape, D.stride()),
        (D.device, argmax.dtype, normalize, aligned),
        None if cu_q is None else cu_q.shape[0],
        None if cu_d is None else cu_d.shape[0],
        None if query_index is None else query_index.shape[0],
    )
    try:
        plan = _plans[key]
    except KeyError:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _plan(Q, D, argmax, cu_q, cu_d, query_index, normalize, aligned)
    if plan is not None:
        order, first = triton.owners(document_index, D.shape[-3] if cu_d is None else cu_d.shape[0] - 1)
        inverse = _inverse_norms(Q) if normalize else None
        tensors = Q, D, grad, argmax, inverse, cu_q, cu_d, order, first, query_index, out
        plan.kernel.launch(plan.grid, plan.shared, tensors, plan.integers)
    return out


def _plan(
    Q: Tensor,
    D: Tensor,
    argmax: Tensor,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    normalize: bool,
    aligned: bool,
) -> _Plan | None:
    """None where there is no document token."""
    which = layout.which(D, query_index)
    num_queries = (Q.shape[0] if Q.ndim == 3 else 1) if cu_q is None else cu_q.shape[0] - 1
    num_documents = D.shape[-3] if cu_d is None else cu_d.shape[0] - 1
    count = num_documents * (num_queries if which == native.OWN else 1)
    if not count or not D.shape[-2]:
        return None
    slices = -(-D.shape[-1] // SLICE)
    width = -(-D.shape[-1] // (2 * slices)) * 2
    # Packed documents may be longer than twice the mean; beyond what a block holds it goes round.
    length = D.shape[-2] if cu_d is None else 2 * -(-D.shape[-2] // count)
    pairs = 1 if which == native.OWN else num_queries if query_index is None else -(-query_index.shape[0] // count)
    tile, warps, shared = _blocks(length, 4 * width, pairs, *_memory(D.get_device()))
    tiles = max(1, -(-length // tile))
    q, d = strides(Q), strides(D)
    constants = {
        "DIM": D.shape[-1],
        "SLICE": width,
        "WARPS": warps,
        "LAYOUT": which,
        "Q_TYPE": TYPES[Q.dtype],
        "D_TYPE": TYPES[D.dtype],
        "WIDE_ARGMAX": argmax.dtype is torch.int32,
        "Q_PACKED": cu_q is not None,
        "D_PACKED": cu_d is not None,
        "NORMALIZE": normalize,
        "TILED": tiles > 1,
        "Q_STRIDE": q[2] if q[2] == D.shape[-1] else 0,
        "PAIRED": aligned and not (D.shape[-1] % 2 or q[0] % 2 or q[2] % 2),
    }
    integers = q[0], q[2], *d, num_queries, num_documents, Q.shape[-2], D.shape[-2], tiles, tile
    return _Plan(_kernel(tuple(constants.items())), (count * tiles, slices), shared, integers)


@cache
def _kernel(constants: tuple[tuple[str, int], ...]) -> Kernel:
    return Kernel("document_gradients.cu", "document_gradients", dict(constants), 32 * dict(constants)["WARPS"])


def _blocks(length: int, row: int, pairs: int, most: int, every: int) -> tuple[int, int, int]:
    """Tokens of a tile, warps of a block and bytes of its shared memory, so that most warps are resident."""
    largest = TILE_BYTES // row // 4 * 4
    tiles = max(1, -(-length // largest))
    tile = max(4, -(-length // (4 * tiles)) * 4)
    limit = max(1, min(MOST_WARPS, -(-pairs // 4)))
    fitting = [
        (b, min(limit, min(most, every // b - RESERVED) // (row * (tile + 1)))) for b in range(1, MOST_WARPS + 1)
    ]
    warps = max(1, max(fitting, key=lambda found: (found[0] * found[1], -found[0]))[1])
    return tile, warps, warps * (tile + 1) * row


@cache
def _memory(device: int) -> tuple[int, int]:
    """Bytes of shared memory that a block may have, and that a multiprocessor has."""
    found = torch.cuda.get_device_properties(device)
    return found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor  # type: ignore[attr-defined]


def _inverse_norms(Q: Tensor) -> Tensor:
    return torch.linalg.vector_norm(Q.float(), dim=-1).clamp_min_(1e-12).reciprocal_().contiguous()
