"""Token embeddings to packed storage and back, against numpy: rounding to the bit where nothing is normalised."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DIMENSIONS, LENGTHS
from conftest import ISAS
from edgecolbert_kernels.backends import native
from edgecolbert_kernels.backends.packed import empty_lines, pack_rows, unpack_rows
from marks import compiled
from stored import score_packed

_C = native.module()
pytestmark = compiled

FLOATS = (np.float32, np.float16, np.uint16)  # uint16: the bits of bfloat16
STORAGES = (*FLOATS, np.int8)
# Half the distance of neighbours, relative and near zero.
ROUNDOFF = {np.float32: (2.0**-24, 0.0), np.float16: (2.0**-11, 2.0**-25), np.uint16: (2.0**-8, 0.0)}


def stored(values, dtype):
    """float32 rounded to nearest even, by torch."""
    if dtype == np.uint16:
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def widened(tokens):
    if tokens.dtype == np.uint16:
        return (tokens.astype(np.uint32) << 16).view(np.float32)
    return tokens.astype(np.float32)


def embeddings(shape, dtype, seed=0):
    return stored(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32), dtype)


def boundaries(lengths, start=0):
    return np.cumsum([start, *lengths], dtype=np.int64)


def int8_model(rows):
    """(integers, scale) of a document's float32 rows, in the kernel's own float32 steps."""
    largest = np.abs(rows).max(initial=0)
    if largest < 2e-36:
        return np.zeros(rows.shape, np.int8), np.float32(0)
    return np.rint(rows * (np.float32(127) / largest)).astype(np.int8), largest / np.float32(127)


def check(packed, documents, normalize, dtype):
    """`documents`: the kept rows of each, as they were stored."""
    tokens, offsets, scales = packed
    assert tokens.dtype == dtype
    np.testing.assert_array_equal(offsets, boundaries(map(len, documents)))
    assert tokens.shape[0] == offsets[-1]
    assert (scales is None) == (dtype != np.int8)
    for n, rows in enumerate(documents):
        got = tokens[offsets[n] : offsets[n + 1]]
        if dtype == np.int8:
            check_int8(got, scales[n], widened(rows), normalize)
        elif not normalize:
            wanted = rows if rows.dtype == dtype else stored(widened(rows), dtype)
            np.testing.assert_array_equal(got, wanted)
        else:
            values = widened(rows).astype(np.float64)
            values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
            relative, absolute = ROUNDOFF[dtype]
            allowed = (relative + (values.shape[1] + 8) * 2.0**-24) * np.abs(values) + absolute
            assert (np.abs(widened(got) - values) <= allowed).all()


def check_int8(got, scale, rows, normalize):
    assert scale.dtype == np.float32
    if not normalize:
        wanted, wanted_scale = int8_model(rows)
        np.testing.assert_array_equal(got, wanted)
        assert scale == wanted_scale
        return
    values = rows.astype(np.float64)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    largest = np.abs(values).max(initial=0)
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-5)
    assert (np.abs(got * np.float64(scale) - values) <= 0.5001 * scale + 1e-5 * np.abs(values)).all()
    assert np.abs(got.astype(int)).max(initial=0) == (127 if largest else 0)


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("normalize", [False, True])
def test_every_dimension_length_and_dtype(isa, source, dtype, normalize):
    """Rows of documents back to back, with holes; the first rows and the last ones belong to none."""
    for dim in DIMENSIONS:
        offsets = boundaries(LENGTHS, 3)
        X = embeddings((offsets[-1] + 2, dim), source, seed=dim)
        mask = np.random.default_rng(dim).random(len(X)) < 0.7
        mask[offsets[3] : offsets[4]] = False
        X[~mask] = 0xFFFF if source == np.uint16 else np.nan
        X[:3] = X[-2:] = X[~mask][0]
        packed = pack_rows(X, mask, offsets, normalize=normalize, dtype=dtype)
        documents = [X[start:end][mask[start:end]] for start, end in itertools.pairwise(offsets)]
        check(packed, documents, normalize, dtype)


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("normalize", [False, True])
def test_padded(isa, dtype, normalize):
    X = embeddings((5, 13, 48), np.float32)
    packed = pack_rows(X, normalize=normalize, dtype=dtype)
    check(packed, list(X), normalize, dtype)
    mask = np.arange(13) < np.array([13, 0, 5, 1, 12])[:, None]
    packed = pack_rows(X, mask, normalize=normalize, dtype=dtype)
    check(packed, [x[kept] for x, kept in zip(X, mask, strict=True)], normalize, dtype)
    as_integers = pack_rows(X, mask.astype(np.int64) * 2, normalize=normalize, dtype=dtype)
    np.testing.assert_array_equal(as_integers[0], packed[0])


@pytest.mark.parametrize("dtype", STORAGES)
def test_strides(isa, dtype):
    X = embeddings((6, 26, 66), np.float32)
    mask = np.random.default_rng(0).random((6, 26)) < 0.7
    views = [X[:, :, ::2], X[:, ::-1, :33], X[::2, ::2], X.transpose(0, 2, 1), X.transpose(1, 0, 2), X[:, :, ::-1]]
    for view in views:
        kept = np.random.default_rng(0).random(view.shape[:2]) < 0.7
        for normalize in (False, True):
            got = pack_rows(view, kept, normalize=normalize, dtype=dtype)
            wanted = pack_rows(np.ascontiguousarray(view), kept, normalize=normalize, dtype=dtype)
            np.testing.assert_array_equal(got[0], wanted[0])
    assert mask.any()


@pytest.mark.parametrize("normalize", [False, True])
def test_special_values_in_floats(isa, normalize):
    """NaN and infinities stay in their row; zeros and rows too short to normalise do not become NaN."""
    X = embeddings((1, 9, 33), np.float32)
    X[0, 1, 5] = np.nan
    X[0, 3, 32] = np.inf
    X[0, 5] = 0
    X[0, 7] = 1e-20
    for dtype in FLOATS:
        tokens, _, _ = pack_rows(X, normalize=normalize, dtype=dtype)
        values = widened(tokens)
        assert np.isnan(values[1, 5])
        assert not np.isfinite(values[3, 32])
        np.testing.assert_array_equal(np.isfinite(values).all(1), [True, False, True, False] + 5 * [True])
        assert (values[5] == 0).all()


@pytest.mark.parametrize("source", FLOATS)
def test_bits_are_kept(isa, source):
    """The same storage without normalisation: NaN payloads, subnormals and signed zeros too."""
    bits = {np.float32: np.uint32, np.float16: np.uint16, np.uint16: np.uint16}[source]
    X = np.random.default_rng(0).integers(0, np.iinfo(bits).max, (1, 50, 33), dtype=bits).view(source)
    tokens, _, _ = pack_rows(X, normalize=False, dtype=source)
    np.testing.assert_array_equal(tokens.view(bits), X[0].view(bits))


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_rounding_to_even(isa, dtype):
    """Every value between two neighbours of the storage, subnormals of float16 and overflow included."""
    bits = np.arange(0, 0x7F80 if dtype == np.uint16 else 0x7C00, dtype=np.uint16)
    below = widened(bits.view(dtype)).astype(np.float64)
    above = np.append(below[1:], 65536.0 if dtype == np.float16 else 2.0**128)
    with np.errstate(over="ignore"):
        X = np.stack([below * (1 - t) + above * t for t in (0, 0.25, 0.5, 0.75)], 1).astype(np.float32)
    X = X[(X == 0).all(1) | (X >= 2.0**-126).all(1)]  # subnormal float32 counts as zero
    X = np.concatenate([X, -X])
    tokens, _, _ = pack_rows(X[None], normalize=False, dtype=dtype)
    np.testing.assert_array_equal(tokens, stored(X, dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("normalize", [False, True])
def test_int8_refuses_what_is_not_finite(isa, normalize, value):
    X = embeddings((300, 40, 17), np.float32)
    X[[211, 57, 290], 3, 16] = value
    with pytest.raises(ValueError, match="document 57 "):
        pack_rows(X, normalize=normalize, dtype=np.int8, threads=2)
    mask = np.isfinite(X).all(2)
    tokens, _, _ = pack_rows(X, mask, normalize=normalize, dtype=np.int8, threads=2)
    assert len(tokens) == 300 * 40 - 3


def test_int8_of_nothing_much(isa):
    """Zero, tiny and huge documents; the largest value of any size is 127 steps."""
    for size in (0.0, 1e-37, 3e-36, 1e-30, 1.0, 1e30, 3e38):
        X = np.linspace(-1, 1, 48, dtype=np.float32)[None, None] * np.float32(size)
        tokens, _, scales = pack_rows(X, normalize=False, dtype=np.int8)
        wanted, scale = int8_model(X[0])
        np.testing.assert_array_equal(tokens, wanted)
        assert scales[0] == scale
        assert np.isfinite(scales[0])


@pytest.mark.parametrize("dim", [33, 48, 64, 96, 128])
def test_norms_of_several_rows_have_the_bits_of_one(isa, dim):
    X = embeddings((3001, dim), np.float32)
    X[5], X[17], X[40], X[41] = 0.0, 1e-14, np.nan, np.inf
    X[100:150] *= np.float32(10) ** np.random.default_rng(0).integers(-20, 18, (50, 1))
    holes = np.random.default_rng(1).random(3001) < 0.8
    for dtype in (np.float16, np.float32):
        each = pack_rows(X, offsets=np.arange(3002), normalize=True, dtype=dtype)[0]
        for mask in (None, holes):
            together = pack_rows(X, mask, np.array([0, 3001]), normalize=True, dtype=dtype)[0]
            np.testing.assert_array_equal(together, each if mask is None else each[mask])


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("dim, source, kept", [(33, np.float16, 0.97), (48, np.float32, 0.97), (48, np.float32, 1.0)])
def test_large_results_and_threads(isa, dtype, dim, source, kept):
    """Above 16 MiB stores go past the caches: the same bits, for any number of threads, whatever they were aligned to."""
    size = np.dtype(dtype).itemsize
    lengths = np.random.default_rng(0).integers(0, 600, 2 * (17 << 20) // (size * dim * 600) + 60)
    offsets = boundaries(lengths)
    X = embeddings((offsets[-1], dim), source)
    mask = np.random.default_rng(1).random(len(X)) < kept
    for normalize in (False, True):
        packed = pack_rows(X, mask, offsets, normalize=normalize, dtype=dtype, threads=1)
        assert packed[0].nbytes > 16 << 20
        some = [0, 1, len(lengths) // 2, len(lengths) - 1]
        for n in some:
            start, end = offsets[n], offsets[n + 1]
            alone = pack_rows(X[start:end][mask[start:end]][None], normalize=normalize, dtype=dtype)
            np.testing.assert_array_equal(packed[0][packed[1][n] : packed[1][n + 1]], alone[0])
        if not normalize and dtype != np.int8:
            np.testing.assert_array_equal(packed[0], stored(widened(X[mask]), dtype))
        for threads in (2, 4):
            again = pack_rows(X, mask, offsets, normalize=normalize, dtype=dtype, threads=threads)
            np.testing.assert_array_equal(again[0], packed[0])
            np.testing.assert_array_equal(again[2], packed[2])
        memory = np.empty(packed[0].nbytes + 128, np.uint8)
        for shift in (size, 16, 32):  # bytes: aligned to an element, to a register of 16 or 32 bytes
            shift += -memory.ctypes.data % 64
            out = memory[shift : shift + packed[0].nbytes].view(dtype).reshape(packed[0].shape)
            pack_rows(X, mask, offsets, normalize=normalize, dtype=dtype, out=out)
            np.testing.assert_array_equal(out, packed[0])
    rows = unpack_rows(*packed, threads=1)
    values = widened(packed[0])
    if packed[2] is not None:
        values *= np.repeat(packed[2], np.diff(packed[1]))[:, None]
    np.testing.assert_array_equal(rows, values)
    np.testing.assert_array_equal(unpack_rows(*packed, threads=2), rows)


@pytest.mark.parametrize("dtype", STORAGES)
def test_unpack(isa, dtype):
    for dim in DIMENSIONS:
        offsets = boundaries(LENGTHS, 4)
        random = np.random.default_rng(dim)
        if dtype == np.int8:
            tokens = random.integers(-127, 128, (offsets[-1] + 3, dim)).astype(np.int8)
        else:
            tokens = embeddings((offsets[-1] + 3, dim), dtype, seed=dim)
        scales = random.random(len(LENGTHS)).astype(np.float32) if dtype == np.int8 else None
        wanted = widened(tokens[offsets[0] : offsets[-1]])
        if scales is not None:
            wanted = wanted * np.repeat(scales, LENGTHS)[:, None]
        np.testing.assert_array_equal(unpack_rows(tokens, offsets, scales), wanted)
        apart = np.zeros((len(tokens), 2 * dim + 1), dtype)[:, ::2][:, :dim]
        apart[:] = tokens
        np.testing.assert_array_equal(unpack_rows(apart, offsets, scales), wanted)


@settings(max_examples=60, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ("none",)),
    source=st.sampled_from(FLOATS),
    dtype=st.sampled_from(STORAGES),
    normalize=st.booleans(),
    shape=st.tuples(st.integers(0, 6), st.integers(0, 40), st.integers(1, 150)),
    keep=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_odd_shapes(isa, source, dtype, normalize, shape, keep, seed):
    _C.set_isa(isa)
    try:
        X = embeddings(shape, source, seed)
        mask = np.random.default_rng(seed).random(shape[:2]) < keep
        documents = [x[kept] for x, kept in zip(X, mask, strict=True)]
        check(pack_rows(X, mask, normalize=normalize, dtype=dtype), documents, normalize, dtype)
    finally:
        _C.set_isa("")


def test_scores_of_what_was_packed(isa, precision):
    """Packing to int8 moves a score by the rounding of its values, no further."""
    X = embeddings((20, 60, 48), np.float32)
    queries = embeddings((32, 48), np.float32, seed=1)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    rows = (X / np.linalg.norm(X, axis=2, keepdims=True)).astype(np.float64)
    wanted = (queries.astype(np.float64) @ rows.transpose(0, 2, 1)).max(2).sum(1)
    packed = pack_rows(X, normalize=True, dtype=np.int8)
    scores = score_packed(queries, np.array([0, 32]), *packed, precision=precision)[0]
    np.testing.assert_allclose(scores, wanted, atol=0.1)


class TestWrongInput:
    X = embeddings((2, 3, 4), np.float32)

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "names"),
        [
            (([[1.0]],), {}, TypeError, "X"),
            ((X[0],), {}, ValueError, "X"),
            ((X.astype(np.int8),), {}, TypeError, "X"),
            ((X[:, :, :0],), {}, ValueError, "X"),
            ((X, np.ones((2, 4))), {}, ValueError, "mask"),
            ((X[0], None, np.array([0, 4])), {}, ValueError, "offsets"),
            ((X, None, np.array([0, 4])), {}, ValueError, "X"),
            ((X,), {"dtype": np.int16}, TypeError, "result"),
            ((X,), {"dtype": "no such type"}, TypeError, "result"),
        ],
    )
    def test_is_named(self, arguments, options, error, names):
        with pytest.raises(error, match=names):
            pack_rows(*arguments, normalize=False, **options)

    def test_of_the_way_back(self):
        with pytest.raises(ValueError, match="scales"):
            unpack_rows(np.ones((3, 4), np.int8), np.array([0, 3]))
        with pytest.raises(ValueError, match="offsets"):
            unpack_rows(np.ones((3, 4), np.float16), np.array([0, 4]))


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_a_mask_that_changes_meanwhile(isa, dtype):
    """Tokens that were not counted are not written."""
    X, mask = embeddings((3, 40, 48), np.float32), np.zeros((3, 40), bool)
    mask[:, :7] = mask[:, 20] = True
    source = native.padded(X.ctypes.data, native.FLOAT32, X.shape, [40 * 48, 48, 1], mask.ctypes.data)
    offsets, scales = np.empty(4, np.int64), np.empty(3, np.float32)
    _C.pack_offsets(source, offsets.ctypes.data, 1)
    out = np.full((64, 48), 77, dtype)
    mask[:] = True
    code = native.INT8 if dtype == np.int8 else native.FLOAT16
    _C.pack(source, True, code, offsets.ctypes.data, out.ctypes.data, scales.ctypes.data, 1)
    assert offsets[-1] == 24 and (out[24:] == 77).all()


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_traffic_without_arithmetic(isa, ratio, threads):
    random = np.random.default_rng(0)
    read = random.integers(0, 14, 101)  # lines of a run, which as many follow that are skipped
    written = -(-read // ratio)
    runs = np.stack([np.cumsum(2 * read) - 2 * read, read, np.cumsum(written) - written], axis=1)
    source, out = empty_lines((2 * read.sum(), 16), np.float32), empty_lines((written.sum() + 1, 16), np.float32)
    source[:] = random.integers(0, 1000, source.shape)
    out[:] = -1
    _C.move_lines(source.ctypes.data, out.ctypes.data, runs.ctypes.data, len(runs), ratio, threads)
    sums = [source[k : min(k + ratio, i + n)].sum(0) for i, n, _ in runs for k in range(i, i + n, ratio)]
    np.testing.assert_array_equal(out[:-1], sums)
    assert (out[-1] == -1).all()


@pytest.mark.parametrize("change", [{"source": 4}, {"out": 32}, {"ratio": 3}])
def test_traffic_of_wrong_arguments(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        _C.move_lines(**{"source": 0, "out": 0, "runs": 0, "count": 0, "ratio": 1, "threads": 1} | change)
