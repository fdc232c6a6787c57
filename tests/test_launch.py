"""How kernels are started: what the driver is handed, without a GPU, by a `cuLaunchKernel` that takes notes."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from functools import partial

import pytest

from edgecolbert_kernels.backends import cuda_driver, native
from marks import compiled

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="triton is not installed, or its compiler's tools are not",
)

UNSIGNED, POINTER = ctypes.c_uint, ctypes.c_void_p
Launch = ctypes.CFUNCTYPE(ctypes.c_int, POINTER, *[UNSIGNED] * 7, POINTER, ctypes.POINTER(POINTER), POINTER)
GRID, THREADS, SHARED, STREAM, FUNCTION = (7, 3, 2), 128, 99_328, 0x7F00_0000_0010, 0x7F00_0000_0020
ARGUMENTS = (0, 1, 2**40 + 3, 2**63 + 5, 2**64 - 1, -1)


class Driver:
    """Notes launches, and answers with `code`."""

    def __init__(self, code: int = 0):
        self.code, self.seen = code, []
        self.function = Launch(self.launch)
        self.address = ctypes.cast(self.function, POINTER).value

    def launch(self, function, *rest):
        *sizes, stream, arguments, extra = rest
        values = [ctypes.cast(arguments[n], ctypes.POINTER(ctypes.c_uint64))[0] for n in range(self.arguments)]
        self.seen.append((function, tuple(sizes), stream, values, extra))
        return self.code

    def replace(self, monkeypatch):
        """Take the place of the CUDA driver."""
        monkeypatch.setattr(cuda_driver, "launch", lambda: partial(native.module().cuda_launch, self.address))

    def __call__(self, arguments=ARGUMENTS, grid=GRID):
        self.arguments = len(arguments)
        native.module().cuda_launch(self.address, FUNCTION, grid, THREADS, SHARED, STREAM, arguments)


@compiled
@pytest.mark.parametrize("arguments", [(), ARGUMENTS, tuple(range(64))], ids=len)
def test_what_the_driver_is_handed(arguments):
    driver = Driver()
    driver(arguments)
    values = [value % 2**64 for value in arguments]
    assert driver.seen == [(FUNCTION, (*GRID, THREADS, 1, 1, SHARED), STREAM, values, None)]


@compiled
def test_default_stream():
    driver = Driver()
    driver.arguments = 0
    native.module().cuda_launch(driver.address, FUNCTION, (1, 1, 1), 32, 0, 0, ())
    assert driver.seen == [(FUNCTION, (1, 1, 1, 32, 1, 1, 0), None, [], None)]


@compiled
@pytest.mark.parametrize("grid", [(0, 1, 1), (5, 0, 1), (5, 1, 0)], ids=str)
def test_nothing_to_start(grid):
    driver = Driver(code=1)
    driver(grid=grid)
    assert not driver.seen


@compiled
def test_refusal():
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel.*700"):
        Driver(code=700)()


@compiled
def test_bad_calls():
    driver, launch = Driver(), native.module().cuda_launch
    good = [driver.address, FUNCTION, GRID, THREADS, SHARED, STREAM, ()]
    for place, value, error, text in (
        (0, 0, ValueError, "address"),
        (1, "f", TypeError, None),
        (2, (1, 1), TypeError, "grid"),
        (2, 5, TypeError, "grid"),
        (6, [1], TypeError, "tuple"),
        (6, (1, 2.5), TypeError, None),
        (6, tuple(range(65)), ValueError, "65 arguments"),
    ):
        with pytest.raises(error, match=text):
            launch(*good[:place], value, *good[place + 1 :])
    with pytest.raises(TypeError, match="want address"):
        launch(*good[:-1])
    assert not driver.seen


def kernels(*calls):
    """The kernels that these calls of the compiler's report start, compiled, each with its launch."""
    from tools import triton_report

    for name, _, run in triton_report.calls():
        if name in calls:
            for launch in triton_report.launches(run, 90):
                yield launch, triton_report.compiled(launch, 90)


CALLS = (
    "1 query, d 48",
    "backward, d 48",
    "pack, d 48, fp16",
    "pack, d 48, int8",
    "unpack, d 48, int8",
    "contrastive loss, every option",
)


@compiled
@needs_compiler
@pytest.mark.parametrize("call", CALLS)
def test_parameters_of_the_kernels(call, monkeypatch):
    """Every kernel takes its arguments and two scratch addresses, 8 bytes each, in the order of `Variant.launch`."""
    from edgecolbert_kernels.backends.triton import launch

    for noted, kernel in kernels(call):
        assert launch.takes_eight_bytes_each(kernel)
        kernel.function = FUNCTION  # there is no device to load it on
        driver = Driver()
        driver.replace(monkeypatch)
        given = [each for _, each in noted.signature if each != "constexpr"]
        arguments = (*range(1, len(given) + 1), *launch.SCRATCH)
        driver.arguments = len(arguments)
        launch.Kernel(kernel, ()).start((5, 1, 1), STREAM, arguments)
        sizes = 5, 1, 1, 32 * dict(noted.options)["num_warps"], 1, 1, kernel.metadata.shared
        assert driver.seen == [(FUNCTION, sizes, STREAM, list(arguments), None)]


