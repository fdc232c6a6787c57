"""Training losses fused with MaxSim: the similarities of a batch never exist, and of the rest no more than fits a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from edgecolbert_kernels import checks, scoring
from edgecolbert_kernels.ops import arguments, contrastive, distillation, tensors
from edgecolbert_kernels.signatures import MaskMode, Normalization, Objective, Reduction

MAX_SAVED_BYTES = 256 << 20
REDUCTIONS = get_args(Reduction)
NORMALIZATIONS = get_args(Normalization)
OBJECTIVES = get_args(Objective)
# What PyLate adds to the range of a query's scores before it divides by it.
SMALLEST_RANGE = 1e-8

Tokens = Tensor | Sequence[Tensor]
Masks = Tensor | Sequence[Tensor | None] | None


def contrastive_loss(
    Q: Tokens,
    D: Tokens,
    q_mask: Masks = None,
    d_mask: Masks = None,
    *,
    target: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    symmetric: bool = False,
    weight: Tensor | None = None,
    exclude: Tensor | None = None,
    margin: float | None = None,
    reduction: Reduction = "mean",
    normalize: bool = False,
    mask_mode: MaskMode = "exclude",
    save_scores: bool | None = None,
    max_saved_bytes: int = MAX_SAVED_BYTES,
) -> Tensor:
    """InfoNCE over MaxSim: the cross-entropy of each query's scores over all documents of the batch.

    With s the scores of `maxsim`, T the temperature, A the documents that are not excluded and P the positives, a query's
    loss is `log sum_{j in A} exp(s_j / T) - mean_{j in P} s_j / T`, as `torch.nn.functional.cross_entropy(s / T, target)`
    for one positive. numpy arrays are taken for tensors, without a gradient.

    Args:
        Q: `[Nq, Lq, d]`, or a list of `[Lq, d]`; float32, float16, bfloat16 or float64.
        D: `[Nd, Ld, d]`, or a list of `[Ld, d]`; or `[Nq, K, Ld, d]`, K documents for each query with its positive first,
            of which all Nq * K are candidates of every query (document k of query i has the number i * K + k).
        q_mask: the tokens of Q to keep, in its shape without d (for a list, a list): bool, or 0/1 in any dtype.
        d_mask: the same for D.
        target: `[Nq]` integers, the positive of each query among the Nd (or Nq * K) documents; a query with a negative
            number has no loss. Or bool `[Nq, Nd]`, any number of positives for each query. None: document i for query i,
            or i * K.
        temperature: a number above 0, or a tensor of one, to which a gradient flows.
        label_smoothing: the share of the wanted distribution that is spread evenly over A; 0 to 1.
        symmetric: also take the loss of each positive document over all queries, and average the two.
        weight: `[Nq]`, factors of the losses; a "mean" divides by their sum.
        exclude: bool `[Nq, Nd]`, documents that are not candidates of a query, as known false negatives. A positive stays.
        margin: drop a query's negatives that score at least this fraction of its (lowest) positive, as likely false
            negatives; 0.95 is usual. Of a positive below 0 the fraction is 2 - margin. What is dropped counts as a
            constant.
        reduction: "mean" over the queries that have a positive, "sum", or "none" for `[Nq]`.
        normalize: divide every token by its Euclidean norm first (at least 1e-12).
        mask_mode: as in `maxsim`.
        save_scores: keep the scores, 4 Nq Nd bytes, for the backward. False: only a few sums a query and document are
            kept, and the backward scores once more, a tile of documents at a time. None: keep them if `max_saved_bytes`
            allows.
        max_saved_bytes: how much may be kept. Where scores and argmax, 2 Nq Nd Lq bytes, fit (and `save_scores` is not
            False), the backward does no scoring at all; otherwise it finds the argmax again, a tile at a time.

    Returns:
        float32 (float64 where an input is): `[]`, or `[Nq]` for "none".

    The gradient of a score is the softmax weight minus the wanted one. It is taken as 0 where it is at most 2^-25 / Nd of
    the softmax weight of its query's hardest negative and 2^-25 / Nq of the largest gradient in its document's column. All
    such pairs of a query together then move the gradient of any of its tokens by less than 2^-25 of its largest weight
    times the longest document token, and likewise for a document, as often as tokens of a query choose its token: less
    than one float32 rounding of the sum. At small temperatures these are nearly all pairs, and the backward costs next to
    nothing. Gradients are the same bits in every run and for any number of threads.

    Memory besides inputs and gradients: with nothing saved, some tens of bytes a query and document, a tile, and (for
    half-precision Q) its gradient in float32.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option is wrong; IndexError: `target` names a missing document.
            On a GPU the host does not wait for the values: a missing document, or a temperature that is not above 0, makes
            the loss NaN.

    Source: InfoNCE of van den Oord et al., arXiv 1807.03748, over the scores of ColBERT, arXiv 2004.12832; the margin is
    that of NV-Retriever, arXiv 2407.15831.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.between("label_smoothing", label_smoothing, 0, 1)
    Q, q_mask = _tokens("Q", Q, q_mask, D, (3,), "[Nq, Lq, d] or a list of [Lq, d]")
    D, d_mask, mask_mode = _documents(D, d_mask, Q, mask_mode, "[Nd, Ld, d], [Nq, K, Ld, d] or a list of [Ld, d]")
    group = 1
    if D.ndim == 4:
        checks.same_batch(Q.shape, D.shape)
        group = D.shape[1]
        D, d_mask = D.flatten(0, 1), None if d_mask is None else d_mask.flatten(0, 1)
    every_query = target is None
    if target is None:
        if D.shape[0] < Q.shape[0] * group or not group:
            raise checks.wrong_shape("D", D.shape, f"at least {Q.shape[0]} documents, the first query's positive first")
        target = torch.arange(0, Q.shape[0] * group, group, device=Q.device)
    target = _tensor("target", target, Q)
    if exclude is not None:
        exclude = _tensor("exclude", exclude, Q)
    if margin is not None:
        checks.between("margin", margin, 0, torch.inf)
    temperature = _temperature("temperature", temperature, Q)
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=torch.float64, device=Q.device)
    if not (torch.is_grad_enabled() and any(X.requires_grad for X in (Q, D, temperature))):
        save_scores, max_saved_bytes = False, 0
    losses = contrastive.losses(
        Q,
        D,
        q_mask,
        d_mask,
        target,
        exclude,
        temperature,
        float(label_smoothing),
        margin,
        symmetric,
        normalize,
        mask_mode,
        save_scores,
        max_saved_bytes,
    )
    if weight is not None:
        weight = _tensor("weight", weight, Q)
        checks.shape("weight", weight.shape, losses.shape, "one factor for each query")
        losses = losses * weight.to(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if every_query and weight is None:
        return losses.mean() if losses.numel() else losses.sum()
    counted = target.any(1) if target.dtype == torch.bool else target >= 0
    factors = counted.to(losses.dtype) if weight is None else counted * weight.to(losses.dtype)
    return losses.sum() / factors.sum().clamp_min(torch.finfo(losses.dtype).tiny)


def distillation_loss(
    Q: Tokens,
    D: Tokens,
    teacher_scores: Tensor,
    q_mask: Masks = None,
    d_mask: Masks = None,
    *,
    candidate_mask: Tensor | None = None,
    objective: Objective = "kl",
    student_normalization: Normalization | None = None,
    teacher_normalization: Normalization = "none",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_by_temperature: bool = False,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = False,
    mask_mode: MaskMode = "exclude",
) -> Tensor:
    """Teach the order and the distances of a teacher's scores over each query's own candidates.

    "kl": `sum_k t_k (log t_k - log s_k)`, with t and s the softmax over the candidates of the normalised teacher and
    student scores over their temperatures. "margin_mse": the mean over candidates k > 0 of
    `((s_0 - s_k) - (t_0 - t_k))^2` of the normalised scores; candidate 0 is the positive.

    The defaults are PyLate's `Distillation`: KL divergence, student scores min-max normalised, teacher scores as they are,
    divided by the number of queries. numpy arrays are taken for tensors, without a gradient.

    Args:
        Q: `[Nq, Lq, d]`, or a list of `[Lq, d]`; float32, float16, bfloat16 or float64.
        D: `[Nq, K, Ld, d]`, or a list of Nq * K `[Ld, d]`, the candidates of the first query first; or `[K, Ld, d]`, which
            are candidates of every query.
        teacher_scores: `[Nq, K]`, any float dtype; no gradient flows to it.
        q_mask: the tokens of Q to keep, in its shape without d (for a list, a list): bool, or 0/1 in any dtype.
        d_mask: the same for D.
        candidate_mask: `[Nq, K]`, the candidates that there are, for queries with fewer than K; the others count for
            nothing, whatever their scores. A query without a candidate has loss 0.
        objective: "kl" or "margin_mse".
        student_normalization: over a query's candidates: "minmax", (s - min) / (max - min + 1e-8); "zscore",
            (s - mean) / (standard deviation + 1e-8), the deviation over K; or "none". None: "minmax" for "kl", else "none".
        teacher_normalization: the same for the teacher's scores.
        temperature: divides the normalised student scores; a number above 0, or a tensor, to which a gradient flows.
            Only for "kl".
        teacher_temperature: the same for the teacher; None: `temperature`, as in Hinton et al., without its gradient.
        scale_by_temperature: multiply by the square of `temperature`, which keeps the size of the gradient.
        weight: `[Nq]`, factors of the losses; a "mean" divides by their sum.
        reduction: "mean" over queries ("batchmean" of PyTorch's kl_div), "sum", or "none" for `[Nq]`.
        normalize: divide every token by its Euclidean norm first (at least 1e-12).
        mask_mode: as in `maxsim`.

    Returns:
        float32 (float64 where an input is): `[]`, or `[Nq]` for "none". Gradients flow to Q, D and the temperature; for
        the backward, 2 bytes a (query token, candidate) are kept.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option is wrong. On a GPU and in a compiled graph nothing waits for
            the value of a temperature that is a tensor: one that is not above 0 makes the loss NaN.

    Source: Hinton et al., arXiv 1503.02531; margin-MSE: Hofstätter et al., arXiv 2010.02666.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("objective", objective, OBJECTIVES)
    if student_normalization is None:
        student_normalization = "minmax" if objective == "kl" else "none"
    checks.one_of("student_normalization", student_normalization, NORMALIZATIONS)
    checks.one_of("teacher_normalization", teacher_normalization, NORMALIZATIONS)
    if isinstance(D, (list, tuple)):
        listed = tensors.values("teacher_scores", teacher_scores).shape
        checks.rank("teacher_scores", listed, (2,), "[Nq, K]")
        checks.same_count("D", len(D), "teacher_scores", listed[0] * listed[1])
    Q, q_mask = _tokens("Q", Q, q_mask, D, (3,), "[Nq, Lq, d] or a list of [Lq, d]")
    of_list = isinstance(D, (list, tuple))
    wanted = "[Nq, K, Ld, d], [K, Ld, d] or a list of Nq * K [Ld, d]"
    D, d_mask, mask_mode = _documents(D, d_mask, Q, mask_mode, wanted)
    if of_list:
        D = D.view(*teacher_scores.shape, *D.shape[1:])
        d_mask = None if d_mask is None else d_mask.view(D.shape[:3])
    shared = D.ndim == 3
    if not shared:
        checks.same_batch(Q.shape, D.shape)
    pairs = (Q.shape[0], D.shape[0 if shared else 1])
    teacher_scores = _tensor("teacher_scores", teacher_scores, Q)
    checks.shape("teacher_scores", teacher_scores.shape, pairs, "one score for each candidate")
    if candidate_mask is not None:
        candidate_mask = _tensor("candidate_mask", candidate_mask, Q)
        checks.shape("candidate_mask", candidate_mask.shape, pairs, "one value for each candidate")
        candidate_mask = arguments.kept(candidate_mask)
        if not shared:
            # Without its tokens, as a weight of 0 does not silence a NaN.
            exists = candidate_mask[..., None].expand(D.shape[:3])
            d_mask = exists if d_mask is None else d_mask & exists

    dtype = getattr(torch, arguments.arithmetic(Q, D))
    student = scoring.maxsim(Q, D, q_mask, d_mask, normalize=normalize, mask_mode=mask_mode, out_dtype=dtype)
    if objective == "kl":
        temperature = _temperature("temperature", temperature, Q)
        if teacher_temperature is None:
            teacher_temperature = temperature.detach() if isinstance(temperature, Tensor) else temperature
        teacher_temperature = _temperature("teacher_temperature", teacher_temperature, Q)
        temperature = distillation.above_zero("temperature", temperature)
        teacher_temperature = distillation.above_zero("teacher_temperature", teacher_temperature)
    else:
        temperature = teacher_temperature = 1.0
    # Shapes are settled, so that no error is lost.
    backend = distillation.fused(student, teacher_scores, candidate_mask, temperature, teacher_temperature)
    if backend is not None:
        how = objective, student_normalization, teacher_normalization, scale_by_temperature and objective == "kl"
        mean = None if weight is not None or reduction == "none" else reduction == "mean"
        given = student, teacher_scores, candidate_mask, temperature, teacher_temperature
        losses = distillation.losses(backend, *given, how, mean)
        if mean is not None:
            return losses
    else:
        student = _normalized(student, candidate_mask, student_normalization)
        teacher = _normalized(teacher_scores.detach().to(dtype), candidate_mask, teacher_normalization)
        if objective == "margin_mse":
            losses = _margin_error(student, teacher, candidate_mask)
        else:
            losses = _divergence(student / temperature, teacher / teacher_temperature, candidate_mask)
            if scale_by_temperature:
                losses = losses * temperature**2

    if weight is not None:
        weight = _tensor("weight", weight, Q)
        checks.shape("weight", weight.shape, losses.shape, "one factor for each query")
        losses = losses * weight.to(dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = max(1, losses.shape[0]) if weight is None else weight.to(dtype).sum().clamp_min(torch.finfo(dtype).tiny)
    return losses.sum() / total


def _tokens(
    name: str, X: Any, mask: Any, other: Any, ranks: tuple[int, ...], wanted: str
) -> tuple[Tensor, Tensor | None]:
    """A tensor with its mask; a list padded, with the mask of what is not padding. An empty one takes d from `other`."""
    if isinstance(X, (list, tuple)):
        X = tensors.token_list(name, X)
        if mask is not None:
            checks.mask_list(scoring.MASKS[name], mask, name, len(X))
            of = list(enumerate(zip(X, mask, strict=True)))
            mask = [None if m is None else tensors.mask(f"{scoring.MASKS[name]}[{n}]", m, name, x) for n, (x, m) in of]
        if isinstance(other, (list, tuple)):
            other = other[0] if other else None
        return tensors.pad(X, mask, other if isinstance(other, Tensor) else tensors.nothing())
    X = tensors.tokens(name, X)
    checks.rank(name, X.shape, ranks, wanted)
    return X, None if mask is None else tensors.mask(scoring.MASKS[name], mask, name, X)


def _documents(
    D: Any, d_mask: Any, other: Any, mask_mode: MaskMode, wanted: str
) -> tuple[Tensor, Tensor | None, MaskMode]:
    """The same of documents, and the mode of the mask. Padding of a list never counts, so where masked tokens count as
    zeros these become zeros."""
    if mask_mode == "zero" and isinstance(D, (list, tuple)):
        D = tensors.token_list("D", D)
        if d_mask is not None:
            checks.mask_list("d_mask", d_mask, "D", len(D))
            D = [
                x if m is None else x.masked_fill(~tensors.mask(f"d_mask[{n}]", m, f"D[{n}]", x)[:, None], 0)
                for n, (x, m) in enumerate(zip(D, d_mask, strict=True))
            ]
        d_mask, mask_mode = None, "exclude"
    return *_tokens("D", D, d_mask, other, (3, 4), wanted), mask_mode


def _temperature(name: str, seen: Any, like: Tensor) -> Any:
    """A number above 0, or a tensor of one as `[]`, whose value the arithmetic looks at."""
    if isinstance(seen, Tensor):
        _tensor(name, seen, like)
        if seen.numel() != 1:
            raise checks.wrong_shape(name, seen.shape, "a single number")
        return seen.reshape(())
    if not isinstance(seen, (int, float, torch.SymInt, torch.SymFloat)) and not hasattr(seen, "__float__"):
        raise checks.not_an_array(name, seen, "a number or a tensor of one")
    if not seen > 0:
        raise checks.not_positive(name, seen)
    return seen


def _tensor(name: str, seen: Any, like: Tensor) -> Tensor:
    """A tensor on the device of `like`, as it has to be; an array goes there."""
    if not isinstance(seen, Tensor):
        return tensors.values(name, seen).to(like.device)
    checks.same_device(name, seen.device, like.device)
    return seen


def _normalized(scores: Tensor, kept: Tensor | None, how: str) -> Tensor:
    """`[Nq, K]` over the kept candidates; the others are 0."""
    if kept is not None:
        scores = scores.masked_fill(~kept, 0)
    if how == "none" or not scores.shape[1]:
        return scores
    if how == "minmax":
        lowest, highest = (
            (scores if kept is None else scores.masked_fill(~kept, otherwise)) for otherwise in (torch.inf, -torch.inf)
        )
        # max, not amax: where several are largest, the gradient goes to the first, as in PyLate.
        base = lowest.min(1, keepdim=True)[0]
        scale = highest.max(1, keepdim=True)[0] - base + SMALLEST_RANGE
        if kept is not None:
            nothing = ~kept.any(1, keepdim=True)
            base, scale = base.masked_fill(nothing, 0), scale.masked_fill(nothing, 1)
    else:
        count = scores.shape[1] if kept is None else kept.sum(1, keepdim=True).clamp_min(1)
        base = scores.sum(1, keepdim=True) / count
        deviation = scores - base
        if kept is not None:
            deviation = deviation.masked_fill(~kept, 0)
        # Of equal scores the root has no derivative: there it counts as a constant.
        variance = deviation.square().sum(1, keepdim=True) / count
        scale = variance.where(variance > 0, 1).sqrt().where(variance > 0, 0) + SMALLEST_RANGE
    normalized = (scores - base) / scale
    return normalized if kept is None else normalized.masked_fill(~kept, 0)


def _divergence(student: Tensor, teacher: Tensor, kept: Tensor | None) -> Tensor:
    if kept is not None:
        # Finite, so that a row without candidates has no NaN to hand back.
        lowest = torch.finfo(student.dtype).min
        student, teacher = student.masked_fill(~kept, lowest), teacher.masked_fill(~kept, lowest)
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    each = log_t.exp() * (log_t - log_s)
    return (each if kept is None else each.masked_fill(~kept, 0)).sum(1)


def _margin_error(student: Tensor, teacher: Tensor, kept: Tensor | None) -> Tensor:
    error = (student - teacher)[:, :1] - (student - teacher)[:, 1:]
    if kept is None:
        return error.square().sum(1) / max(1, error.shape[1])
    both = kept[:, 1:] & kept[:, :1]
    return error.masked_fill(~both, 0).square().sum(1) / both.sum(1).clamp_min(1)
