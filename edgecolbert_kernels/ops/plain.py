"""When a call may go past the dispatcher: eager code on tensors that are what they look like.

The kernels read raw memory, and a dispatched call costs microseconds more than a direct one. So plain tensors that nobody
traces or transforms go straight to a backend; in every other case the op is called, which is slower and right.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Keys, _Key = torch._C.DispatchKeySet, torch._C.DispatchKey
# What a dense tensor dispatches on, on the CPU and on a GPU; the second of each was made in inference mode. Negative views,
# zero tensors without storage, sparse, nested, quantized, fake, functional and batched tensors each carry another key.
_TENSOR_KEYS = (
    _Keys(_Key.CPU).add(_Key.AutocastCPU).add(_Key.ADInplaceOrView).add(_Key.AutogradCPU).raw_repr(),
    _Keys(_Key.CPU).add(_Key.AutocastCPU).raw_repr(),
    _Keys(_Key.CUDA).add(_Key.AutocastCUDA).add(_Key.ADInplaceOrView).add(_Key.AutogradCUDA).raw_repr(),
    _Keys(_Key.CUDA).add(_Key.AutocastCUDA).raw_repr(),
)
# What every call dispatches on where no tracer, transform or dispatch mode is active; the second is inference mode.
_CALL_KEYS = (
    _Keys(_Key.BackendSelect).add(_Key.ADInplaceOrView).raw_repr(),
    _Keys(_Key.BackendSelect).raw_repr(),
)
_TYPES = (Tensor, torch.nn.Parameter)
# By their own names: each step from module to module counts, in a function that every call starts with.
_is_compiling, _keys_of = torch.compiler.is_compiling, torch._C._dispatch_keys
_keys_of_calls, _function_modes = torch._C._dispatch_tls_local_include_set, torch._C._len_torch_function_stack


def plain(*inputs: Tensor | None) -> bool:
    """Whether an eager call with these inputs may hand their addresses to a kernel: they are on one device besides.

    What is asked here, `backends.repeated` names to the compiled module as well.
    """
    if (
        _is_compiling()
        or _keys_of_calls().raw_repr() not in _CALL_KEYS
        or _function_modes()
        or forward_ad._current_level >= 0
    ):
        return False
    device = None
    for tensor in inputs:
        if tensor is None:
            continue
        if type(tensor) not in _TYPES or _keys_of(tensor).raw_repr() not in _TENSOR_KEYS:
            return False
        # -1 for the CPU; a torch.device takes longer to make and to compare.
        number = tensor.get_device()
        if device is None:
            device = number
        elif device != number:
            return False
    return True


def in_derivative() -> bool:
    """Inside `torch.func.grad`, `vjp`, `vmap` and the like, which ask for more than the op's own autograd gives."""
    if torch.compiler.is_compiling():
        return False
    transform = torch._C._functorch.peek_interpreter_stack()
    return transform is not None and transform.key() != torch._C._functorch.TransformType.Functionalize


def refuse_tangents(*inputs: Tensor) -> None:
    """Without a rule for them, forward-mode derivatives would be dropped without a word."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise no_derivative("forward-mode")


def no_derivative(kind: str, of: str = "maxsim") -> NotImplementedError:
    return NotImplementedError(f"{of} has no {kind} derivative; edgecolbert_kernels.reference has")
