"""Backend `torch`: plain PyTorch on any device, in blocks, so that the similarities never exist in full.

The arithmetic is float32, or float64 where an input is; `precision="fast"` is answered exactly. The backward goes by the
saved argmax: each entry adds a weighted document row to a query row and a weighted query row to a document row, in a fixed
order, so that gradients are the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from edgecolbert_kernels.backends import layout, native

# Similarities held at a time: on a CPU as many as stay in its cache, elsewhere enough to fill a device.
SIMILARITIES = {"cpu": 1 << 19}
SIMILARITIES_ELSEWHERE = 1 << 26
# Argmax entries whose rows are added at a time.
ENTRIES = 1 << 20
NO_TOKEN = -1
SMALLEST_NORM = 1e-12


def supports(op: str, device: str, dtype: str) -> str | None:
    return None


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
    queries = _Sequences(Q, q_mask, cu_q, normalize, _arithmetic(Q, D))
    documents = _Sequences(D, d_mask, cu_d, normalize, _arithmetic(Q, D))
    shape = layout.scores_shape(Q, D, cu_q, cu_d, query_index)
    scores = torch.zeros(shape, dtype=_arithmetic(Q, D), device=Q.device)
    argmax = None
    if with_argmax:
        dtype = torch.int16 if layout.argmax_is_int16(D, cu_d) else torch.int32
        argmax = torch.full((layout.argmax_length(Q, shape, cu_q),), NO_TOKEN, dtype=dtype, device=Q.device)

    similarities = SIMILARITIES.get(Q.device.type, SIMILARITIES_ELSEWHERE)
    pairs = max(1, similarities // max(1, queries.longest * documents.longest))
    # Autocast would lower the products to half precision.
    with torch.autocast(Q.device.type, enabled=False):
        if layout.which(D, query_index) == native.EVERY:
            table = scores.view(queries.count, documents.count)
            for some_queries in _blocks(queries.count, pairs):
                q = queries.read(some_queries)
                for some_documents in _blocks(documents.count, max(1, pairs // len(q.tokens))):
                    d = documents.read(some_documents)
                    best, token = _every(q, d, mask_mode, with_argmax)
                    table[some_queries, some_documents] = best.sum(-1)
                    if argmax is not None and token is not None:
                        _record(argmax, token, queries, documents.count, some_queries, some_documents)
        else:
            query, document = _pairs(D, query_index, document_index)
            for some in _blocks(len(query), pairs):
                best, token = _paired(queries.read(query[some]), documents.read(document[some]), mask_mode, with_argmax)
                scores.view(-1)[some] = best.sum(-1)
                if argmax is not None and token is not None:
                    argmax.view(len(query), queries.longest)[some] = token.to(argmax.dtype)
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
    """As `cpu.backward`."""
    queries = _Sequences(Q, q_mask, cu_q, normalize, _arithmetic(Q, D))
    documents = _Sequences(D, d_mask, cu_d, normalize, _arithmetic(Q, D))
    q_rows, d_rows = queries.rows(), documents.rows()
    grad_q = torch.zeros_like(q_rows) if need_queries else None
    grad_d = torch.zeros_like(d_rows) if need_documents else None

    with torch.autocast(Q.device.type, enabled=False):
        for some in _blocks(argmax.numel(), ENTRIES):
            entry = (argmax[some] != NO_TOKEN).nonzero().squeeze(1) + some.start
            if not len(entry):
                continue
            if layout.which(D, query_index) == native.EVERY:
                query, document, position = _locate(entry, queries.bounds, documents.count)
                weight = grad.reshape(queries.count, documents.count)[query, document]
            else:
                pair, position = entry // queries.longest, entry % queries.longest
                query, document = (index[pair] for index in _pairs(D, query_index, document_index))
                weight = grad.reshape(-1)[pair]
            q_row = queries.bounds[query] + position
            d_row = documents.bounds[document] + argmax[entry]
            weight = weight.to(q_rows.dtype)
            if grad_q is not None:
                grad_q += _sum_rows(d_rows, d_row, weight, q_row, len(q_rows))
            if grad_d is not None:
                grad_d += _sum_rows(q_rows, q_row, weight, d_row, len(d_rows))
    if sum_queries is not None and grad_q is not None:
        sum_queries += grad_q.view(sum_queries.shape)
        return sum_queries, documents.finish(grad_d)
    return queries.finish(grad_q), documents.finish(grad_d)


def through_normalization(grad: Tensor, raw: Tensor) -> Tensor:
    """From the gradient to rows of norm 1 to the gradient to the rows `raw` that they were made of, in its own dtype."""
    raw = raw.to(grad.dtype)
    norm = raw.norm(dim=-1, keepdim=True)
    divisor = norm.clamp_min(SMALLEST_NORM)
    unit = raw / divisor
    # y = x / |x|: dx = (dy - y <y, dy>) / |x|; below the smallest norm the divisor is a constant.
    along = (unit * grad).sum(-1, keepdim=True).masked_fill(norm < SMALLEST_NORM, 0)
    # Rows that nothing was added to may hold anything, NaN included.
    return ((grad - unit * along) / divisor).where((grad != 0).any(-1, keepdim=True), 0)


class _Block(NamedTuple):
    tokens: Tensor  # [n, L, d], zero where masked
    kept: Tensor | None  # [n, L]; None: all
    exists: Tensor | None  # [n, L]; None: all; False after the end of a shorter sequence


class _Sequences:
    """A batch of token matrices, padded or packed, whose rows sequence n owns from `bounds[n]` to `bounds[n + 1]`."""

    def __init__(self, X: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, normalize: bool, dtype: torch.dtype):
        self.shape, self.storage, self.dtype, self.normalize = X.shape, X.dtype, dtype, normalize
        self.packed = cu_seqlens is not None
        if cu_seqlens is not None:
            self.tokens, self.mask, self.bounds = X, mask, cu_seqlens
            self.count = len(cu_seqlens) - 1
            self.longest = int(cu_seqlens.diff().max()) if self.count else 0
        else:
            self.tokens = X[None] if X.ndim == 2 else X.flatten(0, -3)
            self.mask = None if mask is None else mask.reshape(self.tokens.shape[:2])
            self.count, self.longest = self.tokens.shape[:2]
            self.bounds = torch.arange(self.count + 1, device=X.device) * self.longest

    def read(self, which: slice | Tensor) -> _Block:
        if not self.packed:
            tokens, exists = self.tokens[which], None
            kept = None if self.mask is None else self.mask[which].bool()
        else:
            start, stop = self.bounds[:-1][which], self.bounds[1:][which]
            position = torch.arange(int((stop - start).max()), device=start.device)
            exists = position < (stop - start)[:, None]
            row = (start[:, None] + position).masked_fill(~exists, 0)
            tokens = self.tokens[row]
            kept = exists if self.mask is None else exists & self.mask[row].bool()
        tokens = tokens.to(self.dtype)
        if kept is not None:
            tokens = tokens.masked_fill(~kept[..., None], 0)
        return _Block(self._scaled(tokens), kept, exists)

    def rows(self) -> Tensor:
        return self._scaled(self.tokens.reshape(-1, self.shape[-1]).to(self.dtype))

    def finish(self, grad: Tensor | None) -> Tensor | None:
        """From the gradient of `rows()` to the gradient of the input."""
        if grad is None:
            return None
        if self.normalize:
            grad = through_normalization(grad, self.tokens.reshape(grad.shape))
        return grad.reshape(self.shape).to(self.storage)

    def _scaled(self, tokens: Tensor) -> Tensor:
        if not self.normalize:
            return tokens
        return tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)


def _every(q: _Block, d: _Block, mask_mode: str, with_argmax: bool) -> tuple[Tensor, Tensor | None]:
    """Maximum and its token of every query token in every document: `[queries, documents, Lq]`."""
    similarity = q.tokens.flatten(0, 1) @ d.tokens.flatten(0, 1).mT
    similarity = similarity.view(*q.tokens.shape[:2], *d.tokens.shape[:2])
    best, token = _best(similarity, d.kept, d.exists, mask_mode, with_argmax)
    best, token = best.transpose(1, 2), None if token is None else token.transpose(1, 2)
    return _without_masked(best, token, None if q.kept is None else q.kept[:, None])


def _paired(q: _Block, d: _Block, mask_mode: str, with_argmax: bool) -> tuple[Tensor, Tensor | None]:
    """Maximum and its token of every query token in its own document: `[pairs, Lq]`."""
    kept, exists = (None if each is None else each[:, None] for each in (d.kept, d.exists))
    best, token = _best(q.tokens @ d.tokens.mT, kept, exists, mask_mode, with_argmax)
    return _without_masked(best, token, q.kept)


def _best(
    similarity: Tensor, kept: Tensor | None, exists: Tensor | None, mask_mode: str, with_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Over the last dimension, to which `kept` and `exists` broadcast; 0 and -1 where there is nothing to choose."""
    if similarity.shape[-1] == 0:
        shape = similarity.shape[:-1]
        return similarity.new_zeros(shape), similarity.new_full(shape, NO_TOKEN, dtype=torch.int64)
    eligible = kept
    if mask_mode == "zero" and kept is not None:
        similarity, eligible = similarity.masked_fill(~kept, 0), exists
    if eligible is not None:
        similarity = similarity.masked_fill(~eligible, -torch.inf)
    best, token = similarity.max(-1) if with_argmax else (similarity.amax(-1), None)
    if token is not None and kept is not None:
        if eligible is not None:
            # Where all that is eligible is -inf, the first -inf may be a token that is not.
            token = token.where(best != -torch.inf, eligible.int().argmax(-1))
        won_by_kept = kept.expand_as(similarity).gather(-1, token[..., None])[..., 0]
        token = token.where(won_by_kept, NO_TOKEN)
    if eligible is not None:
        best = best.masked_fill(~eligible.any(-1), 0)
    return best, token


