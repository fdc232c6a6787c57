"""Softmax sums and score gradients of the contrastive loss on a GPU: from tensors to launches of `contrastive_kernels`.

`RowSums` and `Weights` have the interface of those in `contrastive_torch`, in a launch or two a tile and pass where those take
some twenty (one more where a number of a column needs all of its rows first). Nothing here waits for the device.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import torch
from torch import Tensor

from edgecolbert_kernels.backends.contrastive_torch import Columns, Problem, Rows
from edgecolbert_kernels.backends.triton import contrastive_kernels
from edgecolbert_kernels.backends.triton.launch import Variant

# Scores that a program holds at a time: four a thread, with eight there are spills.
BLOCK = 512
# Columns and rows of a block where a program owns columns: a warp reads 128 bytes of a row.
COLUMNS, ROWS = 32, BLOCK // 32
# Columns of a block where it owns rows: few, so that a tile of few documents fills it, or many.
WIDTHS = (32, 128, BLOCK)
# Pieces of a column, each a program's, so that a few columns of many rows fill a device.
MOST_CHUNKS = 128
FEWEST_ROWS = 128
NUM_ROWS, NUM_COLUMNS = len(Rows._fields), len(Columns._fields)
# Numbers a row that the forward keeps between tiles.
STATE = 8


class RowSums:
    """The rows' running sums over the tiles, in float64."""

    def __init__(self, problem: Problem, limit: Tensor | None, dtype: torch.dtype):
        self.problem, self.limit = problem, limit
        # Whether a tile may be all of the scores. Columns take memory for each of their pieces.
        self.takes_everything = not problem.symmetric
        self.num_rows, self.num_documents = problem.Q.shape[0], problem.D.shape[0]
        self.inputs = _Inputs(problem, limit)
        self.smoothing = problem.label_smoothing > 0
        device = problem.Q.device
        self.loss = torch.empty(self.num_rows, dtype=dtype, device=device)
        self.state: Tensor | None = None
        shape = (NUM_COLUMNS if problem.symmetric else 0, self.num_documents if problem.symmetric else 0)
        self.columns = torch.empty(shape, dtype=torch.float64, device=device)
        self.width = WIDTHS[0]

    def add(self, scores: Tensor, some: slice) -> None:
        """The scores `[Nq, n]` of some documents, which follow those before."""
        first, last = self.state is None, some.stop == self.num_documents
        if self.state is None:
            numbers = NUM_ROWS if last else STATE
            self.state = torch.empty((numbers, self.num_rows), dtype=torch.float64, device=self.problem.Q.device)
            self.width = next((width for width in WIDTHS if scores.shape[1] <= width), WIDTHS[-1])
        if not self.num_rows:
            return
        means = self._add_columns(scores, some.start) if self.problem.symmetric else None
        given = self.inputs
        constants = *given.flags, self.smoothing, self.problem.symmetric, BLOCK // self.width, self.width
        _variant("row_sums", given.dtypes, constants).launch(
            -(-self.num_rows // (BLOCK // self.width)),
            1,
            (scores, *given.tensors, self.columns, self.columns if means is None else means, self.state, self.loss),
            (
                scores.stride(0),
                *given.strides,
                bits(self.problem.label_smoothing),
                some.start,
                self.num_rows,
                scores.shape[1],
                self.num_documents,
                int(first),
                int(last),
            ),
        )

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of every query, 0 for one without a positive, and the state for `Weights`: `Rows` and `Columns`."""
        if self.state is None:
            # Without documents a tile of none finishes the rows.
            self.add(self.loss.new_empty(self.num_rows, 0), slice(0, 0))
        assert self.state is not None
        return self.loss, self.state[:NUM_ROWS], self.columns

    def _add_columns(self, scores: Tensor, start: int) -> Tensor | None:
        """The columns of a tile, whole as they are; the means of their scores, where labels are smoothed."""
        num_columns = scores.shape[1]
        if not num_columns:
            return None
        chunk, chunks = _chunks(self.num_rows)
        given, blocks = self.inputs, -(-num_columns // COLUMNS)
        partial = torch.empty((4, chunks, num_columns), dtype=torch.float64, device=scores.device)
        means = partial.new_empty(num_columns) if self.smoothing else None
        _variant("column_sums", given.dtypes, (*given.flags, self.smoothing, ROWS, COLUMNS)).launch(
            blocks,
            chunks,
            (scores, *given.of_columns, partial),
            (scores.stride(0), *given.strides, start, self.num_rows, num_columns, chunk),
        )
        _variant("column_finish", given.dtypes, (self.smoothing, ROWS, COLUMNS)).launch(
            blocks,
            1,
            (partial, self.problem.temperature, self.columns, means),
            (start, num_columns, self.num_documents, chunks),
        )
        return means


class Weights:
    """Gradients of the losses to the scores, tile by tile; those that cannot matter are 0."""

    takes_everything = True

    def __init__(
        self, grad: Tensor, problem: Problem, rows: Tensor, columns: Tensor, dtype: torch.dtype, need_temperature: bool
    ):
        self.grad, self.problem, self.rows, self.columns = grad, problem, rows, columns
        self.num_rows, self.num_documents = problem.Q.shape[0], problem.D.shape[0]
        # In a row or column of n: n weights below this part of the largest over n are less than one rounding of it.
        self.rounding = torch.finfo(dtype).eps / 4
        self.inputs = _Inputs(problem, rows[Rows._fields.index("limit")] if problem.margin is not None else None)
        self.share = 0.5 if problem.symmetric else 1.0
        self.slopes: list[Tensor] | None = [] if need_temperature else None
        self.weights = self._column_weights() if problem.symmetric and self.num_documents else None

    def of(self, scores: Tensor, some: slice, out: Tensor | None = None) -> Tensor:
        """Of the scores `[Nq, n]` of some documents, written to `out` if there is one."""
        num_columns, device = scores.shape[1], scores.device
        if out is None:
            out = torch.empty((self.num_rows, num_columns), dtype=scores.dtype, device=device)
        if not scores.numel():
            return out
        problem, given = self.problem, self.inputs
        chunk, chunks = _chunks(self.num_rows)
        blocks = -(-num_columns // COLUMNS)
        largest = torch.empty((chunks, num_columns), dtype=torch.float32, device=device)
        slopes = None
        if self.slopes is not None:
            slopes = torch.empty(blocks * chunks, dtype=torch.float64, device=device)
            self.slopes.append(slopes)
        tensors = scores, *given.tensors, self.grad, self.rows, self.columns, self.weights, largest, out, slopes
        integers = (
            scores.stride(0),
            *given.strides,
            self.grad.stride(0),
            out.stride(0),
            bits(problem.label_smoothing),
            bits(self.share),
            bits(self.rounding),
            some.start,
            self.num_rows,
            num_columns,
            self.num_documents,
            chunk,
        )
        options = *given.flags, problem.label_smoothing > 0, problem.symmetric
        for need_slope, write in ((slopes is not None, False), (False, True)):
            variant = _variant("score_gradients", given.dtypes, (*options, need_slope, write, ROWS, COLUMNS))
            variant.launch(blocks, chunks, tensors, integers)
        return out

    def temperature_gradient(self) -> Tensor:
        """float64, once all tiles went by."""
        divisor = self.problem.temperature.to(torch.float64)
        if not self.slopes:
            return torch.zeros_like(divisor)
        slopes = self.slopes[0] if len(self.slopes) == 1 else torch.cat(self.slopes)
        return -slopes.sum() / divisor.square()

    def _column_weights(self) -> Tensor:
        weights = torch.empty(self.num_documents, dtype=torch.float64, device=self.grad.device)
        given = self.inputs
        _variant("column_weights", given.dtypes, (given.flags[0], ROWS, COLUMNS)).launch(
            -(-self.num_documents // COLUMNS),
            1,
            (self.grad, given.target, given.positives, weights),
            (self.grad.stride(0), *given.strides[:2], self.num_rows, self.num_documents, bits(self.share)),
        )
        return weights


class _Inputs:
    """What says of a score what it counts as, as every kernel takes it."""

    def __init__(self, problem: Problem, limit: Tensor | None):
        target, exclude = problem.target, problem.exclude
        table = target.dtype is torch.bool
        self.target = target
        self.positives = target.sum(1, dtype=torch.float64) if table else None
        self.flags = table, exclude is not None, limit is not None
        self.of_columns = target, exclude, limit, problem.temperature
        self.tensors = target, exclude, limit, self.positives, problem.temperature
        self.strides = (
            target.stride(0),
            target.stride(1) if table else 0,
            *((0, 0) if exclude is None else (exclude.stride(0), exclude.stride(1))),
        )
        # The rest have one each.
        self.dtypes = problem.temperature.dtype, None if limit is None else limit.dtype


def _chunks(num_rows: int) -> tuple[int, int]:
    """Rows of a piece of the columns, and how many pieces."""
    chunk = max(FEWEST_ROWS, -(-num_rows // (MOST_CHUNKS * ROWS)) * ROWS)
    return chunk, -(-num_rows // chunk)


@cache
def bits(number: float) -> int:
    """Of a float64, as an int64."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


@cache
def _variant(name: str, dtypes: tuple[torch.dtype, torch.dtype | None], constants: tuple[Any, ...]) -> Variant:
    """Of a kernel, by its name, whose hash is no call of Python; for dtypes of the temperature and the limit."""
    # By itself the compiler spills some of them, for one more program on a multiprocessor.
    return Variant(getattr(contrastive_kernels, name), constants, 4, 1, (), True)
