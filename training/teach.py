"""A teacher's scores of all documents for the queries of a split, and for sentences of the corpus.

`python -m training.teach FOLDER --teacher TEACHER --out DIR [--split train] [--sentences]`. TEACHER as for training.score.
A batch of queries and documents then has a score for every pair: each encoded document teaches all queries of the batch.

DIR has `queries.jsonl`, {query, relevant: {document: grade}, about: document or null}, and `scores.npy`, float16 `[queries,
documents]` in the order of the corpus. `about` marks what --sentences makes of the corpus alone, without queries or
judgements: of each document its title and its last sentence of 6 to 32 words, often its conclusion, without the words that
only introduce it. If that corpus is the one searched in the test, say so beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from training import rankers
from training.beir import Beir, plain, read_beir
from training.config import ConfigError
from training.files import BadRow

CHUNK = 256
LARGEST = float(np.finfo(np.float16).max)

_OPENING = re.compile(
    r"^((in (conclusion|summary)|conclusions?|together|taken together|thus|therefore|overall|finally|here|moreover|furthermore"
    r"|collectively|interpretation|findings|results)[,:]?\s+)?"
    r"(((these|our|the|the present|this) (results|findings|data|study|studies|observations|work)|we)( \w+){0,3}?"
    r" (suggest|show|indicate|demonstrate|reveal|support|confirm|establish|find|found|report|conclude|propose)\w*"
    r"( here)? that\s+)?",
    re.IGNORECASE,
)


def sentences(task: Beir, avoid: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """(text, document) of titles and of last sentences; none that equals one of `avoid`."""
    for key, (title, text) in task.titles.items():
        found = [_OPENING.sub("", each.strip(), count=1) for each in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)]
        found = [each for each in found if 6 <= len(each.split()) <= 32][-1:]
        if len(title.split()) > 3:
            found.append(title)
        yield from ((each, key) for each in found if plain(each) not in avoid)


def teach(folder: str, teacher: str, out: Path, *, split: str = "train", with_sentences: bool = False) -> None:
    if out.exists():
        raise ConfigError(f"{out} exists; remove it, or choose another name")
    task = read_beir(folder, split)
    for note in task.notes:
        print(note)
    records: list[dict] = [
        {"query": task.queries[each], "relevant": grades, "about": None} for each, grades in task.qrels.items()
    ]
    if with_sentences:
        avoid = frozenset(plain(text) for text in task.held_out)
        records += [{"query": text, "relevant": {}, "about": key} for text, key in sentences(task, avoid)]
    ranker = rankers.open_ranker(teacher)
    ranker.index(list(task.documents.values()))
    part = out.with_name(f".unfinished-{out.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shape = (len(records), len(task.documents))
    scores = np.lib.format.open_memmap(part / "scores.npy", "w+", np.float16, shape)
    with tqdm(total=len(records), desc=f"Scores of {Path(folder).name}", mininterval=1) as bar:
        for start in range(0, len(records), CHUNK):
            found = ranker.all_scores([each["query"] for each in records[start : start + CHUNK]])
            if not np.abs(found).max() < LARGEST:
                raise FloatingPointError(
                    f"{folder}: scores of queries from {start} on are no numbers that float16 holds"
                )
            scores[start : start + CHUNK] = found
            bar.update(len(found))
    scores.flush()
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in records]
    (part / "queries.jsonl").write_text("".join(lines), encoding="utf-8")
    os.replace(part, out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.teach", description=__doc__)
    parser.add_argument("folder", help="a BEIR folder")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--split", default="train", help='of the queries: a name, or "train[0.0:0.8]" (default: train)')
    parser.add_argument("--sentences", action="store_true", help="titles and sentences of the corpus as queries too")
    options = parser.parse_args(arguments)
    try:
        own = {"split": options.split, "with_sentences": options.sentences}
        teach(options.folder, options.teacher, options.out, **own)
    except (ConfigError, BadRow, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
