"""Every storage of the documents: 1 query (Lq = 32) against 1000 documents of 300 tokens, one thread, CPU time.

PyTorch computes in the storage's own dtype and sums in it too, which is what its error column is about.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch

from benchmarks import contenders, suite
from benchmarks.inputs import Shape
from benchmarks.interleave import Contender
from benchmarks.rerank import INT8_ERROR

DIMS = (48, 128)
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@lru_cache(maxsize=1)
def documents_bf16(shape: Shape) -> list[torch.Tensor]:
    return [each.bfloat16() for each in shape.inputs().documents]


def stored(shape: Shape, dtype: str, score: Callable, **options) -> Callable[[int], torch.Tensor]:
    """A contender's call on the documents in ``dtype``, the queries in fp16 (fp32 for fp32, as callers have them)."""

    def call(turn: int) -> torch.Tensor:
        given = shape.inputs()
        copies = {"fp32": given.documents_f32, "fp16": given.documents}.get(dtype) or documents_bf16(shape)
        queries = given.queries_f32 if dtype == "fp32" else given.queries
        if score is contenders.eager:
            queries = queries.to(FLOATS[dtype])
        return score(queries, copies[turn % len(copies)], **options)

    return call


def case(shape: Shape, rounds: tuple[int, int]) -> suite.Case:
    missing = contenders.missing("edgecolbert_kernels")

    def ours(name: str, call: Callable, peak: str, tolerance: float | None = None) -> Contender:
        return Contender(name, call, shape.operations, f"peak {peak}", missing=missing, tolerance=tolerance)

    made = [contenders.peak("f32"), contenders.peak("i16"), contenders.peak("i8")]
    for dtype in FLOATS:
        # bf16 keeps 8 bits of the fp16 values that the reference scores.
        tolerance = 0.1 if dtype == "bf16" else None
        made += [
            ours(f"exact {dtype}", stored(shape, dtype, contenders.fused), "f32", tolerance),
            ours(f"fast {dtype}", stored(shape, dtype, contenders.fused, precision="fast"), "i16", tolerance),
            Contender(f"torch eager {dtype}", stored(shape, dtype, contenders.eager), tolerance=math.inf),
        ]
    made += [
        ours("exact int8", shape.on_i8(contenders.fused), "f32", INT8_ERROR),
        ours("fast int8", shape.on_i8(contenders.fused, precision="fast"), "i8", INT8_ERROR),
    ]
    return suite.Case(
        name=f"d={shape.dim}",
        parameters=shape.parameters,
        references=("exact fp16", "fast fp16"),
        contenders=made,
        rounds=rounds,
        expected=shape.float64_scores,
    )


def cases() -> Iterator[suite.Case]:
    for dim in DIMS:
        yield case(Shape(1, 32, 1000, 300, dim), rounds=(13, 0))


if __name__ == "__main__":
    suite.main("dtypes", cases)
