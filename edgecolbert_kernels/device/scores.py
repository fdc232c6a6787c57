"""MaxSim of queries on a device with stored documents, which lie there or are streamed there.

Float storages are what the kernels read anyway. int8 and float8_e4m3fn are read as they are too, by the Triton backend:
widened to the queries' float16 or bfloat16 next to the tensor cores, where both are exact, with the document's scale on the
finished score. Where that does not apply (a gradient to the queries, an option, another backend) blocks are widened to
float32 first. `precision="fast"` is answered exactly: integer products would want rounded queries, and nothing waits for
the products: a rerank waits for memory, a batch for the maxima.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecolbert_kernels import checks
from edgecolbert_kernels.backends import ON_GPU, choose, repeated, select
from edgecolbert_kernels.device import stream
from edgecolbert_kernels.device.embeddings import DeviceEmbeddings, Packed, unpack
from edgecolbert_kernels.ops import tensors
from edgecolbert_kernels.ops.plain import plain

Options = tuple[bool, str, str]
Index = tuple[Tensor, Tensor]

# Of float32 that a block of scaled documents becomes, where it is widened.
WIDENED_BYTES = 1 << 28


def score(
    documents: Any, Q: Tensor, q_mask: Tensor | None, cu_q: Tensor | None, options: Options, out_dtype: Any
) -> Tensor:
    """Every query with every document of a DeviceEmbeddings or a PackedEmbeddings: `[Nq, Nd]`, or `[Nd]` for one query."""
    if _read_whole(documents, Q, options):
        return _score_stored(documents.arrays, Q, q_mask, cu_q, options, out_dtype)
    found = [score_block(block, Q, q_mask, cu_q, options, out_dtype) for _, block in blocks(documents, Q, options)]
    if not found:
        found = [score_block(_nothing(documents, Q.device), Q, q_mask, cu_q, options, out_dtype)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def score_pairs(
    documents: Any,
    Q: Tensor,
    query_index: Any,
    document_index: Any,
    q_mask: Tensor | None,
    options: Options,
    out_dtype: Any,
) -> Tensor:
    """Chosen pairs `[P]`. Of documents of the host only those are streamed that some pair names."""
    if _read_whole(documents, Q, options):
        query = tensors.integers("query_index", query_index, Q)
        document = tensors.integers("document_index", document_index, Q)
        checks.same_shape("query_index", query.shape, "document_index", document.shape)
        return _score_stored(documents.arrays, Q, q_mask, None, options, out_dtype, (query, document))

    of_query, of_document = (
        tensors.integers(name, each, Q).cpu().numpy()
        for name, each in (("query_index", query_index), ("document_index", document_index))
    )
    checks.same_shape("query_index", of_query.shape, "document_index", of_document.shape)
    checks.index("document_index", of_document, len(documents))
    used, place = np.unique(of_document, return_inverse=True)
    order = np.argsort(place, kind="stable")
    ordered, found = place[order], []
    for part, block in blocks(documents[used], Q, options):
        where = order[np.searchsorted(ordered, part.start) : np.searchsorted(ordered, part.stop)]
        index = on_device(of_query[where], Q.device), on_device(place[where] - part.start, Q.device)
        found.append(score_block(block, Q, q_mask, None, options, out_dtype, index))
    if not found:
        return Q.new_zeros(0, dtype=torch.float32 if out_dtype is None else out_dtype)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return torch.cat(found)[on_device(back, Q.device)]


def blocks(
    documents: Any, Q: Tensor, options: Options, most_documents: int | None = None
) -> Iterator[tuple[slice, Packed]]:
    """Ranges of documents on the device of Q: all at once where they are there and need not be widened."""
    if not isinstance(documents, DeviceEmbeddings):
        return stream.blocks(documents, Q.device, most_documents=most_documents)
    widened = documents.scales is not None and not reads_scaled(Q, options)
    tokens = max(1, WIDENED_BYTES // (4 * documents.dim)) if widened else None
    return documents.blocks_on(Q.device, tokens, most_documents)


def score_block(
    block: Packed,
    Q: Tensor,
    q_mask: Tensor | None,
    cu_q: Tensor | None,
    options: Options,
    out_dtype: Any,
    index: Index | None = None,
) -> Tensor:
    """Every query with every document of a block, or chosen pairs."""
    if block.scales is None or reads_scaled(Q, options):
        return _score_stored(block, Q, q_mask, cu_q, options, out_dtype, index)
    query, document = index or (None, None)
    return tensors.score(Q, unpack(block), q_mask, None, cu_q, block.offsets, query, document, *options, out_dtype)


def _score_stored(
    block: Packed,
    Q: Tensor,
    q_mask: Tensor | None,
    cu_q: Tensor | None,
    options: Options,
    out_dtype: Any,
    index: Index | None = None,
) -> Tensor:
    """The same, of documents that kernels read as they are stored."""
    query, document = index or (None, None)
    batch = q_mask, None, cu_q, block.offsets, query, document
    if block.scales is None:
        return tensors.score(Q, block.tokens, *batch, *options, out_dtype)
    for name, each in (("q_mask", q_mask), ("query_index", query), ("document_index", document)):
        if each is not None:
            checks.same_device(name, each.device, Q.device, "Q")
    backend = select("maxsim", Q.device.type, "float32")
    scores = backend.forward(Q, block.tokens, *batch, *options, False, scales=block.scales)[0]
    dtype = tensors.score_dtype(out_dtype)
    if dtype is not torch.float32:
        return scores.to(dtype)
    if repeated.table is not None:
        repeated.remember(backend, (Q, block.tokens, *batch, block.scales), options, out_dtype)
    return scores


def _read_whole(documents: Any, Q: Tensor, options: Options) -> bool:
    """Whether all documents are on the device of Q, and read as they are stored. ValueError if they are on another."""
    if not isinstance(documents, DeviceEmbeddings):
        return False
    tokens, _, scales = documents.arrays
    checks.same_device("Q", Q.device, tokens.device, "D")
    return scales is None or reads_scaled(Q, options)


def reads_scaled(Q: Tensor, options: Options) -> bool:
    """Whether kernels read scaled documents as they are: without a gradient, in float32, none normalised."""
    if options[0] or Q.dtype is torch.float64 or not plain(Q) or (torch.is_grad_enabled() and Q.requires_grad):
        return False
    return choose("maxsim", Q.device.type, "float32") in ON_GPU


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """int64, without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, np.int64))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _nothing(documents: Any, device: torch.device) -> Packed:
    """No documents."""
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    return Packed(torch.empty(0, documents.dim, dtype=torch.float32, device=device), offsets, None)
