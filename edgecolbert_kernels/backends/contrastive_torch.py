"""Softmax sums and score gradients of the contrastive loss in plain PyTorch, a tile of scores at a time, on any device.

A tile is every query against some documents; `ops.tiles` makes them, and has the formulas. A backend may offer a `RowSums`
and a `Weights` of its own, with the interface of these; `triton.contrastive` has those of the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Fewer numbers than PyTorch's threads share, which would make a sum's bits depend on how many they are.
UNSPLIT = 1 << 14


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


def looked_at(Q: Tensor) -> bool:
    """Whether the values of targets and temperature are checked before the tiles: elsewhere that would wait for a device."""
    return Q.device.type == "cpu"


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


class RowSums:
    """The rows' running sums over the tiles, in float64 once a tile is summed."""

    # Whether a tile may be all of the scores: here several copies of it come and go.
    takes_everything = False

    def __init__(self, problem: Problem, limit: Tensor | None, dtype: torch.dtype):
        self.problem, self.limit, self.dtype = problem, limit, dtype
        self.temperature = problem.temperature.to(torch.float64)
        self.positives = _positives(problem)
        zeros = torch.zeros(problem.Q.shape[0], dtype=torch.float64, device=problem.Q.device)
        self.largest = torch.full_like(zeros, -torch.inf)
        self.largest_negative = torch.full_like(zeros, -torch.inf)
        self.sum, self.positive_scores, self.scores, self.candidates = (zeros.clone() for _ in range(4))
        self.column_losses = zeros.clone()
        self.columns: list[Tensor] = []

    def add(self, scores: Tensor, some: slice) -> None:
        """The scores `[Nq, n]` of some documents, which follow those before."""
        entries = _Entries(self.problem, scores, some, self.limit)
        self._add_rows(entries)
        if self.problem.symmetric:
            self.columns.append(self._add_columns(entries))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of every query, 0 for one without a positive, and the state for `Weights`: `Rows` and `Columns`."""
        loss, rows = self._finish_rows()
        symmetric = self.problem.symmetric
        return loss, rows, torch.cat(self.columns, 1) if self.columns else rows.new_empty(3 * symmetric, 0)

    def _add_rows(self, entries: _Entries) -> None:
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

    def _add_columns(self, entries: _Entries) -> Tensor:
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

    def _finish_rows(self) -> tuple[Tensor, Tensor]:
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
        limit = torch.zeros_like(loss) if self.limit is None else self.limit.double()
        summary = Rows(self.largest, log_sum, self.largest_negative, limit, self.candidates)
        return loss.to(self.dtype), torch.stack(summary)


class Weights:
    """Gradients of the losses to the scores, tile by tile; those that cannot matter are 0."""

    takes_everything = False

    def __init__(
        self, grad: Tensor, problem: Problem, rows: Tensor, columns: Tensor, dtype: torch.dtype, need_temperature: bool
    ):
        self.problem, self.dtype, self.need_temperature = problem, dtype, need_temperature
        # In a row or column of n: n weights below this part of the largest over n are less than one rounding of it.
        self.rounding = torch.finfo(dtype).eps / 4
        self.rows = Rows(*rows)
        self.columns = Columns(*columns) if problem.symmetric else None
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

    def of(self, scores: Tensor, some: slice, out: Tensor | None = None) -> Tensor:
        """Of the scores `[Nq, n]` of some documents, written to `out` if there is one."""
        gradient = self._of(_Entries(self.problem, scores, some, self.rows.limit), some)
        return gradient if out is None else out.copy_(gradient)

    def temperature_gradient(self) -> Tensor:
        """float64, once all tiles went by."""
        return self.grad_temperature

    def _of(self, entries: _Entries, some: slice) -> Tensor:
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
        if self.need_temperature:
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
            if self.need_temperature:
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


def _finite(largest: Tensor) -> Tensor:
    """A base to count from: 0 where there is no candidate at all."""
    return largest.masked_fill(largest == -torch.inf, 0)
