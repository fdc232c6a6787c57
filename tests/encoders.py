"""Small encoders with everything that training has: dropout, masks, padding; and what is equal to GradCache by definition."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 50


class Encoder(nn.Module):
    """Token ids `[n, L]` and their mask -> unit embeddings `[n, L, dim]` and the mask."""

    def __init__(self, dim: int = 8, hidden: int = 16, dropout: float = 0.2, *, checkpointing: str = "") -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.mix = nn.Sequential(nn.Linear(hidden, hidden), nn.Dropout(dropout), nn.GELU(), nn.Linear(hidden, hidden))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, dim, bias=False)
        self.checkpointing = checkpointing

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.dropout(self.embed(input_ids))
        mean = (hidden * attention_mask[..., None]).sum(1, keepdim=True) / attention_mask.sum(1)[
            :, None, None
        ].clamp_min(1)
        if self.checkpointing:
            hidden = hidden + checkpoint(self.mix, hidden + mean, use_reentrant=self.checkpointing == "reentrant")
        else:
            hidden = hidden + self.mix(hidden + mean)
        return nn.functional.normalize(self.head(hidden), dim=-1), attention_mask.bool()


def texts(count: int, longest: int, *, seed: int) -> dict[str, Tensor]:
    """Token ids and mask `[count, longest]` of ragged texts, padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count, 1), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths).long()
    return {
        "input_ids": torch.randint(VOCABULARY, (count, longest), generator=generator) * mask,
        "attention_mask": mask,
    }


def trimmed(encode):
    """The encoder on batches cut to their longest text, as a tokenizer pads them."""

    def call(input_ids: Tensor, attention_mask: Tensor):
        longest = int(attention_mask.sum(1).max())
        return encode(input_ids=input_ids[:, :longest], attention_mask=attention_mask[:, :longest])

    return call


def gradients(*modules: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for module in modules for p in module.parameters()]


def rows(batch, start: int, stop: int):
    return {name: value[start:stop] for name, value in batch.items()}


def whole(encode, batch: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """The representations of a batch with a graph, encoded in chunks of the same order, so with the same dropout."""
    count = len(batch["input_ids"])
    longest = batch["input_ids"].shape[1]
    outputs = [encode(**rows(batch, start, start + size)) for start in range(0, count, size)]
    tokens = [nn.functional.pad(tokens, (0, 0, 0, longest - tokens.shape[1])) for tokens, _ in outputs]
    masks = [nn.functional.pad(mask, (0, longest - mask.shape[1])) for _, mask in outputs]
    return torch.cat(tokens), torch.cat(masks)