def _without_masked(best: Tensor, token: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if kept is None:
        return best, token
    return best.masked_fill(~kept, 0), None if token is None else token.masked_fill(~kept, NO_TOKEN)


def _record(
    argmax: Tensor, token: Tensor, queries: _Sequences, num_documents: int, some_queries: slice, some_documents: slice
) -> None:
    """Write `[queries, documents, Lq]` into the flat argmax, where a query's block is `[num_documents, its length]`."""
    start, stop = queries.bounds[:-1][some_queries, None, None], queries.bounds[1:][some_queries, None, None]
    document = torch.arange(some_documents.start, some_documents.stop, device=token.device)[:, None]
    position = torch.arange(token.shape[-1], device=token.device)
    entry = start * num_documents + document * (stop - start) + position
    exists = (position < stop - start).expand_as(token)
    argmax[entry[exists]] = token[exists].to(argmax.dtype)


def _locate(entry: Tensor, bounds: Tensor, num_documents: int) -> tuple[Tensor, Tensor, Tensor]:
    """The query, document and query token that `_record` wrote at each entry."""
    query = torch.searchsorted(bounds * num_documents, entry, right=True) - 1
    start, length = bounds[query], bounds[query + 1] - bounds[query]
    within = entry - start * num_documents
    return query, within // length, within % length


def _pairs(D: Tensor, query_index: Tensor | None, document_index: Tensor | None) -> tuple[Tensor, Tensor]:
    if query_index is not None and document_index is not None:
        return query_index, document_index
    document = torch.arange(D.shape[0] * D.shape[1], device=D.device)
    return document // max(1, D.shape[1]), document


def _sum_rows(rows: Tensor, source: Tensor, weight: Tensor, target: Tensor, num_targets: int) -> Tensor:
    """out[t] = the sum of weight[e] * rows[source[e]] over the entries e with target[e] = t, in their order."""
    target, order = target.sort(stable=True)
    first = torch.searchsorted(target, torch.arange(num_targets, device=target.device))
    return embedding_bag(source[order], rows, first, mode="sum", per_sample_weights=weight[order])


def _arithmetic(Q: Tensor, D: Tensor) -> torch.dtype:
    return torch.float64 if Q.dtype is torch.float64 or D.dtype is torch.float64 else torch.float32


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
