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
from typing import NamedTuple

import torch
from torch import Tensor

from edgecolbert_kernels.backends import layout, select
from edgecolbert_kernels.backends.torch_ import through_normalization
from edgecolbert_kernels.ops import arguments

# A tile's argmax, and its scores, of which some ten copies come and go; at least a few documents, to share the queries.
# On a CPU they stay in its caches; elsewhere they are large enough to fill a device.
ARGMAX_BYTES = 4 << 20
SCORES = 1 << 18
ARGMAX_BYTES_ELSEWHERE = 128 << 20
SCORES_ELSEWHERE = 1 << 22
FEWEST_DOCUMENTS = 16
# Chosen pairs are a little slower each than all pairs.
DENSE = 0.7

# Fewer numbers than PyTorch's threads share, which would make a sum's bits depend on how many they are.
UNSPLIT = 1 << 14

_progress: ContextVar[Callable[[int, int], None] | None] = ContextVar("edgecolbert_progress", default=None)


class Problem(NamedTuple):
    """What both passes are given. Q `[Nq, Lq, d]`, D `[Nd, Ld, d]`, masks in their shapes, as backends read them."""

    Q: Tensor
    D: Tensor
    q_mask: Tensor | None
    d_mask: Tensor | None
    target: Tensor  # [Nq] int64, negative: the row has no loss; or bool [Nq, Nd]
    exclude: Tensor | None  # bool [Nq, Nd]
    temperature: Tensor  # []
    label_smoothing: float
    margin: float | None
    symmetric: bool
    normalize: bool
    mask_mode: str


class Plan(NamedTuple):
    keep_argmax: bool
    keep_scores: bool


class State(NamedTuple):
    """What the backward needs of the forward. Empty tensors stand for what was not kept."""

    rows: Tensor  # float64 [5, Nq]: see `Rows`
    columns: Tensor  # float64 [3, Nd]: see `Columns`; empty unless symmetric
    scores: Tensor  # [Nq, Nd]
    argmax: Tensor


class Rows(NamedTuple):
    """Of every query, `[Nq]`."""

    largest: Tensor  # score of a candidate
    log_sum: Tensor  # log of the sum of exp((score - largest) / T) over the candidates
    largest_negative: Tensor  # score of a candidate that is no positive
    limit: Tensor  # from this score on, negatives are dropped
    candidates: Tensor


class Columns(NamedTuple):
    """Of every document, `[Nd]`, over the queries that it is a candidate of."""

    largest: Tensor
    log_sum: Tensor
    queries: Tensor


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


def forward(problem: Problem, kept: Plan) -> tuple[Tensor, State]:
    """The loss of every query `[Nq]`, 0 for one without a positive."""
    source = _Source(problem)
    scores, argmax = source.empty(), source.Q.new_empty(0, dtype=torch.int32)
    if kept.keep_scores:
        scores, found = source.score(slice(None), with_argmax=kept.keep_argmax)
        argmax = argmax if found is None else found
    limit = _limit(problem, source)
    rows = _RowSums(problem, source.dtype)
    columns: list[Tensor] = []
    for some in source.tiles():
        tile = scores[:, some] if kept.keep_scores else source.score(some)[0]
        entries = _Entries(problem, tile, some, limit)
        rows.add(entries)
        if problem.symmetric:
            columns.append(rows.add_columns(entries))
    loss, summary = rows.finish(limit)
    found_columns = torch.cat(columns, 1) if columns else summary.new_empty(3 * problem.symmetric, 0)
    return loss, State(summary, found_columns, scores, argmax)


