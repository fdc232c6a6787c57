"""Ranks documents by MaxSim."""

import torch
from torch import Tensor
from tqdm import tqdm

from demo.vectors import TokenVectors
from edgecolbert_kernels import maxsim_varlen

# Bounds the score matrix, and lets the bar move.
QUERIES_A_CALL = 64


def rank(
    queries: TokenVectors, documents: TokenVectors, depth: int, *, precision: str = "exact", progress: str | None = None
) -> tuple[Tensor, Tensor]:
    """The `depth` best documents of each query: scores float32 and document numbers int64, both [Nq, depth].

    progress: the label of a progress bar, None for none.
    """
    num_queries = len(queries.lengths)
    depth = min(depth, len(documents.lengths))
    best = []
    with tqdm(total=num_queries, desc=progress, unit=" queries", disable=progress is None) as bar:
        for start in range(0, num_queries, QUERIES_A_CALL):
            offsets = queries.offsets[start : start + QUERIES_A_CALL + 1]
            values = queries.values[offsets[0] : offsets[-1]]
            scores = maxsim_varlen(
                values, documents.values, offsets - offsets[0], documents.offsets, precision=precision
            )
            best.append(scores.topk(depth))
            bar.update(len(scores))
    return torch.cat([top.values for top in best]), torch.cat([top.indices for top in best])
