"""A ColBERT model for PyLate without a download: a small BERT with random weights and a vocabulary of its own."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = [f"word{n}" for n in range(200)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[Q]", "[D]", *".,;:!?()", *WORDS]


def make(folder: Path, *, hidden: int = 32, layers: int = 2, dim: int = 16, dropout: float = 0.1, **options):
    """A `pylate.models.ColBERT`; options such as query_length are its own."""
    from pylate.models import ColBERT
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        intermediate_size=4 * hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return ColBERT(str(folder), embedding_size=dim, device="cpu", **options)


def texts(count: int, longest: int, *, seed: int) -> list[str]:
    """Words and punctuation, which PyLate masks in documents."""
    generator = torch.Generator().manual_seed(seed)
    choices = [*WORDS, *".,;!?" * 10]
    lengths = torch.randint(max(1, longest // 2), longest + 1, (count,), generator=generator)
    return [
        " ".join(choices[int(n)] for n in torch.randint(len(choices), (int(length),), generator=generator))
        for length in lengths
    ]
