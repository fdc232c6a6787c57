"""The contrastive loss against float64 autograd on the reference: every option, instruction set and way to remember."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgecolbert_kernels as ek
from cases import STORAGES, embeddings, grid, holes, padded, ragged, storage_name
from conftest import ON_GPU, examples
from edgecolbert_kernels import reference
from edgecolbert_kernels.backends import contrastive_torch, cpu
from edgecolbert_kernels.ops import contrastive, tiles
from losses import assert_as_near, assert_same, leaf, value_and_gradients
from marks import inductor

OP = torch.ops.edgecolbert
REGIMES = {
    "kept": {},
    "scores kept": {"save_scores": True, "max_saved_bytes": 0},
    "recomputed": {"save_scores": False},
}
NQ, ND, LQ, LD, DIM = 5, 8, 6, 9, 16


@pytest.fixture(params=REGIMES)
def regime(request):
    return REGIMES[request.param]


@pytest.fixture
def small_tiles(monkeypatch):
    """Three documents a tile, so that a handful of documents is several tiles and a shorter one."""
    monkeypatch.setattr(tiles, "ARGMAX_BYTES", 1)
    monkeypatch.setattr(tiles, "SCORES", 1)
    monkeypatch.setattr(tiles, "FEWEST_DOCUMENTS", 3)


def table(*entries):
    positive = torch.zeros(NQ, ND, dtype=torch.bool)
    positive[tuple(zip(*entries, strict=True))] = True
    return positive


OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.01},
    "cool": {"temperature": 0.05, "label_smoothing": 0.1},
    "warm": {"temperature": 30.0},
    "smoothed": {"label_smoothing": 0.3},
    "smoothing alone": {"label_smoothing": 1.0},
    "symmetric": {"symmetric": True, "temperature": 0.5},
    "symmetric and smoothed": {"symmetric": True, "label_smoothing": 0.2},
    "symmetric and cold": {"symmetric": True, "temperature": 0.01},
    "target": {"target": torch.tensor([7, 0, 0, 3, 1])},
    "ignored": {"target": torch.tensor([2, -1, 4, -100, 7], dtype=torch.int32)},
    "ignored, symmetric": {"target": torch.tensor([2, -1, 4, -100, 2]), "symmetric": True, "label_smoothing": 0.1},
    "all ignored": {"target": torch.full((NQ,), -1)},
    "several": {"target": table((0, 1), (0, 5), (1, 5), (3, 0), (3, 1), (3, 7), (4, 2))},
    "several, symmetric": {"target": table((0, 1), (0, 5), (1, 5), (3, 0), (4, 2)), "symmetric": True},
    "excluded": {"exclude": holes(NQ, ND, seed=5, keep=0.4)},
    "excluded, symmetric": {"exclude": holes(NQ, ND, seed=6, keep=0.8), "symmetric": True, "label_smoothing": 0.1},
    "all excluded": {"exclude": torch.ones(NQ, ND, dtype=torch.bool), "label_smoothing": 0.1, "symmetric": True},
    "margin": {"margin": 0.95, "temperature": 0.2},
    "margin, symmetric": {"margin": 0.8, "symmetric": True, "label_smoothing": 0.1, "exclude": holes(NQ, ND, seed=7)},
    "margin, several": {"margin": 0.9, "target": table((0, 1), (0, 5), (1, 5), (3, 0), (4, 2))},
    "weighted": {"weight": torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])},
    "weighted, ignored": {"weight": torch.tensor([0.5, 2.0, 1, 1, 3]), "target": torch.tensor([2, -1, 4, -1, 7])},
    "weights of both signs": {"weight": torch.tensor([1.0, -2, 3, -1, 1]), "symmetric": True, "label_smoothing": 0.1},
    "sum": {"reduction": "sum", "temperature": 0.1},
    "none": {"reduction": "none", "temperature": 0.1, "weight": torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])},
    "normalize": {"normalize": True, "temperature": 0.1},
    "normalize, symmetric": {"normalize": True, "symmetric": True, "temperature": 0.05},
    "zero": {"mask_mode": "zero", "temperature": 0.2},
    "zero and normalize": {"mask_mode": "zero", "normalize": True, "symmetric": True, "temperature": 0.05},
}


@functools.cache
def problem(dtypes=(torch.float32, torch.float32), masked=True, group=0, scale=1.0):
    """Q, D and masks with holes, of which one query and one document have nothing left."""
    Q = embeddings(NQ, LQ, DIM, seed=1) * scale
    D = embeddings(NQ, group, LD, DIM, seed=2) if group else embeddings(ND, LD, DIM, seed=2)
    q_mask, d_mask = holes(NQ, LQ, seed=3), holes(*D.shape[:-1], seed=4)
    q_mask[2], d_mask[3] = False, False
    return Q.to(dtypes[0]), D.to(dtypes[1]), *((q_mask, d_mask) if masked else (None, None))


@functools.cache
def expected(name, grad_of=None, **case):
    """The reference's answers in float64 and in float32."""
    inputs, options = problem(**case), OPTIONS[name]
    grad = embeddings(NQ, seed=9, norm=None) if options.get("reduction") == "none" else None
    return grad, *(
        value_and_gradients(reference.contrastive_loss, *inputs, dtype=dtype, grad=grad, **options)
        for dtype in (torch.float64, torch.float32)
    )


def check(name, regime, **case):
    grad, exact, plain = expected(name, **case)
    found = value_and_gradients(ek.contrastive_loss, *problem(**case), grad=grad, **OPTIONS[name], **regime)
    Q, D = problem(**case)[:2]
    assert [each.dtype for each in found[1:3]] == [Q.dtype, D.dtype]
    assert_as_near(found, exact, plain, of=0.1 if name == "all excluded" else 0.0)


