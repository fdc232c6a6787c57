"""GradCache: the gradients of the whole batch, whatever the chunks, the encoders, the randomness and the precision."""

from __future__ import annotations

import contextlib
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from edgecolbert_kernels import GradCache, contrastive_loss
from edgecolbert_kernels.replay.memory import chunk_size_within
from encoders import Encoder, gradients, rows, texts, trimmed, whole

EXACT = {"rtol": 0, "atol": 1e-14}
PARAMETER = nn.Parameter(torch.zeros(()))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def contrast(queries, documents, *more, temperature=0.1):
    """In-batch cross-entropy; documents of further inputs are further negatives."""
    Q, q_mask = queries
    loss = contrastive_loss(Q, documents[0], q_mask, documents[1], temperature=temperature)
    for D, d_mask in more:
        loss = loss + contrastive_loss(Q, D, q_mask, d_mask, temperature=temperature)
    return loss


def of_whole_batch(encoders, inputs, sizes, loss_fn=contrast, scale=1.0, autocast=contextlib.nullcontext):
    """Loss and gradients as plain autograd has them."""
    for encode in encoders:
        encode.zero_grad()
    torch.manual_seed(7)
    with autocast():
        outputs = [whole(*each) for each in zip(encoders, inputs, sizes, strict=True)]
        loss = loss_fn(*outputs)
    (loss * scale).backward()
    return loss.detach(), gradients(*encoders)


def of_step(cache, encoders, inputs, deferred=False, **options):
    for encode in encoders:
        encode.zero_grad()
    torch.manual_seed(7)
    if deferred:
        loss = cache(*inputs, **options)
        loss.backward()
    else:
        loss = cache.step(*inputs, **options)
    return loss.detach(), gradients(*encoders)


def check(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **(tolerance or EXACT))
    for ours, wanted in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, wanted, **(tolerance or EXACT))


@pytest.mark.parametrize("deferred", [False, True], ids=["step", "backward"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50], ids="size={}".format)
@pytest.mark.parametrize("count", [1, 2, 3], ids="inputs={}".format)
def test_equals_the_whole_batch(count, size, deferred):
    """Dropout on, float64: one, two and three encoders; chunks of 1, of a divisor, not dividing, above the batch."""
    encoders = [Encoder().double() for _ in range(count)]
    inputs = [texts(7, longest, seed=longest) for longest in (4, 9, 6)[:count]]
    loss_fn = contrast if count > 1 else lambda each: contrast(each, (each[0].flip(1), each[1].flip(1)))
    expected = of_whole_batch(encoders, inputs, [size] * count, loss_fn)
    assert all(gradient.abs().max() > 0 for gradient in expected[1])
    cache = GradCache(encoders, loss_fn, size)
    check(of_step(cache, encoders, inputs, deferred), expected)


@pytest.mark.parametrize("deferred", [False, True], ids=["step", "backward"])
def test_one_encoder_for_queries_and_documents(deferred):
    encode = Encoder().double()
    inputs = [texts(5, 4, seed=1), texts(8, 9, seed=2)]
    expected = of_whole_batch([encode, encode], inputs, [2, 3])
    check(of_step(GradCache(encode, contrast, [2, 3]), [encode, encode], inputs, deferred), expected)


def test_dropout_is_on():
    """Without the random states the gradients are others."""
    encode = Encoder().double()
    inputs = [texts(5, 4, seed=1), texts(5, 9, seed=2)]
    cache = GradCache(encode, contrast, 2)
    first, second = (of_step(cache, [encode], inputs) for _ in range(2))
    check(first, second)
    torch.manual_seed(8)
    encode.zero_grad()
    assert cache.step(*inputs) != first[0]


