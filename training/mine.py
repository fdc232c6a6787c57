"""Negatives for the queries of a BEIR folder: `python -m training.mine FOLDER --dense MODEL --out ROWS.jsonl`.

Each row has a relevant document first, then negatives: 35 % from the top of a dense model, 35 % from the top of BM25, the
rest random. A negative that the dense model scores at 0.95 of the positive or more is likely to be right, and is left out
(NV-Retriever's relative threshold). `--queries titles` takes the titles of documents as queries: it reads neither
queries nor judgements. Every draw is a function of the seed and the query alone.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training import rankers
from training.config import ConfigError, Source
from training.files import BadRow
from training.score import resumable
from training.sources import BeirRows, Rows, TitleRows, open_rows

MIX = (0.35, 0.35, 0.30)


def choose(
    dense: np.ndarray,
    sparse: np.ndarray,
    positive: int,
    right: Sequence[int],
    count: int,
    rng: np.random.Generator,
    *,
    mix: Sequence[float] = MIX,
    threshold: float | None = 0.95,
    depth: int = 100,
) -> list[int]:
    """`count` negatives of one query, from its scores for all documents."""
    allowed = np.ones(len(dense), bool)
    allowed[list(right)] = False
    if threshold is not None:
        own = float(dense[positive])
        # Below 0.95 of the positive; of a positive with a score below 0, as far below it.
        allowed &= dense < own - (1 - threshold) * abs(own)
    if allowed.sum() < count:
        allowed = np.ones(len(dense), bool)
        allowed[list(right)] = False
    if allowed.sum() < count:
        raise ConfigError(f"there are {allowed.sum()} documents that can be negatives; want {count}")
    wanted = [round(mix[0] * count), round(mix[1] * count)]
    chosen: list[int] = []
    for scores, number in zip((dense, sparse), wanted, strict=True):
        (best,) = rankers.top(np.where(allowed, scores, -np.inf)[None], min(depth, int(allowed.sum())))
        picked = rng.permutation(best)[:number]
        allowed[picked] = False
        chosen += picked.tolist()
    others = np.flatnonzero(allowed)
    return chosen + rng.choice(others, count - len(chosen), replace=False).tolist()


def mine(
    folder: str,
    dense: str,
    out: Path,
    *,
    split: str = "train",
    queries: str = "judged",
    negatives: int = 15,
    mix: Sequence[float] = MIX,
    threshold: float | None = 0.95,
    depth: int = 100,
    repeats: int = 1,
    seed: int = 0,
    batch: int = 32,
) -> None:
    """Write `repeats` rows a query, each with a relevant document and negatives of its own."""
    rows: Rows = open_rows(Source(folder, split=split, kind="titles" if queries == "titles" else "auto"))
    if not isinstance(rows, BeirRows | TitleRows):
        raise ConfigError(f"{folder} is no BEIR folder")
    task = rows.task
    for note in rows.notes:
        print(note)
    ids = list(task.documents)
    numbers = {key: n for n, key in enumerate(ids)}
    searchers: list[rankers.Ranker] = []

    def make(start: int, stop: int) -> list[dict[str, Any]]:
        if not searchers:
            for ranker in (rankers.open_ranker(dense, batch), rankers.Bm25()):
                ranker.index(list(task.documents.values()))
                searchers.append(ranker)
        rngs = [np.random.default_rng([seed, n]) for n in range(start, stop)]
        some = [rows.row(n % len(rows), rng) for n, rng in zip(range(start, stop), rngs, strict=True)]
        scores = [ranker.all_scores([row.query for row in some]) for ranker in searchers]
        found = []
        for row, rng, from_dense, from_sparse in zip(some, rngs, *scores, strict=True):
            right = [numbers[key] for key in row.relevant]
            options: dict[str, Any] = {"mix": mix, "threshold": threshold, "depth": depth}
            chosen = choose(from_dense, from_sparse, numbers[row.keys[0]], right, negatives, rng, **options)
            query = {"query": row.query} if isinstance(rows, TitleRows) else {"query_id": rows.ids[row.index]}
            documents = [row.keys[0], *(ids[n] for n in chosen)]
            found.append({**query, "document_ids": documents, "relevant_ids": sorted(row.relevant)})
        return found

    digest = hashlib.sha256(repr((list(task.documents.items()), [rows.ids])).encode()).hexdigest()
    facts = {
        "data": digest,
        "dense": dense,
        "split": split,
        "queries": queries,
        "negatives": negatives,
        "mix": list(mix),
    }
    facts |= {"threshold": threshold, "depth": depth, "repeats": repeats, "seed": seed}
    resumable(out, len(rows) * repeats, facts, make)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.mine", description=__doc__)
    parser.add_argument("folder", help="a BEIR folder")
    parser.add_argument("--dense", required=True, help="a dense or late-interaction model: folder or hub name")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--split", default="train", help='of the queries: a name, or "train[0.0:0.9]" (default: train)')
    parser.add_argument("--queries", choices=("judged", "titles"), default="judged")
    parser.add_argument("--negatives", type=int, default=15)
    parser.add_argument("--mix", default="0.35,0.35,0.30", help="shares of dense, BM25, random (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.95, help="0 for none (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=100, help="negatives are drawn from the first so many")
    parser.add_argument("--repeats", type=int, default=1, help="rows a query")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    options = vars(parser.parse_args(arguments))
    try:
        options["mix"] = [float(share) for share in options["mix"].split(",")]
        if len(options["mix"]) != 3 or abs(sum(options["mix"]) - 1) > 1e-6:
            raise ConfigError(f"--mix is {options['mix']}; want three shares that add up to 1")
        mine(options.pop("folder"), **options | {"threshold": options["threshold"] or None})
    except (ConfigError, BadRow, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
