"""Documents to storage: by the kernels and, where there are none, by numpy, with the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgecolbert_kernels as ek
from edgecolbert_kernels import PackedEmbeddings, dtypes, pack
from edgecolbert_kernels.backends import native
from edgecolbert_kernels.backends.packed import available
from marks import compiled

pytestmark = compiled

STORAGES = ("float32", "float16", "bfloat16", "int8")
LENGTHS = (5, 0, 1, 12, 33, 0, 300)


def rows(length, dim=33, seed=0, scale=1.0):
    return (np.random.default_rng([seed, length]).standard_normal((length, dim)) * scale).astype(np.float32)


def given_as(x, source):
    """float32 rows as one of the dtypes that documents may have."""
    if source == "bfloat16":
        return torch.from_numpy(x).bfloat16()
    return x.astype(source)


def both(make):
    """What the kernels make, once it equals what numpy makes."""
    assert available()
    found = make()
    with ek.backend("torch"):
        assert not available()
        wanted = make()
    assert found.dtype == wanted.dtype
    assert found.tokens.dtype == wanted.tokens.dtype
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.lengths, wanted.lengths)
    if found.dtype == "int8":
        np.testing.assert_array_equal(found.scales, wanted.scales)
    return found


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16", "float64"])
def test_lists(dtype, source):
    documents = [given_as(rows(length), source) for length in LENGTHS]
    packed = both(lambda: PackedEmbeddings.from_list(documents, dtype=dtype))
    assert packed.lengths.tolist() == list(LENGTHS)
    both(lambda: PackedEmbeddings.from_list(documents, dtype=dtype).to("float32"))


@pytest.mark.parametrize("dtype", STORAGES)
def test_lists_of_any_layout(dtype):
    """Strided, reversed, transposed, unaligned, of several dtypes, in tensors and arrays."""
    plain = rows(24)
    unaligned = np.frombuffer(b"x" + plain.tobytes(), np.uint8)[1:].view(np.float32).reshape(24, 33)
    views = [
        plain[::2],
        plain[::-1],
        np.asfortranarray(plain),
        plain[:, ::-1],
        unaligned,
        np.repeat(plain, 2, 1)[:, ::2],
    ]
    assert not unaligned.flags.aligned
    both(lambda: PackedEmbeddings.from_list(views, dtype=dtype))
    both(lambda: PackedEmbeddings.from_list([torch.from_numpy(plain).T.contiguous().T, *views], dtype=dtype))
    both(lambda: PackedEmbeddings.from_list([plain, plain.astype(np.float16), torch.ones(3, 33)], dtype=dtype))


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
def test_padded(dtype, source):
    X = np.stack([rows(40, seed=n) for n in range(9)])
    mask = np.random.default_rng(0).random((9, 40)) < 0.7
    mask[3] = False
    hidden = given_as(X, source)
    for kept in (None, mask, torch.from_numpy(mask), mask.astype(np.int64)):
        packed = both(lambda kept=kept: PackedEmbeddings.from_padded(hidden, kept, dtype=dtype))
        lengths = [40] * 9 if kept is None else mask.sum(1).tolist()
        assert packed.lengths.tolist() == lengths
        np.testing.assert_array_equal(
            both(lambda: pack(hidden, mask, normalize=False, dtype=dtype)).lengths, mask.sum(1)
        )
    assert both(lambda: PackedEmbeddings.from_padded(hidden[:0], dtype=dtype)).dim == 33
    assert len(both(lambda: PackedEmbeddings.from_padded(hidden[:, :0], dtype=dtype)).tokens) == 0


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("source", STORAGES)
def test_conversions(source, dtype):
    """In blocks, of all documents, of a range and of chosen ones."""
    packed = PackedEmbeddings.from_list([rows(length) for length in LENGTHS], dtype=source)
    for view in (packed, packed[2:6], packed[[6, 0, 3, 3]]):
        both(lambda view=view: view.to(dtype))
        floats = view.to("float32")
        wanted = np.concatenate([np.asarray(dtypes.widen(*dtypes.matrix("x", view[n]))) for n in range(len(view))])
        np.testing.assert_array_equal(floats.tokens, wanted)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "bits"), [("float16", 0x477FF000), ("bfloat16", 0x7F7F8000)])
def test_too_large(dtype, bits, sign):
    """The first document with a finite value that becomes infinite is named; infinities and NaN before it are kept."""
    large, below = sign * np.array([bits, bits - 1], np.uint32).view(np.float32)
    documents = [rows(20, seed=n) for n in range(8)]
    documents[1][3, 4], documents[2][0, 0] = np.nan, -np.inf
    X = np.stack(documents)
    packed = both(lambda: PackedEmbeddings.from_list(documents, dtype=dtype))
    assert np.isnan(packed.to("float32").tokens[23, 4])
    assert packed.to("float32").tokens[40, 0] == -np.inf
    documents[5][7, 8] = below
    assert np.isfinite(both(lambda: PackedEmbeddings.from_list(documents, dtype=dtype)).tokens[107, 8])
    documents[5][7, 8] = large
    X[5, 7, 8] = large
    mask = np.ones(X.shape[:2], bool)
    for attempt in (
        lambda: PackedEmbeddings.from_list(documents, dtype=dtype),
        lambda: PackedEmbeddings.from_padded(X, dtype=dtype),
        lambda: PackedEmbeddings.from_padded(X, mask, dtype=dtype),
        lambda: PackedEmbeddings.from_list(documents, dtype="float32").to(dtype),
    ):
        with pytest.raises(ValueError, match=rf"documents\[5\].*{dtype}"):
            attempt()
    with pytest.raises(ValueError, match=rf"hidden.*{dtype}"):
        pack(X, normalize=False, dtype=dtype)
    mask[5, 7] = False
    assert len(PackedEmbeddings.from_padded(X, mask, dtype=dtype).tokens) == 159
    assert pack(X, mask, normalize=False, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_int8_names_the_document(bad):
    documents = [rows(20, seed=n) for n in range(8)]
    documents[6][19, 32] = bad
    for attempt in (
        lambda: PackedEmbeddings.from_list(documents, dtype="int8"),
        lambda: PackedEmbeddings.from_list(documents, dtype="float16").to("int8"),
    ):
        with pytest.raises(ValueError, match=r"documents\[6\].*int8"):
            attempt()


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("normalize", [False, True])
def test_anything_behind_a_mask(dtype, normalize):
    """Also what float32 cannot hold, in arrays and tensors of float64."""
    hidden, mask = np.ones((2, 3, 4)), np.array([[1, 1, 0], [1, 1, 1]])
    hidden[0, 2] = 1e300, np.inf, np.nan, -1e300
    for each in (hidden, torch.from_numpy(hidden)):
        assert pack(each, mask, normalize=normalize, dtype=dtype).num_tokens == 5
        with pytest.raises(ValueError, match=r"hidden.*float32"):
            pack(each, normalize=normalize, dtype=dtype)
        hidden[1, 0, 0], kept = 1e300, hidden[1, 0, 0]
        with pytest.raises(ValueError, match=r"hidden.*float32"):
            pack(each, mask, normalize=normalize, dtype=dtype)
        hidden[1, 0, 0] = kept


def test_documents_that_have_no_numbers():
    """Anything that has a length and can be walked through."""
    documents = {7: rows(3), 5: rows(2)}.values()
    assert PackedEmbeddings.from_list(documents).lengths.tolist() == [3, 2]
    assert PackedEmbeddings.empty(33).append(documents).lengths.tolist() == [3, 2]


def test_scales_below_the_normal_ones():
    values, scales = np.array([[100, -50, 1, 0]], np.int8), np.array([1e-38], np.float32)
    packed = PackedEmbeddings.from_arrays(values, [0, 1], scales)
    np.testing.assert_array_equal(packed.to("float32").tokens, packed[0])
    assert packed[0][0, 0] > 0


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backends_of_a_gpu(name):
    """Chosen for scores there, they do not keep the host from packing."""
    documents = [rows(length) for length in LENGTHS]
    wanted = PackedEmbeddings.from_list(documents, dtype="int8")
    with ek.backend(name):
        found = PackedEmbeddings.from_list(documents).to("float32").to("int8")
        assert pack(np.ones((2, 3, 4), np.float32)).num_tokens == 6
    np.testing.assert_array_equal(found.lengths, wanted.lengths)


def test_threads(monkeypatch):
    """PyTorch's for tensors, those of the environment for arrays."""
    X, seen = np.ones((3, 4, 5), np.float32), []
    real = native.module().pack
    monkeypatch.setattr(native.module(), "pack", lambda *call: seen.append(call[-1]) or real(*call))
    monkeypatch.setenv("EDGECOLBERT_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for hidden in (X, torch.from_numpy(X)):
        pack(hidden)
        pack(hidden, weight=np.ones((2, 5), np.float32))
        PackedEmbeddings.from_padded(hidden)
        PackedEmbeddings.from_list(list(hidden))
    assert seen == [3] * 4 + [5] * 4


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any(data):
    draw = data.draw
    dim, count = draw(st.sampled_from([1, 3, 16, 31, 48, 64, 129])), draw(st.integers(1, 6))
    scale = draw(st.sampled_from([1.0, 1e-3, 300.0, 1e-30]))
    lengths = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    source = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    dtype = draw(st.sampled_from(STORAGES))
    documents = [given_as(rows(length, dim, seed, scale), source) for seed, length in enumerate(lengths)]
    both(lambda: PackedEmbeddings.from_list(documents, dtype=dtype))
    X = np.stack([rows(max(lengths, default=0), dim, seed, scale) for seed in range(count)])
    mask = np.random.default_rng(draw(st.integers(0, 99))).random(X.shape[:2]) < draw(st.sampled_from([0.1, 0.5, 0.95]))
    both(lambda: PackedEmbeddings.from_padded(given_as(X, source), mask, dtype=dtype))
