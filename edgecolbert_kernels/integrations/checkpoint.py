"""A ColBERT checkpoint as a reranker of texts, with PyLate or sentence-transformers 6, whichever is installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from edgecolbert_kernels import checks
from edgecolbert_kernels.scoring import maxsim


class Checkpoint:
    """Encodes texts and scores them by MaxSim.

    Args:
        model: a checkpoint's name or folder, which PyLate or, if that is not installed, sentence-transformers 6 loads; or
            a model of one of them that is already loaded.
        device: where to encode; None leaves the choice to the library.
        batch_size: texts encoded at a time.

    Raises:
        ImportError: neither library is installed.
    """

    def __init__(self, model: Any, device: str | None = None, batch_size: int = 32) -> None:
        self.model = _load(model, device) if isinstance(model, str) else model
        self.batch_size = batch_size

    def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        """The score of every text, in the order of the texts."""
        if isinstance(texts, str):
            raise TypeError("texts is a str; want a sequence of them")
        if not texts:
            return []
        # On the CPU in numpy: lists of arrays are scored where they lie, without padding.
        (encoded,), documents = self._encode([query], True), self._encode(list(texts), False)
        return [float(score) for score in maxsim(encoded, documents)]

    def best(self, query: str, texts: Sequence[str], count: int) -> list[tuple[int, float]]:
        """Number and score of the best texts, best first; of equal scores the earlier text is first."""
        checks.at_least("count", count, 0)
        scores = self.scores(query, texts)
        return sorted(enumerate(scores), key=lambda pair: -pair[1])[:count]

    def _encode(self, texts: list[str], is_query: bool) -> list[Any]:
        options: dict[str, Any] = {"batch_size": self.batch_size, "show_progress_bar": False, "convert_to_numpy": True}
        if type(self.model).__name__ == "MultiVectorEncoder":
            encode = self.model.encode_query if is_query else self.model.encode_document
            return list(encode(texts, **options))
        return list(self.model.encode(texts, is_query=is_query, **options))


def _load(name: str, device: str | None) -> Any:
    for module, kind in (("pylate.models", "ColBERT"), ("sentence_transformers", "MultiVectorEncoder")):
        try:
            found = getattr(importlib.import_module(module), kind, None)
        except ImportError:
            continue
        if found is not None:
            return found(name, device=device)
    raise ImportError("a ColBERT checkpoint needs pylate or sentence-transformers>=6, and neither is installed")
