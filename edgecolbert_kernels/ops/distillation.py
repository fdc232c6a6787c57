"""The distillation loss of scores where a backend has a kernel for it: plain tensors, in float32."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from edgecolbert_kernels import checks
from edgecolbert_kernels.backends import select
from edgecolbert_kernels.ops import arguments
from edgecolbert_kernels.ops.plain import no_derivative, plain

Temperature = float | Tensor


def above_zero(name: str, temperature: Temperature) -> Temperature:
    """A tensor that is not becomes NaN, or an error where nothing has to be waited for."""
    if not isinstance(temperature, Tensor):
        return temperature
    if temperature.device.type == "cpu" and plain(temperature):
        if not float(temperature.detach()) > 0:
            raise checks.not_positive(name, float(temperature.detach()))
        return temperature
    if not temperature.is_floating_point():
        temperature = temperature.to(torch.float32)
    return temperature.masked_fill(~(temperature > 0), torch.nan)


def fused(
    student: Tensor, teacher: Tensor, kept: Tensor | None, temperature: Temperature, teacher_temperature: Temperature
) -> ModuleType | None:
    """The backend whose kernel takes these; None: they are left to PyTorch."""
    num_queries, count = student.shape
    both = [each if isinstance(each, Tensor) else None for each in (temperature, teacher_temperature)]
    if not plain(student, teacher, kept, *both) or student.dtype is not torch.float32 or not num_queries or not count:
        return None
    if any(each is not None and each.dtype not in arguments.DTYPES for each in both):
        return None
    # A gradient of its own, which the kernel has not.
    if both[1] is not None and both[1].requires_grad:
        return None
    backend = select("maxsim", "cuda" if student.is_cuda else "cpu", "float32")
    return backend if count <= getattr(backend, "MOST_CANDIDATES", 0) else None


def losses(
    backend: ModuleType,
    student: Tensor,
    teacher: Tensor,
    kept: Tensor | None,
    temperature: Temperature,
    teacher_temperature: Temperature,
    options: tuple[str, str, str, bool],
    mean: bool | None,
) -> Tensor:
    """`[Nq]`; or their mean, or, where that is False, their sum, as `[]`."""
    teacher = teacher.detach() if teacher.requires_grad else teacher
    if teacher.dtype not in arguments.DTYPES:
        teacher = teacher.to(torch.float32)
    teacher = teacher if teacher.is_contiguous() else teacher.contiguous()
    factor = 1 / student.shape[0] if mean else 1.0
    given = teacher, kept, teacher_temperature, options, factor, mean is not None
    if torch.is_grad_enabled() and (
        student.requires_grad or (isinstance(temperature, Tensor) and temperature.requires_grad)
    ):
        found: Tensor = Distillation.apply(student, temperature, backend, given)
        return found
    return _losses(backend, student, temperature, given, False, False)[0]


def _losses(
    backend: ModuleType, student: Tensor, temperature: Temperature, given: tuple[Any, ...], *needs: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    teacher, kept, teacher_temperature, options, factor, reduced = given
    found, derivative, slope = backend.distill(
        student, teacher, kept, temperature, teacher_temperature, options, factor, *needs
    )
    return found.sum() if reduced else found, derivative, slope


class Distillation(torch.autograd.Function):
    """The kernel writes the derivatives with the losses, so that a factor is all that the backward adds.

    Without `setup_context`, for which PyTorch would look at the signature of `forward` in every call.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, temperature: Temperature, backend: ModuleType, given: tuple[Any, ...]
    ) -> Tensor:
        found, derivative, slope = _losses(backend, student, temperature, given, *ctx.needs_input_grad[:2])
        # The inputs for a second derivative, which is refused by name.
        ctx.save_for_backward(student, temperature if slope is not None else None, derivative, slope)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        student, temperature, derivative, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_Derivatives.apply(grad, derivative, slope, student, temperature), None, None
        return *_derivatives(grad, derivative, slope), None, None


def _derivatives(grad: Tensor, derivative: Tensor | None, slope: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    of_student = None if derivative is None else derivative * (grad[:, None] if grad.ndim else grad)
    return of_student, None if slope is None else (slope * grad).sum()


class _Derivatives(torch.autograd.Function):
    """The same, without a derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, derivative: Tensor | None, slope: Tensor | None, *_inputs: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        return _derivatives(grad, derivative, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise no_derivative("second", "distillation_loss")
