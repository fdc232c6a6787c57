"""What Triton's interpreter needs to run these kernels; imported where TRITON_INTERPRET=1.

It reads a loop bound that came from memory as an array of one element, which numpy 2.4 no longer turns into an integer, and
it calls Python for every element of a reduction that it does not know. Its products of bfloat16 are wrong, so `widened`
makes bfloat16 tensors float32 before a launch. It patches triton.language again for every device function that a kernel
calls, which takes longer than all the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter

from edgecolbert_kernels.backends.triton import tokens


def widened(tensor: Tensor) -> Tensor:
    """bfloat16 as float32, with the same strides."""
    if tensor.dtype is not torch.bfloat16 or not tensor.numel():
        return tensor
    storage = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
    return storage.float().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def narrowed(wide: list[Tensor], tensors: list[Tensor]) -> None:
    """What a kernel wrote into the widened tensors, back into those that they stand for."""
    for written, tensor in zip(wide, tensors, strict=True):
        if written.dtype is not tensor.dtype and not torch.equal(written.to(tensor.dtype), tensor):
            tensor.detach().copy_(written)


def patch() -> None:
    """Once for the process."""
    if getattr(triton_interpreter, "_edgecolbert", False):
        return
    triton_interpreter._edgecolbert = True
    patch_attributes, reduce = triton_interpreter._patch_lang_tensor, triton_interpreter.ReduceOps.apply_impl

    def patched_attributes(tensor: Any, scope: Any) -> None:
        patch_attributes(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    def patched_reduce(self: Any, values: Any) -> Any:
        if self.combine_fn is not tokens.nan_max:
            return reduce(self, values)
        value = values[0] if isinstance(values, tuple) else values
        found = np.max(value.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, tl.float32)

    seen: set[Any] = set()  # namespaces patched for the kernel that runs
    patch_namespaces, start = triton_interpreter._patch_lang, triton_interpreter.GridExecutor.__call__

    def started(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.clear()
        return start(self, *arguments, **options)

    def called_inside(self: Any, *arguments: Any, **options: Any) -> Any:
        namespace = self.fn.__module__.startswith("triton.")
        if namespace not in seen:
            seen.add(namespace)
            patch_namespaces(self.fn)
        return self.rewrite()(*arguments, **options)

    triton_interpreter._patch_lang_tensor = patched_attributes
    triton_interpreter.ReduceOps.apply_impl = patched_reduce
    triton_interpreter.GridExecutor.__call__ = started
    triton_interpreter.InterpretedFunction.__call__ = called_inside
