"""The CUDA C++ kernels without a GPU: their own source, the backend's plans, run on the CPU (see `emulation.py`).

Values are multiples of 1/64, so that every sum is exact and the float64 answer is the only right one; ties are frequent.
"""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("triton")

from cases import grid, holes
from edgecolbert_kernels import reference
from edgecolbert_kernels.backends.cuda import gradients, scoring
from emulation import EmulationError, Emulator, Kernel, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
NAN = float("nan")


@pytest.fixture
def emulator(tmp_path_factory, monkeypatch):
    # Workers of pytest-xdist have a folder each, in one.
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if shared.name.startswith("popen-") else shared) / "emulated"
    folder.mkdir(exist_ok=True)
    made = Emulator(folder, monkeypatch)
    yield made
    assert made.launches


def forward(
    Q, D, q_mask=None, d_mask=None, cu_q=None, cu_d=None, query_index=None, document_index=None, mode="exclude", scales=None
):  # fmt: skip
    """A call of the backend, to be made by an emulator."""
    batch = q_mask, d_mask, cu_q, cu_d, query_index, document_index
    return functools.partial(scoring.forward, Q, D, *batch, False, mode, "exact", False, scales)


def exact(Q, D, q_mask=None, d_mask=None, mode="exclude"):
    """Scores in float64, of one query without its axis."""
    single = Q.dim() == 2
    Q, q_mask = (x[None] if single and x is not None else x for x in (Q, q_mask))
    scores = reference.maxsim(Q.double(), D.double(), q_mask, d_mask, mask_mode=mode)[0]
    return (scores[0] if single else scores).float()


def check(emulator, cases):
    """Every case is arguments of `forward`, and the right scores."""
    for (arguments, wanted), (found, _) in zip(cases, emulator([forward(**given) for given, _ in cases]), strict=True):
        assert torch.equal(found, wanted), {name: getattr(x, "shape", x) for name, x in arguments.items()}


@pytest.mark.parametrize(
    "dim, dtype, query_lengths",
    [
        (48, F16, (1, 7, 8, 31, 32, 33)), (48, BF16, (31, 32)), (16, F16, (1, 33)), (64, F16, (8, 31)), (64, BF16, (33,)),
        (96, F16, (7, 33)), (128, F16, (1, 32)),
    ],
    ids=str,
)  # fmt: skip
def test_rerank(emulator, dim, dtype, query_lengths):
    emulator.use(processors=1)
    cases = []
    for query_length in query_lengths:
        for count, length in ((1, 1), (5, 15), (9, 16), (9, 17), (9, 33), (8, 150), (2, 300)):
            Q, D = grid(query_length, dim, dtype=dtype, seed=1), grid(count, length, dim, dtype=dtype, seed=2)
            cases.append(({"Q": Q, "D": D}, exact(Q, D)))
    check(emulator, cases)


@pytest.mark.parametrize("mode", ["exclude", "zero"])
def test_masks(emulator, mode):
    Q, q_mask = grid(32, 48, dtype=F16, seed=1), holes(32, seed=3)
    cases = []
    for count, length, keep in ((9, 70, 0.5), (40, 33, 0.03), (50, 20, 0.1), (3, 300, 0.5)):
        D, d_mask = grid(count, length, 48, dtype=F16, seed=2), holes(count, length, seed=4, keep=keep)
        d_mask[0] = False
        D[~d_mask] = NAN if mode == "exclude" else 7
        given = {"Q": Q, "D": D, "q_mask": q_mask, "d_mask": d_mask, "mode": mode}
        cases.append((given, exact(Q, D, q_mask, d_mask, mode)))
        assert cases[-1][1][0] == 0
    Q[~q_mask] = NAN
    check(emulator, cases)


def test_nan_and_infinity(emulator):
    """A product that is NaN is the largest; infinity is a value as others are."""
    Q, D = grid(32, 48, dtype=F16, seed=1).abs() + 1, grid(4, 40, 48, dtype=F16, seed=2)
    D[1, 33, 7], D[2, 20], D[3, :] = NAN, torch.inf, -torch.inf
    (found, _), = emulator([forward(Q, D)])  # fmt: skip
    torch.testing.assert_close(found, exact(Q, D), rtol=0, atol=0, equal_nan=True)


