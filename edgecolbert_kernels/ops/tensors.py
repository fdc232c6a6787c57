"""The public functions on torch tensors; `arrays` is the numpy side of the same interface.

numpy arrays are taken too, next to tensors: as the bits they are, without a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from edgecolbert_kernels import arrays, checks
from edgecolbert_kernels.backends import choose, cpu, repeated, select
from edgecolbert_kernels.ops import arguments
from edgecolbert_kernels.ops.function import Direct, Transformed
from edgecolbert_kernels.ops.maxsim import forward_op
from edgecolbert_kernels.ops.plain import in_derivative, plain, refuse_tangents

is_compiling = torch.compiler.is_compiling


def tokens(name: str, seen: Any) -> Tensor:
    tensor = seen if isinstance(seen, Tensor) else from_numpy(arrays.tokens(name, seen))
    if tensor.is_nested:
        raise checks.nested(name)
    if tensor.dtype not in arguments.DTYPES:
        raise checks.wrong_dtype(name, tensor.dtype, checks.FLOATS)
    return tensor


def token_list(name: str, seen: Sequence[Any]) -> list[Tensor]:
    X = [x if isinstance(x, Tensor) else tokens(f"{name}[{n}]", x) for n, x in enumerate(seen)]
    if X:
        tokens(f"{name}[0]", X[0])
    checks.token_list(name, X)
    if len({x.device for x in X}) > 1:
        for n, x in enumerate(X):
            checks.same_device(f"{name}[{n}]", x.device, X[0].device, f"{name}[0]")
    return X


def mask(name: str, seen: Any, of: str, X: Tensor) -> Tensor:
    if not isinstance(seen, Tensor):
        seen = from_numpy(arrays.array(name, seen)).to(X.device)
    checks.mask(name, seen.shape, of, X.shape)
    return arguments.kept(seen)


def integers(name: str, seen: Any, like: Tensor) -> Tensor:
    if not isinstance(seen, Tensor):
        seen = from_numpy(arrays.integers(name, seen)).to(like.device)
    dtype = seen.dtype
    if dtype not in arguments.INTEGERS:
        raise checks.wrong_dtype(name, dtype, checks.INTEGERS)
    if seen.ndim != 1:
        raise checks.wrong_shape(name, seen.shape, "one dimension")
    return arguments.wide(seen)


def values(name: str, seen: Any) -> Tensor:
    """Numbers or bools that are no token vectors: uint16 are numbers here, and no bits of bfloat16."""
    if isinstance(seen, Tensor):
        return seen
    array = arrays.array(name, seen)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise checks.wrong_dtype(name, array.dtype, "numbers or bool")
    return from_numpy(array.astype(np.int64) if array.dtype.kind == "u" else array)


class _Lifted:
    """The memory of an array without its read-only flag."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = {
            **array.__array_interface__,
            "data": (array.__array_interface__["data"][0], False),
        }


def stored(X: np.ndarray) -> Tensor:
    """Stored token vectors where they lie: scoring only reads them, so a read-only mapping of a file will do."""
    return from_numpy(np.asarray(_Lifted(X)))


def reads_in_place(*inputs: Tensor | None) -> bool:
    """Whether the compiled kernels can answer from these addresses: eagerly, without a gradient, in float32."""
    for x in inputs:
        if x is not None and (
            x.dtype is torch.float64 or not x.is_cpu or (x.requires_grad and torch.is_grad_enabled())
        ):
            return False
    return plain(*inputs) and choose("maxsim", "cpu", "float32") == "cpu"


def score_stored(
    Q: Tensor,
    q_mask: Tensor | None,
    D: Any,
    query_index: np.ndarray | None,
    places: np.ndarray | None,
    normalize: bool,
    mask_mode: str,
    precision: str,
    out_dtype: Any,
) -> Tensor | None:
    """As on numpy arrays; None where the compiled kernels cannot answer, or a gradient is wanted."""
    if not reads_in_place(Q, q_mask):
        return None
    dtype = score_dtype(out_dtype)
    shape = arrays.scores_shape_of_stored(Q.shape, D, query_index, places)
    scores = torch.empty(shape, dtype=torch.float32, device="cpu")
    options = normalize, mask_mode, precision
    queries = cpu.operand(Q, q_mask)
    arrays.forward_stored(queries, D, query_index, places, scores.data_ptr(), options, torch.get_num_threads())
    return scores if scores.dtype is dtype else scores.to(dtype)


