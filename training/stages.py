"""What is particular to a stage: how rows become a batch, what is trained, and the loss of its representations.

A batch is `inputs`, one dict of token tensors a side, and `options`, what else the loss wants. Its gradients come from
training.train.gradients: in parts where the loss is a mean over rows (`separable`), through GradCache where it is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecolbert_kernels import contrastive_loss, distillation_loss, gather_with_gradient
from training import losses
from training.config import Config, ConfigError, Loss
from training.data import Batches
from training.model import Encoder, Features
from training.sources import Row, TaughtRows

Encoded = tuple[Tensor, Tensor]
Batch = dict[str, Any]
Options = dict[str, Tensor | int | None]


class Stage:
    """The base: queries and documents through one encoder. `model` is what is called, wrapped for several devices or not."""

    separable = False
    whole = False  # a rank's batch depends on the rows of the others too

    def __init__(self, config: Config, encoder: Encoder) -> None:
        self.config, self.encoder = config, encoder
        self.model: Any = self.module()

    def module(self) -> nn.Module:
        """What is trained."""
        return self.encoder

    def encode(self, input_ids: Tensor, attention_mask: Tensor, score_mask: Tensor) -> Encoded:
        """Unit vectors `[n, L, d]` and which of them score, `[n, L]`; cut to the longest text of these n."""
        longest = max(1, int((attention_mask.bool() | score_mask).any(0).sum()))
        vectors = self.model(input_ids[:, :longest], attention_mask[:, :longest])
        # One vector a text is never masked.
        kept = score_mask[:, :longest] if vectors.shape[1] == longest and self.encoder.head is not None else None
        return vectors, torch.ones_like(vectors[..., 0], dtype=torch.bool) if kept is None else kept

    def collate(self, batches: Batches, step: int) -> Batch:
        ranks, own = (range(batches.ranks), batches.rank) if self.whole else ([batches.rank], 0)
        parts, source = [batches.rows_of(step, rank) for rank in ranks], int(batches.choice[step])
        inputs, options = self.batch(parts, own, source)
        names = [row.index for row in parts[own]]
        return {"inputs": inputs, "options": options, "source": self.config.data.sources[source].path, "rows": names}

    def batch(self, parts: Sequence[Sequence[Row]], own: int, source: int) -> tuple[list[Features], Options]:
        """parts: the rows of every rank if the stage is `whole`, of this one if not; own: the place of this one there."""
        raise NotImplementedError

    def loss(self, *inputs: Any, **options: Any) -> Tensor:
        raise NotImplementedError

    def texts(self, texts: Sequence[str], is_query: bool, source: int) -> Features:
        own = self.config.data.sources[source]
        return self.encoder.tokenize(texts, is_query, (own.query_prompt if is_query else own.document_prompt) or None)


class Contrastive(Stage):
    """InfoNCE over the documents of the batch, hard negatives included: pooled vectors, or MaxSim for a model with a head."""

    temperature = 0.02

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.whole = config.train.gather

    def batch(self, parts: Sequence[Sequence[Row]], own: int, source: int) -> tuple[list[Features], Options]:
        """Documents are all positives, then all negatives: rows may have unequal numbers of them."""
        rows = parts[own]
        for row in chain.from_iterable(parts):
            if not row.query or not row.documents:
                raise ConfigError(
                    f"{self.config.data.sources[source].path}: row {row.index + 1} has no query or no document"
                )
        documents = [row.documents[0] for row in rows] + [text for row in rows for text in row.documents[1:]]
        keys = [[row.keys[0] for row in part] + [key for row in part for key in row.keys[1:]] for part in parts]
        owners = [n for n, row in enumerate(rows) for _ in row.documents[1:]]
        inputs = [self.texts([row.query for row in rows], True, source), self.texts(documents, False, source)]
        return inputs, {"exclude": false_negatives(parts, own, keys), "owners": torch.tensor(owners, dtype=torch.long)}

    def loss(self, queries: Encoded, documents: Encoded, exclude: Tensor | None, owners: Tensor) -> Tensor:
        (Q, q_mask), (D, d_mask) = queries, documents
        own = self.config.loss
        offset, count = 0, len(D)
        if self.config.train.gather:
            # Its weight is for unequal numbers of queries; here all ranks have as many.
            D, d_mask, offset, _ = gather_with_gradient(D, d_mask)
        if own.symmetric and len(D) != count:
            raise ConfigError("loss.symmetric needs the queries of all devices: run on one, or without train.gather")
        target = offset + torch.arange(len(Q), device=Q.device)
        more: dict[str, Any] = {"exclude": exclude, "margin": own.margin, "symmetric": own.symmetric}
        if self.encoder.head is None:
            temperature = temperature_of(own, self.temperature)
            return losses.info_nce(Q[:, 0], D[:, 0], target, temperature, **more)
        temperature = temperature_of(own)
        options: dict[str, Any] = {"target": target, "temperature": temperature, "mask_mode": own.mask_mode, **more}
        return contrastive_loss(Q, D, q_mask, d_mask, **options)


class Finetune(Contrastive):
    """AnglE on triplets: InfoNCE within the batch, InfoNCE with hard negatives, and the order of angles (and of cosines).

    The last two are over a device's own triplets, so they depend a little on how many devices there are.
    """

    temperature = 0.05

    def batch(self, parts: Sequence[Sequence[Row]], own: int, source: int) -> tuple[list[Features], Options]:
        inputs, options = super().batch(parts, own, source)
        positives = [[row.keys[0] for row in part] for part in parts]
        return inputs, options | {"exclude_positives": false_negatives(parts, own, positives)}

    def loss(
        self,
        queries: Encoded,
        documents: Encoded,
        exclude: Tensor | None,
        owners: Tensor,
        exclude_positives: Tensor | None = None,
    ) -> Tensor:
        own, (Q, _) = self.config.loss, queries
        D, count = documents[0][:, 0], len(Q)
        with_negatives = super().loss(queries, documents, exclude, owners)
        positives = (documents[0][:count], documents[1][:count])
        in_batch = super().loss(queries, positives, exclude_positives, owners)
        loss = (own.in_batch * in_batch + own.contrastive * with_negatives) / 2
        if len(owners) and (own.angle or own.cosine):
            z, w = torch.cat([Q[:, 0], Q[owners, 0]]), D
            labels = (torch.arange(len(w), device=w.device) < count).to(w.dtype)
            loss = loss + own.angle * losses.angle(z, w, labels)
            loss = loss + own.cosine * losses.cosine_order(z, w, labels) if own.cosine else loss
        return loss


class Distill(Stage):
    """A teacher's vectors through an FFN that is thrown away afterwards: squared distance, or all of Stella's terms."""

    def __init__(self, config: Config, encoder: Encoder, vectors: Sequence[np.ndarray]) -> None:
        """vectors: for each source, `[rows, dimension]`."""
        self.vectors = vectors
        self.separable = not config.loss.stella
        super().__init__(config, encoder)

    def module(self) -> nn.Module:
        return Student(self.encoder, self.config.loss.inner, self.vectors[0].shape[1])

    def batch(self, parts: Sequence[Sequence[Row]], own: int, source: int) -> tuple[list[Features], Options]:
        rows = parts[own]
        wanted = np.stack([self.vectors[source][row.index] for row in rows]).astype(np.float32)
        data, reading = self.config.data.sources[source], self.encoder.reading
        texts = [
            (data.query_prompt or reading.query_prefix) + row.query
            if row.query
            else (data.document_prompt or reading.document_prefix) + row.documents[0]
            for row in rows
        ]
        # Queries and documents in one batch, cut at the documents' length; their prompts are in the texts already.
        features = self.encoder.tokenize(texts, False, prompt="")
        return [features], {"wanted": F.normalize(torch.from_numpy(wanted), dim=-1)}

    def loss(self, students: Encoded, wanted: Tensor) -> Tensor:
        given = students[0][:, 0]
        if self.config.loss.stella:
            return losses.stella(given, wanted)
        return (F.normalize(given, dim=-1) - wanted).square().sum(-1).mean()


class Student(nn.Module):
    """The encoder and two layers with SiLU to the teacher's dimension."""

    def __init__(self, encoder: Encoder, inner: int | None, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        inner = 2 * encoder.dimension if inner is None else inner
        self.projector = nn.Sequential(nn.Linear(encoder.dimension, inner), nn.SiLU(), nn.Linear(inner, outputs))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.projector(self.encoder(input_ids, attention_mask))


class Colbert(Stage):
    """KL divergence to a teacher's scores over each query's own documents."""

    separable = True

    def batch(self, parts: Sequence[Sequence[Row]], own: int, source: int) -> tuple[list[Features], Options]:
        rows = parts[own]
        most = max(len(row.documents) for row in rows)
        for row in rows:
            if row.scores is None or not row.query or len(row.documents) < 2:
                path = self.config.data.sources[source].path
                raise ConfigError(f"{path}: row {row.index + 1} needs a query, two documents or more, and scores")
        documents = [text for row in rows for text in row.documents + [""] * (most - len(row.documents))]
        scores = torch.tensor([[*(row.scores or []), *[0.0] * (most - len(row.documents))] for row in rows])
        there = torch.arange(most) < torch.tensor([len(row.documents) for row in rows])[:, None]
        inputs = [self.texts([row.query for row in rows], True, source), self.texts(documents, False, source)]
        return inputs, {"teacher_scores": scores, "there": None if there.all() else there}

    def loss(self, queries: Encoded, documents: Encoded, teacher_scores: Tensor, there: Tensor | None) -> Tensor:
        (Q, q_mask), (D, d_mask), own = queries, documents, self.config.loss
        return distillation_loss(
            Q,
            D.unflatten(0, teacher_scores.shape),
            teacher_scores,
            q_mask,
            d_mask.unflatten(0, teacher_scores.shape),
            candidate_mask=there,
            **kl_options(own),
        )


class InBatch(Stage):
    """KL divergence to a teacher's scores, every query of the batch over every document of the batch.

    Of the texts of all ranks, each once, every rank encodes its share.
    """

    def __init__(self, config: Config, encoder: Encoder, rows: Sequence[Any]) -> None:
        super().__init__(config, encoder)
        self.whole = config.train.gather
        self.rows: Sequence[TaughtRows] = rows
        for source, own in zip(config.data.sources, rows, strict=True):
            if not isinstance(own, TaughtRows):
                raise ConfigError(f"{source.path} is not what training.teach writes, which the other data sets are")

    def batch(self, parts: Sequence[Sequence[Row]], own: int, source: int) -> tuple[list[Features], Options]:
        rows, taught = list(chain.from_iterable(parts)), self.rows[source]
        numbers = list(dict.fromkeys([row.index for row in rows] + [n for row in rows for n in row.others]))
        documents = {key: text for row in rows for key, text in zip(row.keys, row.documents, strict=True)}
        mine, texts = share(numbers, own, len(parts)), share(list(documents.values()), own, len(parts))
        scores = taught.targets(mine, list(documents), self.config.loss.bonus)
        # Where there are fewer documents than ranks, one without any encodes a text that is left out of the loss: its encoder
        # takes part in the sums of gradients then, as the others' wait for it.
        inputs = [self.texts([taught.queries[n] for n in mine], True, source), self.texts(texts or [""], False, source)]
        weight = torch.tensor(len(mine) * len(parts) / len(numbers))
        return inputs, {"teacher_scores": torch.from_numpy(scores), "weight": weight, "count": len(texts)}

    def loss(self, queries: Encoded, documents: Encoded, teacher_scores: Tensor, weight: Tensor, count: int) -> Tensor:
        """weight: the number of queries over the mean of all ranks', over which data parallelism averages gradients.

        count: of the documents, the first so many.
        """
        (Q, q_mask), (D, d_mask) = queries, (X[:count] for X in documents)
        if self.whole:
            D, d_mask, _, _ = gather_with_gradient(D, d_mask)
        return distillation_loss(Q, D, teacher_scores, q_mask, d_mask, **kl_options(self.config.loss)) * weight


def share(items: list[Any], rank: int, ranks: int) -> list[Any]:
    """The items of a rank: together they are all, in their order, and their numbers differ by one at most."""
    return items[len(items) * rank // ranks : len(items) * (rank + 1) // ranks]


def temperature_of(loss: Loss, otherwise: float = 1.0) -> float:
    return otherwise if loss.temperature is None else loss.temperature


def kl_options(loss: Loss) -> dict[str, Any]:
    return {
        "student_normalization": loss.student_normalization,
        "teacher_normalization": loss.teacher_normalization,
        "temperature": temperature_of(loss),
        "teacher_temperature": loss.teacher_temperature,
        "mask_mode": loss.mask_mode,
    }


def build(config: Config, encoder: Encoder, vectors: Sequence[np.ndarray] = (), rows: Sequence[Any] = ()) -> Stage:
    """vectors: of stage distill; rows: of each source."""
    if config.stage == "distill":
        return Distill(config, encoder, vectors)
    if config.stage == "finetune":
        return Finetune(config, encoder)
    if config.stage == "contrastive" or config.loss.kind == "contrastive":
        return Contrastive(config, encoder)
    if any(isinstance(each, TaughtRows) for each in rows):
        return InBatch(config, encoder, rows)
    return Colbert(config, encoder)


def false_negatives(parts: Sequence[Sequence[Row]], own: int, keys: Sequence[Sequence[str]]) -> Tensor | None:
    """bool `[rows, documents]`: documents of other rows that are right for this one too; None if there are none.

    The rows are those of `parts[own]`, the documents those of all parts. keys: of each part, those of its rows' positives
    first.
    """
    columns: dict[str, list[int]] = {}
    for column, key in enumerate(chain.from_iterable(keys)):
        columns.setdefault(key, []).append(column)
    relevant: dict[str, set[str]] = {}
    for row in chain.from_iterable(parts):
        relevant.setdefault(row.query, set()).update(row.relevant)
    first, pairs = sum(map(len, keys[:own])), []
    for n, row in enumerate(parts[own]):
        right = relevant[row.query].union(row.keys[:1])
        pairs += [(n, column) for key in right for column in columns.get(key, ()) if column != first + n]
    if not pairs:
        return None
    excluded = torch.zeros(len(parts[own]), sum(map(len, keys)), dtype=torch.bool)
    excluded[tuple(torch.tensor(pairs).T)] = True
    return excluded


def parts(batch: Mapping[str, Any], size: int) -> list[tuple[list[Features], dict[str, Any], float]]:
    """A batch cut by rows so that about `size` texts a side are encoded at a time: inputs, options and share of the rows."""
    inputs, options = batch["inputs"], batch["options"]
    counts = [len(each["input_ids"]) for each in inputs]
    rows = min(counts)
    step = max(1, size * rows // max(counts))
    cut = []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        sides = [
            {name: value[start * n // rows : stop * n // rows] for name, value in each.items()}
            for each, n in zip(inputs, counts, strict=True)
        ]
        own = {name: value if value is None else value[start:stop] for name, value in options.items()}
        cut.append((sides, own, (stop - start) / rows))
    return cut
