"""The distillation loss against float64 autograd on the reference, and against the formula of PyLate's."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgecolbert_kernels as ek
from cases import STORAGES, embeddings, grid, holes, ragged, storage_name
from conftest import examples
from edgecolbert_kernels import reference
from losses import assert_as_near, assert_same, leaf, value_and_gradients

NQ, K, LQ, LD, DIM = 4, 5, 6, 9, 16
CANDIDATES = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()

OPTIONS = {
    "plain": {},
    "temperatures": {"temperature": 0.3, "teacher_temperature": 2.0},
    "scaled": {"temperature": 3.0, "scale_by_temperature": True},
    "cold": {"temperature": 0.01},
    "z-scores": {"student_normalization": "zscore", "teacher_normalization": "zscore"},
    "both min-max": {"teacher_normalization": "minmax", "temperature": 0.2},
    "raw": {"student_normalization": "none", "temperature": 0.5},
    "candidates": {"candidate_mask": CANDIDATES},
    "candidates, z-scores": {
        "candidate_mask": CANDIDATES.int(),
        "student_normalization": "zscore",
        "teacher_normalization": "minmax",
    },
    "candidates, weighted": {"candidate_mask": CANDIDATES, "weight": torch.tensor([0.5, 2.0, 1.0, 3.0])},
    "candidates, raw": {"candidate_mask": CANDIDATES, "student_normalization": "none", "reduction": "sum"},
    "weighted": {"weight": torch.tensor([0.5, 2.0, 0.0, 1.0])},
    "none": {"reduction": "none", "temperature": 0.5, "scale_by_temperature": True},
    "normalize": {"normalize": True, "temperature": 0.3},
    "zero": {"mask_mode": "zero", "normalize": True},
    "margins": {"objective": "margin_mse"},
    "margins, candidates": {"objective": "margin_mse", "candidate_mask": CANDIDATES, "reduction": "none"},
    "margins, z-scores": {
        "objective": "margin_mse",
        "student_normalization": "zscore",
        "teacher_normalization": "zscore",
        "candidate_mask": CANDIDATES,
    },
    "margins, min-max": {"objective": "margin_mse", "student_normalization": "minmax", "weight": torch.rand(NQ)},
}


@functools.cache
def problem(q_dtype=torch.float32, d_dtype=torch.float32):
    """Q, D, the teacher's scores, and masks with holes, of which one query and one document have nothing left."""
    Q, D = embeddings(NQ, LQ, DIM, seed=1, dtype=q_dtype), embeddings(NQ, K, LD, DIM, seed=2, dtype=d_dtype)
    q_mask, d_mask = holes(NQ, LQ, seed=3), holes(NQ, K, LD, seed=4)
    d_mask[0, 3] = False
    return Q, D, embeddings(NQ, K, seed=5, norm=None), q_mask, d_mask


@functools.cache
def expected(name, *dtypes):
    grad = embeddings(NQ, seed=9, norm=None) if OPTIONS[name].get("reduction") == "none" else None
    return grad, *(
        value_and_gradients(reference.distillation_loss, *problem(*dtypes), dtype=dtype, grad=grad, **OPTIONS[name])
        for dtype in (torch.float64, torch.float32)
    )


def check(name, *dtypes):
    grad, exact, plain = expected(name, *dtypes)
    found = value_and_gradients(ek.distillation_loss, *problem(*dtypes), grad=grad, **OPTIONS[name])
    assert [each.dtype for each in found[1:3]] == [X.dtype for X in problem(*dtypes)[:2]]
    assert_as_near(found, exact, plain, of=0.1)
    return found


def pylate(scores, teacher):
    """`pylate.losses.Distillation` on scores `[Nq, K]`: min-max, then KLDivLoss, "batchmean", of log-probabilities."""
    lowest, highest = scores.min(-1, keepdim=True)[0], scores.max(-1, keepdim=True)[0]
    scores = (scores - lowest) / (highest - lowest + 1e-8)
    divergence = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    return divergence(scores.log_softmax(-1), teacher.log_softmax(-1))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(engine, name):
    check(name)


