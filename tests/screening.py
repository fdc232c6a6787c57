"""What the tests of the int8 screen share."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import edgecolbert_kernels as ek
import oracle
from cases import embeddings
from conftest import ISAS
from edgecolbert_kernels.backends import native

_C = native.module()
NAN, INF = float("nan"), float("inf")
SHORTEST = {
    isa: length
    for isa, length in (("avx512vnni", 32), ("avx512", 32), ("avxvnni", 64), ("avx2", 80), ("neon_dotprod", 32))
    if isa in ISAS
}
"""Instruction sets that screen, and the document tokens from which on they do."""
MOST_DIMENSIONS = {isa: {"avx512": 192, "avx2": 256}.get(isa, 2048) for isa in SHORTEST}
"""Of tokens that they screen."""
SUMS_OF_16_BITS = SHORTEST.keys() & {"avx512", "avx2"}
"""Those whose document tokens have 7 bits, and whose screen leaves less time to what it leaves."""
NONE = pytest.param(None, marks=pytest.mark.skip(reason="no instruction set here screens"))


@contextlib.contextmanager
def screening(isa):
    _C.set_isa(isa)
    before = _C.set_screening(True)
    try:
        with ek.backend("cpu"):
            yield
    finally:
        _C.set_screening(before)
        _C.set_isa("")


@pytest.fixture(autouse=True, params=SHORTEST or [NONE], name="screened_isa")
def on_screening_isas(request):
    with screening(request.param):
        yield request.param


def bits(x):
    """As integers, so that NaN equals itself, and 0 differs from -0."""
    x = x.detach().numpy() if isinstance(x, torch.Tensor) and x.dtype != torch.bfloat16 else x
    x = x.detach().float().numpy() if isinstance(x, torch.Tensor) else x
    return x.view(f"u{x.dtype.itemsize}") if x.dtype.kind == "f" else x


def both(call):
    """The outputs of `call` with the screen, which have the bits of those without."""
    _C.set_screening(False)
    wanted = call()
    _C.set_screening(True)
    found = call()
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_array_equal(bits(a), bits(b), err_msg=f"output {number}")
    return found


def outputs(Q, D, q_mask=None, d_mask=None, cu_q=None, cu_d=None, normalize=False, mask_mode="exclude"):
    """Scores with winners, the winners, and the scores alone, for which the kernels do not look who wins."""
    arguments = (Q, D, q_mask, d_mask, cu_q, cu_d, None, None, normalize, mask_mode, "exact")
    scores, winners = torch.ops.edgecolbert.maxsim_forward(*arguments, True)
    return scores, winners, torch.ops.edgecolbert.maxsim_forward(*arguments, False)[0]


def check(Q, D, *masks, **options):
    """(scores [Nq, Nd], winners [Nq, Nd, Lq]) of padded queries and documents."""
    scores, winners, alone = both(lambda: outputs(Q, D, *masks, **options))
    assert torch.equal(bits_of(scores), bits_of(alone)), "the scores do not depend on the winners being asked for"
    return scores, winners.reshape(*scores.shape, -1)


def bits_of(scores):
    return scores.view(torch.int32)


def with_gradients(function, Q, D, **options):
    """Scores and the gradients of every row, which show who won."""
    rows = [*(Q if isinstance(Q, list) else [Q]), *(D if isinstance(D, list) else [D])]
    leaves = [x.detach().requires_grad_() for x in rows]
    count = len(Q) if isinstance(Q, list) else 1
    scores = function(
        leaves[:count] if isinstance(Q, list) else leaves[0],
        leaves[count:] if isinstance(D, list) else leaves[1],
        **options,
    )
    grad = embeddings(*scores.shape, seed=9, norm=None)
    return [scores.detach(), *torch.autograd.grad(scores, leaves, grad, materialize_grads=True)]


@st.composite
def values(draw, seed):
    """A maker of rows [..., tokens, d]: how they are distributed, how large they are and how often they return."""
    kind = draw(st.sampled_from(("gaussian", "grid", "half steps", "few directions", "outliers", "sparse")))
    scale = draw(st.sampled_from((1.0, 1.0, 1e-3, 1e4, 1e-9, 3e9)))
    spread = draw(st.sampled_from((0.0, 0.3, 3.0)))
    repeats = draw(st.sampled_from((1, 1, 3)))

    def make(*shape):
        random = np.random.default_rng(seed)
        rows = random.standard_normal(shape)
        if kind == "grid":
            rows = random.integers(-8, 9, shape) / 64
        elif kind == "half steps":
            rows = (random.integers(-119, 119, shape) + random.choice([0.499, 0.501], shape)) / 120
        elif kind == "few directions":
            directions = np.random.default_rng(7).standard_normal((4, shape[-1]))
            rows = directions[random.integers(0, 4, shape[:-1])] + 0.01 * rows
        elif kind == "outliers":
            rows = rows * np.where(random.random(shape) < 0.02, 100, 1)
        elif kind == "sparse":
            rows = rows * (random.random(shape) < 0.2)
        rows = rows * np.exp(spread * random.standard_normal((*shape[:-2], 1, 1))) * scale
        if repeats > 1:
            rows = rows[..., random.integers(0, max(shape[-2] // repeats, 1), shape[-2]), :]
        return torch.from_numpy(rows)

    return make


def screened_documents(call):
    """What `call` returns, and how many documents the screen tried and scored in it."""
    before = _C.screened()
    found = call()
    return found, *(after - earlier for after, earlier in zip(_C.screened(), before, strict=True))


def check_winners(Q, D, winners):
    """float64 agrees on every winner that fp32 can tell from the others."""
    for i, j in itertools.product(range(len(Q)), range(len(D))):
        q, d = Q[i].double().numpy(), D[j].double().numpy()
        similarity, bound = q @ d.T, oracle.rounding_term(q, d)
        chosen = similarity[np.arange(len(q)), winners[i, j].numpy()]
        assert (chosen >= similarity.max(1) - 2 * bound.max(1)).all(), (i, j)
