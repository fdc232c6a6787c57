"""Four ways to score documents for a query, behind one surface: BM25, one vector a text, one vector a token, a cross-encoder.

`open_ranker(name)` takes "bm25", the folder or hub name of a model, or "fusion:MODEL:WEIGHT", the z-scored sum of BM25 and a
dense model. `index(documents)` comes first; then `all_scores(queries)` gives `[queries, documents]`, and
`pair_scores(queries, candidates)` the scores of some documents of each query.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from tqdm import tqdm

from edgecolbert_kernels import maxsim_varlen
from training import model as models
from training.backbones import package_folder, unreadable
from training.config import ConfigError

BATCH_TOKENS = 4096  # of the encoder: enough for its matrix products, little enough for its memory
QUERIES_A_CALL = 64


class Ranker(Protocol):
    def index(self, documents: Sequence[str]) -> None: ...

    def all_scores(self, queries: Sequence[str]) -> np.ndarray: ...

    def pair_scores(self, queries: Sequence[str], candidates: Sequence[Sequence[int]]) -> list[np.ndarray]: ...


class Dots:
    """Scores of chosen pairs from those of all."""

    def all_scores(self, queries: Sequence[str]) -> np.ndarray:
        raise NotImplementedError

    def pair_scores(self, queries: Sequence[str], candidates: Sequence[Sequence[int]]) -> list[np.ndarray]:
        scores = self.all_scores(queries)
        return [row[np.asarray(chosen, int)] for row, chosen in zip(scores, candidates, strict=True)]


class Bm25(Dots):
    """BM25 as Lucene computes it: Porter stems, Lucene's 33 stop words."""

    def __init__(self, k1: float = 0.9, b: float = 0.4) -> None:
        self.k1, self.b = k1, b

    def index(self, documents: Sequence[str]) -> None:
        import bm25s
        import Stemmer

        self._stemmer = Stemmer.Stemmer("porter")
        self._bm25 = bm25s.BM25(method="lucene", k1=self.k1, b=self.b)
        self._bm25.index(self._tokens(documents), show_progress=False)

    def _tokens(self, texts: Sequence[str]) -> Any:
        import bm25s

        return bm25s.tokenize(list(texts), stopwords="en", stemmer=self._stemmer, show_progress=False, return_ids=False)

    def all_scores(self, queries: Sequence[str]) -> np.ndarray:
        count = self._bm25.scores["num_docs"]
        tokens = self._tokens(queries)
        return np.stack([self._bm25.get_scores(each) if each else np.zeros(count, np.float32) for each in tokens])


class Dense(Dots):
    """Cosines of a sentence-transformers model."""

    # The vectors of one collection a model: mining, scoring and distilling ask for the same ones.
    kept: ClassVar[dict[str, tuple[bytes, np.ndarray]]] = {}

    def __init__(self, name: str, batch: int = 32) -> None:
        self.name, self.model, self.batch = name, sentence_transformer(name), batch

    def index(self, documents: Sequence[str]) -> None:
        digest = hashlib.sha256(repr(list(documents)).encode()).digest()
        if self.kept.get(self.name, (b"",))[0] != digest:
            encode, options = self.model.encode_document, {"batch_size": self.batch, "normalize_embeddings": True}
            self.kept[self.name] = digest, encode(list(documents), show_progress_bar=True, **options)
        self.vectors = self.kept[self.name][1]

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    def all_scores(self, queries: Sequence[str]) -> np.ndarray:
        vectors = self.model.encode_query(list(queries), batch_size=self.batch, normalize_embeddings=True)
        return vectors @ self.vectors.T


class LateInteraction(Dots):
    """MaxSim, exact, over token vectors kept in float16 (or mean-pooled vectors, as one token each)."""

    def __init__(self, encoder: models.Encoder, batch_tokens: int = BATCH_TOKENS, progress: bool = True) -> None:
        self.encoder, self.batch_tokens, self.progress = encoder, batch_tokens, progress

    def index(self, documents: Sequence[str]) -> None:
        self.documents = self._encode(documents, is_query=False)

    @property
    def nbytes(self) -> int:
        return self.documents[0].nbytes

    def all_scores(self, queries: Sequence[str]) -> np.ndarray:
        values, offsets = self._encode(queries, is_query=True)
        found = []
        starts = range(0, len(queries), QUERIES_A_CALL)
        for start in tqdm(starts, desc="Scoring", leave=False, disable=not self.progress or len(starts) < 8):
            own = offsets[start : start + QUERIES_A_CALL + 1]
            rows = values[own[0] : own[-1]]
            found.append(maxsim_varlen(rows, self.documents[0], own - own[0], self.documents[1]).cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, len(self.documents[1]) - 1), np.float32)

    def _encode(self, texts: Sequence[str], is_query: bool) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = encode(self.encoder, texts, is_query, self.batch_tokens, self.progress)
        offsets = torch.tensor([0, *map(len, vectors)]).cumsum(0)
        width = self.encoder.dimension
        return (torch.cat(vectors) if vectors else torch.zeros(0, width, dtype=torch.float16)), offsets


