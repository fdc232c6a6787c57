r"""MaxSim in plain PyTorch: what every kernel is held to.

Everything is materialised and nothing is fast. It runs in the dtype of its inputs (pass float64 for the truth), and
PyTorch's own autograd gives its gradients.

With query tokens $q_i$, document tokens $d_j$, the kept tokens $K_q$, $K_d$ and $s_{ij} = \langle q_i, d_j \rangle$:

$$\text{score}(q, d) = \sum_{i \in K_q} \max_{j \in K_d} s_{ij}$$

- A document without a kept token scores 0.
- `mask_mode="zero"`: the maximum runs over every token of the document, with $s_{ij} = 0$ where $j \notin K_d$.
- `normalize=True`: $x \mapsto x / \max(\lVert x \rVert_2, 10^{-12})$ for every token first.
- argmax: the lowest $j$ among equals, the first NaN if there is one, and -1 where no kept token won or $i \notin K_q$.
  The gradient flows through this token alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_rows

NO_TOKEN = -1


def score(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> tuple[Tensor, Tensor]:
    """`Q [..., Lq, d]` against `D [..., Ld, d]`, leading dimensions broadcast -> scores `[...]`, argmax `[..., Lq]`."""
    q_kept = torch.ones_like(Q[..., 0], dtype=torch.bool) if q_mask is None else q_mask != 0
    d_kept = torch.ones_like(D[..., 0], dtype=torch.bool) if d_mask is None else d_mask != 0
    # Padding may hold anything, NaN included; as zeros it stays out of the gradient too.
    Q = Q.masked_fill(~q_kept[..., None], 0)
    D = D.masked_fill(~d_kept[..., None], 0)
    if normalize:
        Q, D = unit_rows(Q, dim=-1), unit_rows(D, dim=-1)

    similarity = Q @ D.mT
    kept = d_kept[..., None, :].expand_as(similarity)
    if mask_mode == "zero":
        similarity = similarity.masked_fill(~kept, 0)
    best = first_maximum(similarity, torch.ones_like(kept) if mask_mode == "zero" else kept)

    # An extra column of zeros is what a query token without a document token finds.
    with_none = torch.nn.functional.pad(similarity, (0, 1))
    column = best.where(best != NO_TOKEN, similarity.shape[-1])[..., None]
    maximum = with_none.gather(-1, column)[..., 0].masked_fill(~q_kept, 0)

    won_by_kept = torch.nn.functional.pad(kept, (0, 1)).gather(-1, column)[..., 0]
    return maximum.sum(-1), best.where(won_by_kept & q_kept, NO_TOKEN)


def first_maximum(similarity: Tensor, eligible: Tensor) -> Tensor:
    """The lowest eligible position of each row's maximum (NaN above all), -1 where none is eligible."""
    if similarity.shape[-1] == 0:
        return similarity.new_full(similarity.shape[:-1], NO_TOKEN, dtype=torch.int64)
    maximum, position = similarity.detach().masked_fill(~eligible, -torch.inf).max(-1)
    # Where all that is eligible is -inf, the first -inf may be a token that is not.
    first = eligible.int().argmax(-1)
    return position.where(maximum != -torch.inf, first).where(eligible.any(-1), NO_TOKEN)


