"""A tiny encoder, a tiny retrieval task, and runs of training over them, made on the fly."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tiny_colbert

TOPICS = 12


def encoder(folder: Path, *, hidden: int = 32, dropout: float = 0.1) -> Path:
    """A BERT with random weights and a vocabulary of its own, as transformers saves it."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tiny_colbert.VOCABULARY))
    BertTokenizerFast(vocab={word: n for n, word in enumerate(tiny_colbert.VOCABULARY)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny_colbert.VOCABULARY),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def beir(folder: Path, *, seed: int = 0, documents: int = 48, packed: bool = False) -> Path:
    """Documents about topics, a word of their topic in every query: train and test queries differ."""
    rng = np.random.default_rng(seed)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    words = np.array(tiny_colbert.WORDS)

    def about(topic: int, length: int) -> str:
        own = words[topic * 8 : topic * 8 + 8]
        return " ".join(np.concatenate([rng.choice(own, length // 2), rng.choice(words, length // 2)]))

    corpus = [
        {"_id": f"d{n}", "title": about(n % TOPICS, 4), "text": about(n % TOPICS, 24) + ", end."}
        for n in range(documents)
    ]
    queries, lines = [], {"train": [], "dev": [], "test": []}
    for n in range(90):
        queries.append({"_id": f"q{n}", "text": f"{about(n % TOPICS, 6)} word{n}"})
        split = "test" if n >= 70 else "dev" if n >= 60 else "train"
        lines[split] += [f"q{n}\td{d}\t1" for d in range(n % TOPICS, documents, TOPICS)][:2]
    for name, records in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        if packed:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text)
    for split, rows in lines.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return folder


def tuples(path: Path, *, rows: int = 40, ways: int = 4, seed: int = 0) -> Path:
    """Texts with a teacher's scores."""
    rng = np.random.default_rng(seed)
    texts = tiny_colbert.texts(rows * (ways + 1), 12, seed=seed)
    with path.open("w") as file:
        for n in range(rows):
            query, *documents = texts[n * (ways + 1) : (n + 1) * (ways + 1)]
            scores = sorted(rng.normal(size=ways).round(3).tolist(), reverse=True)
            file.write(json.dumps({"query": query, "documents": documents, "scores": scores}) + "\n")
    return path


def settings(stage: str, base: Path, source: Path, output: Path, **tables: dict[str, Any]) -> dict[str, Any]:
    """A configuration of a few steps, as a dict."""
    model = {"base": str(base), "dimension": 16, "query_length": 16, "document_length": 32}
    raw: dict[str, Any] = {
        "stage": stage,
        "output": str(output),
        "model": model | tables.pop("model", {}),
        "data": {"sources": [{"path": str(source)}]} | tables.pop("data", {}),
        "train": {"batch": 8, "mini_batch": 4, "steps": 2, "log_every": 1} | tables.pop("train", {}),
    }
    return raw | tables