def test_strides_and_own_candidates(emulator):
    cases = []
    Q, D = grid(3, 32, 64, dtype=F16, seed=1), grid(3, 4, 40, 64, dtype=F16, seed=2)
    cases.append(({"Q": Q, "D": D}, exact(Q, D)))
    cases.append(({"Q": Q[1], "D": D[0]}, exact(Q[1], D[0])))
    wide, many = grid(3, 40, 96, dtype=F16, seed=1), grid(3, 7, 50, 96, dtype=F16, seed=2)
    Q, D = wide[:, 3:35, 16:64], many[:, ::2, 5:30:2, 40:88]
    cases.append(({"Q": Q, "D": D}, exact(Q, D)))
    check(emulator, cases)


@pytest.mark.parametrize("masked", [False, True])
def test_own_candidates_that_do_not_fill_a_block(emulator, masked):
    Q, D = grid(3, 32, 64, dtype=F16, seed=1), grid(3, 11, 20, 64, dtype=F16, seed=2)
    q_mask = holes(3, 32, seed=3) if masked else None
    check(emulator, [({"Q": Q, "D": D, "q_mask": q_mask}, exact(Q, D, q_mask))])


def test_pairs(emulator):
    Q, D = grid(6, 32, 64, dtype=F16, seed=1), grid(66, 20, 64, dtype=F16, seed=2)
    of_query = torch.tensor([0, 5, 5, 2, 6, 0, -1, 2**40])
    of_document = torch.tensor([65, 0, 7, 7, 1, -1, 66, -(2**40)])
    d_mask = holes(66, 20, seed=5)
    found = emulator(
        [forward(Q, D, d_mask=mask, query_index=of_query, document_index=of_document) for mask in (None, d_mask)]
    )
    for mask, (scores, _) in zip((None, d_mask), found, strict=True):
        wanted = reference.maxsim_indexed(Q.double(), D.double(), of_query[:4], of_document[:4], d_mask=mask)[0]
        assert torch.equal(scores[:4], wanted.float())
        assert scores[4:].isnan().all()


def offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def test_packed(emulator):
    cu_d = offsets(1, 15, 0, 16, 17, 300, 33, 0)
    D, d_mask = grid(int(cu_d[-1]), 48, dtype=F16, seed=2), holes(int(cu_d[-1]), seed=4)
    cases = []
    for query_length in (7, 32):
        Q = grid(query_length, 48, dtype=F16, seed=1)
        cu_q = offsets(query_length)
        for mask in (None, d_mask):
            wanted = reference.maxsim_varlen(Q.double(), D.double(), cu_q, cu_d, d_mask=mask)[0].float()
            cases.append(({"Q": Q, "D": D, "d_mask": mask, "cu_d": cu_d}, wanted[0]))
            cases.append(({"Q": Q, "D": D, "d_mask": mask, "cu_q": cu_q, "cu_d": cu_d}, wanted))
    # A query inside of its rows.
    Q, cu_q = grid(32, 48, dtype=F16, seed=1), torch.tensor([3, 29])
    wanted = exact(Q[3:29], D.view(2, -1, 48))[None]
    cases.append(({"Q": Q, "D": D.view(2, -1, 48), "cu_q": cu_q}, wanted))
    check(emulator, cases)


def test_wrong_boundaries_lead_nowhere_outside(emulator):
    Q, D = grid(32, 48, dtype=F16, seed=1), grid(70, 48, dtype=F16, seed=2)
    wrong = torch.tensor([-5, 10, 3, 2**40, 60, -(2**40), 2**62, 71])
    (found, _), _ = emulator([forward(Q, D, cu_d=wrong), forward(Q, D, cu_q=torch.tensor([-3, 2**40]), cu_d=wrong)])
    right = [D[:10], None, D[3:], None, None, D, None]
    for score, rows in zip(found, right, strict=True):
        assert score == (0 if rows is None else exact(Q, rows[None])[0])


