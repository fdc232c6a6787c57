"""Packing on a GPU: kept rows are normalised, rounded and written at their place, and widened again.

Rows `[R, d]` of N documents lie back to back, document n from `bounds[n]` to `bounds[n + 1]`. Float storage is one pass over
blocks of rows; int8 needs a document's largest value first, so a program owns a document and reads it twice, the second
time from the second-level cache. Dropped rows are not read. Nothing is added atomically: every value has one writer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from edgecolbert_kernels.backends.triton.launch import Variant

# Elements that a program holds at a time: 8 KiB of float32, in registers.
BLOCK = 2048
LONGEST_ROW = 8192
SMALLEST_NORM = tl.constexpr(1e-12)
LARGEST_INT8 = tl.constexpr(127.0)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
# Adding and subtracting it rounds |x| < 2^22 to an integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)
# A document whose largest value is below this is one of zeros: its inverse would not be finite.
SMALLEST_DOCUMENT = tl.constexpr(2e-36)


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
        variant = _variant(_to_floats, X.dtype, tokens.dtype, dim, constants)
        programs = -(-rows // _rows_of(dim))
        if programs:
            variant.launch(programs, 1, [*tensors, tokens, refused], (X.stride(0), dim, rows))
    elif count:
        variant = _variant(_to_int8, X.dtype, tokens.dtype, dim, constants)
        variant.launch(count, 1, [*tensors, bounds, tokens, scales, refused], (X.stride(0), dim))


def unpack_rows(tokens: Tensor, offsets: Tensor, scales: Tensor | None) -> Tensor:
    """Back to float32 `[T, d]`, with the documents' scales where there are some."""
    if scales is None:
        return tokens.to(torch.float32)
    rows = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    if scales.numel() and tokens.numel():
        variant = _variant(_from_int8, tokens.dtype, rows.dtype, tokens.shape[1], ())
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


@triton.jit
def _read(X, stride, mask, row, end, dim, MASKED: tl.constexpr, WIDTH: tl.constexpr):
    """Rows as they are, 0 where there is nothing, and which there are."""
    column = tl.arange(0, WIDTH)
    kept = row < end
    if MASKED:
        kept &= tl.load(mask + row, mask=kept, other=0) != 0
    inside = kept[:, None] & (column < dim)[None, :]
    return tl.load(X + row[:, None] * stride + column[None, :], mask=inside, other=0.0), kept, inside


@triton.jit
def _scaled(x, NORMALIZE: tl.constexpr):
    x = x.to(tl.float32)
    if NORMALIZE:
        norm = tl.sqrt_rn(tl.sum(x * x, axis=1))
        # A NaN stays one: the maximum of it and a number would be the number.
        norm = tl.where(norm < SMALLEST_NORM, SMALLEST_NORM, norm)
        x = x * tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm)[:, None]
    return x


@triton.jit(do_not_specialize=["mask", "target", "refused", "rows"])
def _to_floats(
    X,
    mask,
    target,
    tokens,
    refused,
    stride: tl.int64,
    dim: tl.int64,
    rows: tl.int64,
    MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x, kept, inside = _read(X, stride, mask, row, rows, dim, MASKED, WIDTH)
    if X.dtype == tokens.dtype and not NORMALIZE:
        stored = x  # bit for bit, a NaN too
    else:
        scaled = _scaled(x, NORMALIZE)
        stored = scaled.to(tokens.dtype.element_ty)
        lost = (tl.abs(stored.to(tl.float32)) > LARGEST_FLOAT) & (tl.abs(scaled) <= LARGEST_FLOAT)
        if tl.max(tl.max(lost.to(tl.int32), axis=1), axis=0) > 0:
            tl.store(refused, 1)
    place = row
    if MASKED:
        place = tl.load(target + row, mask=kept, other=0)
    tl.store(tokens + place[:, None] * dim + tl.arange(0, WIDTH)[None, :], stored, mask=inside)


@triton.jit(do_not_specialize=["mask", "target", "bounds", "scales", "refused"])
def _to_int8(
    X,
    mask,
    target,
    bounds,
    tokens,
    scales,
    refused,
    stride: tl.int64,
    dim: tl.int64,
    MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    document = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(bounds + document), tl.load(bounds + document + 1)
    largest = 0.0
    infinite = 0
    for start in range(begin, end, ROWS):
        x, _, _ = _read(X, stride, mask, start + tl.arange(0, ROWS), end, dim, MASKED, WIDTH)
        size = tl.abs(_scaled(x, NORMALIZE))
        largest = tl.maximum(largest, tl.max(tl.max(size, axis=1), axis=0))
        infinite = tl.maximum(infinite, tl.max(tl.max((~(size <= LARGEST_FLOAT)).to(tl.int32), axis=1), axis=0))
    if infinite > 0:
        tl.store(refused, 1)
    counts = largest >= SMALLEST_DOCUMENT
    tl.store(scales + document, tl.where(counts, tl.div_rn(largest, LARGEST_INT8), 0.0))
    inverse = tl.where(counts, tl.div_rn(LARGEST_INT8, tl.where(counts, largest, 1.0)), 0.0)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        x, kept, inside = _read(X, stride, mask, row, end, dim, MASKED, WIDTH)
        value = (_scaled(x, NORMALIZE) * inverse + ROUNDER) - ROUNDER
        place = row
        if MASKED:
            place = tl.load(target + row, mask=kept, other=0)
        tl.store(tokens + place[:, None] * dim + tl.arange(0, WIDTH)[None, :], value.to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["offsets", "scales"])
def _from_int8(tokens, offsets, scales, rows, dim: tl.int64, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    document = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    begin, end = tl.load(offsets + document), tl.load(offsets + document + 1)
    scale = tl.load(scales + document)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None] * dim + column[None, :]
        inside = (row < end)[:, None] & (column < dim)[None, :]
        x = tl.load(tokens + at, mask=inside, other=0).to(tl.float32)
        tl.store(rows + at, x * scale, mask=inside)


# Whose divisibility by 16 the loads and stores depend on: rows, tokens and strides.
_ALIGNED = {_to_floats: (0, 3, 5, 6), _to_int8: (0, 4, 7, 8), _from_int8: (0, 3, 4)}
