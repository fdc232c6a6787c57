"""Ranking quality over BEIR folders: `python -m training.evaluate MODEL FOLDER[:split] ...`.

MODEL: a folder or hub name, "bm25", or "fusion:MODEL:WEIGHT". Instead of a folder, a data set of the hub: `hub:owner/name`,
a name of NanoBEIR such as NanoSciFact, or `nanobeir` for its thirteen. Scores are exact, over all documents. Measures are those
of trec_eval; those of each query are kept beside (--keep). The last columns are what it cost: seconds to encode the documents,
seconds for the queries (encoding and scoring), MiB of the documents' vectors.

Long documents: --document-length 32768 reads a document in one piece; beyond what the model was trained on, too, where its
positions are computed (ModernBERT, Ettin) and not learned.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import ir_measures
import numpy as np

from training import rankers
from training.backbones import longest_text
from training.beir import NANO_BEIR, Beir, read_beir
from training.checkpoint import CheckpointError
from training.config import ConfigError
from training.files import BadRow
from training.model import Encoder

MEASURES = ("nDCG@10", "RR@10", "AP@100", "R@10", "R@100")
COSTS = ("index_s", "query_s", "mib")
DEPTH = 100


def evaluate_ranker(ranker: rankers.Ranker, task: Beir) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Query -> measure -> value, and what it cost: `index_s`, `query_s` and, where there are vectors, `mib`."""
    ids, queries = list(task.documents), list(task.qrels)
    start = time.perf_counter()
    ranker.index([task.documents[each] for each in ids])
    indexed = time.perf_counter()
    scores = ranker.all_scores([task.queries[each] for each in queries])
    cost = {"index_s": indexed - start, "query_s": time.perf_counter() - indexed}
    if (size := getattr(ranker, "nbytes", None)) is not None:
        cost["mib"] = size / 2**20
    if not np.isfinite(scores).all():
        raise FloatingPointError(f"{task.folder}: a score is not finite")
    found: dict[str, dict[str, float]] = {}
    for query, row, best in zip(queries, scores, rankers.top(scores, DEPTH), strict=True):
        found[query] = {ids[n]: float(row[n]) for n in best}
    return measure(task.qrels, found), cost


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
    """Means over the queries, and what it cost; each query's own values go to `keep`/NAME.jsonl."""
    tokens = batch * encoder.reading.document_length
    return evaluate(rankers.LateInteraction(encoder, tokens), folder, split, keep=keep)


def evaluate(
    ranker: rankers.Ranker, folder: str | Path, split: str = "test", *, keep: Path | None = None
) -> dict[str, float]:
    task = read_beir(folder, split)
    values, cost = evaluate_ranker(ranker, task)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        path = keep / f"{label(folder)}-{split}.jsonl"
        lines = [json.dumps({"query_id": query, **own}) + "\n" for query, own in values.items()]
        path.write_text("".join(lines), encoding="utf-8")
    return means(values) | cost


def split_of(name: str) -> tuple[str, str]:
    """FOLDER:split, of which hub:owner/name has a colon of its own."""
    hub = "hub:" if name.startswith("hub:") else ""
    folder, _, split = name.removeprefix("hub:").partition(":")
    return hub + folder, split or "test"


def label(folder: str | Path) -> str:
    name = str(folder)
    return name.rsplit("/", 1)[-1] if name.startswith("hub:") else Path(name).resolve().name


def set_lengths(ranker: rankers.Ranker, query: int | None, document: int | None) -> None:
    """Let a late-interaction model read other numbers of tokens than it says of itself."""
    for name, length in (("query_length", query), ("document_length", document)):
        if length is None:
            continue
        if not isinstance(ranker, rankers.LateInteraction):
            raise ConfigError(f"--{name.replace('_', '-')} is for late-interaction models")
        longest = longest_text(ranker.encoder.backbone)
        if not 4 <= length <= longest:
            raise ConfigError(f"--{name.replace('_', '-')} is {length}; this encoder reads 4 to {longest} tokens")
        setattr(ranker.encoder.reading, name, length)


def line(name: str, row: Mapping[str, float]) -> str:
    costs = "".join(f"{row[each]:10.1f}" if each in row else f"{'':10}" for each in COSTS)
    return f"{name:24}" + "".join(f"{row[each]:10.4f}" for each in MEASURES) + costs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("model", help='a folder, a hub name, "bm25" or "fusion:MODEL:WEIGHT"')
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER[:split]",
        help="BEIR folders, or names on the hub; the split is test if not said",
    )
    for side in ("query", "document"):
        parser.add_argument(
            f"--{side}-length", type=int, metavar="N", help=f"tokens of a {side}, instead of the model's own"
        )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write each query's values there, a file a folder")
    options = parser.parse_args(arguments)
    folders = [name for each in options.folders for name in (NANO_BEIR if each == "nanobeir" else [each])]
    rows: list[dict[str, float]] = []
    try:
        ranker = rankers.open_ranker(options.model)
        set_lengths(ranker, options.query_length, options.document_length)
        print(f"{'':24}" + "".join(f"{name:>10}" for name in (*MEASURES, *COSTS)))
        for name in folders:
            folder, split = split_of(name)
            rows.append(evaluate(ranker, folder, split, keep=options.keep))
            print(line(f"{label(folder)} {split}", rows[-1]), flush=True)
        if len(rows) > 1:
            print(line("mean", {name: float(np.mean([row[name] for row in rows])) for name in MEASURES}))
    except (ConfigError, BadRow, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
