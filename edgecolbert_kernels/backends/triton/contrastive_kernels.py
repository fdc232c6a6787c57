"""The kernels of the contrastive loss: softmax sums over a tile of scores, and the gradients of its scores.

A tile is `[num_rows, num_columns]`, queries by documents, of which `start` is the first column's number. Formulas are those
of `ops.tiles`, steps and precisions those of `contrastive_torch`: scores, offsets and exponentials in float32, every sum,
and what is one number a row or column, in float64. Each value has one writer and each sum one order.

What a score is, is read where it is needed: `target` is int64 `[rows]`, or (TABLE) a byte for each row and column; `exclude`
(EXCLUDE) such bytes; from `limit` (LIMIT) on, float32 or float64 `[rows]`, a negative is dropped. Strides count elements.
float64 options come as the bits of an int64, so that every argument takes 8 bytes.
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
# Of a row's state: what `contrastive_torch.Rows` has, and behind it what only the forward needs.
LARGEST, SUM, NEGATIVE, LIMITS, CANDIDATES, POSITIVE_SCORES, SCORES, COLUMN_LOSSES = map(tl.constexpr, range(8))


@triton.jit
def _number(bits):
    """The float64 of these bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _finite(largest):
    """A base to count from: 0 where there is no candidate at all."""
    return tl.where(largest == -INF, 0.0, largest)


@triton.jit
def _over(x, temperature):
    """x / temperature, both float32, correctly rounded."""
    return tl.div_rn(x, tl.zeros_like(x) + temperature)


@triton.jit
def _expm1(x):
    """e^x - 1 in float32: by its series up to 1, of which the next term is below 2^-25, beyond as it says."""
    series = tl.full(x.shape, 1.0 / 3628800, tl.float32)
    series = series * x + 1.0 / 362880
    series = series * x + 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    series = series * x + 1.0
    return tl.where(tl.abs(x) <= 1.0, series * x, tl.exp(x) - 1.0)


@triton.jit
def _difference(logits, weight, rest, positive):
    """weight * softmax, and at a positive the difference from `weight - rest`, which is wanted there."""
    return tl.where(positive, _expm1(logits) * weight + rest, tl.exp(logits) * weight)