class Compiled:
    """A compiled kernel as Triton hands it out, of one pointer and one integer."""

    function, packed_metadata = FUNCTION, (4, 1, 0)

    def __init__(self, parameters=("u64",) * 4, types=("*fp16", "i64"), **metadata):
        given = dict(zip(("x", "n"), types, strict=True))
        fn = type("Function", (), {"arg_names": ["x", "n", "C"]})
        self.src = type("Source", (), {"signature": given | {"C": "constexpr"}, "fn": fn})
        lines = ",\n".join(f"\t.param .{kind} .ptr .global .align 1 k_param_{n}" for n, kind in enumerate(parameters))
        self.asm = {"ptx": f".version 8.7\n.target sm_90a\n\t// .globl k\n.visible .entry k(\n{lines}\n)\n{{ }}"}
        plain = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False, "num_warps": 4, "shared": 0}
        plain |= {"global_scratch_size": 0, "profile_scratch_size": 0}
        self.metadata = type("Metadata", (), plain | metadata)
        self.ran = []

    def run(self, *arguments):
        self.ran.append(arguments)


BY_TRITON = (5, 1, 1, STREAM, FUNCTION, (4, 1, 0), None, None, None, 0x10, 7, "constant")


@needs_compiler
@pytest.mark.parametrize(
    "kernel",
    [
        Compiled(parameters=("u64",) * 3),
        Compiled(parameters=("u64", "u32", "u64", "u64")),
        Compiled(types=("*fp16", "constexpr")),
        Compiled(types=("*fp16", "i32")),
        Compiled(num_ctas=2),
        Compiled(launch_pdl=True),
        Compiled(launch_cooperative_grid=True),
        Compiled(global_scratch_size=64),
    ],
    ids=["no scratch", "4 bytes", "a 1 is no argument", "i32", "cluster", "dependent", "cooperative", "scratch"],
)
def test_other_kernels_are_started_by_triton(kernel):
    from edgecolbert_kernels.backends.triton import launch

    assert launch.takes_eight_bytes_each(Compiled())
    assert not launch.takes_eight_bytes_each(kernel)
    launch.Kernel(kernel, ("constant",)).start((5, 1, 1), STREAM, (0x10, 7, *launch.SCRATCH))
    assert kernel.ran == [BY_TRITON]


@compiled
@needs_compiler
def test_what_the_driver_refuses_is_started_by_triton(monkeypatch):
    """Which provides a thread's context, or says what is wrong."""
    from edgecolbert_kernels.backends.triton import launch

    driver, kernel = Driver(code=201), Compiled()
    driver.arguments = 4
    driver.replace(monkeypatch)
    launch.Kernel(kernel, ("constant",)).start((5, 1, 1), STREAM, (0x10, 7, *launch.SCRATCH))
    assert driver.seen[0][3] == [0x10, 7, 0, 0]
    assert kernel.ran == [BY_TRITON]


class Function:
    """A jitted function, which compiles at every launch."""

    arg_names = Compiled().src.fn.arg_names

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *given, **options: self.launches.append((grid, given, options)) or TwoPointers()


class TwoPointers(Compiled):
    def __init__(self):
        super().__init__()
        self.src.signature = {"x": "*fp16", "y": "*fp16", "n": "i64", "C": "constexpr"}
        self.src.fn.arg_names = list(self.src.signature)
        self.asm["ptx"] = Compiled(parameters=("u64",) * 5).asm["ptx"]


@compiled
@needs_compiler
def test_repeated_launch(monkeypatch):
    """Compiled once for each alignment; then only addresses go to the driver, on the stream of the moment."""
    import torch

    from edgecolbert_kernels.backends.triton import launch

    driver, function, streams = Driver(), Function(), iter(range(100, 200))
    driver.arguments = 5
    monkeypatch.setattr(launch, "INTERPRETED", False)
    driver.replace(monkeypatch)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: next(streams), raising=False)
    memory = torch.zeros(64, dtype=torch.float16)
    memory = memory[(-memory.data_ptr() % 16) // 2 :]
    x, y, odd = memory[:16], memory[16:32], memory[1:17]
    variant = launch.Variant(function, ("constant",), 4, 2, (0, 1, 2))
    for integer in (48, 3):
        repeated = launch.Launch(variant, -1, 5, 2, (integer,))
        for first, second, compiles in ((x, y, True), (x, y, False), (y, x, False), (odd, y, True), (odd, y, False)):
            function.launches.clear()
            driver.seen.clear()
            addresses = first.data_ptr(), second.data_ptr()
            repeated.start(addresses, (first, second))
            if compiles:
                assert function.launches == [
                    ((5, 1), (first, second, integer, "constant"), {"num_warps": 4, "num_stages": 2})
                ]
                assert not driver.seen
            else:
                (seen,) = driver.seen
                assert not function.launches
                assert seen[1] == (5, 1, 1, 128, 1, 1, 0)
                assert seen[3] == [*addresses, integer, 0, 0]
    assert next(streams) == 106, "one stream for each launch by the driver"
    y.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no storage"):
        repeated.start((y.data_ptr(), y.data_ptr()), (y, y))


def test_no_driver(monkeypatch):
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libno-such-driver.so")
    assert cuda_driver.launch.__wrapped__() is None
