"""The losses and GradCache on tensors of a GPU: gradients, no waiting, and memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

import edgecolbert_kernels as ek
from cases import embeddings, holes
from conftest import CUDA, GPU, ON_GPU
from edgecolbert_kernels import losses, reference
from edgecolbert_kernels.backends import contrastive_torch, triton
from losses import assert_as_near, value_and_gradients
from score_tables import case, run

pytestmark = pytest.mark.skipif(not GPU, reason="there is no GPU that the kernels run on")

BACKENDS = {name: module for name, module in ON_GPU.items() if CUDA or name == "triton"}
REGIMES = ({}, {"save_scores": True, "max_saved_bytes": 0}, {"save_scores": False})


def batch(dtype, num_queries=24, num_documents=40, device="cuda"):
    Q, D = embeddings(num_queries, 32, 48, seed=1).to(dtype), embeddings(num_documents, 60, 48, seed=2).to(dtype)
    masks = holes(num_queries, 32, seed=3), holes(num_documents, 60, seed=4)
    return [each.to(device) for each in (Q, D, *masks)]


@pytest.mark.parametrize("regime", REGIMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{"temperature": 0.02}, {"symmetric": True, "margin": 0.95}], ids=str)
def test_contrastive(dtype, options, regime):
    exact, plain = (
        value_and_gradients(reference.contrastive_loss, *batch(dtype, device="cpu"), dtype=each, **options)
        for each in (torch.float64, torch.float32)
    )
    found = value_and_gradients(ek.contrastive_loss, *batch(dtype), **options, **regime)
    assert_as_near([each.cpu() for each in found], exact, plain)


@pytest.mark.parametrize("regime", REGIMES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["rows", "symmetric"])
def test_contrastive_with_every_option(symmetric, regime):
    """Several positives and excluded documents, in tensors; then ignored queries."""
    given = {"symmetric": symmetric, "label_smoothing": 0.1, "temperature": 0.1}
    for tensors in (
        {"target": holes(24, 40, seed=5, keep=0.1), "exclude": holes(24, 40, seed=6, keep=0.3)},
        {"target": torch.where(torch.arange(24) % 3 == 1, -1, torch.arange(24)), "margin": 0.9},
    ):
        exact, plain = (
            value_and_gradients(
                reference.contrastive_loss, *batch(torch.float16, device="cpu"), dtype=each, **given, **tensors
            )
            for each in (torch.float64, torch.float32)
        )
        moved = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in tensors.items()}
        found = value_and_gradients(ek.contrastive_loss, *batch(torch.float16), **given, **moved, **regime)
        assert_as_near([each.cpu() for each in found], exact, plain)


@pytest.mark.parametrize("kind", ["plain", "symmetric, several, excluded, margin, smoothed"])
@pytest.mark.parametrize("shape", [(1000, 5000), (3000, 700), (5, 40_000), (40_000, 5)], ids=str)
def test_sums_and_gradients_of_large_tables(shape, kind):
    """Whole and by tiles, against PyTorch's operations in float64."""
    problem, scores, limit = case(*shape, kind, 0.1)
    problem, scores, limit = tree_map(
        lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, (problem, scores, limit)
    )
    grad = embeddings(shape[0], seed=9, norm=None).cuda()
    exact, plain = (
        [each.cpu() for each in run(contrastive_torch, problem, scores, limit, dtype, grad=grad)[:3]]
        for dtype in (torch.float64, torch.float32)
    )
    for size in (None, 333):
        found = run(triton, problem, scores, limit, size=size, grad=grad)
        assert_as_near([each.cpu() for each in found[:3]], exact, plain)


def test_contrastive_in_a_graph():
    """Captured once, forward and backward; replayed with other values."""
    Q, D, *masks = batch(torch.float16)
    Q.requires_grad_(), D.requires_grad_()

    def step():
        loss = ek.contrastive_loss(Q, D, *masks, temperature=0.1, symmetric=True)
        return loss, *torch.autograd.grad(loss, (Q, D))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        Q.copy_(-Q)
    graph.replay()
    assert all(map(torch.equal, captured, step()))


CANDIDATES = holes(8, 16, seed=6)
CANDIDATES[3] = False
DISTILLED = {
    "kl": {},
    "kl, masked": {"candidate_mask": CANDIDATES, "temperature": 0.5, "scale_by_temperature": True},
    "kl, z-scores": {"student_normalization": "zscore", "teacher_normalization": "zscore", "teacher_temperature": 2.0},
    "kl, raw": {"student_normalization": "none", "weight": torch.arange(8.0)},
    "margins": {"objective": "margin_mse"},
    "margins, masked": {"objective": "margin_mse", "student_normalization": "minmax", "candidate_mask": CANDIDATES},
}