def test_int8(emulator):
    D = torch.arange(-128, 128, dtype=torch.int8).repeat(9)[: 3 * 12 * 64].view(3, 12, 64)
    scales = torch.tensor([0.5, 2.0, 0.25])
    cases = []
    for dim in (16, 48, 64):
        Q, rows = grid(32, dim, dtype=F16, seed=1), D[..., :dim].contiguous()
        cases.append(({"Q": Q, "D": rows}, exact(Q, rows)))
        cases.append(({"Q": Q, "D": rows, "scales": scales}, exact(Q, rows) * scales))
    check(emulator, cases)


def backward(
    grad, Q, D, argmax, cu_q=None, cu_d=None, query_index=None, document_index=None, normalize=False, sums=None,
    needs=(True, True),
):  # fmt: skip
    """A call of the backend, to be made by an emulator. Its first call, which only plans, must add nothing to the sums."""
    batch = None, None, cu_q, cu_d, query_index, document_index
    options = normalize, "exclude", "exact", *needs, sums
    return functools.partial(gradients.backward, grad, Q, D, argmax, *batch, *options)


def output_gradient(*shape):
    """Powers of two, so that sums stay exact in float32, with zeros to skip."""
    generator = torch.Generator().manual_seed(3)
    return 2.0 ** torch.randint(-2, 2, shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.6)


def chosen(grad, Q, D, **options):
    """The argmax, and the gradients of Q and D in float64."""
    queries, documents = Q.double().requires_grad_(), D.double().requires_grad_()
    scores, argmax = reference.maxsim(queries, documents, **options)
    scores.backward(grad.double())
    return argmax, queries.grad, documents.grad


