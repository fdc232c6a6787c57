"""Ranking quality, as in trec_eval: the gain of a document is its grade, discounted by log2(rank + 1)."""

import math
from collections.abc import Sequence


def ndcg(ranking: Sequence[int], grades: dict[int, int], depth: int = 10) -> float:
    """Discounted gain of the first `depth` documents over that of the best possible ranking, in [0, 1].

    ranking: document numbers, best first. grades: those relevant, with grades > 0; at least one.
    """
    ideal = _discounted_gain(sorted(grades.values(), reverse=True)[:depth])
    return _discounted_gain([grades.get(document, 0) for document in ranking[:depth]]) / ideal


def reciprocal_rank(ranking: Sequence[int], grades: dict[int, int], depth: int = 10) -> float:
    """1 / rank of the first relevant document, 0 when it is not among the first `depth`."""
    return next((1 / rank for rank, document in enumerate(ranking[:depth], start=1) if document in grades), 0.0)


def _discounted_gain(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
