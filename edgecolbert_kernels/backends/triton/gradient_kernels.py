"""The kernels of the backward. No atomics: a program owns what it writes, adds in float32 on chip and rounds once.

`documents` owns a tile of a document's tokens. With g the gradient of a score, a query adds g q_i to the token that won query
token i: as a product of the one-hot winners with the query, exact in half precision, times g in float32, so that the smallest
g loses nothing. `queries` owns some tokens of a query, whose gradient is a sum of the document rows that won: reads alone.

Pairs are numbered as scores are. Where pairs were chosen by index, `order` lists them by owner, and owner n has those from
`first[n]` to `first[n + 1]`.
"""

import triton
import triton.language as tl

from edgecolbert_kernels.backends.triton.tokens import (
    EVERY,
    INDEXED,
    OWN,
    SMALLEST_NORM,
    boundary,
    inverse_norm,
    read,
    select_rows,
    square_sum,
)

# Pairs that are skipped together where none has a gradient.
BLOCK = tl.constexpr(16)
FLAGS = tl.constexpr(64)


@triton.jit(do_not_specialize=["grad_ptr", "flags_ptr", "num_rows", "length", "num_scores"])
def unusual(
    x_ptr,
    grad_ptr,
    flags_ptr,
    stride_n: tl.int64,
    stride_t: tl.int64,
    num_rows: tl.int64,
    length: tl.int64,
    num_scores: tl.int64,
    DIM: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """flags [FLAGS]: not 0 where a program met an infinity or NaN among its share of x and of the scores' gradient."""
    found = tl.zeros([ROWS, C], tl.int32)
    for r in range(tl.program_id(0) * ROWS, num_rows, FLAGS * ROWS):
        row = r + tl.arange(0, ROWS)
        ptrs = x_ptr + (row // length * stride_n + row % length * stride_t)
        for k in range(0, DIM, C):
            x = read(ptrs, row < num_rows, k, C, DIM, True, DIM % C == 0).to(tl.float32)
            found |= (x - x != 0).to(tl.int32)
    flag = tl.max(tl.max(found, 1), 0)
    for n in range(tl.program_id(0) * 1024, num_scores, FLAGS * 1024):
        at = n + tl.arange(0, 1024)
        g = tl.load(grad_ptr + at, mask=at < num_scores, other=0.0)
        flag = tl.maximum(flag, tl.max((g - g != 0).to(tl.int32), 0))
    tl.store(flags_ptr + tl.program_id(0), flag)


@triton.jit
def add_row(acc, match, pick, piece, weight):
    """One query token's row of `piece` to the token that it chose, NaN and infinity included."""
    row = tl.sum(tl.where(pick[:, None], piece, 0.0), 0)
    return acc + tl.where(match[:, None], (weight * row)[None, :], 0.0)


@triton.jit
def add_piece(acc, onehot, piece, g, scale, NORMALIZE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    if NORMALIZE:
        unit = piece.to(tl.float32) * scale[:, None]
        if COMPUTE == tl.float32:
            return acc + g * select_rows(onehot.to(tl.float32), unit, PRECISION)
        else:
            # At most 1 in size, so two of float16 hold what float32 would.
            high = unit.to(tl.float16)
            low = (unit - high.to(tl.float32)).to(tl.float16)
            hot = onehot.to(tl.float16)
            return acc + g * tl.dot(hot, low, tl.dot(hot, high))
    else:
        return acc + g * select_rows(onehot.to(COMPUTE), piece.to(COMPUTE), PRECISION)


@triton.jit
def add_query(
    acc0,
    acc1,
    acc2,
    q_ptrs,
    token,
    exists,
    row,
    g,
    k0,
    DIM: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SAFE: tl.constexpr,
):
    """Some tokens of one query to the tile whose tokens have the numbers `row`."""
    WIDTH: tl.constexpr = C0 + C1 + C2
    scale = tl.full(token.shape, 1.0, tl.float32)
    if SAFE:
        exists &= token >= 0
    piece0 = read(q_ptrs, exists, k0, C0, DIM, True, (DIM % WIDTH == 0) if SPLIT else (C0 <= DIM))
    if C1 > 0:
        piece1 = read(q_ptrs, exists, k0 + C0, C1, DIM, True, (DIM % WIDTH == 0) if SPLIT else (C0 + C1 <= DIM))
    if C2 > 0:
        piece2 = read(q_ptrs, exists, k0 + C0 + C1, C2, DIM, True, (DIM % WIDTH == 0) if SPLIT else (WIDTH <= DIM))
    if NORMALIZE:
        squares = square_sum(piece0)
        if C1 > 0:
            squares += square_sum(piece1)
        if C2 > 0:
            squares += square_sum(piece2)
        scale = inverse_norm(squares)
    if SAFE:
        columns = tl.arange(0, token.shape[0])
        if g != 0:
            for n in range(0, token.shape[0]):
                pick = columns == n
                chosen = tl.sum(tl.where(pick & exists, token + 1, 0)) - 1
                weight = g * tl.sum(tl.where(pick, scale, 0.0))
                match = (row == chosen) & (chosen >= 0)
                acc0 = add_row(acc0, match, pick, piece0.to(tl.float32), weight)
                if C1 > 0:
                    acc1 = add_row(acc1, match, pick, piece1.to(tl.float32), weight)
                if C2 > 0:
                    acc2 = add_row(acc2, match, pick, piece2.to(tl.float32), weight)
    else:
        onehot = row[:, None] == token[None, :]
        acc0 = add_piece(acc0, onehot, piece0, g, scale, NORMALIZE, COMPUTE, PRECISION)
        if C1 > 0:
            acc1 = add_piece(acc1, onehot, piece1, g, scale, NORMALIZE, COMPUTE, PRECISION)
        if C2 > 0:
            acc2 = add_piece(acc2, onehot, piece2, g, scale, NORMALIZE, COMPUTE, PRECISION)
    return acc0, acc1, acc2


@triton.jit
def piece_through_norm(acc, x, inverse, along, live):
    """A piece of the gradient to x from that to x / |x|, of which `along` is the part along x / |x|."""
    return tl.where(live[:, None], (acc - x * (inverse * along)[:, None]) * inverse[:, None], 0.0)


@triton.jit
def through_norm(
    acc0, acc1, acc2, ptrs, exists, DIM: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr
):
    """The gradient to the rows x at `ptrs` from that to x / |x|; rows without one are left alone, whatever stands there."""
    x0 = read(ptrs, exists, 0, C0, DIM, True, C0 <= DIM).to(tl.float32)
    squares, product = tl.sum(x0 * x0, 1), tl.sum(x0 * acc0, 1)
    live = tl.max((acc0 != 0).to(tl.int32), 1)
    if C1 > 0:
        x1 = read(ptrs, exists, C0, C1, DIM, True, C0 + C1 <= DIM).to(tl.float32)
        squares += tl.sum(x1 * x1, 1)
        product += tl.sum(x1 * acc1, 1)
        live |= tl.max((acc1 != 0).to(tl.int32), 1)
    if C2 > 0:
        x2 = read(ptrs, exists, C0 + C1, C2, DIM, True, C0 + C1 + C2 <= DIM).to(tl.float32)
        squares += tl.sum(x2 * x2, 1)
        product += tl.sum(x2 * acc2, 1)
        live |= tl.max((acc2 != 0).to(tl.int32), 1)
    inverse = inverse_norm(squares)
    along = tl.where(tl.sqrt(squares) < SMALLEST_NORM, 0.0, product * inverse)
    acc0 = piece_through_norm(acc0, x0, inverse, along, live != 0)
    if C1 > 0:
        acc1 = piece_through_norm(acc1, x1, inverse, along, live != 0)
    if C2 > 0:
        acc2 = piece_through_norm(acc2, x2, inverse, along, live != 0)
    return acc0, acc1, acc2


@triton.jit
def add_queries(
    acc0,
    acc1,
    acc2,
    q_ptr,
    grad_ptr,
    argmax_ptr,
    q_bounds_ptr,
    order_ptr,
    query_index_ptr,
    q_stride_n,
    q_stride_t,
    num_queries,
    num_documents,
    q_length,
    document,
    begin,
    end,
    row,
    k0,
    LAYOUT: tl.constexpr,
    DIM: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q_PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SAFE: tl.constexpr,
):
    """Every query of a document's from `begin` to `end`: of all, or of the list `order`."""
    for b in range(begin, end, BLOCK):
        number = b + tl.arange(0, BLOCK)
        if LAYOUT == EVERY:
            pairs = number.to(tl.int64) * num_documents + document
        elif LAYOUT == OWN:
            pairs = number.to(tl.int64)
        else:
            pairs = tl.load(order_ptr + number, mask=number < end, other=0)
        grads = tl.load(grad_ptr + pairs, mask=number < end, other=0.0)
        if tl.sum((grads != 0).to(tl.int32)) > 0:
            stop = tl.minimum(b + BLOCK, end)
            if Q_PACKED:
                for query in range(b, stop):
                    g = tl.load(grad_ptr + query * num_documents + document)
                    start = boundary(q_bounds_ptr, query, q_length)
                    length = tl.maximum(boundary(q_bounds_ptr, query + 1, q_length) - start, 0).to(tl.int32)
                    entry = start * num_documents + document * length
                    for c in range(0, length, BN):
                        column = c + tl.arange(0, BN)
                        exists = column < length
                        token = tl.load(argmax_ptr + entry + column, mask=exists, other=-1).to(tl.int32)
                        acc0, acc1, acc2 = add_query(
                            acc0, acc1, acc2, q_ptr + (start + column) * q_stride_t, token, exists, row, g, k0,
                            DIM, C0, C1, C2, SPLIT, COMPUTE, PRECISION, NORMALIZE, SAFE,
                        )  # fmt: skip
            else:
                blocks = tl.cdiv(q_length, BN).to(tl.int32)
                for t in range(b * blocks, stop * blocks):
                    e = t // blocks
                    column = t % blocks * BN + tl.arange(0, BN)
                    exists = column < q_length
                    if LAYOUT == EVERY:
                        query = e
                        pair = e.to(tl.int64) * num_documents + document
                    elif LAYOUT == OWN:
                        query = e // num_documents
                        pair = e.to(tl.int64)
                    else:
                        pair = tl.load(order_ptr + e)
                        query = tl.load(query_index_ptr + pair)
                        exists &= (query >= 0) & (query < num_queries)
                    g = tl.load(grad_ptr + pair)
                    token = tl.load(argmax_ptr + pair * q_length + column, mask=exists, other=-1).to(tl.int32)
                    acc0, acc1, acc2 = add_query(
                        acc0, acc1, acc2, q_ptr + (query * q_stride_n + column * q_stride_t), token, exists, row, g, k0,
                        DIM, C0, C1, C2, SPLIT, COMPUTE, PRECISION, NORMALIZE, SAFE,
                    )  # fmt: skip
    return acc0, acc1, acc2


@triton.jit(
    do_not_specialize=[
        *("grad_ptr", "argmax_ptr", "d_mask_ptr", "q_bounds_ptr", "d_bounds_ptr", "order_ptr", "first_ptr"),
        *("query_index_ptr", "flags_ptr", "num_queries", "num_documents", "q_length", "d_length", "tiles"),
    ]
)
def documents(
    q_ptr,
    d_ptr,
    grad_ptr,
    argmax_ptr,
    d_mask_ptr,
    q_bounds_ptr,
    d_bounds_ptr,
    order_ptr,
    first_ptr,
    query_index_ptr,
    flags_ptr,
    out_ptr,  # in the shape of D, contiguous
    q_stride_n: tl.int64,
    q_stride_t: tl.int64,
    d_stride_n: tl.int64,
    d_stride_k: tl.int64,
    d_stride_t: tl.int64,
    num_queries: tl.int64,
    num_documents: tl.int64,
    q_length: tl.int64,
    d_length: tl.int64,
    tiles: tl.int64,  # programs of a document, which share its tiles
    LAYOUT: tl.constexpr,
    DIM: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SPLIT: tl.constexpr,  # the grid's second dimension walks over blocks of dimensions
    BM: tl.constexpr,
    BN: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    D_MASK: tl.constexpr,
    Q_PACKED: tl.constexpr,
    D_PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    WIDTH: tl.constexpr = C0 + C1 + C2
    program = tl.program_id(0).to(tl.int64)
    k0 = 0
    if SPLIT:
        k0 = tl.program_id(1) * WIDTH
    document = program // tiles
    out_base = document * d_length
    d_base = document * d_stride_n
    if LAYOUT == OWN:
        d_base = document // num_documents * d_stride_n + document % num_documents * d_stride_k
    length = d_length.to(tl.int32)
    if D_PACKED:
        out_base = boundary(d_bounds_ptr, document, d_length)
        length = tl.maximum(boundary(d_bounds_ptr, document + 1, d_length) - out_base, 0).to(tl.int32)
        d_base = out_base * d_stride_t
    if LAYOUT == EVERY:
        begin = (program * 0).to(tl.int32)
        end = num_queries.to(tl.int32)
    elif LAYOUT == OWN:
        begin = document.to(tl.int32)
        end = begin + 1
    else:
        begin = tl.load(first_ptr + document).to(tl.int32)
        end = tl.load(first_ptr + document + 1).to(tl.int32)
    # One that is not finite would reach every row of a product.
    finite = tl.max(tl.load(flags_ptr + tl.arange(0, FLAGS)), 0) == 0

    for j in range((program % tiles).to(tl.int32) * BM, length, tiles.to(tl.int32) * BM):
        row = j + tl.arange(0, BM)
        exists = row < length
        last = end
        if D_MASK:
            kept = tl.load(d_mask_ptr + out_base + row, mask=exists, other=0) != 0
            last = tl.where(tl.sum(kept.to(tl.int32)) > 0, end, begin)
        acc0 = tl.zeros([BM, C0], tl.float32)
        acc1 = tl.zeros([BM, C1 if C1 > 0 else 1], tl.float32)
        acc2 = tl.zeros([BM, C2 if C2 > 0 else 1], tl.float32)
        if finite:
            acc0, acc1, acc2 = add_queries(
                acc0, acc1, acc2, q_ptr, grad_ptr, argmax_ptr, q_bounds_ptr, order_ptr, query_index_ptr,
                q_stride_n, q_stride_t, num_queries, num_documents, q_length, document, begin, last, row, k0,
                LAYOUT, DIM, C0, C1, C2, SPLIT, BN, COMPUTE, PRECISION, Q_PACKED, NORMALIZE, False,
            )  # fmt: skip
        else:
            acc0, acc1, acc2 = add_queries(
                acc0, acc1, acc2, q_ptr, grad_ptr, argmax_ptr, q_bounds_ptr, order_ptr, query_index_ptr,
                q_stride_n, q_stride_t, num_queries, num_documents, q_length, document, begin, last, row, k0,
                LAYOUT, DIM, C0, C1, C2, SPLIT, BN, COMPUTE, PRECISION, Q_PACKED, NORMALIZE, True,
            )  # fmt: skip
        if NORMALIZE:
            d_ptrs = d_ptr + (d_base + row * d_stride_t)
            acc0, acc1, acc2 = through_norm(acc0, acc1, acc2, d_ptrs, exists, DIM, C0, C1, C2)
        out_ptrs = out_ptr + (out_base + row) * DIM
        write(out_ptrs, acc0, exists, k0, C0, DIM)
        if C1 > 0:
            write(out_ptrs, acc1, exists, k0 + C0, C1, DIM)
        if C2 > 0:
            write(out_ptrs, acc2, exists, k0 + C0 + C1, C2, DIM)


@triton.jit
def write(row_ptrs, x, exists, start, C: tl.constexpr, DIM: tl.constexpr):
    k = start + tl.arange(0, C)
    tl.store(row_ptrs[:, None] + k[None, :], x.to(row_ptrs.dtype.element_ty), mask=exists[:, None] & (k < DIM)[None, :])


@triton.jit
def write_sum(row_ptrs, x, exists, start, C: tl.constexpr, DIM: tl.constexpr):
    k = start + tl.arange(0, C)
    ptrs = row_ptrs[:, None] + k[None, :]
    inside = exists[:, None] & (k < DIM)[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) + x, mask=inside)


@triton.jit(
    do_not_specialize=[
        *("grad_ptr", "argmax_ptr", "q_bounds_ptr", "d_bounds_ptr", "order_ptr", "first_ptr", "document_index_ptr"),
        *("num_queries", "num_documents", "q_length", "d_length", "blocks"),
    ]
)
def queries(
    q_ptr,
    d_ptr,
    grad_ptr,
    argmax_ptr,
    q_bounds_ptr,
    d_bounds_ptr,
    order_ptr,
    first_ptr,
    document_index_ptr,
    out_ptr,  # in the shape of Q, contiguous; float32 where it is added to
    q_stride_n: tl.int64,
    q_stride_t: tl.int64,
    d_stride_n: tl.int64,
    d_stride_k: tl.int64,
    d_stride_t: tl.int64,
    num_queries: tl.int64,
    num_documents: tl.int64,
    q_length: tl.int64,
    d_length: tl.int64,
    blocks: tl.int64,  # programs of a query, which share its tokens
    LAYOUT: tl.constexpr,
    DIM: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,  # query tokens
    BD: tl.constexpr,  # documents at a time
    Q_PACKED: tl.constexpr,
    D_PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SUM: tl.constexpr,  # added to the output, without the Jacobian of `normalize`
):
    WIDTH: tl.constexpr = C0 + C1 + C2
    program = tl.program_id(0).to(tl.int64)
    k0 = 0
    if SPLIT:
        k0 = tl.program_id(1) * WIDTH
    query = program // blocks
    out_base = query * q_length
    q_base = query * q_stride_n
    length = q_length.to(tl.int32)
    if Q_PACKED:
        out_base = boundary(q_bounds_ptr, query, q_length)
        length = tl.maximum(boundary(q_bounds_ptr, query + 1, q_length) - out_base, 0).to(tl.int32)
        q_base = out_base * q_stride_t
    if LAYOUT == INDEXED:
        begin = tl.load(first_ptr + query).to(tl.int32)
        end = tl.load(first_ptr + query + 1).to(tl.int32)
    else:
        begin = (program * 0).to(tl.int32)
        end = num_documents.to(tl.int32)

    for i in range((program % blocks).to(tl.int32) * BT, length, blocks.to(tl.int32) * BT):
        column = i + tl.arange(0, BT)
        exists = column < length
        acc0 = tl.zeros([BT, C0], tl.float32)
        acc1 = tl.zeros([BT, C1 if C1 > 0 else 1], tl.float32)
        acc2 = tl.zeros([BT, C2 if C2 > 0 else 1], tl.float32)
        for b in range(begin, end, BD):
            number = b + tl.arange(0, BD)
            there = number < end
            if LAYOUT == INDEXED:
                pair = tl.load(order_ptr + number, mask=there, other=0)
                document = tl.load(document_index_ptr + pair, mask=there, other=-1)
                there &= (document >= 0) & (document < num_documents)
                document = tl.where(there, document, 0)
            else:
                pair = query * num_documents + number
                document = number.to(tl.int64)
            g = tl.load(grad_ptr + pair, mask=there, other=0.0)
            if tl.sum((g != 0).to(tl.int32)) > 0:
                if Q_PACKED:
                    entry = out_base * num_documents + document * length
                else:
                    entry = pair * q_length
                live = (g != 0)[:, None] & exists[None, :]
                token = tl.load(argmax_ptr + (entry[:, None] + column[None, :]), mask=live, other=-1).to(tl.int64)
                if D_PACKED:
                    start = boundary(d_bounds_ptr, tl.where(there, document, 0), d_length)
                    stop = boundary(d_bounds_ptr, tl.where(there, document, 0) + 1, d_length)
                    d_base = start * d_stride_t
                    d_len = stop - start
                elif LAYOUT == OWN:
                    d_base = query * d_stride_n + document * d_stride_k
                    d_len = document * 0 + d_length
                else:
                    d_base = document * d_stride_n
                    d_len = document * 0 + d_length
                live &= (token >= 0) & (token < d_len[:, None])
                rows = d_ptr + (d_base[:, None] + tl.where(live, token, 0) * d_stride_t)
                weight = tl.where(live, g[:, None], 0.0)
                x0 = read(rows, live, k0, C0, DIM, True, (DIM % WIDTH == 0) if SPLIT else (C0 <= DIM)).to(tl.float32)
                if C1 > 0:
                    x1 = read(rows, live, k0 + C0, C1, DIM, True, (DIM % WIDTH == 0) if SPLIT else (C0 + C1 <= DIM)).to(
                        tl.float32
                    )
                if C2 > 0:
                    x2 = read(
                        rows, live, k0 + C0 + C1, C2, DIM, True, (DIM % WIDTH == 0) if SPLIT else (WIDTH <= DIM)
                    ).to(tl.float32)
                if NORMALIZE:
                    d_squares = tl.sum(x0 * x0, 2)
                    if C1 > 0:
                        d_squares += tl.sum(x1 * x1, 2)
                    if C2 > 0:
                        d_squares += tl.sum(x2 * x2, 2)
                    weight *= inverse_norm(d_squares)
                acc0 += tl.sum(weight[:, :, None] * x0, 0)
                if C1 > 0:
                    acc1 += tl.sum(weight[:, :, None] * x1, 0)
                if C2 > 0:
                    acc2 += tl.sum(weight[:, :, None] * x2, 0)
        out_ptrs = out_ptr + (out_base + column) * DIM
        if SUM:
            write_sum(out_ptrs, acc0, exists, k0, C0, DIM)
            if C1 > 0:
                write_sum(out_ptrs, acc1, exists, k0 + C0, C1, DIM)
            if C2 > 0:
                write_sum(out_ptrs, acc2, exists, k0 + C0 + C1, C2, DIM)
        else:
            if NORMALIZE:
                q_ptrs = q_ptr + (q_base + column * q_stride_t)
                acc0, acc1, acc2 = through_norm(acc0, acc1, acc2, q_ptrs, exists, DIM, C0, C1, C2)
            write(out_ptrs, acc0, exists, k0, C0, DIM)
            if C1 > 0:
                write(out_ptrs, acc1, exists, k0 + C0, C1, DIM)
            if C2 > 0:
                write(out_ptrs, acc2, exists, k0 + C0 + C1, C2, DIM)