@pytest.mark.parametrize("dim", [1, 17, 48, 129, 264])
def test_gradients(emulator, dim):
    calls, wanted = [], []
    types = (F16, BF16), (F32, F16), (BF16, F32)
    shapes = (1, 1, 1, 1), (31, 5, 3, 17), (33, 40, 2, 30), (12, 3, 70, 5), (70, 10, 1, 20)
    for number, (query_length, num_queries, count, length) in enumerate(shapes):
        query_dtype, dtype = types[number % len(types)]
        Q = grid(num_queries, query_length, dim, dtype=query_dtype, seed=1)
        D = grid(count, length, dim, dtype=dtype, seed=2)
        grad = output_gradient(num_queries, count)
        argmax, *right = chosen(grad, Q, D)
        right = [each.to(of) for each, of in zip(right, (query_dtype, dtype), strict=True)]
        if (number + dim // 2) % 2:
            calls.append(backward(grad, Q, D, argmax.to(torch.int16)))
            wanted.append(right)
            continue
        bounds = offsets(*[query_length] * num_queries), offsets(*[length] * count)
        calls.append(backward(grad, Q.flatten(0, 1), D.flatten(0, 1), argmax.to(torch.int32).flatten(), *bounds))
        wanted.append([each.flatten(0, 1) for each in right])
    for found, right in zip(emulator(calls), wanted, strict=True):
        assert all(map(torch.equal, found, right)), [each.shape for each in right]


@pytest.mark.parametrize(
    "processors, dim, dtype", [(1, 48, F16), (132, 48, F16), (132, 264, F32), (1, 20, BF16), (132, 40, F32)], ids=str
)
def test_query_gradients_shared_and_not(emulator, processors, dim, dtype):
    """By warps that have a document's tokens alone, and by several; added to what is there, and not."""
    emulator.use(processors)
    calls, wanted = [], []
    for query_length, count in ((32, 7), (8, 100), (5, 300), (1, 33)):
        Q, D = grid(2, query_length, dim, dtype=F16, seed=1), grid(count, 4, dim, dtype=dtype, seed=2)
        grad = output_gradient(2, count)
        argmax, right, _ = chosen(grad, Q, D)
        sums = grid(2, query_length, dim, seed=7)
        needs = True, False
        calls += [
            backward(grad, Q, D, argmax.short(), needs=needs), backward(grad, Q, D, argmax.int(), sums=sums, needs=needs)
        ]  # fmt: skip
        wanted += [right.half(), sums + right.float()]
    for (found, _), right in zip(emulator(calls), wanted, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("items", [2, 128])
def test_tiles(emulator, monkeypatch, items):
    """A document that is longer than a tile, and packed ones of which one is longer than all of its tiles; queries that are
    sorted in turn, and at once."""
    monkeypatch.setattr(gradients, "MOST_ROWS", 16)
    monkeypatch.setattr(gradients, "MOST_ITEMS", items)
    Q, D = grid(20, 32, 48, dtype=F16, seed=1), grid(2, 70, 48, dtype=F32, seed=2)
    grad = output_gradient(20, 2)
    argmax, of_queries, of_documents = chosen(grad, Q, D)
    lengths, cu_q = (0, 3, 90, 1, 0, 5), offsets(32, 1, 33, 0, 3, 0, 0, 0, 0, 61)
    cu_d, packed = offsets(*lengths), grid(99, 48, dtype=F32, seed=4).double().requires_grad_()
    rows = grid(130, 48, dtype=F16, seed=5).double().requires_grad_()
    scores, winners = reference.maxsim_varlen(rows, packed, cu_q, cu_d)
    weights = output_gradient(10, 6)
    scores.backward(weights.double())
    flat = torch.cat([each for row in winners for each in row]).int()
    of_packed = backward(weights, rows.detach().half(), packed.detach().float(), flat, cu_q, cu_d)
    first, second = emulator([backward(grad, Q, D, argmax.short()), of_packed])
    assert torch.equal(first[0], of_queries.half())
    assert torch.equal(first[1], of_documents.float())
    assert torch.equal(second[0], rows.grad.half())
    assert torch.equal(second[1], packed.grad.float())


@pytest.mark.parametrize("items, dim, dtype", [(128, 48, F16), (4, 160, F32)], ids=str)
def test_document_gradients_are_sums_in_one_order(emulator, monkeypatch, items, dim, dtype):
    """Of values that are not exact, so that another order shows: tokens that most chose, that some did, and that none did;
    gradients of which most are 0, all of a document's, or tiny."""
    monkeypatch.setattr(gradients, "MOST_ITEMS", items)
    generator = torch.Generator().manual_seed(5)
    Q, D = torch.randn(70, 40, dim, generator=generator).to(dtype), torch.zeros(4, 300, dim)
    grad = torch.randn(70, 4, generator=generator)
    grad[:, 1] *= torch.rand(70, generator=generator) < 0.05
    grad[:, 2] = 0
    grad[:, 3] *= 1e-30
    argmax = torch.randint(0, 250, (70, 4, 40), generator=generator)
    argmax[torch.rand(argmax.shape, generator=generator) < 0.6] = 7
    argmax[:, 3, :35] = 290
    ((_, found),) = emulator([backward(grad, Q, D, argmax.short(), needs=(False, True))])
    for document in range(4):
        right = torch.zeros(300, dim, dtype=torch.float64)
        added = (grad[:, document, None, None] * Q.double()).flatten(0, 1)
        right.index_add_(0, argmax[:, document].flatten(), added)
        atol = 1e-6 * right.abs().max().item()
        torch.testing.assert_close(found[document].double(), right, rtol=1e-5, atol=atol)
        assert not found[document][right.abs().sum(-1) == 0].any()


@pytest.mark.parametrize(
    "memory", [(232_448, 233_472), (166_912, 167_936), (101_376, 102_400), (65_536, 65_536)], ids=str
)
def test_two_blocks_of_document_gradients_are_resident(memory):
    """Of compute capability 9.0, 8.0, 8.6 and a smaller one; the sorted list counts entries in 16 bits."""
    for width in (8, 48, 128, 256):
        for most, likely in ((0, 0), (1, 1), (16, 16), (2048, 1), (1024, 1024), (10**6, 10**6)):
            block = gradients._block(width, most, likely, *memory)
            assert block.rows >= 1
            assert 2 * (block.shared(block.rows) + gradients.RESERVED) <= memory[1]
            assert 32 * block.warps * block.items <= 1 << 16
            assert block.multi or block.warps * block.items >= most


def test_gradients_of_own_candidates_and_pairs(emulator):
    Q, D = grid(3, 40, 48, dtype=F16, seed=1), grid(3, 4, 9, 48, dtype=F16, seed=2)
    grad = output_gradient(3, 4)
    argmax, *own = chosen(grad, Q, D)
    of_query, of_document = torch.tensor([0, 2, 2, 1, 3, 0, -1]), torch.tensor([11, 0, 7, 7, 1, -1, 12])
    queries, documents = Q.double().requires_grad_(), D.flatten(0, 1).double().requires_grad_()
    scores, winners = reference.maxsim_indexed(queries, documents, of_query[:4], of_document[:4])
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 4.0, 8.0, 1.0])
    scores.backward(weights[:4].double())
    winners = torch.cat([winners, torch.zeros(3, 40)]).short()
    pairs = backward(weights, Q, D.flatten(0, 1), winners, query_index=of_query, document_index=of_document)
    strided = grid(3, 50, 96, dtype=F16, seed=1)[:, 5:45, 7:55], grid(3, 4, 9, 96, dtype=F16, seed=2)[..., 3:51]
    argmax_of_strided, *of_strided = chosen(grad, *strided)
    calls = [backward(grad, Q, D, argmax.short()), pairs, backward(grad, *strided, argmax_of_strided.short())]
    for found, right in zip(emulator(calls), (own, (queries.grad, documents.grad), of_strided), strict=True):
        assert all(torch.equal(x, y.half()) for x, y in zip(found, right, strict=True))