def backward(
    grad: Tensor, problem: Problem, state: State, need_queries: bool, need_documents: bool, need_temperature: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to Q, D and the temperature from those to the losses, `grad [Nq]`."""
    source = _Source(problem)
    weights = _Weights(grad, problem, state, source.dtype)
    keep_scores, keep_argmax = state.scores.numel() > 0, state.argmax.numel() > 0
    need_tokens = need_queries or need_documents
    everything = torch.empty_like(state.scores) if keep_argmax and need_tokens else None
    sums = source.sums() if need_queries and everything is None else None
    grad_documents = torch.empty_like(problem.D, memory_format=torch.contiguous_format) if need_documents else None
    for some in source.tiles():
        with_argmax = need_tokens and not source.recomputes
        tile, argmax = (state.scores[:, some], None) if keep_scores else source.score(some, with_argmax=with_argmax)
        gradient = weights.of(_Entries(problem, tile, some, weights.rows.limit), some, need_temperature)
        if everything is not None:
            everything[:, some] = gradient
        elif need_tokens:
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
    return grad_queries, grad_documents, weights.grad_temperature.to(problem.temperature.dtype)


def looked_at(Q: Tensor) -> bool:
    """Whether the values of targets and temperature are checked before the tiles: elsewhere that would wait for a device."""
    return Q.device.type == "cpu"


class _Source:
    """Scores and token gradients of tiles, from the backend that runs MaxSim."""

    def __init__(self, problem: Problem):
        self.Q, self.D, self.q_mask, self.d_mask = problem[:4]
        self.options = problem.normalize, problem.mask_mode, "exact"
        arithmetic = arguments.arithmetic(self.Q, self.D)
        self.backend = select("maxsim", self.Q.device.type, arithmetic)
        self.dtype = getattr(torch, arithmetic)
        # Whether the backend finds winners itself, of the pairs whose gradient is not 0, without a word to the host.
        self.recomputes = hasattr(self.backend, "backward_recompute")

    def empty(self) -> Tensor:
        return self.Q.new_empty(0, dtype=self.dtype)

    def sums(self) -> Tensor:
        return torch.zeros(self.Q.shape, dtype=self.dtype, device=self.Q.device)

    def tiles(self) -> Iterator[slice]:
        """Documents, so many that a tile's argmax and scores stay small."""
        count, report = self.D.shape[0], _progress.get()
        tokens, queries = max(1, self.Q.shape[0] * self.Q.shape[1]), max(1, self.Q.shape[0])
        on_cpu = self.Q.device.type == "cpu"
        argmax, scores = (ARGMAX_BYTES, SCORES) if on_cpu else (ARGMAX_BYTES_ELSEWHERE, SCORES_ELSEWHERE)
        size = max(FEWEST_DOCUMENTS, min(argmax // (2 * tokens), scores // queries))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))
            if report is not None:
                report(min(start + size, count), count)

    def documents(self, some: slice) -> tuple[Tensor, Tensor | None]:
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


class _Entries:
    """A tile of scores and what they count as."""

    def __init__(self, problem: Problem, scores: Tensor, some: slice, limit: Tensor | None):
        self.scores = scores
        if problem.target.dtype == torch.bool:
            self.positive = problem.target[:, some]
        else:
            self.positive = problem.target[:, None] == torch.arange(some.start, some.stop, device=scores.device)
        self.candidate: Tensor | None = None  # all
        if problem.exclude is not None:
            self.candidate = ~problem.exclude[:, some]
        if problem.margin is not None and limit is not None:
            below = ~(scores >= limit[:, None].to(scores.dtype))
            self.candidate = below if self.candidate is None else self.candidate & below
        if self.candidate is not None:
            self.candidate |= self.positive

    def among_candidates(self, otherwise: float) -> Tensor:
        return self.scores if self.candidate is None else self.scores.masked_fill(~self.candidate, otherwise)

    def candidates(self, dim: int) -> Tensor:
        if self.candidate is None:
            return torch.full_like(self.scores.select(dim, 0), self.scores.shape[dim], dtype=torch.float64)
        return self.candidate.sum(dim, dtype=torch.float64)


class _RowSums:
    """The rows' running sums over the tiles, in float64 once a tile is summed."""

    def __init__(self, problem: Problem, dtype: torch.dtype):
        self.problem, self.dtype = problem, dtype
        self.temperature = problem.temperature.to(torch.float64)
        self.positives = _positives(problem)
        zeros = torch.zeros(problem.Q.shape[0], dtype=torch.float64, device=problem.Q.device)
        self.largest = torch.full_like(zeros, -torch.inf)
        self.largest_negative = torch.full_like(zeros, -torch.inf)
        self.sum, self.positive_scores, self.scores, self.candidates = (zeros.clone() for _ in range(4))
        self.column_losses = zeros.clone()

    def add(self, entries: _Entries) -> None:
        if not entries.scores.numel():
            return
        scores = entries.among_candidates(-torch.inf)
        largest = torch.maximum(self.largest, scores.amax(1))
        base = _finite(largest)
        exponential = (scores - base[:, None].to(self.dtype)).div_(self.temperature).exp_()
        self.sum = self.sum * ((self.largest - base) / self.temperature).exp() + exponential.sum(1, dtype=torch.float64)
        self.largest = largest
        negative = scores.masked_fill(entries.positive, -torch.inf).amax(1)
        self.largest_negative = torch.maximum(self.largest_negative, negative)
        self.positive_scores += entries.scores.masked_fill(~entries.positive, 0).sum(1, dtype=torch.float64)
        self.candidates += entries.candidates(1)
        if self.problem.label_smoothing:
            self.scores += entries.among_candidates(0).sum(1, dtype=torch.float64)

    def add_columns(self, entries: _Entries) -> Tensor:
        """The columns of a tile, whole as they are: their summary, and their loss to each positive's row."""
        if not entries.scores.numel():
            return self.sum.new_zeros(3, entries.scores.shape[1])
        smoothing = self.problem.label_smoothing
        scores, queries = entries.among_candidates(-torch.inf), entries.candidates(0)
        largest = scores.amax(0)
        base = _finite(largest)
        log_sum = ((scores - base) / self.temperature).exp_().sum(0, dtype=torch.float64).log_()
        below = (base - entries.scores).mul_(1 - smoothing)
        if smoothing:
            mean = entries.among_candidates(0).sum(0, dtype=torch.float64) / queries.clamp_min(1)
            below += ((base - mean) * smoothing).to(self.dtype)
        losses = (below / self.temperature + log_sum.to(self.dtype)).masked_fill_(~entries.positive, 0)
        self.column_losses += losses.sum(1, dtype=torch.float64)
        return torch.stack([largest.double(), log_sum, queries])

    def finish(self, limit: Tensor | None) -> tuple[Tensor, Tensor]:
        smoothing = self.problem.label_smoothing
        log_sum = self.sum.log()
        wanted = (1 - smoothing) * self.positive_scores / self.positives.clamp_min(1)
        if smoothing:
            wanted += smoothing * self.scores / self.candidates.clamp_min(1)
        loss = log_sum + (self.largest - wanted) / self.temperature
        if self.problem.symmetric:
            loss = (loss + self.column_losses / self.positives.clamp_min(1)) / 2
        loss = loss.masked_fill(self.positives == 0, 0)
        if not looked_at(self.problem.Q):
            # Nobody has looked at the values: what is no target or no temperature gives no loss.
            loss = loss.masked_fill(~(self.temperature > 0), torch.nan)
            if self.problem.target.dtype != torch.bool:
                loss = loss.masked_fill(self.problem.target >= self.problem.D.shape[0], torch.nan)
        limit = torch.zeros_like(loss) if limit is None else limit.double()
        summary = Rows(self.largest, log_sum, self.largest_negative, limit, self.candidates)
        return loss.to(self.dtype), torch.stack(summary)


class _Weights:
    """Gradients of the losses to the scores, tile by tile; those that cannot matter are 0."""

    def __init__(self, grad: Tensor, problem: Problem, state: State, dtype: torch.dtype):
        self.problem, self.dtype = problem, dtype
        # In a row or column of n: n weights below this part of the largest over n are less than one rounding of it.
        self.rounding = torch.finfo(dtype).eps / 4
        self.rows = Rows(*state.rows)
        self.columns = Columns(*state.columns) if problem.symmetric else None
        self.temperature = problem.temperature.to(torch.float64)
        positives = _positives(problem)
        share = 0.5 if problem.symmetric else 1.0
        self.grad = (share * grad.double()).masked_fill(positives == 0, 0)
        self.each_positive = self.grad / positives.clamp_min(1)
        self.without_loss = (positives == 0)[:, None]
        self.grad_temperature = torch.zeros_like(self.temperature)
        # Of the largest gradient in a row, a lower bound that one pass knows: its hardest negative's softmax.
        hardest = ((self.rows.largest_negative - self.rows.largest) / self.temperature - self.rows.log_sum).exp()
        self.negligible = self._column_vector(self.grad.abs() * hardest * (self.rounding / max(1, problem.D.shape[0])))

    def of(self, entries: _Entries, some: slice, need_temperature: bool) -> Tensor:
        if not entries.scores.numel():
            return torch.zeros_like(entries.scores)
        smoothing = self.problem.label_smoothing
        scores = entries.among_candidates(-torch.inf)
        wanted = self.each_positive * (1 - smoothing)
        offset = scores - self._column_vector(_finite(self.rows.largest))
        logits = (offset / self.temperature).sub_(self._column_vector(self.rows.log_sum))
        rest = self._column_vector(self.grad - wanted)
        gradient = _difference(logits, self._column_vector(self.grad), rest, entries.positive)
        if smoothing:
            gradient -= self._smoothed(entries, self._column_vector(smoothing * self.grad / self.rows.candidates))
        # Such a row may have no candidate either, and so no sum.
        gradient.masked_fill_(self.without_loss, 0)
        if need_temperature:
            self._add_temperature(gradient, offset)
        if self.columns is not None:
            largest, log_sum, queries = (each[some] for each in self.columns)
            weight = self.each_positive[:, None].where(entries.positive, 0).sum(0)
            offset = scores - _finite(largest).to(self.dtype)
            logits = (offset / self.temperature).sub_(log_sum.to(self.dtype))
            rest = (weight - wanted[:, None]).to(self.dtype)
            column = _difference(logits, weight.to(self.dtype), rest, entries.positive)
            if smoothing:
                column -= self._smoothed(entries, (smoothing * weight / queries.clamp_min(1)).to(self.dtype))
            # A document that is nobody's positive has no column loss, nor one without a candidate a sum.
            column.masked_fill_(weight == 0, 0)
            if need_temperature:
                self._add_temperature(column, offset)
            gradient += column
        if entries.candidate is not None:
            gradient.masked_fill_(~entries.candidate, 0)
        size = gradient.abs()
        negligible = size <= size.amax(0) * (self.rounding / size.shape[0])
        negligible &= size <= self.negligible
        return gradient.masked_fill_(negligible, 0).div_(self.temperature)

    def _column_vector(self, of_rows: Tensor) -> Tensor:
        return of_rows.to(self.dtype)[:, None]

    def _smoothed(self, entries: _Entries, share: Tensor) -> Tensor:
        return share if entries.candidate is None else entries.candidate * share

    def _add_temperature(self, gradient: Tensor, offset: Tensor) -> None:
        # The gradients of a row, or a column, add up to 0, so that a score may be counted from any base.
        # What has no gradient may be anything, NaN included.
        product = (gradient * offset).masked_fill_(gradient == 0, 0)
        total = sum(part.sum() for part in product.sum(1, dtype=torch.float64).split(UNSPLIT))
        self.grad_temperature -= total / self.temperature.square()


def _difference(logits: Tensor, weight: Tensor, rest: Tensor, positive: Tensor) -> Tensor:
    """weight * softmax, and at a positive, where `weight - rest` is wanted, the difference from that.

    e^x - 1 in one: where the softmax is nearly sure of its positive, the difference of both would be rounding alone.
    """
    return torch.where(positive, logits.expm1().mul_(weight).add_(rest), logits.exp().mul_(weight))


def _positives(problem: Problem) -> Tensor:
    """How many each query has, float64 `[Nq]`."""
    if problem.target.dtype == torch.bool:
        return problem.target.sum(1, dtype=torch.float64)
    return (problem.target >= 0).to(torch.float64)


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


def _finite(largest: Tensor) -> Tensor:
    """A base to count from: 0 where there is no candidate at all."""
    return largest.masked_fill(largest == -torch.inf, 0)
