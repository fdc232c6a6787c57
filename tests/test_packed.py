"""PackedEmbeddings in memory: every storage, every way to make one and to look into it, and scores straight from it."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgecolbert_kernels as ek
from cases import embeddings, grid, holes, padded, ragged
from edgecolbert_kernels import PackedEmbeddings, dtypes

DTYPES = ("float16", "bfloat16", "float32", "int8")
FLOATS = DTYPES[:3]
LENGTHS = (3, 0, 7, 300, 1, 0, 12)


def brute_force(queries, documents) -> np.ndarray:
    """float64 scores of lists of [L, d]."""
    scores = np.zeros((len(queries), len(documents)))
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            if len(query) and len(document):
                scores[i, j] = (query.astype(np.float64) @ document.astype(np.float64).T).max(1).sum()
    return scores


def values(packed: PackedEmbeddings) -> list[np.ndarray]:
    """What is stored, in float32."""
    return list(packed.to("float32"))


def documents(dim=48, lengths=LENGTHS, seed=1) -> list[np.ndarray]:
    return [rows.numpy() for rows in ragged(lengths, dim, seed=seed)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored(dtype):
    given = documents()
    packed = PackedEmbeddings.from_list(given, dtype=dtype)
    # Half a step of each storage, relative to the largest value of a document.
    relative = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127 * (1 + 1e-5)}[dtype]
    for rows, wanted in zip(values(packed), given, strict=True):
        assert rows.shape == wanted.shape
        assert np.abs(rows - wanted).max(initial=0) <= relative * np.abs(wanted).max(initial=0)
    assert packed.dtype == dtype
    assert packed.dim == 48
    assert len(packed) == len(LENGTHS)
    assert packed.lengths.tolist() == list(LENGTHS)
    assert packed.offsets.tolist() == np.cumsum([0, *LENGTHS]).tolist()
    size = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[dtype]
    scales = 4 * len(packed) if dtype == "int8" else 0
    assert packed.nbytes == sum(LENGTHS) * 48 * size + 8 * (len(packed) + 1) + scales
    assert dtype in repr(packed)
    assert str(len(packed)) in repr(packed)


def test_rounding_is_that_of_torch():
    rows = embeddings(200, 48, seed=3) * torch.logspace(-8, 3, 200)[:, None]
    for dtype in ("float16", "bfloat16"):
        packed = PackedEmbeddings.from_list([rows], dtype=dtype)
        wanted = rows.to(getattr(torch, dtype)).view(torch.int16).numpy()
        np.testing.assert_array_equal(packed.tokens.view(np.int16), wanted)


def test_bfloat16_ties_and_special_values():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 1], np.uint32)
    found = dtypes.narrow("x", bits.view(np.float32)[None], "bfloat16")[0]
    assert found[:5].tolist() == [0x3F80, 0x3F82, 0x3F80, 0x7F80, 0xFF80]
    assert all((found[5:7] & 0x7F80) == 0x7F80)
    assert all(found[5:7] & 0x7F)
    assert found[7] == 0


def test_int8_by_hand():
    rows = np.array([[1.27, -0.635], [0.004, 0.006]], np.float32)
    packed = PackedEmbeddings.from_list([rows, np.zeros((3, 2), np.float32), -rows], dtype="int8")
    np.testing.assert_allclose(packed.scales, [0.01, 0, 0.01], rtol=1e-6)
    assert packed.tokens[:2].tolist()[0] == [127, -64 if packed.tokens[0, 1] == -64 else -63]
    assert packed.tokens[1].tolist() == [0, 1]
    assert not packed.tokens[2:5].any()
    assert packed.tokens.min() >= -127
    np.testing.assert_array_equal(packed[1], np.zeros((3, 2)))


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1.9e-36, 2.1e-36, 1.0, 3e38])
def test_int8_at_the_ends_of_float32(magnitude):
    rows = np.array([[1, -1, 0.5, 0]], np.float32) * np.float32(magnitude)
    packed = PackedEmbeddings.from_list([rows], dtype="int8")
    assert packed.tokens.tolist() == ([[127, -127, 64, 0]] if magnitude > 2e-36 else [[0] * 4])
    assert packed.scales[0] == (rows.max() / np.float32(127) if magnitude > 2e-36 else 0)
    again = dtypes.quantize("rows", rows)
    np.testing.assert_array_equal(again[0], packed.tokens)
    assert again[1] == packed.scales[0]


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("float16", 65520.0), ("bfloat16", 3.4e38)])
def test_too_large_for_the_storage(dtype, value):
    with pytest.raises(ValueError, match=r"documents\[1\].*" + dtype):
        PackedEmbeddings.from_list([np.ones((1, 2), np.float32), np.array([[0, value]], np.float32)], dtype=dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad):
    """int8 has no way to say it; floats keep it, and scores follow IEEE as everywhere."""
    rows = np.array([[0, bad]], np.float32)
    with pytest.raises(ValueError, match="int8"):
        PackedEmbeddings.from_list([rows], dtype="int8")
    for dtype in FLOATS:
        np.testing.assert_array_equal(values(PackedEmbeddings.from_list([rows], dtype=dtype))[0], rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_tensors_are_stored_alike(dtype):
    rows = ragged(LENGTHS, 16, seed=4, dtype=torch.float16)
    from_tensors = PackedEmbeddings.from_list([x.requires_grad_(False) for x in rows], dtype=dtype)
    from_arrays = PackedEmbeddings.from_list([x.numpy() for x in rows], dtype=dtype)
    np.testing.assert_array_equal(from_tensors.tokens, from_arrays.tokens)
    foreign = PackedEmbeddings.from_list([x.numpy().astype(">f8") for x in rows], dtype=dtype)
    np.testing.assert_array_equal(foreign.tokens, from_arrays.tokens)
    if dtype == "bfloat16":
        bits = [x.bfloat16() for x in rows]
        kept = PackedEmbeddings.from_list(bits, dtype=torch.bfloat16)
        np.testing.assert_array_equal(kept.tokens.view(np.int16), torch.cat(bits).view(torch.int16).numpy())


def test_generators():
    rows = documents()
    packed = PackedEmbeddings.from_list((each for each in rows), (str(n) for n in range(len(rows))))
    assert packed.lengths.tolist() == list(LENGTHS)
    joined = PackedEmbeddings.concatenate(packed[n : n + 1] for n in range(len(packed)))
    assert joined.ids == packed.ids
    assert packed.append((each for each in rows[:2]), ["x", "y"]).lengths.tolist() == [*LENGTHS, *LENGTHS[:2]]


def test_nothing_of_no_dim():
    for nothing in ([], iter([])):
        with pytest.raises(ValueError, match="at least one document, or dim"):
            PackedEmbeddings.from_list(nothing)


def test_contains():
    packed = PackedEmbeddings.from_list(documents(), list("abcdefg"))
    view = packed[2:5]
    assert [name in view for name in "abcdefg"] == [False, False, True, True, True, False, False]
    assert 3 not in view
    assert "h" not in view.append(documents()[:1], ["z"])
    assert "a" not in view.with_ids(None)


def test_dtype_names():
    for dtype in ("float16", np.float16, np.dtype("float16"), torch.float16):
        assert PackedEmbeddings.empty(4, dtype).dtype == "float16"
    for bad in ("float64", np.int16, torch.int32, None, "fp16"):
        with pytest.raises(ValueError, match="dtype"):
            PackedEmbeddings.empty(4, bad)


def test_from_padded():
    rows = ragged((3, 0, 5), 8, seed=5)
    X, mask = padded(rows)
    packed = PackedEmbeddings.from_padded(X, mask, dtype="float32")
    for found, wanted in zip(packed, rows, strict=True):
        np.testing.assert_array_equal(found, wanted)
    mask = holes(3, 5, seed=1) & mask
    packed = PackedEmbeddings.from_padded(X.numpy(), mask.numpy().astype(np.int32), ids=[7, 8, 9], dtype="float32")
    for found, each, keep in zip(packed, X, mask, strict=True):
        np.testing.assert_array_equal(found, each[keep])
    assert packed.ids == [7, 8, 9]
    assert len(PackedEmbeddings.from_padded(np.zeros((0, 5, 8), np.float32))) == 0
    with pytest.raises(ValueError, match="mask"):
        PackedEmbeddings.from_padded(X, mask[:, :4])
    bits = X[:1].nan_to_num().bfloat16()
    np.testing.assert_array_equal(
        PackedEmbeddings.from_padded(bits, dtype="bfloat16").tokens.view(np.int16), bits[0].view(torch.int16)
    )


def test_from_arrays_shares_memory():
    tokens, offsets = np.ones((6, 4), np.float16), np.array([0, 2, 6])
    packed = PackedEmbeddings.from_arrays(tokens, offsets)
    assert np.shares_memory(packed.tokens, tokens)
    eights = PackedEmbeddings.from_arrays(np.full((6, 4), 3, np.int8), offsets, [0.5, 2])
    assert eights[1].max() == 6
    for bad in ([0, 7], [1, 6], [0, 4, 3, 6], [0, 5], []):
        with pytest.raises(ValueError, match="offsets"):
            PackedEmbeddings.from_arrays(tokens, np.array(bad, np.int64))
    for bad in ([-1, 1], [np.nan, 1], [1]):
        with pytest.raises(ValueError, match="scales"):
            PackedEmbeddings.from_arrays(np.ones((6, 4), np.int8), offsets, bad)
    with pytest.raises(ValueError, match="-128"):
        PackedEmbeddings.from_arrays(np.full((6, 4), -128, np.int8), offsets, [1, 1])
    assert len(PackedEmbeddings.from_arrays(np.zeros((0, 4), np.int8), [0, 0], [1])) == 1
    with pytest.raises(TypeError, match="scales"):
        PackedEmbeddings.from_arrays(tokens, offsets, [1, 1])
    with pytest.raises(TypeError, match="scales"):
        PackedEmbeddings.from_arrays(tokens.astype(np.int8), offsets)
    with pytest.raises(TypeError, match="offsets"):
        PackedEmbeddings.from_arrays(tokens, offsets / 2)


@pytest.mark.parametrize("documents", [[np.ones((2, 3)), np.ones((2, 4))], [np.ones(3)], [np.ones((1, 0))], []])
def test_wrong_shapes(documents):
    with pytest.raises(ValueError):
        PackedEmbeddings.from_list(documents)


@pytest.mark.parametrize("bad", [[[1.0]], ["text"], [np.ones((1, 2), np.int32)], [np.ones((1, 2), complex)], [None]])
def test_wrong_types(bad):
    with pytest.raises(TypeError, match=r"documents\[0\]"):
        PackedEmbeddings.from_list(bad)


def test_ids():
    rows = documents(4, (1, 2, 3))
    for names in (["x", "", "häß\0\U0001f600"], [5, -(2**63), 2**63 - 1]):
        packed = PackedEmbeddings.from_list(rows, names)
        assert packed.ids == names
        assert [packed.position(name) for name in names] == [0, 1, 2]
        assert packed[1:].ids == names[1:]
        assert packed[[2, 0]].ids == [names[2], names[0]]
        with pytest.raises(KeyError):
            packed.position("absent")
    assert PackedEmbeddings.from_list(rows, np.array([3, 1, 2])).ids == [3, 1, 2]
    for bad in (["a", "b"], ["a", "a", "b"], [1, 2, 2**63], ["a", "b", "\ud800"]):
        with pytest.raises(ValueError, match="ids"):
            PackedEmbeddings.from_list(rows, bad)
    for bad in (["a", "b", 1], [1, 2, True], [1.5, 2, 3], [None, "a", "b"]):
        with pytest.raises(TypeError):
            PackedEmbeddings.from_list(rows, bad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_ids(dtype):
    packed = PackedEmbeddings.from_list(documents(), list("abcdefg"), dtype=dtype)
    for view in (packed, packed[2:5], packed[[3, 3, 0]], packed[::-1], packed[:0]):
        named = view.with_ids(range(len(view)))
        assert named.ids == list(range(len(view)))
        assert [named.position(n) for n in named.ids] == named.ids
        assert view.with_ids(None).ids is None
        for found, wanted in zip(named, view, strict=True):
            np.testing.assert_array_equal(found, wanted)
        with pytest.raises(ValueError, match="ids"):
            view.with_ids(range(len(view) + 1))
    assert packed.ids == list("abcdefg")
    assert np.shares_memory(packed[2:5].with_ids([1, 2, 3]).tokens, packed.tokens)
    assert ek.pack(np.ones((2, 3, 4), np.float32)).with_ids(["a", "b"]).position("b") == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype):
    packed = PackedEmbeddings.from_list(documents(), list("abcdefg"), dtype=dtype)
    whole = values(packed)
    mask = np.array([True, False, True, True, False, False, True])
    for key in (
        slice(None), slice(2, 5), slice(5, 2), slice(None, None, -1), slice(1, None, 2), slice(-3, None),
        [3, 3, 0], np.array([], np.int64), [], np.array([6], np.uint8), mask, torch.tensor([1, 2]), torch.from_numpy(mask),
    ):  # fmt: skip
        view = packed[key]
        numbers = np.arange(7)[key if isinstance(key, slice) else np.asarray(key) if len(key) else np.zeros(0, int)]
        assert view.ids == [packed.ids[n] for n in numbers]
        assert len(view) == len(numbers)
        assert view.lengths.tolist() == packed.lengths[numbers].tolist()
        assert view.num_tokens == view.lengths.sum() == len(view.tokens)
        for found, n in zip(values(view), numbers, strict=True):
            np.testing.assert_array_equal(found, whole[n])
        again = view[::-1]
        assert again.ids == view.ids[::-1]
        for name in view.ids:
            assert view.ids[view.position(name)] == name
    np.testing.assert_array_equal(packed[-1], packed[6])
    for bad in (7, -8):
        with pytest.raises(IndexError, match="7"):
            packed[bad]
    for bad in ([7], [-1]):
        with pytest.raises(IndexError):
            packed[bad]
    with pytest.raises(TypeError):
        packed["a"]
    with pytest.raises(TypeError):
        packed[[0.5]]
    with pytest.raises(ValueError, match="mask"):
        packed[np.ones(6, bool)]


def test_views_share_memory_and_cannot_be_written():
    packed = PackedEmbeddings.from_list(documents())
    assert np.shares_memory(packed[2:4].tokens, packed.tokens)
    for array in (packed.tokens, packed[3], packed[2:4].tokens):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(AttributeError):
        packed.dtype = "int8"


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_conversion(source, target):
    packed = PackedEmbeddings.from_list(documents(), dtype=source)
    converted = packed.to(target)
    assert converted.dtype == target
    wanted = PackedEmbeddings.from_list(values(packed), dtype=target)
    np.testing.assert_array_equal(converted.tokens, packed.tokens if source == target else wanted.tokens)
    part = packed[[3, 0, 6]].to(target)
    assert part.lengths.tolist() == [300, 3, 12]


def test_conversion_goes_by_blocks(monkeypatch):
    packed = PackedEmbeddings.from_list(documents(), dtype="float16")
    whole = packed.to("int8")
    monkeypatch.setattr("edgecolbert_kernels.packed.tokens.BLOCK_BYTES", 1)
    np.testing.assert_array_equal(packed.to("int8").tokens, whole.tokens)


def test_concatenate():
    rows = documents()
    parts = [
        PackedEmbeddings.from_list(rows[:3], dtype="float32"),
        PackedEmbeddings.from_list(rows[3:], dtype="float32"),
    ]
    joined = PackedEmbeddings.concatenate([*parts, parts[0][:0]])
    for found, wanted in zip(joined, rows, strict=True):
        np.testing.assert_array_equal(found, wanted)
    mixed = PackedEmbeddings.concatenate([parts[0].to("int8"), parts[1]])
    assert mixed.dtype == "int8"
    np.testing.assert_array_equal(mixed[3:].tokens, parts[1].to("int8").tokens)
    with pytest.raises(ValueError):
        PackedEmbeddings.concatenate([])
    with pytest.raises(ValueError, match="have dim 3; want 48"):
        PackedEmbeddings.concatenate([parts[0], PackedEmbeddings.empty(3)])
    with pytest.raises(ValueError, match="ids"):
        PackedEmbeddings.concatenate([parts[0], PackedEmbeddings.from_list(rows[:1], ["a"])])


def test_pickle():
    packed = PackedEmbeddings.from_list(documents(), list("abcdefg"), dtype="int8")[2:6]
    again = pickle.loads(pickle.dumps(packed))
    np.testing.assert_array_equal(again.tokens, packed.tokens)
    assert again.ids == packed.ids


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(engine, precision, dtype):
    """Of what is stored: quantisation is not the score's error."""
    queries = [rows.numpy() for rows in ragged((5, 32, 1), 48, seed=7)]
    packed = PackedEmbeddings.from_list(documents(), dtype=dtype)
    wanted = brute_force(queries, values(packed))
    # "fast" on int8 rounds the query to 7 bits.
    tolerance = 2e-5 if precision == "exact" else 0.15 if dtype == "int8" else 5e-3
    np.testing.assert_allclose(ek.maxsim(queries, packed, precision=precision), wanted, atol=tolerance)
    np.testing.assert_allclose(ek.maxsim(queries[1], packed, precision=precision), wanted[1], atol=tolerance)
    pairs = [0, 2, 1, 1], [6, 3, 3, 1]
    found = ek.maxsim_indexed(queries, packed, *pairs, precision=precision)
    np.testing.assert_allclose(found, wanted[pairs], atol=tolerance)
    for view, numbers in (
        (packed[2:5], slice(2, 5)),
        (packed[[4, 3, 3]], [4, 3, 3]),
        (packed.remove([0]), slice(1, 7)),
    ):
        np.testing.assert_allclose(ek.maxsim(queries, view, precision=precision), wanted[:, numbers], atol=tolerance)
        found = ek.maxsim_indexed(queries, view, [0, 1], [2, 0], precision=precision)
        np.testing.assert_allclose(found, wanted[:, numbers][[0, 1], [2, 0]], atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_tensors(engine, dtype):
    Q, q_mask = embeddings(4, 12, 48, seed=8), holes(4, 12, seed=9)
    packed = PackedEmbeddings.from_list(documents(), dtype=dtype)
    found = ek.maxsim(Q, packed, q_mask)
    assert type(found) is torch.Tensor
    np.testing.assert_array_equal(found.numpy(), ek.maxsim(Q.numpy(), packed, q_mask.numpy()))
    index = torch.tensor([3, 0]), torch.tensor([3, 6])
    pairs = ek.maxsim_indexed(Q, packed, *index, q_mask)
    np.testing.assert_allclose(pairs.numpy(), found[index].numpy(), atol=1e-6)
    assert ek.maxsim(Q, packed, out_dtype=torch.float64).dtype == torch.float64
    assert ek.maxsim(Q.numpy(), packed, out_dtype=np.float64).dtype == np.float64


def test_gradients_go_to_the_queries(engine):
    Q = embeddings(2, 5, 16, seed=8).requires_grad_()
    packed = PackedEmbeddings.from_list(documents(16), dtype="float32")
    ek.maxsim(Q, packed).sum().backward()
    found, Q.grad = Q.grad, None
    ek.maxsim(Q, [torch.from_numpy(rows) for rows in documents(16)]).sum().backward()
    torch.testing.assert_close(found, Q.grad)


def test_many_runs_and_blocks(monkeypatch):
    """Scattered documents, long runs and short ones, in blocks of a few documents."""
    monkeypatch.setattr("edgecolbert_kernels.packed.tokens.BLOCK_BYTES", 4000)
    monkeypatch.setattr("edgecolbert_kernels.packed.tokens.RUN_DOCUMENTS", 4)
    random = np.random.default_rng(3)
    rows = documents(8, tuple(random.integers(0, 20, 100)))
    Q = grid(3, 5, 8, seed=1).numpy()
    for dtype in DTYPES:
        packed = PackedEmbeddings.from_list(rows, dtype=dtype)
        scores = ek.maxsim(Q, packed)
        for _ in range(20):
            index = random.permutation(100)[: random.integers(0, 100)]
            if random.random() < 0.7:
                index = np.sort(index)
            np.testing.assert_array_equal(ek.maxsim(Q, packed[index]), scores[:, index])
            if len(index):
                query, document = random.integers(0, 3, 30), random.integers(0, len(index), 30)
                found = ek.maxsim_indexed(Q, packed[index], query, document)
                np.testing.assert_array_equal(found, scores[query, index[document]])


@pytest.mark.parametrize(("dtype", "normalize"), [*((d, False) for d in DTYPES), *((d, True) for d in FLOATS)])
def test_documents_are_read_where_they_lie(monkeypatch, dtype, normalize):
    """Chosen ones too, here and there, without a copy, and with the bits of all in a row."""
    packed = PackedEmbeddings.from_list(documents(lengths=LENGTHS * 30), dtype=dtype)
    Q, q_mask = embeddings(3, 32, 48, seed=8), holes(3, 32, seed=9)
    index = np.random.default_rng(1).permutation(200)[:77]
    for precision in ("exact", "fast"):
        wanted = ek.maxsim(Q, packed, q_mask, normalize=normalize, precision=precision)
        with monkeypatch.context() as patch:
            for name in ("_gathered", "floats", "blocks"):
                patch.setattr(f"edgecolbert_kernels.packed.tokens.PackedTokens.{name}", None)
            options = {"normalize": normalize, "precision": precision}
            chosen = packed[index]
            for _ in range(2):
                assert torch.equal(ek.maxsim(Q, chosen, q_mask, **options), wanted[:, index])
            assert torch.equal(ek.maxsim(Q[0], chosen, q_mask[0], **options), wanted[0, index])
            found = ek.maxsim(Q[0].numpy(), chosen[3:], q_mask[0].numpy(), **options)
            np.testing.assert_array_equal(found, wanted[0, index[3:]].numpy())
            pairs = ek.maxsim_indexed(Q, chosen, [0] * 5, [4, 0, 76, 4, 9], q_mask, **options)
            assert torch.equal(pairs, wanted[0, index[[4, 0, 76, 4, 9]]])


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"mask_mode": "zero"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_does_not_depend_on_the_batch(threads, precision, dtype, options):
    packed = PackedEmbeddings.from_list(documents(lengths=LENGTHS * 10), dtype=dtype)
    Q, index = embeddings(4, 32, 48, seed=8), np.random.default_rng(1).permutation(70)[:40]
    options = {**options, "precision": precision}
    for view in (packed, packed[3:50], packed[index]):
        one = torch.stack([ek.maxsim(query, view, **options) for query in Q])
        pairs = [np.repeat(range(4), len(view)), np.tile(range(len(view)), 4)]
        assert torch.equal(ek.maxsim(Q, view, **options), one)
        assert torch.equal(ek.maxsim([*Q], view, **options), one)
        for number in (1, 2, 4):
            threads(number)
            assert torch.equal(ek.maxsim_indexed(Q, view, *pairs, **options), one.flatten())
        np.testing.assert_array_equal(ek.maxsim(Q.numpy(), view, **options), one.numpy())


def test_copies_have_their_own_memory():
    """What kernels were told of the arrays of one view is not told of a copy's."""
    packed, Q = PackedEmbeddings.from_list(documents()), embeddings(2, 5, 48, seed=8)
    for view in (packed, packed._part(np.arange(5))):
        wanted = ek.maxsim(Q, view)
        for again in (copy.copy(view), copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
            assert again.operand is None
            assert torch.equal(ek.maxsim(Q, again), wanted)


def test_arrays_that_change_or_lie_oddly():
    """Boundaries are copied, so that nobody moves them out of the storage; tokens at odd addresses are read all the same."""
    rows = np.concatenate(documents(16)).astype(np.float16)
    offsets = np.cumsum([0, *LENGTHS])
    odd = np.zeros(rows.nbytes + 1, np.uint8)[1:].view(np.float16).reshape(rows.shape)
    odd[:] = rows
    Q = embeddings(2, 5, 16, seed=8)
    wanted = ek.maxsim(Q, PackedEmbeddings.from_list(documents(16)))
    for tokens in (rows, odd, np.asfortranarray(rows), np.repeat(rows, 2, axis=1)[:, ::2]):
        boundaries = offsets.copy()
        packed = PackedEmbeddings.from_arrays(tokens, boundaries)
        boundaries[:] = 10**9
        assert torch.equal(ek.maxsim(Q, packed), wanted)
        assert torch.equal(ek.maxsim(Q, pickle.loads(pickle.dumps(packed))), wanted)


def test_wrong_calls():
    packed = PackedEmbeddings.from_list(documents())
    Q = np.ones((2, 3, 48), np.float32)
    with pytest.raises(ValueError, match="d_mask"):
        ek.maxsim(Q, packed, None, np.ones(5))
    with pytest.raises(ValueError, match="last dimension"):
        ek.maxsim(Q[:, :, :5], packed)
    with pytest.raises(IndexError, match="document_index"):
        ek.maxsim_indexed(Q, packed, [0], [7])
    with pytest.raises(IndexError, match="document_index"):
        ek.maxsim_indexed(Q, packed[:3], [0], [3])
    with pytest.raises(IndexError, match="query_index"):
        ek.maxsim_indexed(Q, packed, [2], [0])
    with pytest.raises(ValueError, match="query_index"):
        ek.maxsim_indexed(Q, packed, [0, 1], [0])
    with pytest.raises(ValueError, match="precision"):
        ek.maxsim(Q, packed, precision="exactly")
    with pytest.raises(TypeError, match="PackedEmbeddings"):
        ek.maxsim_pairs(Q, packed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_documents(engine, dtype):
    Q = np.ones((2, 3, 48), np.float32)
    for packed in (PackedEmbeddings.empty(48, dtype), PackedEmbeddings.from_list(documents(), dtype=dtype)[[]]):
        assert len(packed) == packed.num_tokens == 0
        assert ek.maxsim(Q, packed).shape == (2, 0)
        assert ek.maxsim(torch.from_numpy(Q), packed).shape == (2, 0)
        assert ek.maxsim_indexed(Q, packed, [], []).shape == (0,)
        assert packed.to("int8").dtype == "int8"


SHAPES = st.lists(st.integers(0, 9), max_size=12)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 70), st.sampled_from(DTYPES), st.data())
def test_any_shapes(lengths, dim, dtype, data):
    rows = documents(dim, lengths)
    packed = PackedEmbeddings.from_list(rows, dtype=dtype, dim=dim)
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=15)) if lengths else []
    view = packed[index]
    queries = [x.numpy() for x in ragged(data.draw(SHAPES), dim, seed=2)]
    if not queries:
        return
    wanted = brute_force(queries, values(view))
    np.testing.assert_allclose(ek.maxsim(queries, view), wanted, atol=1e-5)


