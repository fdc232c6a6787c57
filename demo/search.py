"""Ranks documents by MaxSim."""

import torch
from torch import Tensor
from tqdm import tqdm

from demo.vectors import TokenVectors
from edgecolbert_kernels import maxsim

# Bounds the score matrix, and lets the bar move.
QUERIES_A_CALL = 64


def rank(
    queries: TokenVectors, documents: TokenVectors, depth: int, *, precision: str = "exact", progress: str | None = None
) -> tuple[Tensor, Tensor]:
    """The `depth` best documents of each query: scores float32 and document numbers int64, both [Nq, depth].

    progress: the label of a progress bar, None for none.
    """
    query_views, document_views = queries.views(), documents.views()
    depth = min(depth, len(document_views))
    bar = tqdm(total=len(query_views), desc=progress, unit=" queries", disable=progress is None)
    best = []
    with bar:
        for start in range(0, len(query_views), QUERIES_A_CALL):
            chunk = query_views[start : start + QUERIES_A_CALL]
            best.append(maxsim(chunk, document_views, precision=precision).topk(depth))
            bar.update(len(chunk))
    return torch.cat([top.values for top in best]), torch.cat([top.indices for top in best])
