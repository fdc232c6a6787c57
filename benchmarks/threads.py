"""One thread beside two, four, ... and all cores, wall-clock time.

Only the half of the rounds in which this process waited least for a core counts: a core that another process holds
cannot show what a second thread gains. Where no round is quiet, the ``by CPU time`` rows still tell: two threads that
together use the CPU time of one, waiting for each other included, halve the time on free cores.

A time is that of many calls in a row: a core that was idle takes some milliseconds to reach its clock, and the single
thread before it leaves one idle.
"""

import os
import time
from collections.abc import Callable, Iterator

from benchmarks import contenders, machine, suite
from benchmarks.inputs import Shape
from benchmarks.interleave import Contender, Samples, quantiles

PRECISIONS = ("exact", "fast")


def thread_counts() -> list[int]:
    """1, 2, 4, ... and the number of cores."""
    cores = len(os.sched_getaffinity(0))
    return sorted({*(2**power for power in range(cores.bit_length()) if 2**power <= cores), cores})


def on_threads(threads: int, call: Callable) -> Callable[[int], object]:
    def run(turn: int) -> object:
        machine.set_threads(threads)
        return call(turn)

    return run


def by_cpu_time(samples: Samples) -> list[dict]:
    return [
        {
            "contender": f"{precision}, by CPU time",
            "unit": "x",
            **quantiles(2 * samples.cpu[f"{precision} 1 thread"] / samples.cpu[f"{precision} 2 threads"]),
        }
        for precision in PRECISIONS
        if f"{precision} 2 threads" in samples.cpu
    ]


def case(name: str, shape: Shape, calls: int) -> suite.Case:
    missing = contenders.missing("edgecolbert_kernels")
    counts = thread_counts()
    if len(counts) < 2:
        missing = "there is one core"
    return suite.Case(
        name=name,
        parameters=shape.parameters,
        references=[f"{precision} {threads} threads" for precision in PRECISIONS for threads in counts[1:]],
        contenders=[
            Contender(
                f"{precision} {threads} thread{'s'[: threads - 1]}",
                on_threads(threads, shape.on_f16(contenders.fused, precision=precision)),
                missing=missing,
            )
            for precision in PRECISIONS
            for threads in counts
        ],
        rounds=(41, 15),
        calls=calls,
        clock=time.perf_counter,
        keep=0.5,
        expected=shape.float64_scores,
        threads=counts[-1],
        derive=by_cpu_time,
    )


def cases() -> Iterator[suite.Case]:
    yield case("1 query", Shape(1, 32, 1000, 300, 48), calls=24)
    yield case("32 queries", Shape(32, 32, 1000, 300, 48), calls=2)


if __name__ == "__main__":
    suite.main("threads", cases, pin=False)
