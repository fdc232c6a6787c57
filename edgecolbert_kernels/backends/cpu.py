"""Backend `cpu`: the compiled kernels on torch tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgecolbert_kernels import checks
from edgecolbert_kernels.backends import layout, native
from edgecolbert_kernels.backends.native import supports as supports

DTYPES = {torch.float32: native.FLOAT32, torch.float16: native.FLOAT16, torch.bfloat16: native.BFLOAT16}
_CPU = torch.device("cpu")


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
) -> tuple[Tensor, Tensor | None]:
    shape = layout.scores_shape(Q, D, cu_q, cu_d, query_index)
    scores = torch.empty(*shape, dtype=torch.float32, device=_CPU)
    argmax = _empty_argmax(Q, D, shape, cu_q, cu_d) if with_argmax else None
    native.forward(
        operand(Q, q_mask, cu_q),
        operand(D, d_mask, cu_d),
        layout.which(D, query_index),
        _index(query_index, document_index),
        scores.data_ptr(),
        normalize,
        mask_mode,
        precision,
        torch.get_num_threads(),
        *(() if argmax is None else (argmax.data_ptr(), argmax.itemsize)),
    )
    return scores, argmax


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
    """Gradients in the dtypes of Q and D.

    `sum_queries`, float32 in the shape of Q, takes the place of the first: it is added to, and left without the Jacobian
    of `normalize`.
    """
    grad = grad.contiguous()
    grad_queries = (_empty_grad(Q, cu_q) if sum_queries is None else sum_queries) if need_queries else None
    grad_documents = _empty_grad(D, cu_d) if need_documents else None
    native.module().backward(
        operand(Q, q_mask, cu_q),
        operand(D, d_mask, cu_d),
        layout.which(D, query_index),
        _index(query_index, document_index),
        grad.data_ptr(),
        argmax.data_ptr(),
        argmax.itemsize,
        0 if grad_queries is None else grad_queries.data_ptr(),
        0 if grad_documents is None else grad_documents.data_ptr(),
        normalize,
        sum_queries is not None,
        torch.get_num_threads(),
    )
    return grad_queries, grad_documents


def forward_lists(
    Q: Tensor | list[Tensor],
    D: Tensor | list[Tensor],
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    normalize: bool,
    mask_mode: str,
    precision: str,
) -> Tensor:
    """Every query against every document, lists of `[L, d]` with contiguous rows read where they lie, without masks."""
    queries, _q_rows = _table(Q) if isinstance(Q, list) else (operand(Q, q_mask, None), None)
    documents, _d_rows = _table(D) if isinstance(D, list) else (operand(D, d_mask, None), None)
    scores = torch.empty(layout.scores_shape_of_lists(Q, D), dtype=torch.float32, device=_CPU)
    native.forward(
        queries,
        documents,
        native.EVERY,
        native.NO_INDEX,
        scores.data_ptr(),
        normalize,
        mask_mode,
        precision,
        torch.get_num_threads(),
    )
    return scores


def operand(X: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None = None) -> native.Operand:
    mask_address = 0 if mask is None else mask.data_ptr()
    if cu_seqlens is None:
        return native.padded(_address(X), DTYPES[X.dtype], X.shape, X.stride(), mask_address)
    count = cu_seqlens.shape[0] - 1
    return native.packed(_address(X), DTYPES[X.dtype], X.shape, X.stride(), cu_seqlens.data_ptr(), count, mask_address)


def _table(X: list[Tensor]) -> tuple[native.Operand, Any]:
    return native.table(
        DTYPES[X[0].dtype],
        X[0].shape[1],
        [_address(x) for x in X],
        [x.shape[0] for x in X],
        [x.stride(0) for x in X],
    )


def _address(X: Tensor) -> int:
    address = X.data_ptr()
    # Of a storage that was given back, as sharding does between uses, only the offset is left.
    if address == X.storage_offset() * X.itemsize and X.numel():
        raise checks.no_storage(X.shape)
    return address


def _index(query_index: Tensor | None, document_index: Tensor | None) -> tuple[int, int, int]:
    if query_index is None or document_index is None:
        return native.NO_INDEX
    return (query_index.shape[0], query_index.data_ptr(), document_index.data_ptr())


def _empty_argmax(Q: Tensor, D: Tensor, scores: layout.Shape, cu_q: Tensor | None, cu_d: Tensor | None) -> Tensor:
    dtype = torch.int16 if layout.argmax_is_int16(D, cu_d) else torch.int32
    length = layout.argmax_length(Q, scores, cu_q)
    # Rows after the last boundary belong to no query, so the kernel does not come by.
    if cu_q is not None and cu_q[-1] < Q.shape[0]:
        return torch.full((length,), -1, dtype=dtype, device=_CPU)
    return torch.empty(length, dtype=dtype, device=_CPU)


def _empty_grad(X: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(X.shape, dtype=X.dtype, device=_CPU)
