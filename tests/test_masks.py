"""Masks with holes in any dtype, both mask modes, and documents that keep nothing."""

from __future__ import annotations

import itertools

import pytest
import torch

import edgecolbert_kernels as ek
import oracle
from cases import STORAGES, embeddings, grid, holes, storage_name, to_float64
from layouts import LAYOUTS, gradients

MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *STORAGES, torch.float64)
MODES = ("exclude", "zero")


def expected(Q, D, q_mask=None, d_mask=None, mask_mode="exclude"):
    q_masks = [None] * len(Q) if q_mask is None else q_mask.numpy()
    d_masks = [None] * len(D) if d_mask is None else d_mask.numpy()
    rows = [
        [oracle.maxsim(q, d, q_keep, d_keep, mask_mode)[0] for d, d_keep in zip(to_float64(D), d_masks, strict=True)]
        for q, q_keep in zip(to_float64(Q), q_masks, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_holes(engine, sweep, precision, layout, mask_mode):
    for dim, dtype in sweep(itertools.product((3, 16, 48), STORAGES)):
        case = LAYOUTS[layout](dim, dtype, dtype, make=grid)
        wanted = case.expected(*case.leaves(torch.float64), mask_mode=mask_mode)
        result = case(case.Q, case.D, mask_mode=mask_mode, precision=precision)
        assert oracle.same_on_grid(result, wanted.detach(), precision, 33, dim), (dim, dtype)


@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize("keep", ["first", "last", "every other", "one in the middle", "all but one"])
def test_patterns(engine, precision, keep, mask_mode):
    """Kept tokens at either end of a tile, none next to another, and every count of them up to three tiles."""
    for length in (1, 2, 11, 12, 13, 24, 25, 37):
        Q, D = grid(2, 17, 16, seed=1), grid(3, length, 16, seed=2) - 0.25  # mostly negative similarities
        mask = torch.zeros(3, length, dtype=torch.bool)
        index = {
            "first": slice(0, 1),
            "last": slice(length - 1, length),
            "every other": slice(0, length, 2),
            "one in the middle": slice(length // 2, length // 2 + 1),
            "all but one": torch.arange(length) != length // 2,
        }[keep]
        mask[:, index] = True
        result = ek.maxsim(Q, D, None, mask, mask_mode=mask_mode, precision=precision)
        # Documents reach -3/8 here, three times the grid's own range.
        assert oracle.same_on_grid(result, expected(Q, D, None, mask, mask_mode), precision, 3 * 17, 16), length


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=storage_name)
@pytest.mark.parametrize("mask_mode", MODES)
def test_any_dtype(engine, dtype, mask_mode):
    """0 and 1 in any dtype mean what False and True mean."""
    Q, D, q_mask, d_mask = grid(3, 7, 16, seed=1), grid(4, 13, 16, seed=2), holes(3, 7, seed=3), holes(4, 13, seed=4)
    result = ek.maxsim(Q, D, q_mask.to(dtype), d_mask.to(dtype), mask_mode=mask_mode)
    assert torch.equal(result, expected(Q, D, q_mask, d_mask, mask_mode))


@pytest.mark.parametrize("value", [255, 2, 128])
def test_nonzero_bytes(engine, value):
    """A byte that is neither 0 nor 1 keeps its token too."""
    Q, D, d_mask = grid(3, 7, 16, seed=1), grid(4, 13, 16, seed=2), holes(4, 13, seed=4)
    assert torch.equal(ek.maxsim(Q, D, None, d_mask.to(torch.uint8) * value), expected(Q, D, None, d_mask))
    wide = d_mask.to(torch.int32) * (value << 8)  # narrowing to a byte would drop these
    assert torch.equal(ek.maxsim(Q, D, None, wide), expected(Q, D, None, d_mask))
    halves = d_mask.float() * 0.5
    assert torch.equal(ek.maxsim(Q, D, None, halves), expected(Q, D, None, d_mask))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask_mode", MODES)
def test_full_mask_changes_no_bit(engine, precision, layout, mask_mode):
    case = LAYOUTS[layout](48, torch.float16, torch.float16, masked=False)
    plain = case(case.Q, case.D, precision=precision)
    for name, rows in (("q_mask", case.Q), ("d_mask", case.D)):
        full = [torch.ones(len(r)) for r in rows] if isinstance(rows, list) else torch.ones(rows.shape[:-1])
        case.arguments[name] = full
    masked = case(case.Q, case.D, mask_mode=mask_mode, precision=precision)
    # PyTorch's products round by the shape of what they are given.
    assert torch.allclose(masked, plain, rtol=1e-6) if engine == "torch" else torch.equal(masked, plain)


def test_mask_of_any_strides(engine):
    Q, D = grid(6, 7, 16, seed=1), grid(5, 13, 16, seed=2)
    q_mask, d_mask = holes(7, 6, seed=3).t(), holes(10, 26, seed=4)[::2, ::2]
    assert torch.equal(ek.maxsim(Q, D, q_mask, d_mask), expected(Q, D, q_mask, d_mask))
    shared = holes(13, seed=5).expand(5, 13)
    assert torch.equal(ek.maxsim(Q, D, None, shared), expected(Q, D, None, shared))


@pytest.mark.parametrize("mask_mode", MODES)
def test_nothing_kept(engine, precision, mask_mode):
    """No kept document token scores 0, no kept query token adds 0; neighbours keep their scores."""
    Q, D = grid(3, 7, 16, seed=1), grid(4, 13, 16, seed=2)
    q_mask, d_mask = holes(3, 7, seed=3), holes(4, 13, seed=4)
    q_mask[1] = False
    d_mask[2] = False
    result = ek.maxsim(Q, D, q_mask, d_mask, mask_mode=mask_mode, precision=precision)
    assert oracle.same_on_grid(result, expected(Q, D, q_mask, d_mask, mask_mode), precision, 7, 16)
    assert (result[1] == 0).all()
    assert (result[:, 2] == 0).all()


@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize("side", ["q_mask", "d_mask", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_masked(engine, layout, side, mask_mode):
    """No token is left in the whole call: scores and gradients are 0, and nobody won."""
    for dtype in STORAGES:
        case = LAYOUTS[layout](16, dtype, dtype, make=grid)
        for name in ("q_mask", "d_mask") if side == "both" else (side,):
            masks = case.arguments[name]
            case.arguments[name] = [m & False for m in masks] if isinstance(masks, list) else masks & False
        assert torch.equal(case(case.Q, case.D, mask_mode=mask_mode), torch.zeros(case.shape))
        for gradient in gradients(case, *case.leaves(), torch.ones(case.shape), mask_mode=mask_mode):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_argmax_of_masked_queries(engine):
    """-1 for each masked query token, also where no query of the call keeps one."""
    Q, D = grid(3, 5, 16, seed=1), grid(4, 7, 16, seed=2)
    for keep in (0.0, 0.5):
        q_mask = holes(3, 5, seed=3, keep=keep)
        arguments = (q_mask, None, None, None, None, None, False, "exclude", "exact", True)
        for _ in range(3):
            garbage = torch.full((4096,), 77, dtype=torch.int16)  # freed memory is handed out again
            del garbage
            argmax = torch.ops.edgecolbert.maxsim_forward(Q, D, *arguments)[1].view(3, 4, 5)
            assert torch.equal(argmax == -1, ~q_mask[:, None].expand(3, 4, 5))
            assert argmax.max() < 7


@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_tokens_get_zero_gradient(engine, layout, mask_mode):
    """Masked rows hold NaN and Inf: neither scores nor gradients see them, and their own gradient is 0."""
    case = LAYOUTS[layout](16, torch.float32, torch.float32, make=grid)
    clean = case(case.Q, case.D, mask_mode=mask_mode)
    grad = torch.ones(case.shape)
    wanted = gradients(case, *case.leaves(), grad, mask_mode=mask_mode)
    for name, rows in (("q_mask", case.Q), ("d_mask", case.D)):
        masks = case.arguments[name]
        for row, mask in zip(rows, masks, strict=True) if isinstance(rows, list) else [(rows, masks)]:
            row[~mask] = float("nan")
            row[..., 0][~mask] = float("inf")
    assert torch.equal(case(case.Q, case.D, mask_mode=mask_mode), clean)
    found = gradients(case, *case.leaves(), grad, mask_mode=mask_mode)
    assert all(map(torch.equal, found, wanted))
    for normalize in (True, False):
        assert not case(case.Q, case.D, mask_mode=mask_mode, normalize=normalize).isnan().any()
        for gradient in gradients(case, *case.leaves(), grad, mask_mode=mask_mode, normalize=normalize):
            assert not gradient.isnan().any()


def test_zero_mode_takes_part_in_the_maximum(engine):
    """All kept similarities negative: a masked token's 0 wins with "zero", never with "exclude", and takes no gradient."""
    Q, D = torch.ones(1, 2, 4), -torch.ones(1, 3, 4)
    mask = torch.tensor([[True, False, True]])
    Q.requires_grad_()
    D.requires_grad_()
    assert ek.maxsim(Q, D, None, mask).item() == -8
    scores = ek.maxsim(Q, D, None, mask, mask_mode="zero")
    assert scores.item() == 0
    scores.sum().backward()
    assert (Q.grad == 0).all()
    assert (D.grad == 0).all()


def test_zero_mode_ties_go_to_the_lowest_token(engine):
    """A kept similarity of exactly 0 and a masked 0: the earlier token wins, so only its gradient differs."""
    Q, D = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 2.0]]])
    for kept, winner in ((0, 0), (1, None)):
        mask = torch.zeros(1, 2, dtype=torch.bool)
        mask[0, kept] = True
        leaf = Q.clone().requires_grad_()
        ek.maxsim(leaf, D, None, mask, mask_mode="zero").sum().backward()
        wanted = torch.zeros(2) if winner is None else D[0, winner]
        assert torch.equal(leaf.grad[0, 0], wanted), kept


def test_zero_mode_is_pylate_torch(engine):
    """einsum, similarities times the mask, max, times the query mask, sum: PyLate's torch path, written out."""
    Q, D = embeddings(4, 9, 48, seed=1), embeddings(5, 13, 48, seed=2)
    q_mask, d_mask = holes(4, 9, seed=3), holes(5, 13, seed=4)
    similarity = torch.einsum("ash,bth->abst", Q.double(), D.double()) * d_mask[None, :, None, :]
    wanted = (similarity.max(-1).values * q_mask[:, None, :]).sum(-1)
    error = (ek.maxsim(Q, D, q_mask, d_mask, mask_mode="zero").double() - wanted).abs().max()
    assert error <= max(oracle.bound(q, d) for q, d in zip(to_float64(Q), to_float64(D), strict=False))


def test_a_mask_takes_no_gradient(engine):
    Q, D = grid(2, 3, 8, seed=1).requires_grad_(), grid(2, 5, 8, seed=2)
    mask = torch.ones(2, 5, requires_grad=True)
    ek.maxsim(Q, D, None, mask).sum().backward()
    assert mask.grad is None
