"""The contrastive loss from tables of scores on: problems, and what an implementation of its arithmetic makes of them."""

from __future__ import annotations

import torch

from cases import embeddings, holes
from edgecolbert_kernels.backends.contrastive_torch import Problem


def case(num_queries, num_documents, kind="plain", temperature=0.3, seed=0):
    """A problem, its scores and the margin's limits. By `kind`: what the words in it say."""
    scores = embeddings(num_queries, num_documents, seed=seed, norm=None)
    target = torch.arange(num_queries) % num_documents
    if "ignored" in kind:
        target = torch.where(torch.arange(num_queries) % 3 == 1, -1, target)
    if "several" in kind:
        target = holes(num_queries, num_documents, seed=seed + 1, keep=0.2)
        target[num_queries // 2] = False
    exclude = limit = None
    if "excluded" in kind:
        exclude = holes(num_queries, num_documents, seed=seed + 2, keep=0.4)
    if "nothing left" in kind:
        exclude, target = torch.ones(num_queries, num_documents, dtype=torch.bool), target.clone()
        target[::2] = -1
    if "margin" in kind:
        limit = embeddings(num_queries, seed=seed + 3, norm=None)
    smoothing = 1.0 if "smoothing alone" in kind else 0.2 if "smoothed" in kind else 0.0
    Q, D = torch.empty(num_queries, 1, 1), torch.empty(num_documents, 1, 1)
    numbers = torch.tensor(temperature, dtype=torch.float64), smoothing, 0.9 if "margin" in kind else None
    return Problem(Q, D, None, None, target, exclude, *numbers, "symmetric" in kind, False, "exclude"), scores, limit


def run(module, problem, scores, limit, dtype=torch.float32, size=None, grad=None):
    """Loss, gradients of the scores and the temperature, and the sums, by tiles of `size` documents."""
    scores, (num_queries, num_documents) = scores.to(dtype), scores.shape
    size = size or max(1, num_documents)
    tiles = [slice(n, min(n + size, num_documents)) for n in range(0, num_documents, size)]
    sums = module.RowSums(problem, None if limit is None else limit.to(dtype), dtype)
    for some in tiles:
        sums.add(scores[:, some], some)
    loss, rows, columns = sums.finish()
    if grad is None:
        grad = embeddings(num_queries, seed=9, norm=None)
    weights = module.Weights(grad.to(dtype), problem, rows, columns, dtype, True)
    gradient = torch.full_like(scores, torch.nan)
    for n, some in enumerate(tiles):
        if n % 2:
            weights.of(scores[:, some], some, gradient[:, some])
        else:
            gradient[:, some] = weights.of(scores[:, some], some)
    return loss, gradient, weights.temperature_gradient(), rows, columns
