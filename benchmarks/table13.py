"""Encode a collection and score it, whole: documents of 300 tokens, 650 queries of 32, Ettin 17M and 32M with random weights.

What table 13 of the paper of mxbai-edge-colbert-v0 asks, on this CPU, all threads, wall-clock time, fp32 encoders
(`table13_gpu.py` is the same on a GPU):

    python -m benchmarks.table13                           # 10,000 documents
    python -m benchmarks.table13 --documents 500           # a taste
    python -m benchmarks.table13 --pylate ENV/bin/python   # and PyLate doing the same, in its own environment

Each dimension is a head of its own on the same backbone, so the backbone runs once for all: encode = backbone + head +
packing. Documents go to the disk packed in fp16, batch by batch; a process of its own per dimension loads them and scores
every query with every document. ``memory`` is what the resident set of that process grows by when it loads them, ``peak``
the most that it ever holds. PyLate encodes and scores `--pylate-documents` of the documents, holds them as the float32
arrays that its `encode` returns, and scores blocks of documents with `colbert_scores`; its times, and the bytes of these
arrays as its memory, are scaled up to the whole (``extrapolated``). Weights are random: the time is that of trained ones, the
scores mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine, suite
from benchmarks.memory import resident

SIZES = ("17m", "32m")
DIMS = (48, 64, 96, 128)
QUERIES, QUERY_LENGTH, LENGTH, BATCH = 650, 32, 300, 32
WORDS, VOCABULARY = 50_280, 50_368
MIB = 2**20
PYLATE_BLOCK = 16  # documents a call of colbert_scores: its similarities with 650 queries take 0.4 GB


def texts(count: int, length: int, seed: int) -> Iterator[str]:
    """Texts of exactly ``length`` tokens: a word is a token, and three more are [CLS], the prefix and [SEP]."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield " ".join(f"w{n}" for n in random.integers(0, WORDS, length - 3))


def make_tokenizer(folder: Path) -> None:
    """A tokenizer with the special tokens of Ettin at their numbers, and a word for every other."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"[UNK]": 50280, "[CLS]": 50281, "[SEP]": 50282, "[PAD]": 50283, "[MASK]": 50284}
    words = {f"w{n}": n for n in range(WORDS)}
    unused = {f"[unused{n}]": n for n in range(max(special.values()) + 1, VOCABULARY)}
    # Without gaps: PyLate gives the embeddings as many rows as the tokenizer has entries.
    vocabulary = words | special | unused
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, special[name]) for name in ("[CLS]", "[SEP]")]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def make_model(size: str, dim: int, folder: Path) -> Any:
    """A ColBERT with random weights, the backbone's the same for every dimension."""
    from training import config, model

    torch.manual_seed(0)
    wanted = config.Model(
        base=f"ettin-{size}",
        random=True,
        tokenizer=str(folder / "tokenizer"),
        dimension=dim,
        query_length=QUERY_LENGTH,
        document_length=LENGTH,
    )
    return model.create(wanted, "colbert").eval()


