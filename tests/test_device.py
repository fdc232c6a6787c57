"""Packed embeddings as tensors: packing, scoring, streaming and search, on the CPU and on a GPU where there is one.

The streams of CUDA are stood in for by a device that works as late as events allow: what is not waited for is not there.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import edgecolbert_kernels as ek
from cases import embeddings, grid, holes, ragged
from edgecolbert_kernels.device import embeddings as there
from edgecolbert_kernels.device import packing, scores, search, stream

LENGTHS = (3, 0, 17, 40, 5, 9, 1, 0, 26)
HALF_STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def place(request):
    return torch.device(request.param)


def documents(dtype="float16", dim=48, ids=None, lengths=LENGTHS):
    return ek.PackedEmbeddings.from_list(ragged(lengths, dim, seed=3), ids, dtype=dtype)


def on(packed, place):
    return there.from_host(packed, place, ek.PackedEmbeddings)


def queries(place, count=4, length=7, dim=48, dtype=torch.float32):
    return embeddings(count, length, dim, seed=9, dtype=dtype).to(place)


def near(found, wanted, **tolerance):
    torch.testing.assert_close(found.cpu(), wanted.cpu(), **{"rtol": 2e-6, "atol": 2e-5, **tolerance})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
class TestScores:
    def test_every_pair(self, place, dtype):
        packed = documents(dtype)
        for Q in (queries(place), queries(place)[0], queries(place, dtype=torch.float16)):
            near(ek.maxsim(Q, on(packed, place)), ek.maxsim(Q.cpu(), packed))

    def test_masks_lists_and_options(self, place, dtype):
        packed, mask = documents(dtype), holes(4, 7, seed=1)
        near(
            ek.maxsim(queries(place), on(packed, place), mask.to(place), normalize=True),
            ek.maxsim(queries("cpu"), packed, mask, normalize=True),
        )
        listed = [queries("cpu")[0], queries("cpu")[1, :3]]
        near(ek.maxsim([q.to(place) for q in listed], on(packed, place)), ek.maxsim(listed, packed))

    def test_chosen_pairs(self, place, dtype):
        packed = documents(dtype)
        index = torch.tensor([3, 0, 0, 2, 1, 3]), torch.tensor([8, 1, 2, 8, 4, 0])
        wanted = ek.maxsim_indexed(queries("cpu"), packed, *index)
        near(ek.maxsim_indexed(queries(place), on(packed, place), *(each.to(place) for each in index)), wanted)
        assert ek.maxsim_indexed(queries(place), on(packed, place), *(each[:0].to(place) for each in index)).shape == (
            0,
        )

    def test_gradient_to_the_queries(self, place, dtype):
        packed, wanted = documents(dtype), queries("cpu").requires_grad_()
        found = queries(place).requires_grad_()
        ek.maxsim(wanted, packed).sum().backward()
        ek.maxsim(found, on(packed, place)).sum().backward()
        near(found.grad, wanted.grad)

    @pytest.mark.parametrize("options", [{}, {"ids": ["b", "f", "h"]}, {"filter": [8, 2, 3, 0]}], ids=str)
    def test_search(self, place, dtype, options):
        packed = documents(dtype, ids=list("abcdefghi"))
        for k in (1, 4, 20):
            for Q in (queries("cpu"), queries("cpu")[0]):
                scores, indices = ek.search(Q, packed, k, **options)
                found = ek.search(Q.to(place), on(packed, place), k, **options)
                near(found[0].nan_to_num(), scores.nan_to_num())
                assert torch.equal(found[1].cpu(), indices)
                assert found[1].device.type == place.type

    def test_candidates(self, place, dtype):
        packed = documents(dtype)
        candidates = [[1, 2, 8], [3], [], [5, 0, 5]]
        scores, indices = ek.search(queries("cpu"), packed, 2, candidates=candidates)
        found = ek.search(queries(place), on(packed, place), 2, candidates=candidates)
        near(found[0], scores)
        assert torch.equal(found[1].cpu(), indices)

    def test_small_blocks(self, place, dtype, monkeypatch):
        """Pieces of any size give the same answers."""
        packed = documents(dtype)
        wanted = ek.maxsim(queries("cpu"), packed), ek.search(queries("cpu"), packed, 3)
        monkeypatch.setattr(scores, "WIDENED_BYTES", 4 * 48 * 10)
        monkeypatch.setattr(search, "KEYS", 4)
        monkeypatch.setattr(search, "QUERIES", 3)
        near(ek.maxsim(queries(place), on(packed, place)), wanted[0])
        found = ek.search(queries(place), on(packed, place), 3)
        near(found[0], wanted[1][0])
        assert torch.equal(found[1].cpu(), wanted[1][1])

    def test_and_back(self, place, dtype):
        packed = documents(dtype, ids=list("abcdefghi"))
        resident = on(packed, place)
        back = resident.cpu()
        np.testing.assert_array_equal(back.tokens, packed.tokens)
        np.testing.assert_array_equal(back.offsets, packed.offsets)
        assert back.ids == packed.ids and back.dtype == dtype
        assert (len(resident), resident.dim, resident.dtype) == (9, 48, dtype)
        assert resident.num_tokens == sum(LENGTHS)
        assert resident.position("c") == 2
        for key in (slice(2, 7), [8, 3, 3], np.arange(9) % 2 == 0, slice(None, None, -2)):
            np.testing.assert_array_equal(resident[key].cpu().tokens, packed[key].tokens)
            np.testing.assert_array_equal(resident[key].lengths, packed[key].lengths)
            assert resident[key].ids == packed[key].ids
        np.testing.assert_array_equal(resident[3].float().cpu(), ek.PackedEmbeddings.to(packed, "float32")[3])

    def test_other_storages(self, place, dtype):
        """Rounded on the device as on the host, to the bit."""
        packed = documents("float32")
        converted = on(packed, place).to(dtype)
        np.testing.assert_array_equal(converted.cpu().tokens, packed.to(dtype).tokens)
        if dtype == "int8":
            np.testing.assert_array_equal(converted.cpu().scales, packed.to(dtype).scales)


def test_eight_bit_floats(place):
    """A stored value is off by 2^-4 of itself at most, or by 2^-10 of its scale; scores are exact for what is stored."""
    packed = documents("float32")
    resident = on(packed, place).to("float8_e4m3fn")
    for n in range(len(packed)):
        wanted, found = packed[n].astype(np.float64), resident[n].double().cpu().numpy()
        allowed = np.maximum(2.0**-4 * abs(wanted), 2.0**-10 * float(resident.scales[n]))
        assert (abs(found - wanted) <= allowed * (1 + 1e-6)).all()
    stored = ek.PackedEmbeddings.from_list([resident[n].cpu() for n in range(len(resident))], dtype="float32")
    near(ek.maxsim(queries(place), resident), ek.maxsim(queries("cpu"), stored))
    near(ek.search(queries(place), resident, 3)[0], ek.search(queries("cpu"), stored, 3)[0])
    near(resident[[3, 0]][0], resident[3])
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        resident.cpu()
    assert resident.to("float16").cpu().dtype == "float16"


def test_ties_and_special_values(place):
    """Equal scores: the lower index first. NaN is not found, -inf is; -0 and 0 are equal."""
    values = torch.tensor([[1.0, -0.0, torch.nan, 0.0, 1.0, -torch.inf, 2.0, torch.inf]])
    keys = search.pack(values.to(place), torch.arange(8, device=place))
    found, indices = search.unpack(keys.sort(descending=True)[0])
    assert indices.tolist() == [[7, 6, 0, 4, 1, 3, 5, -1]]
    assert found.tolist() == [[torch.inf, 2, 1, 1, 0, 0, -torch.inf, -torch.inf]]
    assert search.unpack(search.pack(torch.full((1,), 3.5), torch.tensor([2**32 - 2])))[1].item() == 2**32 - 2
    tied = grid(1, 5, 16, seed=1).expand(6, 5, 16).contiguous()
    _, indices = ek.search(grid(2, 3, 16, seed=2).to(place), on(ek.PackedEmbeddings.from_padded(tied), place), 4)
    assert indices.tolist() == [[0, 1, 2, 3]] * 2


class TestPack:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("projected", [True, False])
    def test_as_on_the_host(self, place, dtype, normalize, projected, monkeypatch):
        hidden, mask = embeddings(6, 11, 24, seed=1, dtype=torch.bfloat16), holes(6, 11, seed=2)
        mask[3] = False
        weight, bias = (embeddings(16, 24, seed=3), embeddings(16, seed=4)) if projected else (None, None)
        wanted = ek.pack(hidden, mask, weight, bias, normalize=normalize, dtype=dtype)
        monkeypatch.setattr(packing, "PROJECTION_BYTES", 4 * 16 * 25)
        listed = [hidden[n, : n + 3].to(place) for n in range(6)]
        masks = [mask[n, : n + 3].to(place) if n else None for n in range(6)]
        moved = (None if each is None else each.to(place) for each in (mask, weight, bias))
        for given, keep, of in (
            (hidden.to(place), next(moved), wanted),
            (
                listed,
                masks,
                ek.pack(
                    [each.cpu() for each in listed],
                    [None if m is None else m.cpu() for m in masks],
                    weight,
                    bias,
                    normalize=normalize,
                    dtype=dtype,
                ),
            ),
        ):
            rest = (None if each is None else each.to(place) for each in (weight, bias))
            tokens, offsets, scales = packing.pack(given, keep, *rest, normalize, dtype)
            np.testing.assert_array_equal(offsets.cpu(), of.offsets)
            step = 1.01 * of.scales.max() if dtype == "int8" else 2 * HALF_STEP[dtype] * 2
            found = there.from_device(tokens, offsets, scales, ek.PackedEmbeddings)
            for n in range(len(of)):
                np.testing.assert_allclose(found.cpu().to("float32")[n], of.to("float32")[n], atol=step + 1e-6)

    def test_what_does_not_fit(self, place):
        hidden = torch.full((1, 2, 4), 1e5, device=place)
        for dtype, value in (("float16", 1e5), ("int8", torch.nan)):
            with pytest.raises(ValueError, match=f"hidden has values that {dtype}"):
                packing.pack(hidden.fill_(value), None, None, None, False, dtype)
        packing.pack(hidden, torch.zeros(1, 2, dtype=torch.bool), None, None, False, "int8")

    @pytest.mark.parametrize(
        ("change", "error", "names"),
        [
            ({"hidden": torch.zeros(2, 3)}, ValueError, "hidden"),
            ({"hidden": torch.zeros(2, 3, 4, dtype=torch.int32)}, TypeError, "hidden"),
            ({"mask": torch.zeros(2, 4)}, ValueError, "mask"),
            ({"weight": torch.zeros(5, 3)}, ValueError, "weight"),
            ({"bias": torch.zeros(5)}, ValueError, "bias"),
            ({"weight": torch.zeros(5, 4), "bias": torch.zeros(4)}, ValueError, "bias"),
        ],
    )
    def test_wrong_input(self, change, error, names):
        given = {"hidden": torch.zeros(2, 3, 4), "mask": None, "weight": None, "bias": None, **change}
        with pytest.raises(error, match=names):
            packing.pack(*given.values(), True, "float16")

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_public_function(self):
        hidden = embeddings(6, 11, 24, seed=1)
        packed = ek.pack(hidden.cuda(), dtype="int8")
        assert isinstance(packed, ek.PackedEmbeddings)
        assert ek.pack(hidden.cuda(), device="cuda").device.type == "cuda"
        assert ek.pack(hidden, device="cuda").device.type == "cuda"


class LateDevice:
    """Stands in for `torch.cuda`: a stream does its work when an event that it recorded is waited for, no sooner."""

    class Event:
        def __init__(self):
            self.stream, self.position = None, 0

        def record(self, stream):
            self.stream, self.position = stream, len(stream.work)

        def synchronize(self):
            if self.stream is not None:
                self.stream.run(self.position)

    class Stream:
        def __init__(self, device=None):
            self.work, self.done = [], 0

        def run(self, position):
            while self.done < position:
                self.done += 1
                self.work[self.done - 1]()

        def wait_event(self, event):
            # What comes later on this stream comes after what that event stands for.
            stream, position = event.stream, event.position
            if stream is not None:
                self.work.append(lambda: stream.run(position))

        def wait_stream(self, other):
            position = len(other.work)
            self.work.append(lambda: other.run(position))

    def __init__(self):
        self.current = self.caller = self.Stream()

    def current_stream(self, device=None):
        return self.current

    def stream(self, stream):
        device = self

        class Inside:
            def __enter__(self):
                device.current = stream

            def __exit__(self, *_):
                device.current = device.caller

        return Inside()


class Somewhere:
    """A device that is told to be one of CUDA; its memory is the host's."""

    type = "cuda"


