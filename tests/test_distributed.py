"""Two and three ranks with unequal batches and lengths equal one process with all of it; one synchronisation a step."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import edgecolbert_kernels.distributed
from edgecolbert_kernels import GradCache, contrastive_loss, gather_with_gradient
from encoders import Encoder, gradients, rows, texts
from ranks import Ranks

pytestmark = pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="no gloo")

COUNTS = (5, 2, 4)  # queries of each rank
LENGTHS = (9, 6, 11)  # tokens of the longest document of each rank
EXACT = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def ranks(request):
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def joined(parts):
    """Ragged `[N_r, ..., L_r, d]` as one, zeros beyond."""
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, 0, 0, longest - part.shape[-2])) for part in parts])


# The gather.


def gather(rank, parts, masks, weights, break_reduce_scatter=False):
    """What the gather returns, and the gradient of a loss that weighs it differently on every rank."""
    X = parts[rank].clone().requires_grad_()
    module = edgecolbert_kernels.distributed
    before = module._reduce_scatter_sum
    if break_reduce_scatter:

        def missing(*_, **__):
            raise RuntimeError("ProcessGroupGloo does not support reduce_scatter")

        module._reduce_scatter_sum = missing
    try:
        gathered = gather_with_gradient(X, masks and masks[rank])
        (gathered.embeddings * weights[rank]).sum().backward()
    finally:
        module._reduce_scatter_sum = before
    return gathered.embeddings.detach(), gathered.mask, gathered.offset, gathered.weight, X.grad


@pytest.mark.parametrize("break_reduce_scatter", [False, True], ids=["reduce_scatter", "all_reduce"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masks"])
@pytest.mark.parametrize("between", [(), (3,)], ids=["3-D", "4-D"])
@pytest.mark.parametrize("counts", [COUNTS, (0, 3, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gather(ranks, counts, between, masked, break_reduce_scatter, dtype):
    torch.manual_seed(1)
    shapes = [(n, *between, L, 4) for n, L in zip(counts, LENGTHS, strict=True)][: ranks.size]
    parts = [torch.randn(shape, dtype=dtype) for shape in shapes]
    masks = [torch.rand(shape[:-1]) < 0.7 for shape in shapes]
    whole = joined(parts)
    # Small integers: their sums are exact in bfloat16 too.
    weights = [torch.randint(-4, 5, whole.shape).to(dtype) for _ in parts]
    answers = ranks.run(gather, parts, masks if masked else None, weights, break_reduce_scatter)

    kept = joined([(mask if masked else torch.ones_like(mask))[..., None] for mask in masks])[..., 0]
    start = 0
    for (embeddings, mask, offset, weight, gradient), part in zip(answers, parts, strict=True):
        assert torch.equal(embeddings, whole)
        assert torch.equal(mask, kept)
        assert offset == start
        assert weight == pytest.approx(len(part) * ranks.size / len(whole))
        assert torch.equal(gradient, sum(weights)[start : start + len(part), ..., : part.shape[-2], :])
        start += len(part)


def test_gather_nothing(two):
    empty = torch.zeros(0, 3, 4, dtype=torch.float64)
    for embeddings, mask, offset, _, gradient in two.run(gather, [empty] * 2, None, [empty] * 2):
        assert (embeddings.shape, mask.shape, offset) == ((0, 3, 4), (0, 3), 0)
        assert gradient.shape == (0, 3, 4)


def refuse(rank, parts):
    with pytest.raises(ValueError, match="the ranks hold embeddings"):
        gather_with_gradient(parts[rank])
    return True


@pytest.mark.parametrize(
    "second",
    [torch.zeros(2, 3, 5), torch.zeros(2, 1, 3, 4), torch.zeros(2, 3, 4).half(), torch.zeros(2, 3, 4).bfloat16()],
    ids=["d", "axes", "float16", "bfloat16"],
)
def test_ranks_that_differ_all_raise(two, second):
    assert two.run(refuse, [torch.zeros(2, 3, 4), second]) == [True, True]


def test_alone():
    X = torch.randn(3, 4, 5, requires_grad=True)
    gathered = gather_with_gradient(X, torch.tensor([[1, 0, 1, 0]] * 3))
    assert gathered.embeddings is X
    assert gathered.mask.tolist() == [[True, False, True, False]] * 3
    assert gathered[2:] == (0, 1.0)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "embeddings is a list", ([1.0],)),
        (TypeError, "embeddings has dtype int64", (torch.zeros(2, 3, 4, dtype=torch.int64),)),
        (ValueError, r"embeddings has shape \[2, 3\]; want \[N, ..., L, d\]", (torch.zeros(2, 3),)),
        (ValueError, r"mask has shape \[2, 4\]; want \[2, 3\]", (torch.zeros(2, 3, 4), torch.ones(2, 4))),
    ],
)
def test_gather_errors(error, message, arguments):
    with pytest.raises(error, match=message):
        gather_with_gradient(*arguments)


# Whole steps.


def contrast(queries, documents):
    """Local queries against the documents of every rank."""
    (Q, q_mask), (D, d_mask) = queries, documents
    everything = gather_with_gradient(D, d_mask)
    target = everything.offset + torch.arange(len(Q))
    loss = contrastive_loss(Q, everything.embeddings, q_mask, everything.mask, target=target, temperature=0.1)
    return loss * everything.weight


def make(seed=0, **options):
    torch.manual_seed(seed)
    return Encoder(dropout=0.0, **options).double()


def batch(rank, *, kind):
    if kind == "queries":
        return texts(COUNTS[rank], 4 + rank, seed=rank)
    return texts(COUNTS[rank], LENGTHS[rank], seed=10 + rank)


def one_process(size, encoders):
    """Loss and gradients of all ranks' texts in one batch."""
    representations = []
    for encode, kind in zip(encoders, ("queries", "documents"), strict=True):
        outputs = [encode(**batch(rank, kind=kind)) for rank in range(size)]
        masks = joined([mask[..., None] for _, mask in outputs])[..., 0]
        representations.append((joined([tokens for tokens, _ in outputs]), masks))
    (Q, q_mask), (D, d_mask) = representations
    loss = contrastive_loss(Q, D, q_mask, d_mask, temperature=0.1)
    loss.backward()
    return loss.item(), gradients(*dict.fromkeys(encoders))


