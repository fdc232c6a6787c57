"""Losses on one vector a text: InfoNCE, AnglE, Stella. Those on one vector a token are edgecolbert_kernels'."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MOST_SCORES = 1 << 24  # of InfoNCE at once: 64 MiB in float32, and a few copies of it
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
    symmetric: the mean with the cross-entropy of each positive over all queries.
    Large batches are taken in blocks of rows, which the backward computes again: 24,576 x 24,576 scores never exist at once.
    """
    floor = None
    if margin is not None:
        own = (Q * D[target]).sum(-1).detach()
        floor = own - (1 - margin) * own.abs()
    loss = _cross_entropy(Q, D, target, temperature, exclude, None if floor is None else floor[:, None])
    if symmetric:
        right, among = torch.arange(len(Q), device=Q.device), None if exclude is None else exclude[:, target].T
        back = _cross_entropy(
            D[target], Q, right, temperature, among, None if floor is None else floor.expand(len(Q), -1)
        )
        loss = (loss + back) / 2
    return loss


def _cross_entropy(
    X: Tensor, Y: Tensor, target: Tensor, temperature: float, exclude: Tensor | None, floor: Tensor | None
) -> Tensor:
    """Mean over the rows of X, in blocks. No candidates besides the target: those excluded, and scores of `floor` or more."""

    def block(X: Tensor, Y: Tensor, target: Tensor, exclude: Tensor | None, floor: Tensor | None) -> Tensor:
        scores = X @ Y.T
        dropped = exclude
        if floor is not None:
            above = scores.detach() >= floor
            dropped = above if dropped is None else above | dropped
        if dropped is not None:
            scores = scores.masked_fill(dropped.scatter(1, target[:, None], False), -torch.inf)
        return F.cross_entropy(scores / temperature, target, reduction="sum")

    rows = max(1, MOST_SCORES // len(Y))
    if rows >= len(X):
        return block(X, Y, target, exclude, floor) / len(X)
    parts = [
        checkpoint(
            block,
            X[s],
            Y,
            target[s],
            exclude if exclude is None else exclude[s],
            None if floor is None else floor[s],
            use_reentrant=False,
        )
        for s in (slice(start, start + rows) for start in range(0, len(X), rows))
    ]
    return torch.stack(parts).sum() / len(X)


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
