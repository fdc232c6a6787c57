"""The chunks of GradCache: an input cut into them, each encoded twice alike, their representations put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from edgecolbert_kernels import checks
from edgecolbert_kernels.replay.state import State

# What encode returns: a tensor, or a tuple of tensors. Inside, always a tuple.
Encode: TypeAlias = Callable[..., Tensor | Sequence[Tensor]]
Tensors: TypeAlias = tuple[Tensor, ...]


class Chunk:
    """Some rows of input number `place`, and what it takes to encode them twice alike."""

    def __init__(
        self, place: int, encode: Encode, batch: Any, rows: slice, models: Sequence[nn.Module] | None = None
    ) -> None:
        self.place, self.rows = place, rows
        self.called: list[Any] = []
        self._encode, self._input, self._models = encode, _cut(batch, rows), models

    def first(self) -> Tensors:
        """The representations, without a graph; notes the state before, and which models synchronise gradients."""
        self._state = State(self._input)
        with torch.no_grad(), _noting(self._models, self.called), self._state.autocast():
            return self._call()

    def again(self) -> Tensors:
        """The same, with a graph."""
        with torch.enable_grad(), self._state.again():
            return self._call()

    def backward(self, gradients: Sequence[Tensor | None]) -> None:
        """Encode again and backpropagate this chunk's part of the gradients of the whole input's representations."""
        pairs = [
            (output, gradient[_corner(self.rows, output)])
            for output, gradient in zip(self.again(), gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if pairs:
            outputs, parts = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, parts)

    def _call(self) -> Tensors:
        output = self._encode(**self._input) if isinstance(self._input, Mapping) else self._encode(self._input)
        self.returns_tuple = isinstance(output, (list, tuple))
        tensors = tuple(output) if self.returns_tuple else (output,)
        num_rows = self.rows.stop - self.rows.start
        for tensor in tensors or [None]:
            if not isinstance(tensor, Tensor):
                raise checks.not_an_array("what encode returned", tensor, "a tensor or a tuple of tensors")
            if tensor.shape[:1] != (num_rows,):
                wanted = f"one row for each of the chunk's {num_rows}"
                raise checks.wrong_shape("what encode returned", tensor.shape, wanted)
        return tensors


def cut(place: int, encode: Encode, batch: Any, size: int, models: Sequence[nn.Module] | None) -> list[Chunk]:
    num_rows = count_rows(place, batch)
    bounds = range(0, num_rows, size)
    return [Chunk(place, encode, batch, slice(start, min(start + size, num_rows)), models) for start in bounds]


def count_rows(place: int, batch: Any) -> int:
    """The rows of an input, at least one."""
    named = batch if isinstance(batch, Mapping) else {type(batch).__name__: batch}
    counts = {name: len(value) for name, value in named.items() if _has_rows(value)}
    if not counts:
        raise TypeError(f"input {place} is a {type(batch).__name__} without rows; want a tensor or a mapping with one")
    if len(set(counts.values())) > 1:
        raise ValueError(f"input {place} has unequal numbers of rows: {counts}")
    (count,) = set(counts.values())
    if count == 0:
        raise ValueError(f"input {place} is empty; want at least one row")
    return count


def combine(place: int, outputs: Sequence[Tensors]) -> list[Tensor]:
    """The representations of an input from those of its chunks, padded with zeros where token counts differ."""
    if len({len(tensors) for tensors in outputs}) > 1:
        raise ValueError(f"encode returned {sorted({len(t) for t in outputs})} tensors for chunks of input {place}")
    joined = [_join(tensors) for tensors in zip(*outputs, strict=True)]
    shapes = sorted({tuple(tensors[0].shape[1:]) for tensors in outputs})
    if len({(len(shape), *shape[-1:]) for shape in shapes}) > 1:
        raise ValueError(f"encode returned rows of shapes {shapes} for input {place}; want one last dimension")
    if len(shapes) > 1 and len(joined) == 1:
        raise ValueError(
            f"encode returned rows of shapes {shapes} for input {place}; chunks of unequal lengths want a mask beside "
            "the embeddings, as their padding must not be scored"
        )
    return joined


def silenced(chunks: Sequence[Chunk]) -> list[tuple[Chunk, list[Any]]]:
    """Every chunk with the models that must not synchronise yet: those which a later chunk calls again."""
    pairs: list[tuple[Chunk, list[Any]]] = []
    later: list[Any] = []
    for chunk in reversed(chunks):
        outermost = [m for m in chunk.called if not any(m is not o and m in set(o.modules()) for o in chunk.called)]
        pairs.append((chunk, [model for model in outermost if model in later]))
        later += outermost
    return pairs[::-1]


@contextmanager
def without_sync(models: Sequence[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.no_sync())
        yield


@contextmanager
def _noting(models: Sequence[nn.Module] | None, called: list[Any]) -> Iterator[None]:
    """Note every call of one of the models; without a list of them, of any module that has `no_sync`."""

    def note(module: nn.Module, _: object) -> None:
        if not torch.compiler.is_compiling() and hasattr(module, "no_sync") and module not in called:
            called.append(module)

    if models is not None:
        handles = [model.register_forward_pre_hook(note) for model in models]
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        # For the first step alone: a compiled module is compiled again for every such hook.
        handles = [register_module_forward_pre_hook(note)]
    else:
        handles = []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cut(batch: Any, rows: slice) -> Any:
    if not isinstance(batch, Mapping):
        return batch[rows]
    return {name: value[rows] if _has_rows(value) else value for name, value in batch.items()}


def _has_rows(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or bool(getattr(value, "shape", ()))


def _corner(rows: slice, part: Tensor) -> tuple[slice, ...]:
    """Where a chunk lies in its whole input: its rows, each from the first element on."""
    return (rows, *(slice(size) for size in part.shape[1:]))


def _join(parts: Sequence[Tensor]) -> Tensor:
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0].detach()
    if len({part.dim() for part in parts}) > 1:
        raise ValueError(f"encode returned chunks of shapes {[tuple(part.shape) for part in parts]}; want as many axes")
    longest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_zeros(sum(len(part) for part in parts), *longest)
    start = 0
    for part in parts:
        whole[_corner(slice(start, start + len(part)), part)] = part
        start += len(part)
    return whole
