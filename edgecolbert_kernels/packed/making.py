"""Documents as they come, numpy arrays or tensors, to checked arrays of a storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from edgecolbert_kernels import checks, dtypes
from edgecolbert_kernels.backends.packed import OutOfRange, available, pack_list, pack_rows, threads_of
from edgecolbert_kernels.packed.tokens import offsets_of
from edgecolbert_kernels.signatures import Storage

Array = np.ndarray
# tokens [T, d], int64 offsets [N + 1] from 0 to T, float32 scales [N] for int8
Arrays = tuple[Array, Array, Array | None]


def from_list(documents: Sequence[Any], dtype: str, dim: int | None) -> Arrays:
    """Documents `[L, d]` rounded to `dtype`, back to back."""
    matrices = [dtypes.matrix(f"documents[{n}]", each) for n, each in enumerate(documents)]
    for n, (rows, _) in enumerate(matrices):
        checks.rank(f"documents[{n}]", rows.shape, (2,), "[L, d]")
        dim = rows.shape[1] if dim is None else dim
        if rows.shape[1] != dim:
            raise checks.wrong_shape(f"documents[{n}]", rows.shape, f"[L, {dim}]")
    if dim is None:
        raise ValueError("there are no documents, and dim is None; want at least one document, or dim")
    checks.at_least("dim", dim, 1)
    # The kernels read one dtype, and dimensions that lie side by side.
    if available() and len({given for _, given in matrices}) == 1:
        return _stored(
            pack_list, [_readable(rows) for rows, _ in matrices], dtype=dtype, threads=threads_of(next(iter(documents)))
        )
    offsets = offsets_of([len(rows) for rows, _ in matrices])
    tokens = np.empty((int(offsets[-1]), dim), dtypes.STORAGE[dtype])
    scales = np.empty(len(matrices), np.float32) if dtype == "int8" else None
    for n, (rows, given) in enumerate(matrices):
        scale = dtypes.store(f"documents[{n}]", rows, given, dtype, tokens[offsets[n] : offsets[n + 1]])
        if scales is not None and scale is not None:
            scales[n] = scale
    return tokens, offsets, scales


def from_padded(X: Any, mask: Any, dtype: str) -> Arrays:
    """The rows of each document of `[N, L, d]` that `mask` `[N, L]` keeps."""
    rows, _ = dtypes.matrix("X", X)
    checks.rank("X", rows.shape, (3,), "[N, L, d]")
    checks.at_least("dim", rows.shape[2], 1)
    if mask is not None:
        mask = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask) != 0
        checks.mask("mask", mask.shape, "X", rows.shape)
    if available():
        return _stored(pack_rows, rows, mask, normalize=False, dtype=dtype, strict=True, threads=threads_of(X))
    kept = rows if mask is None else [each[keep] for each, keep in zip(rows, mask, strict=True)]
    return from_list(list(kept), dtype, rows.shape[2])


def _readable(rows: Array) -> Array:
    ready = rows.flags.aligned and rows.strides[1] == rows.itemsize
    return rows if ready else np.require(rows, None, ["C", "A"])


def _stored(kernel: Callable[..., Arrays], *given: Any, dtype: str, first: int = 0, **options: Any) -> Arrays:
    """What the kernel makes of documents, of which the first has that number."""
    try:
        return kernel(*given, dtype=dtypes.STORAGE[dtype], **options)
    except OutOfRange as error:
        raise checks.storage_range(f"documents[{first + error.document}]", dtype) from None


def from_arrays(tokens: Any, offsets: Any, scales: Any) -> tuple[Storage, Arrays]:
    """Arrays that are packed already, and the name of their storage."""
    dtype: Storage
    if getattr(tokens, "dtype", None) == np.int8 or str(getattr(tokens, "dtype", "")) == "torch.int8":
        rows, dtype = np.asarray(tokens), "int8"
    else:
        rows, dtype = dtypes.matrix("tokens", tokens)
    checks.rank("tokens", rows.shape, (2,), "[T, d]")
    checks.at_least("dim", rows.shape[1], 1)
    boundaries = np.asarray(offsets)
    if boundaries.dtype.kind not in "iu":
        raise checks.wrong_dtype("offsets", boundaries.dtype, checks.INTEGERS)
    boundaries = boundaries.astype(np.int64, order="C")  # a copy: kernels trust them from now on
    checks.boundaries("offsets", boundaries.shape)
    checks.offsets("offsets", boundaries, len(rows))
    if (scales is None) is (dtype == "int8"):
        raise checks.not_an_array("scales", scales, "float32 [N] with int8 tokens, None with others")
    if scales is not None:
        # The format has none, and the kernels' sums are bounded without.
        if rows.size and rows.min() == -128:
            raise ValueError("tokens has values of -128; int8 storage is -127 to 127")
        scales = np.require(np.asarray(scales), np.float32, ["C", "A"])
        checks.scales(scales, len(boundaries) - 1, bool((np.isfinite(scales) & (scales >= 0)).all()))
    return dtype, (np.require(np.asarray(rows), None, ["C", "A"]), boundaries, scales)


def converted(documents: Any, dtype: str) -> Arrays:
    """PackedTokens in another storage, a block at a time."""
    offsets = documents.offsets
    tokens = np.empty((int(offsets[-1]), documents.dim), dtypes.STORAGE[dtype])
    scales = np.empty(len(documents), np.float32) if dtype == "int8" else None
    for begin, end in documents.cuts():
        out = tokens[offsets[begin] : offsets[end]]
        if available():
            rows, bounds = documents.floats(begin, end) if documents.dtype == "int8" else documents.stored(begin, end)
            found = _stored(
                pack_rows, rows, None, bounds, first=begin, normalize=False, dtype=dtype, out=out, strict=True
            )
            if scales is not None:
                scales[begin:end] = found[2]
            continue
        rows, bounds = documents.floats(begin, end)
        if scales is None:
            out[:] = dtypes.narrow("documents", rows, dtype)
            continue
        for n, (first, last) in enumerate(pairwise(bounds.tolist()), begin):
            out[first:last], scales[n] = dtypes.quantize(f"documents[{n}]", rows[first:last])
    return tokens, offsets, scales