@pytest.mark.parametrize(
    "dtypes", [*itertools.product(STORAGES, repeat=2)], ids=lambda pair: "-".join(map(storage_name, pair))
)
def test_storages(engine, dtypes):
    for name in ("plain", "margins, candidates", "zero"):
        check(name, *dtypes)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float64, torch.float16)], ids=str)
def test_float64(dtypes):
    for name in OPTIONS:
        grad, exact, _ = expected(name, *dtypes)
        found = value_and_gradients(ek.distillation_loss, *problem(*dtypes), grad=grad, **OPTIONS[name])
        assert found[0].dtype == torch.float64
        for mine, truth in zip(found, exact, strict=True):
            smallest = 2.0**-25 if mine.dtype == torch.float16 else 1e-12
            torch.testing.assert_close(mine.double(), truth, rtol=torch.finfo(mine.dtype).eps, atol=smallest, msg=name)


def test_defaults_are_pylates(engine):
    """Value and gradients of its formula, here on float64 scores."""
    Q, D, teacher = problem()[:3]
    leaves = leaf(Q, torch.float64), leaf(D, torch.float64)
    truth = pylate(reference.maxsim(*leaves)[0], teacher.double())
    exact = torch.autograd.grad(truth, leaves)
    for function in (ek.distillation_loss, reference.distillation_loss):
        found = value_and_gradients(function, Q, D, teacher)
        for mine, right in zip(found, (truth.detach(), *exact), strict=False):
            torch.testing.assert_close(mine.double(), right, rtol=2e-5, atol=1e-6)


def test_single_candidate(engine):
    """Nothing to tell apart: loss and gradients are 0."""
    Q, D = embeddings(NQ, LQ, DIM, seed=1), embeddings(NQ, 1, LD, DIM, seed=2)
    for name in ("plain", "z-scores", "raw", "margins", "both min-max"):
        found = value_and_gradients(ek.distillation_loss, Q, D, torch.rand(NQ, 1), **OPTIONS[name])
        assert all((each == 0).all() for each in found), name


def test_equal_scores(engine):
    """Of equal student or teacher scores nothing is divided by 0; the gradient is PyLate's."""
    Q = embeddings(NQ, LQ, DIM, seed=1)
    D = embeddings(NQ, 1, LD, DIM, seed=2).expand(NQ, K, LD, DIM)
    teacher = embeddings(NQ, K, seed=5, norm=None)
    for name in ("plain", "z-scores", "raw", "margins, z-scores", "both min-max"):
        for taught in (teacher, torch.ones(NQ, K)):
            options = {key: value for key, value in OPTIONS[name].items() if key != "candidate_mask"}
            exact, plain = (
                value_and_gradients(reference.distillation_loss, Q, D, taught, dtype=dtype, **options)
                for dtype in (torch.float64, torch.float32)
            )
            found = value_and_gradients(ek.distillation_loss, Q, D, taught, **options)
            assert all(each.isfinite().all() for each in found)
            assert_as_near(found[:1], exact[:1], plain[:1], of=1.0)


def test_tied_extremes(engine):
    """Of several largest or smallest scores the first gets the gradient of the range, as in PyLate."""
    Q, D, teacher = problem()[:3]
    D = torch.stack([D[:, 0], Q.repeat(1, 2, 1)[:, :LD], D[:, 2], Q.repeat(1, 2, 1)[:, :LD], D[:, 0]], 1)
    D[:, 2] = 0.5 * D[:, 2] + 0.5 * D[:, 1]
    leaves = leaf(Q, torch.float64), leaf(D, torch.float64)
    scores = reference.maxsim(*leaves)[0]
    assert (scores.argmax(1) == 1).all()
    assert (scores.argmin(1) == 0).all()
    exact = torch.autograd.grad(pylate(scores, teacher.double()), leaves)
    found = value_and_gradients(ek.distillation_loss, Q, D, teacher, candidate_mask=torch.ones(NQ, K))
    for mine, right in zip(found[1:3], exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30], ids=str)