def batches(total: int, label: str) -> Iterator[range]:
    """Numbers of documents, a batch at a time, under a progress bar."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="doc", mininterval=1, smoothing=0.1) as bar:
        for start in range(0, total, BATCH):
            yield range(start, min(start + BATCH, total))
            bar.update(min(BATCH, total - start))


# Each of these is the whole of a process and prints one JSON object as its last line.


def encode(folder: Path, size: str, documents: int) -> dict[str, Any]:
    """Encode and pack into one folder a dimension; the models are left for the other processes."""
    from edgecolbert_kernels import PackedWriter, pack

    encoders = {dim: make_model(size, dim, folder) for dim in DIMS}
    backbone, tokenize = encoders[DIMS[0]].backbone, encoders[DIMS[0]].tokenize
    for dim, encoder in encoders.items():
        encoder.save(folder / f"model-{dim}")
        encoder.backbone = None
    writers = {dim: PackedWriter(folder / f"packed-{dim}", dim=dim, dtype="float16") for dim in DIMS}
    spent = {
        "tokenize": 0.0,
        "backbone": 0.0,
        **{f"head {dim}": 0.0 for dim in DIMS},
        **{f"pack {dim}": 0.0 for dim in DIMS},
    }

    def timed(name: str, call, *arguments, **options):
        start = time.perf_counter()
        result = call(*arguments, **options)
        spent[name] += time.perf_counter() - start
        return result

    all_texts = texts(documents, LENGTH, seed=1)
    tokens = 0
    with torch.inference_mode():
        for numbers in batches(documents, f"{size}, encode"):
            given = timed("tokenize", tokenize, [next(all_texts) for _ in numbers], False)
            ids, mask = given["input_ids"], given["attention_mask"]
            hidden = timed("backbone", backbone, input_ids=ids, attention_mask=mask).last_hidden_state
            for dim, encoder in encoders.items():
                vectors = timed(f"head {dim}", encoder.head, hidden)
                packed = timed(f"pack {dim}", pack, vectors, given["score_mask"])
                timed(f"pack {dim}", writers[dim].append, packed)
            tokens += int(given["score_mask"].sum())
    for writer in writers.values():
        writer.close()
    return {"tokens": tokens, "peak_mib": resident("VmHWM") / MIB, "seconds": spent}


def score(folder: Path, dim: int) -> dict[str, Any]:
    """Load the packed documents into memory, encode the queries, score all with all."""
    from edgecolbert_kernels import PackedEmbeddings, maxsim
    from training import model

    # First of all, while no freed memory is there that could be used again unseen.
    before = resident()
    documents = PackedEmbeddings.load(folder / f"packed-{dim}", mmap=False)
    memory = (resident() - before) / MIB
    encoder = model.load(folder / f"model-{dim}")
    start = time.perf_counter()
    with torch.inference_mode():
        given = encoder.tokenize(list(texts(QUERIES, QUERY_LENGTH, seed=2)), True)
        queries = torch.cat(
            [
                encoder(i, m)
                for i, m in zip(given["input_ids"].split(BATCH), given["attention_mask"].split(BATCH), strict=True)
            ]
        )
    query_seconds = time.perf_counter() - start
    del encoder
    gc.collect()
    maxsim(queries[:1], documents[:16])  # pools of threads grow with the first call
    found = {"documents": len(documents), "query_s": query_seconds, "memory_mib": memory}
    for precision in ("exact", "fast"):
        start = time.perf_counter()
        scores = maxsim(queries, documents, precision=precision)
        found[f"score_{precision}_s"] = time.perf_counter() - start
        assert scores.shape == (QUERIES, len(documents))
    return {**found, "peak_mib": resident("VmHWM") / MIB}


def pylate(folder: Path, dim: int, documents: int) -> dict[str, Any]:
    """The same work by PyLate, of the first ``documents``."""
    from pylate import models
    from pylate.scores import colbert_scores

    from edgecolbert_kernels import PackedEmbeddings, maxsim

    encoder = models.ColBERT(str(folder / f"model-{dim}"), device="cpu")
    encoder.encode(["w1 w2"], is_query=False)
    listed = list(texts(documents, LENGTH, seed=1))
    start = time.perf_counter()
    queries = encoder.encode(list(texts(QUERIES, QUERY_LENGTH, seed=2)), batch_size=BATCH, is_query=True)
    query_seconds = time.perf_counter() - start
    start = time.perf_counter()
    vectors = encoder.encode(listed, batch_size=BATCH, is_query=False, show_progress_bar=True)
    encode_seconds = time.perf_counter() - start
    # Of a part: what the allocator adds to the resident set must not be scaled up with it.
    memory = sum(each.nbytes for each in vectors) / MIB
    Q = torch.from_numpy(np.stack(queries))
    start = time.perf_counter()
    scores = [
        colbert_scores(Q, torch.from_numpy(np.stack(vectors[at : at + PYLATE_BLOCK])))
        for at in range(0, documents, PYLATE_BLOCK)
    ]
    score_seconds = time.perf_counter() - start
    ours = maxsim(Q[:4], PackedEmbeddings.load(folder / f"packed-{dim}")[:documents])
    return {
        "documents": documents,
        "tokens": sum(map(len, vectors)),
        "query_s": query_seconds,
        "encode_s": encode_seconds,
        "memory_mib": memory,
        "score_s": score_seconds,
        "peak_mib": resident("VmHWM") / MIB,
        "difference": float((torch.cat(scores, 1)[:4] - ours).abs().max()),
    }


def apart(python: str, *arguments: object) -> dict[str, Any]:
    """One of the functions above in a process of its own; what it shows, such as its progress, is seen."""
    command = [python, "-m", "benchmarks.table13", "--do", *map(str, arguments)]
    paths = os.pathsep.join(filter(None, [str(machine.ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": paths}
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: str, dims: Sequence[int], documents: int, python: str | None, few: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="table13-") as name:
        folder = Path(name)
        make_tokenizer(folder / "tokenizer")
        encoded = apart(sys.executable, "encode", folder, size, documents)
        seconds = encoded["seconds"]
        for dim in dims:
            found = apart(sys.executable, "score", folder, dim)
            encode_seconds = sum(seconds[part] for part in ("tokenize", "backbone", f"head {dim}", f"pack {dim}"))
            for precision in ("exact", "fast"):
                yield row(size, dim, f"packed fp16, {precision}", documents, encode_seconds, found[f"score_{precision}_s"], {
                    "pack_s": seconds[f"pack {dim}"], "encode_peak_mib": encoded["peak_mib"], **pick(found),
                    "tokens": encoded["tokens"],
                })  # fmt: skip
            if python:
                theirs = apart(python, "pylate", folder, dim, few)
                scale = documents / theirs["documents"]
                more = {**pick(theirs), "memory_mib": scale * theirs["memory_mib"], "extrapolated": scale}
                more |= {"difference": theirs["difference"], "tokens": int(scale * theirs["tokens"])}
                yield row(size, dim, "PyLate", documents, scale * theirs["encode_s"], scale * theirs["score_s"], more)


def pick(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("query_s", "memory_mib", "peak_mib")}


def row(
    size: str, dim: int, contender: str, documents: int, encode_s: float, score_s: float, more: dict[str, Any]
) -> dict[str, Any]:
    made = {
        "case": f"{size}, d={dim}", "contender": contender, "size": size, "dim": dim, "documents": documents,
        "length": LENGTH, "num_queries": QUERIES, "query_length": QUERY_LENGTH, "threads": os.cpu_count(), "unit": "s",
        "encode_s": encode_s, "score_s": score_s, "score_share": score_s / (encode_s + score_s), **more,
    }  # fmt: skip
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table13", description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--dims", nargs="+", type=int, choices=DIMS, default=DIMS)
    parser.add_argument("--pylate", metavar="PYTHON", help="the interpreter of an environment with PyLate 1.6")
    parser.add_argument("--pylate-documents", type=int, default=500, help="how many of the documents PyLate works on")
    parser.add_argument("--quick", action="store_true", help="100 documents, 17M, d=48")
    parser.add_argument("--do", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        name, folder, *arguments = options.do
        numbers = [int(each) if each.isdigit() else each for each in arguments]
        machine.set_threads(os.cpu_count() or 1)
        print(json.dumps({"encode": encode, "score": score, "pylate": pylate}[name](Path(folder), *numbers)))
        return
    if options.quick:
        options.documents, options.sizes, options.dims = 100, SIZES[:1], DIMS[:1]
    few = min(options.pylate_documents, options.documents)
    rows = []
    for size in options.sizes:
        for made in measure(size, options.dims, options.documents, options.pylate, few):
            rows.append({"suite": "table13", **made, "quick": options.documents < 1000, **machine.facts()})
            print(
                f"  {made['case']:<12}{made['contender']:<20}encode {made['encode_s']:>7.1f} s, score {made['score_s']:>7.2f} s"
                f" ({100 * made['score_share']:.1f} %), memory {made['memory_mib']:.0f} MiB"
                + (f"  (extrapolated x {made['extrapolated']:.3g})" if made.get("extrapolated", 1) > 1 else ""),
                flush=True,
            )
            suite.save("table13", rows, other_cases=True)  # what is measured stays, should the rest be interrupted


if __name__ == "__main__":
    main()