def counted(model, **options):
    """The model under data parallelism, and the list of its gradient synchronisations: one bucket each."""
    wrapped = DistributedDataParallel(model, bucket_cap_mb=100, **options)
    calls = []

    def hook(state, bucket):
        calls.append(bucket.buffer().numel())
        work = distributed.all_reduce(bucket.buffer().div_(distributed.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, hook)
    return wrapped, calls


def step(rank, shared, deferred, how, sizes):
    """One step on every rank: loss, gradients and the number of synchronisations of each model."""
    models = [make(0)] if shared else [make(0), make(1)]
    wrapped, calls = zip(*(counted(model) for model in models), strict=True)
    named, options = list(wrapped), {}
    if how == "function":
        named = [lambda model=model, **chunk: model(**chunk) for model in wrapped]
    elif how == "passed":
        named = [lambda model=model, **chunk: model(**chunk) for model in wrapped]
        options["models"] = wrapped
    elif how == "compiled":
        named = [torch.compile(model, backend="eager") for model in wrapped]
    encode = named[0] if shared else named
    if sizes is None:
        cache = GradCache(encode, contrast, memory_budget=20_000 if rank else 60_000, **options)
    else:
        cache = GradCache(encode, contrast, sizes[rank], **options)
    inputs = [batch(rank, kind=kind) for kind in ("queries", "documents")]
    for model in models:
        model.zero_grad()
    for turn in range(2):
        # Twice: what a step leaves behind must not disturb the next.
        for model in models:
            model.zero_grad()
        if deferred:
            loss = cache(*inputs)
            loss.backward()
        else:
            loss = cache.step(*inputs)
        assert [len(each) for each in calls] == [turn + 1] * len(models), calls
    return loss.item(), gradients(*models)


def check(answers, expected):
    losses, found = zip(*answers, strict=True)
    # Data parallelism averages the gradients; so the mean of the losses is the loss.
    assert sum(losses) / len(losses) == pytest.approx(expected[0], rel=1e-13)
    for each in found:
        for ours, wanted in zip(each, expected[1], strict=True):
            torch.testing.assert_close(ours, wanted, **EXACT)


@pytest.mark.parametrize("deferred", [False, True], ids=["step", "backward"])
@pytest.mark.parametrize("shared", [True, False], ids=["one model", "two models"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 50, 3), (50, 50, 50), None], ids=str)
def test_equals_one_process_with_one_synchronisation(ranks, sizes, shared, deferred):
    models = [make(0)] * 2 if shared else [make(0), make(1)]
    check(ranks.run(step, shared, deferred, "module", sizes), one_process(ranks.size, models))


