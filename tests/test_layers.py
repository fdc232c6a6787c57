"""Imports and includes go one way. A new module or folder must be given its place here before it passes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgecolbert_kernels as ek

PACKAGE = Path(ek.__file__).parent
CSRC = PACKAGE.parent / "csrc"

# What each part of the package may import of it, besides itself; `backends` stands for the folder.
MAY_IMPORT = {
    "_version": set(),
    "signatures": set(),
    "checks": {"signatures"},
    "reference": set(),
    "backends": {"_C", "checks", "reference", "signatures"},
    "arrays": {"backends", "checks"},
    "ops": {"arrays", "backends", "checks"},
    "losses": {"checks", "ops", "scoring", "signatures"},
    "replay": {"checks"},
    "gradcache": {"checks", "replay"},
    "distributed": {"checks"},
    "modules": {"checks", "distributed", "gradcache", "losses", "scoring", "signatures"},
    "integrations": {"backends", "checks", "ops", "scoring", "signatures"},
    "scoring": {"arrays", "backends", "checks", "ops", "signatures"},
    "dtypes": {"checks", "signatures"},
    "storage": {"checks", "signatures"},
    "identifiers": {"checks", "storage"},
    "device": {"backends", "checks", "ops", "scoring", "signatures"},
    "packed": {"backends", "checks", "device", "dtypes", "identifiers", "scoring", "signatures", "storage"},
    "packing": {"backends", "checks", "device", "dtypes", "packed", "signatures"},
    "retrieval": {"checks", "device", "dtypes", "identifiers", "packed", "scoring", "signatures"},
    "export": {"checks", "packed"},
    "cli": {"_version", "packed", "retrieval", "signatures"},
    "__init__": {
        "_version",
        "backends",
        "distributed",
        "gradcache",
        "integrations",
        "losses",
        "modules",
        "packed",
        "packing",
        "retrieval",
        "scoring",
        "storage",
    },
    "env": {"_version", "backends"},
}

# What each folder of csrc may include, besides itself and system headers.
MAY_INCLUDE = {
    "abi.h": set(),
    "cpu/simd": {"abi.h"},
    "cpu/dot": {"abi.h", "cpu/simd"},
    "cpu/kernels": {"abi.h", "cpu/simd", "cpu/dot"},
    "cpu/isa": {"abi.h", "cpu/simd", "cpu/dot", "cpu/kernels"},
    "cpu": {"abi.h"},
    "cuda_launch.h": set(),
    "cuda_launch.cpp": {"cuda_launch.h"},
    "cuda_repeat.h": set(),
    "cuda_repeat.cpp": {"cuda_launch.h", "cuda_repeat.h"},
    "bindings.cpp": {"abi.h", "cpu", "cuda_launch.h", "cuda_repeat.h"},
}
# Compiled for one instruction set: an inline function of the C++ library, instantiated here, could be the one that the
# linker hands to every CPU. So: intrinsics and C headers.
ONE_INSTRUCTION_SET = ("abi.h", "cpu/simd", "cpu/dot", "cpu/kernels", "cpu/isa")


def part(dotted: str) -> str:
    """`edgecolbert_kernels.ops.maxsim` -> `ops`; the package itself -> `__init__`."""
    return dotted.split(".")[1] if "." in dotted else "__init__"


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, in functions too."""
    inside = ("edgecolbert_kernels", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            whole = module == "edgecolbert_kernels"
            yield from ((node.lineno, f"{module}.{name.name}" if whole else module) for name in node.names)


def modules() -> dict[Path, str]:
    return {
        path: part(".".join(("edgecolbert_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)))
        for path in PACKAGE.rglob("*.py")
    }


def test_every_module_has_a_place():
    assert set(modules().values()) == set(MAY_IMPORT)


def test_imports_go_one_way():
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {here} imports {part(name)}"
        for path, here in modules().items()
        for line, name in imports(path)
        if name.split(".")[0] == "edgecolbert_kernels" and part(name) not in MAY_IMPORT[here] | {here}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_reference_needs_only_torch():
    roots = {name.split(".")[0] for _, name in imports(PACKAGE / "reference.py")}
    assert roots <= {"__future__", "torch"}


@pytest.mark.parametrize("name", ["dtypes", "identifiers", "packed", "packing", "retrieval", "storage", "export"])
def test_torch_comes_with_a_tensor(name):
    """What works on numpy alone imports torch inside functions at most."""
    for path, here in modules().items():
        if here == name:
            tree = ast.parse(path.read_text())
            tops = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            roots = {n.name.split(".")[0] for node in tops if isinstance(node, ast.Import) for n in node.names}
            roots |= {(node.module or "").split(".")[0] for node in tops if isinstance(node, ast.ImportFrom)}
            assert "torch" not in roots, path


def test_the_package_knows_none_of_its_users():
    users = {"benchmarks", "demo", "tests", "tools", "training"}
    wrong = [f"{path}:{line}" for path in modules() for line, name in imports(path) if name.split(".")[0] in users]
    assert not wrong


def place(path: Path) -> str:
    """The row of MAY_INCLUDE that a file of csrc belongs to."""
    relative = path.relative_to(CSRC)
    return str(relative.parent) if len(relative.parts) > 1 else relative.name


def includes(pattern: str) -> list[tuple[Path, int, str]]:
    return [
        (path, number, match[1])
        for path in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cpp")])
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := re.match(rf"\s*#\s*include\s+{pattern}", line))
    ]


needs_sources = pytest.mark.skipif(not CSRC.exists(), reason="not run from the source tree")


@needs_sources
def test_includes_go_one_way():
    wrong = []
    for path, number, name in includes('"(.+)"'):
        found = next((at for at in (path.parent / name, CSRC / name) if at.exists()), None)
        target = place(found.resolve()) if found else "nothing"
        if target not in MAY_INCLUDE[place(path)] | {place(path)}:
            wrong.append(f"{path.relative_to(CSRC)}:{number}: {place(path)} includes {target} ({name})")
    assert not wrong, "\n".join(wrong)


@needs_sources
def test_instruction_set_files_include_only_c_headers():
    wrong = [
        f"{path.relative_to(CSRC)}:{number}: <{name}>"
        for path, number, name in includes("<(.+)>")
        if place(path) in ONE_INSTRUCTION_SET and not re.fullmatch(r"\w+\.h", name)
    ]
    assert not wrong, "\n".join(wrong)


@needs_sources
def test_only_the_bindings_know_python():
    wrong = [path for path, _, name in includes('[<"](.+)[">]') if re.match("pybind11|Python|torch|ATen", name)]
    assert {place(path) for path in wrong} <= {"bindings.cpp", "cuda_launch.h", "cuda_repeat.h"}
