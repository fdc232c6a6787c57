"""Ranking quality over BEIR folders: `python -m training.evaluate MODEL FOLDER[:split] ...`.

MODEL: a folder or hub name, "bm25", or "fusion:MODEL:WEIGHT". Scores are exact, over all documents. Measures are those of
trec_eval; those of each query are kept beside (--keep).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ir_measures
import numpy as np

from training import rankers
from training.beir import Beir, read_beir
from training.checkpoint import CheckpointError
from training.config import ConfigError
from training.files import BadRow
from training.model import Encoder

MEASURES = ("nDCG@10", "RR@10", "AP@100", "R@10", "R@100")
DEPTH = 100


def evaluate_ranker(ranker: rankers.Ranker, task: Beir) -> dict[str, dict[str, float]]:
    """Query -> measure -> value."""
    ids = list(task.documents)
    ranker.index([task.documents[each] for each in ids])
    queries = list(task.qrels)
    scores = ranker.all_scores([task.queries[each] for each in queries])
    if not np.isfinite(scores).all():
        raise FloatingPointError(f"{task.folder}: a score is not finite")
    found: dict[str, dict[str, float]] = {}
    for query, row, best in zip(queries, scores, rankers.top(scores, DEPTH), strict=True):
        found[query] = {ids[n]: float(row[n]) for n in best}
    return measure(task.qrels, found)


def measure(
    qrels: Mapping[str, Mapping[str, int]], found: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    wanted = [ir_measures.parse_measure(name) for name in MEASURES]
    values: dict[str, dict[str, float]] = {query: {} for query in qrels}
    for metric in ir_measures.iter_calc(wanted, dict(qrels), dict(found)):
        values[metric.query_id][str(metric.measure)] = metric.value
    return values


def means(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([own[name] for own in values.values()])) for name in MEASURES}


def evaluate_encoder(
    encoder: Encoder, folder: str | Path, split: str = "test", *, batch: int = 32, keep: Path | None = None
) -> dict[str, float]:
    """Means over the queries; each query's own go to `keep`/NAME.jsonl."""
    tokens = batch * encoder.reading.document_length
    return evaluate(rankers.LateInteraction(encoder, tokens), folder, split, keep=keep)


def evaluate(
    ranker: rankers.Ranker, folder: str | Path, split: str = "test", *, keep: Path | None = None
) -> dict[str, float]:
    task = read_beir(folder, split)
    values = evaluate_ranker(ranker, task)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        path = keep / f"{Path(folder).resolve().name}-{split}.jsonl"
        lines = [json.dumps({"query_id": query, **own}) + "\n" for query, own in values.items()]
        path.write_text("".join(lines), encoding="utf-8")
    return means(values)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("model", help='a folder, a hub name, "bm25" or "fusion:MODEL:WEIGHT"')
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER[:split]", help="BEIR folders; the split is test if not said"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write each query's values there, a file a folder")
    options = parser.parse_args(arguments)
    try:
        print(f"{'':24}" + "".join(f"{name:>10}" for name in MEASURES))
        for name in options.folders:
            folder, _, split = name.partition(":")
            found = evaluate(rankers.open_ranker(options.model), folder, split or "test", keep=options.keep)
            label = f"{Path(folder).resolve().name} {split}".strip()
            print(f"{label:24}" + "".join(f"{found[name]:10.4f}" for name in MEASURES), flush=True)
    except (ConfigError, BadRow, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