@pytest.mark.parametrize("where", ["teacher", "document", "masked tokens"])
def test_absent_candidates_count_for_nothing(engine, where, value):
    """Whatever their scores and tokens: the same bits."""
    Q, D, teacher, q_mask, d_mask = problem()
    loud = [Q.clone(), D.clone(), teacher.clone(), q_mask, d_mask]
    if where == "teacher":
        loud[2][~CANDIDATES] = value
    elif where == "document":
        loud[1][~CANDIDATES] = value
    else:
        loud[0][~q_mask], loud[1][~d_mask] = value, value
    for name in ("candidates", "candidates, z-scores", "candidates, raw", "margins, candidates"):
        for mask_mode in ("exclude", "zero"):
            options = {**OPTIONS[name], "mask_mode": mask_mode}
            wanted = value_and_gradients(ek.distillation_loss, *problem(), **options)
            found = value_and_gradients(ek.distillation_loss, *loud, **options)
            assert_same(found, wanted, engine, name)


def test_candidates_are_a_smaller_problem(engine):
    """A query with fewer candidates scores as if it had no others."""
    Q, D, teacher, q_mask, d_mask = problem()
    for name in ("candidates", "candidates, z-scores", "margins, z-scores"):
        options = {key: value for key, value in OPTIONS[name].items() if key != "candidate_mask"}
        losses = ek.distillation_loss(
            Q, D, teacher, q_mask, d_mask, candidate_mask=CANDIDATES, reduction="none", **options
        )
        for n, exists in enumerate(CANDIDATES):
            if name.startswith("margins") and not exists[0]:
                assert losses[n] == 0
                continue
            alone = ek.distillation_loss(
                Q[n : n + 1], D[n : n + 1, exists], teacher[n : n + 1, exists], q_mask[n : n + 1],
                d_mask[n : n + 1, exists], **options,
            )  # fmt: skip
            torch.testing.assert_close(losses[n], alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1e4, 1e20, 1e37])
def test_huge_teacher_scores(engine, scale):
    """A teacher that is sure: finite, and near to float64."""
    Q, D, teacher = problem()[:3]
    for name in ("plain", "both min-max", "z-scores"):
        if name == "z-scores" and scale > 1e18:
            continue  # the variance has no float32
        exact, plain = (
            value_and_gradients(reference.distillation_loss, Q, D, teacher * scale, dtype=dtype, **OPTIONS[name])
            for dtype in (torch.float64, torch.float32)
        )
        found = value_and_gradients(ek.distillation_loss, Q, D, teacher * scale, **OPTIONS[name])
        assert all(each.isfinite().all() for each in found)
        assert_as_near(found, exact, plain, of=0.1)


def test_teacher_in_another_dtype(engine):
    Q, D, teacher = problem()[:3]
    wanted = value_and_gradients(ek.distillation_loss, Q, D, teacher.half().float())
    for dtype in (torch.float16, torch.float64):
        found = value_and_gradients(ek.distillation_loss, Q, D, teacher.half().to(dtype))
        assert found[0].dtype == torch.float32
        assert all(map(torch.equal, found, wanted))
    learnt = leaf(teacher)
    ek.distillation_loss(leaf(Q), D, learnt).backward()
    assert learnt.grad is None


def test_temperature_as_a_parameter(engine):
    """In any dtype and as `[1]`; the loss stays float32, the gradient comes in its own dtype."""
    wanted = value_and_gradients(ek.distillation_loss, *problem(), temperature=0.5, scale_by_temperature=True)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in ((), (1,)):
            temperature = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
            value = ek.distillation_loss(*problem(), temperature=temperature, scale_by_temperature=True)
            value.backward()
            assert (value.dtype, value.shape) == (torch.float32, ())
            torch.testing.assert_close(value.detach(), wanted[0])
            assert (temperature.grad.dtype, temperature.grad.shape) == (dtype, shape)
            relative = 2 * torch.finfo(dtype).eps + 1e-5
            torch.testing.assert_close(temperature.grad.reshape(()).double(), wanted[3], rtol=relative, atol=0)


