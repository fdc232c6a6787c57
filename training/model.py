"""A text encoder with one vector a token (ColBERT) or one a text (mean pooling), made new or loaded.

Its files are those of PyLate 1.6 (ColBERT) or of sentence-transformers (dense): training/formats.py. Needs torch and
transformers alone.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training import config as settings
from training import formats
from training.backbones import HUB, load_backbone, longest_text
from training.frozen import Frozen
from training.head import build_head
from training.tokens import add_prefixes, expansion_id, lowercase, token_ids

Features = dict[str, Tensor]

TEXTS_A_PIECE = 16


@dataclass
class Reading:
    """How texts become tokens. Lengths count special tokens and the prefix."""

    query_prefix: str
    document_prefix: str
    query_length: int
    document_length: int
    query_expansion: bool = False
    attend_to_expansion: bool = False
    skiplist: tuple[str, ...] = ()


class Encoder(nn.Module):
    """`forward` takes what `tokenize` makes, and returns unit vectors: `[n, L, d]` with a head, else `[n, 1, hidden]`."""

    backbone: Any
    tokenizer: Any
    head: Any

    def __init__(
        self, backbone: nn.Module, tokenizer: Any, reading: Reading, head: nn.Sequential | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.tokenizer, self.reading, self.head = backbone, tokenizer, reading, head
        # Nothing here uses a pooler; frozen, it stays in the file, and data parallelism does not wait for its gradient.
        for name, parameter in backbone.named_parameters():
            if name.startswith("pooler."):
                parameter.requires_grad_(False)
        self.base = ""
        self.frozen: Frozen | None = None
        self._resolve()

    def _resolve(self) -> None:
        """What tokenisation needs, looked up once."""
        self.skipped = torch.tensor(sorted(set(token_ids(self.tokenizer, self.reading.skiplist))), dtype=torch.long)
        self.prefix_ids = {
            is_query: self.tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
            for is_query, prefix in ((True, self.reading.query_prefix), (False, self.reading.document_prefix))
        }

    @property
    def dimension(self) -> int:
        return int(self.backbone.config.hidden_size if self.head is None else self.head[-1].linear.out_features)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.training and input_ids.device.type == "cpu":
            return self._in_pieces(input_ids, attention_mask)
        return self._encode(input_ids, attention_mask)

    def _in_pieces(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts of like length together: a CPU gains nothing from more rows, and loses what it spends on padding."""
        lengths = attention_mask.sum(1)
        found: list[Tensor] = [input_ids] * len(input_ids)
        for rows in lengths.argsort(stable=True).split(TEXTS_A_PIECE):
            # Expansion tokens that nobody attends to stand behind the others, and have vectors.
            longest = input_ids.shape[1] if self.reading.query_expansion else int(lengths[rows].max())
            vectors = self._encode(input_ids[rows, :longest], attention_mask[rows, :longest])
            missing = (input_ids.shape[1] if self.head is not None else 1) - vectors.shape[1]
            for row, own in zip(rows.tolist(), nn.functional.pad(vectors, (0, 0, 0, missing)), strict=True):
                found[row] = own
        return torch.stack(found)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[n, L, hidden]`: what the backbone makes of the tokens."""
        if self.frozen is not None:
            return self.frozen(input_ids, attention_mask)
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def _encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.states(input_ids, attention_mask)
        if self.head is None:
            weight = attention_mask[..., None].to(hidden.dtype)
            hidden = ((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9))[:, None]
        else:
            hidden = self.head(hidden)
        return nn.functional.normalize(hidden, dim=-1)

    def tokenize(self, texts: Sequence[str], is_query: bool, prompt: str | None = None) -> Features:
        """`input_ids`, `attention_mask` and `score_mask` `[n, L]`: the tokens that get a vector.

        prompt: text before each; None: a dense model's own.
        """
        reading = self.reading
        length = reading.query_length if is_query else reading.document_length
        dense = self.head is None
        if prompt is None:
            prompt = (reading.query_prefix if is_query else reading.document_prefix) if dense else ""
        prefix = [] if dense else self.prefix_ids[is_query]
        lists = self.tokenizer(
            [prompt + text for text in texts],
            truncation=True,
            max_length=length - len(prefix),
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        # After the first token, as PyLate does.
        rows = [ids[:1] + prefix + ids[1:] for ids in lists]
        expand = is_query and not dense and reading.query_expansion
        longest = length if expand else max(map(len, rows), default=0)
        filler = self.tokenizer.pad_token_id if dense else expansion_id(self.tokenizer)
        input_ids = torch.full((len(rows), longest), filler, dtype=torch.long)
        for row, ids in zip(input_ids, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        real = torch.arange(longest) < torch.tensor([len(ids) for ids in rows])[:, None]
        attended = torch.ones_like(real) if expand and reading.attend_to_expansion else real
        if is_query:
            scored = torch.ones_like(real) if expand else real
        else:
            scored = real & ~torch.isin(input_ids, self.skipped) if not dense else real
        return {"input_ids": input_ids, "attention_mask": attended.long(), "score_mask": scored}

    def freeze(self, layers: int, folder: Path | None = None) -> None:
        """Train the head and what is above the first `layers` layers alone; `folder` keeps the states below between runs."""
        if self.reading.query_expansion and not self.reading.attend_to_expansion:
            raise settings.ConfigError("model.freeze: with model.query_expansion it wants model.attend_to_expansion")
        self.frozen = Frozen(self.backbone, layers, folder)

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        for module in self.frozen.modules if self.frozen else ():
            module.eval()
        return self

    @torch.no_grad()
    def start_at(self, directions: Tensor) -> None:
        """Make the head the projection on `directions [hidden, dimension]`, whatever its depth, for training to go on from."""
        if self.head is None or any(not layer.has_residual for layer in self.head[:-1]):
            raise settings.ConfigError(
                "model.head: one that starts at a projection needs a residual in every layer but the last"
            )
        for layer in self.head:
            nn.init.zeros_(layer.linear.weight)
            if layer.linear.bias is not None:
                nn.init.zeros_(layer.linear.bias)
            if layer.residual is not None:
                nn.init.eye_(layer.residual.weight)
        last = self.head[-1]
        if last.has_residual and last.residual is None:
            raise settings.ConfigError(
                "model.head: the last layer is square: its residual leaves no place for a projection"
            )
        matrix = (last.residual or last.linear).weight
        matrix.zero_()
        matrix[:, : len(directions)] = directions.T.to(matrix.dtype)

    def save(self, folder: str | Path, card: str = "") -> None:
        """Write a folder that PyLate (with a head) or sentence-transformers loads."""
        formats.save(self, folder, card)


def create(wanted: settings.Model, stage: str) -> Encoder:
    """The model of a configuration: a checkpoint, or a new one around a backbone, or random weights."""
    folder, backbone, tokenizer = load_backbone(wanted)
    saved, layers = formats.read_checkpoint(folder)
    dense = stage != "colbert"
    head = None
    if not dense:
        if wanted.head is not None or not layers:
            head = build_head(wanted.head or settings.Head(), backbone.config.hidden_size, wanted.dimension)
        else:
            head = nn.Sequential(*layers)

    def choose(name: str, key: str, otherwise: Any) -> Any:
        given = getattr(wanted, name)
        return given if given is not None else saved.get(key, otherwise)

    # Prompts of a dense model are no prefixes of a ColBERT, nor is its reading length.
    saved = saved if dense == ("skiplist_words" not in saved) else {}
    skiplist = choose("skiplist", "skiplist_words", list(string.punctuation))
    if "skiplist_words" not in saved or wanted.skiplist is not None:
        # A word that is no token would stand for all unknown words.
        skiplist = [word for word in skiplist if token_ids(tokenizer, [word]) != [tokenizer.unk_token_id]]
    reading = Reading(
        query_prefix=choose("query_prefix", "query_prefix", "" if dense else "[Q] "),
        document_prefix=choose("document_prefix", "document_prefix", "" if dense else "[D] "),
        query_length=choose("query_length", "query_length", 64 if dense else 32),
        document_length=choose("document_length", "document_length", 128 if dense else 180),
        query_expansion=not dense and choose("query_expansion", "do_query_expansion", False),
        attend_to_expansion=not dense and choose("attend_to_expansion", "attend_to_expansion_tokens", False),
        skiplist=() if dense else tuple(skiplist),
    )
    longest = longest_text(backbone)
    for name in ("query_length", "document_length"):
        if not 4 <= getattr(reading, name) <= longest:
            raise settings.ConfigError(
                f"model.{name} is {getattr(reading, name)}; this encoder reads 4 to {longest} tokens"
            )
    if wanted.lowercase:
        lowercase(tokenizer)
    if not dense:
        add_prefixes(tokenizer, backbone, [reading.query_prefix, reading.document_prefix])
    encoder = Encoder(backbone, tokenizer, reading, head)
    encoder.base = HUB.get(wanted.base, wanted.base)
    if wanted.freeze:
        encoder.freeze(wanted.freeze, Path(wanted.states) if wanted.states else None)
    return encoder


def load(folder: str | Path) -> Encoder:
    """A ColBERT in PyLate's or sentence-transformers' format, or a dense encoder with mean pooling."""
    _, layers = formats.read_checkpoint(Path(folder))
    return create(settings.Model(base=str(folder)), "colbert" if layers else "contrastive").eval()
