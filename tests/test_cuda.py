"""Calls on tensors that are on a GPU: how they get to the kernels. What the kernels answer is tested by every `engine`."""

from __future__ import annotations

import threading

import pytest
import torch

import edgecolbert_kernels as ek
from cases import STORAGES, embeddings, grid, holes, packed, ragged
from conftest import GPU
from edgecolbert_kernels import scoring
from edgecolbert_kernels.backends import ON_GPU, choose, repeated
from layouts import LAYOUTS, flat, gradients
from test_backward import output_gradient

pytestmark = pytest.mark.skipif(not GPU, reason="there is no GPU that the kernels run on")


def on(device, rows):
    return [each.to(device) for each in rows] if isinstance(rows, list) else rows.to(device)


def to_device(case, device="cuda"):
    case.Q, case.D = on(device, case.Q), on(device, case.D)
    case.arguments = {name: None if x is None else on(device, x) for name, x in case.arguments.items()}
    return case


def batch(dtype=torch.float16, device="cuda"):
    Q, D = embeddings(6, 32, 48, dtype=dtype, seed=1), embeddings(8, 70, 48, dtype=dtype, seed=2)
    return Q.to(device), D.to(device), holes(8, 70, seed=3).to(device)


def test_chosen_by_itself():
    assert choose("maxsim", "cuda", "float32") == ON_GPU[0]
    assert choose("maxsim", "cuda", "float64") == "torch"


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, masked):
    """Scores and gradients of a grid are the CPU's, which are exact."""
    for dtype in STORAGES:
        ours, theirs = (LAYOUTS[layout](48, dtype, dtype, make=grid, masked=masked) for _ in range(2))
        grad = output_gradient(ours.shape)
        to_device(ours)
        assert torch.equal(ours(ours.Q, ours.D).cpu(), theirs(theirs.Q, theirs.D))
        found = gradients(ours, *ours.leaves(), grad.cuda())
        wanted = gradients(theirs, *theirs.leaves(), grad)
        assert all(torch.equal(f.cpu(), w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_every_run(layout):
    case = to_device(LAYOUTS[layout](48, torch.float16, torch.float16))
    grad = embeddings(*case.shape, seed=6, norm=None).cuda()
    wanted = gradients(case, *case.leaves(), grad)
    for _ in range(20):
        assert all(map(torch.equal, gradients(case, *case.leaves(), grad), wanted))


def test_the_host_does_not_wait():
    Q, D, d_mask = batch()
    (packed_Q, cu_q), (packed_D, cu_d) = packed(ragged((5, 9), 48)), packed(ragged((7, 0, 30), 48))
    tensors = [x.cuda() for x in (packed_Q, packed_D, cu_q, cu_d, torch.tensor([0, 5]), torch.tensor([7, 1]))]
    leaves = Q.clone().requires_grad_(), D.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ek.maxsim(*leaves, d_mask=d_mask).sum().backward()
        ek.maxsim_varlen(*tensors[:4])
        ek.maxsim_indexed(*leaves, *tensors[4:], d_mask=d_mask).sum().backward()
        ek.maxsim_pairs(*(leaf[:6] for leaf in leaves)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph():
    """Captured once, replayed on new values."""
    Q, D, d_mask = batch()
    static_Q, static_D = (x.clone().requires_grad_() for x in (Q, D))

    def step():
        scores = ek.maxsim(static_Q, static_D, d_mask=d_mask)
        return (scores.detach(), *torch.autograd.grad(scores.sum(), (static_Q, static_D)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        static_Q.copy_(Q.flip(0))
        static_D.copy_(D * 2)
    graph.replay()
    assert all(map(torch.equal, found, step()))


def test_stream():
    """Work goes to the current stream, behind what stands there."""
    Q, D, _ = batch()
    wanted = ek.maxsim(Q, 2 * D)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = D * 2
        scores = ek.maxsim(Q, late)
    stream.synchronize()
    assert torch.equal(scores, wanted)


@pytest.fixture
def repeats(monkeypatch):
    """Notes, call by call, whether the compiled module answered what it had answered before."""
    from edgecolbert_kernels.backends.triton import launch

    ek.maxsim(*batch()[:2])
    if scoring._repeat is None:
        pytest.skip("this PyTorch does not hand out how it reads its tensors")
    if not launch._direct:
        pytest.skip("the compiled kernels of this Triton are not known")
    seen = []

    def repeat(*call):
        scores = repeated.table.repeat(*call)
        seen.append(scores is not None)
        return scores

    repeated.clear()
    monkeypatch.setattr(scoring, "_repeat", repeat)
    return seen


def rerank():
    return embeddings(32, 48, dtype=torch.float16, seed=1).cuda(), batch()[1]


REPEATED = {
    "rerank": lambda: (ek.maxsim, rerank(), {}),
    "masks": lambda: (ek.maxsim, rerank(), {"q_mask": holes(1, 32, seed=4)[0].cuda(), "d_mask": batch()[2]}),
    "masked with zeros": lambda: (ek.maxsim, rerank(), {"d_mask": batch()[2], "mask_mode": "zero"}),
    "bfloat16": lambda: (ek.maxsim, batch(torch.bfloat16)[:2], {"out_dtype": torch.float32}),
    "batch": lambda: (ek.maxsim, batch()[:2], {"d_mask": batch()[2], "normalize": True}),
    "own documents": lambda: (ek.maxsim, (batch()[0], batch()[1].repeat(6, 1, 1, 1)), {}),
    "packed": lambda: (
        ek.maxsim_varlen,
        [x.half().cuda() if x.is_floating_point() else x.cuda() for x in varlen()],
        {},
    ),
    "chosen pairs": lambda: (
        ek.maxsim_indexed,
        (*batch()[:2], torch.tensor([0, 5, 2]).cuda(), torch.tensor([7, 1, 1]).cuda()),
        {},
    ),
}


def varlen():
    (Q, cu_q), (D, cu_d) = packed(ragged((5, 9), 48)), packed(ragged((7, 0, 30), 48))
    return Q, D, cu_q, cu_d


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("call", REPEATED)
def test_repeated_calls(call, name, repeats):
    """The same scores the first time, the second and the third, of the values that the inputs have then."""
    function, inputs, options = REPEATED[call]()
    with ek.backend(name):
        first, second, third = (function(*inputs, **options) for _ in range(3))
        assert repeats == [False, True, True]
        assert torch.equal(first, second) and torch.equal(first, third)
        assert len({each.data_ptr() for each in (first, second, third)}) == 3
        inputs[1].neg_()
        fourth = function(*inputs, **options)
        repeated.clear()
        assert torch.equal(fourth, function(*inputs, **options)) and not torch.equal(fourth, first)
    assert repeats[3:] == [True, False]


def test_repeated_calls_on_a_stream(repeats):
    Q, D = rerank()
    wanted = ek.maxsim(Q, 2 * D)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = D * 2
        scores = ek.maxsim(Q, late)
    stream.synchronize()
    assert repeats == [False, True] and torch.equal(scores, wanted)


def test_repeated_calls_in_a_graph(repeats):
    Q, D = rerank()
    ek.maxsim(Q, D)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = ek.maxsim(Q, D)
    assert repeats == [False, True]
    D.neg_()
    graph.replay()
    repeated.clear()
    assert torch.equal(scores, ek.maxsim(Q, D))


def test_repeated_calls_in_a_new_thread(repeats):
    """Which has no context of the driver's until someone makes one."""
    Q, D = rerank()
    wanted, found = ek.maxsim(Q, D), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.extend(ek.maxsim(Q, D) for _ in range(2)))
        thread.start()
        thread.join()
    assert len(found) == 4 and all(torch.equal(each, wanted) for each in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_repeated_calls_on_another_device(repeats):
    """Functions belong to a device, and are started where it is the current one."""
    Q, D = rerank()
    wanted = ek.maxsim(Q, D).cpu()
    other = Q.to("cuda:1"), D.to("cuda:1")
    for _ in range(2):
        assert torch.equal(ek.maxsim(*other).cpu(), wanted)
    assert not any(repeats)
    with torch.cuda.device(1):
        for _ in range(3):
            scores = ek.maxsim(*other)
            assert scores.device == other[0].device and torch.equal(scores.cpu(), wanted)
        assert torch.equal(ek.maxsim(Q, D).cpu(), wanted)
    assert repeats == [False, False, False, False, True, True, False]
    assert torch.equal(ek.maxsim(Q, D).cpu(), wanted) and repeats[-1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_second_device():
    Q, D, d_mask = batch(device="cuda:1")
    scores = ek.maxsim(Q.requires_grad_(), D, d_mask=d_mask)
    scores.sum().backward()
    assert scores.device == Q.grad.device == torch.device("cuda:1")
    first = batch(device="cuda:0")
    assert torch.equal(scores.detach().cpu(), ek.maxsim(*first[:2], d_mask=first[2]).cpu())


def test_devices_are_told_apart():
    Q, D, d_mask = batch()
    for arguments in ((Q.cpu(), D, None, d_mask), (Q, D.cpu(), None, None), (Q, D, None, d_mask.cpu())):
        with pytest.raises(ValueError, match="device"):
            ek.maxsim(*arguments)


def test_autocast():
    Q, D, _ = batch(torch.float32)
    with torch.autocast("cuda", torch.float16):
        assert torch.equal(ek.maxsim(Q, D), ek.maxsim(Q, D))
        scores = ek.maxsim(Q, D)
    assert torch.equal(scores, ek.maxsim(Q, D)), "nothing is lowered"


def test_float32_is_float32():
    """TF32 by PyTorch's switch alone."""
    Q, D, _ = batch(torch.float32)
    exact = torch.einsum("qid,kjd->qkij", Q.double(), D.double()).amax(3).sum(2)
    before = torch.backends.cuda.matmul.allow_tf32
    errors = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            errors[allowed] = (ek.maxsim(Q, D) - exact).abs().max().item()
        torch.backends.cuda.matmul.allow_tf32 = False
        assert (ek.maxsim(Q, D, precision="fast") - exact).abs().max() < 5e-5
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[False] < 1e-5 < errors[True]


def test_compile_and_opcheck():
    Q, D, d_mask = batch()
    compiled = torch.compile(lambda q, d: ek.maxsim(q, d, d_mask=d_mask), fullgraph=True)
    assert torch.equal(compiled(Q, D), ek.maxsim(Q, D, d_mask=d_mask))
    leaves = Q.clone().requires_grad_(), D.clone().requires_grad_()
    arguments = (*leaves, None, d_mask, None, None, None, None, False, "exclude", "exact", True)
    torch.library.opcheck(torch.ops.edgecolbert.maxsim_forward, arguments)


def test_large_offsets():
    """More than 2^31 elements of documents; one document is read behind that mark."""
    free, _ = torch.cuda.mem_get_info()
    count, length, dim = 44800, 1000, 48
    if free < 3 * count * length * dim:
        pytest.skip("too little memory")
    D = torch.zeros(count, length, dim, dtype=torch.float16, device="cuda")
    D[-1, -1] = 0.5
    Q = torch.ones(1, 4, dim, dtype=torch.float16, device="cuda")
    scores = ek.maxsim(Q, D)
    assert scores[0, -1] == 4 * dim * 0.5
    assert scores[0, :-1].abs().max() == 0


def test_what_is_not_contiguous():
    Q, D, _ = batch()
    wanted = ek.maxsim(Q, D)
    assert torch.equal(ek.maxsim(Q.mT.contiguous().mT, D.transpose(0, 1).contiguous().transpose(0, 1)), wanted)
    odd = torch.empty(D.numel() + 1, dtype=D.dtype, device="cuda")[1:].view_as(D).copy_(D)
    assert odd.data_ptr() % 16
    assert torch.equal(ek.maxsim(Q, odd), wanted)


def test_leaves_that_need_gradients_in_lists():
    case = to_device(LAYOUTS["lists"](48, torch.float16, torch.float16, masked=False))
    Q, D = case.leaves()
    case(Q, D).sum().backward()
    assert all(leaf.grad is not None for leaf in (*flat(Q), *flat(D)) if leaf.numel())
