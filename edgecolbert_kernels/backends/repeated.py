"""Calls that came to a single launch before: the same call again is answered by the compiled module, with no Python between.

`table.repeat(*inputs, *settings)` gives the scores, or None wherever anything is not as it was: then the call takes its usual
way, at whose end `remember` keeps the launch. What "as it was" comprises, tensor by tensor, is in csrc/cuda_repeat.cpp; what
surrounds a call is named here, and is all that `ops.plain` and the choice of a backend look at, but for tracing, which has to
be asked from Python, where the tracer sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from edgecolbert_kernels.backends import _VARIABLE_KEY, _chosen, _environment, cuda_driver, native

# Q, D, q_mask, d_mask, cu_q, cu_d, query_index, document_index, scales.
INPUTS = 9

# As DLPack numbers types of devices.
CPU, CUDA = 1, 2


def make(device_type: int = CUDA) -> Any:
    """An empty table, for tensors on devices of one type. AttributeError or ValueError where PyTorch offers too little."""
    return native.module().Launches(
        inputs=INPUTS,
        device_type=device_type,
        exchange=torch._C._dlpack_exchange_api(),
        tensor_types=(torch.Tensor, torch.nn.Parameter),
        keys_of=torch._C._dispatch_keys,
        keys_of_calls=torch._C._dispatch_tls_local_include_set,
        raw=torch._C.DispatchKeySet.raw_repr,
        function_modes=torch._C._len_torch_function_stack,
        grad_enabled=torch.is_grad_enabled,
        device=torch._C._cuda_getDevice,
        stream=torch._C._cuda_getCurrentRawStream,
        empty=empty_strided(device_type),
        entries=((vars(forward_ad), "_current_level"), (_environment, _VARIABLE_KEY)),
        variable=_chosen,
    )


def empty_strided(device_type: int) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
    """What makes a tensor of sizes, strides and a dtype on the current device, past the dispatcher, which `plain` inputs
    do not need: what PyTorch's own compiled code calls, in a third of the time of `torch.empty`."""
    name = "cuda" if device_type == CUDA else "cpu"
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{name}", None)
    return quick or (lambda sizes, strides, dtype: torch.empty_strided(sizes, strides, dtype=dtype, device=name))


# None without the compiled module or CUDA's driver, and where PyTorch does not hand out how it reads its tensors (2.11 does).
# Settled at once, whether there is a GPU or not: code that was traced before the first call on one stays as it is.
table: Any = None
if torch.version.cuda is not None and cuda_driver.launch() is not None and type(_environment) is dict:
    with suppress(AttributeError, ValueError):
        table = make()


def remember(backend: ModuleType, inputs: tuple[Any, ...], options: tuple[bool, str, str], out_dtype: Any) -> None:
    """After the backend has answered a call that the table did not know, in the dtype that was asked for."""
    # Where these are other objects than the caller's, such as a mask made of his, he will come with his own again.
    if table.missed(*inputs, *options, out_dtype):
        launch_of = getattr(backend, "launch_of", None)
        table.keep(*inputs, *options, out_dtype, None if launch_of is None else launch_of(*inputs, *options))


def clear() -> None:
    if table is not None:
        table.clear()