def test_random_numbers_go_on_after_the_first_pass():
    """The next step draws new dropout; the replay itself draws nothing."""
    encode = Encoder()
    batch = texts(4, 5, seed=1)
    torch.manual_seed(3)
    with torch.no_grad():
        for start in (0, 2):
            encode(**rows(batch, start, start + 2))
    after = torch.rand(3)
    torch.manual_seed(3)
    GradCache(encode, lambda each: each[0].square().sum(), 2).step(batch)
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_chunks_of_unequal_lengths(size):
    """Every chunk is padded to its own longest text."""
    encode = Encoder().double()
    encoders = [trimmed(encode), trimmed(encode)]
    inputs = [texts(5, 6, seed=1), texts(5, 11, seed=2)]
    assert len({int(row.sum()) for row in inputs[1]["attention_mask"]}) > 1
    torch.manual_seed(7)
    loss = contrast(*(whole(*each, size) for each in zip(encoders, inputs, strict=True)))
    loss.backward()
    expected = loss.detach(), gradients(encode)
    encode.zero_grad()
    torch.manual_seed(7)
    found = GradCache(encoders, contrast, size).step(*inputs)
    check((found, gradients(encode)), expected)


def test_documents_of_their_queries():
    """Embeddings [n, K, L, d]: what lies between the rows and the tokens stays."""
    encode = Encoder().double()

    def candidates(input_ids, attention_mask):
        tokens, mask = encode(input_ids=input_ids.flatten(0, 1), attention_mask=attention_mask.flatten(0, 1))
        longest = int(attention_mask.sum(-1).max())
        shape = input_ids.shape[:2]
        return tokens.unflatten(0, shape)[:, :, :longest], mask.unflatten(0, shape)[:, :, :longest]

    documents = {name: value.unflatten(0, (5, 3)) for name, value in texts(15, 9, seed=2).items()}
    inputs = [texts(5, 4, seed=1), documents]
    small, large = (
        of_step(GradCache([encode.eval(), candidates], contrast, size), [encode], inputs) for size in (2, 50)
    )
    check(small, large)


def test_gradients_accumulate():
    encode = Encoder().double().eval()
    inputs = [texts(5, 4, seed=1), texts(5, 9, seed=2)]
    cache = GradCache(encode, contrast, 2)
    cache.step(*inputs)
    once = gradients(encode)
    cache.step(*inputs)
    for twice, one in zip(gradients(encode), once, strict=True):
        torch.testing.assert_close(twice, 2 * one, **EXACT)


def test_parameters_without_gradient():
    encode, frozen = Encoder().double(), Encoder().double().requires_grad_(False)
    encode.embed.requires_grad_(False)
    inputs = [texts(5, 4, seed=1), texts(5, 9, seed=2)]
    expected = of_whole_batch([encode, frozen], inputs, [2, 2])
    found = of_step(GradCache([encode, frozen], contrast, 2), [encode, frozen], inputs)
    assert encode.embed.weight.grad is None
    assert all(p.grad is None for p in frozen.parameters())
    for ours, wanted in zip(found[1], expected[1], strict=True):
        assert (ours is None) == (wanted is None)
        if ours is not None:
            torch.testing.assert_close(ours, wanted, **EXACT)


def test_parameters_of_the_loss():
    encode = Encoder().double()
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    inputs = [texts(5, 4, seed=1), texts(5, 9, seed=2)]
    loss_fn = partial(contrast, temperature=temperature)
    expected = of_whole_batch([encode, encode], inputs, [2, 2], loss_fn)
    wanted, temperature.grad = temperature.grad, None
    check(of_step(GradCache(encode, loss_fn, 2), [encode, encode], inputs), expected)
    torch.testing.assert_close(temperature.grad, wanted, **EXACT)


