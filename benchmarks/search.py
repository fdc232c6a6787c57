"""Exact top-10 over a whole collection: 650 queries of 32 tokens, 67,000 documents of about 200 tokens (log-normal), d = 48.

One thread, CPU time. Vectors are synthetic unit rows, so their scores lie closer together than those of text: more
documents stay within the error bound of "fast" than in a real search. PyTorch gets fp32 documents in blocks of like
length, padded; maxsim-cpu and PyLate's `rank.rerank` fp32 lists, PyLate for every query all documents as candidates.
Contenders that would take long score fewer queries or documents, and their time is scaled to the whole: `extrapolated`
says by how much.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from benchmarks import contenders, suite
from benchmarks.interleave import Contender
from edgecolbert_kernels import PackedEmbeddings, search
from tests.cases import embeddings

K = 10
FULL = {"num_queries": 650, "num_documents": 67_000}
QUICK = {"num_queries": 64, "num_documents": 4_000}
QUERY_LENGTH, DIM, MEDIAN_LENGTH, SPREAD = 32, 48, 180, 0.45


@lru_cache(maxsize=1)
def collection(num_documents: int) -> PackedEmbeddings:
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(MEDIAN_LENGTH), SPREAD, num_documents).clip(8, 512).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.empty((offsets[-1], DIM), np.float16)
    for start in range(0, len(tokens), 1 << 18):  # in parts: float64 of all would not fit
        part = random.standard_normal((min(1 << 18, len(tokens) - start), DIM), np.float32)
        tokens[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return PackedEmbeddings.from_arrays(tokens, offsets)


def ours(queries: torch.Tensor, documents: PackedEmbeddings, precision: str):
    return search(queries, documents, K, precision=precision)


def torch_blocked(queries: torch.Tensor, documents: PackedEmbeddings):
    """Blocks of documents of like length, padded with their own last token; matmul, maximum, top-k of all scores."""
    columns = queries.reshape(-1, DIM).T
    order = np.argsort(documents.lengths, kind="stable")
    offsets, tokens = documents.offsets, documents.tokens
    scores = torch.empty(len(queries), len(documents))
    for block in np.array_split(order, -(-len(order) // contenders.BLOCK)):
        longest = int(documents.lengths[block].max())
        last = offsets[block + 1] - 1
        rows = np.minimum(offsets[block][:, None] + np.arange(longest), last[:, None])
        padded = torch.from_numpy(tokens[rows]).float().reshape(-1, DIM)
        similarities = (padded @ columns).view(len(block), longest, len(queries), -1)
        scores[:, torch.from_numpy(block)] = similarities.amax(1).sum(-1).T
    best = scores.topk(K)
    return best.values, best.indices


def maxsim_cpu(queries: torch.Tensor, documents: PackedEmbeddings):
    from maxsim_cpu import maxsim_scores_variable

    listed = [rows.copy() for rows in documents.to("float32")]
    scores = torch.stack([torch.from_numpy(maxsim_scores_variable(query.numpy(), listed)) for query in queries])
    best = scores.topk(K)
    return best.values, best.indices


def pylate_rerank(queries: torch.Tensor, documents: PackedEmbeddings):
    from pylate import rank

    listed, ids = [torch.from_numpy(rows.copy()) for rows in documents.to("float32")], list(range(len(documents)))
    results = [
        rank.rerank(documents_ids=[ids], queries_embeddings=query[None], documents_embeddings=[listed])[0][:K]
        for query in queries
    ]
    scores = torch.tensor([[hit["score"] for hit in result] for result in results])
    return scores, torch.tensor([[hit["id"] for hit in result] for result in results])


def timed(call, *arguments) -> tuple[float, object]:
    start = time.process_time()
    result = call(*arguments)
    return time.process_time() - start, result


def run(quick: bool) -> list[dict]:
    shape = QUICK if quick else FULL
    suite.machine.set_threads(1)
    documents = collection(shape["num_documents"])
    queries = embeddings(shape["num_queries"], QUERY_LENGTH, DIM, seed=1)
    eights = documents.to("int8")
    # (queries, documents) that a contender really scores
    few = (min(32, shape["num_queries"]), min(8_000, shape["num_documents"]))
    tenth = (-(-shape["num_queries"] // 10), shape["num_documents"])
    plans = [
        ("search fast, fp16", lambda Q, D: ours(Q, D, "fast"), documents, tuple(shape.values())),
        ("search exact, fp16", lambda Q, D: ours(Q, D, "exact"), documents, tenth),
        ("search fast, int8", lambda Q, D: ours(Q, D, "fast"), eights, tenth),
        ("search exact, int8", lambda Q, D: ours(Q, D, "exact"), eights, tenth),
        ("torch blocked fp32", torch_blocked, documents, few),
        ("maxsim-cpu", maxsim_cpu, documents, (min(4, few[0]), min(4_000, few[1]))),
        ("PyLate rank.rerank", pylate_rerank, documents, (min(2, few[0]), min(2_000, few[1]))),
    ]
    rows = []
    for name, call, stored, (num_queries, num_documents) in plans:
        package = {"maxsim-cpu": "maxsim_cpu", "PyLate rank.rerank": "pylate"}.get(name)
        reason = package and contenders.missing(package)
        if reason:
            print(f"  {name}: skipped, {reason}")
            continue
        part = stored[:num_documents]
        share = stored.num_tokens / part.num_tokens * len(queries) / num_queries
        call(queries[:1], part[:16])  # libraries load
        rounds = []
        for _ in range(3 if quick else 1):
            seconds, (scores, indices) = timed(call, queries[:num_queries], part)
            rounds.append(1e3 * seconds * share)
        wanted = search(queries[:4], part, K, precision="exact")
        error = float((torch.as_tensor(scores)[:4] - wanted[0][: len(scores)]).abs().max())
        found = np.asarray(indices)[:4].tolist() == wanted[1][: len(scores)].tolist()
        rows.append(
            {
                "case": f"{shape['num_queries']} queries, {shape['num_documents']} documents",
                **shape, "query_length": QUERY_LENGTH, "dim": DIM, "tokens": stored.num_tokens, "k": K, "threads": 1,
                "contender": name, "unit": "ms", **suite.quantiles(np.array(rounds)),
                "milliseconds_a_query": round(float(np.median(rounds)) / len(queries), 3),
                "extrapolated": round(share, 2), "error": float(f"{error:.2g}"), "same_documents": found,
            }
        )  # fmt: skip
        row = rows[-1]
        flag = f"  (extrapolated x {share:.1f})" if share > 1 else ""
        print(
            f"  {name:<22}{row['p50'] / 1e3:>10.2f} s{row['milliseconds_a_query']:>10.2f} ms a query{flag}", flush=True
        )
    fastest = {row["contender"]: row["p50"] for row in rows}
    for row in rows:
        row["times_search_fast_fp16"] = round(row["p50"] / fastest["search fast, fp16"], 2)
    return rows


def cases() -> Iterator[suite.Case]:
    """Top-10 of a small collection, for `benchmarks.test_suites`."""
    documents, queries = collection(1000), embeddings(8, QUERY_LENGTH, DIM, seed=1)

    def contender(name, call):
        return Contender(name, lambda turn: call()[0])

    yield suite.Case(
        name="8 queries, 1000 documents",
        contenders=[
            contender("search fast", lambda: ours(queries, documents, "fast")),
            contender("search exact", lambda: ours(queries, documents, "exact")),
            contender("torch blocked fp32", lambda: torch_blocked(queries, documents)),
        ],
        expected=lambda: torch_blocked(queries.double(), documents.to("float32"))[0].double(),
        references=("search fast",),
        rounds=(21, 7),
    )


if __name__ == "__main__":
    suite.main_of_rows("search", run)
