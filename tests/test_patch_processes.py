"""PyLate's losses, patched, in other processes: workers of a data loader, spawned and forked, and two ranks of DDP.

Runs in an environment of PyLate's (docs/development.md)."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import tiny_colbert
from marks import compiled
from ranks import Ranks

pytest.importorskip("pylate")
pytestmark = compiled

from pylate import losses

from edgecolbert_kernels.integrations import patching
from edgecolbert_kernels.integrations.pylate import patch_pylate, unpatch_pylate, using_pylate

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NAMES = ("Contrastive", "Distillation")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_colbert.make(tmp_path_factory.mktemp("model"), query_length=8, document_length=20, dropout=0.0)


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_pylate()


def features(encoder, documents, seed):
    queries = encoder.tokenize(tiny_colbert.texts(4, 6, seed=seed), is_query=True)
    texts = tiny_colbert.texts(4 * documents, 18, seed=seed + 1)
    return [dict(queries), dict(encoder.tokenize(texts, is_query=False, pad=True))]


def make(name, encoder):
    """A loss and batches for it, each features and labels."""
    documents = 3 if name == "Distillation" else 1
    batches = [
        (features(encoder, documents, seed), torch.randn(4, documents, generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 11)
    ]
    options = {"gather_across_devices": True} if name == "Contrastive" else {}
    return getattr(losses, name)(encoder, **options), batches


class Mine:
    """Scores a batch in the worker, as a miner of hard negatives does: its value and the kernels' hits."""

    def __init__(self, loss):
        self.loss = loss

    @torch.no_grad()
    def __call__(self, samples):
        ((inputs, labels),) = samples
        before = sum(patching.hits().values())
        value = self.loss([dict(each) for each in inputs], labels)
        return value, sum(patching.hits().values()) - before


def patch_worker(number):
    patch_pylate()


@pytest.mark.parametrize(("start", "initialise"), [("fork", None), ("spawn", None), ("spawn", patch_worker)], ids=str)
def test_workers(encoder, start, initialise):
    """A forked worker is patched as its parent is; a spawned one is where it patches, and runs PyLate's code else."""
    loss, batches = make("Contrastive", encoder)
    wanted = [Mine(loss)([batch])[0] for batch in batches]
    with using_pylate():
        loader = DataLoader(
            batches,
            num_workers=2,
            collate_fn=Mine(make("Contrastive", encoder)[0]),
            multiprocessing_context=start,
            worker_init_fn=initialise,
            timeout=600,  # a spawned worker has PyLate to import
        )
        found = list(loader)
    for (value, hits), expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, expected, **CLOSE)
        assert (hits > 0) == (start == "fork" or initialise is not None)


def step(rank, loss, batches, patched):
    """Loss and gradients of a rank, and the kernels' hits."""
    inputs, labels = batches[rank]
    with using_pylate() if patched else contextlib.nullcontext():
        before = sum(patching.hits().values())
        # The encoder's pooler is not used.
        module = DistributedDataParallel(copy.deepcopy(loss), find_unused_parameters=True)
        value = module([dict(each) for each in inputs], labels)
        value.backward()
        hits = sum(patching.hits().values()) - before
    return value.detach(), [p.grad for p in module.parameters() if p.grad is not None], hits


@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="no gloo")
def test_ranks(encoder):
    """The losses are made and sent to the ranks while patched here."""
    ranks = Ranks(2, seconds=600)  # each has PyLate to import
    try:
        for name in NAMES:
            with using_pylate():
                loss, batches = make(name, encoder)
                answers = [ranks.run(step, loss, batches, patched) for patched in (False, True)]
            for theirs, ours in zip(*answers, strict=True):
                torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
                assert len(ours[1]) == len(theirs[1]) > 0
                for found, wanted in zip(ours[1], theirs[1], strict=True):
                    torch.testing.assert_close(found, wanted, **CLOSE)
                assert (theirs[2], ours[2] > 0) == (0, True)
            for found, wanted in zip(answers[1][0][1], answers[1][1][1], strict=True):
                assert torch.equal(found, wanted), "the ranks do not have the same gradients"
    finally:
        ranks.close()