def test_lists(engine):
    """Nq * K ragged documents, the first query's first, are their padded tensor."""
    Q, D = ragged((4, 2, 7), DIM, seed=1), ragged((5, 9, 1, 0, 12, 3), DIM, seed=2)
    teacher = embeddings(3, 2, seed=5, norm=None)
    q_masks, d_masks = ([holes(len(x), seed=5 + n) for n, x in enumerate(X)] for X in (Q, D))
    for masks in ((), (q_masks, d_masks)):
        leaves = [leaf(x) for x in (*Q, *D)]
        losses = ek.distillation_loss(leaves[:3], leaves[3:], teacher, *masks, student_normalization="none")
        found = torch.autograd.grad(losses, leaves)
        plain = [leaf(x, torch.float64) for x in (*Q, *D)]
        scores = [
            reference.score(plain[n // 2], plain[3 + n], *((q_masks[n // 2], d_masks[n]) if masks else ()))[0]
            for n in range(6)
        ]
        log_s, log_t = torch.stack(scores).view(3, 2).log_softmax(1), teacher.double().log_softmax(1)
        truth = (log_t.exp() * (log_t - log_s)).sum() / 3
        torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-7)
        for mine, right in zip(found, torch.autograd.grad(truth, plain), strict=True):
            torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("of", ["kl", "candidates"])
def test_padding_of_a_list_is_no_masked_token(engine, of, masked):
    """Where masked tokens count as zeros: similarities are negative, so that a zero would win."""
    Q, D = -grid(3, 4, DIM, seed=1).abs(), [grid(n, DIM, seed=n).abs() for n in (2, 9, 1, 0, 5, 3)]
    masks = [torch.arange(len(x)) != 1 for x in D] if masked else None
    teacher = embeddings(3, 2, seed=5, norm=None)
    options = {"student_normalization": "none"}
    if of == "candidates":
        options["candidate_mask"] = torch.tensor([[True, True], [True, False], [False, True]])
    leaves = [leaf(x) for x in (*Q, *D)]
    losses = ek.distillation_loss(leaves[:3], leaves[3:], teacher, None, masks, mask_mode="zero", **options)
    found = torch.autograd.grad(losses, leaves)
    plain = [leaf(x) for x in (*Q, *D)]
    kept = [None] * 6 if masks is None else [[each] for each in masks]
    scores = [
        ek.maxsim(plain[n // 2], [plain[3 + n]], None, kept[n], mask_mode="zero", out_dtype=torch.float32)[0]
        for n in range(6)
    ]
    log_s, log_t = torch.stack(scores).view(3, 2), teacher
    if of == "candidates":
        log_s, log_t = (x.masked_fill(~options["candidate_mask"], -1e30) for x in (log_s, log_t))
    log_s, log_t = log_s.log_softmax(1), log_t.log_softmax(1)
    each = log_t.exp() * (log_t - log_s)
    truth = (each.masked_fill(~options["candidate_mask"], 0) if of == "candidates" else each).sum() / 3
    torch.testing.assert_close(losses, truth, rtol=1e-5, atol=1e-6)
    for mine, right in zip(found, torch.autograd.grad(truth, plain, allow_unused=True), strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if right is None else right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (3, 0, 4, 5), (0, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0), (1, 1, 1, 1)], ids=str
)
@pytest.mark.parametrize("name", ["plain", "z-scores", "raw", "margins"])
def test_empty(engine, shape, name):
    """No queries, candidates or tokens: a finite loss, and gradients of zeros."""
    num_queries, count, query_length, length = shape
    Q, D = embeddings(num_queries, query_length, 8, seed=1), embeddings(num_queries, count, length, 8, seed=2)
    teacher = embeddings(num_queries, count, seed=3, norm=None)
    exact = value_and_gradients(reference.distillation_loss, Q, D, teacher, dtype=torch.float64, **OPTIONS[name])
    found = value_and_gradients(ek.distillation_loss, Q, D, teacher, **OPTIONS[name])
    assert found[0].isfinite()
    assert_as_near(found, exact, exact, of=1.0)


@pytest.mark.parametrize("scale", [1e-8, 1e-30])
def test_small_output_gradients(engine, scale):
    for name in ("plain", "candidates, z-scores", "margins"):
        wanted = value_and_gradients(ek.distillation_loss, *problem(), **OPTIONS[name])
        found = value_and_gradients(ek.distillation_loss, *problem(), grad=torch.tensor(scale), **OPTIONS[name])
        for mine, other in zip(found[1:], wanted[1:], strict=True):
            other = other.double() * torch.tensor(scale).double()
            torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=2.0**-20 * other.abs().max().item())


def test_bits_do_not_depend_on_threads_or_run(backend, threads):
    Q, D = embeddings(24, 16, 48, seed=1), embeddings(24, 8, 40, 48, seed=2)
    teacher = embeddings(24, 8, seed=3, norm=None)
    for name in ("plain", "z-scores", "margins"):
        threads(1)
        wanted = value_and_gradients(ek.distillation_loss, Q, D, teacher, **OPTIONS[name])
        for count in (1, 2, 4, 2):
            threads(count)
            found = value_and_gradients(ek.distillation_loss, Q, D, teacher, **OPTIONS[name])
            assert all(map(torch.equal, found, wanted))


def test_saved_memory():
    """2 bytes a (query token, candidate), and some tables of a number a candidate."""
    Q, D = leaf(embeddings(16, 32, 48, seed=1)), leaf(embeddings(16, 8, 45, 48, seed=2))
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        ek.distillation_loss(Q, D, torch.rand(16, 8))
    extra = sum(t.nbytes for address, t in saved.items() if address not in {Q.data_ptr(), D.data_ptr()})
    assert extra <= 16 * 8 * (2 * 32 + 64)


@pytest.mark.parametrize(
    "name", [name for name, options in OPTIONS.items() if options.get("temperature", 1) > 0.1 and "margin" not in name]
)
def test_gradcheck(name):
    Q, D, teacher, q_mask, d_mask = problem()
    options = {key: value for key, value in OPTIONS[name].items() if key not in ("temperature", "teacher_temperature")}

    def function(Q, D, temperature):
        given = {**options, "temperature": temperature, "teacher_temperature": 1.5}
        return ek.distillation_loss(Q, D, teacher, q_mask, d_mask, **given)

    leaves = leaf(Q, torch.float64), leaf(D, torch.float64), leaf(torch.tensor(0.4, dtype=torch.float64))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "candidates, z-scores", "margins, candidates"])
