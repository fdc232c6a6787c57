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


class MaxSim(torch.autograd.Function):
    """Scores and argmax of the op's inputs and options, in a backend or, if it is None, by the op."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend: ModuleType | None, *args: Any) -> Any:
        return (maxsim.forward_op if backend is None else backend.forward)(*args, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        backend, *args = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*args[: maxsim.INPUTS], output[1])
        ctx.backend, ctx.options = backend, args[maxsim.INPUTS :]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        Q, D, *batch, argmax = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        if in_derivative():
            grads = _Backward.apply(grad, Q, D, argmax, *batch, *ctx.options, *needs)
        elif torch.is_grad_enabled() or ctx.backend is None or not plain(grad, Q, D):
            grads = maxsim.backward_op(grad, Q, D, argmax, *batch, *ctx.options, *needs)
        else:
            grads = ctx.backend.backward(grad, Q, D, argmax, *batch, *ctx.options, *needs)
        none = (None,) * (len(batch) + len(ctx.options))
        return None, *(g if need else None for g, need in zip(grads, needs, strict=True)), *none

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
