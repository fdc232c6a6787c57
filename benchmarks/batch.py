"""32 queries (Lq = 32) against 1000 fp16 documents of 300 tokens, one thread, CPU time."""

from collections.abc import Iterator

from benchmarks import rerank, suite
from benchmarks.inputs import Shape


def cases() -> Iterator[suite.Case]:
    yield rerank.case("d=48", Shape(32, 32, 1000, 300, 48), rounds=(7, 3))


if __name__ == "__main__":
    suite.main("batch", cases)
