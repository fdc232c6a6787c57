"""How many rows a chunk may have within a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgecolbert_kernels.replay.chunks import Chunk, Encode, count_rows, without_sync
from edgecolbert_kernels.replay.state import State

MOST_PROBED = 4


def chunk_size_within(
    budget: int, place: int, encode: Encode, batch: Any, models: Sequence[nn.Module] | None = None
) -> int:
    """The largest power of two of rows whose activations take at most `budget` bytes, by those of the first few rows.

    Random states are left as they were. Raises ValueError where one row takes more.
    """
    num_rows = count_rows(place, batch)
    probed = min(MOST_PROBED, num_rows)

    def measure(count: int) -> int:
        chunk = Chunk(place, encode, batch, slice(0, count), models)
        with State(batch).again():
            device = chunk.first()[0].device
        with without_sync(chunk.called):
            return _activation_bytes(chunk, device)

    largest = measure(probed)
    # What does not grow with the rows, such as weights in a lower precision, counts once: it drops out of a difference.
    per_row = (largest - measure(1)) / (probed - 1) if probed > 1 else float(largest)
    if per_row > budget:
        raise ValueError(f"memory_budget is {budget} bytes; one row of input {place} takes {per_row:.0f}")
    size = 1
    while size < num_rows and 2 * size * per_row <= budget:
        size *= 2
    return size


def _activation_bytes(chunk: Chunk, device: torch.device) -> int:
    """What a forward pass keeps for its backward: on a CPU by what autograd saves, else by the peak of the allocator."""
    if device.type == "cpu":
        held: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = chunk.again()
        del outputs
        return sum(held.values())
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    outputs = chunk.again()
    del outputs
    return torch.accelerator.max_memory_allocated(device) - before
