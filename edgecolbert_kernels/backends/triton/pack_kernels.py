"""The kernels of packing: rows to their place in a storage, and int8 back to float32."""

import triton
import triton.language as tl

SMALLEST_NORM = tl.constexpr(1e-12)
LARGEST_INT8 = tl.constexpr(127.0)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
# Adding and subtracting it rounds |x| < 2^22 to an integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)
# A document whose largest value is below this is one of zeros: its inverse would not be finite.
SMALLEST_DOCUMENT = tl.constexpr(2e-36)


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
def to_floats(
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
def to_int8(
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
def from_int8(tokens, offsets, scales, rows, dim: tl.int64, WIDTH: tl.constexpr, ROWS: tl.constexpr):
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
