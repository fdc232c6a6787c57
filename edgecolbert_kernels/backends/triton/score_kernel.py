"""The kernel that scores: one program owns a document and a few queries, and keeps the maxima of their tokens on chip.

A tile of document tokens is the M side of the products and query tokens are the N side, so that a single query of 32
tokens still fills the M = 64 of a Hopper instruction, and a tile that was read once meets every query of the program. The
running maximum is kept an element of the tile, not a column: one operation an element, and one reduction a document.
"""

import triton
import triton.language as tl

from edgecolbert_kernels.backends.triton.tokens import (
    EVERY,
    LATEST,
    OWN,
    boundary,
    inverse_norm,
    kept_range,
    multiply_add,
    nan_max,
    operand,
    place,
    read,
    square_sum,
    values,
)


@triton.jit(
    do_not_specialize=[
        *("q_mask_ptr", "d_mask_ptr", "q_bounds_ptr", "d_bounds_ptr", "query_index_ptr", "document_index_ptr"),
        *("d_scale_ptr", "grad_ptr", "scores_ptr", "argmax_ptr"),
        *("num_queries", "num_documents", "q_length", "d_length", "first_program"),
    ]
)
def score(
    q_ptr,
    d_ptr,
    q_mask_ptr,
    d_mask_ptr,
    q_bounds_ptr,
    d_bounds_ptr,
    query_index_ptr,
    document_index_ptr,
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
    num_documents: tl.int64,  # of every query: K where they are its own
    q_length: tl.int64,  # tokens of a query, or the rows of all where they are packed
    d_length: tl.int64,
    first_program: tl.int64,
    LAYOUT: tl.constexpr,
    DIM: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    LOOP: tl.constexpr,
    BM: tl.constexpr,  # document tokens of a tile
    BN: tl.constexpr,  # query tokens beside each other
    GROUP: tl.constexpr,  # queries of a program
    SLOTS: tl.constexpr,  # the next power of two
    EVEN: tl.constexpr,  # every slot has BN // SLOTS columns, and a query as many tokens
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    E4M3: tl.constexpr,  # D is bytes of that float8
    Q_MASK: tl.constexpr,
    D_MASK: tl.constexpr,
    Q_PACKED: tl.constexpr,
    D_PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ZERO: tl.constexpr,  # masked similarities count as 0
    ARGMAX: tl.constexpr,
    SKIP: tl.constexpr,  # only the argmax, and only where the gradient is not 0
):
    program = tl.program_id(0).to(tl.int64) + first_program
    if LAYOUT == EVERY:
        block, document = place(program, tl.cdiv(num_queries, GROUP), num_documents)
        first_query = block * GROUP
        count = tl.minimum(num_queries - first_query, GROUP).to(tl.int32)
        d_base = document * d_stride_n
        d_mask_base = document * d_length
    elif LAYOUT == OWN:
        first_query = program // num_documents
        document = program
        count = tl.minimum(num_queries, 1).to(tl.int32)
        d_base = first_query * d_stride_n + (program % num_documents) * d_stride_k
        d_mask_base = document * d_length
    else:
        # An index may name nothing: then no token is read.
        first_query = tl.load(query_index_ptr + program)
        document = tl.load(document_index_ptr + program)
        exists = (first_query >= 0) & (first_query < num_queries) & (document >= 0) & (document < num_documents)
        first_query = tl.where(exists, first_query, 0)
        document = tl.where(exists, document, 0)
        count = exists.to(tl.int32)
        d_base = document * d_stride_n
        d_mask_base = document * d_length
    slot = tl.arange(0, SLOTS)
    if LAYOUT == EVERY:
        score_index = (first_query + slot) * num_documents + document
    else:
        score_index = program + slot
    if SKIP:
        grad = tl.load(grad_ptr + score_index, mask=slot < count, other=0.0)
        count = tl.where(tl.sum((grad != 0).to(tl.int32)) > 0, count, 0)

    length = tl.where(count > 0, d_length, 0).to(tl.int32)
    if D_PACKED:
        start = boundary(d_bounds_ptr, document, d_length)
        stop = boundary(d_bounds_ptr, tl.minimum(document + 1, num_documents), d_length)
        length = tl.where(count > 0, tl.maximum(stop - start, 0), 0).to(tl.int32)
        d_base = start * d_stride_t
        d_mask_base = start
    # Rows from `begin` to `end` are looked at, the first of which is kept.
    begin = length * 0
    end = length
    if D_MASK and not ZERO:
        begin, end = kept_range(d_mask_ptr + d_mask_base, length)
    found = end > 0

    if Q_PACKED:
        q_start = boundary(q_bounds_ptr, first_query, q_length)
        num_columns = tl.maximum(boundary(q_bounds_ptr, first_query + count, q_length) - q_start, 0).to(tl.int32)
        # Of slots behind the last query nothing is read.
        ends = boundary(q_bounds_ptr, tl.minimum(first_query + slot + 1, num_queries), q_length) - q_start
    else:
        num_columns = count * q_length.to(tl.int32)
    sums = tl.zeros([SLOTS], tl.float32)
    rows = tl.arange(0, BM)
    for c in range(0, num_columns, BN):
        column = c + tl.arange(0, BN)
        in_query = column < num_columns
        if Q_PACKED:
            passed = (ends[:, None] <= column[None, :]) & (slot < count - 1)[:, None]
            which = tl.sum(passed.to(tl.int32), 0)
            q_row = q_start + column
            q_rows = q_row * q_stride_t
        else:
            if EVEN:
                which = column // (BN // SLOTS)
                token = column % (BN // SLOTS)
            else:
                which = column // q_length.to(tl.int32)
                token = column % q_length.to(tl.int32)
            q_row = (first_query + which) * q_length + token
            q_rows = (first_query + which) * q_stride_n + token * q_stride_t
        q_kept = in_query
        if Q_MASK:
            q_kept = in_query & (tl.load(q_mask_ptr + q_row, mask=in_query, other=0) != 0)
        q_ptrs = q_ptr + q_rows
        if not LOOP:
            raw = read(q_ptrs, q_kept, 0, C0, DIM, True, C0 <= DIM)
            if NORMALIZE:
                q_squares = square_sum(raw)
            q0, q0_rest = operand(raw, COMPUTE, PRECISION)
            if C1 > 0:
                raw = read(q_ptrs, q_kept, C0, C1, DIM, True, C0 + C1 <= DIM)
                if NORMALIZE:
                    q_squares += square_sum(raw)
                q1, q1_rest = operand(raw, COMPUTE, PRECISION)
            if C2 > 0:
                raw = read(q_ptrs, q_kept, C0 + C1, C2, DIM, True, C0 + C1 + C2 <= DIM)
                if NORMALIZE:
                    q_squares += square_sum(raw)
                q2, q2_rest = operand(raw, COMPUTE, PRECISION)
        else:
            q_squares = tl.zeros([BN], tl.float32)
        best = tl.full([BM, BN], float("-inf"), tl.float32)
        if ARGMAX:
            won = tl.zeros([BM, BN], tl.int32)
        for j in range(begin // BM * BM, end, BM):
            row = j + rows
            # A row that does not count is read as one that does, so that no element needs a mask: beyond the end the last,
            # behind a mask the first that is kept. If such a copy wins, the one that it is a copy of has won.
            source = tl.minimum(row, end - 1)
            d_kept = source >= 0
            if D_MASK:
                d_kept = tl.load(d_mask_ptr + d_mask_base + source) != 0
                if not ZERO:
                    source = tl.where(d_kept, source, begin)
            d_ptrs = d_ptr + (d_base + source * d_stride_t)
            similarity = tl.zeros([BM, BN], tl.float32)
            if LOOP:
                d_squares = tl.zeros([BM], tl.float32)
                q_squares *= 0
                for k in range(0, DIM, C0):
                    d_raw = read(d_ptrs, d_kept, k, C0, DIM, ZERO, DIM % C0 == 0)
                    q_raw = read(q_ptrs, q_kept, k, C0, DIM, True, DIM % C0 == 0)
                    if NORMALIZE:
                        d_squares += square_sum(d_raw)
                        q_squares += square_sum(q_raw)
                    q, q_rest = operand(q_raw, COMPUTE, PRECISION)
                    similarity = multiply_add(values(d_raw, COMPUTE, E4M3), q, q_rest, similarity, PRECISION)
            else:
                d_raw = read(d_ptrs, d_kept, 0, C0, DIM, ZERO, C0 <= DIM)
                if NORMALIZE:
                    d_squares = square_sum(d_raw)
                similarity = multiply_add(values(d_raw, COMPUTE, E4M3), q0, q0_rest, similarity, PRECISION)
                if C1 > 0:
                    d_raw = read(d_ptrs, d_kept, C0, C1, DIM, ZERO, C0 + C1 <= DIM)
                    if NORMALIZE:
                        d_squares += square_sum(d_raw)
                    similarity = multiply_add(values(d_raw, COMPUTE, E4M3), q1, q1_rest, similarity, PRECISION)
                if C2 > 0:
                    d_raw = read(d_ptrs, d_kept, C0 + C1, C2, DIM, ZERO, C0 + C1 + C2 <= DIM)
                    if NORMALIZE:
                        d_squares += square_sum(d_raw)
                    similarity = multiply_add(values(d_raw, COMPUTE, E4M3), q2, q2_rest, similarity, PRECISION)
            if NORMALIZE:
                similarity *= inverse_norm(d_squares)[:, None]
            if ZERO:
                similarity = tl.where(d_kept[:, None], similarity, 0.0)
            if ARGMAX:
                # Above all and first: NaN. Where the best is NaN, nothing is better.
                better = ~(similarity <= best) & (best == best)
                best = tl.where(better, similarity, best)
                won = tl.where(better, j, won)
            else:
                best = nan_max(best, similarity)

        value = tl.reduce(best, 0, nan_max)
        if ARGMAX:
            at_best = (best == value[None, :]) | (best != best)
            winner = tl.min(tl.where(at_best, won + rows[:, None], LATEST), 0)
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
            stored = in_query
            if LAYOUT != EVERY:
                entry = program * q_length + column
            elif Q_PACKED:
                of_query = boundary(q_bounds_ptr, first_query + which, q_length)
                next_query = boundary(q_bounds_ptr, first_query + which + 1, q_length)
                entry = of_query * num_documents + document * (next_query - of_query) + (q_row - of_query)
                stored &= (q_row >= of_query) & (q_row < next_query)
            else:
                entry = ((first_query + which) * num_documents + document) * q_length + token
            tl.store(argmax_ptr + entry, winner.to(argmax_ptr.dtype.element_ty), mask=stored)
        if not SKIP:
            if NORMALIZE:
                # A query token with an infinity is no direction: all its similarities are NaN, the first of which wins.
                value = tl.where(q_squares - q_squares == 0, value * inverse_norm(q_squares), float("nan"))
            value = tl.where(q_kept & found, value, 0.0)
            if EVEN:
                sums += tl.sum(tl.reshape(value, [SLOTS, BN // SLOTS]), 1)
            else:
                sums += tl.sum(tl.where(which[None, :] == slot[:, None], value[None, :], 0.0), 1)
    if not SKIP:
        if E4M3:
            sums *= 256.0
        if SCALED:
            sums *= tl.load(d_scale_ptr + document)
        if LAYOUT == EVERY:
            tl.store(scores_ptr + score_index, sums, mask=slot < count)
        elif LAYOUT == OWN:
            tl.store(scores_ptr + score_index, sums, mask=slot < 1)
        else:
            tl.store(scores_ptr + score_index, tl.where(exists, sums, float("nan")), mask=slot < 1)
