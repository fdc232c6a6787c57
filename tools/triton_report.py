"""Compiles every GPU kernel ahead of time, without a GPU, and reports what the compiler made of it.

    python -m tools.triton_report [--check] [--only TEXT]

The calls below run on meta tensors, with the launcher replaced by one that takes notes: so what is compiled is what these
calls would start. Each kernel is compiled for compute capability 8.0 and 9.0; registers, stack, shared memory and spills come
from the machine code (cuobjdump, which the triton package brings), and so do the tensor-core instructions. Results go into
docs/triton-kernels.jsonl and, as a table, into docs/triton-kernels.md; `--check` writes nothing and fails where a
kernel breaks a rule or where its table row is out of date.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "triton-kernels.jsonl"
TABLE = ROOT / "docs" / "triton-kernels.md"

# Bytes of shared memory that one program may take.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
INSTRUCTION = {80: "HMMA", 90: "HGMMA"}
HMMA, HGMMA = re.compile(r"\bHMMA\.(\d+)"), re.compile(r"\bHGMMA\.64x(\d+)x16")
INSTRUCTIONS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", re.MULTILINE)
STEP = 16  # dimensions of one tensor-core step on halves

TYPES = {
    "torch.float64": "fp64",
    "torch.float32": "fp32",
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
    "torch.int8": "i8",
    "torch.uint8": "u8",
    "torch.int16": "i16",
    "torch.int32": "i32",
    "torch.int64": "i64",
    "torch.bool": "i1",
}


@dataclass(frozen=True)
class Launch:
    """A kernel as a call would start it."""

    function: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    def constant(self, name: str) -> Any:
        return dict(self.constants).get(name)


@dataclass(frozen=True)
class Report:
    """A kernel's row. `steps` are tensor-core steps of 16 dimensions in one pass of the loop over document tiles."""

    call: str
    kernel: str
    sm: int
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    hmma: int
    hgmma: int
    steps: float | None

    def problems(self, dim: int | None) -> list[str]:
        found = []
        if self.stack or self.spills:
            found.append(f"{self.spills} spilling instructions, {self.stack} bytes of stack")
        if self.shared > SHARED[self.sm]:
            found.append(f"{self.shared} bytes of shared memory, of {SHARED[self.sm]}")
        if self.steps is not None:
            wanted = INSTRUCTION[self.sm]
            if not (self.hgmma if wanted == "HGMMA" else self.hmma):
                found.append(f"no {wanted}")
            if dim == 48 and self.steps % 3:
                found.append(f"{self.steps} steps at d = 48; want 3")
        return [f"{self.call}, {self.kernel}, sm_{self.sm}: {problem}" for problem in found]


