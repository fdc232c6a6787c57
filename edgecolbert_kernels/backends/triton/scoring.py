"""Scores and argmax: from tensors to a launch of `score_kernel.score` or `score_rows_kernel.score_rows`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from edgecolbert_kernels.backends import cuda_driver, layout, native, plans, repeated
from edgecolbert_kernels.backends.triton import config
from edgecolbert_kernels.backends.triton.launch import INTERPRETED, MOST_PROGRAMS, Launch, Variant
from edgecolbert_kernels.backends.triton.score_kernel import score
from edgecolbert_kernels.backends.triton.score_rows_kernel import score_rows

# The query tokens that a program holds beside each other.
MOST_COLUMNS = 128
# From how many on they are the rows of the products, and the most, where query tokens times documents are so many that
# every multiprocessor still has several programs.
FEWEST_ROWS, MOST_ROWS = 64, 256
MANY_MAXIMA = 1 << 18

# Arguments of both kernels that are addresses, which come first.
POINTERS = 12
SCORES = 10
_ALIGNED = (0, 1, 12, 13, 14, 15, 16)  # q_ptr, d_ptr and the strides of both kernels
_calls: dict[Any, _Call] = {}
_variants: dict[Any, Variant] = {}


def forward(
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
    with_argmax: bool,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `cpu.forward`. D may also be int8, or float8_e4m3fn, with float32 `scales` [documents] that multiply its scores."""
    # Name by name, as a star costs more than all of them.
    scores, argmax = _launch(
        Q,
        D,
        q_mask,
        d_mask,
        cu_q,
        cu_d,
        query_index,
        document_index,
        normalize,
        mask_mode,
        precision,
        scales,
        None,
        with_argmax,
    )
    assert scores is not None
    return scores, argmax


def launch_of(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
    scales: Tensor | None,
    normalize: bool,
    mask_mode: str,
    precision: str,
) -> cuda_driver.Launch | None:
    """What `forward` of these did a moment ago without an argmax, if it was one launch that they alone decide."""
    # Float32 is multiplied as PyTorch's switch says at every call.
    if Q.stride(-1) != 1 or D.stride(-1) != 1 or torch.float32 in (Q.dtype, D.dtype):
        return None
    options = _options(Q, D, q_mask, d_mask, scales, None, normalize, mask_mode, precision, False)
    call = _calls.get((plans.key(Q, D, cu_q, cu_d, query_index), options))
    if call is None or len(call.launches) != 1:
        return None
    made = cuda_driver.contiguous(call.shape, torch.float32)
    return call.launches[0].repeated((Q.data_ptr(), D.data_ptr()), SCORES, made)


def winners(
    grad: Tensor,
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
) -> Tensor:
    """The argmax where `grad` is not 0; anything may stand elsewhere."""
    batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index
    argmax = _launch(Q, D, *batch, normalize, mask_mode, precision, None, grad.contiguous(), True)[1]
    assert argmax is not None
    return argmax


def empty_argmax(Q: Tensor, D: Tensor, scores: layout.Shape, cu_q: Tensor | None, cu_d: Tensor | None) -> Tensor:
    dtype = torch.int16 if layout.argmax_is_int16(D, cu_d) else torch.int32
    length = layout.argmax_length(Q, scores, cu_q)
    # Rows after the last boundary belong to no query, so no program comes by.
    return (torch.empty if cu_q is None else _no_tokens)((length,), dtype=dtype, device=Q.device)


def _no_tokens(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, -1, dtype=dtype, device=device)


def rows(X: Tensor) -> Tensor:
    """With the dimensions of a token side by side, as the kernels read them."""
    return X if X.stride(-1) == 1 or X.shape[-1] == 1 else X.contiguous()


def strides(X: Tensor) -> tuple[int, int, int]:
    """From one query to the next, of a query's own documents, and from token to token, in elements."""
    given = X.stride()
    if len(given) == 3:
        return given[0], 0, given[1]
    return (given[0], given[1], given[2]) if len(given) == 4 else (0, 0, given[0])


