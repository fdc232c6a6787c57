"""The first layers of an encoder, left as they are: what they make of a text is computed once and kept.

A text that is met again costs the layers above alone, and with every layer frozen the head alone. The states are kept in
memory in float16, 768 bytes a token at a width of 384, and on request in a file for the runs to come. Each text is computed
by itself: its states depend on nothing but the text, and a run that goes on after an interruption meets the same ones to the
last bit.
"""

from __future__ import annotations

import copy
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.config import ConfigError


class Frozen:
    """The embeddings and the first `count` layers of `backbone`, and the rest of it as a model of its own.

    Both share the modules of `backbone`, in whose state they remain. Not a module, so that nothing is registered twice.
    """

    def __init__(self, backbone: Any, count: int, folder: Path | None = None) -> None:
        layers = getattr(getattr(backbone, "encoder", None), "layer", None)
        if layers is None or not hasattr(backbone, "embeddings"):
            raise ConfigError(f"model.freeze: {type(backbone).__name__} has not BERT's embeddings and encoder.layer")
        if not 0 < count <= len(layers):
            raise ConfigError(f"model.freeze is {count}; this encoder has {len(layers)} layers")
        self.modules = [backbone.embeddings, *layers[:count]]
        for module in self.modules:
            module.requires_grad_(False)
        self.lower = _with(backbone, backbone.embeddings, layers[:count])
        self.upper = _with(backbone, Given(), layers[count:])
        self.kept: dict[bytes, Tensor] = {}
        self.path = None if folder is None else folder / f"{self._digest()[:24]}.pt"
        self.saved = 0
        if self.path is not None and self.path.exists():
            self.kept = torch.load(self.path, mmap=True, weights_only=True)
            self.saved = len(self.kept)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The states `[n, L, hidden]` above all layers; with a gradient for the upper ones."""
        rows = [ids[: int(mask.sum())] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        states = [self.states(ids) for ids in rows]
        given = torch.zeros(*input_ids.shape, states[0].shape[-1], device=input_ids.device)
        for row, own in zip(given, states, strict=True):
            row[: len(own)] = own
        return self.upper(inputs_embeds=given, attention_mask=attention_mask).last_hidden_state

    @torch.no_grad()
    def states(self, ids: Tensor) -> Tensor:
        """float16 `[len(ids), hidden]` of one text."""
        key = ids.cpu().numpy().tobytes()
        if key not in self.kept:
            states = self.lower(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).last_hidden_state[0]
            self.kept[key] = states.half()
        return self.kept[key]

    def save(self) -> None:
        """Keep what is new for the runs to come, if a folder was given."""
        if self.path is None or len(self.kept) == self.saved:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        torch.save(self.kept, part)
        os.replace(part, self.path)
        self.saved = len(self.kept)

    def _digest(self) -> str:
        found = hashlib.sha256()
        for module in self.modules:
            for tensor in module.state_dict().values():
                found.update(tensor.cpu().numpy().tobytes())
        return found.hexdigest()


class Given(nn.Module):
    """Stands for embeddings that are there already."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


def _with(backbone: Any, embeddings: nn.Module, layers: nn.ModuleList) -> Any:
    """The backbone with other embeddings and fewer layers, all else shared."""
    other, other.encoder = _shallow(backbone), _shallow(backbone.encoder)
    other.embeddings, other.encoder.layer = embeddings, layers
    return other


def _shallow(module: nn.Module) -> Any:
    own = copy.copy(module)
    own._modules = dict(module._modules)
    return own