@pytest.mark.parametrize("deferred", [False, True], ids=["step", "backward"])
@pytest.mark.parametrize("how", ["function", "passed"])
def test_models_inside_functions(two, how, deferred):
    check(two.run(step, False, deferred, how, (2, 1)), one_process(2, [make(0), make(1)]))


@pytest.mark.parametrize("deferred", [False, True], ids=["step", "backward"])
def test_compiled_model(two, deferred):
    check(two.run(step, False, deferred, "compiled", (2, 1)), one_process(2, [make(0), make(1)]))


class TwoHeads(nn.Module):
    """Queries and documents through heads of their own: the last replay reaches only one of them."""

    def __init__(self):
        super().__init__()
        self.queries, self.documents = make(0), make(1)

    def forward(self, is_query, **chunk):
        return (self.queries if is_query else self.documents)(**chunk)


def two_heads(rank):
    model, calls = counted(TwoHeads(), find_unused_parameters=True)
    inputs = [{**batch(rank, kind=kind), "is_query": kind == "queries"} for kind in ("queries", "documents")]
    loss = GradCache(model, contrast, 2).step(*inputs)
    assert len(calls) == 1
    return loss.item(), gradients(model.module.queries, model.module.documents)


def test_parameters_that_the_last_replay_does_not_reach(two):
    check(two.run(two_heads), one_process(2, [make(0), make(1)]))


class Synchronising(nn.Module):
    """Says when it may synchronise, and needs no group."""

    def __init__(self, inner, log):
        super().__init__()
        self.inner, self.log, self.quiet = inner, log, False

    @contextlib.contextmanager
    def no_sync(self):
        self.quiet = True
        yield
        self.quiet = False

    def forward(self, x):
        self.log.append("quiet" if self.quiet else "no graph" if not torch.is_grad_enabled() else "synchronises")
        return self.inner(x)


def test_every_model_synchronises_in_its_own_last_replay():
    logs = [], []
    first, second = (Synchronising(nn.Linear(4, 4), log) for log in logs)
    outer = Synchronising(second, [])  # as wrappers around wrappers do
    X = torch.randn(4, 3, 4)
    GradCache([first, outer], lambda *each: sum(x.sum() for x in each), 2, models=[first, outer, second]).step(X, X)
    assert logs[0] == ["no graph"] * 2 + ["quiet", "synchronises"]
    assert outer.log == ["no graph"] * 2 + ["quiet", "synchronises"]


def test_slices_of_texts():
    """The batches of the ranks do differ."""
    assert len({len(batch(rank, kind="queries")["input_ids"]) for rank in range(3)}) == 3
    assert rows(batch(0, kind="documents"), 0, 2)["input_ids"].shape == (2, LENGTHS[0])
