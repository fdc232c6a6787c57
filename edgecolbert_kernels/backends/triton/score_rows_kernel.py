"""The kernel that scores a batch: as `score_kernel.score`, with query tokens as the rows of the products.

Where the queries of a program have 64 tokens together, they fill the M side of a Hopper instruction themselves, and document
tokens are its columns. A maximum over document tokens is then one inside a thread, and what a program carries from tile to
tile is a number or two a query token. So registers hold little beside one tile of similarities, and several programs share a
multiprocessor.
"""

import triton
import triton.language as tl

from edgecolbert_kernels.backends.triton.tokens import (
    LATEST,
    boundary,
    inverse_norm,
    kept_range,
    nan_max,
    place,
    read,
    square_sum,
    values,
)


@triton.jit
def before(x):
    """The float32 before a number; of NaN infinity, so that nothing but NaN is not at most that."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x > 0, bits - 1, tl.where(x == 0, -0x7FFFFFFF, bits + 1))
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), float("inf"))


@triton.jit(
    do_not_specialize=[
        *("q_mask_ptr", "d_mask_ptr", "q_bounds_ptr", "d_bounds_ptr", "query_index_ptr", "document_index_ptr"),
        *("d_scale_ptr", "grad_ptr", "scores_ptr", "argmax_ptr"),
        *("num_queries", "num_documents", "q_length", "d_length", "first_program"),
    ]
)
def score_rows(
    q_ptr,
    d_ptr,
    q_mask_ptr,
    d_mask_ptr,
    q_bounds_ptr,  # not used; the arguments are those of `score`
    d_bounds_ptr,
    query_index_ptr,  # not used
    document_index_ptr,  # not used
    d_scale_ptr,
    grad_ptr,
    scores_ptr,
    argmax_ptr,
    q_stride_n: tl.int64,
    q_stride_t: tl.int64,
    d_stride_n: tl.int64,
    d_stride_k: tl.int64,
    d_stride_t: tl.int64,
    num_queries: tl.int64,
    num_documents: tl.int64,
    q_length: tl.int64,
    d_length: tl.int64,
    first_program: tl.int64,
    DIM: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    BM: tl.constexpr,  # query tokens below each other
    BN: tl.constexpr,  # document tokens of a tile
    GROUP: tl.constexpr,  # queries of a program
    SLOTS: tl.constexpr,  # the next power of two
    EVEN: tl.constexpr,  # every slot has BM // SLOTS rows, and a query as many tokens
    COMPUTE: tl.constexpr,
    E4M3: tl.constexpr,  # D is bytes of that float8
    Q_MASK: tl.constexpr,
    D_MASK: tl.constexpr,
    D_PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ZERO: tl.constexpr,  # masked similarities count as 0
    ARGMAX: tl.constexpr,
    SKIP: tl.constexpr,  # only the argmax, and only where the gradient is not 0
):
    program = tl.program_id(0).to(tl.int64) + first_program
    block, document = place(program, tl.cdiv(num_queries, GROUP), num_documents)
    first_query = block * GROUP
    count = tl.minimum(num_queries - first_query, GROUP).to(tl.int32)
    slot = tl.arange(0, SLOTS)
    score_index = (first_query + slot) * num_documents + document
    if SKIP:
        grad = tl.load(grad_ptr + score_index, mask=slot < count, other=0.0)
        count = tl.where(tl.sum((grad != 0).to(tl.int32)) > 0, count, 0)

    length = tl.where(count > 0, d_length, 0).to(tl.int32)
    d_base = document * d_stride_n
    d_mask_base = document * d_length
    if D_PACKED:
        start = boundary(d_bounds_ptr, document, d_length)
        stop = boundary(d_bounds_ptr, document + 1, d_length)
        length = tl.where(count > 0, tl.maximum(stop - start, 0), 0).to(tl.int32)
        d_base = start * d_stride_t
        d_mask_base = start
    # Rows from `begin` to `end` are looked at, the first of which is kept.
    begin = length * 0
    end = length
    if D_MASK and not ZERO:
        begin, end = kept_range(d_mask_ptr + d_mask_base, length)
    found = end > 0

    num_rows = count * q_length.to(tl.int32)
    sums = tl.zeros([SLOTS], tl.float32)
    columns = tl.arange(0, BN)
    CHUNK: tl.constexpr = min(BN, 64)
    for r in range(0, num_rows, BM):
        q_row = r + tl.arange(0, BM)
        in_query = q_row < num_rows
        if EVEN:
            which = q_row // (BM // SLOTS)
            token = q_row % (BM // SLOTS)
        else:
            which = q_row // q_length.to(tl.int32)
            token = q_row % q_length.to(tl.int32)
        q_kept = in_query
        if Q_MASK:
            q_kept = in_query & (tl.load(q_mask_ptr + first_query * q_length + q_row, mask=in_query, other=0) != 0)
        q_ptrs = q_ptr + ((first_query + which) * q_stride_n + token * q_stride_t)
        raw = read(q_ptrs, q_kept, 0, C0, DIM, True, C0 <= DIM)
        if NORMALIZE:
            q_squares = square_sum(raw)
        q0 = raw.to(COMPUTE)
        if C1 > 0:
            raw = read(q_ptrs, q_kept, C0, C1, DIM, True, C0 + C1 <= DIM)
            if NORMALIZE:
                q_squares += square_sum(raw)
            q1 = raw.to(COMPUTE)
        if C2 > 0:
            raw = read(q_ptrs, q_kept, C0 + C1, C2, DIM, True, C0 + C1 + C2 <= DIM)
            if NORMALIZE:
                q_squares += square_sum(raw)
            q2 = raw.to(COMPUTE)
        best = tl.full([BM, 4], float("-inf"), tl.float32)
        if ARGMAX:
            tile = tl.zeros([BM, 4], tl.int32)
            won = tl.zeros([BM, 4], tl.float32)
            exponent = BN // 4 - 2 - 2 * tl.arange(0, BN // 8)
            weight = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
            weight = tl.reshape(weight, [BN // CHUNK, CHUNK // 8])[None, :, :, None]
        for j in range(begin // BN * BN, end, BN):
            # A token that does not count is read as one that does, so that no element needs a mask: beyond the end the last,
            # behind a mask the first that is kept. If such a copy wins, the one that it is a copy of has won.
            source = tl.minimum(j + columns, end - 1)
            d_kept = source >= 0
            if D_MASK:
                d_kept = tl.load(d_mask_ptr + d_mask_base + source) != 0
                if not ZERO:
                    source = tl.where(d_kept, source, begin)
            d_ptrs = d_ptr + (d_base + source * d_stride_t)
            d_raw = read(d_ptrs, d_kept, 0, C0, DIM, ZERO, C0 <= DIM)
            if NORMALIZE:
                d_squares = square_sum(d_raw)
            similarity = tl.dot(q0, values(d_raw, COMPUTE, E4M3).T)
            if C1 > 0:
                d_raw = read(d_ptrs, d_kept, C0, C1, DIM, ZERO, C0 + C1 <= DIM)
                if NORMALIZE:
                    d_squares += square_sum(d_raw)
                similarity = tl.dot(q1, values(d_raw, COMPUTE, E4M3).T, similarity)
            if C2 > 0:
                d_raw = read(d_ptrs, d_kept, C0 + C1, C2, DIM, ZERO, C0 + C1 + C2 <= DIM)
                if NORMALIZE:
                    d_squares += square_sum(d_raw)
                similarity = tl.dot(q2, values(d_raw, COMPUTE, E4M3).T, similarity)
            if NORMALIZE:
                similarity *= inverse_norm(d_squares)[None, :]
            if ZERO:
                similarity = tl.where(d_kept[None, :], similarity, 0.0)
            # The four threads that hold a row keep what they find each for itself: [query token, chunk, eight, thread, pair].
            similarity = tl.reshape(similarity, [BM, BN // CHUNK, CHUNK // 8, 4, 2])
            value = tl.reduce(tl.reduce(tl.reduce(similarity, 4, nan_max), 2, nan_max), 1, nan_max)
            if ARGMAX:
                # Above all and first: NaN. Where the best is NaN, nothing is better.
                better = ~(value <= best) & (best == best)
                # A binary digit of a float a token, the first the highest, cost less than comparing numbers of tokens: 1.0 and
                # 0.0 come from the comparison itself. A chunk's 16 are exact; the largest chunk is the first that has any.
                highest = ~(similarity <= before(value)[:, None, None, :, None])
                left, right = tl.split(highest.to(tl.float32))
                digits = tl.max(tl.sum((left + (left + right)) * weight, 2), 1)
                best = tl.where(better, value, best)
                won = tl.where(better, digits, won)
                tile = tl.where(better, j, tile)
            else:
                best = nan_max(best, value)

        value = tl.reduce(best, 1, nan_max)
        if ARGMAX:
            digit = BN // 4 - 1 - ((won.to(tl.int32, bitcast=True) >> 23) - 127)
            winner = tile + digit // 2 * 8 + tl.arange(0, 4)[None, :] * 2 + digit % 2
            winner = tl.min(tl.where(~(best <= before(value)[:, None]), winner, LATEST), 1)
            winner = tl.minimum(tl.where(value == float("-inf"), begin, winner), end - 1)
            if NORMALIZE:
                winner = tl.where(q_squares - q_squares == 0, winner, begin)
            chosen = q_kept & found
            if D_MASK:
                won_by_kept = tl.load(d_mask_ptr + d_mask_base + winner, mask=chosen, other=0) != 0
                if ZERO:
                    chosen &= won_by_kept
                else:
                    winner = tl.where(won_by_kept, winner, begin)
            winner = tl.where(chosen, winner, -1)
            entry = ((first_query + which) * num_documents + document) * q_length + token
            tl.store(argmax_ptr + entry, winner.to(argmax_ptr.dtype.element_ty), mask=in_query)
        if not SKIP:
            if NORMALIZE:
                # A query token with an infinity is no direction: all its similarities are NaN, the first of which wins.
                value = tl.where(q_squares - q_squares == 0, value * inverse_norm(q_squares), float("nan"))
            value = tl.where(q_kept & found, value, 0.0)
            if EVEN:
                sums += tl.sum(tl.reshape(value, [SLOTS, BM // SLOTS]), 1)
            else:
                sums += tl.sum(tl.where(which[None, :] == slot[:, None], value[None, :], 0.0), 1)
    if not SKIP:
        if E4M3:
            sums *= 256.0
        if SCALED:
            sums *= tl.load(d_scale_ptr + document)
        tl.store(scores_ptr + score_index, sums, mask=slot < count)
