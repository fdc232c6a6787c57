"""What the tests of both losses share: leaves, gradients, and tolerances that PyTorch's own errors set."""

from __future__ import annotations

import torch

from cases import storage_name
from conftest import INTERPRETED
from oracle import UNIT_ROUNDOFF

NAMES = ("value", "Q", "D", "temperature")


def leaf(tensor, dtype=None):
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def value_and_gradients(loss, Q, D, *rest, dtype=None, temperature=1.0, grad=None, **options):
    """The loss, and its gradients to Q, D and the temperature, all of them leaves, in `dtype` or their own."""
    temperature = torch.as_tensor(temperature, dtype=torch.float64).to(Q.device)
    Q, D, temperature = leaf(Q, dtype), leaf(D, dtype), leaf(temperature, dtype)
    value = loss(Q, D, *rest, temperature=temperature, **options)
    if not value.requires_grad:
        return value, *map(torch.zeros_like, (Q, D, temperature))
    grad = torch.ones_like(value) if grad is None else grad.to(value.dtype)
    return value.detach(), *torch.autograd.grad(value, (Q, D, temperature), grad, materialize_grads=True)


def assert_as_near(found, exact, plain, *, roundings=32, of=0.0):
    """Each of `found` is as near to the float64 `exact` as twice PyTorch's `plain` in float32 is, and some roundings.

    These are relative to the largest number, at least `of`. Infinities and NaN have to be where `exact` has them.
    """
    for name, (mine, truth, theirs) in zip(NAMES, zip(found, exact, plain, strict=True), strict=False):
        storage = UNIT_ROUNDOFF[storage_name(mine.dtype)]
        finite = truth.isfinite()
        assert torch.equal(mine.isfinite(), finite), name
        mine, truth, theirs = (each.double()[finite] for each in (mine, truth, theirs))
        if not truth.numel():
            continue
        error = 2 * (theirs - truth).abs().max() + roundings * UNIT_ROUNDOFF["float32"] * max(of, truth.abs().max())
        allowed = error + 2 * storage * truth.abs() + (2.0**-25 if storage > 2.0**-20 else 0)
        assert ((mine - truth).abs() <= allowed).all(), (name, (mine - truth).abs().max(), error)


def assert_same(found, wanted, engine, name):
    """The same bits. On a GPU Triton's gradients of documents add in another order where anything is not finite."""
    if engine != "triton" or INTERPRETED:
        assert all(map(torch.equal, found, wanted)), name
        return
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7, msg=name)