def calls() -> Iterator[tuple[str, int | None, Callable[[], object]]]:
    """What the report is of: a name, d where the products run on tensor cores, and a call on meta tensors."""
    import torch

    from edgecolbert_kernels.backends.contrastive_torch import Problem
    from edgecolbert_kernels.backends.triton import contrastive, distillation, gradients, pack, scoring

    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def packed(count: int) -> torch.Tensor:
        return empty(count + 1, dtype=torch.int64)

    def mask(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.bool)

    def score(
        Q: torch.Tensor, D: torch.Tensor, *batch: torch.Tensor | None, argmax: bool = False, **options: Any
    ) -> Callable[[], object]:
        given = (*batch, *(None,) * (6 - len(batch)))
        how = options.get("normalize", False), options.get("mask_mode", "exclude"), options.get("precision", "exact")
        return lambda: scoring.forward(Q, D, *given, *how, argmax, options.get("scales"))

    half, bf16, single = torch.float16, torch.bfloat16, torch.float32
    for dim in (48, 64, 96, 128):
        yield f"1 query, d {dim}", dim, score(empty(1, 32, dim), empty(1000, 300, dim))
        yield f"128 queries, d {dim}", dim, score(empty(128, 32, dim), empty(128, 300, dim))
    yield "1 query of 1024 tokens, d 128", 128, score(empty(1, 1024, 128), empty(1000, 1024, 128))
    yield "128 queries, d 48, bf16", 48, score(empty(128, 32, 48, dtype=bf16), empty(128, 300, 48, dtype=bf16))
    for suffix, precision in (("", "exact"), (", fast", "fast")):
        documents = empty(128, 300, 48, dtype=single)
        yield (
            f"128 queries, d 48, fp32{suffix}",
            None,
            score(empty(128, 32, 48, dtype=single), documents, precision=precision),
        )
    yield (
        "128 queries, d 48, documents masked",
        48,
        score(empty(128, 32, 48), empty(128, 300, 48), mask(128, 32), mask(128, 300)),
    )
    yield "128 queries, d 48, normalised", 48, score(empty(128, 32, 48), empty(128, 300, 48), normalize=True)
    yield "2 queries, d 48", 48, score(empty(2, 32, 48), empty(1000, 300, 48))
    yield "128 queries, d 256", 256, score(empty(128, 32, 256), empty(128, 300, 256))
    masked = empty(128, 32, 48), empty(128, 300, 48), mask(128, 32), mask(128, 300)
    yield "128 queries, d 48, documents masked, zero", 48, score(*masked, argmax=True, mask_mode="zero")
    yield "128 queries, d 48, masked, normalised, argmax", 48, score(*masked, argmax=True, normalize=True)
    yield "128 queries, d 48, with argmax", 48, score(empty(128, 32, 48), empty(128, 180, 48), argmax=True)
    yield "128 queries, d 128, with argmax", 128, score(empty(128, 32, 128), empty(128, 180, 128), argmax=True)
    yield (
        "1 query, packed, d 48",
        48,
        score(empty(1, 32, 48), empty(300000, 48), None, None, None, packed(1000)),
    )
    yield (
        "128 queries, documents packed, d 48",
        48,
        score(empty(128, 32, 48), empty(38400, 48), None, None, None, packed(128)),
    )
    yield (
        "128 queries, all packed, d 48",
        48,
        score(empty(4096, 48), empty(38400, 48), None, None, packed(128), packed(128)),
    )
    for name, dtype in (("int8", torch.int8), ("e4m3", torch.float8_e4m3fn)):
        scales = empty(1000, dtype=single)
        documents = empty(300000, 48, dtype=dtype)
        yield (
            f"1 query, packed, d 48, {name}",
            48,
            score(empty(1, 32, 48), documents, None, None, None, packed(1000), scales=scales),
        )
        yield (
            f"128 queries, packed, d 48, {name}",
            48,
            score(empty(128, 32, 48), documents, None, None, None, packed(1000), scales=scales),
        )
    yield "16 candidates a query, d 48", 48, score(empty(128, 32, 48), empty(128, 16, 180, 48), argmax=True)
    index = empty(4096, dtype=torch.int64)
    yield "chosen pairs, d 48", 48, score(empty(128, 32, 48), empty(128, 180, 48), None, None, None, None, index, index)
    yield "32 queries, d 768", 768, score(empty(32, 32, 768), empty(128, 180, 768))

    def gradient(
        dim: int, dtype: torch.dtype, normalize: bool = False, varlen: bool = False, precision: str = "exact"
    ) -> Callable[[], object]:
        Q, D, grad = empty(128, 32, dim, dtype=dtype), empty(128, 180, dim, dtype=dtype), empty(128, 128, dtype=single)
        argmax = empty(128 * 128 * 32, dtype=torch.int32 if varlen else torch.int16)
        batch: tuple[torch.Tensor | None, ...] = (None,) * 6
        if varlen:
            Q, D = Q.flatten(0, 1), D.flatten(0, 1)
            batch = mask(128 * 32), mask(128 * 180), packed(128), packed(128), None, None
        return lambda: gradients.backward(grad, Q, D, argmax, *batch, normalize, "exclude", precision, True, True, None)

    def recomputed(dim: int) -> Callable[[], object]:
        Q, D, grad = empty(128, 32, dim), empty(128, 180, dim), empty(128, 128, dtype=single)
        return lambda: scoring.winners(grad, Q, D, *(None,) * 6, False, "exclude", "exact")

    yield "winners found again, d 48", 48, recomputed(48)
    for dim in (48, 128):
        yield f"backward, d {dim}", None, gradient(dim, half)
    yield "backward, d 48, bf16", None, gradient(48, bf16)
    yield "backward, d 48, fp32", None, gradient(48, single)
    yield "backward, d 48, fp32, fast", None, gradient(48, single, precision="fast")
    yield "backward, d 48, normalised", None, gradient(48, half, normalize=True)
    yield "backward, packed, masked, d 48", None, gradient(48, half, varlen=True)

    def store(stored: torch.dtype) -> Callable[[], object]:
        rows, bounds = empty(9600, 48), packed(32)
        tokens, scales = empty(9600, 48, dtype=stored), empty(32, dtype=single) if stored is torch.int8 else None
        target, refused = empty(9600, dtype=torch.int64), empty(1, dtype=torch.int32)
        return lambda: pack.store_rows(rows, bounds, mask(9600), target, True, tokens, scales, refused)

    yield "pack, d 48, fp16", None, store(half)
    yield "pack, d 48, int8", None, store(torch.int8)
    unpacked = empty(9600, 48, dtype=torch.int8), packed(32), empty(32, dtype=single)
    yield "unpack, d 48, int8", None, lambda: pack.unpack_rows(*unpacked)

    def distilled(num_queries: int, count: int, objective: str, how: str, masked: bool) -> Callable[[], object]:
        student, teacher = empty(num_queries, count, dtype=single), empty(num_queries, count, dtype=single)
        kept, options = mask(num_queries, count) if masked else None, (objective, how, how, False)
        temperature = empty(dtype=single) if objective == "kl" else 1.0
        needs = True, objective == "kl"
        return lambda: distillation.distill(student, teacher, kept, temperature, 1.0, options, 1.0, *needs)

    for count in (16, 300, 4096):
        for objective, how in (("kl", "minmax"), ("kl", "zscore"), ("margin_mse", "zscore")):
            name = f"distillation, {count} candidates, {objective}, {how}"
            yield name, None, distilled(128, count, objective, how, masked=objective != "kl" or count > 16)

    def loss(num_documents: int, of_everything: bool) -> Callable[[], object]:
        table, double = (128, num_documents), torch.float64
        target, exclude = (mask(*table), mask(*table)) if of_everything else (empty(128, dtype=torch.int64), None)
        options = (0.1, 0.95, True) if of_everything else (0.0, None, False)
        Q, D, temperature = empty(128, 32, 48), empty(num_documents, 180, 48), empty(dtype=double)
        problem = Problem(Q, D, None, None, target, exclude, temperature, *options, False, "exclude")
        limit, scores, grad = (empty(*shape, dtype=single) for shape in ((128,), table, (128,)))

        def both() -> None:
            sums = contrastive.RowSums(problem, limit if of_everything else None, single)
            sums.add(scores, slice(0, num_documents))
            _, rows, columns = sums.finish()
            weights = contrastive.Weights(grad, problem, rows, columns, single, of_everything)
            weights.of(scores, slice(0, num_documents))

        return both

    yield "contrastive loss", None, loss(128, False)
    yield "contrastive loss, every option", None, loss(4096, True)


