"""Documents as they come, numpy arrays or tensors, to checked arrays of a storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgecolbert_kernels import checks, dtypes
from edgecolbert_kernels.packed.tokens import offsets_of

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
    checks.at_least("dim", 0 if dim is None else dim, 1)
    offsets = offsets_of([len(rows) for rows, _ in matrices])
    tokens = np.empty((int(offsets[-1]), int(dim or 0)), dtypes.STORAGE[dtype])
    scales = np.empty(len(matrices), np.float32) if dtype == "int8" else None
    for n, (rows, given) in enumerate(matrices):
        scale = dtypes.store(f"documents[{n}]", rows, given, dtype, tokens[offsets[n] : offsets[n + 1]])
        if scales is not None and scale is not None:
            scales[n] = scale
    return tokens, offsets, scales


def kept_rows(X: Any, mask: Any) -> tuple[list[Array], int]:
    """The rows of each document of `[N, L, d]` that `mask` `[N, L]` keeps, and d."""
    rows, _ = dtypes.matrix("X", X)
    checks.rank("X", rows.shape, (3,), "[N, L, d]")
    if mask is not None:
        mask = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask) != 0
        checks.mask("mask", mask.shape, "X", rows.shape)
    kept = rows if mask is None else [each[keep] for each, keep in zip(rows, mask, strict=True)]
    return list(kept), rows.shape[2]


def from_arrays(tokens: Any, offsets: Any, scales: Any) -> tuple[str, Arrays]:
    """Arrays that are packed already, and the name of their storage."""
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
        scales = np.require(np.asarray(scales), np.float32, ["C", "A"])
        checks.scales(scales, len(boundaries) - 1, bool((np.isfinite(scales) & (scales >= 0)).all()))
    return dtype, (np.require(np.asarray(rows), None, ["C", "A"]), boundaries, scales)


def converted(documents: Any, dtype: str) -> Arrays:
    """PackedTokens in another storage, a block at a time."""
    offsets = documents.offsets
    tokens = np.empty((int(offsets[-1]), documents.dim), dtypes.STORAGE[dtype])
    scales = np.empty(len(documents), np.float32) if dtype == "int8" else None
    for begin, end in documents.cuts():
        rows, _ = documents.floats(begin, end)
        if scales is None:
            tokens[offsets[begin] : offsets[end]] = dtypes.narrow("documents", rows, dtype)
            continue
        for n in range(begin, end):
            at = slice(offsets[n] - offsets[begin], offsets[n + 1] - offsets[begin])
            tokens[offsets[n] : offsets[n + 1]], scales[n] = dtypes.quantize(f"documents[{n}]", rows[at])
    return tokens, offsets, scales