def test_gradients_of_what_names_nothing(emulator):
    """Winners that are no token, and boundaries outside: nothing is read or written there, and the rest is right."""
    Q, D, grad = grid(5, 8, 48, dtype=F16, seed=1), grid(2, 9, 48, dtype=F32, seed=2), torch.ones(5, 2)
    argmax, *_ = chosen(grad, Q, D)
    argmax[0, 1, 3:], argmax[2, 0, 5], argmax[4, 1, 0] = -1, 9, -32768
    of_queries, of_documents = torch.zeros(5, 8, 48), torch.zeros(2, 9, 48)
    for query, document, token in ((argmax >= 0) & (argmax < 9)).nonzero().tolist():
        winner = argmax[query, document, token]
        of_documents[document, winner] += Q[query, token].float()
        of_queries[query, token] += D[document, winner]
    given, wrong_d = (grad, Q.flatten(0, 1), D.flatten(0, 1), argmax.int().flatten()), torch.tensor([-1, 30, 2**40])
    beyond, overlapping = torch.tensor([-3, 9, 20, 2**40, 2**41, 2**42]), torch.tensor([-3, 9, 2, 2**40, 5, 41])
    calls = [backward(*given, beyond, wrong_d), backward(*given, overlapping, wrong_d, needs=(False, True))]
    found, *_ = emulator([backward(grad, Q, D, argmax.short()), *calls])
    assert torch.equal(found[0], of_queries.half())
    assert torch.equal(found[1], of_documents)


def test_nan_reaches_only_what_it_chose(emulator):
    Q, D, grad = grid(4, 8, 48, dtype=F16, seed=1), grid(3, 20, 48, dtype=F16, seed=2), torch.ones(4, 3)
    Q[1, 3, 5], D[2, 9, 1] = NAN, NAN
    argmax, *_ = chosen(grad, Q, D)
    ((of_queries, of_documents),) = emulator([backward(grad, Q, D, argmax.short())])
    # Each chose the NaN of a document; the one that is NaN itself chose every first token.
    chose = of_queries.isnan().any(-1)
    assert not chose[1, 3] and chose.sum() == 31
    assert (of_documents.isnan().any(-1).sum(-1) == 1).all()
    grad[:, 2] = 0
    ((of_queries, _),) = emulator([backward(grad, Q, D, argmax.short())])
    assert not of_queries.isnan().any()


