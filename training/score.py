"""A teacher's scores for n-way rows, and its vectors for stage distill.

`python -m training.score ROWS.jsonl --corpus FOLDER --teacher TEACHER --out SCORED.jsonl`. TEACHER: a cross-encoder, a
late-interaction or a dense model (a folder or a hub name), "bm25", or "fusion:MODEL:WEIGHT", the z-scored sum of BM25 and a
dense model. What was scored before an interruption is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from training import rankers
from training.beir import read_beir
from training.config import ConfigError, Source, Teacher
from training.files import BadRow, Lines
from training.sources import Rows, Stream, parse

CHUNK = 64


def score(rows: str | Path, teacher: str, out: str | Path, corpus: str | None = None, batch: int = 32) -> None:
    rows = Path(rows)
    if not rows.exists():
        raise ConfigError(f"{rows} does not exist")
    lines = Lines(rows)
    source = Source(str(rows), corpus=corpus)
    task = read_beir(corpus, judged=False) if corpus else None
    parsed = [parse(lines[n], lines.place(n), source, task, n) for n in range(len(lines))]
    # Statistics such as BM25's are of the whole corpus where there is one.
    documents = list(task.documents.values() if task else dict.fromkeys(t for row in parsed for t in row.documents))
    numbers = {key: n for n, key in enumerate(task.documents if task else documents)}
    ranker: list[rankers.Ranker] = []

    def make(start: int, stop: int) -> list[dict[str, Any]]:
        if not ranker:
            ranker.append(rankers.open_ranker(teacher, batch))
            ranker[0].index(documents)
        chosen = [[numbers[key] for key in row.keys] for row in parsed[start:stop]]
        scores = ranker[0].pair_scores([row.query for row in parsed[start:stop]], chosen)
        for n, own in enumerate(scores, start=start):
            if not np.isfinite(own).all():
                raise FloatingPointError(f"{lines.place(n)}: the teacher's scores are {own.tolist()}")
        return [{**lines[n], "scores": [round(float(s), 6) for s in own]} for n, own in enumerate(scores, start=start)]

    facts = {"teacher": teacher, "rows": hashlib.sha256(rows.read_bytes()).hexdigest(), "corpus": corpus}
    resumable(Path(out), len(lines), facts, make)


def resumable(
    out: Path, total: int, facts: dict[str, Any], make: Callable[[int, int], list[dict[str, Any]]], chunk: int = CHUNK
) -> None:
    """Write `total` records, `chunk` at a time, to a file that appears when it is whole and then is not made again.

    facts: what the records depend on; an unfinished file with others is begun anew, a finished one is an error.
    """
    told, part = out.with_name(out.name + ".from.json"), out.with_name(out.name + ".part")
    wanted = json.dumps(facts, sort_keys=True)
    same = told.exists() and told.read_text(encoding="utf-8") == wanted
    if out.exists():
        if not same:
            raise ConfigError(f"{out} exists, and was made from something else; remove it, or choose another name")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    if same and part.exists():
        raw = part.read_bytes()
        raw = raw[: raw.rfind(b"\n") + 1]  # half a line, written as the process was killed
        done = raw.count(b"\n") // chunk * chunk
        part.write_bytes(b"".join(raw.splitlines(keepends=True)[:done]))
    else:
        part.unlink(missing_ok=True)
    told.write_text(wanted, encoding="utf-8")
    with part.open("a", encoding="utf-8") as file, tqdm(total=total, initial=done, desc=out.name, mininterval=1) as bar:
        for start in range(done, total, chunk):
            stop = min(start + chunk, total)
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in make(start, stop)))
            file.flush()
            bar.update(stop - start)
        os.fsync(file.fileno())
    os.replace(part, out)


def vectors(source: Source, rows: Rows | Stream, teacher: Teacher) -> np.ndarray:
    """Unit vectors `[rows, dimension]` of a source's texts, memory-mapped; made once and kept in `teacher.cache`."""
    if isinstance(rows, Stream):
        raise ConfigError(f"{source.path}: stage distill needs to know every text, so it cannot be streamed")
    if source.vectors:
        found = np.load(source.vectors, mmap_mode="r")
        if found.ndim != 2 or len(found) != len(rows):
            raise ConfigError(f"{source.vectors} has the shape {found.shape}; want a row for each of {len(rows)} texts")
        return _cut(found, teacher)
    if teacher.model is None:
        raise ConfigError("teacher.model is missing: stage distill needs it, or vectors for each of data.sources")
    rng = np.random.default_rng(0)
    texts = [rows.row(n, rng) for n in range(len(rows))]
    digest = hashlib.sha256(teacher.model.encode())
    for row in texts:
        digest.update(repr((row.query, row.documents)).encode())
    path = Path(teacher.cache) / f"{digest.hexdigest()[:24]}.npy"
    if not path.exists():
        model = rankers.sentence_transformer(teacher.model)
        path.parent.mkdir(parents=True, exist_ok=True)
        part, width = path.with_suffix(f".{os.getpid()}.part.npy"), model.get_embedding_dimension()
        array = np.lib.format.open_memmap(part, "w+", np.float16, (len(texts), int(width or 0)))
        with tqdm(total=len(texts), desc=f"Teacher's vectors of {Path(source.path).name}", mininterval=1) as bar:
            for start in range(0, len(texts), 16 * teacher.batch):
                some = texts[start : start + 16 * teacher.batch]
                for is_query in (True, False):
                    mine = [n for n, row in enumerate(some, start=start) if bool(row.query) == is_query]
                    if mine:
                        encode = model.encode_query if is_query else model.encode_document
                        own = [texts[n].query if is_query else texts[n].documents[0] for n in mine]
                        array[mine] = encode(own, batch_size=teacher.batch, show_progress_bar=False)
                bar.update(len(some))
        array.flush()
        os.replace(part, path)
    return _cut(np.load(path, mmap_mode="r"), teacher)


def _cut(array: np.ndarray, teacher: Teacher) -> np.ndarray:
    if teacher.dimension is None:
        return array
    if teacher.dimension > array.shape[1]:
        raise ConfigError(f"teacher.dimension is {teacher.dimension}; the teacher has {array.shape[1]}")
    return array[:, : teacher.dimension]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.score", description=__doc__)
    parser.add_argument("rows", help="a .jsonl file of n-way rows, as training.mine writes")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--corpus", help="the BEIR folder that document_ids speak of")
    parser.add_argument("--batch", type=int, default=32, help="texts the teacher reads at a time")
    options = parser.parse_args(arguments)
    try:
        score(options.rows, options.teacher, options.out, options.corpus, options.batch)
    except (ConfigError, BadRow, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
