"""GradCache: the gradients of a large batch through encoders that see a chunk of it at a time.

A contrastive loss needs every representation of a batch at once. The encoder's activations, which fill the memory, it
needs only a chunk at a time (Gao et al. 2021, arXiv 2101.06983):

1. encode every chunk without a graph, and remember the state that each began with;
2. compute the loss of all representations, and its gradients with respect to them;
3. encode every chunk again, now with a graph and from the same state, and backpropagate its part of those gradients.

The parameters then hold the gradients of the whole batch, dropout included, for the price of one more forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgecolbert_kernels import checks
from edgecolbert_kernels.replay.chunks import Chunk, Encode, combine, cut, silenced, without_sync
from edgecolbert_kernels.replay.memory import chunk_size_within
from edgecolbert_kernels.replay.state import autocast_off

T = TypeVar("T")


class GradCache:
    """Gradients of one large batch, encoded in chunks (Gao et al. 2021, arXiv 2101.06983).

    Args:
        encode: called as `encode(**chunk)` for an input that is a mapping, else as `encode(chunk)`. It returns
            embeddings `[n, ..., L, d]`, or a tuple of tensors that begins with them, such as (embeddings, mask `[n, L]`),
            with a row for each of the chunk's n, in any dtype. One function for all inputs, or a sequence with one for each.
        loss_fn: called as `loss_fn(*representations, **options)`, with the whole batch of each input in the form that
            encode returns: a tensor or a tuple. It returns a scalar tensor. Its own parameters get their gradients too.
        mini_batch_size: rows a chunk for all inputs, or a sequence with one number for each.
        memory_budget: instead of mini_batch_size, the bytes that the activations of a chunk may take. The first step
            measures a few rows of each input and keeps the largest power of two that fits, so begin with long ones.
            What checkpointing computes again is not counted.
        scaler: a `torch.amp.GradScaler`: `step` leaves the gradients of the scaled loss, for `scaler.step(optimizer)`.
        models: the modules that synchronise gradients and have `no_sync()`, such as DistributedDataParallel. None: those
            that encode is seen to call in the first step, where torch.distributed is initialised.
        show_progress_bar: show chunks done (needs tqdm).

    An input is a mapping or one value. Tensors, arrays, lists and tuples are cut along their first dimension; what else a
    mapping holds goes to every chunk. Where chunks come back with unequal token counts, all that encode returned is padded
    with zeros to the longest; encode must then return a mask, as padding must not be scored.

    Both passes run with the random states (CPU and devices in use) and the autocast settings that the first began with.
    Random numbers from elsewhere, Python's or numpy's, are not repeated. Gradient checkpointing inside encode is fine.
    Batch normalisation sees chunks, not the batch, and each of them twice.

    Under data parallelism every model synchronises once a step, in the last replay that calls it; if that replay does not
    reach all of its parameters, DistributedDataParallel wants `find_unused_parameters=True`. Ranks may have different
    numbers of chunks. For negatives from other ranks use `gather_with_gradient` in loss_fn.

    Raises:
        TypeError, ValueError: mini_batch_size or memory_budget is not an integer, is below 1, or not exactly one of them is
            given.
    """

    def __init__(
        self,
        encode: Encode | Sequence[Encode],
        loss_fn: Callable[..., Tensor],
        mini_batch_size: int | Sequence[int] | None = None,
        *,
        memory_budget: int | None = None,
        scaler: torch.amp.GradScaler | None = None,
        models: Iterable[nn.Module] | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        if (mini_batch_size is None) == (memory_budget is None):
            raise ValueError("want one of mini_batch_size and memory_budget")
        _at_least_one("mini_batch_size", mini_batch_size)
        _at_least_one("memory_budget", memory_budget)
        self.encode = encode
        self.loss_fn = loss_fn
        self.mini_batch_size = mini_batch_size
        self.memory_budget = memory_budget
        self.scaler = scaler
        self.models: tuple[nn.Module, ...] | None = None if models is None else tuple(models)
        self.show_progress_bar = show_progress_bar

    def step(self, *inputs: Any, **options: Any) -> Tensor:
        """Add the gradients of the inputs' loss to the parameters.

        Args:
            inputs: one or more, each with at least one row. Their numbers of rows may differ.
            options: for loss_fn.

        Returns:
            The loss, detached, without the scaler's factor.

        Raises:
            TypeError: encode or loss_fn did not return tensors, or an input has no rows to cut.
            ValueError: an input is empty or its parts have unequal numbers of rows, or a tensor from encode or loss_fn has
                a shape that does not fit, or one row exceeds the memory budget.
            FloatingPointError: the loss is infinite or NaN. No gradient has been touched. Under an enabled scaler, which
                is there to skip such steps, it is not raised. It ends the rank that raises it, as any error does.

        An error from within the third pass leaves the gradients of the chunks before it.
        """
        with torch.enable_grad():
            chunks, leaves, loss = self._forward(inputs, options)
            scaler = self.scaler if self.scaler is not None and self.scaler.is_enabled() else None
            if scaler is None and not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()}; no gradient has been touched")
            self._backward(chunks, leaves, scaler.scale(loss) if scaler else loss)
        return loss.detach()

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        """The same loss for a trainer that calls `backward()` itself: step three then happens in there.

        Once: what is encoded again is not kept, so neither `retain_graph` nor `torch.autograd.grad` has anything to go by.
        Without gradients (`torch.no_grad`) it is just the loss. It may be NaN, and scaling it is up to the trainer.
        """
        chunks, leaves, loss = self._forward(inputs, options)
        if not torch.is_grad_enabled():
            return loss
        # autograd calls a function's backward only if one of its inputs wants a gradient.
        anchor = torch.zeros((), device=loss.device, requires_grad=True)
        return _Replay.apply(anchor, loss.detach(), lambda gradient: self._backward(chunks, leaves, loss, gradient))

    def _forward(
        self, inputs: Sequence[Any], options: Mapping[str, Any]
    ) -> tuple[list[Chunk], list[list[Tensor]], Tensor]:
        """All chunks, the tensors of each input that the loss was computed from, and the loss."""
        chunks: list[Chunk] = []
        leaves: list[list[Tensor]] = []
        representations: list[Tensor | tuple[Tensor, ...]] = []
        encoders = _for_each("encode", self.encode, len(inputs))
        sizes = self._chunk_sizes(encoders, inputs)
        for place, (encode, batch, size) in enumerate(zip(encoders, inputs, sizes, strict=True)):
            own = cut(place, encode, batch, size, self.models)
            whole = combine(place, [chunk.first() for chunk in self._progress(own, f"encode input {place}")])
            if torch.is_grad_enabled():
                whole = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in whole]
            chunks += own
            leaves.append(whole)
            representations.append(tuple(whole) if own[0].returns_tuple else whole[0])
        if self.models is None:
            self.models = tuple({model for chunk in chunks for model in chunk.called})
        return chunks, leaves, _scalar(self.loss_fn(*representations, **options))

    def _backward(
        self, chunks: list[Chunk], leaves: list[list[Tensor]], loss: Tensor, gradient: Tensor | None = None
    ) -> None:
        if not loss.requires_grad:
            raise ValueError("loss_fn returned a loss without a gradient; want one computed from the representations")
        with autocast_off():
            torch.autograd.backward(loss, gradient)
            gradients = [[leaf.grad for leaf in whole] for whole in leaves]
            for chunk, models in self._progress(silenced(chunks), "encode again, with gradients"):
                with without_sync(models):
                    chunk.backward(gradients[chunk.place])

    def _chunk_sizes(self, encoders: Sequence[Encode], inputs: Sequence[Any]) -> Sequence[int]:
        if self.mini_batch_size is None:
            assert self.memory_budget is not None
            self.mini_batch_size = [
                chunk_size_within(self.memory_budget, place, encode, batch, self.models)
                for place, (encode, batch) in enumerate(zip(encoders, inputs, strict=True))
            ]
        return _for_each("mini_batch_size", self.mini_batch_size, len(inputs))

    def _progress(self, items: Sequence[T], text: str) -> Iterable[T]:
        if not self.show_progress_bar:
            return items
        return import_module("tqdm.auto").tqdm(items, desc=text, leave=False)


class _Replay(torch.autograd.Function):
    """A loss whose backward is a function call."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, replay: Callable[[Tensor], None]) -> Tensor:
        ctx.replay = replay
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        with torch.enable_grad():
            ctx.replay(gradient)
        return None, None, None


def _at_least_one(name: str, given: Any) -> None:
    for size in given if isinstance(given, Sequence) and not isinstance(given, str) else [given]:
        if size is not None:
            checks.at_least(name, size, 1)


def _for_each(name: str, given: Any, count: int) -> Sequence[Any]:
    """One for each input, from one for all or a sequence."""
    if count == 0:
        raise ValueError("there is no input; want at least one")
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} entries; want {count}, one for each input")
    return given


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise checks.not_an_array("what loss_fn returned", loss, "a scalar tensor")
    if loss.dim():
        raise checks.wrong_shape("what loss_fn returned", loss.shape, "a scalar")
    return loss