class _Plan(NamedTuple):
    """What the shapes and options of a call come to."""

    variant: Variant
    programs: int
    sizes: tuple[int, int, int, int]


class _Call(NamedTuple):
    """What a call of the same shapes, strides and options needs no second time."""

    shape: layout.Shape
    launches: tuple[Launch, ...]


def _launch(
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
    scales: Tensor | None,
    grad: Tensor | None,
    with_argmax: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Scores, unless there is a gradient, and an argmax."""
    Q, D, device = rows(Q), rows(D), Q.device
    options = _options(Q, D, q_mask, d_mask, scales, grad, normalize, mask_mode, precision, with_argmax)
    key = plans.key(Q, D, cu_q, cu_d, query_index), options
    call = _calls.get(key)
    shape = layout.scores_shape(Q, D, cu_q, cu_d, query_index) if call is None else call.shape
    # Sizes one by one take PyTorch less time than a tuple.
    scores = torch.empty(*shape, dtype=torch.float32, device=device) if grad is None else None
    argmax = empty_argmax(Q, D, shape, cu_q, cu_d) if with_argmax else None
    optional = q_mask, d_mask, cu_q, cu_d, query_index, document_index, scales, grad, scores, argmax
    if call is None:
        plan = _plan(Q, D, *optional, normalize, mask_mode, precision, options[0])
        call = plans.keep(_calls, key, _Call(shape, _launches(plan, Q, D)))
    if D.dtype is torch.float8_e4m3fn:
        D = D.view(torch.uint8)
    addresses = (
        Q.data_ptr(),
        D.data_ptr(),
        0 if q_mask is None else q_mask.data_ptr(),
        0 if d_mask is None else d_mask.data_ptr(),
        0 if cu_q is None else cu_q.data_ptr(),
        0 if cu_d is None else cu_d.data_ptr(),
        0 if query_index is None else query_index.data_ptr(),
        0 if document_index is None else document_index.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        0 if scores is None else scores.data_ptr(),
        0 if argmax is None else argmax.data_ptr(),
    )
    for launch in call.launches:
        launch.start(addresses, (Q, D, *optional))
    return scores, argmax


def _options(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    scales: Tensor | None,
    grad: Tensor | None,
    *options: Any,
) -> tuple[Any, ...]:
    """What else a call depends on; PyTorch's switch for float32 may differ from call to call."""
    tf32 = torch.float32 in (Q.dtype, D.dtype) and tf32_allowed()
    return tf32, q_mask is None, d_mask is None, scales is None, grad is None, *options


def _launches(plan: _Plan, Q: Tensor, D: Tensor) -> tuple[Launch, ...]:
    q_strides, d_strides = strides(Q), strides(D)
    integers = q_strides[0], q_strides[2], *d_strides, *plan.sizes
    found = []
    for first in range(0, plan.programs, MOST_PROGRAMS):
        programs = min(plan.programs - first, MOST_PROGRAMS)
        found.append(Launch(plan.variant, Q.get_device(), programs, POINTERS, (*integers, first)))
    return tuple(found)


def _plan(
    Q: Tensor,
    D: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_d: Tensor | None,
    query_index: Tensor | None,
    document_index: Tensor | None,
    scales: Tensor | None,
    grad: Tensor | None,
    scores: Tensor | None,
    argmax: Tensor | None,
    normalize: bool,
    mask_mode: str,
    precision: str,
    tf32: bool,
) -> _Plan:
    which = layout.which(D, query_index)
    num_queries = (Q.shape[0] if Q.ndim == 3 else 1) if cu_q is None else cu_q.shape[0] - 1
    num_documents = D.shape[-3] if cu_d is None else cu_d.shape[0] - 1
    tokens = Q.shape[-2] if cu_q is None else -(-Q.shape[-2] // max(1, num_queries))
    compute, how = products(Q.dtype, D.dtype, precision, tf32)
    bits = 32 if compute == tl.float32 else 16
    dim = Q.shape[-1]
    most = num_queries if which == native.EVERY else 1
    as_rows = (
        which == native.EVERY
        and cu_q is None
        and bits == 16
        and dim <= config.RESIDENT
        and max(1, min(MOST_COLUMNS // max(1, tokens), most)) * tokens >= FEWEST_ROWS
    )
    many = as_rows and num_queries * tokens * num_documents >= MANY_MAXIMA
    columns = _columns(tokens, most, MOST_ROWS if many else MOST_COLUMNS)
    if not as_rows and argmax is not None and (cu_q is not None or columns % max(1, tokens)):
        # Which query a column belongs to is then a register a column.
        columns = _columns(tokens, most, MOST_COLUMNS // 2)
    kernel = ("rows" if as_rows else "score") + ("" if argmax is None else "_argmax")
    beside = (d_mask is not None) + normalize + (cu_q is not None)
    blocks = config.blocks(kernel, capability(Q.device.index), bits, dim, columns, beside)
    beside_each_other = blocks.rows if as_rows else blocks.columns
    group = max(1, min(beside_each_other // max(1, tokens), most))
    slots = 1 << (group - 1).bit_length()
    sizes = blocks.rows, blocks.columns, group, slots, cu_q is None and tokens * slots == beside_each_other
    e4m3, zero = D.dtype is torch.float8_e4m3fn, d_mask is not None and mask_mode == "zero"
    options = normalize, zero, argmax is not None, grad is not None
    if as_rows:
        given = [each is not None for each in (q_mask, d_mask, cu_d, scales)]
        constants = (dim, *config.pieces(dim)[:3], *sizes, compute, e4m3, *given, *options)
    else:
        given = [each is not None for each in (q_mask, d_mask, cu_q, cu_d, scales)]
        constants = (which, dim, *config.pieces(dim), *sizes, compute, how, e4m3, *given, *options)
    key = Q.dtype, D.dtype, None if argmax is None else argmax.dtype, Q.device.index, blocks, constants
    variant = _variants.get(key)
    if variant is None:
        function = score_rows if as_rows else score
        variant = _variants[key] = Variant(function, constants, blocks.warps, blocks.stages, _ALIGNED, beside > 0)
    if query_index is not None:
        programs = query_index.shape[0]
    else:
        programs = num_documents * (-(-num_queries // group) if which == native.EVERY else num_queries)
    return _Plan(variant, programs, (num_queries, num_documents, Q.shape[-2], D.shape[-2]))


def _columns(tokens: int, queries: int, most: int) -> int:
    """Room for as many queries as fit beside each other, a power of two from 16 on."""
    group = max(1, min(most // max(1, tokens), queries))
    return min(most, max(16, 1 << (group * tokens - 1).bit_length()))


def products(Q: torch.dtype, D: torch.dtype, precision: str, tf32: bool) -> tuple[Any, str]:
    """The dtype of the products, and how float32 is multiplied: as such, in three TF32 products, or in one if asked for."""
    if D in (torch.int8, torch.float8_e4m3fn):
        D = Q
    if Q is D and Q is not torch.float32 and not (INTERPRETED and Q is torch.bfloat16):
        return (tl.float16 if Q is torch.float16 else tl.bfloat16), "tf32"
    return tl.float32, "tf32" if tf32 else "tf32x3" if precision == "fast" else "ieee"


def tf32_allowed() -> bool:
    """PyTorch's own switch for float32 products."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # it was set by the newer of its two names
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def forget() -> None:
    """Choose blocks anew."""
    _calls.clear()
    _variants.clear()
    repeated.clear()


def capability(device: int | None) -> int:
    major, minor = (0, 0) if INTERPRETED else torch.cuda.get_device_capability(device)
    return 10 * major + minor
