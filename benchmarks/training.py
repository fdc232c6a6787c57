"""Forward and backward in a batch, Lq = 32, Ld = 180, d = 48, fp32, one thread, CPU time.

Every query is scored against every document; both get gradients. ``saved`` rows count what the
forward keeps for the backward beside its inputs.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch

from benchmarks import contenders, suite
from benchmarks.inputs import Shape
from benchmarks.interleave import Contender, Samples
from tests.cases import embeddings


@lru_cache(maxsize=1)
def batch(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, documents, the gradient of the scores, and a mask that keeps half to all tokens."""
    queries = embeddings(shape.num_queries, shape.query_length, shape.dim, seed=0)
    documents = embeddings(shape.num_documents, shape.length, shape.dim, seed=1)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(shape.num_queries, shape.num_documents, generator=generator)
    lengths = torch.randint(shape.length // 2, shape.length + 1, (shape.num_documents, 1), generator=generator)
    mask = torch.arange(shape.length) < lengths
    return queries.requires_grad_(), documents.requires_grad_(), grad, mask


def step(score: Callable, shape: Shape, masked: bool) -> Callable[[int], tuple[torch.Tensor, ...]]:
    def call(_turn: int) -> tuple[torch.Tensor, ...]:
        queries, documents, grad, mask = batch(shape)
        scores = score(queries, documents, mask if masked else None)
        return torch.autograd.grad(scores, (queries, documents), grad)

    return call


def saved_bytes(score: Callable, shape: Shape, masked: bool) -> int:
    """Memory that autograd holds between forward and backward, without the inputs."""
    queries, documents, _, mask = batch(shape)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (queries, documents, mask)}
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = score(queries, documents, mask if masked else None)
    assert scores.requires_grad
    return sum(held.values())


def relative_error(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Distance of the gradients in norm: among 500,000 maxima a few are ties up to rounding."""
    pairs = zip(found, expected, strict=True)
    return max(((f - e).norm() / e.norm()).item() for f, e in pairs)


def case(size: int, masked: bool, rounds: tuple[int, int]) -> suite.Case:
    shape = Shape(size, 32, size, 180, 48)
    scorers = {"fused": contenders.fused, "torch eager": contenders.eager}
    missing = {"fused": contenders.missing("edgecolbert_kernels"), "torch eager": None}

    def saved(_samples: Samples) -> list[dict]:
        winners = shape.num_queries * shape.query_length * shape.num_documents
        return [
            {
                "contender": f"{name}, saved",
                "unit": "bytes a (query token, document)",
                "p50": round(saved_bytes(score, shape, masked) / winners, 2),
            }
            for name, score in scorers.items()
            if not missing[name]
        ]

    return suite.Case(
        name=f"{size}x{size}" + ", document mask" * masked,
        parameters={**shape.parameters, "masked": masked},
        references=("fused",),
        contenders=[
            Contender(name, step(score, shape, masked), missing=missing[name]) for name, score in scorers.items()
        ],
        rounds=rounds,
        expected=lambda: step(contenders.eager, shape, masked)(0),
        error=relative_error,
        tolerance=2e-2,
        derive=saved,
    )


def cases() -> Iterator[suite.Case]:
    for size, rounds in ((32, (21, 7)), (128, (7, 0))):
        for masked in (False, True):
            yield case(size, masked, rounds)


if __name__ == "__main__":
    suite.main("training", cases)