def maxsim(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> tuple[Tensor, Tensor]:
    """`Q [Nq, Lq, d]` against `D [Nd, Ld, d]` -> `[Nq, Nd]`, or against its own `D [Nq, K, Ld, d]` -> `[Nq, K]`.

    The argmax has an axis Lq more.
    """
    if D.ndim == 3:
        D, d_mask = D[None], None if d_mask is None else d_mask[None]
    q_mask = None if q_mask is None else q_mask[:, None]
    return score(Q[:, None], D, q_mask, d_mask, normalize=normalize, mask_mode=mask_mode)


def maxsim_pairs(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> tuple[Tensor, Tensor]:
    """`Q [B, Lq, d]` against `D [B, Ld, d]`, row by row -> scores `[B]`, argmax `[B, Lq]`."""
    return score(Q, D, q_mask, d_mask, normalize=normalize, mask_mode=mask_mode)


def maxsim_indexed(
    Q: Tensor,
    D: Tensor,
    query_index: Tensor,
    document_index: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> tuple[Tensor, Tensor]:
    """Pairs `query_index[p]`, `document_index[p]` of `Q [Nq, Lq, d]` and `D [Nd, Ld, d]` -> `[P]`, argmax `[P, Lq]`."""
    q_mask = None if q_mask is None else q_mask[query_index]
    d_mask = None if d_mask is None else d_mask[document_index]
    return score(Q[query_index], D[document_index], q_mask, d_mask, normalize=normalize, mask_mode=mask_mode)


def maxsim_varlen(
    Q: Tensor,
    D: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_d: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> tuple[Tensor, list[list[Tensor]]]:
    """`Q [Tq, d]`, `D [Td, d]`, sequence n being rows `cu[n]` to `cu[n + 1]` -> `[Nq, Nd]`, argmax `[query][document]`."""

    def spans(cu_seqlens: Tensor) -> list[slice]:
        bounds = cu_seqlens.tolist()
        return [slice(bounds[n], bounds[n + 1]) for n in range(len(bounds) - 1)]

    def pair(query: slice, document: slice) -> tuple[Tensor, Tensor]:
        masks = None if q_mask is None else q_mask[query], None if d_mask is None else d_mask[document]
        return score(Q[query], D[document], *masks, normalize=normalize, mask_mode=mask_mode)

    pairs = [[pair(query, document) for document in spans(cu_seqlens_d)] for query in spans(cu_seqlens_q)]
    flat = [value for row in pairs for value, _ in row]
    shape = len(cu_seqlens_q) - 1, len(cu_seqlens_d) - 1
    scores = torch.stack(flat).reshape(shape) if flat else Q.new_zeros(shape)
    return scores, [[argmax for _, argmax in row] for row in pairs]


def contrastive_loss(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    target: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    symmetric: bool = False,
    weight: Tensor | None = None,
    exclude: Tensor | None = None,
    margin: float | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> Tensor:
    r"""The cross-entropy of each query's scores $s$ over its candidates $A_i$, with positives $P_i \subseteq A_i$.

    $$L_i = -\sum_{j \in A_i} t_{ij} \log \frac{e^{s_{ij} / T}}{\sum_{k \in A_i} e^{s_{ik} / T}}, \qquad
      t_{ij} = (1 - \epsilon) \frac{[j \in P_i]}{|P_i|} + \frac{\epsilon}{|A_i|}$$

    - `symmetric`: $(L_i + \frac{1}{|P_i|} \sum_{j \in P_i} C_{ij}) / 2$, where $C_{ij}$ is the same loss over the column
      of document j, $\{k : j \in A_k\}$, with query i as its one positive.
    - `exclude` and `margin` m take negatives out of $A_i$; the latter those with $s_{ij} \ge p_i - (1 - m) |p_i|$, where
      $p_i = \min_{j \in P_i} s_{ij}$.
    - A query without a positive has $L_i = 0$. "mean": $\sum w_i L_i / \sum w_i$ over the others.
    """
    if D.ndim == 4:
        group, D = D.shape[1], D.flatten(0, 1)
        d_mask = None if d_mask is None else d_mask.flatten(0, 1)
    else:
        group = 1
    scores = maxsim(Q, D, q_mask, d_mask, normalize=normalize, mask_mode=mask_mode)[0]
    if target is None:
        target = torch.arange(len(Q), device=Q.device) * group
    positive = target
    if target.dtype != torch.bool:
        positive = target[:, None] == torch.arange(len(D), device=D.device)

    candidate = torch.ones_like(positive) if exclude is None else ~exclude
    if margin is not None:
        lowest = scores.detach().masked_fill(~positive, torch.inf).amin(1, keepdim=True)
        candidate = candidate & ~(scores >= lowest - (1 - margin) * lowest.abs())
    candidate = candidate | positive

    losses: list[Tensor] = []
    for i, positives in enumerate(positive):
        if not positives.any():
            losses.append(scores.new_zeros(()))
            continue
        loss = _cross_entropy(scores[i] / temperature, candidate[i], positives, label_smoothing)
        if symmetric:
            queries = torch.arange(len(Q), device=Q.device) == i
            columns = [
                _cross_entropy(scores[:, j] / temperature, candidate[:, j], queries, label_smoothing)
                for j in positives.nonzero()[:, 0]
            ]
            loss = (loss + torch.stack(columns).mean()) / 2
        losses.append(loss)
    return _reduced(torch.stack(losses) if losses else scores.new_zeros(0), positive.any(1), weight, reduction)


def distillation_loss(
    Q: Tensor,
    D: Tensor,
    teacher_scores: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    candidate_mask: Tensor | None = None,
    objective: str = "kl",
    student_normalization: str | None = None,
    teacher_normalization: str = "none",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_by_temperature: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    mask_mode: str = "exclude",
) -> Tensor:
    r"""Student scores $s$ of `maxsim` against teacher scores $t$, over the candidates that there are: a query's own, or D 3-D.

    Both are normalised over a query's candidates: "minmax" $(x - \min x) / (\max x - \min x + 10^{-8})$, "zscore"
    $(x - \bar x) / (\sigma_x + 10^{-8})$ with $\sigma_x$ a constant where it is 0, or "none".

    $$\text{kl} = \sum_k p_k (\log p_k - \log q_k), \quad p = \text{softmax}(t / T_t), \; q = \text{softmax}(s / T)$$
    $$\text{margin\_mse} = \frac{1}{K - 1} \sum_{k > 0} ((s_0 - s_k) - (t_0 - t_k))^2$$

    A query without a candidate, or for "margin_mse" without the positive or a negative, has loss 0.
    """
    scores = maxsim(Q, D, q_mask, d_mask, normalize=normalize, mask_mode=mask_mode)[0]
    if student_normalization is None:
        student_normalization = "minmax" if objective == "kl" else "none"
    if teacher_temperature is None:
        teacher_temperature = temperature.detach() if isinstance(temperature, Tensor) else temperature
    losses: list[Tensor] = []
    for n in range(len(Q)):
        exists = torch.ones_like(scores[n], dtype=torch.bool) if candidate_mask is None else candidate_mask[n] != 0
        s = _normalized(scores[n][exists], student_normalization)
        t = _normalized(teacher_scores[n][exists].to(scores.dtype), teacher_normalization)
        if objective == "kl":
            log_q, log_p = (s / temperature).log_softmax(0), (t / teacher_temperature).log_softmax(0)
            loss = (log_p.exp() * (log_p - log_q)).sum()
            losses.append(loss * temperature**2 if scale_by_temperature else loss)
        elif exists.sum() > 1 and exists[0]:
            losses.append(((s[0] - s[1:]) - (t[0] - t[1:])).square().mean())
        else:
            losses.append(scores.new_zeros(()))
    counted = torch.ones(len(Q), dtype=torch.bool, device=Q.device)
    return _reduced(torch.stack(losses) if losses else scores.new_zeros(0), counted, weight, reduction)


def _cross_entropy(logits: Tensor, candidate: Tensor, positive: Tensor, label_smoothing: float) -> Tensor:
    """Of one row against equal shares of the positives, smoothed over the candidates."""
    logits, positive = logits[candidate], positive[candidate].to(logits.dtype)
    wanted = (1 - label_smoothing) * positive / positive.sum() + label_smoothing / len(logits)
    # Chosen, not multiplied by 0: what has no share may have a log-probability of -inf.
    return -(wanted[wanted != 0] * logits.log_softmax(0)[wanted != 0]).sum()


def _normalized(scores: Tensor, how: str) -> Tensor:
    if how == "none" or not len(scores):
        return scores
    if how == "minmax":
        # max, not amax: where several are largest, the gradient goes to the first.
        lowest = scores.min(0)[0]
        return (scores - lowest) / (scores.max(0)[0] - lowest + 1e-8)
    deviation = scores - scores.mean()
    variance = deviation.square().mean()
    return deviation / ((variance.sqrt() if variance > 0 else 0) + 1e-8)


def _reduced(losses: Tensor, counted: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """ "none", the "sum", or the "mean" over what counts; of nothing it is 0."""
    weight = torch.ones_like(losses) if weight is None else weight.to(losses.dtype)
    losses = losses * weight
    if reduction == "none":
        return losses
    total = (weight * counted).sum() if reduction == "mean" else 1
    return losses.sum() / (total or 1)
