"""NaN, Inf, subnormal and huge values, and ties: what IEEE and the contract say, at every position of every tile."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
import oracle
from cases import STORAGES, embeddings, grid, storage_name
from conftest import INTERPRETED, ON_GPU

NAN, INF = float("nan"), float("inf")


def argmax_of(Q, D, q_mask=None, d_mask=None, precision="exact", mask_mode="exclude"):
    """(scores [Nq, Nd], argmax [Nq, Nd, Lq])"""
    arguments = (q_mask, d_mask, None, None, None, None, False, mask_mode, precision, True)
    scores, argmax = torch.ops.edgecolbert.maxsim_forward(Q, D, *arguments)
    return scores, argmax.reshape(*scores.shape, Q.shape[1])


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_nan_in_a_document(engine, precision, dtype):
    """At every token and a few components: NaN for every query, and only in its own document."""
    for length, dim in ((1, 1), (13, 17), (29, 48)):
        Q, clean = grid(2, 17, dim, seed=1, dtype=dtype), grid(3, length, dim, seed=2, dtype=dtype)
        scores, argmax = argmax_of(Q, clean, precision=precision)
        for token, component in itertools.product(range(length), {0, dim // 2, dim - 1}):
            D = clean.clone()
            D[1, token, component] = NAN
            broken, where = argmax_of(Q, D, precision=precision)
            assert broken[:, 1].isnan().all(), (length, dim, token, component)
            assert torch.equal(broken[:, ::2], scores[:, ::2])
            assert (where[:, 1] == token).all(), "the first NaN is the maximum"
            assert torch.equal(where[:, ::2], argmax[:, ::2])


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_nan_in_a_query(engine, precision, dtype):
    for length, dim in ((1, 1), (7, 16), (17, 17), (33, 48)):
        clean, D = grid(3, length, dim, seed=1, dtype=dtype), grid(2, 13, dim, seed=2, dtype=dtype)
        scores, argmax = argmax_of(clean, D, precision=precision)
        for token, component in itertools.product(range(length), {0, dim // 2, dim - 1}):
            Q = clean.clone()
            Q[1, token, component] = NAN
            broken, where = argmax_of(Q, D, precision=precision)
            assert broken[1].isnan().all(), (length, dim, token, component)
            assert torch.equal(broken[::2], scores[::2])
            assert (where[1, :, token] == 0).all(), "every similarity is NaN, the first one wins"
            others = [i for i in range(length) if i != token]
            assert torch.equal(where[1][:, others], argmax[1][:, others])


def test_the_first_of_several_nans(engine, precision):
    Q, D = grid(1, 5, 16, seed=1), grid(1, 40, 16, seed=2)
    for tokens in ((0, 39), (11, 12), (13, 25), (23, 24), (5, 6, 38)):
        broken = D.clone()
        broken[0, list(tokens), 3] = NAN
        assert (argmax_of(Q, broken, precision=precision)[1] == tokens[0]).all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF])
def test_any_nan(engine, precision, bits):
    """Quiet, signalling, negative, with any payload."""
    Q, D = np.full((3, 5), 0.25, np.float32), np.full((2, 14, 5), 0.25, np.float32)
    D.view(np.uint32)[1, 13, 4] = bits
    scores = ek.maxsim(torch.from_numpy(Q), torch.from_numpy(D), precision=precision)
    assert scores[0] == pytest.approx(3 * 5 / 16, rel=1e-4)
    assert scores[1].isnan()


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.float16, 0x7C01), (torch.float16, 0xFFFF), (torch.bfloat16, 0x7F81), (torch.bfloat16, 0xFFC0)],
)
def test_any_half_nan(engine, precision, dtype, bits):
    """A NaN whose low payload bits are all that tells it from Inf."""
    D = torch.full((2, 14, 5), 0.25, dtype=dtype)
    D.view(torch.uint16)[1, 13, 4] = bits
    scores = ek.maxsim(torch.full((3, 5), 0.25, dtype=dtype), D, precision=precision)
    assert scores[0] == pytest.approx(3 * 5 / 16, rel=1e-4)
    assert scores[1].isnan()


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_infinities(engine, precision, dtype):
    """Inf follows IEEE: it wins or loses the maximum by its sign, Inf * 0 and Inf - Inf are NaN."""
    Q = torch.tensor([[[1.0, 0.5]]], dtype=dtype)
    rows = {
        "wins": ([[0.5, 0.5], [INF, 0.5]], INF, 1),
        "loses": ([[-INF, 0.5], [0.25, 0.5]], 0.5, 1),
        "cancels": ([[0.5, 0.5], [INF, -INF]], NAN, 1),
        "only -inf": ([[-INF, 0.5], [-INF, -INF]], -INF, 0),
        "twice": ([[0.5, INF], [INF, INF]], INF, 0),
    }
    for name, (document, value, winner) in rows.items():
        for padding in (0, 11, 12, 25):  # further copies of the first token cannot win over it
            D = torch.tensor([document + document[:1] * padding], dtype=dtype)
            scores, argmax = argmax_of(Q, D, precision=precision)
            torch.testing.assert_close(scores, torch.tensor([[value]]), equal_nan=True, rtol=1e-4, atol=0, msg=name)
            assert argmax.item() == winner, name
    zero = torch.tensor([[[0.0, 0.5]]], dtype=dtype)
    assert ek.maxsim(zero, torch.tensor([[[INF, 0.5]]], dtype=dtype), precision=precision).isnan().all()


def test_infinite_scores_cancel(engine, precision):
    """One query token at +Inf and one at -Inf: their sum is NaN."""
    Q, D = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[[INF]], [[-INF]], [[0.5]]])
    scores = ek.maxsim(Q, D, precision=precision)
    assert scores[0, :2].isnan().all()
    assert scores[0, 2] == 0


@pytest.mark.parametrize("length", [1, 2, 11, 12, 13, 30])
def test_rows_of_minus_infinity(engine, precision, length):
    """Every similarity is -Inf: the score is, and token 0 is still a winner; masked ones stay out of it."""
    Q, D = torch.ones(1, 3, 5), torch.full((1, length, 5), -INF)
    scores, argmax = argmax_of(Q, D, precision=precision)
    assert scores.item() == -INF
    assert (argmax == 0).all()
    if length > 1:
        mask = torch.ones(1, length, dtype=torch.bool)
        mask[0, 0] = False
        scores, argmax = argmax_of(Q, D, None, mask, precision=precision)
        assert scores.item() == -INF
        assert (argmax == 1).all()
        assert argmax_of(Q, D, None, mask, mask_mode="zero")[0].item() == 0


@pytest.mark.parametrize("length", [1, 12, 13, 30])
def test_most_negative_finite_similarity(engine, precision, length):
    """Lower than any start value but -Inf."""
    lowest = torch.finfo(torch.float32).min
    Q, D = torch.ones(1, 1, 1), torch.full((1, length, 1), lowest)
    scores, argmax = argmax_of(Q, D, precision=precision)
    # Three TF32 products, which is how a GPU multiplies float32 fast, leave out the last bits.
    missing = 2.0**-19 if precision == "fast" and engine in ON_GPU and not INTERPRETED else 0.0
    assert lowest <= scores.item() <= lowest * (1 - missing)
    assert argmax.item() == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_overflow(engine, precision, sign):
    """Products and sums beyond fp32 become Inf of their sign; they do not wrap, saturate or abort."""
    for value, dtype in ((1e30, torch.float32), (2e38, torch.bfloat16), (1e25, torch.bfloat16)):
        Q, D = torch.full((1, 2, 17), value, dtype=dtype), torch.full((2, 13, 17), sign * value, dtype=dtype)
        D[1] = 0
        scores = ek.maxsim(Q, D, precision=precision)
        assert scores.tolist() == [[sign * INF, 0.0]]
    largest = torch.full((1, 2, 17), 65504.0, dtype=torch.float16)
    assert ek.maxsim(largest, sign * largest, precision=precision).item() == pytest.approx(
        sign * 34 * 65504.0**2, rel=1e-6
    )


def test_overflow_of_the_sum(engine):
    """Each maximum is finite, their sum is not."""
    Q, D = torch.full((1, 4, 1), 1.5e19), torch.full((1, 3, 1), 1.5e19)
    assert ek.maxsim(Q, D).item() == INF


@pytest.mark.parametrize("dim", [1, 17, 48])
def test_half_subnormals(engine, precision, dim):
    """fp16 subnormals are ordinary fp32 numbers: nothing may flush them. Fixed point may round them away."""
    tiny = torch.randint(-1023, 1024, (3, 13, dim), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    D = (tiny.abs() + (tiny < 0) * -(2**15)).to(torch.int16).view(torch.float16)
    Q = grid(2, 5, dim, seed=1, dtype=torch.float16, step=1 / 4, largest=4)
    exact = torch.einsum("qid,kjd->qkij", Q.double(), D.double()).amax(3).sum(2)
    assert (exact != 0).any()
    error = (ek.maxsim(Q, D, precision=precision).double() - exact).abs().max()
    assert error <= (0 if precision == "exact" else 5 * dim * 2.0**-15)
    both = ek.maxsim(D[:2], D).double()
    exact = torch.einsum("qid,kjd->qkij", D[:2].double(), D.double()).amax(3).sum(2)
    bound = oracle.bound(D[0].double().numpy(), D[0].double().numpy())
    assert (both - exact).abs().max() <= 4 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=storage_name)
def test_subnormals(engine, precision, dtype):
    """Below 2^-126 the kernels may flush to zero, and nothing else: each element moves by at most that."""
    tiny = 2.0**-126
    Q, D = torch.full((1, 3, 17), 0.5, dtype=dtype), torch.full((2, 13, 17), tiny / 4, dtype=dtype)
    D[1, 7] = 0.5
    scores = ek.maxsim(Q, D, precision=precision)
    assert 0 <= scores[0, 0].item() <= 3 * 17 * tiny
    assert scores[0, 1].item() == pytest.approx(3 * 17 / 4, rel=1e-4)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_floating_point_mode_is_restored(engine, precision, threads, num_threads):
    """Flush-to-zero is the kernels' own business: subnormals live on in the caller and in PyTorch's worker threads."""
    threads(num_threads)
    tiny = torch.full((1 << 20,), 2.0**-130)
    Q, D = embeddings(4, 32, 48, seed=1).requires_grad_(), embeddings(64, 40, 48, seed=2)
    ek.maxsim(Q, D, precision=precision).sum().backward()
    ek.maxsim(Q.detach(), list(D), precision=precision)
    assert (tiny * 0.5 != 0).all()
    assert np.float32(2.0**-130) * np.float32(0.5) != 0


def test_signed_zeros(engine, precision):
    """-0 and +0 tie, so the lower token wins, whichever it is."""
    Q = torch.tensor([[[1.0]]])
    for values in ([0.0, -0.0], [-0.0, 0.0]):
        scores, argmax = argmax_of(Q, torch.tensor(values).reshape(1, 2, 1), precision=precision)
        assert scores.item() == 0
        assert argmax.item() == 0


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_ties_go_to_the_lowest_token(engine, precision, dtype):
    """Copies of the best token at every pair of positions around the tiles: the first one wins, and takes the gradient."""
    for length in (2, 12, 13, 25, 40):
        for first, second in itertools.combinations(
            sorted({0, 1, 11, 12, 13, 23, 24, length - 1} & set(range(length))), 2
        ):
            Q = torch.full((1, 17, 5), 0.25, dtype=dtype).requires_grad_()
            D = torch.zeros(1, length, 5, dtype=dtype)
            D[0, [first, second]] = 0.25
            D.requires_grad_()
            _, argmax = argmax_of(Q.detach(), D.detach(), precision=precision)
            assert (argmax == first).all(), (length, first, second)
            ek.maxsim(Q, D, precision=precision).sum().backward()
            wanted = torch.zeros_like(D)
            wanted[0, first] = 17 * 0.25
            assert torch.equal(D.grad, wanted)


def test_ties_under_masks(engine, precision):
    """Token numbers are the user's: compaction of the kept tokens must not renumber them."""
    Q, D = torch.ones(1, 3, 4), torch.zeros(1, 30, 4)
    D[0, [2, 14, 29]] = 0.5
    for kept, winner in (([2, 14, 29], 2), ([3, 14, 29], 14), ([0, 1, 29], 29), ([5, 9], 5)):
        mask = torch.zeros(1, 30, dtype=torch.bool)
        mask[0, kept] = True
        assert (argmax_of(Q, D, None, mask, precision=precision)[1] == winner).all()


