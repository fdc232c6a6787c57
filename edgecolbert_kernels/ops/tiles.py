"""InfoNCE over MaxSim by tiles of documents: softmax sums in the forward, score gradients and their maxima in the backward.

A tile is every query against some documents. With T the temperature, s_ij the scores, A_ij which documents are candidates
of query i and P_i its positives, the loss of query i is

    log sum_{j in A_i} exp(s_ij / T) - sum_j t_ij s_ij / T,   t_ij = (1 - e) [j in P_i] / |P_i| + e [j in A_i] / |A_i|

with e the label smoothing; `symmetric` averages it with the same loss over the column of each positive document. Sums run
relative to the largest score of their row or column, so that a score of 10^4 and a temperature of 10^-4 lose nothing.

What survives between the passes: everything (argmax and scores), the scores, or only the sums; see `plan`.

On a device nothing here waits for it: what depends on values is decided there (the one exception is in `_limit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgecolbert_kernels.backends import contrastive_torch, layout, select
from edgecolbert_kernels.backends.contrastive_torch import Columns, Problem, Rows, looked_at
from edgecolbert_kernels.backends.torch_ import through_normalization
from edgecolbert_kernels.ops import arguments

__all__ = ["Columns", "Plan", "Problem", "Rows", "State", "backward", "forward", "looked_at", "plan", "progress"]

# A tile's argmax, and its scores, of which some ten copies come and go; at least a few documents, to share the queries.
# On a CPU they stay in its caches; elsewhere they are large enough to fill a device.
ARGMAX_BYTES = 4 << 20
SCORES = 1 << 18
ARGMAX_BYTES_ELSEWHERE = 128 << 20
SCORES_ELSEWHERE = 1 << 22
FEWEST_DOCUMENTS = 16
# Chosen pairs are a little slower each than all pairs.
DENSE = 0.7

_progress: ContextVar[Callable[[int, int], None] | None] = ContextVar("edgecolbert_progress", default=None)


class Plan(NamedTuple):
    keep_argmax: bool
    keep_scores: bool


class Setting(NamedTuple):
    """What contexts decide. The backward of a device runs in a thread of its own, which does not see those of its caller."""

    backend: ModuleType
    report: Callable[[int, int], None] | None


class State(NamedTuple):
    """What the backward needs of the forward. Empty tensors stand for what was not kept."""

    rows: Tensor  # float64 [5, Nq]: see `Rows`
    columns: Tensor  # float64 [3, Nd]: see `Columns`; empty unless symmetric
    scores: Tensor  # [Nq, Nd]
    argmax: Tensor


@contextmanager
def progress(report: Callable[[int, int], None]) -> Iterator[None]:
    """Call `report(done, total)` after every tile of either pass inside the `with` block; counted in documents."""
    token = _progress.set(report)
    try:
        yield
    finally:
        _progress.reset(token)


def plan(Q: Tensor, D: Tensor, save_scores: bool | None, max_saved_bytes: int) -> Plan:
    """What is kept for the backward: scores and argmax where both fit, else the scores where they fit or are asked for."""
    pairs = Q.shape[0] * D.shape[0]
    scores = pairs * (8 if arguments.arithmetic(Q, D) == "float64" else 4)
    argmax = pairs * Q.shape[1] * (2 if layout.argmax_is_int16(D, None) else 4)
    if save_scores is False:
        return Plan(False, False)
    keep_argmax = bool(scores + argmax <= max_saved_bytes)
    return Plan(keep_argmax, keep_argmax or bool(save_scores) or bool(scores <= max_saved_bytes))


def setting(problem: Problem) -> Setting:
    """Of this thread."""
    return Setting(select("maxsim", problem.Q.device.type, arguments.arithmetic(problem.Q, problem.D)), _progress.get())


def forward(problem: Problem, kept: Plan, chosen: Setting) -> tuple[Tensor, State]:
    """The loss of every query `[Nq]`, 0 for one without a positive."""
    source = _Source(problem, chosen)
    scores, argmax = source.score(slice(None), with_argmax=kept.keep_argmax) if kept.keep_scores else (None, None)
    sums = source.arithmetic.RowSums(problem, _limit(problem, source), source.dtype)
    for some in source.tiles(kept.keep_scores and sums.takes_everything):
        sums.add(source.score(some)[0] if scores is None else _columns(scores, some), some)
    loss, rows, columns = sums.finish()
    if scores is None:
        scores = source.empty()
    if argmax is None:
        argmax = source.Q.new_empty(0, dtype=torch.int32)
    return loss, State(rows, columns, scores, argmax)


def backward(
    grad: Tensor,
    problem: Problem,
    state: State,
    chosen: Setting,
    need_queries: bool,
    need_documents: bool,
    need_temperature: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to Q, D and the temperature from those to the losses, `grad [Nq]`."""
    source = _Source(problem, chosen)
    weights = source.arithmetic.Weights(grad, problem, state.rows, state.columns, source.dtype, need_temperature)
    keep_scores, keep_argmax = state.scores.numel() > 0, state.argmax.numel() > 0
    need_tokens = need_queries or need_documents
    everything = torch.empty_like(state.scores) if keep_argmax and need_tokens else None
    sums = source.sums() if need_queries and everything is None else None
    grad_documents = torch.empty_like(problem.D, memory_format=torch.contiguous_format) if need_documents else None
    for some in source.tiles(everything is not None and weights.takes_everything):
        with_argmax = need_tokens and not source.recomputes
        tile, argmax = (
            (_columns(state.scores, some), None) if keep_scores else source.score(some, with_argmax=with_argmax)
        )
        gradient = weights.of(tile, some, None if everything is None else _columns(everything, some))
        if everything is None and need_tokens:
            found = source.backward(gradient, some, argmax, sums, need_documents)
            if grad_documents is not None and found is not None:
                grad_documents[some] = found
    grad_queries = None
    if everything is not None:
        grad_queries, grad_documents = source.backward_everything(
            everything, state.argmax, need_queries, need_documents
        )
    elif sums is not None:
        grad_queries = (through_normalization(sums, problem.Q) if problem.normalize else sums).to(problem.Q.dtype)
    if not need_temperature:
        return grad_queries, grad_documents, None
    return grad_queries, grad_documents, weights.temperature_gradient().to(problem.temperature.dtype)


