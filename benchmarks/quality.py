"""nDCG@10 of real corpora with a real encoder, by storage and precision: `python -m benchmarks.quality BEIR_FOLDER...`

Texts are encoded once and kept under build/quality.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks import suite
from edgecolbert_kernels import PackedEmbeddings, search
from edgecolbert_kernels.cli import corpus, metrics
from edgecolbert_kernels.cli.encoders import load_encoder
from edgecolbert_kernels.cli.index import Progress

CACHE = Path("build/quality")
COLUMNS = (
    ("fp32 exact", "float32", "exact"),
    ("fp16 exact", "float16", "exact"),
    ("fp16 fast (int16)", "float16", "fast"),
    ("bf16 exact", "bfloat16", "exact"),
    ("int8 exact", "int8", "exact"),
    ("int8 fast", "int8", "fast"),
)
DEPTH = 100


def encoded(folder: Path, model: str, max_tokens: int) -> tuple[PackedEmbeddings, PackedEmbeddings]:
    """Documents and queries, in float32 of the encoder's fp16 vectors."""
    place = CACHE / f"{folder.name}.{Path(model).name}.{max_tokens}"
    if not (place / "queries").exists():
        encoder = load_encoder(model, max_tokens)
        for name in ("corpus", "queries"):
            texts = list(corpus.texts(folder / f"{name}.jsonl.gz"))
            if name == "queries":
                judged = {query for query, _, _ in corpus.qrels(folder / "qrels/test.tsv.gz")}
                texts = [each for each in texts if each[0] in judged]
            else:
                encoder.fit([text for _, text in texts])
            encode = encoder.encode_documents if name == "corpus" else encoder.encode_queries
            vectors = encode([text for _, text in texts], Progress(len(texts), 0, name))
            packed = PackedEmbeddings.from_list(vectors, [each for each, _ in texts], dtype="float32")
            packed.save(place / name, overwrite=True)
    return PackedEmbeddings.load(place / "corpus"), PackedEmbeddings.load(place / "queries")


def fast_alone(queries, documents, k: int):
    """The ranking by fast scores, which `search` would correct: what the arithmetic itself costs."""
    from edgecolbert_kernels import maxsim

    scores = maxsim(queries, documents, precision="fast")
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, indices, 1), indices


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="BEIR folders")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="nothing is quicker: encoding is kept anyway")
    options = parser.parse_args()
    rows = []
    for folder in options.folders:
        documents, queries = encoded(folder, options.model, options.tokens)
        qrels = list(corpus.qrels(folder / "qrels/test.tsv.gz"))
        print(f"{folder.name}: {len(documents)} documents, {len(queries)} queries, {Path(options.model).name}")
        for name, dtype, precision in COLUMNS:
            stored, names = documents.to(dtype), documents.ids
            rank = fast_alone if precision == "fast" else search
            scores, indices = rank(list(queries), stored, DEPTH)
            run = {
                query: {str(names[n]): float(s) for n, s in zip(row, each, strict=True) if n >= 0}
                for query, row, each in zip(queries.ids, indices.tolist(), scores.tolist(), strict=True)
            }
            found = metrics.evaluate(run, qrels)
            rows.append(
                {"suite": "quality", "case": folder.name, "contender": name, "model": Path(options.model).name,
                 "max_tokens": options.tokens, "mebibytes": round(stored.nbytes / 2**20, 1),
                 **{key: round(value, 4) for key, value in found.items()}, **suite.machine.facts()}
            )  # fmt: skip
            print(
                f"  {name:<20}{rows[-1]['mebibytes']:>8.1f} MiB  "
                + json.dumps({k: round(v, 4) for k, v in found.items()})
            )
    suite.save("quality", rows)


if __name__ == "__main__":
    main()