def test_options_reach_the_loss():
    encode = Encoder().double()
    inputs = [texts(5, 4, seed=1), texts(5, 9, seed=2)]
    cache = GradCache(encode, contrast, 2)
    cold, warm = (of_step(cache, [encode], inputs, temperature=t) for t in (0.05, 1.0))
    assert cold[0] != warm[0]


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("deferred", [False, True], ids=["step", "backward"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_inside_the_encoder(checkpointing, deferred):
    encode = Encoder(checkpointing=checkpointing).double()
    plain = Encoder().double()
    plain.load_state_dict(encode.state_dict())
    inputs = [texts(5, 4, seed=1), texts(5, 9, seed=2)]
    expected = of_whole_batch([plain, plain], inputs, [2, 2])
    check(of_step(GradCache(encode, contrast, 2), [encode, encode], inputs, deferred), expected)


class Casting(nn.Module):
    """An encoder that enters autocast by itself."""

    def __init__(self, encode, **autocast):
        super().__init__()
        self.encode, self.autocast = encode, autocast

    def forward(self, **batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, **self.autocast):
            return self.encode(**batch)


@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("deferred", [False, True], ids=["step", "backward"])
def test_autocast(where, deferred):
    """Weights cast by the pass without a graph, which autocast caches, must not reach the pass with one."""
    encode = Encoder()
    inputs = [texts(6, 4, seed=1), texts(6, 9, seed=2)]
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    if where == "around":
        around, model, uncached = autocast, encode, encode
    else:
        around, model, uncached = contextlib.nullcontext, Casting(encode), Casting(encode, cache_enabled=False)
    # Without its cache, as with it the gradients of a weight are summed over the chunks in bfloat16.
    expecting = partial(autocast, cache_enabled=False) if where == "around" else around
    expected = of_whole_batch([uncached, uncached], inputs, [2, 2], autocast=expecting)
    assert expected[0] != of_whole_batch([encode, encode], inputs, [2, 2])[0]

    encode.zero_grad()
    torch.manual_seed(7)
    cache = GradCache(model, contrast, 2)
    if deferred:
        with around():
            loss = cache(*inputs)
        # As a trainer does, outside; the replay is under autocast all the same.
        loss.backward()
    else:
        with around():
            loss = cache.step(*inputs)
    found = gradients(encode, encode)
    assert all(g is not None and g.dtype == torch.float32 for g in found)
    check((loss.detach(), found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_scaler(enabled):
    encode = Encoder()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    inputs = [texts(6, 4, seed=1), texts(6, 9, seed=2)]
    expected = of_whole_batch([encode, encode], inputs, [2, 2], scale=1024.0 if enabled else 1.0)
    found = of_step(GradCache(encode, contrast, 2, scaler=scaler), [encode, encode], inputs)
    check(found, expected, rtol=1e-5, atol=1e-5)

    optimizer = torch.optim.SGD(encode.parameters(), 0.1)
    before = [p.detach().clone() for p in encode.parameters()]
    scaler.step(optimizer)
    scaler.update()
    unscaled = [g / (1024.0 if enabled else 1.0) for g in expected[1]]
    for parameter, old, gradient in zip(encode.parameters(), before, unscaled, strict=False):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * gradient, rtol=1e-5, atol=1e-6)


def test_grad_scaler_skips_an_infinite_loss():
    encode = Encoder()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batch = texts(4, 5, seed=1)
    loss = GradCache(encode, lambda each: each[0].sum() * torch.inf, 2, scaler=scaler).step(batch)
    assert not loss.isfinite()
    before = encode.head.weight.detach().clone()
    scaler.step(torch.optim.SGD(encode.parameters(), 0.1))
    scaler.update()
    assert torch.equal(encode.head.weight, before)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("deferred", [False, True], ids=["step", "backward"])
def test_the_loss_is_scaled_before_gradients_are_narrowed(deferred):
    """A gradient of 1e-9 is 0 in float16, unless the factor comes first."""
    weight = nn.Parameter(torch.ones(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    cache = GradCache(lambda x: (x * weight).half(), lambda y: 1e-9 * y.float().sum(), 2, scaler=scaler)
    X = torch.ones(6, 1, 4)
    if deferred:
        scaler.scale(cache(X)).backward()
    else:
        cache.step(X)
    torch.testing.assert_close(weight.grad, torch.full((4,), 6e-9 * 2**16), rtol=2e-3, atol=0)


def test_one_chunk_of_activations_at_a_time():
    """What autograd saved for a chunk is gone before the next is encoded; the first pass saves nothing."""

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    saved, at_start = weakref.WeakSet(), []

    def keep(tensor):
        each = Saved(tensor)
        saved.add(each)
        return each

    encode = Encoder()

    def watched(**batch):
        at_start.append(len(saved))
        return encode(**batch)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each.tensor):
        GradCache(watched, contrast, 2).step(texts(6, 4, seed=1), texts(6, 9, seed=2))
    assert at_start == [0] * 12


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_touches_no_gradient(bad):
    encode = Encoder()
    temperature = nn.Parameter(torch.tensor(bad))
    batch = texts(4, 5, seed=1)
    cache = GradCache(encode, lambda each: each[0].sum() * temperature, 2)
    with pytest.raises(FloatingPointError, match="no gradient"):
        cache.step(batch)
    assert gradients(encode) == [None] * len(list(encode.parameters()))
    assert temperature.grad is None


def test_evaluation_without_gradients():
    encode = Encoder().eval()
    inputs = [texts(5, 4, seed=1), texts(5, 9, seed=2)]
    cache = GradCache(encode, contrast, 2)
    with torch.no_grad():
        loss = cache(*inputs)
        assert not loss.requires_grad
        # A step has gradients by definition.
        assert torch.equal(cache.step(*inputs), loss)
    assert all(g is not None for g in gradients(encode))


def test_backward_takes_a_factor_and_runs_once():
    encode = Encoder().double().eval()
    inputs = [texts(5, 4, seed=1), texts(5, 9, seed=2)]
    cache = GradCache(encode, contrast, 2)
    cache.step(*inputs)
    once = gradients(encode)
    encode.zero_grad()
    loss = cache(*inputs)
    (3 * loss).backward(retain_graph=True)
    for thrice, one in zip(gradients(encode), once, strict=True):
        torch.testing.assert_close(thrice, 3 * one, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_inputs_of_every_kind():
    """Mappings with constants, lists of texts, plain tensors, numpy arrays."""
    encode = Encoder().double().eval()
    batch = texts(5, 6, seed=1)
    seen = []

    def from_mapping(input_ids, attention_mask, names, task, limit):
        seen.append((len(input_ids), names, task, limit))
        return encode(torch.as_tensor(input_ids), attention_mask)

    def from_list(sentences):
        ids = torch.tensor([[len(word) for word in sentence.split()] for sentence in sentences])
        return encode(ids, torch.ones_like(ids))

    def from_tensor(ids):
        return encode(ids, torch.ones_like(ids))

    inputs = [
        {**batch, "input_ids": batch["input_ids"].numpy(), "names": list("abcde"), "task": "search", "limit": None},
        ["a bb ccc", "dd e f", "g hhh i"],
        batch["input_ids"],
    ]
    total = GradCache(
        [from_mapping, from_list, from_tensor], lambda *all: sum(e[m].square().mul(m.sum()).sum() for e, m in all), 2
    ).step(*inputs)
    assert total > 0
    assert seen[:3] == [(2, ["a", "b"], "search", None), (2, ["c", "d"], "search", None), (1, ["e"], "search", None)]
    assert seen[3:] == seen[:3]
    assert isinstance(inputs[0]["input_ids"], np.ndarray)


def test_a_tensor_alone():
    """encode may return a tensor, and loss_fn then gets one."""
    weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    X = torch.randn(5, 2, 3, dtype=torch.float64)
    GradCache(lambda x: x @ weight, lambda Y: Y.square().sum(), 2).step(X)
    torch.testing.assert_close(weight.grad, 2 * torch.einsum("nla,nlb->ab", X, X @ weight.detach()))


def test_outputs_that_the_loss_ignores():
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    X = torch.randn(5, 3, 2, dtype=torch.float64)
    GradCache(lambda x: (x * weight, x * 2, torch.ones(len(x), 3)), lambda out: out[0].sum(), 2).step(X)
    torch.testing.assert_close(weight.grad, X.sum((0, 1)))


def test_an_encoder_that_mutates_its_input():
    encode = Encoder().double()

    def mutating(**batch):
        output = encode(**batch)
        batch["token_embeddings"] = output[0]
        return output

    batch = texts(4, 5, seed=1)
    GradCache(mutating, lambda each: each[0].sum(), 2).step(batch)
    assert set(batch) == {"input_ids", "attention_mask"}


ERRORS = [
    (TypeError, "encode returned is a dict", {"encode": lambda x: {"token_embeddings": x}}),
    (TypeError, "encode returned is a NoneType", {"encode": lambda x: (x, None)}),
    (TypeError, "encode returned is a NoneType; want a tensor or a tuple", {"encode": lambda x: ()}),
    (ValueError, r"encode returned has shape \[1, 3, 4\]; want one row for each of the chunk's 2", {"encode": lambda x: x[:1]}),
    (ValueError, r"encode returned has shape \[\]", {"encode": lambda x: x.sum()}),
    (TypeError, "loss_fn returned is a float; want a scalar tensor", {"loss_fn": lambda x: 1.0}),
    (ValueError, r"loss_fn returned has shape \[5, 3, 4\]; want a scalar", {"loss_fn": lambda x: x}),
    (ValueError, "a loss without a gradient", {"loss_fn": lambda x: torch.tensor(1.0)}),
    (ValueError, "input 0 is empty", {"inputs": [torch.zeros(0, 3, 4)]}),
    (ValueError, "input 0 is empty", {"inputs": [{"x": torch.zeros(0, 3, 4)}]}),
    (ValueError, "unequal numbers of rows: {'x': 2, 'y': 3}", {"inputs": [{"x": [1, 2], "y": [1, 2, 3]}]}),
    (TypeError, "input 0 is a str without rows", {"inputs": ["text"]}),
    (TypeError, "input 0 is a dict without rows", {"inputs": [{"x": "text"}]}),
    (ValueError, "no input", {"inputs": []}),
    (ValueError, "encode has 2 entries; want 1", {"encode": [torch.sin, torch.cos]}),
    (ValueError, "mini_batch_size has 3 entries; want 1", {"mini_batch_size": [1, 2, 3]}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "given"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_errors(error, message, given):
    given = {"encode": torch.sin, "loss_fn": torch.sum, "mini_batch_size": 2, "inputs": [torch.zeros(5, 3, 4)], **given}
    inputs = given.pop("inputs")
    with pytest.raises(error, match=message):
        GradCache(**given).step(*inputs)


@pytest.mark.parametrize("size", [0, -1, [2, 0]])
def test_chunk_sizes_below_one(size):
    with pytest.raises(ValueError, match=r"mini_batch_size is .*; want at least 1"):
        GradCache(torch.sin, torch.sum, size)


def test_either_a_size_or_a_budget():
    for size in (2.5, "8", [2, 2.5]):
        with pytest.raises(TypeError, match=r"mini_batch_size is a .*; want an integer"):
            GradCache(torch.sin, torch.sum, size)
    for sizes in ({}, {"mini_batch_size": 2, "memory_budget": 1000}):
        with pytest.raises(ValueError, match="one of mini_batch_size and memory_budget"):
            GradCache(torch.sin, torch.sum, **sizes)
    with pytest.raises(ValueError, match="memory_budget is 0"):
        GradCache(torch.sin, torch.sum, memory_budget=0)


def test_lengths_without_a_mask():
    pieces = iter([torch.ones(2, 3, 4), torch.ones(2, 5, 4)])
    with pytest.raises(ValueError, match=r"rows of shapes \[\(3, 4\), \(5, 4\)\] for input 0; .*mask"):
        GradCache(lambda x: next(pieces), torch.sum, 2).step(torch.zeros(4, 1))


@pytest.mark.parametrize("shapes", [[(3, 4), (3, 5)], [(3, 4), (3, 1, 4)]])
def test_chunks_that_do_not_fit_together(shapes):
    pieces = iter([(torch.ones(2, *shape), torch.ones(2, 3)) for shape in shapes])
    with pytest.raises(ValueError, match="encode returned"):
        GradCache(lambda x: next(pieces), lambda out: out[0].sum(), 2).step(torch.zeros(4, 1))


class TestMemoryBudget:
    ROW = 3 * 16 * 4  # bytes of one row's activation

    @staticmethod
    def encode(x):
        # exp saves its result, and nothing else here saves anything.
        return (x + PARAMETER).exp()

    @pytest.mark.parametrize(
        ("rows_in_budget", "num_rows", "size"),
        [(1, 20, 1), (2, 20, 2), (7.9, 20, 4), (8, 20, 8), (1000, 20, 32), (3, 1, 1)],
    )
    def test_largest_power_of_two(self, rows_in_budget, num_rows, size):
        X = torch.zeros(num_rows, 3, 16)
        assert chunk_size_within(int(rows_in_budget * self.ROW), 0, self.encode, X) == size

    def test_one_row_is_too_much(self):
        with pytest.raises(ValueError, match=f"memory_budget is 100 bytes; one row of input 0 takes {self.ROW}"):
            chunk_size_within(100, 0, self.encode, torch.zeros(5, 3, 16))

    def test_weights_do_not_count(self):
        linear = nn.Linear(1000, 4)
        size = chunk_size_within(4 * 1000 * 4, 0, lambda x: linear(x + PARAMETER), torch.zeros(20, 1, 1000))
        assert size == 4

    def test_in_a_step(self):
        encode = Encoder().double()
        inputs = [texts(9, 4, seed=1), texts(9, 9, seed=2)]
        cache = GradCache(encode, contrast, memory_budget=30_000)
        torch.manual_seed(7)
        loss = cache.step(*inputs)
        sizes = cache.mini_batch_size
        assert sizes[0] > sizes[1] >= 1
        found = loss, gradients(encode, encode)
        # Measuring leaves neither gradients nor random states behind.
        check(found, of_whole_batch([encode, encode], inputs, sizes))
        cache.step(*inputs)
        assert cache.mini_batch_size is sizes


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("deferred", [False, True], ids=["step", "backward"])
def test_dropout_on_a_device(deferred):
    """The device's random state is replayed, for inputs there and for inputs that encode moves there."""
    device = torch.accelerator.current_accelerator()
    encode = Encoder().double().to(device)

    def moving(**batch):
        return encode(**{name: value.to(device) for name, value in batch.items()})

    inputs = [texts(5, 4, seed=1), texts(5, 9, seed=2)]
    torch.manual_seed(7)
    loss = contrast(*(whole(moving, batch, 2) for batch in inputs))
    loss.backward()
    expected = loss.detach(), gradients(encode)
    on_device = [{name: value.to(device) for name, value in batch.items()} for batch in inputs]
    for function, given in ((moving, inputs), (encode, on_device)):
        found = of_step(GradCache(function, contrast, 2), [encode], given, deferred)
        check(found, expected, rtol=1e-12, atol=1e-12)
    assert GradCache(encode, contrast, memory_budget=1 << 20).step(*on_device).isfinite()


def test_progress_bar(capfd):
    pytest.importorskip("tqdm")
    encode = Encoder()
    GradCache(encode, lambda each: each[0].sum(), 2, show_progress_bar=True).step(texts(4, 5, seed=1))
    assert "encode input 0" in capfd.readouterr().err
