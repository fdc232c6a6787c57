"""PyLate as it is and patched: `rank.rerank` of 1000 documents of unequal lengths, and a step of its own losses.

Rerank: one query of 32 tokens, 1000 documents of 30 to 300 tokens, as `encode` returns them (float32 arrays), 48 and 128
dimensions; documents in turn so that they do not stay in the cache. Losses: the model, texts and batches of
`benchmarks.pylate_step`, with PyLate's own classes in both contenders. Two threads, wall time.

``error`` is the largest difference of a score, or of the loss, relative. ``memory`` rows: how far the resident set of a
process of its own grows during one call, the second. PyLate is patched before a call and given back after it, which is not
timed, as a program patches once; by itself it is the row ``patch and undo``.

Needs an environment with PyLate 1.6, as `benchmarks.pylate_step`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial

import numpy as np
import torch

from benchmarks import contenders, machine, suite
from benchmarks.interleave import Contender, Samples
from benchmarks.memory import growth, own_process
from benchmarks.pylate_step import THREADS, batch, model

QUERY_LENGTH, DOCUMENTS, LENGTHS, COPIES = 32, 1000, (30, 300), 4
DIMS = (48, 128)
LOSSES = {"Contrastive": (16, 64), "Distillation": (16, 64)}
LIBRARIES = ("patched", "PyLate")


def patched(library: str) -> AbstractContextManager[object]:
    if library == "PyLate":
        return nullcontext()
    from edgecolbert_kernels.integrations.pylate import using_pylate

    return using_pylate()


@lru_cache(maxsize=1)
def texts(dim: int) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """A query, and some copies of its documents: unit tokens, similarities mostly positive as a model's are."""
    rng = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        X = rng.standard_normal((length, dim), dtype=np.float32) + 0.5
        return X / np.linalg.norm(X, axis=1, keepdims=True)

    query = tokens(QUERY_LENGTH)
    lengths = rng.integers(*LENGTHS, DOCUMENTS, endpoint=True)
    documents = [tokens(int(length)) for length in lengths]
    return query, [[d.copy() for d in documents] for _ in range(COPIES)]


def rerank(dim: int) -> Callable[[int], torch.Tensor]:
    from pylate import rank

    def call(turn: int) -> torch.Tensor:
        query, copies = texts(dim)
        rows = rank.rerank([[*range(DOCUMENTS)]], [query], [copies[turn % COPIES]])[0]
        scores = torch.empty(DOCUMENTS)
        scores[torch.tensor([row["id"] for row in rows])] = torch.tensor([row["score"] for row in rows])
        return scores

    return call


def step(loss: str, size: int) -> Callable[[int], torch.Tensor]:
    from pylate import losses

    module = getattr(losses, loss)(model())

    def call(turn: int) -> torch.Tensor:
        features, teacher = batch(loss, size)
        torch.manual_seed(turn)
        module.zero_grad()
        value = module([dict(each) for each in features], teacher)
        value.backward()
        return value.detach()

    return call


def scores_only(loss: str, size: int) -> Callable[[int], torch.Tensor]:
    """The loss from the embeddings on: what the patch can change."""
    from pylate import scores

    torch.manual_seed(0)  # the model has dropout
    with torch.no_grad():
        features, teacher = batch(loss, size)
        Q, D = (torch.nn.functional.normalize(model()(dict(each))["token_embeddings"], dim=-1) for each in features)
    mask = features[1]["attention_mask"].bool()

    def call(turn: int) -> torch.Tensor:
        q, d = Q.clone().requires_grad_(), D.clone().requires_grad_()
        if loss == "Distillation":
            kept = mask.unflatten(0, (size, -1))
            scored = scores.colbert_kd_scores(q, d.unflatten(0, (size, -1)), documents_mask=kept)
            log_probabilities = scored.log_softmax(1), teacher.log_softmax(1)
            value = torch.nn.functional.kl_div(*log_probabilities, reduction="batchmean", log_target=True)
        else:
            scored = scores.ColBERTScores()(q, d[:, None], documents_mask=mask[:, None])
            value = torch.nn.functional.cross_entropy(scored, torch.arange(size))
        value.backward()
        return value.detach()

    return call


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


KINDS = {"rerank": rerank, "step": step, "scores": scores_only}


def case(name: str, kind: str, *arguments: object, rounds: tuple[int, int]) -> suite.Case:
    call = KINDS[kind](*arguments)

    def memory(_samples: Samples) -> list[dict]:
        rows = []
        for library in LIBRARIES if sys.platform == "linux" else ():
            grown = own_process("benchmarks.pylate_rerank", kind, library, *map(str, arguments))
            rows.append({"contender": f"{library}, memory", "unit": "MiB", "p50": round(grown / 2**20, 1)})
        return rows

    return suite.Case(
        name=name,
        parameters={"pylate": machine.version("pylate")},
        contenders=[Contender(library, call, around=partial(patched, library)) for library in LIBRARIES],
        references=("patched",),
        rounds=rounds,
        warm=False,
        clock=time.perf_counter,
        threads=THREADS,
        expected=lambda: call(0),
        error=relative,
        tolerance=1e-4,
        derive=memory,
    )


def measure_memory(kind: str, library: str, *arguments: str) -> None:
    """Print the growth of the resident set, as JSON; for a process of its own."""
    machine.set_threads(THREADS)
    call = KINDS[kind](*(int(each) if each.isdigit() else each for each in arguments))
    with patched(library):
        call(0)
        print(json.dumps(growth(lambda: call(0))))


def cases() -> Iterator[suite.Case]:
    for dim in DIMS:
        yield case(f"rerank, {DOCUMENTS} documents, d={dim}", "rerank", dim, rounds=(7, 5))
    for loss, sizes in LOSSES.items():
        for size in sizes:
            yield case(f"{loss}, batch {size}, step", "step", loss, size, rounds=(5, 5))
            yield case(f"{loss}, batch {size}, from the embeddings on", "scores", loss, size, rounds=(5, 5))
    yield suite.Case(
        name="patch and undo",
        contenders=[Contender("patched", lambda turn: patch_and_undo())],
        rounds=(41, 13),
        expected=lambda: torch.zeros(()),
    )


def patch_and_undo() -> torch.Tensor:
    with patched("patched"):
        return torch.zeros(())


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(*sys.argv[2:])
        return
    reason = contenders.missing("pylate") or contenders.missing("edgecolbert_kernels")
    if reason:
        raise SystemExit(reason)
    suite.main("pylate_rerank", cases, pin=False)


if __name__ == "__main__":
    main()