@triton.jit
def _entries(
    scores,
    score_stride,
    target,
    target_stride,
    target_step,
    exclude,
    exclude_stride,
    exclude_step,
    limit,
    start,
    row,
    column,
    num_rows,
    num_columns,
    TABLE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Scores of some rows and columns, which are positives and which candidates; neither where there is no score."""
    there = row < num_rows
    inside = there[:, None] & (column < num_columns)[None, :]
    score = tl.load(scores + row[:, None] * score_stride + column[None, :], mask=inside, other=0.0)
    document = start + column
    if TABLE:
        at = row[:, None] * target_stride + document[None, :] * target_step
        positive = tl.load(target + at, mask=inside, other=0) != 0
    else:
        wanted = tl.load(target + row * target_stride, mask=there, other=-1)
        positive = inside & (wanted[:, None] == document[None, :])
    candidate = inside
    if EXCLUDE:
        at = row[:, None] * exclude_stride + document[None, :] * exclude_step
        candidate &= tl.load(exclude + at, mask=inside, other=0) == 0
    if LIMIT:
        most = tl.load(limit + row, mask=there, other=0.0).to(tl.float32)
        # Not `<`: a NaN is not dropped.
        candidate &= (score >= most[:, None]) == 0
    return score, positive, candidate | positive


@triton.jit
def _positives(target, target_stride, positives, row, there, TABLE: tl.constexpr):
    """How many each row has, float64."""
    if TABLE:
        count = tl.load(positives + row, mask=there, other=0.0)
    else:
        count = (tl.load(target + row * target_stride, mask=there, other=-1) >= 0).to(tl.float64)
    return count


@triton.jit(do_not_specialize=[
    "scores", "target", "exclude", "limit", "positives", "temperature", "columns", "means", "state", "loss",
    "score_stride", "target_stride", "target_step", "exclude_stride", "exclude_step",
    "smoothing_bits", "start", "num_rows", "num_columns", "num_documents", "first", "last",
])  # fmt: skip
def row_sums(
    scores,
    target,
    exclude,
    limit,
    positives,
    temperature,
    columns,
    means,
    state,
    loss,
    score_stride: tl.int64,
    target_stride: tl.int64,
    target_step: tl.int64,
    exclude_stride: tl.int64,
    exclude_step: tl.int64,
    smoothing_bits: tl.int64,
    start: tl.int64,
    num_rows: tl.int64,
    num_columns: tl.int64,
    num_documents: tl.int64,
    first: tl.int64,
    last: tl.int64,
    TABLE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    LIMIT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds a tile to the `state` of the rows; the last one makes it a `Rows`, and the loss.

    A program owns ROWS rows and reads them twice, the second time from a cache: for the largest score, then for the sums.
    With SYMMETRIC, `columns` has the `Columns` of this tile, and `means` of the scores with SMOOTHING.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    before = there & (first == 0)
    place = state + row
    old_largest = tl.load(place + LARGEST * num_rows, mask=before, other=-INF)
    old_sum = tl.load(place + SUM * num_rows, mask=before, other=0.0)
    negative = tl.load(place + NEGATIVE * num_rows, mask=before, other=-INF)
    candidates = tl.load(place + CANDIDATES * num_rows, mask=before, other=0.0)
    positive_scores = tl.load(place + POSITIVE_SCORES * num_rows, mask=before, other=0.0)
    all_scores = tl.zeros([ROWS], tl.float64)
    if SMOOTHING:
        all_scores = tl.load(place + SCORES * num_rows, mask=before, other=0.0)
    column_losses = tl.zeros([ROWS], tl.float64)
    if SYMMETRIC:
        column_losses = tl.load(place + COLUMN_LOSSES * num_rows, mask=before, other=0.0)
    divisor = tl.load(temperature).to(tl.float64)
    smoothing = _number(smoothing_bits)

    largest = tl.full([ROWS], -INF, tl.float32)
    largest_negative = tl.full([ROWS], -INF, tl.float32)
    for begin in range(0, num_columns, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        score, positive, candidate = _entries(
            scores, score_stride, target, target_stride, target_step, exclude, exclude_stride, exclude_step, limit,
            start, row, column, num_rows, num_columns, TABLE, EXCLUDE, LIMIT,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(tl.where(candidate, score, -INF), axis=1))
        of_negatives = tl.where(candidate & (positive == 0), score, -INF)
        largest_negative = tl.maximum(largest_negative, tl.max(of_negatives, axis=1))
    new_largest = tl.maximum(old_largest, largest.to(tl.float64))
    negative = tl.maximum(negative, largest_negative.to(tl.float64))
    base = _finite(new_largest)
    base_f32 = base.to(tl.float32)

    total = old_sum * tl.exp((old_largest - base) / divisor)
    for begin in range(0, num_columns, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        score, positive, candidate = _entries(
            scores, score_stride, target, target_stride, target_step, exclude, exclude_stride, exclude_step, limit,
            start, row, column, num_rows, num_columns, TABLE, EXCLUDE, LIMIT,
        )  # fmt: skip
        exponential = tl.exp(_over(score - base_f32[:, None], divisor.to(tl.float32)))
        total += tl.sum(tl.where(candidate, exponential, 0.0).to(tl.float64), axis=1)
        positive_scores += tl.sum(tl.where(positive, score, 0.0).to(tl.float64), axis=1)
        candidates += tl.sum(candidate.to(tl.int32), axis=1).to(tl.float64)
        if SMOOTHING:
            all_scores += tl.sum(tl.where(candidate, score, 0.0).to(tl.float64), axis=1)
        if SYMMETRIC:
            within = column < num_columns
            at = columns + start + column
            column_base = _finite(tl.load(at, mask=within, other=0.0))
            log_sum = tl.load(at + num_documents, mask=within, other=0.0).to(tl.float32)
            below = (column_base.to(tl.float32)[None, :] - score) * (1.0 - smoothing).to(tl.float32)
            if SMOOTHING:
                mean = tl.load(means + column, mask=within, other=0.0)
                below += ((column_base - mean) * smoothing).to(tl.float32)[None, :]
            each = _over(below, divisor.to(tl.float32)) + log_sum[None, :]
            column_losses += tl.sum(tl.where(positive, each, 0.0).to(tl.float64), axis=1)

    tl.store(place + LARGEST * num_rows, new_largest, mask=there)
    tl.store(place + NEGATIVE * num_rows, negative, mask=there)
    tl.store(place + CANDIDATES * num_rows, candidates, mask=there)
    if last == 0:
        tl.store(place + SUM * num_rows, total, mask=there)
        tl.store(place + POSITIVE_SCORES * num_rows, positive_scores, mask=there)
        if SMOOTHING:
            tl.store(place + SCORES * num_rows, all_scores, mask=there)
        if SYMMETRIC:
            tl.store(place + COLUMN_LOSSES * num_rows, column_losses, mask=there)
    else:
        count = _positives(target, target_stride, positives, row, there, TABLE)
        log_sum = tl.log(total)
        wanted = (1.0 - smoothing) * positive_scores / tl.maximum(count, 1.0)
        if SMOOTHING:
            wanted += smoothing * all_scores / tl.maximum(candidates, 1.0)
        value = log_sum + (new_largest - wanted) / divisor
        if SYMMETRIC:
            value = (value + column_losses / tl.maximum(count, 1.0)) / 2
        value = tl.where(count == 0.0, 0.0, value)
        # Nobody has looked at the values: what is no target or no temperature gives no loss.
        value = tl.where(divisor > 0.0, value, float("nan"))
        if not TABLE:
            wanted_document = tl.load(target + row * target_stride, mask=there, other=-1)
            value = tl.where(wanted_document < num_documents, value, float("nan"))
        most = tl.zeros([ROWS], tl.float64)
        if LIMIT:
            most = tl.load(limit + row, mask=there, other=0.0).to(tl.float64)
        tl.store(place + SUM * num_rows, log_sum, mask=there)
        tl.store(place + LIMITS * num_rows, most, mask=there)
        tl.store(loss + row, value.to(tl.float32), mask=there)


@triton.jit(do_not_specialize=[
    "scores", "target", "exclude", "limit", "temperature", "partial",
    "score_stride", "target_stride", "target_step", "exclude_stride", "exclude_step",
    "start", "num_rows", "num_columns", "chunk",
])  # fmt: skip
def column_sums(
    scores,
    target,
    exclude,
    limit,
    temperature,
    partial,
    score_stride: tl.int64,
    target_stride: tl.int64,
    target_step: tl.int64,
    exclude_stride: tl.int64,
    exclude_step: tl.int64,
    start: tl.int64,
    num_rows: tl.int64,
    num_columns: tl.int64,
    chunk: tl.int64,
    TABLE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    LIMIT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of some columns over a chunk of the rows: largest score, sum below it, candidates and (SMOOTHING) sum of scores.

    `partial` is float64 `[4, chunks, num_columns]`. A program reads its part twice, as in `row_sums`.
    """
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    end = tl.minimum((part + 1) * chunk, num_rows)
    divisor = tl.load(temperature).to(tl.float32)
    largest = tl.full([COLUMNS], -INF, tl.float32)
    for begin in range(part * chunk, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        score, _, candidate = _entries(
            scores, score_stride, target, target_stride, target_step, exclude, exclude_stride, exclude_step, limit,
            start, row, column, end, num_columns, TABLE, EXCLUDE, LIMIT,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(tl.where(candidate, score, -INF), axis=0))
    base = _finite(largest)
    total = tl.zeros([COLUMNS], tl.float64)
    candidates = tl.zeros([COLUMNS], tl.float64)
    all_scores = tl.zeros([COLUMNS], tl.float64)
    for begin in range(part * chunk, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        score, _, candidate = _entries(
            scores, score_stride, target, target_stride, target_step, exclude, exclude_stride, exclude_step, limit,
            start, row, column, end, num_columns, TABLE, EXCLUDE, LIMIT,
        )  # fmt: skip
        exponential = tl.exp(_over(score - base[None, :], divisor))
        total += tl.sum(tl.where(candidate, exponential, 0.0).to(tl.float64), axis=0)
        candidates += tl.sum(candidate.to(tl.int32), axis=0).to(tl.float64)
        if SMOOTHING:
            all_scores += tl.sum(tl.where(candidate, score, 0.0).to(tl.float64), axis=0)
    inside = column < num_columns
    size = tl.num_programs(1).to(tl.int64) * num_columns
    at = partial + part * num_columns + column
    tl.store(at, largest.to(tl.float64), mask=inside)
    tl.store(at + size, total, mask=inside)
    tl.store(at + 2 * size, candidates, mask=inside)
    if SMOOTHING:
        tl.store(at + 3 * size, all_scores, mask=inside)


@triton.jit(do_not_specialize=[
    "partial", "temperature", "columns", "means", "start", "num_columns", "num_documents", "chunks",
])  # fmt: skip
def column_finish(
    partial,
    temperature,
    columns,
    means,
    start: tl.int64,
    num_columns: tl.int64,
    num_documents: tl.int64,
    chunks: tl.int64,
    SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The chunks of a column together: its place in a `Columns`, and (SMOOTHING) the mean of its scores."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    size = chunks * num_columns
    divisor = tl.load(temperature).to(tl.float64)
    largest = tl.full([COLUMNS], -INF, tl.float64)
    for begin in range(0, chunks, ROWS):
        part = begin + tl.arange(0, ROWS)
        there = (part < chunks)[:, None] & inside[None, :]
        found = tl.load(partial + part[:, None] * num_columns + column[None, :], mask=there, other=-INF)
        largest = tl.maximum(largest, tl.max(found, axis=0))
    base = _finite(largest)
    total = tl.zeros([COLUMNS], tl.float64)
    candidates = tl.zeros([COLUMNS], tl.float64)
    all_scores = tl.zeros([COLUMNS], tl.float64)
    for begin in range(0, chunks, ROWS):
        part = begin + tl.arange(0, ROWS)
        there = (part < chunks)[:, None] & inside[None, :]
        at = partial + part[:, None] * num_columns + column[None, :]
        own = _finite(tl.load(at, mask=there, other=0.0))
        amount = tl.load(at + size, mask=there, other=0.0)
        # A chunk without a candidate counted from 0, which may be far above the base.
        part_of_total = tl.where(amount == 0.0, 0.0, amount * tl.exp((own - base[None, :]) / divisor))
        total += tl.sum(part_of_total, axis=0)
        candidates += tl.sum(tl.load(at + 2 * size, mask=there, other=0.0), axis=0)
        if SMOOTHING:
            all_scores += tl.sum(tl.load(at + 3 * size, mask=there, other=0.0), axis=0)
    at = columns + start + column
    tl.store(at, largest, mask=inside)
    tl.store(at + num_documents, tl.log(total), mask=inside)
    tl.store(at + 2 * num_documents, candidates, mask=inside)
    if SMOOTHING:
        tl.store(means + column, all_scores / tl.maximum(candidates, 1.0), mask=inside)


@triton.jit(do_not_specialize=[
    "grad", "target", "positives", "weights",
    "grad_stride", "target_stride", "target_step", "num_rows", "num_documents", "share_bits",
])  # fmt: skip
def column_weights(
    grad,
    target,
    positives,
    weights,
    grad_stride: tl.int64,
    target_stride: tl.int64,
    target_step: tl.int64,
    num_rows: tl.int64,
    num_documents: tl.int64,
    share_bits: tl.int64,
    TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """How much each column's loss counts, float64 `[documents]`: what the rows that it is a positive of give it."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    share = _number(share_bits)
    total = tl.zeros([COLUMNS], tl.float64)
    for begin in range(0, num_rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        there = row < num_rows
        count = _positives(target, target_stride, positives, row, there, TABLE)
        value = share * tl.load(grad + row * grad_stride, mask=there, other=0.0).to(tl.float64)
        each = tl.where(count == 0.0, 0.0, value) / tl.maximum(count, 1.0)
        if TABLE:
            at = row[:, None] * target_stride + column[None, :] * target_step
            inside = there[:, None] & (column < num_documents)[None, :]
            positive = tl.load(target + at, mask=inside, other=0) != 0
        else:
            wanted = tl.load(target + row * target_stride, mask=there, other=-1)
            positive = wanted[:, None] == column[None, :]
        total += tl.sum(tl.where(positive, each[:, None], 0.0), axis=0)
    tl.store(weights + column, total, mask=column < num_documents)


@triton.jit(do_not_specialize=[
    "scores", "target", "exclude", "limit", "positives", "temperature", "grad", "state", "columns", "weights",
    "largest", "out", "slopes",
    "score_stride", "target_stride", "target_step", "exclude_stride", "exclude_step", "grad_stride", "out_stride",
    "smoothing_bits", "share_bits", "rounding_bits", "start", "num_rows", "num_columns", "num_documents", "chunk",
])  # fmt: skip
def score_gradients(
    scores,
    target,
    exclude,
    limit,
    positives,
    temperature,
    grad,
    state,
    columns,
    weights,
    largest,
    out,
    slopes,
    score_stride: tl.int64,
    target_stride: tl.int64,
    target_step: tl.int64,
    exclude_stride: tl.int64,
    exclude_step: tl.int64,
    grad_stride: tl.int64,
    out_stride: tl.int64,
    smoothing_bits: tl.int64,
    share_bits: tl.int64,
    rounding_bits: tl.int64,
    start: tl.int64,
    num_rows: tl.int64,
    num_columns: tl.int64,
    num_documents: tl.int64,
    chunk: tl.int64,
    TABLE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    LIMIT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    WRITE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of some columns' scores in a chunk of the rows.

    Whether one is negligible depends on the largest of its column, which takes a launch of its own: without WRITE a program
    writes its chunk's largest to `largest`, float32 `[chunks, num_columns]`; with it, it writes the gradients to `out`.
    With TEMPERATURE, a program's part of the sum of gradients times scores goes to `slopes`, float64.
    """
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    end = tl.minimum((part + 1) * chunk, num_rows)
    within = column < num_columns
    divisor = tl.load(temperature).to(tl.float32)
    smoothing = _number(smoothing_bits)
    share = _number(share_bits)
    rounding = _number(rounding_bits)
    if SYMMETRIC:
        at = columns + start + column
        column_base = _finite(tl.load(at, mask=within, other=0.0)).to(tl.float32)
        column_log_sum = tl.load(at + num_documents, mask=within, other=0.0).to(tl.float32)
        weight = tl.load(weights + start + column, mask=within, other=0.0)
        if SMOOTHING:
            queries = tl.load(at + 2 * num_documents, mask=within, other=1.0)
            of_column = (smoothing * weight / tl.maximum(queries, 1.0)).to(tl.float32)
    size = tl.zeros([COLUMNS], tl.float32)
    if WRITE:
        for other in range(0, tl.num_programs(1), ROWS):
            parts = other + tl.arange(0, ROWS)
            inside = (parts < tl.num_programs(1))[:, None] & within[None, :]
            found = tl.load(largest + parts[:, None] * num_columns + column[None, :], mask=inside, other=0.0)
            size = tl.maximum(size, tl.max(found, axis=0))
        size *= (rounding / num_rows.to(tl.float64)).to(tl.float32)
    slope = tl.zeros([COLUMNS], tl.float64)
    for begin in range(part * chunk, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        there = row < end
        score, positive, candidate = _entries(
            scores, score_stride, target, target_stride, target_step, exclude, exclude_stride, exclude_step, limit,
            start, row, column, end, num_columns, TABLE, EXCLUDE, LIMIT,
        )  # fmt: skip
        count = _positives(target, target_stride, positives, row, there, TABLE)
        row_largest = tl.load(state + LARGEST * num_rows + row, mask=there, other=0.0)
        row_log_sum = tl.load(state + SUM * num_rows + row, mask=there, other=0.0)
        value = share * tl.load(grad + row * grad_stride, mask=there, other=0.0).to(tl.float64)
        value = tl.where(count == 0.0, 0.0, value)
        wanted = value / tl.maximum(count, 1.0) * (1.0 - smoothing)

        offset = score - _finite(row_largest).to(tl.float32)[:, None]
        logits = _over(offset, divisor) - row_log_sum.to(tl.float32)[:, None]
        rest = (value - wanted).to(tl.float32)[:, None]
        gradient = _difference(logits, value.to(tl.float32)[:, None], rest, positive)
        if SMOOTHING:
            candidates = tl.load(state + CANDIDATES * num_rows + row, mask=there, other=1.0)
            gradient -= (smoothing * value / candidates).to(tl.float32)[:, None]
        # Such a row may have no candidate either, and so no sum.
        gradient = tl.where(candidate & (count != 0.0)[:, None], gradient, 0.0)
        if TEMPERATURE:
            # The gradients of a row, or a column, add up to 0, so that a score may be counted from any base.
            # What has no gradient may be anything, NaN included.
            slope += tl.sum(tl.where(gradient == 0.0, 0.0, gradient * offset).to(tl.float64), axis=0)
        if SYMMETRIC:
            offset = score - column_base[None, :]
            logits = _over(offset, divisor) - column_log_sum[None, :]
            rest = (weight[None, :] - wanted[:, None]).to(tl.float32)
            of_columns = _difference(logits, weight.to(tl.float32)[None, :], rest, positive)
            if SMOOTHING:
                of_columns -= of_column[None, :]
            # A document that is nobody's positive has no column loss, nor one without a candidate a sum.
            of_columns = tl.where(candidate & (weight != 0.0)[None, :], of_columns, 0.0)
            if TEMPERATURE:
                slope += tl.sum(tl.where(of_columns == 0.0, 0.0, of_columns * offset).to(tl.float64), axis=0)
            gradient += of_columns
        amount = tl.abs(gradient)
        if WRITE:
            # Of the largest gradient in a row, a lower bound that one pass knows: its hardest negative's softmax.
            negative = tl.load(state + NEGATIVE * num_rows + row, mask=there, other=0.0)
            hardest = tl.exp(((negative - row_largest) / divisor.to(tl.float64) - row_log_sum).to(tl.float32))
            bound = tl.abs(value) * hardest.to(tl.float64) * (rounding / tl.maximum(num_documents, 1).to(tl.float64))
            negligible = (amount <= size[None, :]) & (amount <= bound.to(tl.float32)[:, None])
            gradient = _over(tl.where(negligible, 0.0, gradient), divisor)
            inside = there[:, None] & within[None, :]
            tl.store(out + row[:, None] * out_stride + column[None, :], gradient, mask=inside)
        else:
            size = tl.maximum(size, tl.max(amount, axis=0))
    if not WRITE:
        tl.store(largest + part * num_columns + column, size, mask=within)
        if TEMPERATURE:
            programs = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            tl.store(slopes + programs, tl.sum(slope, axis=0))