def test_compile(backend, name):
    torch.compiler.reset()
    compiled = torch.compile(ek.distillation_loss, fullgraph=True, backend="aot_eager")
    wanted = value_and_gradients(ek.distillation_loss, *problem(), **OPTIONS[name])
    found = value_and_gradients(compiled, *problem(), **OPTIONS[name])
    torch.testing.assert_close(found, wanted)


def test_a_temperature_of_a_graph_is_not_looked_at():
    torch.compiler.reset()
    compiled = torch.compile(ek.distillation_loss, fullgraph=True, backend="aot_eager")
    Q, D, teacher = problem()[:3]
    for value, finite in ((0.5, True), (0.0, False), (-1.0, False)):
        assert compiled(Q, D, teacher, temperature=torch.tensor(value)).isfinite().item() is finite


@pytest.mark.parametrize("name", ["contrastive", "distillation"])
def test_a_graph_with_another_temperature(name):
    """A number that changes from step to step, which a graph then takes as an argument."""
    torch.compiler.reset()
    Q, D, teacher = problem()[:3]

    def loss(temperature):
        if name == "contrastive":
            return ek.contrastive_loss(Q, D, temperature=temperature)
        return ek.distillation_loss(Q, D, teacher, temperature=temperature)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for temperature in (0.5, 0.25, 0.125):
        torch.testing.assert_close(compiled(temperature), loss(temperature))