@pytest.mark.parametrize("dtype", ["float16", "int8", "bfloat16"])
@pytest.mark.parametrize("block", [1, 20, 48, 1000])
def test_streaming_waits_for_what_it_must(monkeypatch, dtype, block):
    """However late a device copies and computes, each block is read whole, and none is overwritten before."""
    device = LateDevice()
    monkeypatch.setattr(stream, "cuda", device)
    empty = torch.empty
    monkeypatch.setattr(
        stream.torch, "empty", lambda *size, pin_memory=False, device=None, **kwargs: empty(*size, **kwargs).fill_(77)
    )
    monkeypatch.setattr(
        stream, "transfer", lambda source, target: device.current.work.append(lambda: target.copy_(source))
    )
    packed, read = documents(dtype), []
    for _, sent in stream.blocks(packed, Somewhere(), block):
        # A kernel of the caller: it reads the block when its stream comes to it.
        device.caller.work.append(lambda sent=sent: read.append([None if x is None else x.clone() for x in sent]))
    device.caller.run(len(device.caller.work))
    tokens, wanted = torch.cat([each[0] for each in read]), there.dtypes.from_host(packed.tokens)
    assert torch.equal(tokens.view(torch.uint8), wanted.contiguous().view(torch.uint8))
    assert [n for each in read for n in each[1].diff().tolist()] == list(LENGTHS)
    if dtype == "int8":
        np.testing.assert_array_equal(torch.cat([each[2] for each in read]), packed.scales)


