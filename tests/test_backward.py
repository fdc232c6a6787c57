"""Gradients of every layout against float64 autograd, and the bits that must not depend on threads, run or batch."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch.nn.functional import normalize

import edgecolbert_kernels as ek
import oracle
from cases import DIMENSIONS, STORAGES, embeddings, grid, holes, storage_name
from layouts import LAYOUTS, flat, gradients, in_batch


@functools.cache
def exact_gradients(layout, dim, q_dtype, d_dtype, make, masked, normalize=False, mask_mode="exclude", scale_Q=1):
    """A layout's case, the gradient of its scores, the float64 gradients of its leaves and their terms' magnitudes."""
    case = LAYOUTS[layout](dim, q_dtype, d_dtype, make=make, masked=masked)
    case.Q = [q * scale_Q for q in case.Q] if isinstance(case.Q, list) else case.Q * scale_Q
    grad = output_gradient(case.shape) if make is grid else embeddings(*case.shape, seed=6, norm=None)
    wanted = gradients(case.expected, *case.leaves(torch.float64), grad, normalize=normalize, mask_mode=mask_mode)
    return case, grad, wanted, magnitudes(case, grad, normalize, mask_mode)


def output_gradient(shape, seed=5, step=1 / 8):
    """A grid as well, signed and with zeros, so that sums of its products stay exact."""
    return grid(*shape, seed=seed, step=step) if shape else torch.tensor(step)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grid_gradients(engine, sweep, layout, mask_mode, masked):
    """On a grid every sum is exact in fp32, so each gradient is the float64 one after a single rounding to its dtype."""
    storages = (STORAGES[0], STORAGES[0]), (STORAGES[1], STORAGES[1]), (STORAGES[2], STORAGES[1])
    for dim, (q_dtype, d_dtype) in sweep(itertools.product((1, 7, 16, 33, 48, 129), storages)):
        case, grad, wanted, _ = exact_gradients(layout, dim, q_dtype, d_dtype, grid, masked, mask_mode=mask_mode)
        found = gradients(case, *case.leaves(), grad, mask_mode=mask_mode)
        for leaf, mine, exact in zip((*flat(case.Q), *flat(case.D)), found, wanted, strict=True):
            assert mine.dtype == leaf.dtype
            assert torch.equal(mine, exact.to(leaf.dtype)), (dim, q_dtype, d_dtype)


def magnitudes(case, grad, normalized, mask_mode="exclude"):
    """The sums of the absolute values of each gradient's terms: what its rounding errors are relative to."""
    argmaxes = case.choices(normalize=normalized, mask_mode=mask_mode)
    unit = (lambda t: normalize(t, dim=-1)) if normalized else (lambda t: t)
    leaves = [t.detach().double().abs() for t in (*flat(case.Q), *flat(case.D))]
    rows = [unit(t).requires_grad_() for t in leaves]
    Q = rows[: len(case.Q)] if isinstance(case.Q, list) else rows[0]
    D = rows[len(flat(case.Q)) :] if isinstance(case.D, list) else rows[-1]
    scores = [(Q[q][a >= 0] * D[d][a[a >= 0]]).sum() for (q, d, _, _), a in zip(case.pairs, argmaxes, strict=True)]
    found = torch.autograd.grad(torch.stack(scores), rows, grad.double().abs().reshape(-1), materialize_grads=True)
    if not normalized:
        return found
    # The Jacobian is (g - x (x . g)) / |row| with x the unit row.
    return [
        (g + x * (x * g).sum(-1, keepdim=True)) / leaf.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        for g, x, leaf in zip(found, rows, leaves, strict=True)
    ]


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_rounding(engine, sweep, layout, dtype, normalized):
    """fp32 accumulation of at most n terms and one rounding to the dtype, element by element."""
    # A unit row of one dimension is +-1: every similarity ties.
    for dim in sweep(DIMENSIONS[1:] if normalized else DIMENSIONS):
        arguments = (layout, dim, dtype, dtype, embeddings, True, normalized)
        case, grad, wanted, sizes = exact_gradients(*arguments, scale_Q=3)
        found = gradients(case, *case.leaves(), grad, normalize=normalized)
        n = (len(case.pairs) * 40 + 4 * dim + 16) * oracle.UNIT_ROUNDOFF["float32"]
        for mine, exact, size in zip(found, wanted, sizes, strict=True):
            allowed = n * size + oracle.UNIT_ROUNDOFF[storage_name(dtype)] * (exact.abs() + n * size) + 2.0**-25
            assert mine.dtype == dtype
            assert ((mine.double() - exact).abs() <= allowed).all(), dim


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_worse_than_pytorch(engine, layout):
    """Against the same layout in eager PyTorch at fp32: at most twice its error, and one rounding."""
    case = LAYOUTS[layout](48, torch.float32, torch.float32)
    grad = embeddings(*case.shape, seed=6, norm=None)
    for normalized in (False, True):
        exact = gradients(case.expected, *case.leaves(torch.float64), grad, normalize=normalized)
        eager = gradients(case.expected, *case.leaves(), grad, normalize=normalized)
        found = gradients(case, *case.leaves(), grad, normalize=normalized)
        for mine, theirs, truth in zip(found, eager, exact, strict=True):
            if truth.numel():
                allowed = 2 * (theirs - truth).abs().max() + 2 * oracle.UNIT_ROUNDOFF["float32"] * truth.abs().max()
                assert (mine - truth).abs().max() <= allowed


