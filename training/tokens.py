"""Tokenizers as a ColBERT wants them: prefixes of one token, lower-casing in their own file, filling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def add_prefixes(tokenizer: Any, backbone: Any, prefixes: Sequence[str]) -> None:
    """Make each prefix one token, which neither lower-casing nor the text after it can break up."""
    from tokenizers import AddedToken

    missing = [prefix for prefix in prefixes if prefix and tokenizer.tokenize(prefix) != [prefix]]
    if missing:
        tokenizer.add_tokens(
            [AddedToken(each, normalized=False, special=True) for each in missing], special_tokens=True
        )
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng():
            # Whatever the seed of a run: frozen layers then make the same of a text in each.
            torch.manual_seed(0)
            backbone.resize_token_embeddings(len(tokenizer))


def lowercase(tokenizer: Any) -> None:
    """In the tokenizer's own file, so that whoever loads it lower-cases too."""
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    own = backend.normalizer
    if isinstance(own, normalizers.BertNormalizer):
        own.lowercase = True
    if backend.normalizer is None or backend.normalizer.normalize_str("A") != "a":
        backend.normalizer = normalizers.Sequence([*([] if own is None else [own]), normalizers.Lowercase()])


def token_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    return list(tokenizer.convert_tokens_to_ids(list(words)))


def expansion_id(tokenizer: Any) -> int:
    """What queries are filled up with: [MASK], else the end of a text, else padding; as in PyLate."""
    for token in (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither [MASK] nor padding")