class _Source:
    """Scores and token gradients of tiles, from the backend that runs MaxSim."""

    def __init__(self, problem: Problem, chosen: Setting):
        self.Q, self.D, self.q_mask, self.d_mask = problem[:4]
        self.options = problem.normalize, problem.mask_mode, "exact"
        self.backend, self.report = chosen
        self.dtype = getattr(torch, arguments.arithmetic(self.Q, self.D))
        # What sums scores and weighs them: a backend of a GPU has kernels for it.
        self.arithmetic: Any = self.backend if hasattr(self.backend, "RowSums") else contrastive_torch
        # Whether the backend finds winners itself, of the pairs whose gradient is not 0, without a word to the host.
        self.recomputes = hasattr(self.backend, "backward_recompute")

    def empty(self) -> Tensor:
        return self.Q.new_empty(0, dtype=self.dtype)

    def sums(self) -> Tensor:
        return torch.zeros(self.Q.shape, dtype=self.dtype, device=self.Q.device)

    def tiles(self, everything: bool) -> Iterator[slice]:
        """Documents, so many that a tile's argmax and scores stay small; or all of them, where the scores are there."""
        count, report = self.D.shape[0], self.report
        tokens, queries = max(1, self.Q.shape[0] * self.Q.shape[1]), max(1, self.Q.shape[0])
        on_cpu = self.Q.device.type == "cpu"
        argmax, scores = (ARGMAX_BYTES, SCORES) if on_cpu else (ARGMAX_BYTES_ELSEWHERE, SCORES_ELSEWHERE)
        size = max(FEWEST_DOCUMENTS, min(argmax // (2 * tokens), scores // queries))
        if everything:
            size = max(1, count)
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))
            if report is not None:
                report(min(start + size, count), count)

    def documents(self, some: slice) -> tuple[Tensor, Tensor | None]:
        # A view of everything costs microseconds as well.
        if some.start in (None, 0) and some.stop in (None, self.D.shape[0]):
            return self.D, self.d_mask
        return self.D[some], None if self.d_mask is None else self.d_mask[some]

    def score(
        self, some: slice, pairs: tuple[Tensor, Tensor] | None = None, with_argmax: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        D, d_mask = self.documents(some)
        batch = self.q_mask, d_mask, None, None, *(pairs or (None, None))
        return self.backend.forward(self.Q, D, *batch, *self.options, with_argmax)

    def backward(
        self, gradient: Tensor, some: slice, argmax: Tensor | None, sums: Tensor | None, need_documents: bool
    ) -> Tensor | None:
        """Adds to `sums` and returns the gradient to the documents of a tile.

        Without the tile's argmax it is found here: of all pairs, or where most weigh nothing, of the others.
        """
        D, d_mask = self.documents(some)
        pairs = None
        needs = sums is not None, need_documents, sums
        if argmax is None and self.recomputes:
            batch = self.q_mask, d_mask, None, None, None, None
            return self.backend.backward_recompute(gradient, self.Q, D, *batch, *self.options, *needs)[1]
        if argmax is None:
            nonzero = gradient != 0
            count = int(nonzero.sum())
            if not count:
                return torch.zeros_like(D) if need_documents else None
            if count <= DENSE * gradient.numel():
                query, document = nonzero.nonzero(as_tuple=True)
                pairs = query.contiguous(), document.contiguous()
                gradient = gradient[pairs]
            argmax = self.score(some, pairs, with_argmax=True)[1]
        batch = self.q_mask, d_mask, None, None, *(pairs or (None, None))
        return self.backend.backward(gradient, self.Q, D, argmax, *batch, *self.options, *needs)[1]

    def backward_everything(
        self, gradient: Tensor, argmax: Tensor, need_queries: bool, need_documents: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        batch = self.q_mask, self.d_mask, None, None, None, None
        needs = need_queries, need_documents
        return self.backend.backward(gradient, self.Q, self.D, argmax, *batch, *self.options, *needs)


def _columns(table: Tensor, some: slice) -> Tensor:
    return table if some.stop - some.start == table.shape[1] else table[:, some]


def _limit(problem: Problem, source: _Source) -> Tensor | None:
    """The score from which on a negative is dropped: the margin's fraction of the lowest positive's score, `[Nq]`."""
    if problem.margin is None:
        return None
    if problem.target.dtype == torch.bool:
        # As many as there happen to be: a device is waited for here.
        query, document = problem.target.nonzero(as_tuple=True)
        lowest = torch.full((problem.Q.shape[0],), torch.inf, dtype=source.dtype, device=problem.Q.device)
        if len(query):
            scores = source.score(slice(None), (query.contiguous(), document.contiguous()))[0]
            lowest.scatter_reduce_(0, query, scores, "amin")
    elif not problem.target.numel() or not problem.D.shape[0]:
        lowest = problem.target.new_full(problem.target.shape, torch.inf, dtype=source.dtype)
    else:
        query = torch.arange(problem.target.shape[0], device=problem.target.device)
        scores = source.score(slice(None), (query, problem.target.clamp(0, problem.D.shape[0] - 1)))[0]
        lowest = scores.masked_fill(problem.target < 0, torch.inf)
    # As a fraction of a positive score; a negative one moves down as well.
    return lowest - (1 - problem.margin) * lowest.abs()