def test_reference_is_pytorchs_cross_entropy():
    """With one positive a query; symmetric, the mean of both directions, as CLIP has it."""
    Q, D = embeddings(5, 6, 16, seed=1).double(), embeddings(8, 9, 16, seed=2).double()
    scores = reference.maxsim(Q, D)[0] / 0.3
    for target, smoothing in itertools.product(([0, 1, 2, 3, 4], [7, -100, 2, -100, 2]), (0.0, 0.2)):
        target = torch.tensor(target)
        for reduction in ("mean", "sum", "none"):
            wanted = torch.nn.functional.cross_entropy(scores, target, reduction=reduction, label_smoothing=smoothing)
            options = {"temperature": 0.3, "label_smoothing": smoothing, "reduction": reduction}
            torch.testing.assert_close(reference.contrastive_loss(Q, D, target=target, **options), wanted)
    square, target = scores[:, :5], torch.arange(5)
    both = [torch.nn.functional.cross_entropy(x, target, label_smoothing=0.1) for x in (square, square.T)]
    found = reference.contrastive_loss(Q, D[:5], temperature=0.3, symmetric=True, label_smoothing=0.1)
    torch.testing.assert_close(found, sum(both) / 2)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(engine, regime, small_tiles, name):
    check(name, regime)


@pytest.mark.parametrize(
    "dtypes", [*itertools.product(STORAGES, repeat=2)], ids=lambda pair: "-".join(map(storage_name, pair))
)
def test_storages(engine, regime, small_tiles, dtypes):
    for name in ("cool", "normalize, symmetric"):
        check(name, regime, dtypes=dtypes)


@pytest.mark.parametrize("other", [torch.float64, *STORAGES], ids=storage_name)
def test_float64(regime, small_tiles, other):
    """Beside any dtype, the arithmetic and the loss are float64."""
    for name in OPTIONS:
        for dtypes in ((torch.float64, other), (other, torch.float64)):
            inputs, (grad, exact, _) = problem(dtypes=dtypes), expected(name, dtypes=dtypes)
            found = value_and_gradients(ek.contrastive_loss, *inputs, grad=grad, **OPTIONS[name], **regime)
            assert found[0].dtype == torch.float64
            for mine, truth in zip(found, exact, strict=True):
                rounding = torch.finfo(mine.dtype).eps
                smallest = 2.0**-25 if mine.dtype == torch.float16 else 1e-14 + 1e-11 * truth.abs().max().item()
                torch.testing.assert_close(mine.double(), truth, rtol=rounding, atol=smallest, msg=name)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_combinations(backend, sweep, small_tiles, masked):
    """Options at random, all at once: what one does must not depend on another."""
    generator = torch.Generator().manual_seed(3)

    def choose(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    targets = (None, *(OPTIONS[name]["target"] for name in ("target", "ignored", "several")))
    trials = range(120)
    taken = set(sweep(trials))
    for trial in trials:
        options = {
            "target": choose(*targets),
            "temperature": choose(1.0, 0.02, 0.3),
            "label_smoothing": choose(0.0, 0.0, 0.1, 0.7),
            "symmetric": choose(False, True),
            "weight": choose(None, None, torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])),
            "exclude": choose(None, holes(NQ, ND, seed=trial, keep=0.3)),
            "margin": choose(None, None, 0.95, 0.5, 0.0),
            "reduction": choose("mean", "sum", "none"),
            "normalize": choose(False, True),
            "mask_mode": choose("exclude", "zero"),
        }
        if trial not in taken:
            continue
        inputs = problem(masked=masked)
        grad = embeddings(NQ, seed=trial, norm=None) if options["reduction"] == "none" else None
        exact, plain = (
            value_and_gradients(reference.contrastive_loss, *inputs, dtype=dtype, grad=grad, **options)
            for dtype in (torch.float64, torch.float32)
        )
        for regime in REGIMES.values():
            found = value_and_gradients(ek.contrastive_loss, *inputs, grad=grad, **options, **regime)
            # A margin may leave the positive alone, and then nothing but roundings of the softmax.
            assert_as_near(found, exact, plain, of=0.5 / options["temperature"])


@pytest.mark.parametrize("name", ["plain", "cold", "symmetric and smoothed", "normalize", "zero"])
def test_own_documents(engine, regime, small_tiles, name):
    """`[Nq, K, Ld, d]`: all are candidates of every query, the first of each its positive."""
    check(name, regime, group=3)
    check(name, regime, group=1)


def test_target_among_own_documents(engine, regime, small_tiles):
    """Document k of query i has the number i K + k."""
    target = torch.tensor([1, 5, 6, 11, 14])
    inputs = problem(group=3)
    found = value_and_gradients(ek.contrastive_loss, *inputs, target=target, **regime)
    Q, D, q_mask, d_mask = inputs
    flat = value_and_gradients(
        ek.contrastive_loss, Q, D.flatten(0, 1), q_mask, d_mask.flatten(0, 1), target=target, **regime
    )
    for mine, other in zip(found, flat, strict=True):
        assert torch.equal(mine.flatten(), other.flatten())


def test_margin_below_zero(engine, regime, small_tiles):
    """A fraction of a positive below 0 would keep it among its own false negatives: the limit moves down from it."""
    Q, D = embeddings(NQ, LQ, DIM, seed=1), embeddings(ND, LD, DIM, seed=2)
    Q[..., 0], D[..., 0] = Q[..., 0] + 2, 0.3 * D[..., 0] - 2
    scores = reference.maxsim(Q, D)[0]
    dropped = (scores >= 1.01 * scores.diagonal()[:, None]).sum() - NQ
    assert scores.max() < 0
    assert 5 < dropped < NQ * ND - 2 * NQ
    for name in ("plain", "cool", "symmetric and smoothed"):
        options = {**OPTIONS[name], "margin": 0.99}
        exact, plain = (
            value_and_gradients(reference.contrastive_loss, Q, D, dtype=dtype, **options)
            for dtype in (torch.float64, torch.float32)
        )
        found = value_and_gradients(ek.contrastive_loss, Q, D, **options, **regime)
        assert_as_near(found, exact, plain, of=0.5 / options.get("temperature", 1.0))


