"""One query (Lq = 32, d = 48) against 10 to 10,000 fp16 documents, one thread, CPU time.

All of 300 tokens, or as long as those of a corpus (`inputs.lengths`): packed for the kernels, padded with a mask for
PyTorch, a list for maxsim-cpu. Small collections stay in the caches, as they do where they are used.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from benchmarks import contenders, suite
from benchmarks.inputs import Shape, lengths
from benchmarks.interleave import Contender
from edgecolbert_kernels import PackedEmbeddings, maxsim
from tests.cases import embeddings

COUNTS = (10, 100, 1000, 10_000)
DIM = 48
LARGEST_PADDED = 1000  # documents: PyTorch's similarities and padding of more take gigabytes


@dataclass(frozen=True)
class Ragged:
    """Documents of unequal lengths in the form that each contender takes."""

    query: torch.Tensor  # [1, Lq, d] float16
    packed: PackedEmbeddings
    padded: torch.Tensor  # [Nd, longest, d] float32
    mask: torch.Tensor
    listed: list[np.ndarray]  # each [Ld, d] float32


@lru_cache(maxsize=1)
def ragged(num_documents: int) -> Ragged:
    counts = lengths(num_documents)
    documents = list(embeddings(int(counts.sum()), DIM, seed=1, dtype=torch.float16).split(counts.tolist()))
    packed = PackedEmbeddings.from_list(documents)
    few = [each.float() for each in documents[:LARGEST_PADDED]]
    padded = torch.nn.utils.rnn.pad_sequence(few, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.from_numpy(counts[: len(few), None])
    query = embeddings(1, 32, DIM, seed=0, dtype=torch.float16)
    return Ragged(query, packed, padded, mask, [each.float().numpy() for each in documents])


def maxsim_cpu_list(given: Ragged) -> torch.Tensor:
    from maxsim_cpu import maxsim_scores_variable

    return torch.from_numpy(maxsim_scores_variable(given.query[0].float().numpy(), given.listed))[None]


def float64_scores(given: Ragged) -> torch.Tensor:
    query = given.query[0].double()
    scores = [(torch.from_numpy(rows).double() @ query.T).amax(0).sum() for rows in given.listed]
    return torch.stack(scores)[None]


def uniform_case(num_documents: int, rounds: tuple[int, int], calls: int) -> suite.Case:
    shape = Shape(1, 32, num_documents, 300, DIM)
    ours = contenders.missing("edgecolbert_kernels")
    made = [
        contenders.peak("f32"),
        Contender("exact", shape.on_f16(contenders.fused), shape.operations, "peak f32", missing=ours),
        contenders.peak("i16"),
        Contender("fast", shape.on_f16(contenders.fused, precision="fast"), shape.operations, "peak i16", missing=ours),
        Contender("int8 fast", shape.on_i8(contenders.fused, precision="fast"), tolerance=0.1, missing=ours),
        Contender("torch blocked fp32", shape.on_f32(contenders.blocked), shape.operations, "peak f32"),
        Contender("maxsim-cpu", shape.on_f32(contenders.maxsim_cpu), missing=contenders.missing("maxsim_cpu")),
    ]
    if num_documents <= LARGEST_PADDED:
        made.append(Contender("torch eager fp32", shape.on_f32(contenders.eager), shape.operations, "peak f32"))
    return suite.Case(
        name=f"{num_documents} documents",
        parameters=shape.parameters,
        references=("exact", "fast"),
        contenders=made,
        rounds=rounds,
        calls=calls,
        expected=shape.float64_scores,
    )


def ragged_case(num_documents: int, rounds: tuple[int, int], calls: int) -> suite.Case:
    ours = contenders.missing("edgecolbert_kernels")
    operations = 2.0 * 32 * DIM * float(lengths(num_documents).sum())

    def on(score: Callable[[Ragged], torch.Tensor]) -> Callable[[int], torch.Tensor]:
        return lambda _turn: score(ragged(num_documents))

    made = [
        contenders.peak("f32"),
        Contender("exact", on(lambda r: maxsim(r.query, r.packed)), operations, "peak f32", missing=ours),
        contenders.peak("i16"),
        Contender(
            "fast", on(lambda r: maxsim(r.query, r.packed, precision="fast")), operations, "peak i16", missing=ours
        ),
        Contender("maxsim-cpu", on(maxsim_cpu_list), missing=contenders.missing("maxsim_cpu")),
    ]
    if num_documents <= LARGEST_PADDED:
        made += [
            Contender("exact, padded", on(lambda r: maxsim(r.query, r.padded, d_mask=r.mask)), missing=ours),
            Contender("torch eager fp32", on(lambda r: contenders.eager(r.query.float(), r.padded, r.mask))),
        ]
    return suite.Case(
        name=f"{num_documents} documents, ragged",
        parameters={"num_queries": 1, "query_length": 32, "num_documents": num_documents, "dim": DIM},
        references=("exact", "fast"),
        contenders=made,
        rounds=rounds,
        calls=calls,
        expected=lambda: float64_scores(ragged(num_documents)),
    )


def cases() -> Iterator[suite.Case]:
    for make in (uniform_case, ragged_case):
        for num_documents in COUNTS:
            rounds = {10: (41, 9), 100: (27, 7), 1000: (13, 5), 10_000: (5, 0)}[num_documents]
            yield make(num_documents, rounds, calls=max(1, 200 // num_documents))


if __name__ == "__main__":
    suite.main("scaling", cases)
