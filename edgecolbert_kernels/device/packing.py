"""From hidden states on a device to packed token vectors on that device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgecolbert_kernels import checks
from edgecolbert_kernels.backends import ON_GPU, choose, pack_torch
from edgecolbert_kernels.device.dtypes import SCALED, STORAGE
from edgecolbert_kernels.ops import arguments
from edgecolbert_kernels.signatures import DeviceStorage

# Of a projection that waits to be packed, at a time.
PROJECTION_BYTES = 1 << 27


class _Rows(NamedTuple):
    """The hidden states of all documents back to back."""

    X: Tensor  # [R, h]
    bounds: Tensor  # int64 [N + 1], on the device
    starts: np.ndarray  # the same, on the host
    mask: Tensor | None  # bool [R]


@torch.no_grad()
def pack(
    hidden: Any, mask: Any, weight: Any, bias: Any, normalize: bool, dtype: DeviceStorage
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `edgecolbert_kernels.pack`, all of it on the device of `hidden`: tokens, offsets and scales.

    The host waits for the device twice: for the number of kept tokens, where there is a mask, and for whether a value did
    not fit the storage.
    """
    rows = _rows(hidden, mask)
    width, project = _projection(rows.X, weight, bias)
    device = rows.X.device
    target = None
    offsets, kept = rows.bounds, rows.X.shape[0]
    if rows.mask is not None:
        ends = torch.zeros(kept + 1, dtype=torch.int64, device=device)
        torch.cumsum(rows.mask, 0, out=ends[1:])
        target, offsets, kept = ends[:-1], ends[rows.bounds], int(ends[-1])
    tokens, scales, refused = empty(kept, len(rows.starts) - 1, width, dtype, device)
    kernels = backend(device, width, dtype)
    most = rows.X.shape[0] if weight is None else PROJECTION_BYTES // (4 * width)
    with torch.autocast(device.type, enabled=False):
        for begin, end in cuts(rows.starts, most):
            first, last = int(rows.starts[begin]), int(rows.starts[end])
            part = slice(first, last)
            kernels.store_rows(
                project(rows.X[part]),
                rows.bounds[begin : end + 1] - first,
                None if rows.mask is None else rows.mask[part],
                None if target is None else target[part],
                normalize,
                tokens if target is not None else tokens[part],
                None if scales is None else scales[begin:end],
                refused,
            )
    if refused.item():
        raise checks.storage_range("hidden", dtype)
    return tokens, offsets, scales


def empty(
    tokens: int, documents: int, dim: int, dtype: DeviceStorage, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Room for tokens and scales, and the flag that a value did not fit."""
    scales = torch.empty(documents, dtype=torch.float32, device=device) if dtype in SCALED else None
    return (
        torch.empty(tokens, dim, dtype=STORAGE[dtype], device=device),
        scales,
        torch.zeros(1, dtype=torch.int32, device=device),
    )


def cuts(starts: np.ndarray, tokens: int, documents: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of up to so many tokens, one document at least, and of up to so many documents; `starts` are boundaries."""
    begin, count = 0, len(starts) - 1
    while begin < count:
        end = int(np.searchsorted(starts, starts[begin] + tokens, "right")) - 1
        end = min(max(begin + 1, end), count if documents is None else begin + documents, count)
        yield begin, end
        begin = end


def backend(device: torch.device, dim: int, dtype: DeviceStorage) -> Any:
    """The module that packs and unpacks rows of a storage there."""
    if dtype != "float8_e4m3fn" and choose("maxsim", device.type, "float32") in ON_GPU:
        from edgecolbert_kernels.backends.triton import pack as kernels

        if kernels.takes(dim):
            return kernels
    return pack_torch


def _rows(hidden: Any, mask: Any) -> _Rows:
    if isinstance(hidden, Tensor):
        checks.rank("hidden", hidden.shape, (3,), "[N, L, h] or a list of [L, h]")
        checks.at_least("h", hidden.shape[2], 1)
        _floats("hidden", hidden)
        count, length, dim = hidden.shape
        if mask is not None:
            mask = _on("mask", mask, hidden.device)
            checks.mask("mask", mask.shape, "hidden", hidden.shape)
        X = hidden.reshape(count * length, dim)
        starts = np.arange(count + 1) * length
        bounds = torch.arange(count + 1, device=hidden.device) * length
        kept = None if mask is None else arguments.kept(mask).reshape(-1)
    else:
        for n, each in enumerate(hidden):
            if not isinstance(each, Tensor):
                raise checks.not_an_array(f"hidden[{n}]", each, "a torch tensor, as hidden[0] is one")
            checks.same_device(f"hidden[{n}]", each.device, hidden[0].device, "hidden[0]")
            _floats(f"hidden[{n}]", each)
        checks.token_list("hidden", hidden)
        checks.at_least("h", hidden[0].shape[1], 1)
        X = torch.cat(list(hidden))
        starts = np.cumsum([0, *(each.shape[0] for each in hidden)], dtype=np.int64)
        bounds = torch.from_numpy(starts).to(X.device)
        kept = _joined_masks(mask, hidden)
    X = X.detach()
    if X.dtype is torch.float64:
        X = X.float()
    return _Rows(X if X.stride(-1) == 1 else X.contiguous(), bounds, starts, kept)


def _joined_masks(mask: Any, hidden: Sequence[Tensor]) -> Tensor | None:
    if mask is None:
        return None
    checks.mask_list("mask", mask, "hidden", len(hidden))
    masks = []
    for n, (each, X) in enumerate(zip(mask, hidden, strict=True)):
        if each is None:
            masks.append(X.new_ones(X.shape[0], dtype=torch.bool))
            continue
        each = _on(f"mask[{n}]", each, X.device)
        checks.mask(f"mask[{n}]", each.shape, f"hidden[{n}]", X.shape)
        masks.append(arguments.kept(each))
    return torch.cat(masks)


def _projection(X: Tensor, weight: Any, bias: Any) -> tuple[int, Any]:
    """d, and a function from hidden states `[r, h]` to float32 `[r, d]`; without a weight, what they are."""
    if weight is None:
        if bias is not None:
            raise checks.wrong_shape("bias", bias.shape, "[d], with a weight [d, h]")
        return X.shape[1], lambda rows: rows
    weight = _on("weight", weight, X.device)
    checks.rank("weight", weight.shape, (2,), "[d, h]")
    if weight.shape[1] != X.shape[1]:
        raise checks.wrong_shape("weight", weight.shape, f"[d, {X.shape[1]}], as hidden has h = {X.shape[1]}")
    if bias is not None:
        bias = _on("bias", bias, X.device).float()
        if tuple(bias.shape) != (weight.shape[0],):
            raise checks.wrong_shape("bias", bias.shape, "[d], with a weight [d, h]")
    # Products of halves are exact in float32: tensor cores take them as they are, and keep the sums in float32.
    halves = X.device.type == "cuda" and X.dtype == weight.dtype and X.dtype in (torch.float16, torch.bfloat16)
    matrix = weight.T if halves else weight.T.float()

    def project(rows: Tensor) -> Tensor:
        rows = torch.mm(rows, matrix, out_dtype=torch.float32) if halves else torch.mm(rows.float(), matrix)
        return rows if bias is None else rows + bias

    return weight.shape[0], project


def _on(name: str, seen: Any, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(seen)
    return tensor.to(device)


def _floats(name: str, X: Tensor) -> None:
    if X.dtype not in arguments.DTYPES:
        raise checks.wrong_dtype(name, X.dtype, checks.FLOATS)
