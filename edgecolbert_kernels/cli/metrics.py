"""Ranking quality, computed by ir-measures, which wraps trec_eval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def evaluate(run: Mapping[str, Mapping[str, float]], qrels: Iterable[tuple[str, str, int]]) -> dict[str, float]:
    """nDCG@10, R@100 and RR@10 (MRR@10 as their mean is called), averaged over the judged queries.

    run: query id -> document id -> score. A judged query without a ranking counts as 0.
    """
    try:
        import ir_measures
    except ImportError:
        raise ModuleNotFoundError("metrics need ir-measures: pip install 'edgecolbert-kernels[cli]'") from None
    from ir_measures import RR, R, nDCG

    judged = [ir_measures.Qrel(*each) for each in qrels]
    ranked = [
        ir_measures.ScoredDoc(query, document, score)
        for query, scores in run.items()
        for document, score in scores.items()
    ]
    found = ir_measures.calc_aggregate([nDCG @ 10, R @ 100, RR @ 10], judged, ranked)
    names = {"nDCG@10": nDCG @ 10, "Recall@100": R @ 100, "MRR@10": RR @ 10}
    return {name: float(found[measure]) for name, measure in names.items()}
