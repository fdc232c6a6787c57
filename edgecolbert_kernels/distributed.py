"""Negatives from other ranks: token embeddings gathered with their gradients.

Every rank scores its own queries against the documents of all. Gathering the documents is cheaper than gathering both, and
the gradient of a document is the sum over the ranks that scored it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from edgecolbert_kernels import checks

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_AXES = 6

# Renamed in torch 2.13, which warns about the older names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter_sum: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Gathered(NamedTuple):
    """The documents of all ranks, in the order of ranks, and which of them are this rank's.

    Attributes:
        embeddings: `[N, L, d]`, `[N, K, L, d]` or as many axes as were given; zeros beyond a rank's own L.
        mask: bool, `embeddings` without d: the tokens to keep.
        offset: the first row of this rank. A local index i along the first axis is `offset + i` here.
        weight: this rank's number of rows over the mean of all ranks'. Data parallelism averages gradients over ranks;
            a mean over local rows, times this weight, makes that the mean over all rows.
    """

    embeddings: Tensor
    mask: Tensor
    offset: int
    weight: float


def gather_with_gradient(
    embeddings: Tensor, mask: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Gathered:
    """Put the embeddings of all ranks together; gradients flow back to the ranks that own them, summed over all.

    The ranks may differ in their number of rows, none included, and in their number of tokens: each pads to the largest
    for the transfer. Every rank must call it alike, backward included.

    The loss of local queries against all documents, averaged over ranks by data parallelism, then has the gradients of
    one process that holds the whole batch. No factor of the world size is needed, as documents get the gradients of every
    rank's loss; where ranks hold unequal numbers of queries, multiply by `weight`:

        documents = gather_with_gradient(D, d_mask)
        target = documents.offset + torch.arange(len(Q), device=Q.device)
        loss = contrastive_loss(Q, documents.embeddings, q_mask, documents.mask, target=target) * documents.weight

    Args:
        embeddings: `[N, ..., L, d]` in float32, float16, bfloat16 or float64, on the device of the group's backend. d, the
            dtype and the axes between N and L must be the same on all ranks.
        mask: `[N, ..., L]`, bool or 0/1: the tokens to keep; None keeps all.
        group: a process group; None: the default one. Without torch.distributed, or alone, nothing is sent.

    Raises:
        TypeError: embeddings is not a tensor of such a dtype.
        ValueError: it has fewer than three axes, the mask another shape; or ranks differ where they must not, and then
            all of them raise it.
    """
    if not isinstance(embeddings, Tensor):
        raise checks.not_an_array("embeddings", embeddings, "a torch tensor")
    if embeddings.dtype not in DTYPES:
        raise checks.wrong_dtype("embeddings", embeddings.dtype, checks.FLOATS)
    if embeddings.dim() < 3:
        raise checks.wrong_shape("embeddings", embeddings.shape, "[N, ..., L, d]")
    if mask is None:
        mask = torch.ones_like(embeddings[..., 0], dtype=torch.bool)
    checks.mask("mask", mask.shape, "embeddings", embeddings.shape)
    mask = mask != 0
    if world_size(group) == 1:
        return Gathered(embeddings, mask, 0, 1.0)

    shapes = _gather_shapes(embeddings, group)
    sizes = [(shape[0], shape[-2]) for shape in shapes]
    rank = dist.get_rank(group)
    counts = [count for count, _ in sizes]
    gathered: Tensor = _Gather.apply(embeddings, sizes, group)
    kept = _gather(mask[..., None].to(torch.uint8), sizes, group)[..., 0] != 0
    return Gathered(gathered, kept, sum(counts[:rank]), counts[rank] * len(counts) / max(sum(counts), 1))


def world_size(group: Any = None) -> int:
    """The ranks of a group; 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


Sizes = list[tuple[int, int]]  # rows and tokens of every rank


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, sizes: Sizes, group: Any) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gather(embeddings, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradient, ctx.sizes, ctx.group), None, None


def _gather(X: Tensor, sizes: Sizes, group: Any) -> Tensor:
    most, longest = map(max, zip(*sizes, strict=True))
    rows, tokens = X.shape[0], X.shape[-2]
    padded = X.new_zeros(most, *X.shape[1:-2], longest, X.shape[-1])
    padded[:rows, ..., :tokens, :] = X
    every = X.new_empty(len(sizes), *padded.shape)
    if padded.numel():
        _all_gather(every.view(-1), padded.view(-1), group=group)
    return torch.cat([part[:count] for part, (count, _) in zip(every, sizes, strict=True)])


def _reduce_scatter(gradient: Tensor, sizes: Sizes, group: Any) -> Tensor:
    rank = dist.get_rank(group)
    counts = [count for count, _ in sizes]
    every = gradient.new_zeros(len(sizes), max(counts), *gradient.shape[1:])
    for part, rows in zip(every, gradient.split(counts), strict=True):
        part[: len(rows)] = rows
    own = every[rank]
    if every.numel():
        try:
            own = torch.empty_like(every[0])
            _reduce_scatter_sum(own.view(-1), every.view(-1), group=group)
        except (RuntimeError, NotImplementedError):
            # gloo has it only in newer versions of torch, and refuses before anything is sent.
            if dist.get_backend(group) != "gloo":
                raise
            dist.all_reduce(every, group=group)
            own = every[rank]
    count, tokens = sizes[rank]
    return own[:count, ..., :tokens, :]


def _gather_shapes(embeddings: Tensor, group: Any) -> list[list[int]]:
    """The shape on every rank, and that they fit together."""
    shape = list(embeddings.shape)
    if len(shape) > MOST_AXES:
        raise checks.wrong_shape("embeddings", shape, f"at most {MOST_AXES} axes")
    # As long on every rank, whatever that rank holds: ranks that disagree must all find out.
    told = [DTYPES.index(embeddings.dtype), len(shape), *shape, *[0] * (MOST_AXES - len(shape))]
    facts = torch.tensor(told, device=embeddings.device)
    every = facts.new_empty(dist.get_world_size(group), len(facts))
    _all_gather(every.view(-1), facts, group=group)
    held = [(DTYPES[dtype], row[:axes]) for dtype, axes, *row in every.tolist()]
    if len({(dtype, len(shape), *shape[1:-2], shape[-1]) for dtype, shape in held}) > 1:
        seen = ", ".join(f"{str(dtype).removeprefix('torch.')} {shape}" for dtype, shape in held)
        raise ValueError(f"the ranks hold embeddings {seen}; want the same but for the first axis and the tokens")
    return [shape for _, shape in held]
