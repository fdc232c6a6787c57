"""Packing on a GPU: kept rows are normalised, rounded and written at their place, and widened again.

Rows `[R, d]` of N documents lie back to back, document n from `bounds[n]` to `bounds[n + 1]`. Float storage is one pass over
blocks of rows; int8 needs a document's largest value first, so a program owns a document and reads it twice, the second
time from the second-level cache. Dropped rows are not read. Nothing is added atomically: every value has one writer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from edgecolbert_kernels.backends.triton.launch import Variant
from edgecolbert_kernels.backends.triton.pack_kernels import from_int8, to_floats, to_int8

# Elements that a program holds at a time: 8 KiB of float32, in registers.
BLOCK = 2048
LONGEST_ROW = 8192

# Whose divisibility by 16 the loads and stores depend on: rows, tokens and strides.
_ALIGNED = {to_floats: (0, 3, 5, 6), to_int8: (0, 4, 7, 8), from_int8: (0, 3, 4)}


def takes(dim: int) -> bool:
    """Whether rows of this length fit a program."""
    return 1 <= dim <= LONGEST_ROW


def store_rows(
    X: Tensor,
    bounds: Tensor,
    mask: Tensor | None,
    target: Tensor | None,
    normalize: bool,
    tokens: Tensor,
    scales: Tensor | None,
    refused: Tensor,
) -> None:
    """Normalise, round and write the kept rows.

    Args:
        X: `[R, d]` in float32, float16 or bfloat16, the dimensions side by side.
        bounds: int64 `[N + 1]` on the device of X, from 0 to R.
        mask: bool `[R]`, contiguous; None keeps all.
        target: int64 `[R]`, with a mask: the row of `tokens` that a kept row goes to; without one they go one to one.
        normalize: divide every row by its Euclidean norm, at least 1e-12.
        tokens: `[T, d]` in float16, bfloat16, float32 or int8, contiguous: written.
        scales: float32 `[N]`, with int8: written.
        refused: int32 `[1]`: set to 1 where a finite value became infinite, or where int8 met one that is not finite.
    """
    (rows, dim), count = X.shape, bounds.shape[0] - 1
    # A pointer that is not read stands for what is not there.
    tensors = [X, X if mask is None else mask, bounds if target is None else target]
    constants = mask is not None, normalize
    if scales is None:
        variant = _variant(to_floats, X.dtype, tokens.dtype, dim, constants)
        programs = -(-rows // _rows_of(dim))
        if programs:
            variant.launch(programs, 1, [*tensors, tokens, refused], (X.stride(0), dim, rows))
    elif count:
        variant = _variant(to_int8, X.dtype, tokens.dtype, dim, constants)
        variant.launch(count, 1, [*tensors, bounds, tokens, scales, refused], (X.stride(0), dim))


def unpack_rows(tokens: Tensor, offsets: Tensor, scales: Tensor | None) -> Tensor:
    """Back to float32 `[T, d]`, with the documents' scales where there are some."""
    if scales is None:
        return tokens.to(torch.float32)
    rows = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    if scales.numel() and tokens.numel():
        variant = _variant(from_int8, tokens.dtype, rows.dtype, tokens.shape[1], ())
        variant.launch(scales.shape[0], 1, [tokens, offsets, scales, rows], (tokens.shape[1],))
    return rows


def _rows_of(dim: int) -> int:
    """Rows that a program holds at a time."""
    return max(1, BLOCK // _width(dim))


def _width(dim: int) -> int:
    return 1 << (dim - 1).bit_length()


@cache
def _variant(function: Any, source: torch.dtype, stored: torch.dtype, dim: int, constants: tuple[bool, ...]) -> Variant:
    """Of a kernel for a dtype on either side."""
    return Variant(function, (*constants, _width(dim), _rows_of(dim)), 4, 1, _ALIGNED[function])
