"""The distillation loss of scores and its gradients, in one launch of `distillation_kernel`."""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from edgecolbert_kernels.backends.triton.distillation_kernel import distill_query
from edgecolbert_kernels.backends.triton.launch import Variant

_double, _word = struct.Struct("d"), struct.Struct("q")


def distill(
    student: Tensor,
    teacher: Tensor,
    kept: Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    options: tuple[str, str, str, bool],
    factor: float,
    need_student: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Each query's loss times `factor`, and its derivatives.

    Args:
        student: float32 `[Nq, K]`, contiguous; Nq at least 1, K from 1 to MOST_CANDIDATES.
        teacher: `[Nq, K]` in float32, float16, bfloat16 or float64, contiguous.
        kept: bool `[Nq, K]`, contiguous; None keeps all.
        temperature: a number, or a tensor of one on the device of `student`, in a dtype of `teacher`'s.
        teacher_temperature: the same.
        options: objective, student_normalization, teacher_normalization and scale_by_temperature of the loss.
        need_student: whether the derivative to the scores is wanted.
        need_temperature: whether that to the temperature is.

    Returns:
        float32: losses `[Nq]`; their derivatives to `student` `[Nq, K]` and to `temperature` `[Nq]`, or None.
    """
    num_queries, count = student.shape
    device = student.device
    losses = torch.empty(num_queries, dtype=torch.float32, device=device)
    derivative = torch.empty_like(student) if need_student else None
    slope = torch.empty_like(losses) if need_temperature else None
    of_student = temperature if isinstance(temperature, Tensor) else None
    of_teacher = teacher_temperature if isinstance(teacher_temperature, Tensor) else None
    variant = _variant(
        teacher.dtype,
        None if of_student is None else of_student.dtype,
        None if of_teacher is None else of_teacher.dtype,
        options,
        kept is not None,
        need_student,
        need_temperature,
        1 << (count - 1).bit_length(),
    )
    integers = (
        count,
        0 if of_student is not None else _bits(temperature),
        0 if of_teacher is not None else _bits(teacher_temperature),
        _bits(factor),
    )
    variant.launch(
        num_queries, 1, (student, teacher, kept, of_student, of_teacher, losses, derivative, slope), integers
    )
    return losses, derivative, slope


def _bits(number: float | Tensor) -> int:
    found: int = _word.unpack(_double.pack(number))[0]
    return found


@cache
def _variant(
    _teacher: torch.dtype,
    temperature: torch.dtype | None,
    teacher_temperature: torch.dtype | None,
    options: tuple[str, str, str, bool],
    masked: bool,
    derivative: bool,
    slope: bool,
    block: int,
) -> Variant:
    """By the dtypes behind the pointers and the constants."""
    objective, student_normalization, teacher_normalization, squared = options
    read = temperature is not None, teacher_temperature is not None
    how = objective, student_normalization, teacher_normalization
    constants = *how, masked, *read, squared, derivative, slope, block
    # 4 candidates a thread, up to 16 of the largest, as 16 warps leave each thread too few registers. One warp reduces
    # without shared memory.
    return Variant(distill_query, constants, min(8, max(1, block // 128)), 1, ())
