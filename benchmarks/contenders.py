"""The ways to score that the suites compare: queries [Nq, Lq, d], documents [Nd, Ld, d] -> [Nq, Nd]."""

import importlib.util
import time
from functools import cache

import torch

from benchmarks import machine
from benchmarks.interleave import Contender
from edgecolbert_kernels import maxsim

BLOCK = 16  # documents a block: larger ones fall out of the caches, smaller ones starve the matmul
PEAK_SECONDS = 0.004
BANDWIDTH_BYTES = 2**28  # far beyond the caches


def eager(queries, documents, mask=None):
    """The usual lines of PyTorch: every similarity, the maximum over a document, the sum."""
    similarities = torch.einsum("qid,njd->qnij", queries, documents)
    if mask is not None:
        similarities = similarities.masked_fill(~mask[None, :, None], -torch.inf)
    return similarities.max(-1).values.sum(-1)


def eager_widened(queries, documents):
    """fp32 arithmetic on half-precision documents, as PyTorch offers it."""
    return eager(queries.float(), documents.float())


def blocked(queries, documents):
    """The fastest short PyTorch: matmul and maximum over blocks of documents that stay in cache."""
    num_queries, query_length, dim = queries.shape
    columns = queries.reshape(-1, dim).T
    blocks = [
        (block.reshape(-1, dim) @ columns).view(len(block), -1, num_queries, query_length).amax(1).sum(-1)
        for block in documents.split(BLOCK)
    ]
    return torch.cat(blocks).T


def maxsim_cpu(queries, documents):
    """The package maxsim-cpu, which scores one query a call."""
    from maxsim_cpu import maxsim_scores

    documents = documents.numpy()
    scores = [torch.from_numpy(maxsim_scores(query.numpy(), documents)) for query in queries]
    return torch.stack(scores)


def fused(queries, documents, mask=None, *, isa=None, **options):
    """This package."""
    if isa is None:
        return maxsim(queries, documents, d_mask=mask, **options)
    with machine.forced_isa(isa):
        return maxsim(queries, documents, d_mask=mask, **options)


def unscreened(queries, documents, **options):
    """This package with every similarity in fp32, or in int16, as where integers of 8 bits are no faster."""
    module = machine.compiled_module()
    before = module.set_screening(False)
    try:
        return fused(queries, documents, **options)
    finally:
        module.set_screening(before)


def missing(package: str) -> str | None:
    """Why contenders that need ``package`` cannot run, or None."""
    if package == "edgecolbert_kernels":
        return None if machine.compiled_module() else "the compiled module is not built"
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def peak(kind: str, isa: str | None = None) -> Contender:
    """The multiply-add rate of one core; ``kind`` as in ``_C.measure_peak``."""

    def measure(_turn: int) -> float:
        module = machine.compiled_module()
        with machine.forced_isa(isa or module.get_isa()):
            return module.measure_peak(kind, PEAK_SECONDS)

    return Contender(
        f"peak {kind} {isa or ''}".rstrip(),
        measure,
        returns_rate=True,
        missing=missing("edgecolbert_kernels"),
    )


@cache
def memory_to_read() -> torch.Tensor:
    return torch.ones(BANDWIDTH_BYTES // 4)


def bandwidth() -> Contender:
    """What one core reads from memory: a sum over more than the caches hold."""

    def measure(_turn: int) -> float:
        values = memory_to_read()
        start = time.perf_counter()
        values.sum()
        return values.nbytes / 1e9 / (time.perf_counter() - start)

    return Contender("read bandwidth", measure, returns_rate=True, rate_unit="GB/s")
