"""A document compressor for LangChain: MaxSim over a ColBERT checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import PrivateAttr

from edgecolbert_kernels.integrations.checkpoint import Checkpoint


class MaxSimRerank(BaseDocumentCompressor):
    """Keeps the `top_n` documents that score best, with the score in their metadata as "relevance_score".

    Args:
        model: a ColBERT checkpoint's name or folder (PyLate's format), or a loaded model of PyLate's or
            sentence-transformers 6.
        top_n: how many documents to keep.
        device, batch_size: for the encoder.
    """

    top_n: int = 5
    _checkpoint: Any = PrivateAttr()

    def __init__(self, model: Any, top_n: int = 5, device: str | None = None, batch_size: int = 32) -> None:
        super().__init__(top_n=top_n)
        self._checkpoint = Checkpoint(model, device, batch_size)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The best documents for the query, best first; those given are left as they are."""
        texts = [document.page_content for document in documents]
        return [
            documents[number].model_copy(update={"metadata": {**documents[number].metadata, "relevance_score": score}})
            for number, score in self._checkpoint.best(query, texts, self.top_n)
        ]