@pytest.mark.parametrize("scale", [1e-6, 1e-7, 1e-8, 1e-20, 1e-30])
@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_small_gradients(engine, dtype, scale):
    """The gradient of the scores stays fp32: at 1e-8 an fp16 copy of it would be zero."""
    case = in_batch(48, dtype, torch.float32, num_queries=3, num_documents=4)
    grad = embeddings(*case.shape, seed=6, norm=None)
    Q, D = case.leaves()
    grad_D = gradients(case, Q, D, grad * scale)[1]
    exact = gradients(case.expected, *case.leaves(torch.float64), (grad * scale).double())[1]
    n = (3 * 11 + 2) * oracle.UNIT_ROUNDOFF["float32"]
    size = magnitudes(case, grad * scale, False)[1]
    assert ((grad_D - exact).abs() <= 2 * n * size).all()
    assert (grad_D[exact != 0] != 0).all()


@pytest.mark.parametrize("want", ["queries", "documents"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_to_one_side(engine, layout, want):
    """A frozen side gets no gradient and changes nothing for the other."""
    case = LAYOUTS[layout](17, torch.float32, torch.float32, make=grid)
    grad = output_gradient(case.shape)
    both = gradients(case, *case.leaves(), grad)
    Q, D = case.leaves()
    frozen = D if want == "queries" else Q
    for leaf in flat(frozen):
        leaf.requires_grad_(False)
    case(Q, D).backward(grad)
    count = len(flat(Q))
    moving, expected = (flat(Q), both[:count]) if want == "queries" else (flat(D), both[count:])
    assert all(leaf.grad is None for leaf in flat(frozen))
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(moving, expected, strict=True))


def test_non_contiguous_output_gradient(engine):
    """Autograd hands over expanded and transposed gradients; sum() gives one of stride 0."""
    case = in_batch(16, torch.float32, torch.float32, make=grid)
    base = output_gradient(case.shape[::-1])
    expected = gradients(case, *case.leaves(), base.t().contiguous())
    assert all(map(torch.equal, gradients(case, *case.leaves(), base.t()), expected))
    ones = gradients(case, *case.leaves(), torch.ones(case.shape))
    assert all(map(torch.equal, gradients(case, *case.leaves(), torch.ones(()).expand(case.shape)), ones))
    Q, D = case.leaves()
    case(Q, D).sum().backward()
    assert torch.equal(Q.grad, ones[0])
    assert torch.equal(D.grad, ones[1])


def test_gradient_through_views(engine):
    """Leaves behind a transpose and a slice: the gradient has the view's shape whatever the strides of the input."""
    base = grid(16, 5, 3, seed=1).requires_grad_()
    D = grid(9, 26, 16, seed=2)[::2, 1::2].requires_grad_()
    scores = ek.maxsim(base.permute(2, 1, 0), D)
    scores.backward(output_gradient(scores.shape))
    plain_Q, plain_D = (
        base.detach().permute(2, 1, 0).contiguous().requires_grad_(),
        D.detach().contiguous().requires_grad_(),
    )
    ek.maxsim(plain_Q, plain_D).backward(output_gradient(scores.shape))
    assert torch.equal(base.grad, plain_Q.grad.permute(2, 1, 0))
    assert torch.equal(D.grad, plain_D.grad)


def test_same_tensor_on_both_sides(engine):
    """Q is D: both gradients meet in one leaf."""
    X = grid(4, 13, 16, seed=3).requires_grad_()
    grad = output_gradient((4, 4))
    ek.maxsim(X, X).backward(grad)
    Q, D = (X.detach().clone().requires_grad_() for _ in range(2))
    ek.maxsim(Q, D).backward(grad)
    assert torch.equal(X.grad, Q.grad + D.grad)


def test_gradient_accumulates(engine):
    case = in_batch(16, torch.float32, torch.float32, make=grid)
    Q, D = case.leaves()
    once = gradients(case, *case.leaves(), output_gradient(case.shape))
    for _ in range(3):
        case(Q, D).backward(output_gradient(case.shape))
    assert torch.equal(Q.grad, 3 * once[0])
    assert torch.equal(D.grad, 3 * once[1])


def test_retained_graph(engine):
    """Backward leaves the saved state as it found it."""
    case = in_batch(16, torch.float32, torch.float32, make=grid)
    Q, D = case.leaves()
    scores, grad = case(Q, D), output_gradient(case.shape)
    first = torch.autograd.grad(scores, (Q, D), grad, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(scores, (Q, D), grad)))


