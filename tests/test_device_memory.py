"""The losses on a device, without one: meta tensors have shapes and no values, so what runs on them waits for nothing.

A backend that only allocates what the kernels would stands in for them; the bytes alive at any time are counted.
"""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgecolbert_kernels.backends import layout
from edgecolbert_kernels.ops import tiles

META = torch.device("meta")
GIGABYTE = 2**30


class Allocations(TorchDispatchMode):
    """Bytes of all storages that were made inside and are still alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.alive, self.most, self._seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self._seen.discard(key)
        self.alive -= size


class Kernels:
    """What the GPU backend allocates, by its interface."""

    def __init__(self):
        self.calls = []

    def forward(self, Q, D, q_mask, d_mask, cu_q, cu_d, query_index, document_index, *options):
        self.calls.append("forward")
        shape = layout.scores_shape(Q, D, cu_q, cu_d, query_index)
        argmax = None
        if options[-1]:
            argmax = Q.new_empty(layout.argmax_length(Q, shape, cu_q), dtype=torch.int16)
        return Q.new_empty(shape, dtype=torch.float32), argmax

    def backward(self, grad, Q, D, argmax, *rest):
        self.calls.append("backward")
        return self._gradients(Q, D, *rest[9:])

    def backward_recompute(self, grad, Q, D, *rest):
        self.calls.append("backward_recompute")
        scratch = Q.new_empty(grad.numel() * Q.shape[1], dtype=torch.int16)
        del scratch
        return self._gradients(Q, D, *rest[9:])

    def _gradients(self, Q, D, need_queries, need_documents, sums=None):
        return (
            sums if sums is not None else torch.empty_like(Q) if need_queries else None,
            torch.empty_like(D) if need_documents else None,
        )


class AllKernels(Kernels):
    """With those of the loss, which allocate what they do, and are not started."""

    def __init__(self, monkeypatch):
        super().__init__()
        contrastive = pytest.importorskip("edgecolbert_kernels.backends.triton.contrastive", exc_type=ImportError)
        monkeypatch.setattr(contrastive.Variant, "launch", lambda *_: None)
        self.RowSums, self.Weights = contrastive.RowSums, contrastive.Weights


@pytest.fixture(params=["loss in PyTorch", "loss in kernels"])
def kernels(request, monkeypatch):
    backend = AllKernels(monkeypatch) if "kernels" in request.param else Kernels()
    monkeypatch.setattr(tiles, "select", lambda *_: backend)
    return backend


def problem(num_queries, num_documents, lq, ld, dim, dtype=torch.float16, **changes):
    given = {
        "q_mask": torch.empty(num_queries, lq, dtype=torch.bool, device=META),
        "d_mask": torch.empty(num_documents, ld, dtype=torch.bool, device=META),
        "target": torch.empty(num_queries, dtype=torch.int64, device=META),
        "exclude": None,
        "label_smoothing": 0.0,
        "margin": None,
        "symmetric": False,
        "normalize": False,
        **changes,
    }
    return tiles.Problem(
        Q=torch.empty(num_queries, lq, dim, dtype=dtype, device=META),
        D=torch.empty(num_documents, ld, dim, dtype=dtype, device=META),
        temperature=torch.empty((), dtype=torch.float64, device=META),
        mask_mode="exclude",
        **given,
    )


def run(given, save_scores=None, budget=256 << 20):
    """Forward and backward; what was alive at most, inputs and gradients included."""
    inputs = sum(x.nbytes for x in given if isinstance(x, torch.Tensor))
    with Allocations() as allocations:
        loss, state = tiles.forward(given, tiles.plan(given.Q, given.D, save_scores, budget), tiles.setting(given))
        grads = tiles.backward(torch.empty_like(loss), given, state, tiles.setting(given), True, True, True)
    assert [x.shape for x in grads] == [given.Q.shape, given.D.shape, ()]
    return inputs + allocations.most


OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "symmetric": {"symmetric": True},
    "normalized": {"normalize": True},
    "margin": {"margin": 0.95},
    "excluded": {"exclude": torch.empty(96, 160, dtype=torch.bool, device=META)},
    "several": {"target": torch.empty(96, 160, dtype=torch.bool, device=META)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kept", [{}, {"save_scores": True, "budget": 0}, {"save_scores": False}], ids=str)
def test_nothing_waits_for_a_value(kernels, name, kept):
    """A value that the host wanted would raise here."""
    run(problem(96, 160, 8, 20, 16, **OPTIONS[name]), **kept)
    assert kernels.calls[-1] == ("backward" if not kept else "backward_recompute")


@pytest.mark.parametrize(
    ("dtype", "save_scores", "symmetric", "gigabytes"),
    [(torch.float16, None, False, 2.0), (torch.float32, True, True, 6.0)],
    ids=["half", "float, symmetric, scores kept"],
)
def test_the_papers_batch_fits_in_8_gb(kernels, monkeypatch, dtype, save_scores, symmetric, gigabytes):
    """24,576 queries of 32 tokens and documents of 220 at d = 48: inputs, gradients and all that comes between."""
    given = problem(24576, 24576, 32, 220, 48, dtype, symmetric=symmetric)
    most = run(given, save_scores=save_scores)
    assert most <= gigabytes * GIGABYTE, f"{most / GIGABYTE:.2f} GB"
    assert gigabytes * GIGABYTE < 8e9


def test_tiles_grow_with_the_device(kernels):
    """As many documents as the budget of a tile allows, all of them covered once."""
    for size in (64, 1024, 24576):
        given = problem(size, size, 32, 180, 48)
        with torch.no_grad():
            parts = list(tiles._Source(given, tiles.setting(given)).tiles(False))
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == size
        bytes_of_document = size * 32 * 2
        assert len(parts) == math.ceil(size / max(16, min(tiles.ARGMAX_BYTES_ELSEWHERE // bytes_of_document, size)))
