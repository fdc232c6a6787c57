"""The kernel of the distillation loss in Triton's interpreter, against PyTorch in float64: run by `test_triton.py`."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import edgecolbert_kernels as ek
from cases import embeddings, holes
from conftest import INTERPRETED
from edgecolbert_kernels import losses
from edgecolbert_kernels.backends import triton as triton_backend
from losses import leaf, value_and_gradients
from oracle import UNIT_ROUNDOFF

NAN, INF = float("nan"), float("inf")
HOW = tuple(
    (objective, *how)
    for objective in losses.OBJECTIVES
    for how in itertools.product(losses.NORMALIZATIONS, losses.NORMALIZATIONS)
)


@pytest.fixture(autouse=True)
def chosen():
    assert INTERPRETED
    with ek.backend("triton"):
        yield


def in_pytorch(student, teacher, kept, temperature, teacher_temperature, how, squared, dtype):
    """Losses, and the derivatives to the scores and to the temperature, by autograd in `dtype`."""
    objective, student_normalization, teacher_normalization = how
    student, temperature = leaf(student, dtype), leaf(torch.as_tensor(temperature), dtype)
    of_student = losses._normalized(student, kept, student_normalization)
    of_teacher = losses._normalized(teacher.to(dtype), kept, teacher_normalization)
    if objective == "margin_mse":
        found = losses._margin_error(of_student, of_teacher, kept)
        return found.detach(), torch.autograd.grad(found.sum(), student)[0], None
    # One temperature a query, so that each has its derivative.
    each = temperature.expand(len(student), 1)
    found = losses._divergence(of_student / each, of_teacher / torch.as_tensor(teacher_temperature, dtype=dtype), kept)
    found = found * each[:, 0] ** 2 if squared else found
    derivative, slope = torch.autograd.grad(found.sum(), (student, each))
    return found.detach(), derivative, slope[:, 0]


def check(student, teacher, kept, temperature, teacher_temperature, how, squared=False, factor=1.0):
    """As near to float64 as twice PyTorch in float32, and some roundings of what was added up, query by query."""
    squared = squared and how[0] == "kl"
    given = student, teacher, kept, temperature, teacher_temperature
    slope = how[0] == "kl" and isinstance(temperature, torch.Tensor)
    found = triton_backend.distill(*given, (*how, squared), factor, True, slope)
    exact, plain = (in_pytorch(*given, how, squared, dtype) for dtype in (torch.float64, torch.float32))
    every = torch.ones_like(student, dtype=torch.bool) if kept is None else kept
    scale = torch.ones(len(student), dtype=torch.float64)
    if how[1] != "none":
        for n, row in enumerate(every):
            x = student[n, row].double()
            if len(x):
                scale[n] = (x.std(correction=0) if how[1] == "zscore" else x.max() - x.min()) + losses.SMALLEST_RANGE
    warmth = float(temperature) if how[0] == "kl" else 1.0
    sizes = 1 / warmth, 1 / (warmth * scale), 1 / warmth**2
    for name, mine, truth, theirs, size in zip(("loss", "scores", "slope"), found, exact, plain, sizes, strict=True):
        if mine is None:
            continue
        assert mine.dtype is torch.float32
        assert mine.isfinite().all(), name
        rows = [x.double().reshape(len(student), -1) for x in (mine / factor, truth, theirs)]
        largest = torch.maximum(rows[1].abs().amax(1), torch.as_tensor(size))
        allowed = 2 * (rows[2] - rows[1]).abs().amax(1) + 32 * UNIT_ROUNDOFF["float32"] * largest
        if name == "loss" and how[0] == "kl":  # the difference of two entropies, each up to log(count)
            allowed += 4 * UNIT_ROUNDOFF["float32"] * every.sum(1).clamp(min=1).log().double()
        assert ((rows[0] - rows[1]).abs() <= allowed[:, None]).all(), (name, how, rows[0], rows[1])
    assert found[1] is not None and (found[1][~every] == 0).all()
    assert (found[0][~every.any(1)] == 0).all()


def scores(count, seed, coarse=False, num_queries=3):
    """Of queries; coarse ones tie at the extremes, and those of the last query are all the same."""
    found = 4 * embeddings(num_queries, count, seed=seed, norm=None)
    if coarse:
        found = (found / 2).round().clamp(-1, 1)
        found[-1] = 0.5
    return found


def some_candidates(count, seed):
    """Holes; none left; the positive alone absent."""
    kept = holes(3, count, seed=seed)
    kept[1], kept[2] = False, True
    kept[2, 0] = False
    return kept


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 300])
def test_options(count):
    """Every objective and normalization, with and without a mask, temperatures as numbers and tensors, ties in turns."""
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
    for n, (how, masked) in enumerate(itertools.product(HOW, (False, True))):
        kept = some_candidates(count, n) if masked else None
        dtype = dtypes[n % 4]
        temperature, teacher_temperature = torch.tensor(0.5, dtype=dtype), torch.tensor([2.0], dtype=dtype)
        number = (temperature, 3.0), (0.3, teacher_temperature), (temperature, teacher_temperature), (1.0, 0.7)
        student, teacher = scores(count, n, n % 3 == 0), scores(count, n + 1, n % 5 == 0).to(dtypes[n // 2 % 4])
        check(student, teacher, kept, *number[(n + n // 4) % 4], how, squared=n % 2 == 1, factor=(1.0, 0.125)[n % 2])


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("how", [each for each in HOW if each[0] == "kl" or each[1] != "none"], ids="-".join)
def test_ties(how, masked):
    """Of equal scores; and the first of several extremes has the gradient."""
    kept = some_candidates(9, 1) if masked else None
    check(scores(9, 2, True), scores(9, 3), kept, torch.tensor(0.5), 1.0, how)
    check(torch.ones(3, 9), torch.ones(3, 9), kept, 1.0, 1.0, how)


@pytest.mark.parametrize("how", HOW, ids="-".join)
def test_absent_candidates_are_not_heard(how):
    kept = some_candidates(9, 4)
    given = 0.5, torch.tensor(2.0), (*how, False), 1.0, True, False
    student, teacher = scores(9, 5), scores(9, 6)
    wanted = triton_backend.distill(student, teacher, kept, *given)
    for value in (NAN, INF, -INF, 1e38):
        loud = [torch.where(kept, x, value) for x in (student, teacher)]
        found = triton_backend.distill(*loud, kept, *given)
        assert all(map(torch.equal, found[:2], wanted[:2]))


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("how", HOW, ids="-".join)
def test_what_is_not_finite(how, side):
    """The same NaN and infinities as in PyTorch, and only in that query."""
    for value, kept in itertools.product((NAN, INF, -INF), (None, some_candidates(9, 4))):
        both = [scores(9, 7), scores(9, 8)]
        both[side][0, 4] = value
        if kept is not None:
            kept[0, [0, 4]] = True
        given = *both, kept, torch.tensor(0.5), 1.0
        found = triton_backend.distill(*given, (*how, False), 1.0, True, how[0] == "kl")
        wanted = in_pytorch(*given, how, False, torch.float32)
        for mine, truth in zip(found, wanted, strict=True):
            if mine is not None:
                torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-4, equal_nan=True)


@settings(max_examples=25, deadline=None)
@example(shape=(1, 3), how=("kl", "none", "zscore"), keep=None, scale=1.0, temperature=20.0, seed=1)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70)),
    how=st.sampled_from(HOW),
    keep=st.sampled_from([None, 0.0, 0.2, 0.9]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    temperature=st.sampled_from([0.1, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_odd_shapes(shape, how, keep, scale, temperature, seed):
    student, teacher = (scale * embeddings(*shape, seed=seed + n, norm=None) for n in range(2))
    kept = None if keep is None else holes(*shape, seed=seed, keep=keep)
    check(student, teacher, kept, torch.tensor(temperature), temperature, how)


def problem():
    return embeddings(3, 4, 16, seed=1), embeddings(3, 5, 6, 16, seed=2), scores(5, 3)


@pytest.fixture
def launched(monkeypatch):
    """The shapes that the kernel was asked for."""
    seen, distill = [], triton_backend.distill

    def noted(student, *rest):
        seen.append(tuple(student.shape))
        return distill(student, *rest)

    monkeypatch.setattr(triton_backend, "distill", noted)
    return seen


def compare(launched, teacher, *, times=1, **options):
    """The public function with the kernel and without."""
    Q, D, _ = problem()
    grad = torch.tensor([0.5, 2.0, -1.0]) if options.get("reduction") == "none" else None
    found = value_and_gradients(ek.distillation_loss, Q, D, teacher, grad=grad, **options)
    assert len(launched) == times
    with ek.backend("torch"):
        wanted = value_and_gradients(ek.distillation_loss, Q, D, teacher, grad=grad, **options)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_reductions(launched, reduction, weighted):
    options = {"weight": torch.tensor([0.5, 2.0, 1.0])} if weighted else {}
    compare(launched, problem()[2], reduction=reduction, temperature=0.5, scale_by_temperature=True, **options)


@pytest.mark.parametrize("kind", ["float16", "float64", "bfloat16", "integers", "transposed", "learnt"])
def test_teachers(launched, kind):
    teacher = scores(5, 3, coarse=True)
    if kind == "transposed":
        teacher = teacher.T.contiguous().T
    elif kind == "learnt":
        teacher = leaf(teacher)
    else:
        teacher = teacher.to(torch.int64 if kind == "integers" else getattr(torch, kind))
    compare(launched, teacher)
    with torch.no_grad():
        Q, D, _ = problem()
        assert not ek.distillation_loss(Q, D, teacher).requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_masks(launched, dtype):
    compare(launched, problem()[2], candidate_mask=some_candidates(5, 3).to(dtype))
    compare(
        launched, problem()[2], times=2, candidate_mask=some_candidates(5, 3).T.contiguous().T, objective="margin_mse"
    )


def test_temperatures(launched):
    """Of any dtype, and as `[1]`: the gradient has theirs."""
    Q, D, teacher = problem()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        given = torch.full((1,), 0.5, dtype=dtype, requires_grad=True)
        loss = ek.distillation_loss(Q, D, teacher, temperature=given, teacher_temperature=torch.tensor(2))
        assert not launched  # an integer
        wanted = torch.autograd.grad(loss, given)[0]
        loss = ek.distillation_loss(Q, D, teacher, temperature=given, teacher_temperature=torch.tensor(2.0))
        found = torch.autograd.grad(loss, given)[0]
        assert (found.dtype, found.shape) == (dtype, (1,))
        torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=0)
        assert launched.pop() == (3, 5)


def test_what_pytorch_is_left_with(launched, monkeypatch):
    Q, D, teacher = problem()
    learnt = torch.tensor(2.0, requires_grad=True)
    ek.distillation_loss(Q, D, teacher, teacher_temperature=learnt).backward()
    assert learnt.grad != 0
    monkeypatch.setattr(triton_backend, "MOST_CANDIDATES", 4)
    ek.distillation_loss(Q, D, teacher)
    for empty in (slice(0), slice(None)), (slice(None), slice(0)):
        assert ek.distillation_loss(Q[empty[0]], D[empty], teacher[empty]) == 0
    with ek.backend("torch"):
        ek.distillation_loss(Q.double(), D, teacher)
    assert not launched


def test_second_derivative_is_refused():
    Q, D, teacher = problem()
    temperature = leaf(torch.tensor(0.5))
    for queries in (leaf(Q), Q):
        loss = ek.distillation_loss(queries, D, teacher, temperature=temperature)
        first = torch.autograd.grad(loss, temperature, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="second"):
            torch.autograd.grad(first, temperature)


def test_batched_gradients():
    Q, D, teacher = leaf(problem()[0]), *problem()[1:]
    found = ek.distillation_loss(Q, D, teacher, reduction="none")
    rows = torch.stack([torch.autograd.grad(x, Q, retain_graph=True)[0] for x in found])
    assert torch.allclose(torch.autograd.grad(found, Q, torch.eye(3), is_grads_batched=True)[0], rows, atol=1e-6)
