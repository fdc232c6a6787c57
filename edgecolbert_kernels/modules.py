"""`nn.Module`s: a scorer, and PyLate's losses under their own names and arguments.

A PyLate training script changes one import:

    from edgecolbert_kernels import modules as losses    # was: from pylate import losses

What differs from PyLate 1.6, on purpose:

- Scores and loss are fused, with the normalisation of the embeddings where that is quicker, and accumulate in float32;
  `score_mini_batch_size`, which limits the memory of scores that are not fused, only matters with a `score_metric` of your
  own.
- `CachedContrastive` has the gradients of `Contrastive`. PyLate's are batch_size times as large with `size_average=True`.
- With `gather_across_devices`, the mean of the loss over ranks, and the gradients that data parallelism averages, are
  those of one process with the whole batch. PyLate's are world_size times as large. Ranks may differ in batch size and in
  token counts, where PyLate stops.
- Positives and negatives of different padded lengths are padded, where PyLate stops.

Masked tokens follow PyLate, `mask_mode="zero"`: the similarity to a masked document token is 0 and takes part in the
maximum. "exclude" never chooses such a token, which is what scoring encoded documents does.

The model is whatever returns `token_embeddings [N, L, d]` in a dict, for a dict with `input_ids` and `attention_mask`
`[N, L]`, and has `skiplist` (token ids) and `do_query_expansion`; or wraps such a model as `.module`. Embeddings are
float16, bfloat16, float32 or float64 and of any length: they are normalised here, and gradients come in their dtype. Tokens
score where `attention_mask` is not 0 and, of documents, `input_ids` are not in `skiplist`; of queries with
`do_query_expansion`, all do. A `score_metric` is given unit embeddings.

Losses are scalars, float32 or float64. ValueError: there are no documents, batches of documents have different numbers of
rows, there are not as many as queries, and what `contrastive_loss` and `distillation_loss` refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgecolbert_kernels import checks
from edgecolbert_kernels.distributed import gather_with_gradient, world_size
from edgecolbert_kernels.gradcache import GradCache
from edgecolbert_kernels.losses import contrastive_loss, distillation_loss
from edgecolbert_kernels.scoring import maxsim
from edgecolbert_kernels.signatures import MaskMode, Precision, Reduction

Features = Mapping[str, Tensor]
# Embeddings [N, L, d], of any length where the kernels normalise and else unit ones, and the tokens to score [N, L].
Encoded = tuple[Tensor, Tensor]

GRADCACHE = """
@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""


class MaxSimScorer(nn.Module):
    """`maxsim` with its options set: `scorer(Q, D, q_mask, d_mask)`, shapes and errors as there."""

    def __init__(
        self, normalize: bool = False, mask_mode: MaskMode = "exclude", precision: Precision = "exact"
    ) -> None:
        super().__init__()
        checks.options(mask_mode, precision)
        self.normalize, self.mask_mode, self.precision = normalize, mask_mode, precision

    def forward(self, Q: Any, D: Any, q_mask: Any = None, d_mask: Any = None) -> Any:
        return maxsim(
            Q, D, q_mask, d_mask, normalize=self.normalize, mask_mode=self.mask_mode, precision=self.precision
        )

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, mask_mode={self.mask_mode!r}, precision={self.precision!r}"


