"""Calls that the compiled module answers because it did before: with the same launch, and only where nothing differs.

Without a GPU: tensors of the CPU, and a `cuLaunchKernel` that takes notes.
"""

from __future__ import annotations

import gc
import importlib
import sys
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import edgecolbert_kernels as ek
from edgecolbert_kernels import scoring
from edgecolbert_kernels.backends import VARIABLE, _chosen, native, repeated
from edgecolbert_kernels.backends.cuda_driver import contiguous
from edgecolbert_kernels.device import scores as device_scores
from edgecolbert_kernels.device.embeddings import DeviceEmbeddings, Packed
from edgecolbert_kernels.ops import tensors
from marks import compiled
from test_launch import FUNCTION, STREAM, Compiled, Driver, needs_compiler

pytestmark = [compiled, needs_compiler]

OPTIONS = (False, "exclude", "exact", None)
ARGUMENTS = {"cuda": 20, "triton": 24}
SCORES = {"cuda": 9, "triton": 10}


class Device(int):
    """The CPU, whose number is 0, -1 or None by whom one asks."""

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    __hash__ = int.__hash__


class Function:
    """A jitted function, which compiles at its first launch."""

    def __getitem__(self, grid):
        return lambda *given, **options: Compiled()


class Here:
    """Calls on the CPU that the kernels of a GPU backend would answer, of which the driver takes notes."""

    def __init__(self, monkeypatch, backend):
        self.monkeypatch, self.backend = monkeypatch, backend
        scoring._load_tensors()
        self.driver = Driver()
        self.driver.arguments = ARGUMENTS[backend]
        self.driver.replace(monkeypatch)
        self.set(torch._C, "_cuda_getDevice", lambda: self.device)
        self.set(torch._C, "_cuda_getCurrentRawStream", lambda _: self.stream)
        self.device, self.stream = Device(0), STREAM
        from edgecolbert_kernels.backends.cuda import driver
        from edgecolbert_kernels.backends.cuda import scoring as cuda
        from edgecolbert_kernels.backends.triton import launch
        from edgecolbert_kernels.backends.triton import scoring as triton

        self.set(driver, "processors", lambda _: 132)
        self.set(cuda, "_plans", {})
        cuda._kernel.cache_clear()
        self.set(driver.Kernel, "_load", lambda *_: FUNCTION)
        self.set(triton, "capability", lambda _: 90)
        for name, value in (("_calls", {}), ("_variants", {}), ("score", Function()), ("score_rows", Function())):
            self.set(triton, name, value)
        for name, value in (("INTERPRETED", False), ("_direct", True), ("takes_eight_bytes_each", lambda _: True)):
            self.set(launch, name, value)
        module = importlib.import_module(f"edgecolbert_kernels.backends.{backend}")
        self.set(tensors, "select", lambda *_: module)
        self.set(device_scores, "select", lambda *_: module)
        self.set(device_scores, "choose", lambda *_: backend)
        self.table = repeated.make(repeated.CPU)
        self.set(repeated, "table", self.table)
        self.answers = []
        self.set(scoring, "_repeat", self.repeat)

    def set(self, place, name, value):
        self.monkeypatch.setattr(place, name, value, raising=False)

    def repeat(self, *call):
        self.answers.append(self.table.repeat(*call))
        return self.answers[-1]

    @property
    def repeats(self):
        """How many calls the table has answered."""
        return sum(answer is not None for answer in self.answers)


@pytest.fixture(params=["cuda", "triton"])
def here(monkeypatch, request):
    yield Here(monkeypatch, request.param)


def aligned(*shape, dtype=torch.float16, offset=0):
    """Of memory that begins at a multiple of 16 bytes, `offset` elements later."""
    count = torch.Size(shape).numel()
    memory = torch.zeros(count + 64, dtype=dtype)
    first = (-memory.data_ptr() % 16) // dtype.itemsize + offset
    return memory[first : first + count].view(shape)


def batch():
    return aligned(32, 48), aligned(5, 7, 48)


def packed():
    return aligned(40, 48), aligned(35, 48), torch.tensor([0, 40]), torch.tensor([0, 7, 7, 20, 35])