def test_input_changed_in_place(engine):
    """Autograd's version counter must notice that a saved input was overwritten."""
    case = in_batch(16, torch.float32, torch.float32, make=grid)
    Q, D = case.leaves()
    scores = case(Q, D)
    with torch.no_grad():
        D.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_zero_rows_under_normalize(engine, dtype):
    """A row of zeros is divided by 1e-12, and so is its gradient; the norm's own gradient there is 0, as in PyTorch."""
    case = in_batch(8, dtype, dtype, masked=False)
    case.Q[0, 1] = 0
    case.D[1] = 0
    grad = embeddings(*case.shape, seed=6, norm=None)
    found = gradients(case, *case.leaves(), grad, normalize=True)
    wanted = gradients(case.expected, *case.leaves(torch.float64), grad, normalize=True)
    relative = 500 * oracle.UNIT_ROUNDOFF["float32"] + oracle.UNIT_ROUNDOFF[storage_name(dtype)]
    for mine, truth, size in zip(found, wanted, magnitudes(case, grad, True), strict=True):
        assert not mine.isnan().any()
        finite = truth.to(dtype).isfinite()  # 1e12 is beyond fp16
        assert torch.equal(mine[~finite], truth.to(dtype)[~finite])
        assert ((mine.double() - truth).abs() <= relative * size + 2.0**-25)[finite].all()


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads_or_run(isa, threads, layout, num_threads):
    case = LAYOUTS[layout](48, torch.float16, torch.float16)
    grad = embeddings(*case.shape, seed=6, norm=None)
    threads(1)
    scores, wanted = case(case.Q, case.D), gradients(case, *case.leaves(), grad)
    threads(num_threads)
    for _ in range(20):
        assert torch.equal(case(case.Q, case.D), scores)
        assert all(map(torch.equal, gradients(case, *case.leaves(), grad), wanted))


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("dtype", STORAGES, ids=storage_name)
def test_bits_of_a_training_batch(isa, threads, dtype, normalized):
    """Large enough for every thread to get work, with many query tokens that choose the same document token."""
    Q, D = embeddings(24, 32, 48, dtype=dtype, seed=1), embeddings(24, 45, 48, dtype=dtype, seed=2)
    D[:, 5] = D[:, 5] * 0 + 0.5  # a favourite: its gradient sums hundreds of terms
    Q[5, 3, 3], D[7, 2, 2] = 1.5, -40  # neighbours that fixed point cannot hold
    d_mask = holes(24, 45, seed=3)
    grad = embeddings(24, 24, seed=4, norm=None)
    results = []
    for num_threads in (1, 2, 4, 2, 1):
        threads(num_threads)
        for precision in ("exact", "fast"):
            leaves = Q.clone().requires_grad_(), D.clone().requires_grad_()
            scores = ek.maxsim(*leaves, None, d_mask, normalize=normalized, precision=precision)
            scores.backward(grad)
            results.append((precision, scores.detach(), leaves[0].grad, leaves[1].grad))
    for precision in ("exact", "fast"):
        first, *others = [tensors for name, *tensors in results if name == precision]
        assert all(all(map(torch.equal, first, other)) for other in others)


