"""Gradients of tokens: from tensors to launches of `query_gradients.cu` and `document_gradients.cu`."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgecolbert_kernels.backends import layout, native
from edgecolbert_kernels.backends.cuda import driver
from edgecolbert_kernels.backends.cuda.driver import Kernel
from edgecolbert_kernels.backends.triton import gradients as triton
from edgecolbert_kernels.backends.triton.scoring import rows, strides, winners

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
# Warps of a block, and at least, where its work allows.
MOST_WARPS, FEWEST_WARPS = 8, 4
# Dimensions of a token that a block takes: of a query's eight a lane, of a document's two.
QUERY_SLICE, DOCUMENT_SLICE = 256, 64
# Tokens of a query that a warp has, where there are enough of them for so many warps on every multiprocessor.
TOKENS, WARPS_EACH = 4, 16
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
    """As `triton.backward`. What a block must see whole for `normalize`, and does not, is that one's."""
    width = Q.shape[-1] if normalize else 0
    left = need_queries and width > QUERY_SLICE, need_documents and width > DOCUMENT_SLICE
    grad_queries = grad_documents = None
    if any(left):
        batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index
        options = normalize, mask_mode, precision
        grad_queries, grad_documents = triton.backward(grad, Q, D, argmax, *batch, *options, *left, sum_queries)
    call = _Call(grad, Q, D, argmax, cu_q, cu_d, query_index, document_index, normalize)
    if need_queries and not left[0]:
        grad_queries = call.queries(sum_queries)
    if need_documents and not left[1]:
        grad_documents = call.documents()
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


_plans: dict[Any, _Plan | None] = {}
MOST_PLANS = 4096