@torch.inference_mode()
def encode(
    encoder: models.Encoder,
    texts: Sequence[str],
    is_query: bool,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> list[torch.Tensor]:
    """float16 `[tokens, d]` a text. Long texts first: those of like length pad each other least."""
    encoder.eval()
    device = next(encoder.parameters()).device
    order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
    found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    longest = encoder.reading.query_length if is_query else encoder.reading.document_length
    with tqdm(total=len(texts), desc="Encoding", unit="text", leave=False, disable=not progress, mininterval=1) as bar:
        start = 0
        while start < len(order):
            # By characters first: at most one token each, usually a fourth.
            width = min(longest, len(texts[order[start]]) // 3 + 4)
            chosen = order[start : start + max(1, batch_tokens // width)]
            features = {
                name: value.to(device) for name, value in encoder.tokenize([texts[n] for n in chosen], is_query).items()
            }
            vectors = encoder(features["input_ids"], features["attention_mask"])
            kept = (
                features["score_mask"]
                if encoder.head is not None
                else torch.ones_like(vectors[..., 0], dtype=torch.bool)
            )
            # In one piece: small ones between a batch's large ones would keep the memory of those from being used again.
            tokens = vectors[kept].half().cpu().split(kept.sum(1).tolist())
            for n, own in zip(chosen, tokens, strict=True):
                found[n] = own
            start += len(chosen)
            bar.update(len(chosen))
    return found


class Fusion(Dots):
    """weight * z(dense) + (1 - weight) * z(BM25), z over all documents of a query."""

    def __init__(self, dense: Ranker, weight: float, k1: float = 1.2, b: float = 0.75) -> None:
        self.dense, self.bm25, self.weight = dense, Bm25(k1, b), weight

    def index(self, documents: Sequence[str]) -> None:
        self.dense.index(documents)
        self.bm25.index(documents)

    def all_scores(self, queries: Sequence[str]) -> np.ndarray:
        dense, sparse = zscore(self.dense.all_scores(queries)), zscore(self.bm25.all_scores(queries))
        return self.weight * dense + (1 - self.weight) * sparse


def zscore(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean(1, keepdims=True)) / (scores.std(1, keepdims=True) + 1e-8)


class CrossEncoder:
    """A model that reads query and document together."""

    def __init__(self, name: str, batch: int = 32) -> None:
        from sentence_transformers import CrossEncoder as Loaded

        self.model, self.batch = Loaded(name), batch

    def index(self, documents: Sequence[str]) -> None:
        self.documents = documents

    def all_scores(self, queries: Sequence[str]) -> np.ndarray:
        every = range(len(self.documents))
        return np.stack(self.pair_scores(queries, [every] * len(queries)))

    def pair_scores(self, queries: Sequence[str], candidates: Sequence[Sequence[int]]) -> list[np.ndarray]:
        pairs = [(query, self.documents[n]) for query, own in zip(queries, candidates, strict=True) for n in own]
        scores = np.asarray(self.model.predict(pairs, batch_size=self.batch, show_progress_bar=False), np.float32)
        ends = np.cumsum([len(own) for own in candidates])
        return np.split(scores.reshape(len(pairs)), ends[:-1])


def open_ranker(name: str, batch: int = 32) -> Ranker:
    """See the module's text. A folder's files, or its name on the hub, tell what it is."""
    if name == "bm25":
        return Bm25()
    if name.startswith("fusion:"):
        match = re.fullmatch(r"fusion:(.+):([01]|[01]?\.\d+)", name)
        if not match or float(match[2]) > 1:
            raise ConfigError(
                f"{name}: want fusion:MODEL:WEIGHT with a weight of 0 to 1, such as fusion:all-MiniLM-L6-v2:0.7"
            )
        return Fusion(open_ranker(match[1], batch), float(match[2]))
    name = located(name)
    facts = _facts(name)
    if facts.get("model_type") in ("ColBERT", "MultiVectorEncoder"):
        return LateInteraction(models.load(name))
    if facts.get("model_type") == "CrossEncoder" or "ForSequenceClassification" in str(facts.get("architectures")):
        return CrossEncoder(name, batch)
    return Dense(name, batch)


def located(name: str) -> str:
    """The folder of a model, or its name on the hub."""
    name = package_folder(name)
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise ConfigError(f"{name}: there is no such folder")
    return name


def sentence_transformer(name: str) -> Any:
    """The model of that library.

    Raises:
        ConfigError: there is none of this name, here or on the hub.
    """
    from sentence_transformers import SentenceTransformer

    name = located(name)
    try:
        return SentenceTransformer(name)
    except OSError as error:
        raise unreadable(name, name, error) from error


def _facts(name: str) -> dict[str, Any]:
    """A model's own description: sentence-transformers' file over transformers'."""
    facts: dict[str, Any] = {}
    for file in ("config.json", "config_sentence_transformers.json"):
        path = Path(name) / file
        if not Path(name).is_dir():
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

            repository = name if "/" in name else f"sentence-transformers/{name}"
            try:
                path = Path(hf_hub_download(repository, file))
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) and file == "config.json":
                    # The hub was not reached, and every kind of model has this file.
                    raise unreadable(name, name, error) from None
                continue
            except Exception as error:
                raise unreadable(name, name, error) from None
        own = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        facts |= {key: own[key] for key in ("model_type", "architectures") if own.get(key)}
    return facts


def top(scores: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """For each row the numbers of its `count` largest, best first; of equal ones the first."""
    for row in scores:
        some = np.argpartition(-row, min(count, len(row) - 1))[:count] if count < len(row) else np.arange(len(row))
        yield some[np.lexsort((some, -row[some]))]