def test_torch_backend_is_deterministic(threads):
    with ek.backend("torch"):
        case = in_batch(48, torch.float32, torch.float32, num_queries=8, num_documents=8, lq=32, ld=45)
        grad = embeddings(*case.shape, seed=6, norm=None)
        wanted = gradients(case, *case.leaves(), grad)
        for _ in range(20):
            assert all(map(torch.equal, gradients(case, *case.leaves(), grad), wanted))


@pytest.mark.parametrize("query_length", [1, 3, 5, 8, 9, 15, 16, 17, 32, 33])
def test_score_does_not_depend_on_its_batch(isa, precision, query_length):
    """Bit for bit: alone, in any company, in any order, and next to a document that leaves fixed point."""
    dim = 48
    Q = embeddings(9, query_length, dim, dtype=torch.float16, seed=1)
    D = embeddings(7, 29, dim, dtype=torch.float16, seed=2)
    alone = torch.tensor([[ek.maxsim(q[None], d[None], precision=precision).item() for d in D] for q in Q])
    assert torch.equal(ek.maxsim(Q, D, precision=precision), alone)
    assert torch.equal(ek.maxsim(Q.flip(0), D.flip(0), precision=precision), alone.flip(0, 1))
    assert torch.equal(ek.maxsim(Q[2:5], D[3:], precision=precision), alone[2:5, 3:])
    loud_D, loud_Q = D.clone(), Q.clone()
    loud_D[3, 4, 5] = 30.0
    loud_Q[4, -1, 2] = 30.0
    others_d, others_q = [0, 1, 2, 4, 5, 6], [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(ek.maxsim(Q, loud_D, precision=precision)[:, others_d], alone[:, others_d])
    assert torch.equal(ek.maxsim(loud_Q, D, precision=precision)[others_q], alone[others_q])
    own = ek.maxsim(Q, D.expand(9, *D.shape), precision=precision)
    assert torch.equal(own, alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_score_does_not_depend_on_gradients(isa, layout, precision):
    """The same bits with an argmax kept for the backward and without."""
    case = LAYOUTS[layout](48, torch.float16, torch.float16)
    with_graph = case(*case.leaves(), precision=precision)
    assert with_graph.requires_grad
    assert torch.equal(with_graph.detach(), case(case.Q, case.D, precision=precision))


def test_saved_state(engine):
    """Between forward and backward at most an int16 a (query token, document) is kept beside the inputs."""
    Q, D = embeddings(16, 32, 48, seed=1).requires_grad_(), embeddings(16, 45, 48, seed=2).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ek.maxsim(Q, D)
    inputs = {Q.data_ptr(), D.data_ptr()}
    extra = sum(t.nbytes for t in saved if t.data_ptr() not in inputs)
    assert extra <= 2 * 16 * 16 * 32
