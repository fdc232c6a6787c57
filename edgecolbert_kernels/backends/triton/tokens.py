"""Device functions that the kernels share: where token rows lie, reading them in pieces, norms and similarities.

The dimension d is read in up to three pieces, powers of two, so that 48 is 32 + 16 and takes three tensor-core steps of 16
where one piece of 64 takes four. `C0`, `C1`, `C2` are the pieces, 0 where there is none. A larger d is read in blocks of
`C0` inside a loop (`LOOP`).
"""

import triton
import triton.language as tl

EVERY, OWN, INDEXED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SMALLEST_NORM = tl.constexpr(1e-12)


@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def boundary(bounds_ptr, number, rows):
    """Where sequence `number` starts; within the buffer whatever stands there."""
    return tl.minimum(tl.maximum(tl.load(bounds_ptr + number), 0), rows)


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
def square_sum(x):
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=-1)


@triton.jit
def inverse_norm(squares):
    return 1.0 / tl.maximum(tl.sqrt(squares), SMALLEST_NORM)