class Contrastive(nn.Module):
    """Cross-entropy of every query over all documents of the batch; the first document of each query is its positive.

    Args:
        model: see the module's text.
        score_metric: None for fused MaxSim; else a function of queries `[Nq, Lq, d]`, documents `[Nd, K, Ld, d]`,
            `queries_mask` and `documents_mask` that returns `[Nq, Nd * K]`, query-major.
        score_mini_batch_size: queries that a score_metric gets at a time.
        size_average: the mean over queries, else the sum.
        gather_across_devices: score against the documents of all ranks.
        temperature: divides the scores.
        mask_mode: as in `maxsim`; for fused MaxSim.
    """

    def __init__(
        self,
        model: nn.Module,
        score_metric: Callable[..., Tensor] | None = None,
        score_mini_batch_size: int | None = None,
        size_average: bool = True,
        gather_across_devices: bool = False,
        temperature: float = 1.0,
        *,
        mask_mode: MaskMode = "zero",
    ) -> None:
        super().__init__()
        checks.options(mask_mode, "exact")
        if not temperature > 0:
            raise checks.not_positive("temperature", temperature)
        self.model = model
        self.score_metric = score_metric
        self.score_mini_batch_size = score_mini_batch_size
        self.size_average = size_average
        self.gather_across_devices = gather_across_devices
        self.temperature = temperature
        self.mask_mode = mask_mode

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of `[queries, positives, negatives, ...]`, each a dict with N rows. Labels are not used."""
        queries, *documents = sentence_features
        return self._loss(self._encode(queries, True), *(self._encode(each, False) for each in documents))

    def _encode(self, features: Features, is_query: bool) -> Encoded:
        # The model is looked up at every call: a trainer puts its wrapped one here.
        return _encode(self.model, features, is_query, self._kernels_normalize)

    def _kernels_normalize(self, X: Tensor) -> bool:
        """On a CPU, PyTorch takes longer for it than for the loss. A GPU's kernels would do it for every query anew."""
        return self.score_metric is None and X.device.type == "cpu"

    def _loss(self, queries: Encoded, *documents: Encoded) -> Tensor:
        Q, q_mask = queries
        D, d_mask = _stack(documents)
        if len(D) != len(Q):
            raise checks.wrong_shape("documents", D.shape, f"{len(Q)} rows, one for each query")
        offset, weight = 0, 1.0
        if self.gather_across_devices:
            D, d_mask, offset, share = gather_with_gradient(D, d_mask)
            # Data parallelism averages over ranks: of sums it makes a mean, of means one that forgets their sizes.
            weight = share if self.size_average else world_size()
        target = (offset + torch.arange(len(Q), device=Q.device)) * D.shape[1]
        reduction: Reduction = "mean" if self.size_average else "sum"
        if self.score_metric is None:
            options: dict[str, Any] = {"temperature": self.temperature, "mask_mode": self.mask_mode}
            options["normalize"] = self._kernels_normalize(Q)
            D, d_mask = D.flatten(0, 1), d_mask.flatten(0, 1)
            return contrastive_loss(Q, D, q_mask, d_mask, target=target, reduction=reduction, **options) * weight
        step = self.score_mini_batch_size or len(Q)
        scores = [
            self.score_metric(q, D, queries_mask=kept, documents_mask=d_mask)
            for q, kept in zip(Q.split(step), q_mask.split(step), strict=True)
        ]
        scaled = torch.cat(scores) / self.temperature
        return nn.functional.cross_entropy(scaled, target, reduction=reduction) * weight


class CachedContrastive(Contrastive):
    """`Contrastive` with its gradients, the model seeing mini_batch_size rows at a time (`GradCache`).

    `loss.backward()` encodes everything again; under DistributedDataParallel it synchronises gradients once.

    Args:
        model, score_metric, score_mini_batch_size, size_average, gather_across_devices, temperature, mask_mode: as there.
        mini_batch_size: rows a chunk.
        show_progress_bar: show chunks done (needs tqdm).
    """

    def __init__(
        self,
        model: nn.Module,
        score_metric: Callable[..., Tensor] | None = None,
        mini_batch_size: int = 32,
        score_mini_batch_size: int | None = None,
        size_average: bool = True,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
        temperature: float = 1.0,
        *,
        mask_mode: MaskMode = "zero",
    ) -> None:
        super().__init__(
            model,
            score_metric,
            score_mini_batch_size or mini_batch_size,
            size_average,
            gather_across_devices,
            temperature,
            mask_mode=mask_mode,
        )
        checks.at_least("mini_batch_size", mini_batch_size, 1)
        self.mini_batch_size = mini_batch_size
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        inputs = list(sentence_features)

        def queries(**features: Tensor) -> Encoded:
            return self._encode(features, True)

        def documents(**features: Tensor) -> Encoded:
            return self._encode(features, False)

        encoders = [queries, *[documents] * (len(inputs) - 1)]
        cache = GradCache(
            encoders,
            self._loss,
            self.mini_batch_size,
            models=[self.model] if hasattr(self.model, "no_sync") else [],
            show_progress_bar=self.show_progress_bar,
        )
        return cache(*inputs)

    @property
    def citation(self) -> str:
        """BibTeX of GradCache, which a trainer puts into the model's card."""
        return GRADCACHE


