"""PyLate 1.4 to 1.6 on these kernels: scores, reranking, `similarity`, evaluators and all losses.

What changes besides the time: half precision is scored and returned in float32, as PyLate's own kernels do; `rerank` pads
no documents, so that a zero of the padding no longer beats negative similarities; lists of unequal lengths are scored
where PyLate stops; the gradients of `CachedContrastive` with `size_average=True` are those of `Contrastive`, where
PyLate's are batch_size times as large. XTR scores are no MaxSim and stay.

A call with `backend=` or PYLATE_SCORES_BACKEND other than "auto" goes where it asks for, as does a call that no kernel
takes (a GPU without one, float64) or that is wrong: PyLate answers it, or complains, as ever.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edgecolbert_kernels import checks
from edgecolbert_kernels.integrations import functions, inputs
from edgecolbert_kernels.integrations.patching import Patch, Report, Target, hit, original
from edgecolbert_kernels.scoring import maxsim
from edgecolbert_kernels.signatures import MaskMode

VARIABLE = "PYLATE_SCORES_BACKEND"


def patch_pylate(*, mask_mode: MaskMode = "zero", average_cached_gradients: bool = True) -> Report:
    """Let PyLate score on these kernels, until `unpatch_pylate`; twice is harmless.

    Args:
        mask_mode: "zero" scores a masked document token as PyLate does, as a similarity of 0; "exclude" never chooses it.
        average_cached_gradients: divide the gradients of `CachedContrastive` by the batch size where `size_average` asks
            for the mean. PyLate forgets to, so a learning rate found with it may have to be larger.

    Returns:
        What was reached, and the calls that the kernels answered (`hits`). What could not be reached is a warning.

    Raises:
        ImportError: PyLate is not installed. RuntimeError: it is patched with other options, by a block that is open.
    """
    return _patch.apply(mask_mode=mask_mode, average_cached_gradients=average_cached_gradients)


def unpatch_pylate() -> None:
    """Give PyLate its own functions back, once no `using_pylate` block is open."""
    _patch.undo()


def using_pylate(
    *, mask_mode: MaskMode = "zero", average_cached_gradients: bool = True
) -> AbstractContextManager[Report]:
    """`patch_pylate` for a `with` block; for all threads."""
    return _patch.using(mask_mode=mask_mode, average_cached_gradients=average_cached_gradients)


def _targets(mask_mode: MaskMode, average_cached_gradients: bool) -> Sequence[Target]:
    checks.options(mask_mode, "exact")
    module = importlib.import_module("pylate.scores").colbert_scores.__module__  # 1.4 has another file
    scores: dict[str, Callable[..., Tensor]] = {
        "colbert_scores": partial(functions.colbert_scores, mask_mode=mask_mode),
        "colbert_kd_scores": partial(functions.colbert_kd_scores, mask_mode=mask_mode),
        "colbert_scores_pairwise": functions.colbert_scores_pairwise,
    }
    targets = [
        *(Target(f"{module}:{name}", _scorer(f"{module}:{name}", function)) for name, function in scores.items()),
        Target(RERANK, _rerank),
    ]
    if average_cached_gradients:
        targets.append(Target(CACHED, _average_cached_gradients))
    return targets


def _scorer(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def scorer(queries_embeddings: Any, documents_embeddings: Any, backend: str | None = None, **masks: Any) -> Tensor:
        arguments = {"queries_embeddings": queries_embeddings, "documents_embeddings": documents_embeddings, **masks}
        asked = os.environ.get(VARIABLE, "auto") if backend is None else backend
        if asked == "auto" and inputs.fused(queries_embeddings, documents_embeddings):
            try:
                scores = function(**arguments)
            except (TypeError, ValueError):
                pass  # An input that is not what we take: PyLate takes it, or says so in its own words.
            else:
                if not torch.compiler.is_compiling():
                    hit(name)
                return scores
        if backend is not None:
            arguments["backend"] = backend
        return original(name)(**arguments)

    return scorer


RERANK = "pylate.rank.rank:rerank"


def _rerank(documents_ids: Any, queries_embeddings: Any, documents_embeddings: Any, device: Any = None) -> list[Any]:
    batches = [X[None] if getattr(X, "ndim", 3) == 2 else X for X in (queries_embeddings, documents_embeddings)]
    if os.environ.get(VARIABLE, "auto") == "auto":
        try:
            # All before the first is answered, so that the host is asked for everything or nothing.
            every = [_one(query, documents, device) for query, documents in zip(*batches, strict=False)]
        except (TypeError, ValueError, _NotFused):
            pass
        else:
            hit(RERANK)
            return [_ranked(ids, scores) for ids, scores in zip(documents_ids, every, strict=False)]
    return original(RERANK)(documents_ids, queries_embeddings, documents_embeddings, device)


class _NotFused(Exception):
    """PyTorch would have to score this."""


def _one(query: Any, documents: Any, device: Any) -> Tensor:
    if not isinstance(documents, Tensor) and len(documents) == 0:
        return torch.zeros(0)
    query = inputs.whole(query)
    device = query.device if device is None else torch.device(device)
    query, documents = query.to(device), inputs.batch(documents)
    if device.type != "cpu":
        documents = inputs.move(documents, device)
    if not inputs.fused(query, documents):
        raise _NotFused
    if isinstance(documents, list) and not isinstance(documents[0], Tensor):
        query = query.numpy()  # All in numpy: a list of arrays is read where it lies.
    return inputs.tensor(maxsim(query, documents))


def _ranked(ids: Sequence[Any], scores: Tensor) -> list[dict[str, Any]]:
    best, order = torch.sort(scores, descending=True)
    return [{"id": ids[n], "score": score} for n, score in zip(order.tolist(), best.tolist(), strict=True)]


CACHED = "pylate.losses.cached_contrastive:CachedContrastive.calculate_loss_and_cache_gradients"


def _average_cached_gradients(self: Any, reps: Any, masks: Any) -> Tensor:
    loss = original(CACHED)(self, reps, masks)
    if self.size_average:
        # The host divides the loss by the batch size, but only after it has taken these gradients, of the sum.
        count = sum(len(chunk) for chunk in reps[0])
        for gradients in self.cache:
            for gradient in gradients:
                if gradient is not None:
                    gradient.div_(count)
    return loss


_patch = Patch("pylate", _targets, ("1.4", "1.7"))