@pytest.mark.parametrize("missing", ["wait_event", "synchronize"])
def test_the_late_device_tells(monkeypatch, missing):
    """Without one of the waits the test above fails."""
    owner = LateDevice.Stream if missing == "wait_event" else LateDevice.Event
    monkeypatch.setattr(owner, missing, lambda *_: None)
    with pytest.raises(AssertionError):
        test_streaming_waits_for_what_it_must(monkeypatch, "float16", 20)


def test_views_are_streamed(place):
    """Documents of a view that do not lie side by side, and a folder that is mapped."""
    packed = documents("int8")
    for view in (packed[::2], packed[[8, 0, 3]], packed[2:2]):
        parts = [block for _, block in stream.blocks(view, place, 20)]
        assert sum(len(block.offsets) - 1 for block in parts) == len(view)
        if parts:
            tokens = torch.cat([block.tokens.clone() for block in parts]) if place.type == "cpu" else None
            assert tokens is None or np.array_equal(tokens, view.tokens)


def test_a_search_has_few_keys_at_a_time(place, monkeypatch):
    """Of documents of the host too, however short they are."""
    seen = []
    monkeypatch.setattr(search, "KEYS", 12)
    monkeypatch.setattr(
        search, "_better", lambda best, Q, block, q_mask, some, numbers: seen.append(some.stop - some.start) or best
    )
    packed = documents(lengths=(1,) * 20)
    for given in (packed, on(packed, place)):
        search.search(queries(place), given, 2, None, None)
    assert seen == [3, 3, 3, 3, 3, 3, 2] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_host_documents_are_streamed_to_a_gpu(dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1 << 12)
    documents(dtype, lengths=range(200)).save(tmp_path / "folder")
    packed = ek.PackedEmbeddings.load(tmp_path / "folder")
    near(ek.maxsim(queries("cuda"), packed), ek.maxsim(queries("cpu"), packed))
    found, wanted = ek.search(queries("cuda"), packed, 7), ek.search(queries("cpu"), packed, 7)
    near(found[0], wanted[0])
    assert torch.equal(found[1].cpu(), wanted[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_search_on_a_gpu_waits_for_nothing():
    resident, Q = documents().to("cuda"), queries("cuda")
    ek.search(Q, resident, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ek.search(Q, resident, 3)
        ek.maxsim(Q, resident)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_wrong_devices_and_queries():
    resident = on(documents(), torch.device("cpu"))
    assert resident.to("cpu").dtype == "float16" and resident.to(torch.device("cpu")).dim == 48
    with pytest.raises(ValueError, match="dtype"):
        resident.to("float7")
    with pytest.raises(ValueError, match="same last dimension"):
        ek.maxsim(embeddings(2, 3, 40), resident)
    with pytest.raises(IndexError):
        resident[9]
    with pytest.raises(IndexError):
        resident[[0, 9]]
    with pytest.raises(KeyError, match="x"):
        resident.position("x")
    with pytest.raises(TypeError, match="Q"):
        ek.search(np.zeros((2, 3, 48), np.float32), resident, 1)
    with pytest.raises(ValueError, match="d_mask"):
        ek.maxsim(queries("cpu"), resident, d_mask=torch.ones(3))
    assert documents().to("cpu").dtype == "float16"
    with pytest.raises(ValueError, match="dtype"):
        documents().to("cudaa")