@pytest.mark.parametrize("with_masks", [False, True], ids=["no masks", "masks"])
def test_lists(engine, regime, small_tiles, with_masks):
    """Ragged lists, some empty, are their padded tensors; gradients reach every entry."""
    Q, D = ragged((4, 0, 7, 2), DIM, seed=1), ragged((5, 9, 1, 0, 12, 3), DIM, seed=2)
    q_masks, d_masks = ([holes(len(x), seed=5 + n) for n, x in enumerate(X)] for X in (Q, D))
    if with_masks:
        q_masks[0] = d_masks[1] = None
    leaves = [leaf(x) for x in (*Q, *D)]
    given = (leaves[:4], leaves[4:], *((q_masks, d_masks) if with_masks else ()))
    value = ek.contrastive_loss(*given, temperature=0.3, symmetric=True, **regime)
    found = torch.autograd.grad(value, leaves)

    sides = []
    for X, masks in ((Q, q_masks), (D, d_masks)):
        rows, exists = padded(X, fill=0.0)
        if with_masks:
            for n, mask in enumerate(masks):
                exists[n, : len(X[n])] &= True if mask is None else mask
        sides.append((leaf(rows, torch.float64), exists))
    (Q64, q_mask), (D64, d_mask) = sides
    truth = reference.contrastive_loss(Q64, D64, q_mask, d_mask, temperature=0.3, symmetric=True)
    truth.backward()
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=0)
    exact = [row[: len(x)] for X, rows in ((Q, Q64), (D, D64)) for x, row in zip(X, rows.grad, strict=True)]
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-6)


def test_empty_list_beside_a_tensor():
    """It takes d from the other side."""
    D = embeddings(3, 4, 8, seed=1).requires_grad_()
    value = ek.contrastive_loss([], D)
    value.backward()
    assert value == 0
    assert (D.grad == 0).all()
    target = torch.full((3,), -1)
    assert ek.contrastive_loss(D, [], target=target) == 0


