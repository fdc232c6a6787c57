"""Exact top-k on a device, without the matrix of all scores and without waiting for the device.

A score and its document are one 64-bit key: the score's bits, made to sort as integers, above the complement of the index.
Keys are all different, so the k largest are the same in every run, and equal scores come with the lower index first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecolbert_kernels import checks
from edgecolbert_kernels.device import scores as scoring
from edgecolbert_kernels.device.embeddings import DeviceEmbeddings, Packed
from edgecolbert_kernels.ops import tensors

# Keys held at a time, [queries, documents of a block], and queries scored together.
KEYS = 1 << 24
QUERIES = 1024
EXACT = (False, "exclude", "exact")

_LOW = 0xFFFFFFFF
# Below the key of every number: of a NaN, and of nothing.
NOTHING = -(1 << 63)


def documents_of(X: Any) -> DeviceEmbeddings:
    """Documents `[Nd, Ld, d]` or a list of `[Ld, d]` that lie on a device, packed there; padded ones are not copied."""
    if isinstance(X, DeviceEmbeddings):
        return X
    if isinstance(X, (list, tuple)):
        rows = tensors.token_list("documents", X)
        starts = np.cumsum([0, *(each.shape[0] for each in rows)], dtype=np.int64)
        tokens = torch.cat(rows)
    else:
        checks.rank("documents", X.shape, (3,), "[Nd, Ld, d], a list of [Ld, d] or a PackedEmbeddings")
        starts = np.arange(X.shape[0] + 1) * X.shape[1]
        tokens = tensors.tokens("documents", X).flatten(0, 1)
    if tokens.dtype is torch.float64:
        tokens = tokens.float()
    arrays = Packed(tokens.detach(), scoring.on_device(starts, tokens.device), None)
    return DeviceEmbeddings(arrays, starts, None, _no_host)


def queries_of(Q: Any, q_mask: Any, documents: Any) -> tuple[Tensor, Tensor | None]:
    """Queries `[Nq, Lq, d]` or a list of `[Lq, d]`, without a gradient, as a tensor with its mask."""
    if isinstance(Q, (list, tuple)):
        rows = tensors.token_list("Q", Q)
        if q_mask is not None:
            checks.mask_list("q_mask", q_mask, "Q", len(rows))
            of = enumerate(zip(rows, q_mask, strict=True))
            q_mask = [None if m is None else tensors.mask(f"q_mask[{n}]", m, f"Q[{n}]", x) for n, (x, m) in of]
        Q, q_mask = tensors.pad(rows, q_mask, rows[0] if rows else documents.nothing())
    else:
        if not isinstance(Q, Tensor):
            raise checks.not_an_array("Q", Q, f"a torch tensor on {documents.device}, where the documents are")
        Q = tensors.tokens("Q", Q)
        checks.rank("Q", Q.shape, (3,), "[Lq, d], [Nq, Lq, d] or a list of [Lq, d]")
        q_mask = None if q_mask is None else tensors.mask("q_mask", q_mask, "Q", Q)
    checks.same_dim(Q.shape, (len(documents), documents.dim))
    return Q.detach(), q_mask


def _no_host(*_: Any) -> Any:
    raise NotImplementedError("a view of the caller's tensors has no way back")


def search(
    Q: Tensor, documents: Any, k: int, q_mask: Tensor | None, allowed: np.ndarray | None
) -> tuple[Tensor, Tensor]:
    """The k best of all documents, or of the `allowed` ones (their sorted indices), for queries `[Nq, Lq, d]`.

    `documents` is a DeviceEmbeddings where Q is, or a PackedEmbeddings, which is streamed. Returns scores float32 and
    indices int64 `[Nq, k]` on the device of Q.
    """
    best = [
        torch.full((len(range(*part.indices(Q.shape[0]))), k), NOTHING, dtype=torch.int64, device=Q.device)
        for part in _parts(Q.shape[0])
    ]
    if k and Q.shape[0] and len(documents):
        numbers = None if allowed is None else scoring.on_device(allowed, Q.device)
        chosen = documents if allowed is None else documents[allowed]
        for some, block in scoring.blocks(chosen, Q, EXACT, max(1, KEYS // min(Q.shape[0], QUERIES))):
            for n, part in enumerate(_parts(Q.shape[0])):
                best[n] = _better(best[n], Q[part], block, None if q_mask is None else q_mask[part], some, numbers)
    return unpack(torch.cat(best) if best else torch.empty(0, k, dtype=torch.int64, device=Q.device))


def rerank(
    Q: Tensor, documents: Any, k: int, q_mask: Tensor | None, candidates: list[np.ndarray]
) -> tuple[Tensor, Tensor]:
    """The same among each query's own candidates, which are distinct."""
    most = max([k, *map(len, candidates)], default=k)
    query = np.repeat(np.arange(len(candidates)), [len(each) for each in candidates])
    place = np.concatenate([np.empty(0, np.int64), *(np.arange(len(each)) for each in candidates)])
    document = np.concatenate([np.empty(0, np.int64), *candidates])
    keys = torch.full((len(candidates), most), NOTHING, dtype=torch.int64, device=Q.device)
    if len(document):
        found = scoring.score_pairs(documents, Q, query, document, q_mask, EXACT, torch.float32)
        at = scoring.on_device(query, Q.device), scoring.on_device(place, Q.device)
        keys[at] = pack(found, scoring.on_device(document, Q.device))
    return unpack(keys.topk(k, dim=1)[0])


def pack(scores: Tensor, index: Tensor) -> Tensor:
    """Keys int64 of float32 scores and indices below 2^32; a NaN's is NOTHING."""
    bits = (scores + 0.0).view(torch.int32)  # + 0: -0 becomes 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    return ((ordered << 32) | (_LOW - index)).masked_fill_(scores.isnan(), NOTHING)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and indices; -inf and -1 for NOTHING."""
    ordered = (keys >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    nothing = keys == NOTHING
    return scores.masked_fill(nothing, -torch.inf), (_LOW - (keys & _LOW)).masked_fill_(nothing, -1)


def _better(best: Tensor, Q: Tensor, block: Any, q_mask: Tensor | None, some: slice, numbers: Tensor | None) -> Tensor:
    """The k best keys with a block's documents among them."""
    scores = scoring.score_block(block, Q, q_mask, None, EXACT, torch.float32)
    index = torch.arange(some.start, some.stop, device=Q.device)
    keys = pack(scores, index if numbers is None else numbers[index])
    return torch.cat([best, keys], dim=1).topk(best.shape[1], dim=1)[0]


def _parts(count: int) -> list[slice]:
    return [slice(start, min(start + QUERIES, count)) for start in range(0, count, QUERIES)]