def launches(call: Callable[[], object], sm: int) -> list[Launch]:
    """What a call would start on a GPU of a compute capability."""
    from unittest import mock

    from edgecolbert_kernels.backends.triton import gradients, launch, scoring

    noted: list[Launch] = []

    def note(variant: Any, _programs: int, _rows: int, tensors: list[Any], integers: tuple[int, ...]) -> None:
        noted.append(recorded(variant, tensors, integers))

    with (
        mock.patch.object(launch.Variant, "launch", note),
        mock.patch.object(scoring, "capability", lambda _: sm),
        mock.patch.object(gradients, "capability", lambda _: sm),
    ):
        # Variants are kept by device, and a meta tensor's has no number.
        scoring.forget()
        gradients.forget()
        call()
    return noted


def recorded(variant: Any, tensors: list[Any], integers: tuple[int, ...]) -> Launch:
    names = variant.function.arg_names
    tensors = [tensors[0] if tensor is None else tensor for tensor in tensors]
    types = [f"*{TYPES[str(tensor.dtype)]}" for tensor in tensors] + ["i64"] * len(integers)
    constants = dict(zip(names[len(types) :], variant.constants, strict=True))
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = tuple(
        place for place in variant.aligned if place < len(tensors) or integers[place - len(tensors)] % 16 == 0
    )
    return Launch(
        variant.function,
        tuple(signature.items()),
        tuple(constants.items()),
        aligned,
        tuple(variant.options.items()),
    )