def test_regimes_agree(engine, small_tiles):
    """The loss is the same bits, however the backward is prepared; so are the documents' gradients, and without a graph."""
    for name in ("plain", "cold", "symmetric and smoothed", "margin, symmetric", "several, symmetric"):
        kept, *others = (
            value_and_gradients(ek.contrastive_loss, *problem(), **OPTIONS[name], **regime)
            for regime in REGIMES.values()
        )
        for other in others:
            torch.testing.assert_close(other, kept, rtol=2e-6, atol=1e-7)
        with torch.no_grad():
            value = ek.contrastive_loss(*problem(), **OPTIONS[name])
        torch.testing.assert_close(value, kept[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 0.01, 0.02, 1.0, 100.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_large_scores_and_small_temperatures(engine, regime, small_tiles, temperature, symmetric):
    """Scores of 10^4 over any temperature: the exact scores of a grid, so that only the loss can err."""
    Q, D = grid(6, 8, 16, seed=1) * 512, grid(7, 9, 16, seed=2) * 64
    assert reference.maxsim(Q, D)[0].abs().max() > 10_000
    for target in (None, reference.maxsim(Q, D)[0].argmax(1)):
        options = {"temperature": temperature, "symmetric": symmetric, "target": target}
        exact, plain = (
            value_and_gradients(reference.contrastive_loss, Q, D, dtype=dtype, **options)
            for dtype in (torch.float64, torch.float32)
        )
        found = value_and_gradients(ek.contrastive_loss, Q, D, **options, **regime)
        assert all(each.isfinite().all() for each in found)
        assert_as_near(found, exact, plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["query", "document", "ignored query"])
def test_special_values_spoil_what_they_must(engine, regime, small_tiles, where, value):
    """The loss is not finite exactly where PyTorch's is not, and neither is any gradient that is finite there."""
    Q, D, q_mask, d_mask = problem()
    Q, D, q_mask, d_mask = Q.clone(), D.clone(), q_mask.clone(), d_mask.clone()
    q_mask[1, 2], d_mask[5, 4] = True, True
    (D[5, 4] if where == "document" else Q[1, 2])[3] = value
    target = torch.tensor([0, -1, 2, 3, 4]) if where == "ignored query" else None
    for symmetric in (False, True):
        options = {"symmetric": symmetric, "reduction": "none", "target": target, "temperature": 0.5}
        exact = value_and_gradients(reference.contrastive_loss, Q, D, q_mask, d_mask, dtype=torch.float64, **options)
        found = value_and_gradients(ek.contrastive_loss, Q, D, q_mask, d_mask, **options, **regime)
        torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-6, equal_nan=True)
        for mine, truth in zip(found[1:], exact[1:], strict=True):
            finite = truth.isfinite()
            torch.testing.assert_close(mine.double()[finite], truth[finite], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_masked_values_spoil_nothing(engine, regime, small_tiles, value):
    Q, D, q_mask, d_mask = problem()
    loud_Q, loud_D = Q.clone(), D.clone()
    loud_Q[~q_mask], loud_D[~d_mask] = value, value
    for name in ("plain", "cold", "symmetric", "normalize, symmetric", "zero", "zero and normalize"):
        wanted = value_and_gradients(ek.contrastive_loss, Q, D, q_mask, d_mask, **OPTIONS[name], **regime)
        found = value_and_gradients(ek.contrastive_loss, loud_Q, loud_D, q_mask, d_mask, **OPTIONS[name], **regime)
        assert_same(found, wanted, engine, name)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_gradient_that_is_not_finite_stays_with_its_query(regime, small_tiles, bad):
    """Of one query's loss: what does not depend on it keeps its gradient."""
    Q, D = embeddings(NQ, LQ, DIM, seed=1), embeddings(ND, LD, DIM, seed=2)
    grad = torch.ones(NQ)
    grad[1] = bad
    options = {"symmetric": True, "reduction": "none", "temperature": 0.5}
    exact = value_and_gradients(reference.contrastive_loss, Q, D, dtype=torch.float64, grad=grad, **options)
    found = value_and_gradients(ek.contrastive_loss, Q, D, grad=grad, **options, **regime)
    for mine, truth in zip(found[1:], exact[1:], strict=True):
        finite = truth.isfinite()
        torch.testing.assert_close(mine.double()[finite], truth[finite], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("scale", [1e-8, 2.0**-30, 1e-30])
def test_small_output_gradients(engine, regime, small_tiles, scale, temperature):
    """Loss scaling loses nothing: the gradients are those of 1, scaled."""
    for name in ("plain", "symmetric and smoothed", "weighted"):
        options = {**OPTIONS[name], "temperature": temperature, **regime}
        wanted = value_and_gradients(ek.contrastive_loss, *problem(), **options)
        found = value_and_gradients(ek.contrastive_loss, *problem(), grad=torch.tensor(scale), **options)
        for mine, other in zip(found[1:], wanted[1:], strict=True):
            largest = other.abs().max().item()
            other = other.double() * torch.tensor(scale).double()
            torch.testing.assert_close(mine.double(), other, rtol=1e-6, atol=2.0**-22 * scale * largest)


def score_gradients(monkeypatch, problem_, grad, skip):
    """The gradient of every score in float32, with what is negligible skipped, or with nothing skipped."""
    loss, state = tiles.forward(problem_, tiles.Plan(False, True), tiles.setting(problem_))
    weights = contrastive_torch.Weights(
        grad.expand(loss.shape), problem_, state.rows, state.columns, torch.float32, False
    )
    if not skip:
        weights.rounding, weights.negligible = -1.0, -torch.ones_like(weights.negligible)
    return weights.of(state.scores, slice(0, problem_.D.shape[0]))


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.3])
@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True}, {"label_smoothing": 0.1}, {"margin": 0.9}, {"symmetric": True, "signs": True}],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_skipped_pairs_cannot_matter(monkeypatch, temperature, options):
    """Together they move any token's gradient by less than 2^-25 of the largest gradient in its row or column, times the
    longest token that those multiply, and times the tokens of a query, all of which may choose one of a document."""
    Nq, Nd = 24, 40
    Q, D = embeddings(Nq, 8, 16, seed=1), embeddings(Nd, 9, 16, seed=2)
    D[:Nq, :8] = (Q + 0.3 * embeddings(Nq, 8, 16, seed=3)) * embeddings(Nq, 1, 1, seed=4).abs()
    problem_ = tiles.Problem(
        *(Q, D, None, None, torch.arange(Nq), None, torch.tensor(temperature, dtype=torch.float64)),
        *(options.get("label_smoothing", 0.0), options.get("margin"), options.get("symmetric", False)),
        *(False, "exclude"),
    )
    grad = embeddings(Nq, seed=5, norm=None)
    grad = grad if options.get("signs") else grad.abs()
    full, skipped = (score_gradients(monkeypatch, problem_, grad, skip).double() for skip in (False, True))
    assert temperature > 0.05 or "label_smoothing" in options or (skipped == 0).sum() > full.numel() / 2

    leaves = leaf(Q, torch.float64), leaf(D, torch.float64)
    scores = reference.maxsim(*leaves)[0]
    moved = torch.autograd.grad(scores, leaves, full - skipped)
    longest_query, longest_document = Q.double().norm(dim=-1).max(), D.double().norm(dim=-1).max()
    bounds = (full.abs().amax(1) * longest_document, full.abs().amax(0) * longest_query * Q.shape[1])
    for change, bound in zip(moved, bounds, strict=True):
        assert (change.norm(dim=-1) <= 2.0**-25 * bound[:, None]).all()


def test_cold_softmax_takes_the_sparse_path(engine, small_tiles, monkeypatch):
    """Most pairs of a tile are skipped at a small temperature, and are not where it is large."""
    seen = []
    score = tiles._Source.score

    def spy(self, some, pairs=None, with_argmax=False):
        seen.append(None if pairs is None else len(pairs[0]))
        return score(self, some, pairs, with_argmax)

    monkeypatch.setattr(tiles._Source, "score", spy)
    for temperature, sparse in ((0.01, True), (10.0, False)):
        seen.clear()
        value_and_gradients(
            ek.contrastive_loss, *problem(masked=False), temperature=temperature, save_scores=True, max_saved_bytes=0
        )
        # On a GPU the kernels skip them, so no pairs are chosen for them.
        assert any(count is not None and count < 3 * NQ for count in seen) == (sparse and engine not in ON_GPU)


