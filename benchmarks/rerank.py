"""One query (Lq = 32) against 1000 fp16 documents of 300 tokens, one thread.

Documents rotate past the last-level cache. PyTorch and maxsim-cpu get documents already widened to
fp32, except where the name says otherwise. "exact" and "fast" screen with int8 where that pays off and can pass the
peaks of fp32 and int16; "unscreened" they cannot. Times are CPU time.
"""

from collections.abc import Iterator

from benchmarks import contenders, suite
from benchmarks.inputs import Shape
from benchmarks.interleave import Contender

DIMS = (48, 64, 96, 128)
QUICK_DIMS = (48, 128)
INT8_ERROR = 0.1  # of a score of 32 tokens, mostly from storing in 8 bits


def case(name: str, shape: Shape, rounds: tuple[int, int]) -> suite.Case:
    """Every contender on ``shape``."""

    def contender(name: str, call, peak: str, package: str = "torch") -> Contender:
        missing = contenders.missing(package)
        return Contender(name, call, shape.operations, f"peak {peak}", missing=missing)

    ours = "edgecolbert_kernels"
    fused, fp16, fp32 = contenders.fused, shape.on_f16, shape.on_f32
    return suite.Case(
        name=name,
        parameters=shape.parameters,
        references=("exact", "fast"),
        rounds=rounds,
        expected=shape.float64_scores,
        contenders=[
            contenders.peak("f32"),
            contender("exact", fp16(fused), "f32", ours),
            contender("exact unscreened", fp16(contenders.unscreened), "f32", ours),
            contenders.peak("i16"),
            contenders.bandwidth(),
            contender("fast", fp16(fused, precision="fast"), "i16", ours),
            contender("fast unscreened", fp16(contenders.unscreened, precision="fast"), "i16", ours),
            contender("torch eager fp32", fp32(contenders.eager), "f32"),
            contender("torch eager widened", fp16(contenders.eager_widened), "f32"),
            contender("torch blocked fp32", fp32(contenders.blocked), "f32"),
            contender("maxsim-cpu", fp32(contenders.maxsim_cpu), "f32", "maxsim_cpu"),
        ],
    )


def int8_case(name: str, shape: Shape, rounds: tuple[int, int]) -> suite.Case:
    """Documents stored in int8, against PyTorch on fp32."""
    ours, missing = contenders.fused, contenders.missing("edgecolbert_kernels")
    return suite.Case(
        name=name,
        parameters=shape.parameters,
        references=("int8 fast", "int8 exact"),
        rounds=rounds,
        expected=shape.float64_scores,
        tolerance=INT8_ERROR,
        contenders=[
            contenders.peak("i8"),
            Contender("int8 fast", shape.on_i8(ours, precision="fast"), shape.operations, "peak i8", missing=missing),
            contenders.peak("f32"),
            Contender("int8 exact", shape.on_i8(ours), shape.operations, "peak f32", missing=missing),
            Contender("torch eager fp32", shape.on_f32(contenders.eager), shape.operations, "peak f32"),
        ],
    )


def cases() -> Iterator[suite.Case]:
    for dim in DIMS:
        yield case(f"d={dim}", Shape(1, 32, 1000, 300, dim), rounds=(27, 7 if dim in QUICK_DIMS else 0))
    for dim in DIMS:
        yield int8_case(f"d={dim}, int8", Shape(1, 32, 1000, 300, dim), rounds=(27, 7 if dim in QUICK_DIMS else 0))


if __name__ == "__main__":
    suite.main("rerank", cases)
