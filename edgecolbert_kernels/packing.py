"""From an encoder's hidden states to packed token vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from edgecolbert_kernels import checks, dtypes
from edgecolbert_kernels.backends.packed import OutOfRange, available, pack_rows, threads_of
from edgecolbert_kernels.packed import PackedEmbeddings

if TYPE_CHECKING:
    from edgecolbert_kernels.device.embeddings import DeviceEmbeddings
    from edgecolbert_kernels.signatures import AnyArray, Device, DeviceStorageLike, Masks, StorageLike, Tokens

Array = np.ndarray
Block = tuple[tuple[int, int], list[Any]]

# Rows of a block: large enough for BLAS, whose products of 4096 rows cost a tenth more, and a few MiB of projection.
BLOCK_ROWS = 32768
# To gather the kept rows of a padded block costs about as much as to project as many that are left out.
DENSE = 0.5
SMALLEST_NORM = 1e-12


@overload
def pack(
    hidden: Tokens,
    mask: Masks = None,
    weight: AnyArray | None = None,
    bias: AnyArray | None = None,
    *,
    normalize: bool = True,
    dtype: StorageLike = "float16",
    device: None = None,
) -> PackedEmbeddings: ...
@overload
def pack(
    hidden: Tokens,
    mask: Masks = None,
    weight: AnyArray | None = None,
    bias: AnyArray | None = None,
    *,
    normalize: bool = True,
    dtype: DeviceStorageLike = "float16",
    device: Device,
) -> PackedEmbeddings | DeviceEmbeddings: ...
def pack(
    hidden: Any,
    mask: Any = None,
    weight: Any = None,
    bias: Any = None,
    *,
    normalize: bool = True,
    dtype: Any = "float16",
    device: Any = None,
) -> Any:
    """Project hidden states, normalise, leave out masked tokens, and store the rest.

    Works through blocks of rows: no padded result of the whole ever exists, and a mask that leaves out much spares that work.

    Args:
        hidden: `[N, L, h]`, or a list of `[L, h]`: numpy arrays or torch tensors in float16, bfloat16 (uint16 bits in
            numpy), float32 or float64. Tensors are projected by torch on their device, without a gradient.
        mask: `[N, L]`, bool or 0/1, the tokens to keep, with holes or without; for a list, a list of `[L]`.
        weight: `[d, h]`, as `torch.nn.Linear` has it; None for d = h.
        bias: `[d]`, with a weight.
        normalize: divide every vector by its Euclidean norm (at least 1e-12).
        dtype: the storage, as in PackedEmbeddings; with a device also "float8_e4m3fn".
        device: where the result lies: None for the memory of the host, or a torch device.

    Returns:
        PackedEmbeddings of N documents (without ids: `with_ids` gives them some), or DeviceEmbeddings on a device. The
        arithmetic is float32. Hidden states on a GPU are packed there, in one pass over the projection.

    Raises:
        TypeError: an argument is not an array or has a dtype other than those.
        ValueError: a shape does not fit, or a value is too large for `dtype`.
    """
    if checks.on_accelerator(hidden):
        return _pack_there(hidden, mask, weight, bias, normalize, dtype, device)
    if device is not None:
        return pack(hidden, mask, weight, bias, normalize=normalize, dtype="float32").to(device).to(dtype)
    dtype = dtypes.name(dtype)
    documents, width = _documents(hidden)
    has_kernel = available()
    padded = has_kernel and not isinstance(hidden, (list, tuple)) and not isinstance(mask, (list, tuple))
    whole = _whole_mask(mask, documents) if padded and mask is not None and documents else None
    if whole is not None:  # documents are of one shape: the first speaks for all
        checks.mask("mask[0]", whole[0].shape, "hidden[0]", documents[0].shape)
    kept = _masks(mask, documents) if whole is None else list(whole)
    if weight is not None:
        checks.rank("weight", weight.shape, (2,), "[d, h]")
        if documents and weight.shape[1] != width:
            raise checks.wrong_shape("weight", weight.shape, f"[d, {width}], as hidden has h = {width}")
        width = int(weight.shape[0])
    if bias is not None and (weight is None or tuple(bias.shape) != (width,)):
        raise checks.wrong_shape("bias", bias.shape, "[d], with a weight [d, h]")
    how = normalize, dtype, threads_of(documents[0]) if documents else None
    if padded and weight is None:
        tokens, offsets, scales = _kernel(_matrix(hidden, whole), whole, None, *how)
        return PackedEmbeddings.from_arrays(tokens, offsets, scales)
    lengths = [
        len(document) if keep is None else int(keep.sum()) for document, keep in zip(documents, kept, strict=True)
    ]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = np.empty((int(offsets[-1]), width), dtypes.STORAGE[dtype])
    scales = np.empty(len(documents), np.float32) if dtype == "int8" else None
    padded = padded and offsets[-1] > DENSE * sum(map(len, documents))
    blocks = _padded_blocks(hidden) if padded else _blocks(documents, kept, lengths)
    project = _tensor_projection if documents and hasattr(documents[0], "detach") else _array_projection
    for (begin, end), rows in project(blocks, weight, bias):
        within, out = offsets[begin : end + 1] - offsets[begin], tokens[offsets[begin] : offsets[end]]
        if padded:
            keep = None if whole is None else whole[begin:end]
            found = _kernel(rows.reshape(end - begin, -1, width), keep, None, *how, out)[2]
        elif has_kernel:
            found = _kernel(rows, None, within, *how, out)[2]
        else:
            out[:], found = _store(rows, within, normalize, dtype)
        if scales is not None:
            scales[begin:end] = found
    return PackedEmbeddings.from_arrays(tokens, offsets, scales)


def _pack_there(hidden: Any, mask: Any, weight: Any, bias: Any, normalize: bool, dtype: Any, device: Any) -> Any:
    """On the device of the hidden states."""
    from edgecolbert_kernels.device import dtypes as device_dtypes
    from edgecolbert_kernels.device import embeddings, packing

    name = dtypes.name(dtype) if device is None else device_dtypes.name(dtype)
    tokens, offsets, scales = packing.pack(hidden, mask, weight, bias, normalize, name)
    packed = embeddings.from_device(tokens, offsets, scales, PackedEmbeddings)
    return packed.cpu() if device is None else packed.to(device)


def _matrix(hidden: Any, mask: Array | None) -> Array:
    """As kernels read it. Rows that the mask drops may hold what float32 cannot."""
    try:
        return dtypes.matrix("hidden", hidden)[0]
    except ValueError:
        if mask is None:
            raise
    kept = (hidden.detach().cpu().numpy() if hasattr(hidden, "detach") else hidden).copy()
    kept[~mask] = 0
    return dtypes.matrix("hidden", kept)[0]


def _kernel(
    X: Array,
    mask: Array | None,
    offsets: Array | None,
    normalize: bool,
    dtype: str,
    threads: int | None,
    out: Array | None = None,
) -> Any:
    storage = dtypes.STORAGE[dtype]
    try:
        return pack_rows(X, mask, offsets, normalize=normalize, dtype=storage, threads=threads, out=out, strict=True)
    except OutOfRange:
        raise checks.storage_range("hidden", dtype) from None


def _store(rows: Array, offsets: Array, normalize: bool, dtype: str) -> tuple[Array, Array | None]:
    if normalize:
        norms = np.sqrt(np.einsum("td,td->t", rows, rows))
        rows = rows / np.maximum(norms, np.float32(SMALLEST_NORM))[:, None]
    if dtype != "int8":
        return dtypes.narrow("hidden", rows, dtype), None
    each = [dtypes.quantize("hidden", rows[first:last]) for first, last in pairwise(offsets.tolist())]
    tokens = np.concatenate([np.empty((0, rows.shape[1]), np.int8), *(values for values, _ in each)])
    return tokens, np.array([scale for _, scale in each], np.float32)


def _documents(hidden: Any) -> tuple[Sequence[Any], int]:
    """One `[L, h]` a document, and h."""
    if not isinstance(hidden, (list, tuple)):
        if not hasattr(hidden, "shape"):
            raise checks.not_an_array("hidden", hidden)
        checks.rank("hidden", hidden.shape, (3,), "[N, L, h] or a list of [L, h]")
        checks.at_least("h", int(hidden.shape[2]), 1)
        return list(hidden), int(hidden.shape[2])
    for n, document in enumerate(hidden):
        if not hasattr(document, "shape"):
            raise checks.not_an_array(f"hidden[{n}]", document)
        checks.rank(f"hidden[{n}]", document.shape, (2,), "[L, h]")
        if document.shape[1] != hidden[0].shape[1]:
            raise checks.wrong_shape(f"hidden[{n}]", document.shape, f"[L, {hidden[0].shape[1]}], as hidden[0] has")
    if not hidden:
        raise ValueError("hidden is an empty list, which has no h; want PackedEmbeddings.empty(d) instead")
    return hidden, int(hidden[0].shape[1])


def _masks(mask: Any, documents: Sequence[Any]) -> list[Array | None]:
    if mask is None:
        return [None] * len(documents)
    if isinstance(mask, (list, tuple)):
        checks.mask_list("mask", mask, "hidden", len(documents))
        kept = [each if each is None else _bool(each) for each in mask]
    else:
        kept = list(_whole_mask(mask, documents))
    for n, (keep, document) in enumerate(zip(kept, documents, strict=True)):
        if keep is not None:
            checks.mask(f"mask[{n}]", keep.shape, f"hidden[{n}]", document.shape)
    return kept


def _whole_mask(mask: Any, documents: Sequence[Any]) -> Array:
    if len(mask.shape) != 2 or len(mask) != len(documents):
        raise checks.wrong_shape("mask", mask.shape, f"[{len(documents)}, L], one value for each token of hidden")
    return _bool(mask)


def _bool(mask: Any) -> Array:
    return np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask) != 0


def _blocks(documents: Sequence[Any], kept: Sequence[Array | None], lengths: Sequence[int]) -> Iterator[Block]:
    """Ranges of documents with their kept rows: BLOCK_ROWS of them, or one document that has more."""
    begin = count = 0
    block: list[Any] = []
    for n, (document, keep) in enumerate(zip(documents, kept, strict=True)):
        if count and count + lengths[n] > BLOCK_ROWS:
            yield (begin, n), block
            begin, count, block = n, 0, []
        # Positions rather than a bool mask: numpy's indices serve tensors too.
        block.append(document if keep is None else document[np.flatnonzero(keep)])
        count += lengths[n]
    if block:
        yield (begin, len(documents)), block


def _padded_blocks(hidden: Any) -> Iterator[Block]:
    """Ranges of documents with all their rows, which are not copied: about BLOCK_ROWS of them."""
    num_documents, length, width = hidden.shape
    step = -(-BLOCK_ROWS // length)
    for begin in range(0, num_documents, step):
        end = min(begin + step, num_documents)
        yield (begin, end), [hidden[begin:end].reshape(-1, width)]


def _array_projection(blocks: Iterator[Block], weight: Any, bias: Any) -> Iterator[tuple[tuple[int, int], Array]]:
    transposed = None if weight is None else _floats("weight", weight).T
    shift = None if bias is None else _floats("bias", bias)
    for documents, block in blocks:
        parts = [_floats("hidden", part) for part in block]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        with np.errstate(over="ignore", invalid="ignore"):  # as torch, and what lies behind a mask may be anything
            if transposed is not None:
                rows = rows @ transposed
            if shift is not None:
                rows = rows + shift
        yield documents, rows


def _tensor_projection(blocks: Iterator[Block], weight: Any, bias: Any) -> Iterator[tuple[tuple[int, int], Array]]:
    import torch

    with torch.no_grad():
        matrix, shift = (None if x is None else torch.as_tensor(x).float() for x in (weight, bias))
        for documents, block in blocks:
            rows = (block[0] if len(block) == 1 else torch.cat(block)).detach().float()
            if matrix is not None:
                shift = None if shift is None else shift.to(rows.device)
                rows = torch.nn.functional.linear(rows, matrix.to(rows.device), shift)
            yield documents, rows.cpu().numpy()


def _floats(name: str, seen: Any) -> Array:
    return dtypes.widen(*dtypes.matrix(name, seen))
