"""The other ways to say who is scored with whom: a query's own candidates, pairs, chosen pairs; Lq = 32, fp16, d = 48.

One thread, CPU time. PyTorch gets fp32. Masks have holes, as a skiplist of punctuation makes them.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch

from benchmarks import contenders, suite
from benchmarks.interleave import Contender
from edgecolbert_kernels import maxsim, maxsim_indexed, maxsim_pairs
from tests.cases import embeddings, holes

QUERIES, CANDIDATES, LENGTH, DIM = 32, 32, 180, 48


@lru_cache(maxsize=1)
def inputs() -> dict[str, torch.Tensor]:
    queries = embeddings(QUERIES, 32, DIM, seed=0, dtype=torch.float16)
    documents = embeddings(QUERIES, CANDIDATES, LENGTH, DIM, seed=1, dtype=torch.float16)
    numbers = torch.arange(QUERIES * CANDIDATES)
    return {
        "queries": queries,
        "documents": documents,
        "queries_f32": queries.float(),
        "documents_f32": documents.float(),
        "mask": holes(QUERIES, CANDIDATES, LENGTH),
        # Every query with its own candidates again, as a list of pairs.
        "query_index": numbers // CANDIDATES,
        "document_index": numbers,
    }


def eager_candidates(queries: torch.Tensor, documents: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    similarities = torch.einsum("qid,qkjd->qkij", queries, documents)
    if mask is not None:
        similarities = similarities.masked_fill(~mask[:, :, None], -torch.inf)
    return similarities.max(-1).values.sum(-1)


def eager_pairs(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    return (queries @ documents.mT).max(-1).values.sum(-1)


def case(name: str, tokens: float, ours: Callable, eager: Callable, rounds: tuple[int, int], calls: int = 1):
    """``ours`` and ``eager`` map the inputs to scores; ``eager`` is the reference too, in float64."""
    operations = 2.0 * DIM * 32 * tokens
    missing = contenders.missing("edgecolbert_kernels")

    def float64() -> torch.Tensor:
        given = inputs()
        double = {key: given[key].double() for key in ("queries_f32", "documents_f32")}
        return eager({**given, **double})

    return suite.Case(
        name=name,
        parameters={"num_queries": QUERIES, "candidates": CANDIDATES, "length": LENGTH, "dim": DIM, "query_length": 32},
        references=("exact", "fast"),
        contenders=[
            contenders.peak("f32"),
            Contender("exact", lambda _turn: ours(inputs()), operations, "peak f32", missing=missing),
            contenders.peak("i16"),
            Contender("fast", lambda _turn: ours(inputs(), precision="fast"), operations, "peak i16", missing=missing),
            Contender("torch eager fp32", lambda _turn: eager(inputs()), operations, "peak f32"),
        ],
        rounds=rounds,
        calls=calls,
        expected=float64,
    )


def cases() -> Iterator[suite.Case]:
    tokens = QUERIES * CANDIDATES * LENGTH
    yield case(
        "candidates",
        tokens,
        lambda x, **options: maxsim(x["queries"], x["documents"], **options),
        lambda x: eager_candidates(x["queries_f32"], x["documents_f32"]),
        (27, 7),
    )
    yield case(
        "candidates, document mask",
        float(inputs()["mask"].sum()),
        lambda x, **options: maxsim(x["queries"], x["documents"], d_mask=x["mask"], **options),
        lambda x: eager_candidates(x["queries_f32"], x["documents_f32"], x["mask"]),
        (27, 7),
    )
    yield case(
        "pairs",
        QUERIES * LENGTH,
        lambda x, **options: maxsim_pairs(x["queries"], x["documents"][:, 0], **options),
        lambda x: eager_pairs(x["queries_f32"], x["documents_f32"][:, 0]),
        (27, 7),
        calls=10,
    )

    def chosen(x: dict[str, torch.Tensor], **options) -> torch.Tensor:
        return maxsim_indexed(
            x["queries"], x["documents"].flatten(0, 1), x["query_index"], x["document_index"], **options
        )

    yield case(
        "chosen pairs",
        tokens,
        chosen,
        lambda x: eager_pairs(
            x["queries_f32"][x["query_index"]], x["documents_f32"].flatten(0, 1)[x["document_index"]]
        ),
        (27, 7),
    )


if __name__ == "__main__":
    suite.main("layouts", cases)
