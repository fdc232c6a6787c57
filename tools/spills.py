"""Reads the disassembly of instruction-set objects and reports register spills in their hot loops.

    python tools/spills.py OBJECT... [--only PATTERN] [--verbose]

A hot loop is an innermost loop with at least `FEWEST` packed multiply-adds. Inside one, an instruction that reads or
writes a whole vector at a fixed place of the stack is a spill: the accumulators did not fit the registers. Scratch
arrays on the stack are read through an index register, or broadcast, and do not count. Prints one line a loop that
spills and one a file; the exit status is 1 when something spills, 2 when a file has no hot loop (the check is blind).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

FEWEST = 6  # a tile of 6 document tokens by 1 register of query tokens

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S.*)$")
_JUMP = re.compile(r"^(?:j\w+|b(?:\.\w+)?|cbn?z|tbn?z)\s+(?:.*,\s*)?(?:0x)?([0-9a-f]+) <")
_NO_RETURN = re.compile(r"^(?:jmp|b|ret|ud2|udf)\b")
_MULTIPLY_ADD = re.compile(
    r"^(?:\{vex\} )?(?:vfn?m(?:add|sub)\d+p[sh]|vpdpwssd|vpdpbusd|vpmaddwd)\s"  # x86
    r"|^(?:fmla|smlal2?|[su]dot|bfdot|bfmmla)\s+v"  # AArch64
)
# A whole register at a fixed stack slot: `vmovaps 0x40(%rsp),%zmm3`, `vpaddd (%rsp),%ymm1,%ymm1`, `ldr q1, [sp, #64]`.
_SPILL = re.compile(
    r"^v\S+\s(?=.*%[xyz]mm)(?:.*,)?(?:-?0x[0-9a-f]+)?\(%r[sb]p\)(?!\{1to)"
    r"|^(?:ld|st)u?[rp]\s+q\d+,.*\[(?:sp|x29)(?!, x)"
)
_DISASSEMBLERS = ("objdump", "aarch64-linux-gnu-objdump", "llvm-objdump", "llvm-objdump-14")


@dataclass(frozen=True)
class Loop:
    function: str
    instructions: tuple[str, ...]

    @property
    def multiply_adds(self) -> int:
        return sum(bool(_MULTIPLY_ADD.match(text)) for text in self.instructions)

    @property
    def spills(self) -> list[str]:
        return [text for text in self.instructions if _SPILL.match(text)]


def short(symbol: str) -> str:
    """A demangled name without namespaces, casts and arguments, which only make it long."""
    return re.sub(r"\(\w+\)(?=\d)", "", symbol.replace("(anonymous namespace)::", "")).split("(")[0]


def functions(disassembly: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Each function's name and its (address, instruction) lines, from the text that `objdump -d` prints."""
    name, lines = "", []
    for line in disassembly.splitlines():
        if match := _FUNCTION.match(line):
            if lines:
                yield name, lines
            name, lines = short(match[1]), []
        elif match := _INSTRUCTION.match(line):
            lines.append((int(match[1], 16), match[2].strip()))
    if lines:
        yield name, lines


def innermost_loops(name: str, lines: list[tuple[int, str]]) -> Iterator[Loop]:
    """Natural loops that hold no other: what can reach a backward jump without leaving through the jump's target."""
    position = {address: i for i, (address, _) in enumerate(lines)}
    before: list[list[int]] = [[] for _ in lines]
    backward = []
    for i, (_, text) in enumerate(lines):
        jump = _JUMP.match(text)
        target = position.get(int(jump[1], 16)) if jump else None
        if target is not None:
            before[target].append(i)
            if target <= i:
                backward.append((target, i))
        if i + 1 < len(lines) and not _NO_RETURN.match(text):
            before[i + 1].append(i)

    bodies = []
    for header, latch in backward:
        body, open_ = {header}, [latch]
        while open_:
            i = open_.pop()
            if i not in body:
                body.add(i)
                open_ += before[i]
        # Reached the entry of the function past the header: a block placed out of order, not a loop.
        if header == 0 or 0 not in body:
            bodies.append(body)
    for body in bodies:
        if not any(other < body for other in bodies):
            yield Loop(name, tuple(lines[i][1] for i in sorted(body)))


def hot_loops(disassembly: str) -> list[Loop]:
    return [
        loop
        for name, lines in functions(disassembly)
        for loop in innermost_loops(name, lines)
        if loop.multiply_adds >= FEWEST
    ]


def disassemble(path: str) -> str:
    for tool in filter(shutil.which, _DISASSEMBLERS):
        command = [tool, "--disassemble", "--demangle", "--no-show-raw-insn", path]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
    sys.exit(f"nothing here disassembles {path}; tried {', '.join(_DISASSEMBLERS)}: apt install binutils")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objects", nargs="+", metavar="OBJECT")
    parser.add_argument("--only", default="", metavar="PATTERN", help="look at functions whose name matches alone")
    parser.add_argument("--verbose", action="store_true", help="print every hot loop")
    arguments = parser.parse_args()
    status = 0
    for path in arguments.objects:
        loops = [loop for loop in hot_loops(disassemble(path)) if re.search(arguments.only, loop.function)]
        spilling = [loop for loop in loops if loop.spills]
        for loop in loops if arguments.verbose else spilling:
            print(f"{loop.function}: {loop.multiply_adds} multiply-adds in {len(loop.instructions)} instructions")
            for text in loop.spills:
                print(f"    spill: {text}")
        print(f"{path}: {len(loops)} hot loops, {len(spilling)} with spills")
        status = max(status, 1 if spilling else 0 if loops else 2)
    return status


if __name__ == "__main__":
    sys.exit(main())
