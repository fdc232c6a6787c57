"""The package's reference held against the pair-at-a-time oracle, in float64: the truth needs a witness too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from cases import embeddings, grid, holes, packed, ragged
from edgecolbert_kernels import reference
from layouts import LAYOUTS, gradients

FUNCTIONS = {
    "in_batch": reference.maxsim,
    "own_candidates": reference.maxsim,
    "row_by_row": reference.maxsim_pairs,
    "varlen": reference.maxsim_varlen,
    "indexed": reference.maxsim_indexed,
}


def flat_argmax(argmax):
    if isinstance(argmax, list):
        return [tokens for row in argmax for tokens in row]
    return argmax.reshape(-1, argmax.shape[-1])


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("layout", FUNCTIONS)
def test_scores_argmax_and_gradients(layout, masked, mask_mode, normalize):
    """float64 leaves nothing to tolerance but its own rounding; autograd of the reference is the gradient of the formula."""
    for make, dim in ((embeddings, 16), (embeddings, 3), (grid, 8)):
        if make is grid and normalize:
            continue  # normalised grids tie only up to rounding
        case = LAYOUTS[layout](dim, torch.float64, torch.float64, make=make, masked=masked)
        options = {"normalize": normalize, "mask_mode": mask_mode}

        def scores(Q, D, case=case, **options):
            return FUNCTIONS[layout](Q, D, **case.arguments, **options)[0]

        Q, D = case.leaves()
        wanted = case.expected(Q, D, **options)
        torch.testing.assert_close(scores(Q, D, **options), wanted, rtol=0, atol=1e-13)
        argmax = flat_argmax(FUNCTIONS[layout](Q, D, **case.arguments, **options)[1])
        for mine, chosen in zip(argmax, case.choices(**options), strict=True):
            assert torch.equal(mine, chosen)
        grad = embeddings(*case.shape, seed=6, norm=None).double()
        mine, truth = (
            gradients(scores, *case.leaves(), grad, **options),
            gradients(case.expected, *case.leaves(), grad, **options),
        )
        for a, b in zip(mine, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_oracle_by_hand():
    """The oracle itself on numbers that fit in the head."""
    query, document = np.array([[1.0, 0], [0, 1], [1, 1]]), np.array([[2.0, -1], [0, 3], [2, -5]])
    score, argmax = oracle.maxsim(query, document)
    assert (score, argmax.tolist()) == (2 + 3 + 3, [0, 1, 1])
    score, argmax = oracle.maxsim(query, document, np.array([1, 0, 1], bool), np.array([0, 1, 1], bool))
    assert (score, argmax.tolist()) == (2 + 3, [2, -1, 1])
    score, argmax = oracle.maxsim(query, document, None, np.array([1, 0, 1], bool), "zero")
    assert (score, argmax.tolist()) == (2 + 0 + 1, [0, -1, 0])
    assert oracle.maxsim(query, document[:0])[0] == 0
    assert oracle.maxsim(query, document, None, np.zeros(3, bool))[1].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
def test_special_values(mask_mode):
    nan, inf = float("nan"), float("inf")
    Q = torch.tensor([[[1.0, 0.5]]], dtype=torch.float64)
    for document, value, winner in (
        ([[0.5, 0.5], [nan, 0.5], [inf, nan]], nan, 1),
        ([[-inf, 0.5], [-inf, 0.25]], -inf, 0),
        ([[inf, 0.5], [inf, 0.25]], inf, 0),
        ([[inf, -inf], [0.5, 0.5]], nan, 0),
        ([[0.5, 0.5], [0.5, 0.5]], 0.75, 0),
    ):
        scores, argmax = reference.maxsim(Q, torch.tensor([document], dtype=torch.float64), mask_mode=mask_mode)
        torch.testing.assert_close(scores.item(), value, equal_nan=True)
        assert argmax.item() == winner


@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
def test_padding_never_leaks(mask_mode):
    Q, D = embeddings(3, 5, 8, seed=1).double(), embeddings(4, 7, 8, seed=2).double()
    q_mask, d_mask = holes(3, 5, seed=3), holes(4, 7, seed=4)
    d_mask[1] = False
    clean = reference.maxsim(Q, D, q_mask, d_mask, mask_mode=mask_mode)
    Q[~q_mask], D[~d_mask] = float("nan"), float("inf")
    Q.requires_grad_()
    D.requires_grad_()
    for normalize in (False, True):
        scores, argmax = reference.maxsim(Q, D, q_mask, d_mask, mask_mode=mask_mode, normalize=normalize)
        if not normalize:
            assert torch.equal(scores, clean[0])
            assert torch.equal(argmax, clean[1])
        found = torch.autograd.grad(scores.sum(), (Q, D))
        assert all(gradient.isfinite().all() for gradient in found)


def test_empty():
    ones = torch.ones
    assert torch.equal(reference.maxsim(ones(2, 5, 8), ones(3, 0, 8))[0], torch.zeros(2, 3))
    assert torch.equal(reference.maxsim(ones(2, 0, 8), ones(3, 7, 8))[0], torch.zeros(2, 3))
    assert reference.maxsim(ones(0, 5, 8), ones(3, 7, 8))[0].shape == (0, 3)
    rows, cu = packed(ragged((0, 3), 8, seed=1))
    assert torch.equal(reference.maxsim_varlen(rows, rows, cu, cu)[0][0], torch.zeros(2))
