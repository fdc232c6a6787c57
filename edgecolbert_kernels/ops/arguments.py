"""What an op accepts, whoever calls it: the public functions, a compiled graph, or `torch.ops.edgecolbert` by hand."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from edgecolbert_kernels import checks
from edgecolbert_kernels.backends import layout

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def check(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
) -> None:
    """Shapes, dtypes, layouts and devices: nothing that needs a value, so that it runs on fake tensors too."""
    for name, tokens in (("Q", Q), ("D", D)):
        if tokens.dtype not in DTYPES:
            raise checks.wrong_dtype(name, tokens.dtype, checks.FLOATS)
        if tokens.layout is not torch.strided:
            raise checks.wrong_layout(name, tokens.layout)
    checks.rank("Q", Q.shape, (2, 3) if cu_q is None else (2,), "[Lq, d], [Nq, Lq, d], or [Tq, d] with cu_q")
    checks.rank("D", D.shape, (3, 4) if cu_d is None else (2,), "[Nd, Ld, d], [Nq, K, Ld, d], or [Td, d] with cu_d")
    checks.same_dim(Q.shape, D.shape)
    if query_index is not None or document_index is not None:
        if query_index is None or document_index is None or cu_q is not None or Q.ndim == 2 or D.ndim == 4:
            raise checks.pairs(Q.shape, D.shape)
        checks.same_shape("query_index", query_index.shape, "document_index", document_index.shape)
    elif D.ndim == 4:
        if cu_q is not None:
            raise checks.wrong_shape("D", D.shape, "[Nd, Ld, d], or [Td, d] with cu_d, as Q is packed")
        checks.same_batch(Q.shape, D.shape)
    for name, mask, of, tokens in (("q_mask", q_mask, "Q", Q), ("d_mask", d_mask, "D", D)):
        if mask is not None:
            checks.mask(name, mask.shape, of, tokens.shape)
    for name, cu_seqlens in (("cu_seqlens_q", cu_q), ("cu_seqlens_d", cu_d)):
        if cu_seqlens is not None:
            checks.boundaries(name, cu_seqlens.shape)
    for name, integers in _integers(cu_q, cu_d, query_index, document_index):
        if integers.dtype not in INTEGERS:
            raise checks.wrong_dtype(name, integers.dtype, checks.INTEGERS)
        checks.rank(name, integers.shape, (1,), "one dimension")
    others = ("D", D), ("q_mask", q_mask), ("d_mask", d_mask), *_integers(cu_q, cu_d, query_index, document_index)
    for name, tensor in others:
        if tensor is not None:
            checks.same_device(name, tensor.device, Q.device)


def check_values(backend: ModuleType, Q: Tensor, D: Tensor, *integers: Tensor | None) -> None:
    """Boundaries and indices, on the CPU; not for a backend that looks after them itself, where the host would wait."""
    if guarded(backend, Q) or all(each is None for each in integers):
        return
    checks.values(Q.shape, D.shape, *(None if each is None else each.cpu().numpy() for each in integers))


def guarded(backend: ModuleType, Q: Tensor) -> bool:
    """Whether its kernels stay inside the buffers whatever boundaries and indices name, so that the host need not wait."""
    return not Q.is_cpu and getattr(backend, "GUARDED", False)


def readable(
    backend: ModuleType,
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
) -> Inputs:
    """As backends read them: masks a contiguous byte a token, integers contiguous int64 with values in range."""
    cu_q, cu_d, query_index, document_index = (
        None if each is None else wide(each) for each in (cu_q, cu_d, query_index, document_index)
    )
    check_values(backend, Q, D, cu_q, cu_d, query_index, document_index)
    q_mask, d_mask = (None if mask is None else kept(mask) for mask in (q_mask, d_mask))
    return Q, D, q_mask, d_mask, cu_q, cu_d, query_index, document_index


def readable_gradient(
    backend: ModuleType,
    grad: Tensor,
    argmax: Tensor,
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradient of the scores in the dtype of the arithmetic, and an argmax that names tokens there are."""
    shape = layout.scores_shape(Q, D, cu_q, cu_d, query_index)
    checks.same_shape("grad", grad.shape, "the scores", shape)
    checks.same_shape("argmax", argmax.shape, "the argmax", (layout.argmax_length(Q, shape, cu_q),))
    if argmax.dtype not in (torch.int16, torch.int32):
        raise checks.wrong_dtype("argmax", argmax.dtype, "int16 or int32")
    for name, tensor in (("grad", grad), ("argmax", argmax)):
        checks.same_device(name, tensor.device, Q.device)
    if argmax.numel() and not guarded(backend, Q):
        if cu_d is None:
            checks.argmax(int(argmax.amin()), int(argmax.amax()), D.shape[-2])
        else:
            _check_argmax_of_each(argmax, Q, cu_q, cu_d.diff(), document_index)
    return grad.to(getattr(torch, arithmetic(Q, D))), argmax.contiguous()


def _check_argmax_of_each(
    argmax: Tensor, Q: Tensor, cu_q: Tensor | None, lengths: Tensor, document_index: Tensor | None
) -> None:
    """Of documents that are not of one length: the order of an argmax is that of `layout.argmax_length`."""
    if cu_q is None:
        of_document = argmax.view(-1, len(lengths) if document_index is None else len(document_index), Q.shape[-2])
        lowest, highest = of_document.amin((0, 2)), of_document.amax((0, 2))
        lengths = lengths if document_index is None else lengths[document_index]
    else:
        queries = cu_q.shape[0] - 1
        lowest = highest = argmax
        lengths = lengths.repeat(queries).repeat_interleave(cu_q.diff().repeat_interleave(len(lengths)))
    wrong = ((lowest < -1) | (highest >= lengths)).nonzero()
    if len(wrong):
        first = wrong[0, 0]
        checks.argmax(int(lowest[first]), int(highest[first]), int(lengths[first]))


def wide(integers: Tensor) -> Tensor:
    """As contiguous int64."""
    # Asked first, as a conversion that does nothing costs more.
    if integers.dtype is torch.int64 and integers.is_contiguous():
        return integers
    return integers.to(torch.int64).contiguous()


def kept(mask: Tensor) -> Tensor:
    """The mask as a contiguous byte a token."""
    kept = mask if mask.dtype is torch.bool else mask != 0
    return kept if kept.is_contiguous() else kept.contiguous()


def arithmetic(Q: Tensor, D: Tensor) -> str:
    """The dtype that scores are summed in, by name."""
    return "float64" if Q.dtype is torch.float64 or D.dtype is torch.float64 else "float32"


def _integers(
    cu_q: Tensor | None, cu_d: Tensor | None, query_index: Tensor | None, document_index: Tensor | None
) -> list[tuple[str, Tensor]]:
    names = ("cu_seqlens_q", "cu_seqlens_d", "query_index", "document_index")
    tensors = (cu_q, cu_d, query_index, document_index)
    return [(name, tensor) for name, tensor in zip(names, tensors, strict=True) if tensor is not None]
