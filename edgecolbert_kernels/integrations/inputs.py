"""What the hosts hand over, as tensors and arrays that `scoring` takes: batches, lists, masks; and who would score them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecolbert_kernels import backends, checks
from edgecolbert_kernels.ops import arguments, tensors

# Integers of a float's width, and all their bits but the sign's.
BITS = {
    torch.float32: (torch.int32, 2**31 - 1),
    torch.float16: (torch.int16, 2**15 - 1),
    torch.bfloat16: (torch.int16, 2**15 - 1),
}


def fused(Q: Any, D: Any) -> bool:
    """Whether a kernel of ours, not plain PyTorch, would score these; the hosts have plain PyTorch themselves."""
    Q, D = (X[0] if isinstance(X, (list, tuple)) and len(X) else X for X in (Q, D))
    device, dtype = "cpu", "float32"
    for X in (Q, D):
        if isinstance(X, Tensor):
            if X.dtype not in arguments.DTYPES:
                return False
            device = X.device.type if X.device.type != "cpu" else device
            dtype = "float64" if X.dtype == torch.float64 else dtype
        elif isinstance(X, np.ndarray) and X.dtype.kind != "f":
            return False
    return (_known if torch.compiler.is_compiling() else _takes)(device, dtype)


def _takes(device: str, dtype: str) -> bool:
    return backends.choose("maxsim", device, dtype) != "torch"


_known = torch.compiler.assume_constant_result(_takes)


def whole(X: Any) -> Tensor:
    """A tensor of an array or of lists of equal lengths."""
    if isinstance(X, Tensor):
        return X
    if isinstance(X, np.ndarray):
        return tensors.from_numpy(X)
    if X and isinstance(X[0], Tensor):
        return torch.stack(list(X))
    return torch.from_numpy(np.asarray(X, dtype=np.float32))


def batch(X: Any) -> Any:
    """The same, but a list of matrices stays one, as its lengths may differ."""
    if isinstance(X, (list, tuple)) and X and all(isinstance(x, (Tensor, np.ndarray)) and x.ndim == 2 for x in X):
        return list(X)
    return whole(X)


def matrices(X: Any) -> list[Any]:
    return [x if isinstance(x, (Tensor, np.ndarray)) else torch.tensor(x, dtype=torch.float32) for x in X]


def kept(mask: Any, X: Any) -> Any:
    """The mask as bool, for a list as a list."""
    if mask is None:
        return None
    mask = whole(mask) if not isinstance(mask, (list, tuple)) or not isinstance(X, list) else mask
    if isinstance(mask, Tensor):
        mask = binary(mask)
        return list(mask) if isinstance(X, list) else mask
    return [binary(whole(each)) for each in mask]


def binary(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    # The hosts multiply by a mask: other values are weights. Under torch.compile there is no looking at them.
    if torch.compiler.is_compiling() or not ((mask == 0) | (mask == 1)).all():
        raise ValueError("a mask has values other than 0 and 1")
    return mask != 0


def has_values(X: Tensor) -> Tensor:
    """`[..., L]` for `[..., L, d]`, bool: `X.any(-1)`, which takes PyTorch several times as long as the scores on a CPU."""
    if X.device.type != "cpu" or torch.compiler.is_compiling() or X.dtype not in BITS or not X.shape[-1]:
        return X.any(-1)
    integer, nonnegative = BITS[X.dtype]
    bits = X.detach().view(integer).numpy()
    if bits.flags.c_contiguous and X.shape[-1] * X.itemsize % 8 == 0:
        bits = bits.view(np.int64)
        nonnegative = int.from_bytes(nonnegative.to_bytes(X.itemsize, "little") * (8 // X.itemsize), "little")
    # A zero may have a sign.
    return torch.from_numpy(np.bitwise_or.reduce(bits, axis=-1) & nonnegative != 0)


def tensor(scores: Any) -> Tensor:
    return scores if isinstance(scores, Tensor) else torch.from_numpy(scores)


def side(X: Any, mask: Any, name: str) -> tuple[Any, Any]:
    """One side of `maxsim_st`: a batch in floating point, and its mask in the same layout."""
    if isinstance(X, (list, tuple)):
        X = [_floating(x if isinstance(x, (Tensor, np.ndarray)) else whole(x)) for x in X]
        if isinstance(mask, (Tensor, np.ndarray)):
            mask, longest = whole(mask), max(len(x) for x in X)
            if mask.shape[-1] != longest:
                raise checks.wrong_shape(name, mask.shape, f"{longest} tokens, as the longest")
            mask = [row[: len(x)] for row, x in zip(mask.expand(len(X), -1), X, strict=True)]
        return X, kept(mask, X)
    X = _floating(whole(X))
    if X.ndim == 2:
        X = X[None]
    if isinstance(mask, (list, tuple)):
        mask = torch.nn.utils.rnn.pad_sequence([whole(each) for each in mask], batch_first=True)
    if mask is not None:
        mask, (count, length) = whole(mask), X.shape[:2]
        if tuple(mask.shape) not in ((count, length), (1, length), (length,)):
            raise checks.wrong_shape(name, mask.shape, f"[{count}, {length}]")
        mask = binary(mask).expand(X.shape[:2])
    return X, mask


def _floating(X: Any) -> Any:
    if isinstance(X, np.ndarray):
        return X if X.dtype.kind == "f" else X.astype(np.float32)
    return X if X.is_floating_point() else X.float()


def move(X: Any, device: torch.device) -> Any:
    if isinstance(X, list):
        return X if device.type == "cpu" and isinstance(X[0], np.ndarray) else [whole(x).to(device) for x in X]
    return X if X is None else X.to(device)


def count(X: Any, mask: Any) -> Tensor:
    if isinstance(mask, list):
        return torch.tensor([int(each.sum()) for each in mask])
    if mask is not None:
        return mask.sum(-1)
    return torch.tensor([len(x) for x in X]) if isinstance(X, list) else has_values(X).sum(-1)


def empty(X: Any, mask: Any) -> Tensor:
    return count(X, mask) == 0
