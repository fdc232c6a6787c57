"""Document tokens that int8 cannot tell apart: products drop most of them, and the best one keeps its bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
from cases import STORAGES, holes
from edgecolbert_kernels import PackedEmbeddings
from screening import (
    _C,
    MOST_DIMENSIONS,
    NAN,
    SUMS_OF_16_BITS,
    both,
    check,
    check_winners,
    on_screening_isas,  # noqa: F401 (for every test here)
    outputs,
    screened_documents,
)


def check_all_screened(Q, D, *masks, **options):
    """As `check`, of documents that the screen scores, all of them, where it takes so many dimensions."""
    _, tried, done = screened_documents(lambda: outputs(Q, D, *masks, **options))
    assert tried == done == (2 * len(D) if Q.shape[-1] <= MOST_DIMENSIONS[_C.get_isa()] else 0)
    return check(Q, D, *masks, **options)


def permuted(dim, query_length, places, factors=1.0, length=300, count=4, kinds=2, dtype=torch.float32, seed=0):
    """(Q [1, Lq, d], D [count, length, d]): at `places` tokens that are equally near to a query token but for roundings.

    Query tokens are multiples of one of `kinds` rows of signs, those tokens the same values in other orders, for one such
    row after the other; times `factors`, one a place. Everything else is far. So int8 has to leave them all, and which of
    them is the best in fp32, to the bit, is a matter of the order of summation.
    """
    random = np.random.default_rng([seed, dim])
    signs = (random.choice([-1.0, 1.0], dim) * np.array([np.ones(dim), np.resize([1.0, -1.0], dim)]))[:kinds]
    Q = signs[random.integers(0, kinds, query_length)]
    Q *= random.uniform(0.5, 1, (query_length, 1)) * 2.0 ** -random.integers(0, 10, (query_length, 1))
    D = -signs.sum(0) * random.uniform(0.2, 0.5, (count, length, 1))
    values = torch.from_numpy(2 ** random.uniform(-8, 0, dim)).to(dtype).double().numpy()
    for document in D:
        rows = random.permuted(np.tile(values, (len(places), 1)), axis=1)
        document[places] = signs[np.arange(len(places)) % kinds] * rows * np.resize(factors, (len(places), 1))
    return torch.from_numpy(Q).to(dtype)[None], torch.from_numpy(D).to(dtype)


def most_near(dim, length=300):
    """So many tokens, near the best one of every query token, that the screen scores them all."""
    return (4 if _C.get_isa() in SUMS_OF_16_BITS else 5) * length // 9 // (8 + 384 // dim)


@pytest.mark.parametrize("query_length", [12, 17, 32, 33, 80])
@pytest.mark.parametrize("dim", [16, 48, 50, 64, 96, 128, 129, 768, 2048])
def test_equal_but_for_rounding(dim, query_length):
    """More than 48 pairs, of which any may be the best: products of rows in another order must not decide."""
    places = 41 + np.arange(min(most_near(dim), 24))
    for dtype in STORAGES:
        Q, D = permuted(dim, query_length, places, dtype=dtype)
        _, winners = check_all_screened(Q, D)
        check_winners(Q, D, winners)
        if dtype == torch.float32:
            assert len(winners.unique()) > min(4, len(places) - 1)
        check(Q, D.flip(1))
        if query_length == 32:
            Q[0, ::3] = 0
            for scale in (2.0**-20, 2.0**15) if dtype != torch.float16 else (0.75,):
                check(Q * scale, D)
                check(Q, D * scale)


@pytest.mark.parametrize("query_length", [1, 7, 17, 25, 32])
def test_every_number_of_pairs(query_length):
    """From one pair to hundreds, of which products of rows leave one to eight a query token, wherever these are."""
    width = 16 if _C.get_isa().startswith("avx512") else 8
    most = min((16 if _C.get_isa() in SUMS_OF_16_BITS else 25) * width * -(-query_length // width) // query_length, 120)
    for place in ("first", "last", "anywhere"):
        Q, documents = None, []
        for near in range(1, most):
            factors = 1 - 1e-4 * np.arange(near).clip(near % 9) + 1e-4 * (near % 9)
            factors = {"first": factors, "last": factors[::-1]}.get(
                place, np.random.default_rng(near).permutation(factors)
            )
            places = {"first": np.arange(near), "last": 299 - np.arange(near)[::-1]}.get(place, 7 + 2 * np.arange(near))
            Q, D = permuted(48, query_length, places, factors, count=1, kinds=1)
            documents.append(D)
        D = torch.cat(documents)
        check_winners(Q, D, check_all_screened(Q, D)[1])


@pytest.mark.parametrize("query_length", [16, 32, 64])
def test_products_leave_few(query_length):
    """More pairs than the screen may score, but for their products, which tell that few are near enough."""
    Q, D = permuted(48, query_length, 41 + np.arange(40), 1 - 1e-4 * np.arange(40), kinds=1)
    check_all_screened(Q, D)
    check_all_screened(Q, D, None, torch.ones(4, 300, dtype=torch.bool))


@pytest.mark.parametrize("dim", [48, 50, 129])
def test_views_of_equal_but_for_rounding(dim):
    """Rows in other places, among NaN: apart, at odd addresses, backwards, masked, and not side by side at all."""
    for dtype, query_length in itertools.product(STORAGES, (12, 33)):
        Q, D = permuted(dim, query_length, 30 + np.arange(most_near(dim, 200)), length=200, dtype=dtype)
        wanted = check_all_screened(Q, D)
        spread = torch.full((8, 3 * 200, dim + 5), NAN, dtype=dtype)
        spread[1::2, 1::3, 3 : 3 + dim] = D
        columns = torch.full((4, 200, 2 * dim), NAN, dtype=dtype)
        columns[..., ::2] = D
        for view in (
            spread[1::2, 1::3, 3 : 3 + dim],
            columns[..., ::2],
            D.transpose(0, 1).contiguous().transpose(0, 1),
        ):
            found = check_all_screened(Q, view)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        scores, winners = check_all_screened(
            Q, spread[1::2, :, 3 : 3 + dim], None, (torch.arange(600) % 3 == 1).repeat(4, 1)
        )
        assert torch.equal(scores, wanted[0])
        assert torch.equal(winners, 3 * wanted[1] + 1)
        mask = holes(4, 200, seed=1)
        masked = D.masked_fill(~mask[..., None], NAN)
        for mode in ("exclude", "zero"):
            check_all_screened(Q, masked, None, mask, mask_mode=mode)
        check(Q, D, normalize=True)
        if dtype != torch.bfloat16:
            backwards = D.numpy()[:, ::-1].copy()[:, ::-1]
            (found,) = both(lambda: [ek.maxsim(Q.numpy(), backwards)])  # noqa: B023 (called at once)
            np.testing.assert_array_equal(found, wanted[0].numpy())


@pytest.mark.parametrize("query_length", [12, 32, 80])
@pytest.mark.parametrize(("dim", "length"), [(16, 3000), (48, 1600), (128, 1000), (768, 300)])
def test_blocks_of_equal_but_for_rounding(dim, length, query_length):
    """Every block holds tokens as good as the best of those before, or a few roundings better or worse."""
    block = 32768 // -(-dim // 32 * 32) // 12 * 12
    starts = np.arange(0, length - 20, block)
    near = most_near(dim, length) // len(starts)
    places = (starts[:, None] + 5 + np.arange(min(near, 14))).ravel()
    for step, dtype in itertools.product((0, 3e-7, -3e-7, 1e-4, -1e-4), STORAGES[:2]):
        factors = 1 + step * (places // block)
        Q, D = permuted(dim, query_length, places, factors, length=length, count=3, dtype=dtype)
        check_winners(Q, D, check_all_screened(Q, D)[1])


def sums_in_order(dim):
    """(query, winner, rival, lesser): in order of dimension winner sums to more than rival, and in truth to much less.

    Behind 1.25 the rival's products are each a little less than half a unit in the last place, the winner's a little more,
    and the winner starts lower by as many units as these will be: two times the error that a sum can have, almost.
    """
    query = np.full(dim, 2.0**-10)
    query[0] = 1
    rival, winner = np.full(dim, 2.0**-14 * (1 - 2**-5)), np.full(dim, 2.0**-14 * (1 + 2**-5))
    rival[:2] = 1.25, 0
    units = 1 << max((dim - 3).bit_length() - 7, 0)
    winner[:2] = 1.25, -((dim - 3) // units * units) * 2.0**-13
    lesser = rival.copy()
    lesser[0] = 1.2421875
    return query, winner, rival, lesser


@pytest.mark.parametrize("query_length", [12, 17, 32, 33])
@pytest.mark.parametrize("dim", [16, 33, 48, 64, 128, 600, 768, 1000, 2048])
def test_the_order_of_a_sum(dim, query_length):
    """The best token by the tile's sums is far from the best by its product: among its rivals, or in a block behind them."""
    near = (70 if _C.get_isa() in SUMS_OF_16_BITS else 100) // query_length + 2
    query, winner, rival, lesser = sums_in_order(dim)
    Q = torch.from_numpy(query * 2.0 ** -(np.arange(query_length) % 7)[:, None])[None].float()
    for dtype in (torch.float32, torch.bfloat16):
        documents = []
        for place, earlier in itertools.product((0, near // 2, near - 1), (False, True)):
            document = -query * np.random.default_rng(place).uniform(0.3, 0.6, (600, 1))
            later = {48: 504, 64: 504, 128: 252}.get(dim, 240) if earlier else 0
            document[later : later + near] = lesser if earlier else rival
            if earlier:
                document[48 : 48 + near] = rival
            document[later + place] = winner
            documents.append(document)
        D = torch.from_numpy(np.stack(documents)).to(dtype)
        _, winners = check_all_screened(Q.to(dtype), D)
        for number, document in enumerate(documents):
            assert (winners[0, number] == np.flatnonzero((document == winner).all(1))[0]).all(), number


@pytest.mark.parametrize("query_length", [12, 32, 33])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_packed_embeddings_equal_but_for_rounding(dtype, query_length):
    for dim in (16, 48, 50, 128, 768):
        Q, D = permuted(dim, query_length, 41 + np.arange(min(most_near(dim), 24)))
        documents = PackedEmbeddings.from_list([*D, *D[:2, 30:130]], dtype=dtype)
        (found,) = both(lambda: [ek.maxsim(Q[0].numpy(), documents)])  # noqa: B023 (called at once)
        _, tried, done = screened_documents(lambda: ek.maxsim(Q[0].numpy(), documents[:4]))  # noqa: B023
        assert tried == done == (4 if dim <= MOST_DIMENSIONS[_C.get_isa()] else 0)
        both(lambda: [ek.maxsim_indexed(Q.numpy(), documents, np.zeros(3, int), np.array([5, 0, 3]))])  # noqa: B023
        if dtype == "float32":
            np.testing.assert_array_equal(found[:4], ek.maxsim(Q[0], D).numpy())
