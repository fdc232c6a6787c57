"""nDCG@10 of a BEIR corpus by PyLate as it is and patched: `python -m benchmarks.pylate_quality BEIR_FOLDER --model FOLDER`

Two ways: `rank.rerank` of each query's 100 best documents by the mean of their token vectors, and PyLate's own evaluator,
which scores every query with every document. Fails where patching moves nDCG@10 by more than 1e-4.

The model is a PyLate checkpoint, or a sentence encoder, whose token vectors are then projected to 48 dimensions by their
principal directions, without training. Texts are encoded once and kept under build/quality.

Needs an environment with PyLate 1.6, as `benchmarks.pylate_step`.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine, suite
from edgecolbert_kernels import PackedEmbeddings
from edgecolbert_kernels.cli import corpus
from edgecolbert_kernels.cli.encoders import principal_directions

CACHE = Path("build/quality")
DIM, DOCUMENT_TOKENS, FITTED, CANDIDATES = 48, 180, 100, 100
# Documents that PyLate's evaluator scores at a time: as it is, it holds all their similarities.
CHUNK = 64
TOLERANCE = 1e-4


class Encoded:
    """A model whose texts are encoded already: what PyLate's evaluator asks of one."""

    def __init__(self, texts: list[str], vectors: list[torch.Tensor]) -> None:
        self.vectors = dict(zip(texts, vectors, strict=True))

    def encode(self, texts: list[str], **options: object) -> list[torch.Tensor]:
        return [self.vectors[text] for text in texts]


def encode(name: str, queries: dict[str, str], documents: dict[str, str]) -> list[PackedEmbeddings]:
    from pylate.models import ColBERT

    model = ColBERT(name, embedding_size=DIM, document_length=DOCUMENT_TOKENS, device="cpu")
    if not (Path(name) / "1_Dense").exists():
        fit(model, list(documents.values())[:: max(1, len(documents) // FITTED)])
    found = []
    for texts, is_query in ((queries, True), (documents, False)):
        vectors = model.encode(list(texts.values()), is_query=is_query, show_progress_bar=True)
        found.append(PackedEmbeddings.from_list(vectors, list(texts), dtype="float32"))
    return found


@torch.no_grad()
def fit(model: torch.nn.Module, texts: list[str]) -> None:
    """The model's projection, from the hidden states of some documents."""
    rows = []
    for start in range(0, len(texts), 16):
        features = model.tokenize(texts[start : start + 16], is_query=False, pad=True)
        hidden = model[0](dict(features))["token_embeddings"]
        rows.append(hidden[features["attention_mask"].bool()])
    model[1].linear.weight.copy_(principal_directions(torch.cat(rows), DIM).T)


def first_stage(queries: list[torch.Tensor], documents: list[torch.Tensor]) -> list[list[int]]:
    Q, D = (torch.stack([each.mean(0) for each in side]) for side in (queries, documents))
    return (Q @ D.T).topk(CANDIDATES, dim=1).indices.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pylate_quality", description=__doc__)
    parser.add_argument("folder", type=Path, help="BEIR folder")
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--documents", type=int, help="only the judged ones and the first others, this many in all")
    options = parser.parse_args()

    from pylate import rank
    from pylate.evaluation import PyLateInformationRetrievalEvaluator
    from pylate.scores import SimilarityFunction

    from edgecolbert_kernels.integrations.pylate import using_pylate

    judged: dict[str, set[str]] = {}
    for query, document, grade in corpus.qrels(options.folder / "qrels/test.tsv.gz"):
        if grade > 0:
            judged.setdefault(query, set()).add(document)
    documents = dict(corpus.texts(options.folder / "corpus.jsonl.gz"))
    if options.documents is not None:
        wanted = set().union(*judged.values())
        others = [key for key in documents if key not in wanted]
        wanted.update(others[: max(0, options.documents - len(wanted))])
        documents = {key: text for key, text in documents.items() if key in wanted}
    queries = {key: text for key, text in corpus.texts(options.folder / "queries.jsonl.gz") if key in judged}
    place = CACHE / f"{options.folder.name}.pylate.{Path(options.model).name}.{DIM}.{len(documents)}"
    if not (place / "documents").exists():
        for name, packed in zip(("queries", "documents"), encode(options.model, queries, documents), strict=True):
            packed.save(place / name, overwrite=True)
    loaded = [PackedEmbeddings.load(place / name) for name in ("queries", "documents")]
    Q, D = ([torch.from_numpy(np.array(packed[n])) for n in range(len(packed))] for packed in loaded)

    evaluator = PyLateInformationRetrievalEvaluator(
        queries,
        documents,
        judged,
        corpus_chunk_size=CHUNK,
        ndcg_at_k=[10],
        score_functions={"MaxSim": SimilarityFunction.to_similarity_fn("MaxSim")},
        show_progress_bar=True,
    )
    # The evaluator drops queries without a judgement; ours all have one.
    order = [list(queries).index(key) for key in evaluator.queries_ids]
    model = Encoded([*queries.values(), *documents.values()], [*Q, *D])
    ids = list(documents)
    best = first_stage(Q, D)

    def reranked() -> float:
        rows = rank.rerank([[ids[n] for n in each] for each in best], Q, [[D[n] for n in each] for each in best])
        results = [[{"corpus_id": row["id"], "score": float(row["score"])} for row in rows[n]] for n in order]
        return evaluator.compute_metrics(results)["ndcg@k"][10]

    def evaluated() -> float:
        return evaluator.compute_metrices(model)["MaxSim"]["ndcg@k"][10]

    made, moved = [], 0.0
    for name, measure in (("rank.rerank", reranked), ("evaluator", evaluated)):
        found = {}
        for library in ("PyLate", "patched"):
            with using_pylate() if library == "patched" else contextlib.nullcontext():
                found[library] = measure()
        moved = max(moved, abs(found["patched"] - found["PyLate"]))
        print(f"{options.folder.name}, {name}: " + ", ".join(f"{key} {value:.6f}" for key, value in found.items()))
        facts = {"model": Path(options.model).name, "pylate": machine.version("pylate"), **machine.facts()}
        shared = {
            "suite": "pylate_quality",
            "case": f"{options.folder.name}, {name}",
            "documents": len(documents),
            "queries": len(queries),
            "unit": "nDCG@10",
        }
        made += [{**shared, "contender": key, "p50": round(value, 6), **facts} for key, value in found.items()]
    suite.save("pylate_quality", made)
    if moved > TOLERANCE:
        raise SystemExit(f"patching moves nDCG@10 by {moved:.1e}")


if __name__ == "__main__":
    main()
