"""Embeddings to score: unit rows in fp16, as late-interaction models store them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from benchmarks.contenders import blocked
from benchmarks.machine import last_level_cache_bytes
from edgecolbert_kernels import PackedEmbeddings
from tests.cases import embeddings

MOST_COPIES = 16
# Tokens a document: the median, and the spread of the logarithm, of the first 1500 abstracts of SciFact in ModernBERT's tokens.
MEDIAN_LENGTH, SPREAD, LONGEST = 280, 0.4, 512


@dataclass(frozen=True)
class Inputs:
    """Equal documents at several addresses.

    Going from one copy to the next reads every byte from memory, as a store larger than the
    caches does.
    """

    queries: torch.Tensor  # [Nq, Lq, d] float16
    queries_f32: torch.Tensor
    documents: list[torch.Tensor]  # each [Nd, Ld, d] float16
    documents_f32: list[torch.Tensor]

    @cached_property
    def documents_i8(self) -> list[PackedEmbeddings]:
        """The same in int8 with a scale a document, packed."""
        return [PackedEmbeddings.from_padded(each, dtype="int8") for each in self.documents]


@dataclass(frozen=True)
class Shape:
    """Queries [num_queries, query_length, dim] against documents [num_documents, length, dim]."""

    num_queries: int
    query_length: int
    num_documents: int
    length: int
    dim: int

    @property
    def operations(self) -> float:
        """2 per multiply-add of all similarities."""
        tokens = self.num_queries * self.query_length * self.num_documents * self.length
        return 2.0 * tokens * self.dim

    @property
    def parameters(self) -> dict[str, int]:
        return asdict(self)

    def inputs(self) -> Inputs:
        return make(self)

    def float64_scores(self) -> torch.Tensor:
        given = self.inputs()
        return blocked(given.queries.double(), given.documents[0].double())

    def on_f16(self, score: Callable, **options) -> Callable[[int], torch.Tensor]:
        """``score`` on the fp16 tensors, as a contender's call."""

        def call(turn: int) -> torch.Tensor:
            given = self.inputs()
            documents = given.documents[turn % len(given.documents)]
            return score(given.queries, documents, **options)

        return call

    def on_f32(self, score: Callable, **options) -> Callable[[int], torch.Tensor]:
        """``score`` on the same values, widened to fp32 beforehand."""

        def call(turn: int) -> torch.Tensor:
            given = self.inputs()
            documents = given.documents_f32[turn % len(given.documents_f32)]
            return score(given.queries_f32, documents, **options)

        return call

    def on_i8(self, score: Callable, **options) -> Callable[[int], torch.Tensor]:
        """``score`` on the values rounded to int8 beforehand."""

        def call(turn: int) -> torch.Tensor:
            given = self.inputs()
            return score(given.queries, given.documents_i8[turn % len(given.documents_i8)], **options)

        return call


def lengths(num_documents: int, seed: int = 0) -> np.ndarray:
    """Tokens of documents as a corpus has them, log-normal and cut off at LONGEST, int64 [num_documents]."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN_LENGTH), SPREAD, num_documents)
    return drawn.clip(8, LONGEST).astype(np.int64)


@lru_cache(maxsize=1)
def make(shape: Shape) -> Inputs:
    queries = embeddings(shape.num_queries, shape.query_length, shape.dim, seed=0, dtype=torch.float16)
    documents = embeddings(shape.num_documents, shape.length, shape.dim, seed=1, dtype=torch.float16)
    copies = min(MOST_COPIES, 1 + -(-last_level_cache_bytes() // documents.nbytes))
    copied = [documents.clone() for _ in range(copies)]
    return Inputs(queries, queries.float(), copied, [copy.float() for copy in copied])