@pytest.mark.parametrize("dim", [3, 48, 130])
def test_gradients_through_normalize(emulator, dim):
    Q, D = grid(20, 32, dim, dtype=F32, seed=1), grid(2, 15, dim, dtype=F32, seed=2)
    Q[2, 3], D[1, 4] = 0, 0
    grad = output_gradient(20, 2)
    argmax, *right = chosen(grad, Q, D, normalize=True)
    ((*found,),) = emulator([backward(grad, Q, D, argmax.short(), normalize=True)])
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


# The emulator itself: what is wrong shows.
WRONG = {
    "outside": ("out[0] = in[n];", r"outside, at 0x\w+: 256 bytes from the start of argument 0, which has 256"),
    "before": ("out[0] = in[-n / 64];", "outside, at"),
    "far": ("out[0] = in[1ll << 40];", "outside, at"),
    "beside": ("out[n + 1] = 0.0f;", "argument 1 was written where it must not be|outside"),
    "input": ("const_cast<float*>(in)[0] = 3.0f;", "argument 0 was written where it must not be"),
    "left": ("if (threadIdx.x > 3) return; __shfl_sync(~0u, 1, 0);", "waits at __shfl_sync, line 1, and thread 4 left"),
    "apart": (
        "if (threadIdx.x > 3) __any_sync(~0u, true);\n else __ballot_sync(~0u, true);",
        "thread 0 waits at __ballot_sync, line 2, and thread 4 at __any_sync, line 1",
    ),
    "barrier": ("if (threadIdx.x > 3) __syncthreads();", "thread 0 left|thread 4 waits at __syncthreads"),
    "lane": ("if (threadIdx.x < 8) __shfl_xor_sync(0xffu, 1, 8);", "lane 8 is read and takes no part"),
    "mask": ("__shfl_sync(2u, 1, 1);", "not in its own mask"),
    "race": (
        "__shared__ float x; if (threadIdx.x == 40) x = 1.0f; out[threadIdx.x] = x;",
        "the order of threads and blocks changes what is written",
    ),
    "shared": ("sums[threadIdx.x] = 0.0f;", "wrote shared memory at 128, of 128"),
    "aligned": ("__ldg(reinterpret_cast<const float2*>(in + 1));", "load of 8 bytes from .*, which is not aligned"),
    "index": ("int x[4] = {}; out[0] = x[n / 16];", "without a meaning"),
    "error": ("nonsense;", "nonsense"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_shows(emulator, tmp_path, what):
    body, message = WRONG[what]
    source = tmp_path / "wrong.cu"
    signature = 'extern "C" __global__ void wrong(const float* in, float* out, long long n)'
    source.write_text(f"{signature} {{ extern __shared__ float sums[]; (void)sums; {body}\n}}\n")
    kernel = Kernel(emulator, str(source), "wrong", {}, 64)
    with pytest.raises(EmulationError, match=message):
        kernel.launch((1, 1), 128, (torch.ones(64), torch.zeros(64)), (64,))
    emulator.launches += 1


def test_what_was_not_written_is_nan(emulator, tmp_path):
    source = tmp_path / "unwritten.cu"
    source.write_text(
        'extern "C" __global__ void unwritten(float* out) {\n'
        "  extern __shared__ float sums[]; __shared__ float own[64];\n"
        "  out[threadIdx.x] = threadIdx.x % 2 ? sums[threadIdx.x] : own[threadIdx.x];\n"
        "  own[threadIdx.x] = sums[threadIdx.x] = 0.0f;\n}\n"
    )
    out = torch.zeros(64)
    Kernel(emulator, str(source), "unwritten", {}, 64).launch((3, 1), 256, (out,), ())
    assert out.isnan().all()
