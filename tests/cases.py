"""Inputs that the tests and the benchmarks share: token embeddings in every storage, ragged, padded and packed.

Makers take the seed, so that a case is the same in every process; nothing here knows an instruction set or a kernel.
"""

from __future__ import annotations

import mmap

import numpy as np
import torch

DIMENSIONS = (1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 96, 128, 129)
"""Dimensions around every register width, the models' own (48, 64, 128), and one above a power of two."""

LENGTHS = (0, 1, 2, 11, 12, 13, 31, 33, 300)
"""Token counts around the kernels' 12-token tile and 16 lanes; 300 is a full document."""

STORAGES = (torch.float32, torch.float16, torch.bfloat16)


def storage_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def embeddings(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, norm: float | None = 1.0
) -> torch.Tensor:
    """Random rows of L2 norm `norm` (None: standard normal values) along the last of `shape`, rounded once to `dtype`."""
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))
    if norm is not None:
        rows = torch.nn.functional.normalize(rows, dim=-1) * norm
    return rows.to(dtype)


def grid(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, step: float = 1 / 64, largest: int = 8
) -> torch.Tensor:
    """Random multiples of `step`, at most `largest` of them: every storage, fp32 sum and Q15 holds them without rounding.

    So the exact result is the only right one, and ties are frequent. With d <= 128 the norms stay below sqrt(2).
    """
    integers = np.random.default_rng(seed).integers(-largest, largest + 1, shape)
    return torch.from_numpy(integers * step).to(dtype)


def holes(*shape: int, seed: int = 0, keep: float = 0.7) -> torch.Tensor:
    """A boolean mask with holes: True (kept) with probability `keep`, so neither a prefix nor empty as a rule."""
    return torch.from_numpy(np.random.default_rng(seed).random(shape) < keep)


def ragged(lengths, dim: int, *, make=embeddings, seed: int = 0, **kwargs) -> list[torch.Tensor]:
    """One [length, dim] tensor for each length, each with values of its own."""
    return [make(length, dim, seed=seed * 1000 + number, **kwargs) for number, length in enumerate(lengths)]


def padded(sequences: list[torch.Tensor], *, fill: float = float("nan")) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [N, longest, dim], mask [N, longest]) of ragged sequences; padding holds `fill`, NaN to show any leak."""
    rows = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return rows, torch.arange(rows.shape[1]) < lengths[:, None]


def packed(sequences: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [T, dim], cu_seqlens int64 [N + 1]) of ragged sequences, back to back."""
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    return torch.cat(sequences), lengths.cumsum(0)


def to_float64(sequences: list[torch.Tensor]) -> list[np.ndarray]:
    return [sequence.detach().double().numpy() for sequence in sequences]


def address_space(elements: int) -> np.ndarray:
    """fp16 zeros that take address space only: a page comes into being when it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return np.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), np.float16)


def rerank(num_documents: int, document_length: int, dim: int, dtype: torch.dtype, query_length: int = 32):
    """(query [Lq, dim], documents [Nd, Ld, dim]) of a rerank, normalised: the benchmarks' main shape."""
    query = embeddings(query_length, dim, dtype=dtype, seed=1)
    return query, embeddings(num_documents, document_length, dim, dtype=dtype, seed=2)