@pytest.mark.parametrize("name", ["plain", "cold", "symmetric and smoothed", "normalize, symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=storage_name)
def test_bits_do_not_depend_on_threads_or_run(backend, regime, threads, name, dtype):
    """More than 2^15 pairs, from where PyTorch splits sums among threads; the temperature's gradient in float64 too."""
    Q, D = embeddings(131, 4, 16, seed=1, dtype=dtype), embeddings(277, 5, 16, seed=2, dtype=dtype)
    options = {**OPTIONS[name], **regime}
    threads(1)
    wanted = value_and_gradients(ek.contrastive_loss, Q, D, **options)
    for count in (1, 2, 4, 2):
        threads(count)
        found = value_and_gradients(ek.contrastive_loss, Q, D, **options)
        assert all(map(torch.equal, found, wanted)), count


def test_gradients_where_wanted(engine, regime, small_tiles):
    """To any one input alone, the same bits; a frozen side gets none."""
    Q, D, q_mask, d_mask = problem()
    options = {**OPTIONS["symmetric and smoothed"], **regime}
    wanted = value_and_gradients(ek.contrastive_loss, Q, D, q_mask, d_mask, **options)[1:]
    for which in range(3):
        inputs = [Q.clone(), D.clone(), torch.tensor(1.0, dtype=torch.float64)]
        inputs[which].requires_grad_()
        ek.contrastive_loss(*inputs[:2], q_mask, d_mask, temperature=inputs[2], **options).backward()
        assert torch.equal(inputs[which].grad, wanted[which])


def test_temperature_as_a_parameter(regime):
    """In any float dtype and as `[1]`; the gradient comes in its own dtype and shape."""
    wanted = value_and_gradients(ek.contrastive_loss, *problem(), temperature=0.5, **regime)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for shape in ((), (1,)):
            temperature = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
            value = ek.contrastive_loss(*problem(), temperature=temperature, **regime)
            value.backward()
            assert torch.equal(value, wanted[0])
            assert (temperature.grad.dtype, temperature.grad.shape) == (dtype, shape)
            assert torch.equal(temperature.grad.reshape(()), wanted[3].to(dtype))


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_same_tensor_and_strides(engine, regime, small_tiles, dtype):
    """Views of any strides; Q is D; masks of any dtype; targets of any integer dtype."""
    X = embeddings(6, 7, DIM, seed=1, dtype=dtype)
    wanted = value_and_gradients(ek.contrastive_loss, X, X.clone(), temperature=0.1, **regime)
    both = X.clone().requires_grad_()
    ek.contrastive_loss(both, both, temperature=0.1, **regime).backward()
    torch.testing.assert_close(both.grad, wanted[1] + wanted[2])
    strided = X.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    found = value_and_gradients(
        ek.contrastive_loss, strided, X.repeat(2, 2, 2)[:6, :7, :DIM], temperature=0.1, **regime
    )
    assert all(map(torch.equal, found, wanted))
    mask = holes(6, 7, seed=2)
    masked = value_and_gradients(ek.contrastive_loss, X, X, mask, mask, **regime)
    for integers in (torch.uint8, torch.int32, torch.float32):
        found = value_and_gradients(ek.contrastive_loss, X, X, mask.to(integers), mask.to(integers), **regime)
        assert all(map(torch.equal, found, masked))
    for integers in (torch.int8, torch.uint8, torch.int16, torch.int32):
        target = torch.arange(6, dtype=integers)
        found = value_and_gradients(ek.contrastive_loss, X, X, mask, mask, target=target, **regime)
        assert all(map(torch.equal, found, masked))


@pytest.mark.parametrize(
    "shape",
    [(0, 0, 3, 4), (0, 5, 3, 4), (3, 0, 3, 4), (3, 5, 0, 4), (3, 5, 3, 0), (3, 5, 0, 0), (1, 1, 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_empty(engine, regime, shape, symmetric):
    """No queries, documents or tokens: a loss, and gradients of zeros."""
    num_queries, num_documents, query_length, length = shape
    Q, D = embeddings(num_queries, query_length, 8, seed=1), embeddings(num_documents, length, 8, seed=2)
    target = torch.full((num_queries,), -1) if not num_documents else None
    options = {"symmetric": symmetric, "label_smoothing": 0.1, "target": target}
    exact = value_and_gradients(reference.contrastive_loss, Q, D, dtype=torch.float64, **options)
    found = value_and_gradients(ek.contrastive_loss, Q, D, **options, **regime)
    assert_as_near(found, exact, exact, of=1.0)


def test_saved_memory(regime):
    """2 bytes a (query token, document) and 4 a pair; or 4 a pair; or some sums."""
    Q, D = (leaf(embeddings(16, tokens, 48, seed=tokens)) for tokens in (32, 45))
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        ek.contrastive_loss(Q, D, symmetric=True, **regime)
    inputs = {Q.data_ptr(), D.data_ptr()}
    extra = sum(t.nbytes for address, t in saved.items() if address not in inputs)
    pairs, sums = 16 * 16, 1024 + 8 * 8 * (16 + 16)
    assert extra <= {(): pairs * 2 * 32 + pairs * 4, (True, 0): pairs * 4, (False,): 0}[tuple(regime.values())] + sums


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, regime, mode, monkeypatch):
    """Nothing is kept, whatever was asked for; the value is the same."""
    Q, D = (leaf(embeddings(NQ, n, DIM, seed=n)) for n in (4, 5))
    wanted = ek.contrastive_loss(Q, D, **regime)
    plans, forward = [], tiles.forward
    monkeypatch.setattr(tiles, "forward", lambda *given: plans.append(given[1]) or forward(*given))
    with mode():
        found = ek.contrastive_loss(Q, D, **regime)
    assert not found.requires_grad
    assert not ek.contrastive_loss(Q.detach(), D.detach(), **regime).requires_grad
    assert plans == [tiles.Plan(False, False)] * 2
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=0)


def op_arguments(name, inputs, regime):
    options = {"label_smoothing": 0.0, "margin": None, "symmetric": False, "normalize": False, "mask_mode": "exclude"}
    given = OPTIONS[name]
    options |= {key: value for key, value in given.items() if key in options}
    temperature = torch.tensor(given.get("temperature", 1.0), dtype=regime.get("dtype", torch.float32))
    target = given.get("target", torch.arange(NQ))
    keep = regime.get("save_scores"), regime.get("max_saved_bytes", 1 << 20)
    return *inputs, target, given.get("exclude"), temperature, *options.values(), *keep


@pytest.mark.parametrize("name", ["plain", "several, symmetric", "margin, symmetric", "normalize, symmetric", "zero"])
def test_opcheck(regime, name):
    """Schema, fakes, autograd and tracing of both ops, temperatures of either dtype."""
    arguments = op_arguments(name, problem(), regime)
    torch.library.opcheck(OP.contrastive_forward.default, arguments)
    with_leaves = tuple(leaf(a) if i in (0, 1, 6) else a for i, a in enumerate(arguments))
    torch.library.opcheck(OP.contrastive_forward.default, with_leaves)
    loss, *state = OP.contrastive_forward(*arguments)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for need in ((True, True, True), (False, True, False), (True, False, True)):
        inputs = (torch.ones_like(loss), *arguments[:-2], *state, *need)
        torch.library.opcheck(OP.contrastive_backward.default, inputs, test_utils=utils)


@pytest.mark.parametrize(
    "name, wrong, error",
    [
        ("grad", lambda x: x[:-1], ValueError),
        ("rows", lambda x: x[:, :-1], ValueError),
        ("rows", torch.Tensor.float, TypeError),
        ("columns", lambda x: x.new_empty(3, 1), ValueError),
        ("scores", lambda x: x[1:], ValueError),
        ("scores", torch.Tensor.half, TypeError),
        ("argmax", lambda x: x[1:], ValueError),
        ("argmax", torch.Tensor.long, TypeError),
        ("argmax", lambda x: x + 100, IndexError),
    ],
)
def test_what_the_backward_op_refuses(name, wrong, error):
    arguments = op_arguments("plain", problem(), {})
    loss, *state = OP.contrastive_forward(*arguments)
    tensors = dict(zip(("grad", "rows", "columns", "scores", "argmax"), (torch.ones_like(loss), *state), strict=True))
    tensors[name] = wrong(tensors[name])
    grad, *state = tensors.values()
    with pytest.raises(error, match=name):
        OP.contrastive_backward(grad, *arguments[:-2], *state, True, True, True)


@pytest.mark.parametrize(
    "name",
    ["plain", "cool", "symmetric and smoothed", "several, symmetric", "excluded, symmetric", "zero and normalize"],
)
def test_gradcheck(regime, small_tiles, name):
    """Numerical differences in float64, to tokens and temperature."""
    Q, D, q_mask, d_mask = problem()
    options = {key: value for key, value in OPTIONS[name].items() if key != "temperature"}

    def function(Q, D, temperature):
        return ek.contrastive_loss(
            Q, D, q_mask, d_mask, temperature=temperature, **{**options, "reduction": "none"}, **regime
        )

    leaves = leaf(Q, torch.float64), leaf(D, torch.float64), leaf(torch.tensor(0.4, dtype=torch.float64))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "margin, symmetric", "several, symmetric", "weighted, ignored"])
def test_compile(backend, regime, name):
    """One graph, forward and backward, the same bits as eager."""
    torch.compiler.reset()
    compiled = torch.compile(ek.contrastive_loss, fullgraph=True, backend="aot_eager")
    wanted = value_and_gradients(ek.contrastive_loss, *problem(), **OPTIONS[name], **regime)
    found = value_and_gradients(compiled, *problem(), **OPTIONS[name], **regime)
    assert all(map(torch.equal, found, wanted))


@inductor
def test_compile_with_inductor():
    """As a model's loss, with a float32 temperature that learns; dynamic sizes do not recompile for ever."""
    torch.compiler.reset()
    projection = torch.nn.Linear(16, 8, bias=False)
    log_temperature = torch.nn.Parameter(torch.tensor(-1.0))

    def loss(x, y, mask, options):
        Q, D = projection(x), projection(y)
        return ek.contrastive_loss(Q, D, None, mask, temperature=log_temperature.exp(), normalize=True, **options)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for options, batch in itertools.product(({}, {"save_scores": False, "symmetric": True}), (3, 4, 6)):
        x, y, mask = embeddings(batch, 5, 16, seed=1), embeddings(batch, 2, 9, 16, seed=2), holes(batch, 2, 9, seed=3)
        results = []
        for function in (loss, compiled):
            projection.zero_grad()
            log_temperature.grad = None
            value = function(x, y, mask, options)
            value.backward()
            results.append((value.detach(), projection.weight.grad.clone(), log_temperature.grad.clone()))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["plain", "several, symmetric", "margin, symmetric", "weighted, ignored"])