def test_fast_near_ties(engine):
    """Tokens apart by less than a step of fixed point may swap in argmax, never by more than the step in score."""
    Q, D = embeddings(1, 32, 48, seed=1), embeddings(1, 1, 48, seed=2).repeat(1, 200, 1)
    D += torch.randn(D.shape, generator=torch.Generator().manual_seed(3)) * 1e-6
    scores, argmax = argmax_of(Q, D, precision="fast")
    similarity = torch.einsum("id,jd->ij", Q[0].double(), D[0].double())
    picked = similarity[torch.arange(32), argmax[0, 0].long()]
    assert (similarity.amax(1) - picked).max() <= 2 * 48 * 2.0**-16
    assert abs(scores.item() - similarity.amax(1).sum()) <= 5e-4


def test_nan_gradient_goes_to_the_nan_token(engine):
    Q, D = grid(1, 2, 4, seed=1).requires_grad_(), grid(1, 14, 4, seed=2)
    D[0, [9, 13], 1] = NAN
    D.requires_grad_()
    scores = ek.maxsim(Q, D)
    scores.sum().backward()
    assert scores.isnan().all()
    assert torch.equal(D.grad[0].abs().sum(1) != 0, torch.arange(14) == 9)
    assert torch.equal(D.grad[0, 9], Q.detach().sum((0, 1)))
    assert Q.grad.isnan()[..., 1].all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_special_output_gradient(engine, value):
    """A NaN or Inf of the loss reaches the tokens of its own pair, no other document."""
    Q, D = (grid(2, 3, 4, seed=1) + 1).requires_grad_(), (grid(2, 14, 4, seed=2) + 1).requires_grad_()
    grad = torch.ones(2, 2)
    grad[0, 1] = value
    ek.maxsim(Q, D).backward(grad)
    assert D.grad[0].isfinite().all()
    assert Q.grad[1].isfinite().all()
    assert not D.grad[1].isfinite().all()
    assert not Q.grad[0].isfinite().all()


def test_normalize_special_rows(engine, precision):
    """NaN stays NaN, a row of zeros scores 0, tiny rows are normalised, rows below 1e-12 are divided by 1e-12."""
    Q = torch.eye(4)[None] * 3
    D = torch.zeros(5, 13, 4)
    D[0, :, 0] = 2.0
    D[1] = 0
    D[2, :, 1] = 1e-10
    D[3, :, 2] = 5e-13
    D[4, 12, 3] = NAN
    scores = ek.maxsim(Q, D, normalize=True, precision=precision)[0]
    tolerance = 1e-6 if precision == "exact" else 5e-4
    assert scores[:4].tolist() == pytest.approx([1, 0, 1, 0.5], abs=tolerance)
    assert scores[4].isnan()