@functools.cache
def compiled(launch: Launch, sm: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(place,): [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(launch.function, dict(launch.signature), dict(launch.constants), attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(launch.options))


def report(call: str, dim: int | None, launch: Launch, sm: int) -> Report:
    kernel, options = compiled(launch, sm), dict(launch.options)
    code, usage = machine_code(kernel.asm["cubin"])
    tile = launch.constant("BM"), launch.constant("BN")
    steps = None
    if dim is not None and None not in tile:
        steps = max((volume(loop, options["num_warps"]) for loop in tensor_loops(code)), default=0.0)
        steps /= tile[0] * tile[1] * STEP
    name = launch.function.__name__
    resources = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")}  # type: ignore[index]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Report(
        call,
        name,
        sm,
        options["num_warps"],
        options["num_stages"],
        resources["REG"],
        resources["STACK"],
        spills,
        kernel.metadata.shared,
        len(HMMA.findall(code)),
        len(HGMMA.findall(code)),
        steps,
    )


def volume(code: str, num_warps: int) -> float:
    """Multiply-adds of its tensor-core instructions: an HMMA is a warp's, of 16 x 8 x 16 or 8; an HGMMA is of four warps'."""
    found = sum(16 * 8 * (16 if shape == "16816" else 8) for shape in HMMA.findall(code)) * num_warps
    return found + sum(64 * int(columns) * 16 for columns in HGMMA.findall(code)) * num_warps / 4


def tensor_loops(code: str) -> list[str]:
    """The innermost loops that multiply: without what a pipeline has put in front of them."""
    lines = [(int(match[1], 16), match[2]) for match in INSTRUCTIONS.finditer(code)]
    loops = []
    for address, text in lines:
        jump = re.search(r"\bBRA(?:\.U)? (?:\w+, )?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) <= address:
            loops.append((int(jump[1], 16), address))
    bodies = {loop: "\n".join(text for address, text in lines if loop[0] <= address <= loop[1]) for loop in set(loops)}
    able = [loop for loop, body in bodies.items() if HMMA.search(body) or HGMMA.search(body)]
    inside = [loop for loop in able if not any(loop[0] <= o[0] and o[1] <= loop[1] and o != loop for o in able)]
    return [bodies[loop] for loop in inside]


def machine_code(cubin: bytes) -> tuple[str, str]:
    """Disassembly and resource usage."""
    tool = disassembler()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(  # type: ignore[return-value]
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "--dump-resource-usage")
        )


@functools.cache
def disassembler() -> str:
    from importlib import resources

    found = shutil.which("cuobjdump") or resources.files("triton") / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not Path(str(found)).exists():
        sys.exit("cuobjdump is nowhere: it comes with the triton package for Linux and with CUDA")
    return str(found)


def every_report(only: str = "", show: Callable[[str], None] = lambda text: None) -> tuple[list[Report], list[str]]:
    """All rows, and what breaks a rule."""
    rows: list[Report] = []
    problems: list[str] = []
    for name, dim, call in calls():
        if only not in name:
            continue
        show(name)
        for sm in SHARED:
            for launch in launches(call, sm):
                row = report(name, dim, launch, sm)
                problems += row.problems(dim)
                rows.append(row)
    return rows, problems


def table(rows: list[Report]) -> str:
    lines = [
        "| call | kernel | sm | warps | stages | registers | spills | shared, bytes | HMMA | HGMMA | k-steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = "" if row.steps is None else f"{row.steps:g}"
        lines.append(
            f"| {row.call} | `{row.kernel}` | {row.sm} | {row.warps} | {row.stages} | {row.registers} | {row.spills} | "
            f"{row.shared} | {row.hmma} | {row.hgmma} | {steps} |"
        )
    return "\n".join(lines)


BEGIN, END = "<!-- table: python -m tools.triton_report -->", "<!-- end -->"


def with_table(text: str, rows: list[Report], compiler: str) -> str:
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\nTriton {compiler}.\n\n{table(rows)}\n\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.triton_report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a rule is broken")
    parser.add_argument("--only", default="", metavar="TEXT", help="calls whose name has this text; prints their rows")
    arguments = parser.parse_args()
    import triton

    rows, problems = every_report(arguments.only, lambda text: print(text, file=sys.stderr, flush=True))
    if arguments.only or arguments.check:
        print(table(rows))
    else:
        shared = {"suite": "triton-aot", "triton": triton.__version__}
        RESULTS.write_text("".join(json.dumps({**shared, **vars(row)}) + "\n" for row in rows))
        TABLE.write_text(with_table(TABLE.read_text(), rows, triton.__version__))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
