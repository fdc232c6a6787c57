"""Batches in an order that is a function of the step alone: resuming is starting at another step.

A batch comes from one source. Rows of a source are a new permutation each epoch; `streaming` instead reads in order and
shuffles blocks of `buffer` rows, so that nothing but a block is held.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.config import Config, ConfigError
from training.sources import Row, Rows, Stream, open_rows


class Batches:
    """Step -> the rows of its batch that belong to this rank. A map-style data set for torch's DataLoader.

    Everything random is a function of (data seed, source, step or epoch), so any step can be asked for at any time, and
    the rows of the whole batch do not depend on how many ranks share it.
    """

    def __init__(self, config: Config, collate: Any, rank: int = 0, ranks: int = 1) -> None:
        """collate: (these batches, step) -> what the loop gets of a step."""
        train, self.sources = config.train, config.data.sources
        self.seed = train.seed if train.data_seed is None else train.data_seed
        self.batch, self.rank, self.ranks, self.collate = train.batch, rank, ranks, collate
        if train.batch % ranks:
            raise ConfigError(f"train.batch is {train.batch}; want a multiple of the {ranks} devices")
        self.negatives = config.data.negatives
        self.rows: list[Rows | Stream] = []
        counts = []
        for number, source in enumerate(self.sources):
            if source.streaming:
                if Path(source.path).is_dir() or not (source.path.startswith("hub:") or Path(source.path).exists()):
                    raise ConfigError(f"data.sources: {source.path}: want a .jsonl file or hub:owner/name to stream")
                self.rows.append(Stream(source, [self.seed, number]))
                continue
            rows = open_rows(source, config.data.limit)
            if len(rows) < train.batch:
                raise ConfigError(
                    f"{source.path} has {len(rows)} rows; want at least train.batch, which is {train.batch}"
                )
            self.rows.append(rows)
            counts.append(len(rows) // train.batch)
        whole = len(counts) == len(self.sources)
        if train.steps is None and not whole:
            raise ConfigError("train.steps is missing: a streamed data set has no known length")
        self.steps = max(1, round(train.epochs * sum(counts))) if train.steps is None else train.steps
        rng = np.random.default_rng([self.seed, 0x5EED])
        weights = [source.weight for source in self.sources]
        if whole and all(weight is None for weight in weights):
            order: list[np.ndarray] = []
            every = np.repeat(np.arange(len(counts)), counts)
            while sum(map(len, order)) < self.steps:
                order.append(rng.permutation(every))
            self.choice = np.concatenate(order)[: self.steps]
        else:
            if any(weight is None for weight in weights) and len(weights) > 1:
                raise ConfigError("data.sources: give every data set a weight, as some have one or are streamed")
            shares = np.array([1.0 if weight is None else weight for weight in weights])
            self.choice = rng.choice(len(shares), self.steps, p=shares / shares.sum())
        # The how-manieth batch of its source a step is.
        self.turn = np.zeros(self.steps, np.int64)
        for number in range(len(self.sources)):
            mine = self.choice == number
            self.turn[mine] = np.arange(mine.sum())
        self._order: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def notes(self) -> list[str]:
        return [note for rows in self.rows if isinstance(rows, Rows) for note in rows.notes]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Any:
        return self.collate(self, step)

    def rows_of(self, step: int, rank: int | None = None) -> list[Row]:
        """The rows of a rank, which any rank can make; None: this one."""
        number, turn = int(self.choice[step]), int(self.turn[step])
        rows, share = self.rows[number], self.batch // self.ranks
        first = (self.rank if rank is None else rank) * share
        if isinstance(rows, Stream):
            chosen = rows.rows(turn * self.batch + first, share)
        else:
            epoch, place = divmod(turn, len(rows) // self.batch)
            at = place * self.batch + first
            indices = self._permutation(number, epoch)[at : at + share]
            rngs = [np.random.default_rng([self.seed, step, first + n]) for n in range(share)]
            chosen = [rows.row(int(index), rng) for index, rng in zip(indices, rngs, strict=True)]
        return [self._drawn(row, step, first + n) for n, row in enumerate(chosen)]

    def _drawn(self, row: Row, step: int, place: int) -> Row:
        """The row with as many negatives as wanted."""
        wanted = self.negatives
        if wanted is None or len(row.documents) <= wanted + 1:
            return row
        rng = np.random.default_rng([self.seed, step, place, 1])
        kept = [0, *(1 + np.sort(rng.permutation(len(row.documents) - 1)[:wanted])).tolist()]
        scores = None if row.scores is None else [row.scores[n] for n in kept]
        documents, keys = [row.documents[n] for n in kept], [row.keys[n] for n in kept]
        return Row(row.query, documents, scores, keys, row.relevant, row.index)

    def _permutation(self, number: int, epoch: int) -> np.ndarray:
        if self._order.get(number, (-1,))[0] != epoch:
            rows = self.rows[number]
            assert isinstance(rows, Rows)
            self._order[number] = epoch, np.random.default_rng([self.seed, number, epoch]).permutation(len(rows))
        return self._order[number][1]
