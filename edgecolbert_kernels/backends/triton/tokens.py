"""Device functions that the kernels share: where token rows lie, reading them in pieces, norms and similarities.

The dimension d is read in up to three pieces, powers of two, so that 48 is 32 + 16 and takes three tensor-core steps of 16
where one piece of 64 takes four. `C0`, `C1`, `C2` are the pieces, 0 where there is none. A larger d is read in blocks of
`C0` inside a loop (`LOOP`).
"""

import triton
import triton.language as tl

EVERY, OWN, INDEXED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SMALLEST_NORM = tl.constexpr(1e-12)
LATEST = tl.constexpr(2**31 - 1)
# Blocks of queries that take turns over the documents.
TURNS = tl.constexpr(16)
# Bytes of the mask that are looked at together.
MASK_BLOCK = tl.constexpr(512)


@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def place(program, blocks, num_documents):
    """The block of queries and the document of a program: so many blocks go over all documents, then the next.

    Otherwise all programs that run at a time would read one document, and wait for each other at the few lines of the
    cache that it lies in.
    """
    first = program // (TURNS * num_documents) * TURNS
    width = tl.minimum(blocks - first, TURNS)
    within = program - first * num_documents
    return first + within % width, within // width


@triton.jit
def boundary(bounds_ptr, number, rows):
    """Where sequence `number` starts; within the buffer whatever stands there."""
    return tl.minimum(tl.maximum(tl.load(bounds_ptr + number), 0), rows)


@triton.jit
def kept_range(mask_ptr, length):
    """The first token that a document's mask keeps, and the one after the last; `length` and 0 where there is none."""
    begin = length
    end = length * 0
    for j in range(0, length, MASK_BLOCK):
        at = j + tl.arange(0, MASK_BLOCK)
        kept = tl.load(mask_ptr + at, mask=at < length, other=0) != 0
        begin = tl.minimum(begin, tl.min(tl.where(kept, at, LATEST)))
        end = tl.maximum(end, tl.max(tl.where(kept, at + 1, 0)))
    return begin, end


@triton.jit
def read(row_ptrs, keep, start, C: tl.constexpr, DIM: tl.constexpr, KEEP: tl.constexpr, FULL: tl.constexpr):
    """`[..., C]` from dimension `start` on; zeros beyond the last dimension, unless FULL, and, if KEEP, in rows not kept."""
    k = start + tl.arange(0, C)
    ptrs = tl.expand_dims(row_ptrs, -1) + k
    if not KEEP:
        keep = tl.full(row_ptrs.shape, True, tl.int1)
    if FULL and not KEEP:
        return tl.load(ptrs)
    elif FULL:
        return tl.load(ptrs, mask=tl.expand_dims(keep, -1), other=0.0)
    else:
        return tl.load(ptrs, mask=tl.expand_dims(keep, -1) & (k < DIM), other=0.0)


@triton.jit
def values(x, COMPUTE: tl.constexpr, E4M3: tl.constexpr):
    """As the products take them. Of e4m3 bytes 2^-8 of the value, exact: the exponent's bias is 8 lower than float16's."""
    if E4M3:
        bits = x.to(tl.uint16)
        return ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.float16, bitcast=True).to(COMPUTE)
    return x.to(COMPUTE)


@triton.jit
def square_sum(x):
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=-1)


@triton.jit
def inverse_norm(squares):
    return 1.0 / tl.maximum(tl.sqrt(squares), SMALLEST_NORM)
