"""The losses, forward and backward: Lq = 32, Ld = 180, d = 48, fp32, one thread, CPU time.

The contrastive loss of a batch in its three ways to remember (scores and argmax kept, scores alone, nothing) beside the usual
lines of PyTorch; distillation over 16 candidates a query, from unit embeddings and from others, which the kernels or PyTorch
divide by their norms; and memory, each size in a process of its own. The full run ends with one batch of 4096 on all cores,
wall-clock.
"""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import contenders, machine, suite
from benchmarks.inputs import Shape
from benchmarks.interleave import Contender, Samples
from benchmarks.training import relative_error
from edgecolbert_kernels import contrastive_loss, distillation_loss
from edgecolbert_kernels.ops.tiles import progress
from tests.cases import embeddings

LENGTH, DIM = 180, 48
REGIMES: dict[str, dict] = {
    "kept": {},
    "scores kept": {"save_scores": True, "max_saved_bytes": 0},
    "recomputed": {"save_scores": False},
}
# Batches whose memory is measured: eager keeps the similarities of all tokens, so that its is derived from a small one.
EAGER, TRACKED, LARGE = 128, 1024, 4096


@lru_cache(maxsize=1)
def batch(size: int, candidates: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, documents and a teacher's scores. A query's document holds its tokens under noise that goes from little to
    so much that others score higher: a softmax that is sure of every query has no gradient but rounding."""
    queries = embeddings(size, 32, DIM, seed=0)
    documents = embeddings(size, *((candidates,) if candidates else ()), LENGTH, DIM, seed=1)
    noise = torch.linspace(1, 4, size)[:, None, None] * embeddings(size, 32, DIM, seed=2)
    of_query = documents[:, 0] if candidates else documents
    of_query[:, :32] = torch.nn.functional.normalize(queries + noise, dim=-1)
    return queries.requires_grad_(), documents.requires_grad_(), embeddings(size, max(1, candidates), seed=3, norm=None)


def eager_contrastive(queries: torch.Tensor, documents: torch.Tensor, *, temperature: float) -> torch.Tensor:
    scores = contenders.eager(queries, documents)
    return torch.nn.functional.cross_entropy(scores / temperature, torch.arange(len(queries)))


def eager_distillation(queries: torch.Tensor, documents: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("qid,qkjd->qkij", queries, documents).max(-1).values.sum(-1)
    lowest, highest = scores.min(1, keepdim=True)[0], scores.max(1, keepdim=True)[0]
    log_s = ((scores - lowest) / (highest - lowest + 1e-8)).log_softmax(1)
    return torch.nn.functional.kl_div(log_s, teacher.log_softmax(1), reduction="batchmean", log_target=True)


def step(loss: Callable, size: int, candidates: int = 0, **options) -> Callable[[int], tuple[torch.Tensor, ...]]:
    def call(_turn: int) -> tuple[torch.Tensor, ...]:
        queries, documents, teacher = batch(size, candidates)
        value = loss(queries, documents, *((teacher,) if candidates else ()), **options)
        return torch.autograd.grad(value, (queries, documents))

    return call


def contrastive(size: int, temperature: float, rounds: tuple[int, int]) -> suite.Case:
    missing = contenders.missing("edgecolbert_kernels")
    eager = step(eager_contrastive, size, temperature=temperature)
    return suite.Case(
        name=f"{size}x{size}, T={temperature:g}",
        parameters={**Shape(size, 32, size, LENGTH, DIM).parameters, "temperature": temperature},
        references=tuple(REGIMES),
        contenders=[
            *(
                Contender(name, step(contrastive_loss, size, temperature=temperature, **regime), missing=missing)
                for name, regime in REGIMES.items()
            ),
            Contender("torch eager", eager),
        ],
        rounds=rounds,
        expected=lambda: eager(0),
        error=relative_error,
        tolerance=2e-2,
        derive=memory if size == EAGER and temperature == 1.0 else lambda samples: [],
    )


def after_normalize(loss: Callable) -> Callable:
    def call(queries: torch.Tensor, documents: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        normalize = torch.nn.functional.normalize
        return loss(normalize(queries, dim=-1), normalize(documents, dim=-1), teacher)

    return call


def distillation(size: int, candidates: int, normalize: bool, rounds: tuple[int, int]) -> suite.Case:
    missing = contenders.missing("edgecolbert_kernels")
    eager = step(after_normalize(eager_distillation) if normalize else eager_distillation, size, candidates)
    fused = {"fused": step(distillation_loss, size, candidates)}
    if normalize:
        fused = {
            "normalize=True": step(distillation_loss, size, candidates, normalize=True),
            "fused after PyTorch's": step(after_normalize(distillation_loss), size, candidates),
        }
    return suite.Case(
        name=f"{'normalisation and ' * normalize}distillation, {size}x{candidates}",
        parameters=Shape(size, 32, size * candidates, LENGTH, DIM).parameters,
        references=tuple(fused)[:1],
        contenders=[
            *(Contender(name, call, missing=missing) for name, call in fused.items()),
            Contender("torch eager", eager),
        ],
        rounds=rounds,
        expected=lambda: eager(0),
        error=relative_error,
        tolerance=2e-2,
    )


def cases() -> Iterator[suite.Case]:
    for size, rounds in ((32, (21, 7)), (128, (7, 0))):
        for temperature in (1.0, 0.02):
            yield contrastive(size, temperature, rounds)
    for normalize in (False, True):
        yield distillation(32, 16, normalize, (21, 7))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def growth(call: Callable[[], Sequence[torch.Tensor]]) -> tuple[int, float]:
    """How far resident memory rises, what the call returns not counted, and the seconds it takes."""
    highest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident_bytes())

    # Memory that was freed and not given back would be used again unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = resident_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        returned = sum(each.nbytes for each in call())
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return max(0, highest - before - returned), seconds


def measure(size: int, temperature: float, eager: bool, cores: set[int], answer: Any) -> None:
    """Memory beside inputs and gradients, and seconds; the whole of a process."""
    os.sched_setaffinity(0, cores)
    machine.set_threads(len(cores))
    options = {"temperature": temperature, **({} if eager else REGIMES["recomputed"])}
    loss = eager_contrastive if eager else contrastive_loss
    # Libraries load and pools grow with the first call.
    step(loss, 32, **options)(0)
    batch(size, 0)
    with show(size) if size == LARGE else contextlib.nullcontext():
        answer.put(growth(lambda: step(loss, size, **options)(0)))


@contextlib.contextmanager
def show(size: int) -> Iterator[None]:
    """A bar over the documents of both passes."""
    if contenders.missing("tqdm"):
        yield
        return
    from tqdm import tqdm

    with tqdm(total=2 * size, unit=" documents") as bar:

        def report(done: int, _total: int) -> None:
            bar.update((done - bar.n) % size or size)

        with progress(report):
            yield


def apart(size: int, temperature: float, *, eager: bool = False, cores: set[int] | None = None) -> tuple[int, float]:
    """`measure` in a process of its own, where nothing was freed before that could be used again."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    given = size, temperature, eager, cores or os.sched_getaffinity(0), answer
    process = context.Process(target=measure, args=given)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process for {size}x{size} ended with {process.exitcode}")
    return answer.get()


def memory(_samples: Samples) -> list[dict]:
    if contenders.missing("edgecolbert_kernels") or not Path("/proc/self/statm").exists():
        return []
    megabytes = {
        f"recomputed, memory at {TRACKED}x{TRACKED}, T={temperature:g}": apart(TRACKED, temperature)[0] / 2**20
        for temperature in (1.0, 0.02)
    }
    eager = apart(EAGER, 1.0, eager=True)[0] / 2**20
    megabytes[f"torch eager, memory at {EAGER}x{EAGER}"] = eager
    megabytes[f"torch eager, memory at {TRACKED}x{TRACKED}, derived"] = eager * (TRACKED / EAGER) ** 2
    return [{"contender": name, "unit": "MB", "p50": round(value, 1)} for name, value in megabytes.items()]


if __name__ == "__main__":
    every_core = os.sched_getaffinity(0)
    suite.main("losses", cases)
    if "--quick" not in sys.argv:
        print(f"losses: {LARGE}x{LARGE}, T=0.02, {len(every_core)} threads", flush=True)
        extra, seconds = apart(LARGE, 0.02, cores=every_core)
        print(f"  recomputed{seconds:>28.4g} s  {extra / 2**20:.1f} MB beside inputs and gradients")