class Distillation(nn.Module):
    """KL divergence from a teacher's distribution over a query's own documents to the model's.

    Args:
        model: see the module's text.
        score_metric: None for fused MaxSim; else a function of queries `[Nq, Lq, d]`, documents `[Nq, K, Ld, d]`,
            `queries_mask` and `documents_mask` that returns `[Nq, K]`.
        size_average: the mean over queries, else the sum.
        normalize_scores: min-max normalise the model's scores of each query.
        mask_mode: as in `maxsim`; for fused MaxSim.
    """

    def __init__(
        self,
        model: nn.Module,
        score_metric: Callable[..., Tensor] | None = None,
        size_average: bool = True,
        normalize_scores: bool = True,
        *,
        mask_mode: MaskMode = "zero",
    ) -> None:
        super().__init__()
        checks.options(mask_mode, "exact")
        self.model = model
        self.score_metric = score_metric
        self.size_average = size_average
        self.normalize_scores = normalize_scores
        self.mask_mode = mask_mode

    def forward(self, sentence_features: Iterable[Features], labels: Tensor) -> Tensor:
        """The loss of `[queries, documents]`, Nq and Nq * K rows, query-major, and the teacher's scores `[Nq, K]`."""
        features = list(sentence_features)
        if len(features) != 2:
            raise ValueError(f"there are {len(features)} batches of texts; want queries and their documents")
        queries, documents = features
        Q, q_mask = _encode(self.model, queries, True, self._kernels_normalize)
        encoded = _encode(self.model, documents, False, self._kernels_normalize)
        if not len(Q) or len(encoded[1]) % len(Q):
            raise checks.wrong_shape("documents", encoded[1].shape, f"as many rows for each of {len(Q)} queries")
        D, d_mask = (X.unflatten(0, (len(Q), -1)) for X in encoded)
        if self.score_metric is None:
            return distillation_loss(
                Q,
                D,
                labels,
                q_mask,
                d_mask,
                student_normalization="minmax" if self.normalize_scores else "none",
                reduction="mean" if self.size_average else "sum",
                normalize=self._kernels_normalize(Q),
                mask_mode=self.mask_mode,
            )
        scores = self.score_metric(Q, D, queries_mask=q_mask, documents_mask=d_mask)
        if self.normalize_scores:
            low, high = scores.min(1, keepdim=True)[0], scores.max(1, keepdim=True)[0]
            scores = (scores - low) / (high - low + 1e-8)
        student, teacher = scores.log_softmax(-1), labels.log_softmax(-1)
        reduction = "batchmean" if self.size_average else "sum"
        return nn.functional.kl_div(student, teacher, reduction=reduction, log_target=True)

    def _kernels_normalize(self, X: Tensor) -> bool:
        """A document has one query, so that they read it once."""
        return self.score_metric is None


def _encode(model: Any, features: Features, is_query: bool, kernels_normalize: Callable[[Tensor], bool]) -> Encoded:
    facts: Any = model if hasattr(model, "skiplist") else getattr(model, "module", None)
    if not hasattr(facts, "skiplist"):
        raise TypeError(f"model is a {type(model).__name__} without a skiplist; want a model as PyLate's ColBERT")
    # A copy, as models add their outputs to the dict they are given.
    embeddings = model(dict(features))["token_embeddings"]
    if not kernels_normalize(embeddings):
        embeddings = nn.functional.normalize(embeddings, dim=-1)
    mask = features["attention_mask"] != 0
    if is_query:
        # Expansion tokens score although the model does not attend to them.
        return embeddings, torch.ones_like(mask) if facts.do_query_expansion else mask
    skipped = torch.tensor(facts.skiplist, dtype=torch.long, device=mask.device)
    return embeddings, mask & ~torch.isin(features["input_ids"], skipped)


def _stack(documents: Sequence[Encoded]) -> Encoded:
    """K documents a query, `[N, Ld, d]` each with its own Ld, as `[N, K, Ld, d]`."""
    if not documents:
        raise ValueError("there are no documents; want queries and at least one batch of documents")
    rows = [len(mask) for _, mask in documents]
    if len(set(rows)) > 1:
        raise ValueError(f"batches of documents have {rows} rows; want as many")
    if len(documents) == 1:  # without a copy
        return documents[0][0].unsqueeze(1), documents[0][1].unsqueeze(1)
    longest = max(mask.shape[1] for _, mask in documents)
    pad = nn.functional.pad
    embeddings = [pad(each, (0, 0, 0, longest - each.shape[1])) for each, _ in documents]
    masks = [pad(mask, (0, longest - mask.shape[1])) for _, mask in documents]
    return torch.stack(embeddings, 1), torch.stack(masks, 1)