# pack


def reference(hidden, mask, weight, bias, normalize):
    rows = hidden.double()[mask.bool()]
    rows = rows if weight is None else rows @ weight.double().T
    rows = rows if bias is None else rows + bias.double()
    return torch.nn.functional.normalize(rows, dim=-1, eps=1e-12) if normalize else rows


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("projected", ["no", "weight", "weight and bias"])
@pytest.mark.parametrize("dense", [False, True], ids=["gathered", "whole"])
def test_pack(monkeypatch, backend, kind, dtype, normalize, projected, dense):
    monkeypatch.setattr("edgecolbert_kernels.packing.BLOCK_ROWS", 7)
    hidden, mask = embeddings(5, 13, 24, seed=1), holes(5, 13, seed=2)
    mask[3] = False
    monkeypatch.setattr("edgecolbert_kernels.packing.DENSE", 0.0 if dense else 1.0)
    weight = embeddings(8, 24, seed=3) if projected != "no" else None
    bias = embeddings(8, seed=4) if projected == "weight and bias" else None
    wanted = reference(hidden, mask, weight, bias, normalize)
    arguments = [x if x is None or kind == "torch" else x.numpy() for x in (hidden, mask, weight, bias)]
    packed = ek.pack(*arguments, normalize=normalize, dtype=dtype)
    assert packed.dtype == dtype
    assert packed.lengths.tolist() == mask.sum(1).tolist()
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3, "int8": 1e-2}[dtype]
    np.testing.assert_allclose(np.concatenate(values(packed)), wanted, atol=tolerance)
    listed = ek.pack(list(arguments[0]), list(arguments[1]), *arguments[2:], normalize=normalize, dtype=dtype)
    # A matrix product may add in another order when its rows are other ones.
    exactly = {} if projected == "no" or not dense else {"atol": tolerance, "rtol": 0}
    np.testing.assert_allclose(*(np.concatenate(values(each)) for each in (listed, packed)), **{"rtol": 0, **exactly})