@pytest.fixture(params=BACKENDS)
def fused(request, monkeypatch):
    """A backend of a GPU, whose kernel of the loss must have been asked."""
    module, asked = BACKENDS[request.param], []
    distill = module.distill
    monkeypatch.setattr(module, "distill", lambda *given: asked.append(1) or distill(*given))
    with ek.backend(request.param):
        yield request.param
    assert asked


@pytest.mark.parametrize("count", [1, 7, 16, 33, 300])
@pytest.mark.parametrize("name", DISTILLED)
def test_distillation(fused, name, count):
    Q, D = embeddings(8, 32, 48, seed=1), embeddings(8, count, 40, 48, seed=2)
    teacher = embeddings(8, count, seed=3, norm=None)
    options = dict(DISTILLED[name])
    if "candidate_mask" in options:
        options["candidate_mask"] = CANDIDATES.repeat(1, 19)[:, :count]
    exact, plain = (
        value_and_gradients(reference.distillation_loss, Q, D, teacher, dtype=each, **options)
        for each in (torch.float64, torch.float32)
    )
    moved = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    found = value_and_gradients(ek.distillation_loss, Q.cuda(), D.cuda(), teacher.cuda(), **moved)
    assert_as_near([each.cpu() for each in found], exact, plain, of=0.1)


def test_distillation_of_many_candidates(fused):
    """A program's most, in every dtype of a teacher, and an odd number at odd addresses."""
    backend = BACKENDS[fused]
    for count in (1000, 1025, backend.MOST_CANDIDATES):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            student, teacher = (
                embeddings(3, count, seed=1, norm=None),
                embeddings(3, count, seed=2, norm=None).to(dtype),
            )
            exact = student.double().requires_grad_()
            truth = losses._divergence(
                losses._normalized(exact, None, "minmax"), losses._normalized(teacher.double(), None, "zscore"), None
            )
            derivative = torch.autograd.grad(truth.sum(), exact)[0]
            how = "kl", "minmax", "zscore", False
            found = backend.distill(student.cuda(), teacher.cuda(), None, 1.0, 1.0, how, 1.0, True, False)
            torch.testing.assert_close(found[0].cpu().double(), truth.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[1].cpu().double(), derivative, rtol=1e-4, atol=1e-7)


def test_distillation_in_a_graph(fused):
    """No wait, and no value that the host has looked at."""
    Q, D = embeddings(8, 32, 48, seed=1).cuda().half(), embeddings(8, 16, 40, 48, seed=2).cuda().half()
    teacher, temperature = embeddings(8, 16, seed=3, norm=None).cuda(), torch.tensor(0.5, device="cuda")
    leaves = Q.requires_grad_(), D.requires_grad_(), temperature.requires_grad_()

    def step():
        return torch.autograd.grad(ek.distillation_loss(Q, D, teacher, temperature=temperature), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for seed in (4, 5):
        with torch.no_grad():
            teacher.copy_(embeddings(8, 16, seed=seed, norm=None))
            temperature.fill_(seed / 8)
        graph.replay()
        assert all(map(torch.equal, found, step()))


@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_the_host_does_not_wait(regime):
    Q, D, *masks = batch(torch.float16)
    temperature = torch.full((), 0.05, dtype=torch.float64, device="cuda", requires_grad=True)

    def step():
        q, d = Q.detach().requires_grad_(), D.detach().requires_grad_()
        ek.contrastive_loss(q, d, *masks, temperature=temperature, symmetric=True, margin=0.9, **regime).backward()
        ek.distillation_loss(
            q, D.view(1, 40, 60, 48).expand(24, 40, 60, 48), torch.ones(24, 40, device="cuda")
        ).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_nobody_looked_at_is_nan():
    Q, D, *masks = batch(torch.float16)
    target = torch.arange(24, device="cuda")
    target[3] = 40
    losses = ek.contrastive_loss(Q, D, *masks, target=target, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [3]
    assert ek.contrastive_loss(Q, D, *masks, temperature=torch.zeros((), device="cuda")).isnan()


def test_same_bits_in_every_run():
    found = [value_and_gradients(ek.contrastive_loss, *batch(torch.float16), save_scores=False) for _ in range(3)]
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_gradient_cache_repeats_dropout():
    """Random numbers of the device are drawn again alike in the second pass of a chunk."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(8, 48), torch.nn.Dropout(0.5)).cuda()
    queries, documents = embeddings(6, 4, 8, seed=1).cuda(), embeddings(6, 5, 8, seed=2).cuda()
    seen = []

    def encode(x):
        seen.append(encoder(x))
        return seen[-1]

    ek.GradCache(encode, lambda q, d: ek.contrastive_loss(q, d, temperature=0.5), mini_batch_size=2).step(
        queries, documents
    )
    for first, again in zip(seen[:6], seen[6:], strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(seen[0], encoder(queries[:2]))
