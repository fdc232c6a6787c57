"""`edgecolbert::maxsim_forward` and `edgecolbert::maxsim_backward`: schema, implementation, fake, autograd and vmap.

One pair of ops carries every layout. Q is `[Lq, d]` (one query, without an axis for it), `[Nq, Lq, d]`, or `[Tq, d]`
with boundaries `cu_q [Nq + 1]`; D is `[Nd, Ld, d]`, `[Nq, K, Ld, d]` (a query's own documents), or `[Td, d]` with
`cu_d [Nd + 1]`; `query_index` and `document_index` `[P]` choose pairs. Scores are `[Nq, Nd]`, `[Nq, K]` or `[P]` in
float32, in float64 where an input is.

The argmax is flat, each query's tokens innermost, and empty unless asked for; it counts the tokens of the document from 0
and is -1 where no token was chosen. It is int16 where D is padded to at most 32768 tokens, else int32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgecolbert_kernels import checks
from edgecolbert_kernels.backends import layout, select
from edgecolbert_kernels.ops import arguments
from edgecolbert_kernels.ops.plain import no_derivative

_BATCH = "Tensor? q_mask, Tensor? d_mask, Tensor? cu_q, Tensor? cu_d, Tensor? query_index, Tensor? document_index"
_OPTIONS = "bool normalize, str mask_mode, str precision"
_FORWARD = f"(Tensor Q, Tensor D, {_BATCH}, {_OPTIONS}, bool with_argmax) -> (Tensor scores, Tensor argmax)"
_BACKWARD = (
    f"(Tensor grad, Tensor Q, Tensor D, Tensor argmax, {_BATCH}, {_OPTIONS}, bool need_queries, bool need_documents)"
    " -> (Tensor grad_queries, Tensor grad_documents)"
)
INPUTS, OPTIONS = 8, 3  # Q, D and the six optional tensors; normalize, mask_mode and precision

_library = torch.library.Library("edgecolbert", "FRAGMENT")
_library.define("maxsim_forward" + _FORWARD, tags=(torch.Tag.pt2_compliant_tag,))
_library.define("maxsim_backward" + _BACKWARD, tags=(torch.Tag.pt2_compliant_tag,))
forward_op = torch.ops.edgecolbert.maxsim_forward.default
backward_op = torch.ops.edgecolbert.maxsim_backward.default


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, options, with_argmax = args[:INPUTS], args[INPUTS:-1], args[-1]
    _check(inputs, options)
    Q, D = inputs[:2]
    backend = select("maxsim", Q.device.type, arguments.arithmetic(Q, D))
    scores, argmax = backend.forward(*arguments.readable(backend, *inputs), *options, with_argmax)
    return scores, Q.new_empty(0, dtype=torch.int32) if argmax is None else argmax


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, options, with_argmax = args[:INPUTS], args[INPUTS:-1], args[-1]
    _check(inputs, options)
    Q, D, _, _, cu_q, cu_d, query_index, _ = inputs
    shape = layout.scores_shape(Q, D, cu_q, cu_d, query_index)
    scores = Q.new_empty(shape, dtype=getattr(torch, arguments.arithmetic(Q, D)))
    if not with_argmax:
        return scores, Q.new_empty(0, dtype=torch.int32)
    dtype = torch.int16 if layout.argmax_is_int16(D, cu_d) else torch.int32
    return scores, Q.new_empty(layout.argmax_length(Q, shape, cu_q), dtype=dtype)


def _backward(grad: Tensor, Q: Tensor, D: Tensor, argmax: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    inputs, options, needs = (Q, D, *rest[: INPUTS - 2]), rest[INPUTS - 2 : -2], rest[-2:]
    _check(inputs, options)
    backend = select("maxsim", Q.device.type, arguments.arithmetic(Q, D))
    inputs = arguments.readable(backend, *inputs)
    if not argmax.numel():
        # The forward was not asked for it, so it is found again.
        argmax = backend.forward(*inputs, *options, True)[1]
    grad, argmax = arguments.readable_gradient(backend, grad, argmax, *inputs)
    grads = backend.backward(grad, Q, D, argmax, *inputs[2:], *options, *needs)
    grad_queries, grad_documents = (X.new_empty(0) if g is None else g for g, X in zip(grads, (Q, D), strict=True))
    return grad_queries, grad_documents


def _backward_fake(grad: Tensor, Q: Tensor, D: Tensor, argmax: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_queries, need_documents = rest[-2:]
    return Q.new_empty(Q.shape if need_queries else 0), D.new_empty(D.shape if need_documents else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:INPUTS], output[1])
    ctx.options = inputs[INPUTS:-1]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    Q, D, *batch, argmax = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grads = backward_op(grad, Q, D, argmax, *batch, *ctx.options, *needs)
    none = (None,) * (len(batch) + len(ctx.options) + 1)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *none)


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise no_derivative("second")


def _one_by_one(op: Any) -> Any:
    """A vmap rule: the op once for each element of the batch, whose answers are then the unbatched ones."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def call(n: int) -> tuple[Tensor, Tensor]:
            return op(*(x if dim is None else x.select(dim, n) for x, dim in zip(args, in_dims, strict=True)))

        if info.batch_size == 0:
            raise ValueError("maxsim cannot be mapped over an empty batch, whose answer has no shape")
        return tuple(torch.stack(each) for each in zip(*map(call, range(info.batch_size)), strict=True)), (0, 0)

    return rule


def _check(inputs: tuple[Any, ...], options: tuple[Any, ...]) -> None:
    arguments.check(*inputs)
    checks.options(*options[1:])


for _op, _implementation, _fake, _setup, _gradient in (
    (forward_op, _forward, _forward_fake, _save, _differentiate),
    (backward_op, _backward, _backward_fake, None, _differentiate_twice),
):
    _library.impl(_op, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(_op, _fake, lib=_library)
    torch.library.register_autograd(_op, _gradient, setup_context=_setup, lib=_library)
    torch.library.register_vmap(_op, _one_by_one(_op), lib=_library)
