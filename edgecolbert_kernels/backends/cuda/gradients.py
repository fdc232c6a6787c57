"""Gradients of tokens: from tensors to launches of `query_gradients.cu` and `document_gradients.cu`."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgecolbert_kernels.backends import layout, native, plans
from edgecolbert_kernels.backends.cuda import driver
from edgecolbert_kernels.backends.cuda.driver import Kernel
from edgecolbert_kernels.backends.triton import gradients as triton
from edgecolbert_kernels.backends.triton.scoring import rows, strides, winners

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
# Warps of a block, and at least, where its work allows.
MOST_WARPS, FEWEST_WARPS = 8, 4
# Dimensions of a token that a block takes, eight a lane.
SLICE = 256
# Tokens of a query that a warp has, where there are enough of them for so many warps on every multiprocessor.
TOKENS, WARPS_EACH = 4, 16
# Bytes of one of the `Items` in `document_gradients.cu`, and of its 32 entries in the list.
ITEM_BYTES = 32 + 64
# Items of a warp that are sorted together: the sorted list counts its entries in 16 bits.
MOST_ITEMS = 128
# Tokens of a document that a block takes, and what they are not cut below to have more blocks.
MOST_ROWS, FEWEST_ROWS = 512, 16
# Of a multiprocessor's shared memory, what each block takes beside its own.
RESERVED = 1024
# What `document_gradients.cu` declares, and more.
DECLARED = 256


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
    if normalize and Q.shape[-1] > SLICE:
        batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index
        options = normalize, mask_mode, precision
        return triton.backward(grad, Q, D, argmax, *batch, *options, need_queries, need_documents, sum_queries)
    call = _Call(grad, Q, D, argmax, cu_q, cu_d, query_index, document_index, normalize)
    return call.queries(sum_queries) if need_queries else None, call.documents() if need_documents else None


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
        self.q_aligned = self.Q.data_ptr() % 16 == 0
        self.d_aligned = self.D.data_ptr() % 16 == 0 and argmax.data_ptr() % 16 == 0
        options = argmax.dtype, normalize, self.q_aligned, self.d_aligned
        self.key = plans.key(self.Q, self.D, cu_q, cu_d, query_index), options

    def queries(self, sums: Tensor | None) -> Tensor:
        out = _empty(self.Q, self.cu_q) if sums is None else sums
        key = "queries", sums is None, self.key
        plan = plans.kept(_plans, key, lambda: self._plan_queries(sums is not None))
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
        plan = plans.kept(_plans, key, self._plan_documents)
        if plan is not None:
            order, first = triton.owners(self.document_index, self._num_documents())
            inverse = _inverse_norms(self.Q) if self.normalize else None
            tensors = self.Q, self.D, self.grad, self.argmax, inverse, self.cu_q, self.cu_d
            plan.kernel.launch(plan.grid, plan.shared, (*tensors, order, first, self.query_index, out), plan.integers)
        return out

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
        slices, width = _slices(dim)
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
        # Of a document, the most pairs and as many as are likely.
        likely = pairs
        if self.query_index is not None:
            pairs = self.query_index.shape[0]
            likely = -(-pairs // count)
        q_length = self.Q.shape[-2]
        mean = q_length if self.cu_q is None else -(-q_length // max(1, num_queries))
        pieces = max(1, -(-mean // 32))
        # Of packed queries a warp may have all; nobody here knows their lengths.
        most = pairs * pieces if self.cu_q is None else MOST_WARPS * (q_length // 32 + pairs)
        dim = self.D.shape[-1]
        slices, width = _slices(dim)
        # As of packed queries.
        length = self.D.shape[-2] if self.cu_d is None else min(self.D.shape[-2], 2 * -(-self.D.shape[-2] // count))
        device = self.D.get_device()
        block = _block(-(-width // 8) * 8, most, likely * pieces, *_memory(device))
        wanted = 2 * driver.processors(device) // (count * slices)
        tiles = max(-(-length // block.rows), min(wanted, length // FEWEST_ROWS))
        rows = -(-length // tiles)
        q = strides(self.Q)
        constants |= {
            "SLICE": width,
            "WARPS": block.warps,
            "MULTI": block.multi,
            "ALIGNED": self.q_aligned and not (dim % 8 or any(each * self.Q.itemsize % 16 for each in (q[0], q[2]))),
            "Q_STRIDE": dim if q[2] == dim else 0,
        }
        kernel = _kernel("document_gradients", tuple(constants.items()))
        sizes = *self._sizes(), tiles, rows, block.items, pieces
        return _Plan(kernel, (count * tiles, slices), block.shared(rows), sizes)


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


def _slices(dim: int) -> tuple[int, int]:
    """Blocks that share the dimensions, and those of each."""
    slices = -(-dim // SLICE)
    return slices, dim if slices == 1 else -(-dim // (8 * slices)) * 8


class _Block(NamedTuple):
    """Of document gradients: warps, items of a warp at a time, whether it may have more, and tokens that there is room for."""

    width: int
    warps: int
    items: int
    multi: bool
    rows: int

    def shared(self, rows: int) -> int:
        """Bytes, in the order of `document_gradients.cu`."""
        sums = 4 * rows * self.width if self.multi else 0
        rest = 4 * (self.warps * self.width + self.warps * rows + rows + 1)
        return sums + rest + self.warps * self.items * ITEM_BYTES


def _block(width: int, most: int, likely: int, largest: int, every: int) -> _Block:
    """A document has up to `most` items, `likely` so many; two blocks are resident."""
    room = min(largest, every // 2 - RESERVED) - DECLARED
    warps = MOST_WARPS if likely > MOST_WARPS else FEWEST_WARPS
    each = max(1, -(-most // warps))
    fitting = min(MOST_ITEMS, room * 7 // 8 // (warps * ITEM_BYTES))
    multi = each > fitting
    items = max(1, min(fitting // 2, 2 * -(-likely // warps))) if multi else each
    empty = _Block(width, warps, items, multi, 0)
    fixed, row = empty.shared(0), empty.shared(1) - empty.shared(0)
    return empty._replace(rows=max(1, min(MOST_ROWS, (room - fixed) // row)))


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