def test_plain_tensors_go_past_the_dispatcher(backend, regime, name, monkeypatch):
    """Eager calls run without the op, traced ones by it, to the same bits; saved tensors are checked for changes."""
    called, options = [], {**OPTIONS[name], **regime}
    with monkeypatch.context() as patch:
        for op in ("forward_op", "backward_op"):
            function = getattr(contrastive, op)
            patch.setattr(contrastive, op, lambda *args, op=op, function=function: called.append(op) or function(*args))
        direct = value_and_gradients(ek.contrastive_loss, *problem(), **options)
        assert not called
        patch.setattr(contrastive, "plain", lambda *_: False)
        by_the_op = value_and_gradients(ek.contrastive_loss, *problem(), **options)
    assert called == ["forward_op", "backward_op"]
    assert all(map(torch.equal, direct, by_the_op))
    Q, D = (leaf(x) for x in problem()[:2])
    loss = ek.contrastive_loss(Q, D, **options)
    with torch.no_grad():
        D += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refused_derivatives(backend, regime):
    """Second, forward-mode and functorch derivatives: an error, never a wrong number."""
    Q, D = embeddings(3, 4, 8, seed=1), embeddings(4, 5, 8, seed=2)

    def loss(q, d=D, temperature=1.0):
        return ek.contrastive_loss(q, d, temperature=temperature, **regime)

    leaves = leaf(Q), leaf(torch.tensor(0.5))
    first = torch.autograd.grad(loss(leaves[0], D, leaves[1]), leaves, create_graph=True)
    for each in first:
        with pytest.raises((NotImplementedError, RuntimeError), match=r"second|twice"):
            torch.autograd.grad(each.square().sum(), leaves, retain_graph=True)
    for transform in (
        torch.func.grad(loss),
        torch.vmap(lambda q: loss(Q + q.sum())),
        lambda q: torch.func.vjp(loss, q),
    ):
        with pytest.raises(
            (NotImplementedError, RuntimeError), match=r"contrastive_loss does not run inside torch\.func"
        ):
            transform(Q)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(loss, (Q,), (torch.ones_like(Q),))
    half = torch.tensor(0.5)
    for q, d, t in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
            duals = [
                torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)) if dual else x
                for x, dual in ((Q, q), (D, d), (half, t))
            ]
            loss(*duals)


