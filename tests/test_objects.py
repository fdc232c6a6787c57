"""The objects of the instruction sets: what they export, and what their hot loops do to the stack.

They are built apart from the module, by CMake into build/native, which `make emulate` uses too.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tools import spills

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "native"
# A program of the environment that runs the tests comes before one of the system.
PATH = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))


def run(*command: object) -> str:
    words = [shutil.which(str(command[0]), path=PATH), *map(str, command[1:])]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def objects() -> dict[str, Path]:
    """Object file of each instruction set that the compiler can build."""
    for tool in ("cmake", "ninja", "c++", "nm", "objdump"):
        if not shutil.which(tool, path=PATH):
            pytest.skip(f"needs {tool}")
    if not (ROOT / "csrc").exists():
        pytest.skip("not run from the source tree")
    ninja = shutil.which("ninja", path=PATH)
    options = ["-DEDGECOLBERT_PYTHON=OFF", "-DEDGECOLBERT_NATIVE_TESTS=ON", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options)
    run("cmake", "--build", BUILD, "--target", "isa_objects")
    lines = (BUILD / "isa_objects.txt").read_text().splitlines()
    return {name: Path(path) for name, path in (line.split(" ", 1) for line in lines)}


CLANGS = ("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))
ISAS = {
    "scalar": "x86-64",
    "avx2": "haswell",
    "avxvnni": "alderlake",
    "avx512": "skylake-avx512",
    "avx512vnni": "icelake-server",
    "avx512vnni_fp16": "sapphirerapids",
    "neon": "armv8-a",
    "neon_dotprod": "armv8.2-a+dotprod+fp16",
}
# Of Debian's compiler for it, g++-aarch64-linux-gnu.
ARM = ("--target=aarch64-linux-gnu", "-isystem", "/usr/aarch64-linux-gnu/include")


@pytest.mark.parametrize("isa", ISAS)
def test_clang_accepts_it(isa):
    """The objects here are made by one compiler; users have the other one, on a Mac always."""
    clang = next((found for name in CLANGS if (found := shutil.which(name, path=PATH))), None)
    if clang is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs clang++ 14 or later on x86-64")
    source = ROOT / "csrc" / "cpu" / "isa" / f"{isa}.cpp"
    if not source.exists():
        pytest.skip("not run from the source tree")
    target = ARM if isa.startswith("neon") else ()
    if target and not Path(target[-1]).exists():
        pytest.skip(f"needs {target[-1]}")
    run(clang, *target, "-std=c++17", f"-march={ISAS[isa]}", f"-I{ROOT / 'csrc'}", "-fsyntax-only", "-Werror", source)


def test_no_weak_symbols(objects):
    """A weak function compiled for AVX-512 could be the copy that the linker keeps for every CPU."""
    weak = {
        isa: [
            line for line in run("nm", "--defined-only", "--demangle", path).splitlines() if line.split()[1] in "uvVwW"
        ]
        for isa, path in objects.items()
    }
    assert not {isa: lines for isa, lines in weak.items() if lines}


def test_each_exports_its_kernel_table_alone(objects):
    for isa, path in objects.items():
        exported = run("nm", "--defined-only", "--extern-only", "--demangle", path).splitlines()
        assert [line.split(maxsplit=2)[2] for line in exported] == [f"edgecolbert::kernels_{isa}"]


def test_no_cxx_runtime(objects):
    """What an object takes from elsewhere is C: no template of the C++ library, no operator new."""
    for isa, path in objects.items():
        wanted = [line.split()[-1] for line in run("nm", "--undefined-only", path).splitlines()]
        assert not [symbol for symbol in wanted if symbol.startswith("_Z")], isa


def test_no_spills_in_hot_loops(objects):
    if not any(isa.startswith("avx") for isa in objects):
        pytest.skip("no AVX object on this architecture")
    found = {
        isa: spills.hot_loops(spills.disassemble(str(path))) for isa, path in objects.items() if isa.startswith("avx")
    }
    assert all(found.values()), "a vector object without a hot loop: the check sees nothing"
    spilling = [
        f"{isa}: {loop.function}: {len(loop.spills)} spills"
        for isa, loops in found.items()
        for loop in loops
        if loop.spills
    ]
    assert not spilling, "\n".join(spilling)


LOOP = """
0000000000000000 <kernel>:
   0:\tvmovaps 0x80(%rsp),%zmm9
   8:\tvmovups (%rsi),%zmm8
{body}
  50:\tvfmadd231ps (%rdi){{1to16}},%zmm8,%zmm0
  56:\tvfmadd231ps 0x4(%rdi){{1to16}},%zmm8,%zmm1
  5c:\tvfmadd231ps 0x8(%rdi){{1to16}},%zmm8,%zmm2
  62:\tvfmadd231ps 0xc(%rdi){{1to16}},%zmm8,%zmm3
  68:\tvfmadd231ps 0x10(%rdi){{1to16}},%zmm8,%zmm4
  6e:\tvfmadd231ps 0x14(%rdi){{1to16}},%zmm8,%zmm5
  74:\tjne    8 <kernel+0x8>
  76:\tvmovaps %zmm9,0x80(%rsp)
  7e:\tret
"""


@pytest.mark.parametrize(
    ("instruction", "is_spill"),
    [
        ("vmovaps 0x40(%rsp),%zmm1", True),
        ("vmovups %ymm1,-0x20(%rsp)", True),
        ("vpaddd 0x40(%rsp),%zmm1,%zmm1", True),
        ("vmovaps %xmm1,(%rbp)", True),
        ("vmovups 0x40(%rsp,%rax,4),%zmm1", False),
        ("vfmadd231ps 0x40(%rsp){1to16},%zmm1,%zmm2", False),
        ("mov    0x40(%rsp),%rax", False),
        ("prefetcht0 0x40(%rsp)", False),
    ],
)
def test_what_counts_as_a_spill(instruction, is_spill):
    (loop,) = spills.hot_loops(LOOP.format(body=f"  10:\t{instruction}"))
    assert loop.spills == ([instruction] if is_spill else [])


def test_a_block_placed_out_of_order_is_no_loop():
    """A tail that jumps back to the function's end runs once, whatever it does to the stack."""
    tail = LOOP.format(body="  10:\tvmovaps 0x40(%rsp),%zmm1").replace(
        "jne    8 <kernel+0x8>", "jne    76 <kernel+0x76>"
    )
    assert spills.hot_loops(tail) == []