CALLS = {
    "maxsim": lambda: (ek.maxsim, batch(), {}),
    "one query of a batch": lambda: (ek.maxsim, (aligned(1, 32, 48), aligned(5, 7, 48)), {}),
    "own documents": lambda: (ek.maxsim, (aligned(3, 32, 48), aligned(3, 5, 7, 48)), {}),
    "masks": lambda: (
        ek.maxsim,
        batch(),
        {"q_mask": torch.ones(32, dtype=torch.bool), "d_mask": torch.ones(5, 7, dtype=torch.bool)},
    ),
    "options": lambda: (
        ek.maxsim,
        batch(),
        {"mask_mode": "zero", "precision": "fast", "out_dtype": torch.float32},
    ),
    "packed": lambda: (ek.maxsim_varlen, packed(), {}),
    "chosen pairs": lambda: (
        ek.maxsim_indexed,
        (aligned(3, 32, 48), aligned(5, 7, 48), torch.tensor([0, 2, 1, 1]), torch.tensor([4, 4, 0, 2])),
        {},
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_same_launch(here, call):
    """On the stream of the moment, with a new output and other inputs' addresses."""
    function, inputs, options = CALLS[call]()
    first = function(*inputs, **options)
    assert not here.repeats and len(here.table) == 1
    here.stream += 16
    others = [x.clone() if x.dtype is torch.int64 else aligned(*x.shape) for x in inputs]
    second, third = function(*inputs, **options), function(*others, **options)
    assert here.repeats == 2 and len(here.table) == 1
    assert (second.shape, second.dtype, second.requires_grad) == (first.shape, torch.float32, False)
    ordinary = [*here.driver.seen] if here.backend == "cuda" else []
    if here.backend == "triton":  # whose first launch was by Triton itself
        here.set(scoring, "_repeat", None)
        fourth = function(*inputs, **options)
        (*repeats, last) = here.driver.seen
        ordinary, first = [(*last[:2], STREAM, *last[3:]), *repeats], fourth
    place = SCORES[here.backend]
    (one, two, three), scores = ordinary, (first, second, third)
    for seen, output in zip((one, two, three), scores, strict=True):
        assert seen[3][place] == output.data_ptr()
    assert len({output.data_ptr() for output in scores}) == 3
    rest = [[n for i, n in enumerate(seen[3]) if i != place] for seen in (one, two, three)]
    assert one[:2] == two[:2] == three[:2] and (one[2], two[2], three[2]) == (STREAM, STREAM + 16, STREAM + 16)
    assert rest[0] == rest[1]
    moved = {x.data_ptr(): y.data_ptr() for x, y in zip(inputs, others, strict=True)}
    assert [moved.get(n, n) for n in rest[0]] == rest[2]


def resident(dtype):
    """Four documents on a device, one of them empty."""
    offsets = torch.tensor([0, 7, 7, 20, 35])
    scales = torch.ones(4) if dtype is torch.int8 else None
    return DeviceEmbeddings(Packed(aligned(35, 48, dtype=dtype), offsets, scales), offsets.numpy(), None, None)


RESIDENT = {
    "all": (ek.maxsim, lambda: (aligned(32, 48),), ()),
    "pairs": (ek.maxsim_indexed, lambda: (aligned(3, 32, 48),), (torch.tensor([0, 2, 2]), torch.tensor([3, 3, 0]))),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("call", RESIDENT)
def test_documents_on_a_device(here, call, dtype):
    """Their scales are an input like the others, and other documents of as many tokens are answered alike."""
    function, queries, index = RESIDENT[call]
    one, other, Q = resident(dtype), resident(dtype), *queries()
    first = function(Q, one, *index)
    assert not here.repeats and len(here.table) == 1
    repeated_scores = [function(Q, documents, *index) for documents in (one, other)]
    assert here.repeats == 2 and len(here.table) == 1
    assert all(each.shape == first.shape for each in repeated_scores)
    place = SCORES[here.backend]
    for seen, documents, scores in zip(here.driver.seen[-2:], (one, other), repeated_scores, strict=True):
        inputs = Q, documents.tokens, None, None, None, documents.offsets, *(index or (None, None)), documents.scales
        assert seen[3][: len(inputs)] == [0 if x is None else x.data_ptr() for x in inputs]
        assert seen[3][place] == scores.data_ptr()
    assert function(Q, one, *index, out_dtype=torch.float16).dtype is torch.float16
    assert here.repeats == 2
    with pytest.raises(ValueError, match="mask"):
        function(Q, one, *index, d_mask=torch.ones(4, 9))
    if not index:
        with pytest.raises(TypeError, match="query_index"):
            ek.maxsim_indexed(Q[None], one, None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("what", ["q_mask", "query_index", "document_index"])
def test_documents_on_another_device(here, what, dtype):
    given = {"query_index": torch.tensor([0, 2]), "document_index": torch.tensor([3, 0])}
    given["q_mask"] = torch.ones(3, 32, dtype=torch.bool)
    given[what] = given[what].to("meta")
    with pytest.raises(ValueError, match=f"{what} is on meta"):
        ek.maxsim_indexed(aligned(3, 32, 48), resident(dtype), **given)
    assert not here.driver.seen


@pytest.fixture
def known(monkeypatch):
    """Asks a table that knows one call, with some of it changed."""
    here = Here(monkeypatch, "cuda")
    Q, D = batch()
    d_mask = torch.ones(5, 7, dtype=torch.bool)
    ek.maxsim(Q, D, d_mask=d_mask)
    names = ("Q", "D", "q_mask", "d_mask", "cu_q", "cu_d", "query_index", "document_index", "scales")
    names += ("normalize", "mask_mode", "precision", "out_dtype")
    call = dict(zip(names, (Q, D, None, d_mask, None, None, None, None, None, *OPTIONS), strict=True))

    def ask(**changed):
        return here.table.repeat(*(call | changed).values())

    assert ask() is not None
    yield SimpleNamespace(here=here, ask=ask, Q=Q, D=D, d_mask=d_mask)
    monkeypatch.undo()


def negative(X):
    return torch._neg_view(X)


class Subclass(torch.Tensor):
    pass


def given_back(X):
    X.untyped_storage().resize_(0)
    return X


def without_storage(X, first=0):
    return given_back(torch.cat([X[:first], X])[first:])


OTHER_TENSORS = {
    "shape": ("D", lambda D: aligned(6, 7, 48)),
    "as many elements": ("D", lambda D: aligned(7, 5, 48)),
    "another rank": ("Q", lambda Q: Q[None]),
    "dtype": ("D", lambda D: D.bfloat16()),
    "stride": ("D", lambda D: aligned(5, 9, 48)[:, :7]),
    "stride of a dimension": ("Q", lambda Q: aligned(48, 32).T),
    "address": ("D", lambda D: aligned(5, 7, 48, offset=4)),
    "gradient": ("D", lambda D: D.clone().requires_grad_()),
    "gradient of a parameter": ("Q", lambda Q: torch.nn.Parameter(Q)),
    "negative view": ("Q", negative),
    "zeros without storage": ("Q", lambda Q: torch._efficientzerotensor(Q.shape, dtype=Q.dtype)),
    "no storage": ("D", without_storage),
    "no storage, with an offset": ("D", lambda D: without_storage(D, 5)),
    "no storage, with a large offset": (
        "D",
        lambda D: given_back(torch.zeros(2**20).half()[2**19 :][:1680].view(5, 7, 48)),
    ),
    "empty": ("D", lambda D: D[:0]),
    "subclass": ("Q", lambda Q: Q.as_subclass(Subclass)),
    "meta": ("Q", lambda Q: Q.to("meta")),
    "sparse": ("Q", lambda Q: Q.to_sparse()),
    "array": ("Q", lambda Q: Q.numpy()),
    "list": ("D", list),
    "nothing": ("D", lambda D: None),
    "no mask": ("d_mask", lambda mask: None),
    "mask of bytes": ("d_mask", lambda mask: mask.to(torch.uint8)),
    "strided mask": ("d_mask", lambda mask: torch.ones(7, 5, dtype=torch.bool).T),
    "mask of another shape": ("d_mask", lambda mask: torch.ones(5, 8, dtype=torch.bool)),
    "another mask": ("q_mask", lambda _: torch.ones(32, dtype=torch.bool)),
    "boundaries": ("cu_d", lambda _: torch.tensor([0, 7])),
    "index": ("query_index", lambda _: torch.tensor([0, 0])),
    "normalize": ("normalize", lambda _: True),
    "mask_mode": ("mask_mode", lambda _: "zero"),
    "mask_mode that is none": ("mask_mode", lambda _: "none"),
    "precision": ("precision", lambda _: "fast"),
    "out_dtype": ("out_dtype", lambda _: torch.float16),
}


@pytest.mark.parametrize("what", OTHER_TENSORS)
def test_another_call(known, what):
    name, change = OTHER_TENSORS[what]
    before = getattr(known, name, None)
    launches = len(known.here.driver.seen)
    assert known.ask(**{name: change(before)}) is None
    assert len(known.here.driver.seen) == launches
    assert known.ask() is not None


def test_tensors_of_transforms(known):
    """They have the type of ordinary ones, and are read where they have got out of their transform too."""
    escaped = []
    torch.vmap(lambda x: escaped.append(x) or x.sum())(known.Q[None])
    torch.func.grad(lambda x: escaped.append(x) or x.sum())(known.Q)
    assert len(escaped) == 2
    for each in escaped:
        assert type(each) is torch.Tensor and known.ask(Q=each) is None
    functional = torch._to_functional_tensor(known.Q)
    assert known.ask(Q=functional) is None


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


SURROUNDINGS = {
    "inference": torch.inference_mode,
    "dispatch mode": Dispatch,
    "fake tensors": FakeTensorMode,
    "function mode": FunctionMode,
    "default device": lambda: torch.device("cpu"),
    "forward derivative": forward_ad.dual_level,
    "backend": lambda: ek.backend("torch"),
    "the same backend, by name": lambda: ek.backend("triton"),
}


@pytest.mark.parametrize("what", SURROUNDINGS)
def test_other_surroundings(known, what):
    with SURROUNDINGS[what]():
        assert known.ask() is None
    assert known.ask() is not None


def test_inside_transforms(known):
    def inside(x):
        assert known.ask() is None
        return x.sum()

    torch.func.grad(inside)(torch.ones(3))
    torch.vmap(inside)(torch.ones(3, 2))
    torch.func.functionalize(inside)(torch.ones(3))
    torch.fx.experimental.proxy_tensor.make_fx(inside)(torch.ones(3))
    torch.jit.trace(inside, torch.ones(3), check_trace=False)
    assert known.ask() is not None


def test_gradients_that_are_off(known):
    Q = known.Q.clone().requires_grad_()
    if Q.data_ptr() % 16 == 0:
        with torch.no_grad():
            assert not known.ask(Q=Q).requires_grad
    assert known.ask(Q=Q) is None


def test_the_variable_of_the_environment(known, monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch")
    assert known.ask() is None
    monkeypatch.delenv(VARIABLE)
    assert known.ask() is not None


def test_another_context(known):
    """The backend that was chosen for one thread or task."""
    import contextvars

    context = contextvars.copy_context()
    context.run(_chosen.set, "torch")
    assert context.run(known.ask) is None
    assert known.ask() is not None


def test_another_device(known):
    known.here.device = 1
    assert known.ask() is None
    known.here.device = Device(0)
    assert known.ask() is not None


def test_devices_of_another_type(known, monkeypatch):
    monkeypatch.setattr(known.here, "table", repeated.make(repeated.CUDA))
    assert known.ask() is None
    assert not known.here.table.keep(known.Q, known.D, *[None] * 7, *OPTIONS, None)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
def test_tracing(known, traced):
    """Nothing of the table is traced, and what was compiled before it knew anything stays."""

    def score(Q, D):
        return ek.maxsim(Q, D, d_mask=known.d_mask) * 2

    torch._dynamo.reset()
    function = torch.compile(score, backend="eager", fullgraph=True) if traced else score
    table, launches = known.here.table, known.here.driver.seen
    known.here.set(scoring, "_repeat", table.repeat)
    found = []
    for forget in (False, True, False):
        if forget:
            table.clear()
        before = len(launches)
        with torch._dynamo.config.patch(error_on_recompile=True):
            function(known.Q, known.D)
        found.append(len(launches) - before)
    assert found == ([0, 0, 0] if traced else [1, 1, 1])


def test_compiling_without_a_tracer(known, monkeypatch):
    """As the exporter sets it, which runs what it traces."""
    before = len(known.here.answers)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    ek.maxsim(known.Q, known.D, d_mask=known.d_mask)
    assert len(known.here.answers) == before


def test_what_is_not_kept(here):
    Q, D = batch()
    mask = torch.ones(5, 7, dtype=torch.uint8)
    calls = (
        lambda: ek.maxsim(Q, D, d_mask=mask),  # another mask is what the kernel reads
        lambda: ek.maxsim(Q, list(D)),
        lambda: ek.maxsim(Q, D.clone().requires_grad_()).detach(),
        lambda: ek.maxsim(Q, D, out_dtype=torch.float16),
        lambda: ek.maxsim_pairs(D, D),
    )
    for call in calls:
        for _ in range(3):
            call()
    assert not len(here.table) and not here.repeats


def test_what_is_remembered_not_to_be_repeated(here):
    """Products of float32 go by a switch of PyTorch's, and other strides than 1 by a copy."""
    Q, D = batch()
    for call in ((Q.float(), D.float()), (Q, D.mT.contiguous().mT), (Q, D[:0]), (Q, aligned(5, 7, 48, offset=1))):
        here.table.clear()
        for _ in range(3):
            ek.maxsim(*call)
        assert not here.repeats
        assert len(here.table) <= 1


def test_refusal(known, monkeypatch):
    """A thread without a context, or what is wrong with the device: the usual way gives the one and says the other."""
    known.here.driver.code = 201
    assert known.ask() is None
    stream = SimpleNamespace(query=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    with pytest.raises(RuntimeError, match="201"):
        ek.maxsim(known.Q, known.D, d_mask=known.d_mask)
    known.here.driver.code = 0
    assert known.ask() is not None


def test_what_fails(monkeypatch):
    """Nothing is raised, and nothing started."""

    def fail(*_, **__):
        raise MemoryError

    for place, name in ((torch._C._dynamo.guards, "_empty_strided_cpu"), (torch, "is_grad_enabled")):
        with monkeypatch.context() as patch:
            here = Here(patch, "cuda")
            failing = []
            real = getattr(place, name)
            patch.setattr(place, name, lambda *a, real=real, on=failing: fail() if on else real(*a))
            table = repeated.make(repeated.CPU)
            patch.setattr(repeated, "table", table)
            here.table = table
            Q, D = batch()
            ek.maxsim(Q, D)
            call = (Q, D, *[None] * 7, *OPTIONS)
            assert table.repeat(*call) is not None
            launches = len(here.driver.seen)
            failing.append(True)
            assert table.repeat(*call) is None
            assert len(here.driver.seen) == launches


def test_bounded(known, monkeypatch):
    table, launch = known.here.table, None
    others = [object() for _ in range(4096)]
    for each in others:
        assert table.keep(known.Q, known.D, *[None] * 7, each, launch)
    assert len(table) == 1, "it began anew when there was no room"
    assert sys.getrefcount(others[0]) == 3 - (sys.version_info >= (3, 14)), "what was forgotten is let go"


def test_forgetting(known):
    from edgecolbert_kernels.backends.triton import scoring as triton

    triton.forget()
    assert known.ask() is None and not len(known.here.table)


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "without PyTorch's quick one"])
def test_output(monkeypatch, quick):
    """It is what `torch.empty` makes."""
    if not quick:
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    empty_strided = repeated.empty_strided(repeated.CPU)
    for shape in ((), (5,), (0,), (2, 3, 4), (2, 0, 4), (0, 7)):
        for inference in (False, True):
            with torch.inference_mode(inference):
                wanted = torch.empty(shape)
                made = empty_strided(*contiguous(shape, torch.float32))
            assert (made.shape, made.stride(), made.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
            assert (made.device, made.is_inference()) == (wanted.device, inference)
            assert torch._C._dispatch_keys(made).raw_repr() == torch._C._dispatch_keys(wanted).raw_repr()


def test_emptied_from_within(monkeypatch):
    """By whoever runs while the output is allocated."""
    here = Here(monkeypatch, "cuda")
    guards = torch._C._dynamo.guards
    real = guards._empty_strided_cpu
    monkeypatch.setattr(guards, "_empty_strided_cpu", lambda *a: here.table.clear() or real(*a))
    here.table = repeated.make(repeated.CPU)
    monkeypatch.setattr(repeated, "table", here.table)
    Q, D = batch()
    ek.maxsim(Q, D)
    launches = len(here.driver.seen)
    assert ek.maxsim(Q, D).shape == (5,)
    assert len(here.driver.seen) == launches + 1 and here.repeats == 1 and not len(here.table)


def test_bad_launches(known):
    table, call = known.here.table, (known.Q, known.D, *[None] * 7, "other")
    good = [
        known.here.driver.address,
        FUNCTION,
        (1, 1, 1),
        32,
        0,
        (0,) * 10,
        9,
        ((5,), (1,), torch.float32),
        None,
    ]
    assert table.keep(*call, tuple(good))
    for place, value, error in (
        (0, 0, ValueError),
        (1, 0, ValueError),
        (1, "f", TypeError),
        (2, (1, 1), TypeError),
        (5, [0] * 10, TypeError),
        (5, (0,) * 65, ValueError),
        (5, (*(0,) * 9, 2.5), TypeError),
        (6, 8, ValueError),
        (6, 10, ValueError),
        (7, [5], TypeError),
    ):
        with pytest.raises(error):
            table.keep(*call, (*good[:place], value, *good[place + 1 :]))
    with pytest.raises(TypeError, match="tuple"):
        table.keep(*call, 5)
    assert table.keep() is False and table.repeat() is None and table.missed() is False


def test_bad_tables(monkeypatch):
    """Where PyTorch has not what a table needs, there is none."""
    Here(monkeypatch, "cuda")
    launches, given = native.module().Launches, {}
    monkeypatch.setattr(native, "module", lambda: SimpleNamespace(Launches=lambda **named: given.update(named)))
    repeated.make(repeated.CPU)
    assert len(launches(**given)) == 0
    for name, value in (
        ("inputs", 0),
        ("inputs", 64),
        ("exchange", None),
        ("entries", (({}, 1, 2),)),
        ("entries", (([], 1),)),
        ("variable", None),
    ):
        with pytest.raises(ValueError, match=r"want|capsule|PyCapsule"):
            launches(**(given | {name: value}))
    with pytest.raises(TypeError):
        launches()


def test_nothing_leaks(known):
    """Ten thousand answers, and as many calls that are not known, hold nothing."""
    here, Q, D, mask = known.here, known.Q, known.D, known.d_mask
    ask, other = here.table.repeat, object()
    call = (Q, D, None, mask, *[None] * 5, *OPTIONS)
    unknown = (*call[:-1], other)
    assert ask(*call) is not None and ask(*unknown) is None
    watched = Q, D, mask, Q.dtype, Q.device, other, torch.float32, torch.Size, torch.empty, call, unknown

    def counts():
        return [sys.getrefcount(each) for each in watched]

    def tensors_alive():
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    def run():
        for _ in range(10_000):
            ask(*call)
            ask(*unknown)
            here.driver.seen.clear()

    run()
    alive, before = tensors_alive(), counts()
    tracemalloc.start()
    try:
        first = tracemalloc.get_traced_memory()[0]
        run()
        grown = tracemalloc.get_traced_memory()[0] - first
    finally:
        tracemalloc.stop()
    assert counts() == before and tensors_alive() == alive
    assert grown < 10_000