def test_the_backward_of_another_thread(monkeypatch):
    """As PyTorch runs that of a device: the backend and the progress are those of the forward."""

    def fail(*_):
        raise AssertionError("not the backend of the forward")

    monkeypatch.setattr(cpu, "backward", fail)
    Q, D, seen = leaf(embeddings(3, 4, 8, seed=1)), embeddings(5, 5, 8, seed=2), []
    with ek.backend("torch"), tiles.progress(lambda done, total: seen.append((done, total))):
        loss = ek.contrastive_loss(Q, D)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(loss.backward).result()
    assert Q.grad.abs().sum() > 0 and seen == [(5, 5)] * 2


@pytest.mark.parametrize("masked", [False, True])
def test_padding_of_a_list_is_no_masked_token(regime, masked):
    """Where masked tokens count as zeros: similarities are negative, so that a zero would win."""
    Q, D = leaf(-grid(3, 4, 8, seed=1).abs()), [leaf(grid(n, 8, seed=n).abs()) for n in (2, 9, 1, 0, 5)]
    masks = [torch.arange(len(x)) != 1 for x in D] if masked else None
    loss = ek.contrastive_loss(Q, D, None, masks, mask_mode="zero", **regime)
    wanted = torch.nn.functional.cross_entropy(ek.maxsim(Q, D, None, masks, mask_mode="zero"), torch.arange(3))
    torch.testing.assert_close(loss, wanted)
    for mine, right in zip(*(torch.autograd.grad(x, [Q, *D]) for x in (loss, wanted)), strict=True):
        torch.testing.assert_close(mine, right)


def test_progress():
    """Every tile of both passes reports, up to all documents."""
    Q, D = leaf(embeddings(3, 4, 8, seed=1)), embeddings(70, 5, 8, seed=2)
    seen = []
    with tiles.progress(lambda done, total: seen.append((done, total))), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "SCORES", 1)
        ek.contrastive_loss(Q, D, save_scores=False).backward()
    assert seen == [(16, 70), (32, 70), (48, 70), (64, 70), (70, 70)] * 2


