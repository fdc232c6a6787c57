"""`torch.autograd.Function`s for the eager calls that do not go through the op's own autograd.

Those are the calls on plain tensors, which go straight to a backend, and those inside functorch transforms, which take their
derivatives from a Function and hand the op on to its vmap rule.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from edgecolbert_kernels.ops import maxsim
from edgecolbert_kernels.ops.plain import in_derivative, no_derivative, plain

# Of the inputs after Q and D, and of the options.
_NO_GRADIENTS = (None,) * (maxsim.INPUTS - 2 + maxsim.OPTIONS)


class Direct(torch.autograd.Function):
    """Scores of plain tensors, in a backend.

    With its context in `forward`: a Function with a `setup_context` looks up its own signature at every call, which takes
    longer than the launch of a kernel.
    """

    @staticmethod
    def forward(ctx: Any, backend: ModuleType, *args: Any) -> Tensor:
        scores, argmax = backend.forward(*args, True)
        ctx.save_for_backward(*args[: maxsim.INPUTS], argmax)
        ctx.backend, ctx.options = backend, args[maxsim.INPUTS :]
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        Q, D, *batch, argmax = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        by_op = torch.is_grad_enabled() or not plain(grad, Q, D)
        backward = maxsim.backward_op if by_op else ctx.backend.backward
        grad_queries, grad_documents = backward(grad, Q, D, argmax, *batch, *ctx.options, *needs)
        return None, grad_queries if needs[0] else None, grad_documents if needs[1] else None, *_NO_GRADIENTS


class Transformed(torch.autograd.Function):
    """Scores and argmax by the op, inside functorch transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return maxsim.forward_op(*args, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[: maxsim.INPUTS], output[1])
        ctx.options = inputs[maxsim.INPUTS :]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        Q, D, *batch, argmax = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        backward = _Backward.apply if in_derivative() else maxsim.backward_op
        grads = backward(grad, Q, D, argmax, *batch, *ctx.options, *needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *_NO_GRADIENTS

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_derivative("forward-mode")


class _Backward(torch.autograd.Function):
    """The backward op, without a derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return maxsim.backward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise no_derivative("second")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_derivative("forward-mode")
