"""From an encoder's last states to packed fp16: project 256 -> 48, normalise, drop masked tokens, round; one thread, CPU time.

256 documents padded to 300 tokens, with holes in the mask. PyTorch does the same in the usual four lines.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from benchmarks import contenders, suite
from benchmarks.interleave import Contender
from edgecolbert_kernels import pack
from tests.cases import embeddings, holes

DOCUMENTS, LENGTH, HIDDEN, DIM = 256, 300, 256, 48


@lru_cache(maxsize=1)
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = embeddings(DOCUMENTS, LENGTH, HIDDEN, seed=0, norm=None)
    return hidden, holes(DOCUMENTS, LENGTH), embeddings(DIM, HIDDEN, seed=1)


def eager(hidden: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(hidden @ weight.T, dim=-1)[mask]


def projected(_turn: int) -> torch.Tensor:
    """What both must do: the matmul, which is PyTorch's in both."""
    hidden, _, weight = inputs()
    return hidden @ weight.T


def error(found: torch.Tensor | np.ndarray, expected: torch.Tensor) -> float:
    return suite.largest_error(np.asarray(found, np.float64), expected)


def cases() -> Iterator[suite.Case]:
    hidden, mask, weight = inputs()
    states = projected(0)
    missing = contenders.missing("edgecolbert_kernels")
    shared = {"documents": DOCUMENTS, "length": LENGTH, "hidden": HIDDEN, "dim": DIM}
    yield suite.Case(
        name="project and pack",
        parameters=shared,
        references=("pack",),
        contenders=[
            Contender("pack", lambda _turn: pack(hidden, mask, weight).tokens, missing=missing),
            Contender("torch eager", lambda _turn: eager(hidden, mask, weight).half()),
            Contender("the matmul alone", lambda turn: projected(turn)[mask], tolerance=float("inf")),
        ],
        rounds=(21, 7),
        expected=lambda: eager(hidden.double(), mask, weight.double()),
        error=error,
    )
    yield suite.Case(
        name="pack",
        parameters=shared,
        references=("pack",),
        contenders=[
            Contender("pack", lambda _turn: pack(states, mask).tokens, missing=missing),
            Contender("torch eager", lambda _turn: torch.nn.functional.normalize(states, dim=-1)[mask].half()),
        ],
        rounds=(41, 13),
        expected=lambda: eager(hidden.double(), mask, weight.double()),
        error=error,
    )


if __name__ == "__main__":
    suite.main("packing", cases)
