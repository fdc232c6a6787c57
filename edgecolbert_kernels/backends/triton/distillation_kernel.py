"""The kernel of the distillation loss: from the scores of a query's candidates to its loss and their gradient.

A program owns a query. Its K candidates lie in registers, K padded to a power of two, and every step is a reduction over
them; nothing goes through memory but what comes in and out. The arithmetic is that of `losses._normalized`, `_divergence`
and `_margin_error`, and of their derivatives.
"""

import triton
import triton.language as tl

# As `losses.SMALLEST_RANGE`.
SMALLEST_RANGE = tl.constexpr(1e-8)


@triton.jit
def _number(pointer, bits, READ: tl.constexpr):
    """A float32 of a tensor of one, or of the bits of a float64: a launch by the driver takes words of 8 bytes only."""
    if READ:
        return tl.load(pointer).to(tl.float32)
    else:
        return bits.to(tl.int64).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _extremes(x, kept):
    """The least and the largest of what is kept; both NaN where there is one."""
    lost = tl.sum((x != x).to(tl.int32), axis=0) > 0
    lowest = tl.min(tl.where(kept, x, float("inf")), axis=0)
    highest = tl.max(tl.where(kept, x, -float("inf")), axis=0)
    return tl.where(lost, float("nan"), lowest), tl.where(lost, float("nan"), highest)


@triton.jit
def _normalized(x, kept, count, HOW: tl.constexpr):
    """The candidates normalised, 0 where not kept; what they were divided by; and the deviation, for "zscore"."""
    if HOW == "minmax":
        lowest, highest = _extremes(x, kept)
        base, scale, root = lowest, highest - lowest + SMALLEST_RANGE, 0.0
        # Without a candidate.
        scale = tl.where(count > 0, scale, 1.0)
    elif HOW == "zscore":
        some = tl.maximum(count, 1.0)
        base = tl.div_rn(tl.sum(x, axis=0), some)
        deviation = tl.where(kept, x - base, 0.0)
        variance = tl.div_rn(tl.sum(deviation * deviation, axis=0), some)
        root = tl.where(variance > 0, tl.sqrt_rn(tl.where(variance > 0, variance, 1.0)), 0.0)
        scale = root + SMALLEST_RANGE
    else:
        base, scale, root = 0.0, 1.0, 0.0
    y = x
    if HOW != "none":
        y = tl.where(kept, tl.div_rn(x - tl.where(count > 0, base, 0.0), scale), 0.0)
    return y, scale, root


@triton.jit
def _before_normalization(g, x, y, scale, root, kept, count, HOW: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of the kept scores from that of the normalised ones, which is 0 where not kept."""
    if HOW == "none":
        return g
    else:
        direct = tl.div_rn(g, scale)
        # Of the scale.
        along = tl.div_rn(tl.sum(g * y, axis=0), scale)
        if HOW == "minmax":
            lowest, highest = _extremes(x, kept)
            column = tl.arange(0, BLOCK)
            # Of several the first has the gradient.
            first_lowest = tl.min(tl.where(kept & (x == lowest), column, BLOCK), axis=0)
            first_highest = tl.min(tl.where(kept & (x == highest), column, BLOCK), axis=0)
            found = direct + tl.where(column == first_lowest, along - tl.sum(direct, axis=0), 0.0)
            return found - tl.where(column == first_highest, along, 0.0)
        else:
            some = tl.maximum(count, 1.0)
            # Of equal scores the root has no derivative. y * scale is the deviation from the mean.
            factor = tl.where(root > 0, tl.div_rn(along, some * tl.where(root > 0, root, 1.0)), 0.0)
            found = direct - factor * y * scale
            return found - tl.div_rn(tl.sum(found, axis=0), some)


@triton.jit
def _log_softmax(x, kept, count):
    """Of the candidates, and the softmax; 0 where not kept, so that nothing there is not finite."""
    highest = tl.where(count > 0, tl.max(tl.where(kept, x, -float("inf")), axis=0), 0.0)
    x = tl.where(kept, x - highest, 0.0)
    # From x and not from the logarithm, which has one rounding more.
    each = tl.where(kept, tl.exp(x), 0.0)
    total = tl.sum(each, axis=0)
    total = tl.where(count > 0, total, 1.0)
    return tl.where(kept, x - tl.log(total), 0.0), tl.div_rn(each, total)


@triton.jit(
    do_not_specialize=[
        "student",
        "teacher",
        "mask",
        "temperature",
        "teacher_temperature",
        "losses",
        "derivative",
        "slope",
        "candidates",
        "temperature_bits",
        "teacher_temperature_bits",
        "factor_bits",
    ]
)
def distill_query(
    student,
    teacher,
    mask,
    temperature,
    teacher_temperature,
    losses,
    derivative,
    slope,
    candidates: tl.int64,
    temperature_bits: tl.int64,
    teacher_temperature_bits: tl.int64,
    factor_bits: tl.int64,
    OBJECTIVE: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    MASKED: tl.constexpr,
    READ_TEMPERATURE: tl.constexpr,
    READ_TEACHER_TEMPERATURE: tl.constexpr,
    SQUARED: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    place = query * candidates + column
    kept = column < candidates
    if MASKED:
        kept &= tl.load(mask + place, mask=kept, other=0) != 0
    # What is not kept is not read, so nothing there can be heard.
    s = tl.load(student + place, mask=kept, other=0.0)
    t = tl.load(teacher + place, mask=kept, other=0.0).to(tl.float32)
    count = tl.sum(kept.to(tl.float32), axis=0)
    s_normal, scale, root = _normalized(s, kept, count, STUDENT)
    t_normal, _, _ = _normalized(t, kept, count, TEACHER)
    factor = _number(losses, factor_bits, False)
    if OBJECTIVE == "kl":
        warmth = _number(temperature, temperature_bits, READ_TEMPERATURE)
        t_warmth = _number(teacher_temperature, teacher_temperature_bits, READ_TEACHER_TEMPERATURE)
        s_logit = tl.div_rn(s_normal, warmth)
        s_log, s_soft = _log_softmax(s_logit, kept, count)
        t_log, t_soft = _log_softmax(tl.div_rn(t_normal, t_warmth), kept, count)
        loss = tl.sum(t_soft * (t_log - s_log), axis=0)
        logit_gradient = s_soft * tl.sum(t_soft, axis=0) - t_soft
        gradient = tl.div_rn(logit_gradient, warmth)
        if SLOPE:
            change = -tl.sum(gradient * s_logit, axis=0)
            if SQUARED:
                change = change * warmth * warmth + 2 * warmth * loss
            tl.store(slope + query, change * factor)
        if SQUARED:
            factor = factor * warmth * warmth
    else:
        both = kept & (column > 0) & (tl.sum((kept & (column == 0)).to(tl.int32), axis=0) > 0)
        pairs = tl.maximum(tl.sum(both.to(tl.float32), axis=0), 1.0)
        apart = s_normal - t_normal
        positive = tl.sum(tl.where(column == 0, apart, 0.0), axis=0)
        error = tl.where(both, positive - apart, 0.0)
        loss = tl.div_rn(tl.sum(error * error, axis=0), pairs)
        gradient = tl.div_rn(-2 * error, pairs)
        gradient = tl.where(column == 0, -tl.sum(gradient, axis=0), gradient)
    tl.store(losses + query, loss * factor)
    if DERIVATIVE:
        found = _before_normalization(gradient, s, s_normal, scale, root, kept, count, STUDENT, BLOCK)
        tl.store(derivative + place, tl.where(kept, found * factor, 0.0), mask=column < candidates)
