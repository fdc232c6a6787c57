"""A node postprocessor for LlamaIndex: MaxSim over a ColBERT checkpoint.

LlamaIndex's own `ColbertRerank` averages over query tokens and uses neither the checkpoint's projection nor its markers.
"""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from edgecolbert_kernels.integrations.checkpoint import Checkpoint


class MaxSimRerank(BaseNodePostprocessor):
    """Keeps the `top_n` nodes that score best, with their scores.

    Args:
        model: a ColBERT checkpoint's name or folder (PyLate's format), or a loaded model of PyLate's or
            sentence-transformers 6.
        top_n: how many nodes to keep.
        device, batch_size: for the encoder.
        keep_retrieval_score: put the score that a node came with into its metadata, as "retrieval_score".
    """

    top_n: int = Field(description="Number of nodes to return.")
    keep_retrieval_score: bool = Field(default=False, description="Keep the former score in the metadata.")
    _checkpoint: Any = PrivateAttr()

    def __init__(
        self,
        model: Any,
        top_n: int = 5,
        device: str | None = None,
        batch_size: int = 32,
        keep_retrieval_score: bool = False,
    ) -> None:
        super().__init__(top_n=top_n, keep_retrieval_score=keep_retrieval_score)
        self._checkpoint = Checkpoint(model, device, batch_size)

    @classmethod
    def class_name(cls) -> str:
        return "MaxSimRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("there is no query to rerank for: pass query_bundle or query_str")
        texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
        kept = []
        for number, score in self._checkpoint.best(query_bundle.query_str, texts, self.top_n):
            node = nodes[number]
            if self.keep_retrieval_score:
                node.node.metadata["retrieval_score"] = node.score
            kept.append(NodeWithScore(node=node.node, score=score))
        return kept
