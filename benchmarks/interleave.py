"""Contenders timed in turns, in one process.

A shared machine changes its clock and its load from second to second, so two programs timed one after the other compare
two machines. Here every round times each contender once; a ratio is taken between two times of the same round, and the
median of these ratios is what a row reports.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import machine

QUANTILES = {"p20": 20, "p50": 50, "p80": 80}
# A round counts when a core started at least this share of the instructions a cycle that it did in the best round.
QUIET = 0.85
FEWEST_QUIET = 5


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case.

    ``call(turn)`` does the work once; the number of the round picks the inputs, so that they can rotate past the
    caches. ``operations`` counts 2 per multiply-add, 0 where a rate means nothing. ``peak`` names the contender of the
    same case whose rate is the limit. A contender with ``returns_rate`` is such a limit: it times itself and returns
    a rate in ``rate_unit``. ``missing`` says why it cannot run here. ``tolerance`` stands for the case's where a contender is
    inexact by design: its error is a column all the same. ``around`` makes what a call runs in; entering and leaving it is
    not timed.
    """

    name: str
    call: Callable[[int], object] = field(repr=False)
    operations: float = 0.0
    peak: str | None = None
    returns_rate: bool = False
    missing: str | None = None
    tolerance: float | None = None
    rate_unit: str = "G operations/s"
    around: Callable[[], AbstractContextManager[object]] = field(default=nullcontext, repr=False)

    def once(self, turn: int) -> object:
        with self.around():
            return self.call(turn)


@dataclass(frozen=True)
class Samples:
    """One number a round for each contender: seconds a call, or the rate of a limit."""

    values: Mapping[str, np.ndarray]
    cpu: Mapping[str, np.ndarray]  # seconds a call, summed over threads
    waited: np.ndarray  # share of each round that our threads were ready but had no core
    dispatched: np.ndarray  # instructions a cycle around each round; 0 where unknown

    def ratio(self, slow: str, fast: str) -> np.ndarray:
        return self.values[slow] / self.values[fast]

    def percent_of_peak(self, contender: Contender) -> np.ndarray:
        rate = contender.operations / self.values[contender.name] / 1e9
        return 100 * rate / self.values[contender.peak]


def quantiles(values: np.ndarray, digits: int = 4) -> dict[str, float]:
    return {name: float(f"{np.percentile(values, percent):.{digits}g}") for name, percent in QUANTILES.items()}


def waiting_seconds() -> float:
    """Time that threads of this process were ready to run without a core, 0 where unknown."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError):
            continue
    return total / 1e9


def dispatch_rate() -> float:
    """Instructions that a core starts a cycle now, the least of this thread's cores; 0 where unknown."""
    module = machine.compiled_module()
    return min(machine.on_each_core(module.dispatch_rate)) if module else 0.0


def quiet_rounds(dispatched: np.ndarray) -> np.ndarray:
    """Numbers of the rounds that had the core to themselves; all of them where those are too few to tell."""
    quiet = np.flatnonzero(dispatched >= QUIET * dispatched.max())
    return quiet if len(quiet) >= FEWEST_QUIET else np.arange(len(dispatched))


def interleave(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    calls: int = 1,
    clock: Callable[[], float] = time.process_time,
    keep: float = 1.0,
    warm: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Time every contender once a round, for ``rounds`` rounds.

    What is timed follows a call of the same contender on other inputs, as in a loop in a process of its own. Else a
    contender has to map memory from the system that another one has given back, or finds what another one has left:
    PyTorch's eager lines, 33 ms in a loop of their own, then take 37 to 56 for a forward and a backward.

    A virtual machine shares its cores with others, a hyperthread each. While the other one is busy, a core starts about
    half as many instructions a cycle; loads and conversions suffer, and multiply-adds on registers, so the peak, do not.
    Every round is enclosed by a measurement of that rate on every core that may be used, and rounds in which one was low
    do not count.

    Args:
        calls: calls behind one sample, for work shorter than the clock's resolution.
        clock: ``time.process_time`` (CPU time of all threads: other processes do not count) or
            ``time.perf_counter`` (needed where several threads share the work).
        keep: share of the quiet rounds kept, those in which this process waited least for a core.
            Below 1 only for wall-clock times, which other processes lengthen.
        warm: whether the call before comes first; a suite's check has called each contender once in any case.
    """
    machine.release_free_memory()  # what a reference needed
    values = {contender.name: np.empty(rounds) for contender in contenders}
    cpu = {contender.name: np.empty(rounds) for contender in contenders}
    waited, dispatched = np.empty(rounds), np.empty(rounds)
    rate = dispatch_rate()
    for turn in range(rounds):
        waited_before, wall_before = waiting_seconds(), time.perf_counter()
        # Another order every round, so that no contender always finds the caches as the same one leaves them.
        for place in np.random.default_rng(turn).permutation(len(contenders)):
            contender = contenders[place]
            if contender.returns_rate:
                values[contender.name][turn] = contender.call(turn)
                continue
            if warm:
                contender.once(turn + 1)
            with contender.around():
                cpu_start, start = time.process_time(), clock()
                for _ in range(calls):
                    contender.call(turn)
                values[contender.name][turn] = (clock() - start) / calls
                cpu[contender.name][turn] = (time.process_time() - cpu_start) / calls
        wall = time.perf_counter() - wall_before
        waited[turn] = (waiting_seconds() - waited_before) / wall
        before, rate = rate, dispatch_rate()
        dispatched[turn] = min(before, rate)
        progress(turn + 1, rounds)
    quiet = quiet_rounds(dispatched)
    kept = quiet[np.argsort(waited[quiet], kind="stable")[: max(1, round(keep * len(quiet)))]]
    kept.sort()
    chosen = ({name: of[kept] for name, of in each.items()} for each in (values, cpu))
    return Samples(*chosen, waited[kept], dispatched[kept])