def test_pack_behind_a_mask(backend):
    """What is masked may be anything: nothing is said of it, and nothing of it is stored."""
    hidden, mask = embeddings(4, 9, 16, seed=1).numpy(), np.ones((4, 9), bool)
    wanted = ek.pack(hidden, mask, np.eye(16, dtype=np.float32))
    mask[:, 7:], hidden[:, 7], hidden[:, 8] = False, np.inf, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = ek.pack(hidden, mask, np.eye(16, dtype=np.float32))
    np.testing.assert_array_equal(packed.tokens.reshape(4, 7, 16), wanted.tokens.reshape(4, 9, 16)[:, :7])


def test_pack_details():
    zeros = ek.pack(np.zeros((1, 2, 3), np.float32))
    assert not zeros.tokens.any()
    assert len(ek.pack(np.zeros((0, 2, 3), np.float32))) == 0
    assert ek.pack(np.zeros((2, 0, 3), np.float32)).lengths.tolist() == [0, 0]
    hidden = embeddings(2, 3, 4, dtype=torch.bfloat16).requires_grad_()
    assert ek.pack(hidden, dtype="bfloat16").tokens.dtype == np.uint16
    X = np.ones((2, 3, 4), np.float32)
    for bad in ({"mask": np.ones((2, 4))}, {"mask": np.ones((3, 3))}, {"weight": np.ones((2, 5), np.float32)},
                {"bias": np.ones(4, np.float32)},
                {"weight": np.ones((2, 4), np.float32), "bias": np.ones(3, np.float32)}):  # fmt: skip
        with pytest.raises(ValueError, match=next(reversed(bad))):
            ek.pack(X, **bad)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="int8"):
            ek.pack(X * bad, dtype="int8")
    with pytest.raises(TypeError, match="hidden"):
        ek.pack(3)
    with pytest.raises(TypeError, match="hidden"):
        ek.pack(X.astype(int))
    with pytest.raises(ValueError, match="float16"):
        ek.pack(X * 1e6, normalize=False)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chosen_documents_with_many_queries(dtype, precision):
    """Wherever they lie, however often they are chosen, they score as among all documents."""
    lengths = [*LENGTHS, 130, 200, 1, 0, 7]
    packed = PackedEmbeddings.from_list([x.numpy() for x in ragged(lengths, 48, seed=4)], dtype=dtype)
    Q = embeddings(5, 32, 48, seed=5)
    q_mask = torch.rand(5, 32, generator=torch.Generator().manual_seed(0)) < 0.7
    count = len(lengths)
    for chosen in ([count - 2, 0, 5, 5, 1], np.arange(count)[::-1].copy(), [], np.arange(count) % 3 == 0):
        columns = np.flatnonzero(chosen) if np.asarray(chosen).dtype == bool else np.array(chosen, int)
        for q, mask in ((Q, None), (Q, q_mask), (Q[0], None), (Q[:1], None)):
            wanted = ek.maxsim(q, packed, mask, precision=precision)[..., columns]
            assert torch.equal(ek.maxsim(q, packed[chosen], mask, precision=precision), wanted)
            found = ek.maxsim(q.numpy(), packed[chosen], None if mask is None else mask.numpy(), precision=precision)
            np.testing.assert_array_equal(found, wanted.numpy())