class _Call:
    """What both kernels are given."""

    def __init__(
        self,
        grad: Tensor,
        Q: Tensor,
        D: Tensor,
        argmax: Tensor,
        cu_q: Tensor | None,
        cu_d: Tensor | None,
        query_index: Tensor | None,
        document_index: Tensor | None,
        normalize: bool,
    ):
        self.Q, self.D, self.grad, self.argmax = rows(Q), rows(D), grad.contiguous(), argmax
        self.cu_q, self.cu_d, self.query_index, self.document_index = cu_q, cu_d, query_index, document_index
        self.normalize = normalize
        # What a lane reads at once starts at a multiple of its bytes.
        self.q_aligned = self.Q.data_ptr() % (2 * Q.itemsize) == 0
        self.d_aligned = self.D.data_ptr() % 16 == 0 and argmax.data_ptr() % 16 == 0
        self.key = (
            (Q.dtype, Q.shape, self.Q.stride()),
            (D.dtype, D.shape, self.D.stride()),
            (Q.device, argmax.dtype, normalize, self.q_aligned, self.d_aligned),
            None if cu_q is None else cu_q.shape[0],
            None if cu_d is None else cu_d.shape[0],
            None if query_index is None else query_index.shape[0],
        )

    def queries(self, sums: Tensor | None) -> Tensor:
        out = _empty(self.Q, self.cu_q) if sums is None else sums
        key = "queries", sums is None, self.key
        plan = _plans[key] if key in _plans else self._keep(key, self._plan_queries(sums is not None))
        if plan is not None:
            order, first = triton.owners(self.query_index, self._num_queries())
            inverse = _inverse_norms(self.D) if self.normalize else None
            tensors = self.Q, self.D, self.grad, self.argmax, inverse, self.cu_q, self.cu_d
            plan.kernel.launch(
                plan.grid, plan.shared, (*tensors, order, first, self.document_index, out), plan.integers
            )
        return out

    def documents(self) -> Tensor:
        out = _empty(self.D, self.cu_d)
        key = "documents", self.key
        plan = _plans[key] if key in _plans else self._keep(key, self._plan_documents())
        if plan is not None:
            order, first = triton.owners(self.document_index, self._num_documents())
            inverse = _inverse_norms(self.Q) if self.normalize else None
            tensors = self.Q, self.D, self.grad, self.argmax, inverse, self.cu_q, self.cu_d
            plan.kernel.launch(plan.grid, plan.shared, (*tensors, order, first, self.query_index, out), plan.integers)
        return out

    def _keep(self, key: Any, plan: _Plan | None) -> _Plan | None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
        return plan

    def _num_queries(self) -> int:
        return (self.Q.shape[0] if self.Q.ndim == 3 else 1) if self.cu_q is None else self.cu_q.shape[0] - 1

    def _num_documents(self) -> int:
        return self.D.shape[-3] if self.cu_d is None else self.cu_d.shape[0] - 1

    def _constants(self) -> dict[str, int]:
        return {
            "DIM": self.D.shape[-1],
            "LAYOUT": layout.which(self.D, self.query_index),
            "Q_TYPE": TYPES[self.Q.dtype],
            "D_TYPE": TYPES[self.D.dtype],
            "WIDE_ARGMAX": self.argmax.dtype is torch.int32,
            "Q_PACKED": self.cu_q is not None,
            "D_PACKED": self.cu_d is not None,
            "NORMALIZE": self.normalize,
        }

    def _sizes(self) -> tuple[int, ...]:
        q, d = strides(self.Q), strides(self.D)
        numbers = self._num_queries(), self._num_documents()
        return q[0], q[2], *d, *numbers, self.Q.shape[-2], self.D.shape[-2]

    def _plan_queries(self, add: bool) -> _Plan | None:
        """None where there is no query token."""
        count, dim = self._num_queries(), self.D.shape[-1]
        if not count or not self.Q.shape[-2]:
            return None
        slices = -(-dim // QUERY_SLICE)
        width = dim if slices == 1 else -(-dim // (8 * slices)) * 8
        # Packed queries may be longer than twice the mean; beyond what its blocks hold one goes round.
        length = self.Q.shape[-2] if self.cu_q is None else min(self.Q.shape[-2], 2 * -(-self.Q.shape[-2] // count))
        each = self._num_documents() if self.query_index is None else -(-self.query_index.shape[0] // count)
        tokens, shares, warps = _share(
            count * slices, length, each, WARPS_EACH * driver.processors(self.D.get_device())
        )
        chunks = -(-length // (warps // shares * tokens))
        d = strides(self.D)
        constants = self._constants() | {
            "SLICE": width,
            "TOKENS": tokens,
            "WARPS": warps,
            "SHARES": shares,
            "SUM": add,
            "ALIGNED": self.d_aligned and not (dim % 8 or any(each * self.D.itemsize % 16 for each in d)),
            "D_STRIDE": dim if d[2] == dim else 0,
            "TOGETHER": self.d_aligned and tokens == 4 and self.cu_q is None and self.Q.shape[-2] % 4 == 0,
        }
        kernel = _kernel("query_gradients", tuple(constants.items()))
        return _Plan(kernel, (count * chunks, slices), 0, (*self._sizes(), chunks))

    def _plan_documents(self) -> _Plan | None:
        """None where there is no document token."""
        constants = self._constants()
        num_queries, num_documents = self._num_queries(), self._num_documents()
        count, pairs = num_documents, num_queries
        if constants["LAYOUT"] == native.OWN:
            count, pairs = num_documents * num_queries, 1
        if not count or not self.D.shape[-2]:
            return None
        if self.query_index is not None:
            pairs = -(-self.query_index.shape[0] // count)
        dim = self.D.shape[-1]
        slices = -(-dim // DOCUMENT_SLICE)
        width = -(-dim // (2 * slices)) * 2
        # As of packed queries.
        length = self.D.shape[-2] if self.cu_d is None else 2 * -(-self.D.shape[-2] // count)
        tile, copies, shared = _blocks(length, 4 * width, pairs, *_memory(self.D.get_device()))
        tiles = max(1, -(-length // tile))
        q = strides(self.Q)
        constants |= {
            "SLICE": width,
            "WARPS": max(FEWEST_WARPS, copies),
            "COPIES": copies,
            "TILED": tiles > 1,
            "Q_STRIDE": dim if q[2] == dim else 0,
            "PAIRED": self.q_aligned and not (dim % 2 or q[0] % 2 or q[2] % 2),
        }
        kernel = _kernel("document_gradients", tuple(constants.items()))
        return _Plan(kernel, (count * tiles, slices), shared, (*self._sizes(), tiles, tile))


@cache
def _kernel(name: str, constants: tuple[tuple[str, int], ...]) -> Kernel:
    return Kernel(f"{name}.cu", name, dict(constants), 32 * dict(constants)["WARPS"])


def _share(queries: int, length: int, documents: int, fewest: int) -> tuple[int, int, int]:
    """Tokens of a warp, warps that share them and the documents, and warps of a block; `fewest` warps are wanted."""

    def made(tokens: int, shares: int) -> int:
        return queries * -(-length // tokens) * shares

    tokens, shares = min(TOKENS, 1 << (length - 1).bit_length()), 2 if documents > 32 else 1
    while made(tokens, shares) < fewest and shares < MOST_WARPS and 32 * shares < documents:
        shares *= 2
    while made(tokens, shares) < fewest and tokens > 1:
        tokens //= 2
    return tokens, shares, max(shares, min(FEWEST_WARPS, shares * -(-length // tokens)))


def _blocks(length: int, row: int, pairs: int, most: int, every: int) -> tuple[int, int, int]:
    """Tokens of a tile, copies of its sums, a warp each, and their bytes, so that most of these warps are resident."""
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


def _inverse_norms(X: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(X, dim=-1, dtype=torch.float32)
    return norms.clamp_min_(1e-12).reciprocal_().contiguous()


def _empty(X: Tensor, bounds: Tensor | None) -> Tensor:
    # Rows of packed tokens that belong to no sequence have no gradient.
    return (torch.empty_like if bounds is None else torch.zeros_like)(X, memory_format=torch.contiguous_format)