def test_compile_with_dynamic_shapes():
    torch.compiler.reset()
    compiled = torch.compile(ek.distillation_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, candidates in ((3, 4), (4, 5), (6, 3)):
        Q, D = embeddings(count, 5, 16, seed=1), embeddings(count, candidates, 9, 16, seed=2)
        teacher, kept = embeddings(count, candidates, seed=3, norm=None), holes(count, candidates, seed=4)
        wanted, found = (
            value_and_gradients(function, Q, D, teacher, candidate_mask=kept)
            for function in (ek.distillation_loss, compiled)
        )
        torch.testing.assert_close(found, wanted)


def test_second_derivative_is_refused(backend):
    Q, D, teacher = problem()[:3]
    Q = leaf(Q)
    first = torch.autograd.grad(ek.distillation_loss(Q, D, teacher), Q, create_graph=True)[0]
    with pytest.raises((NotImplementedError, RuntimeError), match=r"second|twice"):
        first.square().sum().backward()


Q3, D4, T2 = torch.zeros(2, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3)
MISTAKES = {
    "Q is None": (lambda: ek.distillation_loss(None, D4, T2), TypeError, ["Q", "NoneType"]),
    "2-D D": (lambda: ek.distillation_loss(Q3, D4[0, 0], T2), ValueError, ["D", "[7, 8]"]),
    "shared": (lambda: ek.distillation_loss(Q3, D4.flatten(0, 1), T2), ValueError, ["teacher_scores", "[2, 3]"]),
    "batches": (lambda: ek.distillation_loss(Q3[:1], D4, T2), ValueError, ["D", "[2, 3, 7, 8]"]),
    "dimensions": (lambda: ek.distillation_loss(Q3, D4[..., :7], T2), ValueError, ["Q", "D", "[2, 3, 7, 7]"]),
    "teacher": (lambda: ek.distillation_loss(Q3, D4, T2[:, :2]), ValueError, ["teacher_scores", "[2, 2]"]),
    "teacher is a list": (lambda: ek.distillation_loss(Q3, D4, [[0.0] * 3] * 2), TypeError, ["teacher_scores", "list"]),
    "teacher beside a list": (
        lambda: ek.distillation_loss(Q3, [*D4.flatten(0, 1)], T2[0]),
        ValueError,
        ["teacher_scores", "[3]"],
    ),
    "documents": (lambda: ek.distillation_loss(Q3, [*D4[0]], T2), ValueError, ["D", "3 entries"]),
    "device of teacher": (
        lambda: ek.distillation_loss(Q3, D4, T2.to("meta")),
        ValueError,
        ["teacher_scores", "meta"],
    ),
    "candidate_mask": (
        lambda: ek.distillation_loss(Q3, D4, T2, candidate_mask=T2.T),
        ValueError,
        ["candidate_mask", "[3, 2]"],
    ),
    "candidate_mask is a list": (
        lambda: ek.distillation_loss(Q3, D4, T2, candidate_mask=[True]),
        TypeError,
        ["candidate_mask", "list"],
    ),
    "objective": (lambda: ek.distillation_loss(Q3, D4, T2, objective="mse"), ValueError, ["objective", "mse"]),
    "student": (
        lambda: ek.distillation_loss(Q3, D4, T2, student_normalization="max"),
        ValueError,
        ["student_normalization", "max"],
    ),
    "teacher normalization": (
        lambda: ek.distillation_loss(Q3, D4, T2, teacher_normalization=None),
        ValueError,
        ["teacher_normalization", "None"],
    ),
    "no temperature": (lambda: ek.distillation_loss(Q3, D4, T2, temperature=0), ValueError, ["temperature", "0"]),
    "temperatures": (
        lambda: ek.distillation_loss(Q3, D4, T2, temperature=torch.ones(2)),
        ValueError,
        ["temperature", "[2]"],
    ),
    "temperature tensor": (
        lambda: ek.distillation_loss(Q3, D4, T2, temperature=torch.tensor(0.0)),
        ValueError,
        ["temperature", "0.0"],
    ),
    "teacher temperature tensor": (
        lambda: ek.distillation_loss(Q3, D4, T2, teacher_temperature=torch.tensor(-1.0)),
        ValueError,
        ["teacher_temperature", "-1"],
    ),
    "teacher temperature": (
        lambda: ek.distillation_loss(Q3, D4, T2, teacher_temperature=-1.0),
        ValueError,
        ["teacher_temperature", "-1"],
    ),
    "weight": (lambda: ek.distillation_loss(Q3, D4, T2, weight=torch.ones(3)), ValueError, ["weight", "[3]"]),
    "reduction": (lambda: ek.distillation_loss(Q3, D4, T2, reduction="max"), ValueError, ["reduction", "max"]),
    "d_mask": (lambda: ek.distillation_loss(Q3, D4, T2, None, torch.ones(2, 7)), ValueError, ["d_mask", "[2, 7]"]),
    "mask_mode": (lambda: ek.distillation_loss(Q3, D4, T2, mask_mode="drop"), ValueError, ["mask_mode", "drop"]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_candidates_of_every_query(name):
    Q, D, teacher, q_mask, d_mask = problem()
    shared = (Q, D[0], teacher, q_mask, d_mask[0])  # one of which has no token
    grad = embeddings(NQ, seed=9, norm=None) if OPTIONS[name].get("reduction") == "none" else None
    exact, plain = (
        value_and_gradients(reference.distillation_loss, *shared, dtype=dtype, grad=grad, **OPTIONS[name])
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_near(value_and_gradients(ek.distillation_loss, *shared, grad=grad, **OPTIONS[name]), exact, plain, of=0.1)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    call, exception, words = MISTAKES[name]
    with pytest.raises(exception) as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value


@settings(
    max_examples=examples(40),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 20), st.integers(1, 30), st.integers(2, 70)),
    dtypes=st.tuples(*[st.sampled_from(STORAGES)] * 2),
    name=st.sampled_from([name for name in OPTIONS if "candidates" not in name and "weight" not in OPTIONS[name]]),
    keep=st.tuples(*[st.sampled_from((0.2, 0.6, 1.0))] * 3),
    seed=st.integers(0, 2**16),
)
def test_odd_shapes(engine, shape, dtypes, name, keep, seed):
    num_queries, count, query_length, length, dim = shape
    Q = embeddings(num_queries, query_length, dim, seed=seed, dtype=dtypes[0])
    D = embeddings(num_queries, count, length, dim, seed=seed + 1, dtype=dtypes[1])
    teacher = embeddings(num_queries, count, seed=seed + 2, norm=None)
    masks = (
        holes(num_queries, query_length, seed=seed, keep=keep[0]),
        holes(num_queries, count, length, seed=seed, keep=keep[1]),
    )
    options = {
        "reduction": "sum",
        **OPTIONS[name],
        "candidate_mask": holes(num_queries, count, seed=seed, keep=keep[2]),
    }
    grad = torch.ones(num_queries) if options["reduction"] == "none" else None
    scores = reference.maxsim(Q.double(), D.double(), *masks)[0]
    kept = scores.masked_fill(~options["candidate_mask"], torch.nan)
    gaps = (kept[..., None] - kept[:, None]).abs()
    exact, plain = (
        value_and_gradients(reference.distillation_loss, Q, D, teacher, *masks, dtype=dtype, grad=grad, **options)
        for dtype in (torch.float64, torch.float32)
    )
    found = value_and_gradients(ek.distillation_loss, Q, D, teacher, *masks, grad=grad, **options)
    # Scores that all but tie are told apart, and divided by their distance, only by rounding.
    if not ((gaps > 0) & (gaps < 0.1)).any() or options.get("student_normalization") == "none":
        assert_as_near(found, exact, plain, of=10 / options.get("temperature", 1.0))
    else:
        assert all(each.isfinite().all() for each in found)
