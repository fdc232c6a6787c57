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


@triton.jit
def split(x):
    """What TF32 holds of a float32, towards 0, and the rest: of an infinity none, and a NaN is all NaN."""
    high = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    # One that only low bits tell from an infinity would become it.
    high = tl.where(x == x, high, x * 0 + x)
    return high, tl.where(tl.abs(x) < float("inf"), x - high, 0.0)


@triton.jit
def operand(x, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """Query tokens as the columns of a product, and as "tf32x3" what they leave."""
    if PRECISION == "tf32x3":
        high, rest = split(x.to(tl.float32))
        return high.T, rest.T
    else:
        columns = x.to(COMPUTE).T
        return columns, columns


@triton.jit
def multiply_add(d, q, q_rest, c, PRECISION: tl.constexpr):
    """c + d q. As "tf32x3" without the product of the rests, of which `q_rest` is the query's.

    Rests have the signs of what they are left from, so that they overflow to the same side. Beside an infinity they make
    NaN, where the high parts say all.
    """
    if PRECISION == "tf32x3":
        high, rest = split(d)
        small = tl.dot(high, q_rest, tl.dot(rest, q, input_precision="tf32"), input_precision="tf32")
        return tl.dot(high, q, c + tl.where(small == small, small, 0.0), input_precision="tf32")
    else:
        return tl.dot(d, q, c, input_precision=PRECISION)


@triton.jit
def select_rows(onehot, x, PRECISION: tl.constexpr):
    """Sums of rows of x, finite: the product of zeros and ones with it. As "tf32x3" its three parts are exact."""
    if PRECISION == "tf32x3":
        high, rest = split(x)
        middle, low = split(rest)
        found = tl.dot(onehot, middle, tl.dot(onehot, low, input_precision="tf32"), input_precision="tf32")
        return tl.dot(onehot, high, found, input_precision="tf32")
    else:
        return tl.dot(onehot, x, input_precision=PRECISION)
