"""The kernels of the contrastive loss in Triton's interpreter, on tables of scores: run by `test_triton.py`.

Their sums and gradients against those of `contrastive_torch` in float64, as near as twice those in float32 are.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import edgecolbert_kernels as ek
from cases import embeddings
from conftest import INTERPRETED
from edgecolbert_kernels import reference
from edgecolbert_kernels.backends import contrastive_torch
from edgecolbert_kernels.backends.triton import contrastive
from losses import assert_as_near, value_and_gradients
from score_tables import case, run

SIZES = (1, 2, 3, 7, 16, 17, 33, 300)
PAIRS = [*zip(SIZES, SIZES[3:] + SIZES[:3], strict=True), (33, 33), (1, 1), (2, 3)]
NAN, INF = float("nan"), float("inf")


def test_interpreted():
    assert INTERPRETED


def check(problem, scores, limit, size=None, of=0.0):
    """Numbers are as near as PyTorch's; sums are finite where they are."""
    exact, plain = (run(contrastive_torch, problem, scores, limit, dtype) for dtype in (torch.float64, torch.float32))
    found = run(contrastive, problem, scores, limit, size=size)
    assert [each.dtype for each in found] == [each.dtype for each in plain]
    assert [each.shape for each in found[:4]] == [each.shape for each in plain[:4]]
    assert_as_near(found[:3], exact[:3], plain[:3], of=of)
    sums = ((*found[3], *found[4]), (*exact[3], *exact[4]), (*plain[3], *plain[4]))
    for mine, truth, theirs in zip(*sums, strict=True):
        assert_as_near([mine], [truth], [theirs], of=1.0)
    return found


KINDS = (
    "plain",
    "smoothed",
    "smoothing alone, ignored",
    "ignored",
    "several",
    "several, excluded, smoothed",
    "excluded",
    "margin",
    "margin, several, excluded",
    "symmetric",
    "symmetric, ignored, smoothed",
    "symmetric, several, excluded, margin, smoothed",
    "symmetric, nothing left, smoothed",
    "nothing left",
)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind):
    """Whole and by tiles, of which the last is shorter."""
    for number, (num_queries, num_documents) in enumerate(PAIRS):
        if max(num_queries, num_documents) > 100 and kind not in ("plain", KINDS[-3]):
            continue
        problem, scores, limit = case(num_queries, num_documents, kind, (0.3, 0.05)[number % 2], seed=number)
        for size in (None, 150 if num_documents > 100 else 5):
            check(problem, scores, limit, size, of=1 / float(problem.temperature))


def test_several_chunks_of_a_column(monkeypatch):
    """Pieces of the rows, of which some have no candidate in a column."""
    monkeypatch.setattr(contrastive, "FEWEST_ROWS", 16)
    for kind in ("symmetric, smoothed, excluded", "symmetric, several, margin", "plain"):
        problem, scores, limit = case(60, 35, kind, 0.1)
        if problem.exclude is not None:
            problem.exclude[16:40, 3], problem.exclude[:, 4] = True, True
        found = check(problem, scores, limit)
        monkeypatch.setattr(contrastive, "MOST_CHUNKS", 2)
        again = run(contrastive, problem, scores, limit)
        torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-9)
        monkeypatch.undo()
        monkeypatch.setattr(contrastive, "FEWEST_ROWS", 16)


@pytest.mark.parametrize("kind", ["plain", "symmetric", "smoothed, symmetric", "margin"])
def test_negligible_gradients(kind):
    """Those, and only those, at most 2^-25 / Nq of the column's largest and 2^-25 / Nd of the row's hardest negative."""
    problem, scores, limit = case(17, 33, kind, 0.05)
    grad = embeddings(17, seed=9, norm=None)
    exact = run(contrastive_torch, problem, scores, limit, torch.float64, grad=grad)
    _, gradient, _, _, _ = run(contrastive, problem, scores, limit, grad=grad)
    largest, log_sum, negative, _, _ = exact[3]
    share = 0.5 if problem.symmetric else 1.0
    hardest = share * grad.double().abs() * ((negative - largest) / 0.05 - log_sum).exp() / 0.05
    bound = torch.minimum(hardest[:, None] / 33, exact[1].abs().amax(0) / 17) * 2.0**-25
    size = exact[1].abs()
    assert (gradient[size < 0.999 * bound] == 0).all()
    assert (gradient[size > 1.001 * bound] != 0).all()
    if "smoothed" not in kind:
        assert ((gradient == 0) & (size != 0)).sum() > 50


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 1.0, 1e4])
def test_large_scores_and_small_temperatures(temperature):
    for kind in ("plain", "symmetric, smoothed"):
        problem, scores, limit = case(7, 9, kind, temperature)
        check(problem, (scores * 1e4).round(), limit, 4)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("kind", ["plain", "symmetric", "smoothed, ignored", "excluded", "margin"])
def test_special_values(kind, value):
    """The loss is not finite where PyTorch's is not, and gradients are its where those are finite."""
    for row, column in ((1, 1), (2, 5), (4, 0)):
        problem, scores, limit = case(6, 7, kind)
        scores[row, column] = value
        exact = run(contrastive_torch, problem, scores, limit, torch.float64)
        for size in (None, 3):
            found = run(contrastive, problem, scores, limit, size=size)
            for mine, truth in zip(found[:3], exact[:3], strict=True):
                finite = truth.isfinite()
                torch.testing.assert_close(mine.double()[finite], truth[finite], rtol=1e-4, atol=1e-6)
            assert torch.equal(found[0].isfinite(), exact[0].isfinite())