def join(scores: list[Tensor]) -> Tensor:
    return torch.cat(scores, dim=-1)


def to_numpy(seen: Any) -> Any:
    return seen.cpu().numpy() if isinstance(seen, Tensor) else seen


def nothing() -> Tensor:
    return torch.empty(0, 1, dtype=torch.float32, device="cpu")


def pack(X: list[Tensor], masks: list[Tensor | None] | None, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    lengths = torch.tensor([0, *(x.shape[0] for x in X)], dtype=torch.int64, device=like.device)
    rows = torch.cat(X) if X else like.new_empty(0, like.shape[-1])
    kept = torch.cat(_kept(X, masks)) if masks else None
    return rows, kept, lengths.cumsum(0)


def pad(X: list[Tensor], masks: list[Tensor | None] | None, like: Tensor) -> tuple[Tensor, Tensor]:
    if not X:
        return like.new_empty(0, 0, like.shape[-1]), like.new_empty(0, 0, dtype=torch.bool)
    return pad_sequence(X, batch_first=True), pad_sequence(_kept(X, masks), batch_first=True)


def score(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
    normalize: bool,
    mask_mode: str,
    precision: str,
    out_dtype: Any,
) -> Tensor:
    dtype = score_dtype(out_dtype)
    batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index
    needs_grad = (Q.requires_grad or D.requires_grad) and torch.is_grad_enabled()
    options = normalize, mask_mode, precision
    if plain(Q, D, q_mask, d_mask, cu_q, cu_d, query_index, document_index):
        backend = select("maxsim", "cuda" if Q.is_cuda else "cpu", arguments.arithmetic(Q, D))
        if cu_q is not None or cu_d is not None or query_index is not None:
            arguments.check_values(backend, Q, D, cu_q, cu_d, query_index, document_index)
        if needs_grad:
            scores = Direct.apply(backend, Q, D, *batch, *options)
        else:
            # Name by name, as stars cost more than all of them.
            scores, _ = backend.forward(
                Q, D, q_mask, d_mask, cu_q, cu_d, query_index, document_index, normalize, mask_mode, precision, False
            )
            if repeated.table is not None and backend is not cpu and scores.dtype is dtype:
                repeated.remember(backend, (Q, D, *batch, None), options, out_dtype)
    elif in_derivative():
        scores, _ = Transformed.apply(Q, D, *batch, *options)
    else:
        refuse_tangents(Q, D)
        scores, _ = forward_op(Q, D, *batch, *options, needs_grad)
    return scores if scores.dtype == dtype else scores.to(dtype)


def score_in_place(
    Q: Tensor | list[Tensor],
    D: Tensor | list[Tensor],
    q_mask: Any,
    d_mask: Any,
    normalize: bool,
    mask_mode: str,
    precision: str,
    out_dtype: Any,
) -> Tensor | None:
    """Lists read where they lie, without a copy; None where the kernels cannot, or where a gradient is wanted."""
    every: list[Tensor] = []
    for X, masks in ((Q, q_mask), (D, d_mask)):
        if not isinstance(X, list):
            every += [X] if masks is None else [X, masks]
        elif not X or masks or X[0].dtype not in cpu.DTYPES or any(x.stride(1) != 1 for x in X):
            return None
        else:
            every += X
    if not reads_in_place(*every):
        return None
    dtype = score_dtype(out_dtype)
    scores = cpu.forward_lists(Q, D, q_mask, d_mask, normalize, mask_mode, precision)
    return scores if scores.dtype == dtype else scores.to(dtype)


def from_numpy(array: np.ndarray) -> Tensor:
    # torch takes neither negative strides nor, without a warning, what it may not write to.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    if array.dtype.name in ("uint16", "bfloat16"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _kept(X: Sequence[Tensor], masks: Sequence[Tensor | None] | None) -> list[Tensor]:
    if masks is None:
        masks = [None] * len(X)
    every = ((x, each) for x, each in zip(X, masks, strict=True))
    return [x.new_ones(x.shape[0], dtype=torch.bool) if each is None else each for x, each in every]


def score_dtype(out_dtype: Any) -> torch.dtype:
    """What `out_dtype` of a public function asks for: a float dtype of torch, by default float32."""
    if out_dtype is None:
        return torch.float32
    if not isinstance(out_dtype, torch.dtype) or not out_dtype.is_floating_point:
        raise checks.out_dtype(out_dtype, "torch")
    return out_dtype