Q3, D3, D4 = torch.zeros(2, 5, 8), torch.zeros(3, 7, 8), torch.zeros(2, 3, 7, 8)
MISTAKES = {
    "Q is None": (lambda: ek.contrastive_loss(None, D3), TypeError, ["Q", "NoneType"]),
    "integers": (lambda: ek.contrastive_loss(Q3, D3.long()), TypeError, ["D", "int64"]),
    "sparse": (lambda: ek.contrastive_loss(Q3.to_sparse(), D3), TypeError, ["Q", "sparse"]),
    "2-D Q": (lambda: ek.contrastive_loss(Q3[0], D3), ValueError, ["Q", "[5, 8]"]),
    "5-D D": (lambda: ek.contrastive_loss(Q3, D4[None]), ValueError, ["D", "[1, 2, 3, 7, 8]"]),
    "dimensions": (lambda: ek.contrastive_loss(Q3, D3[..., :7]), ValueError, ["Q", "D", "[3, 7, 7]"]),
    "batches": (lambda: ek.contrastive_loss(Q3[:1], D4), ValueError, ["D", "[2, 3, 7, 8]"]),
    "no candidates": (lambda: ek.contrastive_loss(Q3, D4[:, :0]), ValueError, ["D", "[0, 7, 8]"]),
    "too few documents": (lambda: ek.contrastive_loss(Q3, D3[:1]), ValueError, ["D", "at least 2"]),
    "q_mask": (lambda: ek.contrastive_loss(Q3, D3, torch.ones(2, 4)), ValueError, ["q_mask", "[2, 4]"]),
    "d_mask": (lambda: ek.contrastive_loss(Q3, D4, None, torch.ones(6, 7)), ValueError, ["d_mask", "[6, 7]"]),
    "list of masks": (lambda: ek.contrastive_loss([*Q3], D3, [None]), ValueError, ["q_mask", "1 entries"]),
    "list of dtypes": (lambda: ek.contrastive_loss([Q3[0], Q3[1].half()], D3), TypeError, ["Q[1]", "float16"]),
    "target beyond": (lambda: ek.contrastive_loss(Q3, D3, target=torch.tensor([0, 3])), IndexError, ["target", "3"]),
    "target of floats": (lambda: ek.contrastive_loss(Q3, D3, target=torch.rand(2)), TypeError, ["target", "float32"]),
    "target too long": (lambda: ek.contrastive_loss(Q3, D3, target=torch.arange(3)), ValueError, ["target", "[3]"]),
    "target table": (
        lambda: ek.contrastive_loss(Q3, D3, target=torch.ones(3, 2).bool()),
        ValueError,
        ["target", "[3, 2]"],
    ),
    "target is a list": (lambda: ek.contrastive_loss(Q3, D3, target=[0, 1]), TypeError, ["target", "list"]),
    "exclude": (
        lambda: ek.contrastive_loss(Q3, D3, exclude=torch.zeros(3, 2).bool()),
        ValueError,
        ["exclude", "[3, 2]"],
    ),
    "weight": (lambda: ek.contrastive_loss(Q3, D3, weight=torch.ones(3)), ValueError, ["weight", "[3]"]),
    "weight is a list": (lambda: ek.contrastive_loss(Q3, D3, weight=[1, 2]), TypeError, ["weight", "list"]),
    "no temperature": (lambda: ek.contrastive_loss(Q3, D3, temperature=0), ValueError, ["temperature", "0"]),
    "temperature below 0": (
        lambda: ek.contrastive_loss(Q3, D3, temperature=torch.tensor(-1.0)),
        ValueError,
        ["temperature", "-1"],
    ),
    "NaN temperature": (lambda: ek.contrastive_loss(Q3, D3, temperature=float("nan")), ValueError, ["temperature"]),
    "temperatures": (
        lambda: ek.contrastive_loss(Q3, D3, temperature=torch.ones(2)),
        ValueError,
        ["temperature", "[2]"],
    ),
    "temperature is text": (lambda: ek.contrastive_loss(Q3, D3, temperature="cold"), TypeError, ["temperature", "str"]),
    "smoothing": (lambda: ek.contrastive_loss(Q3, D3, label_smoothing=1.5), ValueError, ["label_smoothing", "1.5"]),
    "margin": (lambda: ek.contrastive_loss(Q3, D3, margin=float("nan")), ValueError, ["margin", "nan"]),
    "reduction": (lambda: ek.contrastive_loss(Q3, D3, reduction="max"), ValueError, ["reduction", "max"]),
    "mask_mode": (lambda: ek.contrastive_loss(Q3, D3, mask_mode="drop"), ValueError, ["mask_mode", "drop"]),
    "device of D": (lambda: ek.contrastive_loss(Q3, D3.to("meta")), ValueError, ["D", "meta"]),
    "device of target": (
        lambda: ek.contrastive_loss(Q3, D3, target=torch.arange(2, device="meta")),
        ValueError,
        ["target", "meta"],
    ),
    "device of temperature": (
        lambda: ek.contrastive_loss(Q3, D3, temperature=torch.ones((), device="meta")),
        ValueError,
        ["temperature", "meta"],
    ),
    "device of weight": (
        lambda: ek.contrastive_loss(Q3, D3, weight=torch.ones(2, device="meta")),
        ValueError,
        ["weight", "meta"],
    ),
    "device of exclude": (
        lambda: ek.contrastive_loss(Q3, D3, exclude=torch.ones(2, 3, dtype=torch.bool, device="meta")),
        ValueError,
        ["exclude", "meta"],
    ),
}


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
    shape=st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(0, 20), st.integers(0, 30), st.integers(2, 70)),
    dtypes=st.tuples(*[st.sampled_from(STORAGES)] * 2),
    regime=st.sampled_from(tuple(REGIMES)),
    options=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from((0.02, 0.3, 1.0, 7.0)),
            "label_smoothing": st.sampled_from((0.0, 0.1)),
            "symmetric": st.booleans(),
            "normalize": st.booleans(),
            "mask_mode": st.sampled_from(("exclude", "zero")),
        }
    ),
    keep=st.tuples(*[st.sampled_from((0.05, 0.6, 1.0))] * 3),
    seed=st.integers(0, 2**16),
)
def test_odd_shapes(engine, small_tiles, shape, dtypes, regime, options, keep, seed):
    num_queries, more, query_length, length, dim = shape
    num_documents = num_queries + more
    Q = embeddings(num_queries, query_length, dim, seed=seed, dtype=dtypes[0])
    D = embeddings(num_documents, length, dim, seed=seed + 1, dtype=dtypes[1])
    masks = (
        holes(num_queries, query_length, seed=seed, keep=keep[0]),
        holes(num_documents, length, seed=seed, keep=keep[1]),
    )
    options = {**options, "exclude": holes(num_queries, num_documents, seed=seed, keep=1 - keep[2])}
    exact, plain = (
        value_and_gradients(reference.contrastive_loss, Q, D, *masks, dtype=dtype, **options)
        for dtype in (torch.float64, torch.float32)
    )
    found = value_and_gradients(ek.contrastive_loss, Q, D, *masks, **options, **REGIMES[regime])
    assert_as_near(found, exact, plain, of=1 / options["temperature"])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_rows_that_are_sure_of_their_positive_keep_their_gradient(backend, regime, temperature, symmetric):
    """There softmax - 1 is rounding alone in float32: at 0.3 PyTorch's cross-entropy gives gradients of another size."""
    Q = embeddings(16, 8, 48, seed=1)
    D = torch.cat([Q + 0.01 * embeddings(16, 8, 48, seed=2), embeddings(16, 12, 48, seed=3)], 1)
    D = torch.nn.functional.normalize(D, dim=-1)
    options = {"temperature": temperature, "symmetric": symmetric}
    wanted = value_and_gradients(reference.contrastive_loss, Q.double(), D.double(), **options)
    found = value_and_gradients(ek.contrastive_loss, Q, D, **options, **regime)
    for grad, truth in zip(found[1:3], wanted[1:3], strict=True):
        assert (grad - truth).norm() <= 1e-4 * truth.norm()
