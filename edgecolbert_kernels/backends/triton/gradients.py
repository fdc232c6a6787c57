"""Gradients of the tokens: from tensors to launches of `gradient_kernels`."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from edgecolbert_kernels.backends import layout, native, torch_
from edgecolbert_kernels.backends.triton import config
from edgecolbert_kernels.backends.triton.gradient_kernels import FLAGS, documents, queries, unusual
from edgecolbert_kernels.backends.triton.launch import Variant
from edgecolbert_kernels.backends.triton.scoring import capability, products, rows, strides, tf32_allowed, winners

_variants: dict[Any, Variant] = {}


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
    """As `cpu.backward`. With `normalize` and d above 256 in plain PyTorch, as no program sees a whole token."""
    if normalize and Q.shape[-1] > config.RESIDENT:
        batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index
        needs = need_queries, need_documents, sum_queries
        return torch_.backward(grad, Q, D, argmax, *batch, normalize, mask_mode, precision, *needs)
    call = _Call(grad, Q, D, argmax, d_mask, cu_q, cu_d, query_index, document_index, normalize, precision)
    grad_queries = call.queries(sum_queries) if need_queries else None
    return grad_queries, call.documents() if need_documents else None


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
    batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index
    options = normalize, mask_mode, precision
    argmax = winners(grad, Q, D, *batch, *options)
    return backward(grad, Q, D, argmax, *batch, *options, need_queries, need_documents, sum_queries)


def forget() -> None:
    """Choose blocks anew."""
    _variants.clear()


class _Call:
    """What both kernels are given."""

    def __init__(
        self,
        grad: Tensor,
        Q: Tensor,
        D: Tensor,
        argmax: Tensor,
        d_mask: Tensor | None,
        cu_q: Tensor | None,
        cu_d: Tensor | None,
        query_index: Tensor | None,
        document_index: Tensor | None,
        normalize: bool,
        precision: str,
    ):
        self.grad, self.argmax = grad.contiguous(), argmax
        self.Q, self.D, self.d_mask, self.cu_q, self.cu_d = rows(Q), rows(D), d_mask, cu_q, cu_d
        self.query_index, self.document_index = query_index, document_index
        self.normalize, self.precision = normalize, precision
        self.tf32 = Q.dtype is torch.float32 and tf32_allowed()
        self.which = layout.which(D, query_index)
        self.num_queries = (Q.shape[0] if Q.ndim == 3 else 1) if cu_q is None else cu_q.shape[0] - 1
        self.num_documents = D.shape[-3] if cu_d is None else cu_d.shape[0] - 1
        self.dim = Q.shape[-1]
        q, d = strides(self.Q), strides(self.D)
        self.strides = q[0], q[2], *d
        self.sizes = self.num_queries, self.num_documents, Q.shape[-2], D.shape[-2]
        self.device = Q.device.index

    def documents(self) -> Tensor:
        out = _empty(self.D, self.cu_d, self.D.dtype)
        if not out.numel():
            return out
        count = self.num_documents * (self.num_queries if self.which == native.OWN else 1)
        length = self.D.shape[-2] if self.cu_d is None else -(-self.D.shape[-2] // max(1, count))
        key = "documents", *self._key(), self.d_mask is None, _bucket(length), _bucket(self.Q.shape[-2])
        variant = _variants.get(key)
        if variant is None:
            variant = _variants[key] = self._documents_variant(_bucket(length))
        width, tile = variant.constants[2:6], variant.constants[6]
        tiles = max(1, -(-length // tile))
        order, first = owners(self.document_index, self.num_documents)
        tensors = self._tensors(self.d_mask, self.cu_q, self.cu_d, order, first, self.query_index, self._flags())
        variant.launch(count * tiles, _groups(self.dim, width), [*tensors, out], (*self.strides, *self.sizes, tiles))
        return out

    def queries(self, sums: Tensor | None) -> Tensor:
        out = _empty(self.Q, self.cu_q, self.Q.dtype) if sums is None else sums
        if not out.numel():
            return out
        length = self.Q.shape[-2] if self.cu_q is None else -(-self.Q.shape[-2] // max(1, self.num_queries))
        # Tokens of a query that a program takes: few where there are few queries, so that the device is filled.
        tokens = 16 if self.num_queries * length >= 1 << 13 else 4
        width = config.shared_pieces(self.dim, self.normalize)
        key = "queries", *self._key(), tokens, width, sums is None
        variant = _variants.get(key)
        if variant is None:
            variant = _variants[key] = self._queries_variant(width, tokens, sums is not None)
        blocks = max(1, -(-length // tokens))
        order, first = owners(self.query_index, self.num_queries)
        tensors = self._tensors(self.cu_q, self.cu_d, order, first, self.document_index)
        sizes = *self.strides, *self.sizes, blocks
        variant.launch(self.num_queries * blocks, _groups(self.dim, width), [*tensors, out], sizes)
        return out

    def _tensors(self, *optional: Tensor | None) -> list[Tensor | None]:
        return [self.Q, self.D, self.grad, self.argmax, *optional]

    def _key(self) -> tuple[Any, ...]:
        how = self.normalize, self.precision, self.tf32
        packed = self.cu_q is None, self.cu_d is None
        dtypes = self.Q.dtype, self.D.dtype, self.argmax.dtype
        return (*dtypes, self.which, self.dim, self.device, *how, *packed)

    def _documents_variant(self, length: int) -> Variant:
        compute, how = products(self.Q.dtype, self.Q.dtype, self.precision, self.tf32)
        bits = 32 if compute == tl.float32 else 16
        columns = min(128, _bucket(self.Q.shape[-2] if self.cu_q is None else 32))
        width = config.shared_pieces(self.dim, self.normalize)
        blocks = config.blocks("documents", capability(self.device), bits, sum(width[:3]), columns, int(self.normalize))
        flags = self.d_mask is not None, self.cu_q is not None, self.cu_d is not None, self.normalize
        constants = self.which, self.dim, *width, min(blocks.rows, length), blocks.columns, compute, how, *flags
        spills = bits == 32 or sum(width[:3]) > 64 or self.normalize or self.cu_q is not None
        return Variant(documents, constants, blocks.warps, blocks.stages, (0, 1, 11, 12, 13, 14, 15, 16), spills)

    def _queries_variant(self, width: tuple[int, int, int, bool], tokens: int, add: bool) -> Variant:
        blocks = config.blocks("queries", capability(self.device), 16, sum(width[:3]), tokens)
        flags = self.cu_q is not None, self.cu_d is not None, self.normalize, add
        constants = self.which, self.dim, *width, tokens, blocks.rows * 16 // tokens, *flags
        spills = self.D.dtype is torch.float32
        return Variant(queries, constants, blocks.warps, blocks.stages, (0, 1, 9, 10, 11, 12, 13, 14), spills)

    def _flags(self) -> Tensor:
        flags = torch.empty(FLAGS.value, dtype=torch.int32, device=self.Q.device)
        key = "unusual", self.Q.dtype, self.dim, self.device
        variant = _variants.get(key)
        if variant is None:
            constants = self.dim, min(128, 1 << (self.dim - 1).bit_length()), 16
            variant = _variants[key] = Variant(unusual, constants, 4, 1, (0, 3, 4))
        num_rows = self.Q.numel() // max(1, self.dim)
        sizes = self.strides[0], self.strides[1], num_rows, self.Q.shape[-2], self.grad.numel()
        variant.launch(FLAGS.value, 1, [self.Q, self.grad, flags], sizes)
        return flags


def owners(index: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
    """Chosen pairs in the order of their owners, and where each owner's begin."""
    if index is None:
        return None, None
    found, order = index.sort(stable=True)
    return order, torch.searchsorted(found, torch.arange(count + 1, device=index.device))


def _empty(X: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(X.shape, dtype=dtype, device=X.device)


def _groups(dim: int, width: tuple[int, int, int, bool]) -> int:
    return -(-dim // sum(width[:3])) if width[3] else 1


def _bucket(length: int) -> int:
    """The next power of two, from 16 on."""
    return max(16, 1 << max(0, length - 1).bit_length())
