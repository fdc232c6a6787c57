"""Losses on one vector a text: InfoNCE, AnglE, Stella. Those on one vector a token are edgecolbert_kernels'."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Stella compares every pair of similarities: 128 texts have 33 million, 256 have 533 million.
MOST_STELLA = 192


def info_nce(
    Q: Tensor,
    D: Tensor,
    target: Tensor,
    temperature: float,
    *,
    exclude: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Cross-entropy of `Q [N, d] @ D [M, d]^T / temperature`, the positive of query i being document `target[i]`.

    exclude: bool `[N, M]`, no candidates; margin: drop negatives that score this fraction of the positive or more.
    """
    scores = Q @ D.T
    positive = F.one_hot(target, len(D)).bool()
    dropped = torch.zeros_like(positive) if exclude is None else exclude.clone()
    if margin is not None:
        own = scores.detach().gather(1, target[:, None])
        dropped |= scores.detach() >= own - (1 - margin) * own.abs()
    scores = scores.masked_fill(dropped & ~positive, -torch.inf) / temperature
    loss = F.cross_entropy(scores, target)
    if symmetric:
        loss = (loss + F.cross_entropy(scores[:, target].T, torch.arange(len(Q), device=Q.device))) / 2
    return loss


def angle(z: Tensor, w: Tensor, labels: Tensor, scale: float = 20.0) -> Tensor:
    """AnglE's term over pairs `z[i], w[i]`, each `[n, d]`, d even: log(1 + sum over labels_i < labels_j of exp(s_i - s_j)).

    With halves of a vector as real and imaginary parts, s is `scale` times |sum of z / w|, its size divided out
    (Li and Li, arXiv 2309.12871).
    """
    a, b = z.chunk(2, -1)
    c, d = w.chunk(2, -1)
    size_z, size_w = z.norm(dim=-1, keepdim=True), w.norm(dim=-1, keepdim=True)
    both = torch.cat([a * c + b * d, b * c - a * d], -1) / (size_z * size_w)
    return _ordered(scale * both.sum(-1).abs(), labels)


def cosine_order(z: Tensor, w: Tensor, labels: Tensor, scale: float = 20.0) -> Tensor:
    """The same with cosines (CoSENT): the pair with the smaller label should have the smaller one."""
    return _ordered(scale * F.cosine_similarity(z, w, dim=-1), labels)


def _ordered(s: Tensor, labels: Tensor) -> Tensor:
    differences = s[:, None] - s[None, :]
    wanted = labels[:, None] < labels[None, :]
    return torch.logsumexp(torch.cat([differences.new_zeros(1), differences[wanted]]), 0)


def stella(student: Tensor, teacher: Tensor, margin: float = 0.015) -> Tensor:
    """10 mean(1 - cos) + 200 MSE(S S^T, T T^T) + 20 mean relu(margin - the sign of the teacher's order * the student's).

    Both `[n, d]`. The last term is over all pairs of similarities: n^4 / 8 of them. Jasper and Stella, arXiv 2412.19048.
    """
    if len(student) > MOST_STELLA:
        raise ValueError(
            f"Stella's last term over {len(student)} texts does not fit; want at most {MOST_STELLA} a device"
        )
    S, T = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    similar, wanted = S @ S.T, T @ T.T
    upper = torch.triu_indices(len(S), len(S), 1, device=S.device)
    ours, theirs = _differences(similar[upper[0], upper[1]]), _differences(wanted[upper[0], upper[1]])
    order = torch.where(theirs < 0, 1.0, -1.0)
    relative = F.relu(ours * order + margin).mean() if len(ours) else similar.sum() * 0
    return 10 * (1 - (S * T).sum(-1)).mean() + 200 * F.mse_loss(similar, wanted) + 20 * relative


def _differences(values: Tensor) -> Tensor:
    first, second = torch.triu_indices(len(values), len(values), 1, device=values.device)
    return values[first] - values[second]