@pytest.mark.parametrize("scale", [1e-8, 1e-30])
def test_small_output_gradients(scale):
    for kind in ("plain", "symmetric, smoothed"):
        problem, scores, limit = case(7, 9, kind, 0.1)
        wanted = run(contrastive, problem, scores, limit, grad=torch.ones(7))
        found = run(contrastive, problem, scores, limit, grad=torch.full((7,), scale))
        for mine, other in zip(found[1:3], wanted[1:3], strict=True):
            smallest = 2.0**-22 * scale * other.abs().max().item()
            torch.testing.assert_close(mine.double(), other.double() * scale, rtol=1e-6, atol=smallest)


def test_sure_of_the_positive():
    """There softmax - 1 would be rounding alone."""
    for kind, gap in itertools.product(("plain", "symmetric"), (3.0, 5.0, 8.0)):
        problem, scores, limit = case(5, 6, kind)
        scores = scores * 0.1 + torch.eye(5, 6) * gap
        exact = run(contrastive_torch, problem, scores, limit, torch.float64)
        found = run(contrastive, problem, scores, limit)
        torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-4, atol=0)


def test_what_nobody_looked_at_is_nan():
    problem, scores, limit = case(5, 7, "plain")
    problem.target[3] = 7
    loss = run(contrastive, problem, scores, limit)[0]
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    for temperature in (0.0, -1.0, NAN):
        wrong = problem._replace(temperature=torch.tensor(temperature), target=torch.arange(5))
        assert run(contrastive, wrong, scores, limit)[0].isnan().all()


def test_dtypes_and_strides():
    """Temperatures of any float dtype, views of any strides, an expanded gradient: the same bits."""
    problem, scores, limit = case(6, 9, "several, excluded, smoothed, symmetric", 0.5)
    grad = torch.ones(6)
    wanted = run(contrastive, problem, scores, limit, grad=grad)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = run(contrastive, problem._replace(temperature=problem.temperature.to(dtype)), scores, limit, grad=grad)
        assert all(map(torch.equal, found, wanted))
    wide = torch.zeros(6, 20)
    wide[:, 4:13] = scores
    strided = problem._replace(
        target=problem.target.T.contiguous().T, exclude=problem.exclude.repeat_interleave(2, 1)[:, ::2]
    )
    found = run(contrastive, strided, wide[:, 4:13], limit, grad=torch.ones(()).expand(6))
    assert all(map(torch.equal, found, wanted))
    problem, scores, limit = case(6, 9, "ignored")
    every_second = problem.target.repeat_interleave(2)[::2]
    found = run(contrastive, problem._replace(target=every_second), scores, limit)
    assert all(map(torch.equal, found, run(contrastive, problem, scores, limit)))


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)], ids=str)
def test_empty(shape):
    for symmetric in (False, True):
        problem, scores, _ = case(*(max(1, n) for n in shape), "smoothed" + ", symmetric" * symmetric)
        problem = problem._replace(Q=problem.Q[: shape[0]], D=problem.D[: shape[1]])
        problem = problem._replace(target=torch.full((shape[0],), -1))
        loss, gradient, slope, rows, _ = run(contrastive, problem, scores[: shape[0], : shape[1]], None)
        assert torch.equal(loss, torch.zeros(shape[0]))
        assert gradient.shape == shape and slope == 0 and rows.shape == (5, shape[0])


def test_exponential_minus_one():
    """Of a positive's logit, through its gradient: to a few roundings, however small, and across the series' end."""
    for logit in (-1e-30, -1e-9, -1e-4, -0.3, -0.999999, -1.000001, -3.0, -80.0):
        # Of one row with one negative: log(sum) is -logit.
        other = math.log(-math.expm1(logit)) - logit
        scores = torch.tensor([[0.0, max(other, -1e4)]])
        problem = case(1, 2, "plain", 1.0)[0]
        exact = run(contrastive_torch, problem, scores, None, torch.float64, grad=torch.ones(1))
        found = run(contrastive, problem, scores, None, grad=torch.ones(1))
        torch.testing.assert_close(found[1].double(), exact[1], rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("regime", [{}, {"save_scores": True, "max_saved_bytes": 0}, {"save_scores": False}], ids=str)
def test_whole_loss(regime, monkeypatch):
    """From tokens to tokens, with nothing of the loss in PyTorch's own operations."""
    monkeypatch.setattr(contrastive_torch, "RowSums", None)
    monkeypatch.setattr(contrastive_torch, "Weights", None)
    Q, D = embeddings(3, 4, 16, seed=1), embeddings(5, 6, 16, seed=2)
    for options in ({"temperature": 0.1}, {"symmetric": True, "margin": 0.9, "label_smoothing": 0.1}):
        exact, plain = (
            value_and_gradients(reference.contrastive_loss, Q, D, dtype=dtype, **options)
            for dtype in (torch.float64, torch.float32)
        )
        with ek.backend("triton"):
            found = value_and_gradients(ek.contrastive_loss, Q, D, **options, **regime)
        assert_as_near(found, exact, plain)
