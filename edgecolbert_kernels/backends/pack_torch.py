"""Packing in plain PyTorch, on any device: what `triton.pack` does, where that cannot run."""

from __future__ import annotations

import torch
from torch import Tensor

from edgecolbert_kernels.backends.torch_ import SMALLEST_NORM

# What a document's largest value becomes.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# A document whose largest value is below this is one of zeros: the inverse of its scale would not be finite.
SMALLEST_DOCUMENT = 2e-36


def store_rows(
    X: Tensor,
    bounds: Tensor,
    mask: Tensor | None,
    target: Tensor | None,
    normalize: bool,
    tokens: Tensor,
    scales: Tensor | None,
    refused: Tensor,
) -> None:
    """As `triton.pack.store_rows`, and for float8_e4m3fn; here the number of kept rows comes to the host."""
    where = None if mask is None or target is None else target[mask]
    rows = X if mask is None else X[mask]
    if rows.dtype != tokens.dtype or normalize:
        rows = rows.to(torch.float32)
    if normalize:
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    if scales is not None:
        document = torch.repeat_interleave(bounds.diff(), output_size=X.shape[0])
        rows = _scaled(rows, document if mask is None else document[mask], scales, LARGEST[tokens.dtype], refused)
        rows = rows.round_() if tokens.dtype is torch.int8 else rows
    stored = rows.to(tokens.dtype)
    if scales is None and stored.dtype != rows.dtype:
        refused |= (stored.isinf() & ~rows.isinf()).any()
    if where is None:
        tokens.copy_(stored)
    else:
        # Indexing knows no float8: its bytes will do.
        bits = torch.int8 if tokens.itemsize == 1 else tokens.dtype
        tokens.view(bits)[where] = stored.view(bits)


def unpack_rows(tokens: Tensor, offsets: Tensor, scales: Tensor | None) -> Tensor:
    """As `triton.pack.unpack_rows`, and for float8_e4m3fn."""
    rows = tokens.to(torch.float32)
    if scales is None:
        return rows
    return rows.mul_(scales.repeat_interleave(offsets.diff(), output_size=tokens.shape[0])[:, None])


def _scaled(rows: Tensor, document: Tensor, scales: Tensor, most: float, refused: Tensor) -> Tensor:
    """Multiplied so that the largest value of each document is `most`; the inverse of that goes into `scales`."""
    largest = torch.zeros_like(scales).scatter_reduce_(0, document, rows.abs().amax(1), "amax")
    refused |= ~largest.isfinite().all()
    counts = largest >= SMALLEST_DOCUMENT
    # Divisions of two tensors: with a number PyTorch multiplies by an inverse, which rounds twice.
    steps = torch.full_like(largest, most)
    scales.copy_((largest / steps).masked_fill_(~counts, 0))
    inverse = (steps / largest).masked_fill_(~counts, 0)
    return rows * inverse[document][:, None]
